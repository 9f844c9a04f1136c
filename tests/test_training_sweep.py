from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from router.predictor import Prediction
from training.sweep import Singles, Sweep, chosen_setting, shares, sweep_figures, threshold_sweep, value_sweep

Floats = NDArray[np.float64]


def singles(quality: Floats, cost: Floats | None = None) -> Singles:
    unknown = np.full(quality.shape, np.nan)
    cost = unknown if cost is None else np.broadcast_to(cost, quality.shape)
    priced = np.isfinite(cost).all(axis=1)
    return Singles(quality, np.where(priced[:, None], cost, 0.0), priced)


def gains(random: np.random.Generator, n: int = 300) -> Floats:
    return np.hstack([np.zeros((n, 1)), random.normal(0.1, 0.2, (n, 3))])


def test_thresholds_go_from_the_dearest_to_the_cheapest(random: np.random.Generator) -> None:
    gain = gains(random)
    found = Prediction(("a", "b", "c", "d"), gain, gain)
    sweep = threshold_sweep(found, 50)
    assert sweep.choice.shape == (50, 300)
    assert (np.diff(sweep.settings) > 0).all()
    assert (sweep.choice[0] == 1 + gain[:, 1:].argmax(axis=1)).all()
    assert (sweep.choice[-1] == 0).all()
    # A row only ever moves to a cheaper target as the threshold rises.
    assert (np.diff(sweep.choice, axis=0) <= 0).all()
    for setting in (0, 20, 49):
        assert np.array_equal(sweep.choice[setting], found.choose(float(sweep.settings[setting])))


def test_of_few_rows_every_change_is_a_setting() -> None:
    gain = np.array([[0.0, 0.2, 0.25], [0.0, -0.1, -0.3]])
    sweep = threshold_sweep(Prediction(("a", "b", "c"), gain, gain))
    assert {tuple(row) for row in sweep.choice.tolist()} == {(2, 1), (2, 0), (1, 0), (0, 0)}


def test_values_go_from_the_best_to_the_cheapest(random: np.random.Generator) -> None:
    expected = random.random((200, 3))
    cost = np.broadcast_to(np.array([0.001, 0.0, 0.02]), expected.shape)  # not in order: the second is free
    sweep = value_sweep(expected, cost, 60)
    assert sweep.settings[0] == 0.0
    assert (np.diff(sweep.settings) > 0).all()
    assert np.array_equal(sweep.choice[0], expected.argmax(axis=1))
    assert (sweep.choice[-1] == 1).all()
    spent = np.take_along_axis(cost.T, sweep.choice, axis=0).mean(axis=1)
    assert (np.diff(spent) <= 1e-12).all()


def test_values_of_targets_that_cost_the_same(random: np.random.Generator) -> None:
    expected = random.random((5, 3))
    sweep = value_sweep(expected, np.ones_like(expected))
    assert (sweep.choice == expected.argmax(axis=1)).all()


def test_figures_by_hand() -> None:
    """Four rows, three targets for 1, 2 and 5 dollars; a router that knows, at three settings."""
    quality = np.array([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 0]])
    cost = np.array([1.0, 2.0, 5.0])
    sweep = Sweep(np.arange(3.0), np.array([[0, 1, 2, 1], [0, 1, 1, 1], [0, 0, 0, 0]]))
    found = sweep_figures(sweep, singles(quality, cost))
    # Points: 1.0 for 2.5 dollars, .75 for 1.75, .25 for 1. Singles: .25, .75 and .75; the best is the cheaper, for 2.
    assert found.quality == 1.0
    assert found.cost == 2.5
    assert found.perf_gain == pytest.approx(1 / 0.75 - 1)
    assert found.cost_save == pytest.approx(1 - 1.75 / 2)
    assert found.cost_saving_at_95 == pytest.approx(1 - 1.75 / 2)
    assert found.shares_at_95 == (0.25, 0.75, 0.0)
    assert found.setting_at_95 == 1.0
    # From 1 to 5 dollars: up to .75 at 1.75, up to 1 at 2.5, then level.
    area = 0.75 * 0.5 + 0.75 * 0.875 + 2.5 * 1.0
    assert found.aiq == pytest.approx(area / 4)
    assert found.aiq_ci is not None
    assert found.aiq_ci[0] <= found.aiq <= found.aiq_ci[1]


def test_what_costs_more_than_the_dearest_target_does_not_count_for_the_area() -> None:
    quality = np.array([[0.0, 0.0, 1.0]])
    cost = np.array([[1.0, 5.0, 3.0]])
    low, high = np.zeros((1, 1), dtype=int), np.full((1, 1), 2)
    both = sweep_figures(Sweep(np.arange(2.0), np.vstack([high, low])), singles(quality, cost))
    # A straight line from (1, 0) to (3, 1), then level up to 5.
    assert both.aiq == pytest.approx((1.0 + 2.0) / 4)


def test_without_costs_there_are_no_dollars_and_no_area() -> None:
    quality = np.array([[0.0, 1.0], [1.0, 1.0]])
    found = sweep_figures(Sweep(np.arange(2.0), np.array([[1, 0], [0, 0]])), singles(quality))
    assert (found.aiq, found.aiq_ci, found.cost, found.cost_save, found.cost_saving_at_95) == (None,) * 5
    assert found.quality == 1.0
    assert found.shares_at_95 == (0.5, 0.5)


def test_undefined_figures_are_null_in_json() -> None:
    nothing = sweep_figures(
        Sweep(np.zeros(1), np.array([[0, 1]])), singles(np.zeros((2, 2)), np.array([1.0, 1.0]))
    )
    assert np.isnan(nothing.perf_gain)
    assert nothing.as_dict()["perf_gain"] is None
    assert (nothing.aiq, nothing.aiq_ci) == (None, None)  # there is no range of costs


def test_dollars_are_told_over_priced_rows() -> None:
    quality = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    cost = np.array([[1.0, 3.0], [1.0, 5.0], [np.nan, 9.0]])
    rows = singles(quality, cost)
    assert rows.mean_cost is not None
    assert rows.mean_cost.tolist() == [1.0, 4.0]
    found = sweep_figures(Sweep(np.zeros(1), np.array([[1, 0, 1]])), rows)
    assert (found.quality, found.cost, found.cost_save) == (1.0, 2.0, 0.5)


def test_the_cheapest_setting_with_enough_quality_is_chosen() -> None:
    quality = np.array([0.9, 0.8, 0.8, 0.7])
    assert chosen_setting(quality, 0.8, np.array([4.0, 2.0, 3.0, 1.0])) == 1
    assert chosen_setting(quality, 0.8, None) == 2
    assert chosen_setting(quality, 0.8, np.array([4.0, 2.0, 2.0, 1.0])) == 2
    assert chosen_setting(quality, 0.95, None) is None


def test_shares() -> None:
    assert shares(np.array([0, 2, 2, 0]), 4) == (0.5, 0.0, 0.5, 0.0)
