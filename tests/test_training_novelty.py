from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import Labelled, labelled

from router.features import NGRAM_BUCKETS, prompt_from_messages, prompt_from_text
from router.predictor import PARTS, Predictor, novelty, novelty_signs, predict, prepare, project
from training.estimator import QualityEstimator, fit_parts
from training.novelty import FLAGGED, MINIMUM_ROWS, conformal_cut, cross_validated, fit_cut

Floats = NDArray[np.float64]


def sources(*counts: int) -> NDArray[np.str_]:
    return np.repeat([f"s{i}" for i in range(len(counts))], counts)


# --- The cut -----------------------------------------------------------------------------------------------------------


def test_the_cut_is_the_split_conformal_quantile() -> None:
    values = np.arange(1.0, 100.0)  # 99 rows: ⌈100 · .95⌉ = 95
    assert conformal_cut(values, sources(99)) == 95.0
    assert conformal_cut(values[::-1], sources(99), flagged=0.1) == 90.0
    assert (
        conformal_cut(values[:18], sources(18)) == np.inf
    )  # 19 rows are the least that can speak of one in twenty


@pytest.mark.parametrize("n", [60, 200, 1_000])
def test_of_exchangeable_rows_at_most_the_share_is_flagged(n: int) -> None:
    random = np.random.default_rng(0)
    flagged = [
        (random.standard_t(3, 500) > conformal_cut(random.standard_t(3, n), sources(n))).mean()
        for _ in range(400)
    ]
    # The promise is of the mean over draws of the calibration rows; it is met closely, not by flagging nothing.
    error = 3 * np.std(flagged) / np.sqrt(len(flagged))
    assert FLAGGED - 1 / (n + 1) - error <= np.mean(flagged) <= FLAGGED + error


def test_a_rare_source_is_held_to_the_same_share_as_a_common_one() -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        rows = np.concatenate([random.normal(0, 1, 5_000), random.normal(4, 2, 200)])
        cut = conformal_cut(rows, sources(5_000, 200))
        shares.append((random.normal(4, 2, 1_000) > cut).mean())
        assert (rows[:5_000] > cut).mean() < FLAGGED
    assert np.mean(shares) <= FLAGGED + 0.005


def test_a_source_of_a_few_rows_has_no_say_of_its_own() -> None:
    rows = np.concatenate([np.arange(1_000.0), np.full(MINIMUM_ROWS - 1, 9e9)])
    assert (
        conformal_cut(rows, sources(1_000, MINIMUM_ROWS - 1)) < 9e9 or FLAGGED * len(rows) < MINIMUM_ROWS - 1
    )
    assert conformal_cut(np.append(rows, 9e9), sources(1_000, MINIMUM_ROWS)) == 9e9


def test_novelty_is_in_units_of_the_cut(random: np.random.Generator) -> None:
    signs = random.normal(5, [1.0, 20.0], (999, 2))
    fitted = fit_cut(signs, sources(999))
    total = ((signs - fitted["novelty.mean"]) / fitted["novelty.scale"]).sum(axis=1) / fitted["novelty.cut"]
    assert total.mean() == pytest.approx(0, abs=1e-9)
    assert (total > 1).sum() == 999 - 950


def test_a_sign_that_is_the_same_for_all_says_nothing(random: np.random.Generator) -> None:
    fitted = fit_cut(np.column_stack([random.normal(size=500), np.full(500, 3.0)]), sources(500))
    assert np.isinf(fitted["novelty.scale"][1])
    assert np.isfinite(fitted["novelty.cut"])


def test_the_cross_validated_share_is_by_source(random: np.random.Generator) -> None:
    signs = random.normal(0, np.repeat([1.0, 3.0], 600)[:, None], (1_200, 2))
    figures = cross_validated(signs, sources(600, 600), np.arange(1_200).astype(str))
    assert set(figures.by_source) == {"s0", "s1"}
    assert figures.flagged == pytest.approx(np.mean(list(figures.by_source.values())))
    assert figures.by_source["s0"] < 0.01
    assert 0.02 < figures.by_source["s1"] < 0.08


# --- On prompts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Labelled:
    return labelled(900)


@pytest.fixture(scope="module")
def fitted(rows: Labelled) -> dict[str, NDArray[np.generic]]:
    train = np.arange(600)
    estimator = QualityEstimator(("weak", "strong"), parts=("words", "linear"), folds=3)
    estimator.fit(rows.features.take(train), rows.quality[train], rows.groups[train])
    assert estimator.novelty_signs_.shape == (600, 3)
    return prepare(estimator.arrays_ | fit_cut(estimator.novelty_signs_, sources(600)))


def test_held_out_rows_are_flagged_seldom(rows: Labelled, fitted: dict[str, NDArray[np.generic]]) -> None:
    found = novelty(rows.features.take(np.arange(600, 900)), fitted)
    assert (found > 1).mean() <= FLAGGED + 0.03
    assert abs(found.mean()) < 0.3


def test_another_embedding_other_words_and_another_form_are_each_flagged(
    rows: Labelled, fitted: dict[str, NDArray[np.generic]]
) -> None:
    held_out = rows.features.take(np.arange(600, 900))
    shifted = held_out.embedding.copy()
    shifted[:, :4] += 1.0
    other_words = replace(held_out.ngrams, bucket=(held_out.ngrams.bucket + 77_777) % NGRAM_BUCKETS)
    longer = held_out.dense.copy()
    longer[:, 0] += 3.0  # twenty times as many characters
    for changed in (
        replace(held_out, embedding=shifted),
        replace(held_out, ngrams=other_words),
        replace(held_out, dense=longer),
    ):
        assert (novelty(changed, fitted) > 1).mean() > 0.9


def test_the_distance_is_that_of_probabilistic_pca(random: np.random.Generator) -> None:
    # Where the projection keeps every axis it is the Mahalanobis distance itself.
    data = labelled(400, seed=3)
    stretched = (data.features.embedding @ random.normal(size=(16, 16))).astype(np.float32)
    features = replace(data.features, embedding=stretched)
    arrays = prepare(fit_parts(features, data.quality, (), 0))
    centred = stretched - stretched.mean(axis=0)
    covariance, drawn = np.cov(centred.T, bias=True), 16 / (400 + 16)
    shrunk = (1 - drawn) * covariance + drawn * np.trace(covariance) / 16 * np.eye(16)
    precision = np.linalg.inv(shrunk)
    expected = np.einsum("ij,jk,ik->i", centred, precision, centred)
    assert novelty_signs(features, arrays)[:, 0] == pytest.approx(expected, rel=0.02)
    # Cut to three axes, all others share one variance.
    few = {**arrays, "projection.axes": arrays["projection.axes"][:3]}
    axes = project(stretched, few)
    few["novelty.variance"] = few["novelty.variance"][:3]
    few["novelty.rest"] = np.array(0.5)
    beside = (centred**2).sum(axis=1) - (axes**2).sum(axis=1)
    expected = (axes**2 / few["novelty.variance"]).sum(axis=1) + beside / 0.5
    assert novelty_signs(features, few)[:, 0] == pytest.approx(expected, rel=0.01)


def test_a_bundle_without_words_has_two_signs(rows: Labelled) -> None:
    arrays = prepare(fit_parts(rows.features, rows.quality, ("linear",), 0))
    assert novelty_signs(rows.features, arrays).shape == (900, 2)


def test_a_bundle_of_before_flags_nothing(rows: Labelled, fitted: dict[str, NDArray[np.generic]]) -> None:
    old = {name: values for name, values in fitted.items() if not name.startswith("novelty.")}
    found = predict(rows.features, old, ("weak", "strong"), ("words", "linear"))
    assert found.novelty is None
    assert found.unfamiliar.tolist() == [False] * 900
    now = predict(rows.features, fitted, ("weak", "strong"), ("words", "linear"))
    assert now.novelty is not None
    assert np.array_equal(now.unfamiliar, now.novelty > 1)
    assert np.array_equal(now.score, found.score)


def test_no_prompt_and_a_prompt_without_words(tiny_predictor: Predictor) -> None:
    assert tiny_predictor.predict([]).unfamiliar.shape == (0,)
    found = tiny_predictor.predict([prompt_from_text("")])
    assert found.novelty is not None
    assert np.isfinite(found.novelty).all()


def test_another_language_and_another_kind_of_request_are_flagged(tiny_predictor: Predictor) -> None:
    prompts = [
        prompt_from_text("ᓄᓇᕗᑦ ᐃᓕᓐᓂᐊᖅᑐᓕᕆᔨᒃᑯᑦ " * 5),
        prompt_from_text("\x00\x01 %PDF-1.7 0000000016 00000 n " * 40),
        prompt_from_messages([{"role": "user", "content": "zq " * 2_000}]),
    ]
    assert tiny_predictor.predict(prompts).unfamiliar.all()


def test_the_manifest_and_the_card_say_how_many_are_flagged(tiny_predictor: Predictor) -> None:
    manifest = tiny_predictor.manifest
    assert 0 <= manifest.metrics["novelty"]["flagged"] <= 0.12  # 150 rows
    assert manifest.metrics["novelty"]["by_source"].keys() == {"sample"}
    assert "is flagged" in tiny_predictor.bundle.card
    assert set(manifest.parts) == set(PARTS)
