from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import Labelled, labelled

from router.predictor import PARTS, Array, Prediction, predict_part, prepare
from training.estimator import STACKED, QualityEstimator, fit_parts, fit_stack, source_weights
from training.metrics import apgr, cost_quality_curve, expected_calibration_error

Floats = NDArray[np.float64]
TARGETS = ("weak", "strong")


def fitted(data: Labelled, **options: object) -> QualityEstimator:
    targets = tuple(f"t{t}" for t in range(data.quality.shape[1]))
    estimator = QualityEstimator(targets, **options)  # type: ignore[arg-type]
    return estimator.fit(data.features, data.quality, data.groups)


def ranked(score: Floats, data: Labelled, target: int = 1) -> float:
    return apgr(cost_quality_curve(score, data.quality[:, 0], data.quality[:, target]))


@pytest.fixture(scope="module")
def seen() -> Labelled:
    return labelled(600)


@pytest.fixture(scope="module")
def fresh() -> Labelled:
    return labelled(2_000, seed=1)


@pytest.fixture(scope="module")
def estimator(seen: Labelled) -> QualityEstimator:
    return fitted(seen)


def test_the_stack_beats_each_of_its_parts_where_each_sees_another_signal(
    seen: Labelled, fresh: Labelled, estimator: QualityEstimator
) -> None:
    together = ranked(estimator.predict(fresh.features).score, fresh)
    arrays = prepare(fit_parts(seen.features, seen.quality, STACKED, 0))
    alone = {}
    for part in STACKED:
        quality = predict_part(part, fresh.features, arrays)
        alone[part] = ranked(quality[:, 1] - quality[:, 0], fresh)
    assert min(alone.values()) > 0.55, alone  # each has learned something
    assert together > max(alone.values()) + 0.05, alone


def test_the_gain_is_calibrated_on_rows_it_has_not_seen(
    seen: Labelled, fresh: Labelled, estimator: QualityEstimator
) -> None:
    for prediction, data in (
        (estimator.predict(fresh.features), fresh),
        (estimator.out_of_fold_, seen),
    ):
        gain = data.quality[:, 1] - data.quality[:, 0]
        assert expected_calibration_error(prediction.score, gain) < 0.08
        for t in range(2):
            assert expected_calibration_error(prediction.quality[:, t], data.quality[:, t]) < 0.1
    assert estimator.predict(fresh.features).score.std() > 0.2  # and not by saying the same of all


def test_out_of_fold_rows_are_not_rows_it_was_fitted_on() -> None:
    """Labels that are noise: what was fitted on a row knows its label, what was not cannot."""
    data = labelled(600)
    kinds = np.tile([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], (150, 1))
    noise = replace(data, quality=np.random.default_rng(5).permutation(kinds))
    estimator = fitted(noise)
    inside = ranked(estimator.predict(noise.features).score, noise)
    outside = ranked(estimator.out_of_fold_.score, noise)
    # One random ranking of 600 such rows has a standard deviation of .04.
    assert inside > 0.62
    assert abs(outside - 0.5) < 0.1


def test_rows_of_a_group_stay_in_one_fold() -> None:
    """Each prompt twice with one label of noise: with the twin in another fold, the label would be known."""
    once = labelled(150)
    random = np.random.default_rng(6)
    quality = np.stack([random.permutation(np.tile([0.0, 1.0], 75)), np.ones(150)], axis=1)
    rows = np.tile(np.arange(150), 2)
    twice = Labelled(once.prompts * 2, once.features.take(rows), quality[rows], once.groups[rows])
    apart = replace(twice, groups=np.array([f"row {i}" for i in range(300)]))
    grouped = ranked(fitted(twice).out_of_fold_.score, twice)
    leaking = ranked(fitted(apart).out_of_fold_.score, apart)
    assert leaking > 0.65
    assert abs(grouped - 0.5) < 0.12


def test_a_row_without_a_label_is_ignored_for_that_target(seen: Labelled) -> None:
    """What a missing label stands for must not matter, and the row must still serve the other target."""
    some = Labelled(
        seen.prompts[:400], seen.features.take(np.arange(400)), seen.quality[:400].copy(), seen.groups[:400]
    )
    missing = np.arange(0, 400, 4)
    some.quality[missing, 1] = np.nan
    kept = np.setdiff1d(np.arange(400), missing)
    arrays = fit_parts(some.features, some.quality, ["trees", "linear"], 0)
    for part in ("trees", "linear"):
        # The projection is that of all rows; the second target's labels are those of the kept ones.
        complete = some.quality.copy()
        complete[missing, 1] = 0.5
        filled = fit_parts(some.features, complete, [part], 0)
        a, b = (predict_part(part, some.features, prepare(x)) for x in (arrays, filled))
        assert np.array_equal(a[:, 0], b[:, 0])
        assert not np.array_equal(a[:, 1], b[:, 1])
    estimator = fitted(some)
    for prediction in (estimator.out_of_fold_, estimator.predict(some.features)):
        assert np.isfinite(prediction.gain).all()
        assert np.isfinite(prediction.quality).all()
    assert estimator.arrays_["stack.quality"] == pytest.approx(
        [some.quality[:, 0].mean(), some.quality[kept, 1].mean()]
    )


def test_equal_seeds_give_equal_bundles_and_others_do_not() -> None:
    data = labelled(150)
    first, again, other = (fitted(data, seed=seed).arrays_ for seed in (3, 3, 4))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name], equal_nan=True) for name in first)
    assert not np.array_equal(first["stack.weight"], other["stack.weight"])


def test_the_order_of_the_groups_names_does_not_change_what_is_fitted() -> None:
    data = labelled(150)
    estimator = fitted(data)
    assert estimator.out_of_fold_.score.shape == (150,)
    assert estimator.out_of_fold_.targets == ("t0", "t1")


def test_three_targets() -> None:
    data, fresh = labelled(600, targets=3), labelled(1_500, targets=3, seed=1)
    prediction: Prediction = fitted(data).predict(fresh.features)
    assert prediction.gain.shape == prediction.quality.shape == (1_500, 3)
    assert (prediction.gain[:, 0] == 0).all()
    for target in (1, 2):
        gain = fresh.quality[:, target] - fresh.quality[:, 0]
        assert expected_calibration_error(prediction.gain[:, target], gain) < 0.08
        assert np.corrcoef(prediction.gain[:, target], gain)[0, 1] > 0.15
    # Choosing pays: better than any single target.
    chosen = fresh.quality[np.arange(1_500), prediction.choose(0.0)].mean()
    assert chosen > fresh.quality.mean(axis=0).max() + 0.02


def test_without_neighbours_no_embedding_is_kept() -> None:
    data = labelled(150)
    parts = [part for part in STACKED if part != "kernel"]
    arrays = fitted(data, parts=parts).arrays_
    assert not [name for name in arrays if name.startswith("kernel")]
    assert max(len(array) for array in arrays.values() if array.ndim == 2 and array.shape[1] == 16) < 150
    assert all(array.dtype != object for array in arrays.values())


def test_what_one_target_teaches_of_difficulty_serves_the_others(random: np.random.Generator) -> None:
    """Both targets fail along the same direction; the second has labels for few rows only."""
    seen, fresh = labelled(900), labelled(1_500, seed=1)
    hard = random.normal(size=seen.features.embedding.shape[1])

    def chance(data: Labelled) -> Floats:
        along = data.features.embedding @ hard
        return np.asarray(1.0 / (1.0 + np.exp(1.5 * (along - along.mean()) / along.std())), dtype=np.float64)

    quality = (random.random((900, 2)) < chance(seen)[:, None]).astype(np.float64)
    quality[60:, 1] = np.nan
    few = np.arange(60)
    together = prepare(fit_parts(seen.features, quality, ["factors"], 0))
    alone = prepare(fit_parts(seen.features.take(few), quality[few], ["factors"], 0))
    known = [
        np.corrcoef(predict_part("factors", fresh.features, arrays)[:, 1], chance(fresh))[0, 1]
        for arrays in (together, alone)
    ]
    assert known[0] > known[1] + 0.05, known


def test_progress_is_told_once_a_fold_and_once_at_the_end() -> None:
    data, calls = labelled(120), []
    QualityEstimator(TARGETS, folds=3).fit(
        data.features, data.quality, data.groups, progress=lambda: calls.append(1)
    )
    assert len(calls) == 3 + 1


# --- Stacking ------------------------------------------------------------------------------------------------------


def stack_of(parts: Floats, quality: Floats, weight: Floats | None = None) -> dict[str, Array]:
    return fit_stack(parts, quality, np.ones(len(quality)) if weight is None else weight)


def stacked(*gains: Floats) -> Floats:
    """Parts' predictions of two targets, shape (P, n, 2)."""
    return np.stack([np.stack([np.zeros_like(gain), gain], axis=1) for gain in gains])


def test_weights_are_never_negative_and_a_constant_part_has_none(random: np.random.Generator) -> None:
    gain = random.normal(0.2, 0.3, 500)
    quality = np.stack([np.zeros(500), gain], axis=1)
    parts = stacked(gain + random.normal(0, 0.1, 500), -gain, np.full(500, 0.7))
    weights = stack_of(parts, quality)["stack.weight"]
    assert (weights >= 0).all()
    assert weights[0] > 0.5
    assert weights[2] == 0.0
    assert weights[0] > 3 * weights[1]


def test_two_equal_parts_share_the_weight(random: np.random.Generator) -> None:
    gain = random.normal(0.2, 0.3, 500)
    quality = np.stack([np.zeros(500), gain], axis=1)
    part = gain + random.normal(0, 0.2, 500)
    weights = stack_of(stacked(part, part), quality)["stack.weight"]
    assert weights[0] == pytest.approx(weights[1])


def test_few_noisy_rows_draw_the_weights_together(random: np.random.Generator) -> None:
    """On noise, least squares alone would favour one part by chance; equal weights are the fallback."""
    parts = stacked(random.normal(size=40), random.normal(size=40))
    quality = np.stack([np.zeros(40), parts.mean(axis=0)[:, 1] + random.normal(0, 2, 40)], axis=1)
    z = parts[:, :, 1]
    free, *_ = np.linalg.lstsq(np.column_stack([*z, np.ones(40)]), quality[:, 1], rcond=None)
    weights = stack_of(parts, quality)["stack.weight"] * z.std(axis=1)
    assert abs(weights[0] - weights[1]) < abs(free[0] - free[1])


def test_rows_with_one_label_do_not_enter_the_weights(random: np.random.Generator) -> None:
    gain = random.normal(0.2, 0.3, 300)
    quality = np.stack([np.zeros(300), gain], axis=1)
    quality[100:, 0] = np.nan
    parts = stacked(gain + random.normal(0, 0.1, 300))
    found = stack_of(parts, quality)
    alone = stack_of(parts[:, :100], quality[:100])
    assert found["stack.weight"] == pytest.approx(alone["stack.weight"])
    assert found["stack.quality"][1] == pytest.approx(gain.mean())


# --- Rows that count unequally -----------------------------------------------------------------------------------------


def test_a_source_counts_as_the_square_root_of_its_rows() -> None:
    weight = source_weights(np.array(["a"] * 900 + ["b"] * 100))
    assert weight.mean() == pytest.approx(1.0)
    assert weight[:900].sum() / weight[900:].sum() == pytest.approx(np.sqrt(900) / np.sqrt(100))
    assert len(np.unique(weight)) == 2
    assert source_weights(np.array(["a"] * 5)).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("part", PARTS)
def test_a_row_of_weight_two_is_two_rows(part: str) -> None:
    data = labelled(240)
    rows = np.concatenate([np.arange(240), np.arange(80)])
    weight = np.where(np.arange(240) < 80, 2.0, 1.0)
    once = prepare(fit_parts(data.features, data.quality, [part], 0, weight))
    twice = prepare(fit_parts(data.features.take(rows), data.quality[rows], [part], 0))
    plain = prepare(fit_parts(data.features, data.quality, [part], 0))
    a, b, c = (predict_part(part, data.features, x) for x in (once, twice, plain))
    # Not to the bit: document frequencies, the projection, k and the smallest leaf count rows, not weights.
    assert np.corrcoef(a[:, 0], b[:, 0])[0, 1] > np.corrcoef(c[:, 0], b[:, 0])[0, 1]
    assert np.abs(a - c).max() > 1e-3


def test_stacking_weights_and_means_count_by_weight(random: np.random.Generator) -> None:
    gain = random.normal(0.2, 0.3, 200)
    quality = np.stack([np.zeros(200), gain], axis=1)
    parts = stacked(gain + random.normal(0, 0.1, 200), gain + random.normal(0, 0.3, 200))
    rows = np.concatenate([np.arange(200), np.arange(50)])
    found = stack_of(parts, quality, np.where(np.arange(200) < 50, 2.0, 1.0))
    expected = stack_of(parts[:, rows], quality[rows])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
