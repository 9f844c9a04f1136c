from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from training.calibration import GainCurve, fit_gain_curve, fit_quality_curve

Floats = NDArray[np.float64]


def at(curve: GainCurve, raw: Floats) -> Floats:
    inside = np.clip(raw, curve.x[0], curve.x[-1])
    result: Floats = np.interp(inside, curve.x, curve.y) + curve.slope * (raw - inside)
    return result


def strictly_rises(curve: GainCurve) -> bool:
    return bool((np.diff(curve.x) > 0).all() and (np.diff(curve.y) > 0).all() and curve.slope > 0)


def observed(random: np.random.Generator, expected: Floats) -> Floats:
    """Gains of −1, 0 or 1 with the given means."""
    sign = np.sign(expected)
    result: Floats = sign * (random.random(len(expected)) < np.abs(expected))
    return result


# --- Gains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 300, 10_000])
def test_the_curve_rises_strictly_and_tells_all_raw_gains_apart(n: int, random: np.random.Generator) -> None:
    raw = random.normal(0, 0.2, n)
    curve = fit_gain_curve(raw, observed(random, np.clip(raw, -1, 1)))
    assert strictly_rises(curve)
    probe = np.sort(np.concatenate([raw, np.linspace(-5, 5, 500)]))
    assert (np.diff(at(curve, probe)) > 0).all()


def test_a_distorted_gain_is_calibrated_within_a_few_percent(random: np.random.Generator) -> None:
    """The raw gain is a cube root and a shift away from the truth."""
    truth = random.uniform(-0.4, 0.8, 20_000)
    curve = fit_gain_curve(np.cbrt(truth) * 3 + 1, observed(random, truth))
    for wanted in np.linspace(-0.35, 0.75, 12):
        assert at(curve, np.array([np.cbrt(wanted) * 3 + 1]))[0] == pytest.approx(wanted, abs=0.05)


def test_the_mean_gain_is_kept(random: np.random.Generator) -> None:
    """Isotonic regression keeps the weighted mean; joining centres by lines may only move it a little."""
    raw = random.normal(0.1, 0.3, 4_000)
    gain = observed(random, np.tanh(raw))
    assert at(fit_gain_curve(raw, gain), raw).mean() == pytest.approx(gain.mean(), abs=0.01)


def test_a_gain_that_falls_with_the_raw_gain_is_near_flat_but_still_ranks() -> None:
    raw = np.linspace(-1, 1, 400)
    curve = fit_gain_curve(raw, -raw)
    assert strictly_rises(curve)
    assert curve.slope == pytest.approx(1e-3)
    assert at(curve, np.array([0.0]))[0] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("level", [0.0, 0.1, 1.0, -0.3])
def test_flat_gains(level: float) -> None:
    curve = fit_gain_curve(np.linspace(0, 1, 200), np.full(200, level))
    assert strictly_rises(curve)
    assert at(curve, np.array([0.0, 0.5, 1.0])) == pytest.approx([level] * 3, abs=2e-3)


def test_means_that_differ_in_the_last_bit_make_no_flat_part(random: np.random.Generator) -> None:
    """Ninths, as MT-Bench has them: the same values in another order do not add up to the same bits."""
    block = np.array([1, 2, 4, 5, 7, 8, 3, 1, 2, 5, 7, 4, 8, 1, 2, 2, 5, 7, 1, 8]) / 9
    gain = np.concatenate([random.permutation(block) for _ in range(50)])
    raw = np.arange(1_000) / 1_000
    assert len({gain[i : i + 20].mean() for i in range(0, 1_000, 20)}) > 1
    curve = fit_gain_curve(raw, gain)
    assert len(np.unique(at(curve, raw))) == 1_000
    assert np.diff(at(curve, raw)).min() > 1e-9


@pytest.mark.parametrize("n", [1, 2, 19, 20, 39])
def test_too_few_rows_for_two_bins(n: int) -> None:
    raw = np.linspace(-0.5, 0.5, n)
    curve = fit_gain_curve(raw, np.linspace(0.0, 0.4, n))
    assert strictly_rises(curve)
    assert at(curve, raw.mean(keepdims=True))[0] == pytest.approx(np.linspace(0.0, 0.4, n).mean(), abs=1e-9)


def test_raw_gains_that_are_all_alike() -> None:
    curve = fit_gain_curve(np.full(500, 0.3), np.tile([0.0, 1.0], 250))
    assert strictly_rises(curve)
    assert at(curve, np.array([0.3]))[0] == pytest.approx(0.5, abs=0.3)
    assert np.isfinite(curve.slope)


def test_one_outlier_makes_no_step_of_its_own(random: np.random.Generator) -> None:
    raw = np.append(random.normal(0, 0.1, 2_000), 50.0)
    gain = np.append(observed(random, np.full(2_000, 0.2)), -1.0)
    assert at(fit_gain_curve(raw, gain), np.array([0.0]))[0] == pytest.approx(0.2, abs=0.05)


def test_the_order_of_the_rows_does_not_matter(random: np.random.Generator) -> None:
    raw = random.normal(size=777)
    gain = observed(random, np.tanh(raw))
    order = random.permutation(777)
    a, b = fit_gain_curve(raw, gain), fit_gain_curve(raw[order], gain[order])
    assert a.x == pytest.approx(b.x)
    assert a.y == pytest.approx(b.y)
    assert a.slope == pytest.approx(b.slope)


def test_rows_count_by_their_weight() -> None:
    """Two kinds of rows at the same raw gains: what the curve shows is their weighted mean."""
    raw = np.repeat(np.linspace(0, 1, 500), 2)
    gain = np.tile([0.0, 1.0], 500) * raw
    weight = np.tile([3.0, 1.0], 500)
    middle = np.array([0.5])
    assert at(fit_gain_curve(raw, gain), middle)[0] == pytest.approx(0.25, abs=0.02)
    assert at(fit_gain_curve(raw, gain, weight), middle)[0] == pytest.approx(0.125, abs=0.02)
    assert fit_gain_curve(raw, gain, np.full(1_000, 7.0)).y == pytest.approx(fit_gain_curve(raw, gain).y)
    slope, intercept = fit_quality_curve(raw, np.tile([0.0, 1.0], 500), weight)
    assert (slope, sigmoid(np.array([intercept]))[0]) == pytest.approx((0.0, 0.25), abs=5e-3)


# --- Qualities -----------------------------------------------------------------------------------------------------


def sigmoid(x: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-x))
    return result


def test_the_logistic_curve_is_found_again(random: np.random.Generator) -> None:
    raw = random.uniform(-1, 1, 30_000)
    slope, intercept = fit_quality_curve(raw, (random.random(30_000) < sigmoid(3 * raw - 0.5)).astype(float))
    assert (slope, intercept) == pytest.approx((3, -0.5), abs=0.1)


def test_fractional_qualities_enter_as_shares(random: np.random.Generator) -> None:
    raw = random.uniform(-1, 1, 2_000)
    quality = sigmoid(2 * raw + 0.3)
    assert fit_quality_curve(raw, quality) == pytest.approx((2, 0.3), abs=0.02)
    # A quality of .75 is three right answers and a wrong one.
    quarters = (quality * 4).round() / 4
    rows = np.repeat(np.arange(2_000), 4)
    labels = np.concatenate([np.arange(4) < 4 * q for q in quarters])
    model = LogisticRegression(C=1e3).fit(raw[rows, None], labels, sample_weight=np.full(8_000, 0.25))
    expected = (float(model.coef_[0, 0]), float(model.intercept_[0]))
    assert fit_quality_curve(raw, quarters) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("quality", [0.0, 1.0])
def test_all_right_or_all_wrong_is_near_certain_but_not_certain(quality: float) -> None:
    slope, intercept = fit_quality_curve(np.linspace(0, 1, 100), np.full(100, quality))
    assert slope == 0.0
    assert abs(sigmoid(np.array([intercept]))[0] - quality) == pytest.approx(0.005)


def test_a_quality_that_falls_with_the_raw_quality_is_not_turned_around() -> None:
    raw = np.linspace(0, 1, 200)
    slope, _ = fit_quality_curve(raw, 1 - raw)
    assert slope == 0.0
