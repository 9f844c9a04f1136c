from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics.pairwise import rbf_kernel
from synthetic import labelled

from router.features import NGRAM_BUCKETS, Features, Prompt, prompt_from_messages, prompt_from_text
from router.predictor import (
    KERNEL_WIDTH,
    Prediction,
    Predictor,
    calibrate,
    kernel_inputs,
    linear_inputs,
    predict_part,
    prepare,
    tfidf,
    tree_inputs,
)
from training import estimator

Floats = NDArray[np.float64]


def fit_parts(features: Features, quality: Floats, parts: list[str]) -> dict[str, Any]:
    """Parts of rows that count alike, as prediction uses them."""
    return prepare(estimator.fit_parts(features, quality, parts, 0))


def prediction(gain: Floats) -> Prediction:
    return Prediction(tuple(f"t{t}" for t in range(gain.shape[1])), np.full(gain.shape, 0.5), gain)


def prompt_of(row: dict[str, Any]) -> Prompt:
    return prompt_from_messages(row["messages"]) if "messages" in row else prompt_from_text(row["prompt"])


@pytest.fixture(scope="module")
def prompts(sample_rows: list[dict[str, Any]]) -> list[Prompt]:
    """Prompts that the tiny bundle has not seen, of all kinds."""
    return [prompt_of(row) for row in sample_rows[150:230]]


@pytest.fixture(scope="module")
def features(prompts: list[Prompt], tiny_predictor: Predictor) -> Features:
    from router.features import extract

    return extract(prompts, tiny_predictor.encoder)


def matrix(features: Features) -> csr_matrix:
    grams = features.ngrams
    return csr_matrix((grams.count, grams.bucket, grams.start), shape=(len(features), NGRAM_BUCKETS))


# --- Score and choice ----------------------------------------------------------------------------------------------


def test_the_score_is_the_gain_of_the_best_other_target_over_the_cheapest() -> None:
    gain = np.array([[0.0, 0.2, 0.5], [0.0, 0.3, -0.1], [0.0, -0.4, -0.2]])
    assert prediction(gain).score.tolist() == [0.5, 0.3, -0.2]
    assert prediction(gain[:, :2]).score.tolist() == [0.2, 0.3, -0.4]


def test_with_two_targets_the_choice_is_score_above_threshold(random: np.random.Generator) -> None:
    gain = np.zeros((4_000, 2))
    gain[:, 1] = random.normal(0, 0.3, 4_000).round(3)
    found = prediction(gain)
    for threshold in [-2.0, -0.3, -0.1, 0.0, 0.05, 0.1, 0.3, 2.0, *found.score[:50]]:
        assert np.array_equal(found.choose(threshold), found.score > threshold), threshold


@pytest.mark.parametrize("score", [0.1, 0.2, 0.3, 0.7, -0.1, -0.3, 0.0, 1e-9])
def test_a_score_that_equals_the_threshold_stays_with_the_cheapest(score: float) -> None:
    found = prediction(np.array([[0.0, score]]))
    assert found.choose(score).tolist() == [0]
    assert found.choose(float(np.nextafter(score, -9))).tolist() == [1]


def test_with_more_targets_the_cheapest_within_the_threshold_of_the_best_is_taken(
    random: np.random.Generator,
) -> None:
    gain = np.hstack([np.zeros((3_000, 1)), random.normal(0.05, 0.2, (3_000, 3))])
    found = prediction(gain)
    for threshold in (0.0, 0.03, 0.1, 0.5):
        best_other = gain[:, 1:].max(axis=1)
        for row, chosen in enumerate(found.choose(threshold)):
            # The cheapest is measured as with two targets; a target is within the threshold of the best other one.
            enough = [best_other[row] <= threshold, *(gain[row, 1:] >= best_other[row] - threshold)]
            assert chosen == enough.index(True)


def test_three_targets_by_hand() -> None:
    found = prediction(np.array([[0.0, 0.2, 0.25]] * 4 + [[0.0, -0.1, -0.3]]))
    assert found.choose(0.0).tolist() == [2, 2, 2, 2, 0]
    assert found.choose(0.06)[0] == 1
    assert found.choose(0.24)[0] == 1
    assert found.choose(0.25)[0] == 0
    # Below zero: not even a loss keeps the cheapest, and the best of the others is taken.
    assert found.choose(-0.5).tolist() == [2, 2, 2, 2, 1]


def test_by_value_three_targets_by_hand() -> None:
    quality = np.array([[0.4, 0.6, 0.65], [0.5, 0.4, 1.0]])
    found = Prediction(("a", "b", "c"), quality, np.zeros((2, 3)))
    cost = [0.001, 0.002, 0.012]
    assert found.choose_by_value(cost, 0.0).tolist() == [2, 2]
    # .05 more for a cent more: not worth it from 5 a dollar up; .2 for a tenth of a cent is up to 200.
    assert found.choose_by_value(cost, 4.9).tolist() == [2, 2]
    assert found.choose_by_value(cost, 5.1).tolist() == [1, 2]
    assert found.choose_by_value(cost, 46.0).tolist() == [1, 0]
    assert found.choose_by_value(cost, 201.0).tolist() == [0, 0]
    # A cost a prompt, and the first of equals.
    assert found.choose_by_value([cost, [0.0, 0.0, 9.0]], 1.0).tolist() == [2, 0]
    assert found.choose_by_value([1.0, 1.0, 1.0], 3.0).tolist() == [2, 2]
    even = Prediction(("a", "b", "c"), np.full((1, 3), 0.5), np.zeros((1, 3)))
    assert even.choose_by_value([1.0, 1.0, 1.0], 3.0).tolist() == [0]


def test_no_prompts_no_predictions(tiny_predictor: Predictor) -> None:
    found = tiny_predictor.predict([])
    assert found.quality.shape == found.gain.shape == (0, 2)
    assert found.score.shape == found.choose(0.1).shape == (0,)


# --- Each part against the library that trained it --------------------------------------------------------------------


def test_tfidf_is_that_of_scikit_learn(features: Features) -> None:
    counts = matrix(features)
    reference = TfidfTransformer(sublinear_tf=True, smooth_idf=True, norm="l2").fit(counts)
    expected = reference.transform(counts)
    assert expected.nnz == len(features.ngrams.bucket)
    assert tfidf(features, reference.idf_) == pytest.approx(expected.data, abs=1e-6)
    # What training stores is that idf, in half precision.
    fitted = fit_parts(features, np.tile([[0.0, 1.0], [1.0, 0.0]], (40, 1)), ["words"])
    assert fitted["words.idf"].astype(float) == pytest.approx(reference.idf_, rel=1e-3)


def test_words_are_a_logistic_regression(features: Features, random: np.random.Generator) -> None:
    quality = random.integers(0, 2, (80, 2)).astype(float)
    arrays = fit_parts(features, quality, ["words"])
    x = matrix(features)
    x.data = tfidf(features, arrays["words.idf"])
    found = predict_part("words", features, arrays)
    for t in range(2):
        model = LogisticRegression(solver="liblinear", random_state=0).fit(x, quality[:, t])
        assert found[:, t] == pytest.approx(model.predict_proba(x)[:, 1], abs=2e-3)  # half precision
        exact = {
            **arrays,
            "words.coef": np.tile(model.coef_, (2, 1)),
            "words.intercept": np.tile(model.intercept_, 2),
        }
        assert predict_part("words", features, exact)[:, t] == pytest.approx(
            model.predict_proba(x)[:, 1], abs=1e-6
        )


def test_a_fractional_quality_counts_as_that_share_of_a_success(features: Features) -> None:
    x = matrix(features)
    quality = np.tile([[0.25, 1.0], [0.75, 0.0]], (40, 1))
    arrays = fit_parts(features, quality, ["words"])
    x.data = tfidf(features, arrays["words.idf"])
    rows = np.concatenate([np.repeat([row], 4) for row in range(80)])
    labels = np.concatenate([np.arange(4) < 4 * q for q in quality[:, 0]])
    model = LogisticRegression(solver="liblinear").fit(x[rows], labels, sample_weight=np.full(320, 0.25))
    assert predict_part("words", features, arrays)[:, 0] == pytest.approx(
        model.predict_proba(x)[:, 1], abs=5e-3
    )


@pytest.mark.parametrize("n", [200, 900])
def test_trees_are_those_of_scikit_learn(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, models = labelled(n), []
    fit = HistGradientBoostingRegressor.fit

    def remember(
        self: HistGradientBoostingRegressor, *args: Any, **options: Any
    ) -> HistGradientBoostingRegressor:
        models.append(self)
        return fit(self, *args, **options)

    monkeypatch.setattr(HistGradientBoostingRegressor, "fit", remember)
    quality = data.quality.copy()
    quality[: n // 2, 1] = np.nan  # other rows, and so other trees, for the second target
    arrays = fit_parts(data.features, quality, ["trees"])
    other = labelled(500, seed=1).features
    found = predict_part("trees", other, arrays)
    assert len(models) == 2
    for t, model in enumerate(models):
        assert model.n_iter_ > 20
        assert found[:, t] == pytest.approx(model.predict(tree_inputs(other, arrays)), abs=1e-9)
    assert found.std(axis=0).min() > 0.01


def test_targets_may_have_different_numbers_of_trees() -> None:
    arrays = {
        "projection.mean": np.zeros(16, np.float32),
        "projection.axes": np.eye(16, dtype=np.float32),
        "trees.feature": np.array([0, 0, 0, 0, 0]),
        "trees.threshold": np.array([0.0, np.inf, np.inf, np.inf, np.inf]),
        "trees.children": np.array([[1, 2], [1, 1], [2, 2], [3, 3], [4, 4]]),
        "trees.value": np.array([0.0, 1.0, 2.0, 10.0, 100.0]),
        "trees.root": np.array([[0, 3], [4, -1]]),
        "trees.baseline": np.array([0.5, 0.25]),
        "trees.depth": np.array(1),
    }
    # The first dense feature is the length's logarithm: above 0 for every prompt.
    found = predict_part("trees", labelled(3).features, arrays)
    assert found.tolist() == [[12.5, 100.25]] * 3


def test_kernel_is_kernel_ridge_regression() -> None:
    """With all prompts as centres, scikit-learn's own; missing labels are left out."""
    data = labelled(120)
    quality = data.quality.copy()
    quality[::3, 0] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimator, "CENTRES", 60)
        arrays = fit_parts(data.features, quality, ["kernel"])
    centres = arrays["kernel.centres"]
    assert len(centres) == 60
    x = kernel_inputs(data.features, arrays)
    for t in range(2):
        known = ~np.isnan(quality[:, t])
        rows = rbf_kernel(x[known], centres, gamma=KERNEL_WIDTH).astype(np.float64)
        # The same problem as ridge regression on features whose inner products are the kernel.
        root = np.linalg.cholesky(rbf_kernel(centres, centres, gamma=KERNEL_WIDTH) + 1e-7 * np.eye(60))
        model = Ridge(alpha=estimator.KERNEL_RIDGE).fit(np.linalg.solve(root, rows.T).T, quality[known, t])
        asked = rbf_kernel(x, centres, gamma=KERNEL_WIDTH)
        expected = model.predict(np.linalg.solve(root, asked.T).T)
        assert predict_part("kernel", data.features, arrays)[:, t] == pytest.approx(expected, abs=2e-3)


def test_weights_count_in_the_kernels_fit() -> None:
    """Rows of weight zero might as well have other labels."""
    data = labelled(100)
    other = data.quality.copy()
    other[:50] = 1.0 - other[:50]
    weight = np.where(np.arange(100) < 50, 1e-9, 1.0)
    fits = [
        prepare(estimator.fit_parts(data.features, quality, ["kernel"], 0, weight))
        for quality in (data.quality, other)
    ]
    found = [predict_part("kernel", data.features, arrays) for arrays in fits]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    unweighted = predict_part("kernel", data.features, fit_parts(data.features, data.quality, ["kernel"]))
    assert np.abs(found[0] - unweighted).max() > 0.01


def test_a_prompt_unlike_any_gets_the_mean_it_was_fitted_with() -> None:
    data = labelled(100)
    arrays = fit_parts(data.features, data.quality, ["kernel"])
    far = prepare({**arrays, "kernel.centres": arrays["kernel.centres"] + 100})
    assert predict_part("kernel", data.features, far) == pytest.approx(
        np.tile(arrays["kernel.intercept"], (100, 1))
    )


def test_more_prompts_than_the_kernel_compares_at_once() -> None:
    data = labelled(60)
    arrays = fit_parts(data.features, data.quality, ["kernel"])
    many = labelled(5_000, seed=3).features
    found = predict_part("kernel", many, arrays)
    for rows in (np.arange(4_090, 4_100), np.array([0, 4_999])):
        assert predict_part("kernel", many.take(rows), arrays) == pytest.approx(found[rows], abs=1e-5)


def test_linear_is_a_ridge_regression(features: Features, random: np.random.Generator) -> None:
    quality = random.random((80, 2))
    arrays = fit_parts(features, quality, ["linear"])
    x = linear_inputs(features, arrays)
    assert x.shape == (80, 29 + 29 * 6 + 384)
    expected = Ridge(alpha=estimator.RIDGE).fit(x, quality).predict(x)
    assert predict_part("linear", features, arrays) == pytest.approx(expected, abs=1e-6)


def test_what_lies_far_beyond_the_training_prompts_is_held() -> None:
    """A single prompt of enormous length must not carry the straight line away with it."""
    data = labelled(200)
    arrays = fit_parts(data.features, data.quality, ["linear"])
    far = Features(
        data.features.embedding[:2], data.features.take(np.arange(2)).ngrams, data.features.dense[:2] + 1e6
    )
    farther = Features(far.embedding, far.ngrams, far.dense * 1e6)
    assert np.array_equal(linear_inputs(far, arrays), linear_inputs(farther, arrays))


# --- Calibration ---------------------------------------------------------------------------------------------------


def test_gains_beyond_the_curves_ends_stay_distinct() -> None:
    arrays = {
        "quality.slope": np.array([1.0, 1.0]),
        "quality.intercept": np.zeros(2),
        "gain.x": np.array([[0.0, 1.0, 1.0]]),  # the last knot repeated, as padding does
        "gain.y": np.array([[0.1, 0.3, 0.3]]),
        "gain.slope": np.array([0.2]),
    }
    stacked = np.array([[0.0, raw] for raw in (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0)])
    found = calibrate(stacked, arrays, ("weak", "strong"))
    assert found.score == pytest.approx([-0.3, -0.1, 0.1, 0.2, 0.3, 0.5])
    assert found.gain[:, 0].tolist() == [0.0] * 6
    assert found.quality[:, 1] == pytest.approx(1 / (1 + np.exp(-stacked[:, 1])))


def test_quality_stays_within_its_range_however_large_the_sum() -> None:
    arrays = {
        "quality.slope": np.array([1.0, 1.0]),
        "quality.intercept": np.zeros(2),
        "gain.x": np.array([[0.0, 1.0]]),
        "gain.y": np.array([[0.0, 1.0]]),
        "gain.slope": np.array([1.0]),
    }
    found = calibrate(np.array([[-1e6, 1e6], [1e300, -1e300]]), arrays, ("weak", "strong"))
    assert found.quality.tolist() == [[0.0, 1.0], [1.0, 0.0]]


# --- The whole -----------------------------------------------------------------------------------------------------


def test_a_prompt_scores_the_same_alone_and_among_others(
    tiny_predictor: Predictor, features: Features, prompts: list[Prompt]
) -> None:
    together = tiny_predictor.predict_features(features)
    for row in range(0, len(prompts), 8):
        alone = features.take(np.array([row]))
        for part in tiny_predictor.manifest.parts:
            assert predict_part(part, alone, tiny_predictor._arrays)[0] == pytest.approx(
                predict_part(part, features, tiny_predictor._arrays)[row], abs=1e-6
            ), part
        assert tiny_predictor.predict([prompts[row]]).score[0] == pytest.approx(together.score[row], abs=1e-6)


def test_qualities_are_shares_and_gains_are_told_apart(
    tiny_predictor: Predictor, features: Features, prompts: list[Prompt]
) -> None:
    found = tiny_predictor.predict_features(features)
    assert found.targets == ("weak", "strong")
    assert found.quality.min() >= 0.0
    assert found.quality.max() <= 1.0
    assert np.isfinite(found.gain).all()
    assert len(np.unique(found.score)) == len({prompt.text for prompt in prompts}) == 80


def test_a_word_more_is_another_score(tiny_predictor: Predictor) -> None:
    ask = "explain the difference between optimistic and pessimistic locking in a database please"
    ends = [*(place for place, letter in enumerate(ask) if letter == " "), len(ask)]
    asked = [prompt_from_text(ask[:end]) for end in ends]
    assert len(np.unique(tiny_predictor.predict(asked).score)) == len(ends) == 12


def test_several_threads_get_what_one_gets(tiny_predictor: Predictor, prompts: list[Prompt]) -> None:
    some = prompts[:24]
    expected = [tiny_predictor.predict([prompt]).score[0] for prompt in some]

    def scores(_: int) -> list[float]:
        return [tiny_predictor.predict([prompt]).score[0] for prompt in some]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(scores, range(4)):
            assert found == expected


def test_the_bundles_own_threshold_and_name(tiny_predictor: Predictor) -> None:
    assert tiny_predictor.threshold == tiny_predictor.manifest.thresholds["default"].value
    assert tiny_predictor.bundle.manifest is tiny_predictor.manifest
    assert tiny_predictor.name.partition("@")[0] == "tiny"
    assert len(tiny_predictor.name.partition("@")[2]) == 8
