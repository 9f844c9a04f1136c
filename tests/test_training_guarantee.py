"""Promises are held to synthetic data whose true risk is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from router.errors import DatasetError, UsageError
from router.predictor import Prediction
from training.guarantee import betting_p_values, guaranteed_ladder_threshold, guaranteed_threshold
from training.threshold import for_quality

Floats = NDArray[np.float64]


class World:
    """Prompts of hardness u: the weak model's chance of success falls with it, the strong one's less."""

    def __init__(self, seed: int, n: int) -> None:
        rng = np.random.default_rng(seed)
        hardness = rng.random(n)
        self.weak_chance = 0.75 - 0.35 * hardness
        self.strong_chance = self.weak_chance + 0.6 * hardness**2 - 0.1
        self.score = 0.5 * hardness + rng.normal(0, 0.1, n)
        self.weak = (rng.random(n) < self.weak_chance).astype(np.float64)
        self.strong = (rng.random(n) < self.strong_chance).astype(np.float64)

    def true_loss(self, threshold: float, quality: float = 0.95) -> float:
        routed = np.where(self.score > threshold, self.strong_chance, self.weak_chance)
        return float((quality * self.strong_chance - routed).mean())


@pytest.fixture(scope="module")
def truth() -> World:
    return World(seed=10_000, n=100_000)


def test_the_promise_is_broken_no_oftener_than_stated(truth: World) -> None:
    confidence, runs = 0.9, 120
    broken = tuned_broken = 0
    for seed in range(runs):
        rows = World(seed, 800)
        found = guaranteed_threshold(rows.score, rows.weak, rows.strong, confidence=confidence, seed=seed)
        broken += truth.true_loss(found.chosen.threshold) > 0
        tuned_broken += truth.true_loss(for_quality(rows.score, rows.weak, rows.strong).threshold) > 0
    # Three standard deviations above the nominal rate is what chance allows a valid procedure.
    assert broken / runs <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / runs)
    # The plain threshold breaks about every second time: without this the test would show nothing.
    assert tuned_broken / runs > 0.35


def test_with_many_rows_the_promise_costs_little(truth: World) -> None:
    rows = World(1, 6_000)
    promised = guaranteed_threshold(rows.score, rows.weak, rows.strong).chosen.strong_share
    tuned = for_quality(rows.score, rows.weak, rows.strong).strong_share
    assert tuned < promised < tuned + 0.2


def test_few_rows_promise_nothing_and_say_so() -> None:
    rows = World(2, 25)
    found = guaranteed_threshold(rows.score, rows.weak, rows.strong)
    assert not found.possible
    assert found.chosen.strong_share == 1.0
    assert "25 rows cannot promise" in found.words


def test_copies_of_rows_promise_no_more_than_the_rows_themselves() -> None:
    rows = World(4, 400)
    once = guaranteed_threshold(rows.score, rows.weak, rows.strong, groups=np.arange(400))
    copies = [np.tile(values, 5) for values in (rows.score, rows.weak, rows.strong)]
    grouped = guaranteed_threshold(*copies, groups=np.tile(np.arange(400), 5))
    assert grouped.chosen.threshold == once.chosen.threshold
    assert grouped.p_value == pytest.approx(once.p_value)
    assert "400 groups" in grouped.words
    # Taken for independent rows they would promise more than they know.
    assert guaranteed_threshold(*copies).chosen.strong_share < once.chosen.strong_share


def test_a_group_counts_as_one_row_with_the_mean_of_its_losses() -> None:
    """Rows that are right and rows that are wrong, grouped in pairs, are rows that are half right."""
    rows = World(6, 500)
    score = np.repeat(rows.score, 2)
    weak = np.repeat(rows.weak_chance.round(1), 2)
    apart = weak + np.tile([0.1, -0.1], 500)
    strong = np.ones(1_000)
    grouped = guaranteed_threshold(score, apart, strong, quality=0.7, groups=np.repeat(np.arange(500), 2))
    merged = guaranteed_threshold(rows.score, weak[::2], strong[::2], quality=0.7, groups=np.arange(500))
    assert grouped.chosen.threshold == merged.chosen.threshold
    assert grouped.p_value == pytest.approx(merged.p_value)
    assert 0.0 < merged.chosen.strong_share < 1.0


def test_the_thresholds_that_are_tried_do_not_depend_on_the_rows() -> None:
    for seed in (7, 8):
        rows = World(seed, 2_000)
        steps = 1_000 * guaranteed_threshold(rows.score, rows.weak, rows.strong).chosen.threshold
        assert steps == pytest.approx(round(steps), abs=1e-9)


def test_always_strong_alone_is_no_promise() -> None:
    """Weak is always wrong: whatever is saved is lost, however many rows say so."""
    score = np.random.default_rng(0).random(2_000)
    found = guaranteed_threshold(score, np.zeros(2_000), np.ones(2_000), quality=0.999)
    assert not found.possible
    assert found.chosen.strong_share == 1.0
    assert found.p_value == 0.0


def test_a_larger_allowed_loss_saves_more_and_a_higher_confidence_less() -> None:
    rows = World(3, 3_000)

    def share(loss: float, confidence: float) -> float:
        found = guaranteed_threshold(
            rows.score, rows.weak, rows.strong, quality=1.0, allowed_loss=loss, confidence=confidence
        )
        return found.chosen.strong_share

    assert share(0.1, 0.95) < share(0.05, 0.95) < share(0.02, 0.95) <= 1.0
    assert share(0.05, 0.999) > share(0.05, 0.8)


@pytest.mark.parametrize("mean", [0.5, 0.3])
def test_p_values_are_valid_at_the_bar_itself(mean: float) -> None:
    """Where the mean loss is the bar, a p-value below .1 comes up in at most a tenth of the draws."""
    rng = np.random.default_rng(0)
    losses = (rng.random((2_000, 400)) < mean).astype(np.float64)
    p = betting_p_values(losses, mean, lowest=0.0, highest=1.0, level=0.1)
    assert (p <= 0.1).mean() <= 0.1 + 3 * np.sqrt(0.09 / 2_000)
    assert (betting_p_values(losses, mean + 0.1, lowest=0.0, highest=1.0, level=0.1) <= 0.1).mean() > 0.8


def test_a_game_that_ends_early_never_claims_more() -> None:
    losses = (np.random.default_rng(2).random((50, 800)) < 0.4).astype(np.float64)
    bounds = {"lowest": 0.0, "highest": 1.0, "level": 0.05}
    whole = betting_p_values(losses, 0.5, **bounds)
    short = betting_p_values(losses[:, :100], 0.5, **bounds, horizon=800)
    assert (short >= whole).all()
    assert (whole < 0.05).all()
    assert (short < 0.05).any()


def test_scores_below_any_gain_are_no_promise() -> None:
    found = guaranteed_threshold(np.full(30, -1.5), np.ones(30), np.ones(30), confidence=0.999)
    assert not found.possible
    assert found.chosen.strong_share == 1.0
    assert "99.9% confidence" in found.words


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"quality": 1.2}, "share"),
        ({"quality": 0.0}, "share"),
        ({"allowed_loss": -0.1}, "loss"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 0.2}, "confidence"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], word: str) -> None:
    rows = World(5, 50)
    with pytest.raises(UsageError, match=word):
        guaranteed_threshold(rows.score, rows.weak, rows.strong, **arguments)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        guaranteed_threshold([], [], [])


def test_values_the_bounds_do_not_hold_for_are_refused() -> None:
    rows = World(5, 50)
    with pytest.raises(ValueError, match="between 0 and 1"):
        guaranteed_threshold(rows.score, 2 * rows.weak, rows.strong)
    with pytest.raises(ValueError, match="finite"):
        guaranteed_threshold(rows.score[1:], rows.weak, rows.strong)
    with pytest.raises(ValueError, match="groups"):
        guaranteed_threshold(rows.score, rows.weak, rows.strong, groups=["a"])


# --- Several targets -------------------------------------------------------------------------------------------------


class Three:
    """Three targets of which the dearest two are equally good on the whole, each on its own half of the prompts."""

    def __init__(self, seed: int, n: int) -> None:
        rng = np.random.default_rng(seed)
        hardness, kind = rng.random(n), rng.random(n) < 0.5
        self.chance = np.stack([0.8 - 0.6 * hardness, 0.8 - 0.15 * kind, 0.8 - 0.15 * ~kind], axis=1)
        gain = self.chance - self.chance[:, :1] + rng.normal(0, 0.1, self.chance.shape)
        gain[:, 0] = 0.0
        self.prediction = Prediction(("low", "mid", "high"), self.chance, gain)
        self.quality = (rng.random(self.chance.shape) < self.chance).astype(np.float64)

    def true_loss(self, threshold: float, share: float) -> float:
        routed = self.chance[np.arange(len(self.chance)), self.prediction.choose(threshold)]
        return float(share * self.chance.mean(axis=0).max() - routed.mean())


def test_the_promise_for_three_targets_is_broken_no_oftener_than_stated() -> None:
    truth, confidence, runs = Three(10_000, 30_000), 0.9, 60
    found = [
        guaranteed_ladder_threshold(
            rows.prediction, rows.quality, share=0.95, confidence=confidence, seed=seed
        )
        for seed, rows in ((seed, Three(seed, 500)) for seed in range(runs))
    ]
    thresholds = [promise.threshold for promise in found if promise.threshold is not None]
    assert len(thresholds) > runs / 2  # else nothing is tested
    broken = sum(truth.true_loss(threshold, 0.95) > 0 for threshold in thresholds)
    assert broken / runs <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / runs)
    # A threshold of twice the largest promised would break it: the promises are not empty.
    assert truth.true_loss(2 * max(thresholds) + 0.1, 0.95) > 0
    assert np.median(thresholds) > 0.02


def test_few_rows_of_three_targets_promise_nothing() -> None:
    rows = Three(0, 20)
    found = guaranteed_ladder_threshold(rows.prediction, rows.quality, share=1.0, confidence=0.99)
    assert found.threshold is None
    assert "20 rows cannot promise" in found.words
    assert found.p_value > 0.01
    with pytest.raises(UsageError, match="confidence"):
        guaranteed_ladder_threshold(rows.prediction, rows.quality, confidence=1.0)
    with pytest.raises(DatasetError, match="no rows"):
        guaranteed_ladder_threshold(
            Prediction(("a", "b"), np.zeros((0, 2)), np.zeros((0, 2))), np.zeros((0, 2))
        )
