"""Thresholds for several targets, on rows whose outcome at every threshold can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from router.errors import UsageError
from router.predictor import Prediction
from training.ladder_threshold import curve_of_ladder, described, ladder_for_max_cost, ladder_for_quality
from training.sweep import Singles

Floats = NDArray[np.float64]
NAMES = ("low", "mid", "high")

# Four rows; the gains rank them rightly. Singles: low .25, mid .75, high .75.
GAIN = np.array([[0.0, 0.01, 0.02], [0.0, 0.4, 0.41], [0.0, 0.1, 0.6], [0.0, 0.3, 0.2]])
QUALITY = np.array([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 0]])
COST = np.tile([0.001, 0.002, 0.005], (4, 1))


def singles(cost: Floats = COST) -> Singles:
    priced = np.isfinite(cost).all(axis=1)
    return Singles(QUALITY, np.where(priced[:, None], cost, 0.0), priced)


PREDICTION = Prediction(NAMES, QUALITY, GAIN)
UNPRICED = singles(np.full((4, 3), np.nan))


def test_for_quality_takes_the_cheapest_threshold_that_has_it() -> None:
    found = ladder_for_quality(PREDICTION, singles(), 1.0)
    # The best single target has .75, and so has: low for the first row, mid for the second and fourth, low or high for the third.
    assert found.quality == 0.75
    assert (found.best_single, found.best_single_quality, found.best_single_cost) == ("mid", 0.75, 0.002)
    assert found.quality >= found.best_single_quality
    for threshold in np.linspace(-0.1, 1, 400):
        other = described(float(threshold), PREDICTION, singles(), "quality", 1.0, "")
        assert other.quality < 0.75 or (other.cost or 0) >= (found.cost or 0) - 1e-12
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert PREDICTION.choose(found.threshold).tolist() == [
        NAMES.index(name) for name in _choices(found.threshold)
    ]


def _choices(threshold: float) -> list[str]:
    """The rule by its words: the cheapest target within the threshold of the best."""
    return [
        next(
            name
            for name, g in zip(NAMES, row, strict=True)
            if g >= row[1:].max() - threshold or g == row.max()
        )
        for row in GAIN
    ]


def test_without_costs_the_highest_threshold_is_taken() -> None:
    found = ladder_for_quality(PREDICTION, UNPRICED, 1.0)
    assert (found.quality, found.cost, found.best_single_cost) == (0.75, None, None)
    assert described(found.threshold + 0.2, PREDICTION, UNPRICED, "quality", 1.0, "").quality < 0.75


def test_targets_that_complement_each_other_beat_the_best_single_one() -> None:
    found = ladder_for_quality(PREDICTION, singles(), 4 / 3)
    assert found.quality == 1.0
    with pytest.raises(
        UsageError, match=r"1\.4 × 0\.7500 of mid, .* cannot be reached on these 4 rows: .*1\.333"
    ):
        ladder_for_quality(PREDICTION, singles(), 1.4)
    with pytest.raises(UsageError, match="expected a share"):
        ladder_for_quality(PREDICTION, singles(), float("nan"))


def test_for_max_cost() -> None:
    found = ladder_for_max_cost(PREDICTION, singles(), 2.5)
    assert found.cost is not None
    assert found.cost <= 0.0025
    assert found.quality == 1.0
    least = ladder_for_max_cost(PREDICTION, singles(), 1.0)
    assert least.shares == {"low": 1.0, "mid": 0.0, "high": 0.0}
    with pytest.raises(UsageError, match="the least is 1"):
        ladder_for_max_cost(PREDICTION, singles(), 0.9)
    with pytest.raises(UsageError, match="give prices"):
        ladder_for_max_cost(PREDICTION, UNPRICED, 2.0)
    with pytest.raises(UsageError, match="expected US dollars"):
        ladder_for_max_cost(PREDICTION, singles(), -1.0)


def test_for_max_cost_leaves_out_rows_without_costs() -> None:
    cost = COST.copy()
    cost[0, 1] = np.nan
    assert ladder_for_max_cost(PREDICTION, singles(cost), 9.0).n == 3


def test_in_the_manifest() -> None:
    found = ladder_for_quality(PREDICTION, singles(), 1.0).for_manifest("fresh rows")
    assert found.rows == 4
    assert found.quality_ratio == 1.0
    assert found.how.endswith("(fresh rows)")
    assert found.strong_share is None


def test_the_curve_is_in_dollars_beside_the_dearest_target() -> None:
    curve = curve_of_ladder(PREDICTION, singles())
    assert curve is not None
    assert (curve.axis, curve.rows) == ("relative_cost", 4)
    assert curve.alone == {"low": (0.2, 0.25), "mid": (0.4, 0.75), "high": (1.0, 0.75)}
    assert list(curve.thresholds) == sorted(curve.thresholds, reverse=True)
    assert (curve.spend[0], curve.quality[0]) == (0.2, 0.25)
    for threshold, spend, quality in zip(curve.thresholds, curve.spend, curve.quality, strict=True):
        there = described(threshold, PREDICTION, singles(), "quality", 1.0, "")
        assert (there.cost, there.quality) == (pytest.approx(spend * 0.005), pytest.approx(quality))


def test_without_costs_there_is_no_curve_of_a_ladder() -> None:
    assert curve_of_ladder(PREDICTION, UNPRICED) is None
    part = np.array(COST)
    part[0] = np.nan
    curve = curve_of_ladder(PREDICTION, singles(part))
    assert curve is not None
    assert curve.rows == 3
    assert curve_of_ladder(PREDICTION, singles(np.zeros((4, 3)))) is None
