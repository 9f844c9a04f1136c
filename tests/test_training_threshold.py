from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from router.errors import DatasetError, UsageError
from router.predictor import Prediction
from training.metrics import apply_threshold, full_curve, strong_share_at
from training.threshold import curve_of_pair, for_max_cost, for_quality, for_strong_share, nested_outcome

Floats = NDArray[np.float64]


def rows(n: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    random = np.random.default_rng(seed)
    weak = random.random(n)
    strong = np.clip(weak + random.normal(0.15, 0.3, n), 0.0, 1.0)
    return (strong - weak + random.normal(0.0, 0.3, n)) / 2, weak, strong


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.3, 0.777, 1.0])
@pytest.mark.parametrize("n", [1, 7, 500])
def test_the_share_asked_is_the_share_served(n: int, share: float) -> None:
    score, weak, strong = rows(n)
    chosen = for_strong_share(score, share, weak, strong)
    served = apply_threshold(score, chosen.threshold, weak, strong)
    assert abs(served.strong_share - share) <= 1 / n
    assert (chosen.strong_share, chosen.quality) == pytest.approx((served.strong_share, served.quality))
    assert chosen.n == n


def test_quality_takes_the_lowest_share_that_reaches_it() -> None:
    score, weak, strong = rows(800)
    cost_weak, cost_strong = np.full(800, 0.001), np.full(800, 0.02)
    chosen = for_quality(score, weak, strong, quality=0.97, cost_weak=cost_weak, cost_strong=cost_strong)
    served = apply_threshold(score, chosen.threshold, weak, strong, cost_weak, cost_strong)
    assert served.quality >= 0.97 * strong.mean()
    assert chosen.strong_share == strong_share_at(full_curve(score, weak, strong), 0.97)
    assert (chosen.strong_share, chosen.quality, chosen.cost) == pytest.approx(
        (served.strong_share, served.quality, served.cost)
    )
    # One call less falls short.
    ordered = np.sort(score)[::-1]
    fewer = ordered[round(chosen.strong_share * 800) - 1]
    assert apply_threshold(score, fewer, weak, strong).quality < 0.97 * strong.mean()


def test_thresholds_stand_halfway_between_scores() -> None:
    chosen = for_strong_share([0.1, 0.2, 0.6, 0.8], 0.5)
    assert chosen.threshold == pytest.approx(0.4)
    assert (chosen.quality, chosen.cost) == (None, None)


def test_neighbouring_floats_are_told_apart() -> None:
    low = 0.1
    high = np.nextafter(low, 1.0)
    chosen = for_strong_share([low, high], 0.5)
    assert high > chosen.threshold
    assert not low > chosen.threshold


def test_always_and_never_hold_for_any_gain() -> None:
    """Gains lie between −1 and 1, those of rows not yet seen too."""
    score = [-0.2, 0.3]
    assert for_strong_share(score, 0.0).threshold == 1.0
    assert for_strong_share(score, 1.0).threshold == -1.0
    assert for_strong_share([40.0, 90.0], 0.0).threshold == 90.0
    assert for_strong_share([-7.0, 90.0], 1.0).threshold < -7.0


def test_serving_chooses_what_was_counted() -> None:
    score, weak, strong = rows(400)
    prediction = Prediction(
        targets=("weak", "strong"),
        quality=np.stack([weak, strong], axis=1),
        gain=np.stack([np.zeros(400), score], axis=1),
    )
    for quality in (0.9, 0.95, 1.0):
        chosen = for_quality(score, weak, strong, quality=quality)
        assert prediction.choose(chosen.threshold).mean() == pytest.approx(chosen.strong_share)


def test_weak_alone_may_be_enough() -> None:
    chosen = for_quality([0.1, 0.2], [1.0, 0.9], [1.0, 0.9])
    assert (chosen.strong_share, chosen.quality) == (0.0, 0.95)


def test_quality_out_of_reach_names_the_best() -> None:
    score, weak, strong = [3.0, 2.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]
    assert for_quality(score, weak, strong, quality=1.5).strong_share == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match=r"1\.6 × strong's 0\.6667 .* 1\.500 × .*1\.0000.* share of 66\.7%"):
        for_quality(score, weak, strong, quality=1.6)


def test_tied_scores_go_together() -> None:
    score = [0.5] * 4 + [0.1] * 6
    weak, strong = np.zeros(10), np.ones(10)
    assert for_quality(score, weak, strong, quality=0.2).strong_share == 0.4
    assert for_strong_share(score, 0.38).strong_share == 0.4
    with pytest.raises(UsageError, match=r"20\.0% cannot be reached .*nearest are 0\.0% and 40\.0%"):
        for_strong_share(score, 0.2)


def test_cost_buys_the_best_quality_within_it() -> None:
    score = np.array([4.0, 3.0, 2.0, 1.0])
    weak, strong = np.zeros(4), np.array([1.0, 1.0, 0.0, 0.0])
    cost_weak, cost_strong = np.full(4, 0.001), np.full(4, 0.005)
    chosen = for_max_cost(score, weak, strong, cost_weak, cost_strong, usd_per_1k=2.0)
    assert (chosen.strong_share, chosen.quality) == (0.25, 0.25)
    assert chosen.cost == pytest.approx(0.002)
    # More money buys no more quality than two calls give, so it is not spent.
    rich = for_max_cost(score, weak, strong, cost_weak, cost_strong, usd_per_1k=99.0)
    assert (rich.strong_share, rich.quality) == (0.5, 0.5)
    with pytest.raises(UsageError, match=r"0\.5 USD .*the least is 1, at a strong share of 0\.0%"):
        for_max_cost(score, weak, strong, cost_weak, cost_strong, usd_per_1k=0.5)


def test_cost_counts_rows_that_have_one() -> None:
    score, weak, strong = rows(100)
    cost_weak, cost_strong = np.full(100, 0.001), np.full(100, 0.005)
    cost_weak[:40] = np.nan
    chosen = for_max_cost(score, weak, strong, cost_weak, cost_strong, usd_per_1k=3.0)
    assert chosen.n == 60
    assert chosen.strong_share <= 0.5
    assert chosen.quality == pytest.approx(
        apply_threshold(score[40:], chosen.threshold, weak[40:], strong[40:]).quality
    )
    with pytest.raises(UsageError, match="no row has them"):
        for_max_cost(score, weak, strong, np.full(100, np.nan), cost_strong, usd_per_1k=3.0)


@pytest.mark.parametrize("value", [-0.1, 0.0, float("nan"), float("inf")])
def test_a_quality_must_be_a_positive_number(value: float) -> None:
    with pytest.raises(UsageError, match="quality"):
        for_quality([0.1], [0.0], [1.0], quality=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 30.0, float("nan")])
def test_a_share_must_be_one(value: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        for_strong_share([0.1], value)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_cost_must_not_be_negative(value: float) -> None:
    with pytest.raises(UsageError, match="US dollars"):
        for_max_cost([0.1], [0.0], [1.0], [0.1], [0.2], usd_per_1k=value)


def test_no_rows_and_unlabelled_rows_are_refused() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        for_strong_share([], 0.5)
    with pytest.raises(ValueError, match="qualities must be finite"):
        for_quality([0.1, 0.2], [0.0, np.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match="scores must be finite"):
        for_strong_share([np.nan], 0.5)


def test_a_choice_is_told_in_the_manifest() -> None:
    score, weak, strong = rows(50)
    told = json.loads(json.dumps(for_quality(score, weak, strong, quality=0.9).as_dict(), allow_nan=False))
    assert (told["goal"], told["value"], told["n"]) == ("quality", 0.9, 50)
    assert told["how"] == "lowest strong share with mean quality ≥ 0.9 × strong's, on 50 rows"
    assert told["cost"] is None


def test_nested_thresholds_come_from_the_other_folds() -> None:
    score, weak, strong = rows(90)
    folds = np.arange(90) % 3
    cost_weak, cost_strong = np.full(90, 1.0), np.full(90, 5.0)
    outcome = nested_outcome(score, weak, strong, folds, cost_weak, cost_strong, quality=0.97)
    sent = np.zeros(90, dtype=bool)
    for fold in range(3):
        rest = folds != fold
        threshold = for_quality(score[rest], weak[rest], strong[rest], quality=0.97).threshold
        sent[~rest] = score[~rest] > threshold
    assert outcome.n == 90
    assert outcome.strong_share == pytest.approx(sent.mean())
    assert outcome.quality == pytest.approx(np.where(sent, strong, weak).mean())
    assert outcome.cost_saving == pytest.approx(1 - (1 + 4 * sent.mean()) / 5)
    # A fold's own labels decide nothing about it.
    turned = strong.copy()
    turned[folds == 0] = 0.0
    again = nested_outcome(score, weak, turned, folds, quality=0.97)
    kept = apply_threshold(
        score[folds == 0],
        for_quality(score[folds != 0], weak[folds != 0], strong[folds != 0], quality=0.97).threshold,
        weak[folds == 0],
        turned[folds == 0],
    )
    assert again.strong_share * 90 >= kept.strong_share * 30 - 1e-9


@pytest.mark.parametrize("n", [1, 7, 150, 3_000])
def test_a_curve_tells_what_each_of_its_thresholds_does(n: int) -> None:
    score, weak, strong = rows(n)
    curve = curve_of_pair(score, weak, strong, names=("small", "large"))
    assert (curve.axis, curve.rows) == ("strong_share", n)
    assert len(curve.thresholds) == min(n, 100) + 1
    assert (curve.spend[0], curve.spend[-1]) == (0.0, 1.0)
    assert curve.alone == {
        "small": (0.0, pytest.approx(weak.mean(), abs=1e-6)),
        "large": (1.0, pytest.approx(strong.mean(), abs=1e-6)),
    }
    for threshold, spend, quality in zip(curve.thresholds, curve.spend, curve.quality, strict=True):
        served = apply_threshold(score, threshold, weak, strong)
        assert (served.strong_share, served.quality) == pytest.approx((spend, quality), abs=1e-6)
        assert curve.at(threshold) == pytest.approx((spend, quality))


def test_between_two_points_of_a_curve_lies_a_line() -> None:
    score, weak, strong = np.array([0.1, 0.3]), np.array([1.0, 0.0]), np.array([1.0, 1.0])
    curve = curve_of_pair(score, weak, strong, names=("small", "large"))
    assert curve.thresholds == (1.0, 0.2, -1.0)
    assert curve.at(0.2) == (0.5, 1.0)
    assert curve.at(0.6) == (0.25, 0.75)
    assert curve.at(9.0) == (0.0, 0.5)
    assert curve.at(-9.0) == (1.0, 1.0)


def test_equal_scores_are_one_point_of_a_curve() -> None:
    curve = curve_of_pair(np.full(50, 0.2), np.zeros(50), np.ones(50), names=("small", "large"))
    assert (curve.thresholds, curve.spend, curve.quality) == ((1.0, -1.0), (0.0, 1.0), (0.0, 1.0))
