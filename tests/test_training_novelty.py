from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import Labelled, labelled

from router.features import NGRAM_BUCKETS, prompt_from_messages, prompt_from_text
from router.predictor import Arrays, Predictor, novelty, novelty_signs, predict, prepare, project
from training.estimator import STACKED, QualityEstimator, fit_idf, fit_parts, fit_projection
from training.novelty import (
    FLAGGED,
    MAXIMUM_SOURCES,
    conformal_cut,
    cross_validated,
    fit_cuts,
    fit_distances,
    fit_novelty,
    kinds_of,
)

Floats = NDArray[np.float64]


def sources(*counts: int) -> NDArray[np.str_]:
    return np.repeat([f"s{i}" for i in range(len(counts))], counts)


# --- The cut -----------------------------------------------------------------------------------------------------------


def test_the_cut_is_the_conformal_quantile() -> None:
    values = np.arange(1.0, 100.0)  # 99 rows: ⌈100 · .96⌉ = 96
    assert conformal_cut(values) == 96.0
    assert conformal_cut(values[::-1], flagged=0.1) == 90.0
    assert conformal_cut(values[:24]) == 24.0
    assert conformal_cut(values[:23]) == np.inf  # 24 rows are the least that can speak of one in twenty-five


@pytest.mark.parametrize("n", [60, 200, 1_000])
def test_of_exchangeable_rows_at_most_the_share_is_flagged(n: int) -> None:
    random = np.random.default_rng(0)
    flagged = [
        (random.standard_t(3, 500) > conformal_cut(random.standard_t(3, n))).mean() for _ in range(400)
    ]
    # The promise is of the mean over draws of the calibration rows; it is met closely, not by flagging nothing.
    error = 3 * np.std(flagged) / np.sqrt(len(flagged))
    assert FLAGGED - 1 / (n + 1) - error <= np.mean(flagged) <= FLAGGED + error


def test_a_rare_source_is_held_to_the_same_share_as_a_common_one() -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        rows = np.concatenate([random.normal(0, 1, 5_000), random.normal(4, 2, 200)])
        kinds = kinds_of(sources(5_000, 200))
        cuts = fit_cuts(np.tile(rows[None, :, None], (2, 1, 1)), kinds)
        new = random.normal(4, 2, 1_000)
        seen = (new - cuts["novelty.mean"]) / cuts["novelty.scale"] / cuts["novelty.cut"][:, None]
        shares.append((seen.min(axis=0) > 1).mean())
    assert np.mean(shares) <= FLAGGED + 0.005


def test_small_sources_share_a_distance_and_few_rows_have_none() -> None:
    assert kinds_of(sources(300, 500)).tolist() == [1] * 300 + [0] * 500
    assert kinds_of(sources(300, 40, 40)).tolist() == [0] * 300 + [1] * 80
    assert kinds_of(sources(300, 40)).tolist() == [0] * 340
    assert kinds_of(sources(30, 25)).tolist() == [0] * 55
    many = kinds_of(sources(*[100] * (MAXIMUM_SOURCES + 3)))
    assert np.unique(many).tolist() == list(range(MAXIMUM_SOURCES + 1))
    assert (many == MAXIMUM_SOURCES).sum() == 300


def test_novelty_is_in_units_of_the_cut(random: np.random.Generator) -> None:
    signs = random.normal(5, [1.0, 20.0], (1, 999, 2))
    cuts = fit_cuts(signs, np.zeros(999, dtype=np.intp))
    total = ((signs[0] - cuts["novelty.mean"]) / cuts["novelty.scale"]).sum(axis=1) / cuts["novelty.cut"]
    assert total.mean() == pytest.approx(0, abs=1e-9)
    assert (total > 1).sum() == 999 - 960


def test_a_sign_that_is_the_same_for_all_says_nothing(random: np.random.Generator) -> None:
    signs = np.column_stack([random.normal(size=500), np.full(500, 3.0)])[None]
    cuts = fit_cuts(signs, np.zeros(500, dtype=np.intp))
    assert np.isinf(cuts["novelty.scale"][0, 1])
    assert np.isfinite(cuts["novelty.cut"]).all()


def test_the_cross_validated_share_is_by_source(random: np.random.Generator) -> None:
    # Two sources that do not overlap: each is seen as far away by the other.
    kinds = np.repeat([0, 1], 600)
    signs = np.stack([random.normal(9.0 * (kinds != kind), 1.0)[:, None] for kind in range(2)])
    figures = cross_validated(signs, kinds, sources(600, 600), np.arange(1_200) % 5)
    assert figures.flagged == pytest.approx(np.mean(list(figures.by_source.values())))
    for share in figures.by_source.values():
        assert 0.03 < share < 0.07


# --- On prompts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Labelled:
    return labelled(900)


@pytest.fixture(scope="module")
def fitted(rows: Labelled) -> Arrays:
    train = np.arange(600)
    features, groups = rows.features.take(train), rows.groups[train]
    estimator = QualityEstimator(("weak", "strong"), parts=("words", "linear"), folds=2)
    estimator.fit(features, rows.quality[train], groups)
    measures, _ = fit_novelty(features, sources(400, 200), groups, prepare(estimator.arrays_))
    return prepare(estimator.arrays_ | measures)


def test_held_out_rows_are_flagged_seldom(rows: Labelled, fitted: Arrays) -> None:
    found = novelty(rows.features.take(np.arange(600, 900)), fitted)
    assert (found > 1).mean() <= FLAGGED + 0.02


def test_over_many_draws_at_most_the_share_of_new_rows_is_flagged() -> None:
    shares = []
    for seed in range(12):
        data = labelled(500, seed=seed)
        train, new = np.arange(250), np.arange(250, 500)
        features = data.features.take(train)
        arrays = prepare(fit_projection(features) | {"words.idf": fit_idf(features)})
        measures, _ = fit_novelty(features, sources(250), data.groups[train], arrays, seed=seed)
        shares.append((novelty(data.features.take(new), {**arrays, **measures}) > 1).mean())
    # The bundle's arrays know more rows than those that the cut was measured by: fewer are flagged, if anything.
    assert 0.02 < np.mean(shares) <= FLAGGED + 0.01


def test_a_source_in_one_fold_alone_can_be_fitted(rows: Labelled) -> None:
    together = np.where(np.arange(900) < 100, "one", rows.groups)
    arrays = prepare(fit_projection(rows.features))
    measures, figures = fit_novelty(rows.features, sources(100, 800), together, arrays)
    assert np.isfinite(measures["novelty.cut"]).all()
    assert figures.by_source.keys() == {"s0", "s1"}


def test_another_embedding_other_words_and_another_form_are_each_flagged(
    rows: Labelled, fitted: Arrays
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
    arrays = prepare(fit_projection(features))
    zeros = np.zeros(400, dtype=np.intp)
    arrays |= fit_distances(features, zeros, arrays)
    centred = stretched - stretched.mean(axis=0)
    covariance, drawn = np.cov(centred.T, bias=True), 16 / (400 + 16)
    shrunk = (1 - drawn) * covariance + drawn * np.trace(covariance) / 16 * np.eye(16)
    precision = np.linalg.inv(shrunk)
    expected = np.einsum("ij,jk,ik->i", centred, precision, centred)
    assert novelty_signs(features, arrays)[0, :, 0] == pytest.approx(expected, rel=0.02)
    # Cut to three axes, all others share one variance.
    few = {**arrays, "projection.axes": arrays["projection.axes"][:3]}
    axes = project(stretched, few)
    few["novelty.centre_axes"] = few["novelty.centre_axes"][:, :3]
    few["novelty.variance"] = few["novelty.variance"][:, :3]
    few["novelty.rest"] = np.array([0.5])
    beside = (centred**2).sum(axis=1) - (axes**2).sum(axis=1)
    expected = (axes**2 / few["novelty.variance"][0]).sum(axis=1) + beside / 0.5
    assert novelty_signs(features, few)[0, :, 0] == pytest.approx(expected, rel=0.01)


def test_a_bundle_without_words_has_two_signs(rows: Labelled) -> None:
    arrays = prepare(fit_parts(rows.features, rows.quality, ("linear",), 0))
    measures, _ = fit_novelty(rows.features, sources(900), rows.groups, arrays)
    assert novelty_signs(rows.features, {**arrays, **measures}).shape == (1, 900, 2)


def test_a_bundle_of_before_flags_nothing(rows: Labelled, fitted: Arrays) -> None:
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
    assert set(manifest.parts) == set(STACKED)
