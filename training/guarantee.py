"""A threshold with a promise: quality at least a share of strong's, with a stated confidence.

A threshold tuned on the mean of the calibration rows holds on new rows about every second time. Here a threshold is only
taken when a test rejects, at level 1 − confidence, that it loses too much. This is Learn then Test (Angelopoulos et al. 2021,
"Learn then Test: Calibrating predictive algorithms to achieve risk control", arXiv 2110.01052):

- The loss of a row is ``quality · q_strong − q_routed``, so a mean loss of at most 0 is a ratio of means of at least ``quality``.
- The hypotheses are "at this threshold the expected loss is above what is allowed", one for each point of a grid that is fixed
  before any row is seen. (Quantiles of the calibration scores would be hypotheses that depend on the data that tests them.)
- They are tested in a fixed sequence, from always-strong down to never-strong, at the full level each, up to the first that is
  not rejected: all before it hold together with the stated confidence, however many there are, and the loss need not be monotone.
- The p-values are those of a betting martingale (Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by
  betting", arXiv 2010.09686): valid for any bounded loss at any number of rows, and far tighter than Hoeffding's where the loss
  varies little, as it does when most rows are routed alike.

**What is promised**: for new rows drawn as the calibration rows were, the expected loss is at most what was allowed; the promise
itself fails with probability at most 1 − confidence over the draw of the calibration rows. Rows of one group (identical prompts)
are not independent: a group counts as one row, with the mean of its losses, so the promise is for traffic of which each group is
as likely. The score decides: a policy that sends flagged, unfamiliar prompts to the strong target sends more there than this
counts. Nothing is promised about other traffic, a single source or domain of a mixture, or a single answer; nor by the best
of several promises that were tried on the same rows.

**How many rows it takes**: at the usual .95 and .95, under a hundred cannot vouch even for always-strong, since no bet may stake
all on a row; some hundreds promise a little, and what is given away for the promise shrinks with the square root of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.errors import DatasetError, UsageError
from router.predictor import Prediction
from training.metrics import QUALITY_BAR
from training.threshold import ChosenThreshold, describe

Floats = NDArray[np.float64]

# Thresholds that are tried on the range of a gain, −1 to 1. A finer grid costs no confidence in a fixed sequence, and where
# predicted gains lie close together a step of .005 holds several percent of the rows.
GRID = 2000
# Thresholds whose p-values are computed at a time: most lie behind the first refusal and are not needed.
_BLOCK = 8
# The same for several targets: thresholds from 0, where the fewest are expected to lose, to 1.
LADDER_STEPS = 100
# A bet risks at most this share of the capital that a single row could take.
_LARGEST_BET = 0.75


@dataclass(frozen=True)
class Guarantee:
    """A threshold whose loss is bounded.

    Attributes
    ----------
    chosen : ChosenThreshold
        What it does on the calibration rows.
    quality : float
        The promised share of strong's mean quality.
    allowed_loss : float
        Quality that may be lost beside that.
    confidence : float
    p_value : float
        The largest along the sequence up to the chosen threshold, or a bound on it: the bets on a threshold end once they
        have decided. 0 for always-strong, which cannot lose.
    possible : bool
        Whether anything cheaper than always-strong could be promised. Where not, ``chosen`` is always-strong.
    words : str
        What is promised, for people and the manifest.
    """

    chosen: ChosenThreshold
    quality: float
    allowed_loss: float
    confidence: float
    p_value: float
    possible: bool
    words: str


def guaranteed_threshold(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    quality: float = QUALITY_BAR,
    allowed_loss: float = 0.0,
    confidence: float = 0.95,
    groups: ArrayLike | None = None,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    seed: int = 0,
) -> Guarantee:
    """The lowest strong share for which ``E[quality · q_strong − q_routed] ≤ allowed_loss`` can be promised.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Scores (gains, so between −1 and 1) of rows that the bundle was not trained on, and the qualities of the two
        targets, 0 to 1.
    quality : float
        Share of strong's mean quality, above 0 and at most 1.
    allowed_loss : float
        In units of quality, at least 0. ``quality=1, allowed_loss=.02`` promises at most .02 below strong.
    confidence : float
        Above .5 and below 1.
    groups : array_like, shape (n,), optional
        Rows of one group count as one; by default each row is its own.
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request; for the expected cost.
    seed : int
        Of the order in which the rows are bet on. Fix it before looking: the best of several seeds promises nothing.

    Raises
    ------
    UsageError
        An argument is out of range.
    DatasetError
        There are no rows.
    ValueError
        Shapes differ, a score is not finite, or a quality is not between 0 and 1.
    """
    _check(quality, allowed_loss, confidence)
    score, weak, strong = (np.asarray(values, dtype=np.float64) for values in (score, weak, strong))
    if not len(score):
        raise DatasetError("there are no rows to choose a threshold on")
    if not score.shape == weak.shape == strong.shape or not np.isfinite(score).all():
        raise ValueError("expected one finite score and two qualities a row")
    if not all(((values >= 0.0) & (values <= 1.0)).all() for values in (weak, strong)):
        raise ValueError(
            "the promise needs qualities between 0 and 1: its bets rely on the bounds of the loss"
        )
    order, starts, sizes = _units(len(score), groups, np.random.default_rng(seed))
    ranked = score[order]
    if_strong, if_weak = (quality - 1.0) * strong[order], quality * strong[order] - weak[order]

    level = 1.0 - confidence
    thresholds = _grid(score)
    units = len(starts)

    def p_values_of(block: Floats, rows: int) -> Floats:
        """On the first ``rows`` units; a shorter game than the whole is a valid one."""
        end = len(order) if rows == units else starts[rows]
        losses = np.where(ranked[:end] > block[:, None], if_strong[:end], if_weak[:end])
        if units < len(order):
            losses = np.add.reduceat(losses, starts[:rows], axis=1) / sizes[:rows]
        return betting_p_values(
            losses, allowed_loss, lowest=-1.0, highest=quality, level=level, horizon=units
        )

    passed, worst = 0, 0.0
    while passed < len(thresholds):
        block = thresholds[passed : passed + _BLOCK]
        p_values = np.ones(len(block))
        # Far from the bar an eighth of the rows decides.
        for share in (8, 2, 1):
            undecided = p_values > level
            if undecided.any() and units >= share:
                p_values[undecided] = p_values_of(block[undecided], units // share)
        refused = np.flatnonzero(p_values > level)
        held = int(refused[0]) if len(refused) else len(p_values)
        passed += held
        worst = max(worst, *p_values[:held], 0.0)
        if len(refused):
            break
    threshold = float(thresholds[passed - 1]) if passed else -1.0
    possible = passed > 0 and bool((score <= threshold).any())
    if not possible:
        threshold = min(-1.0, float(np.nextafter(score.min(), -np.inf)))
    goal = f"{quality:g} × strong's quality" + (f" less {allowed_loss:g}" if allowed_loss else "")
    sure = f"with {100 * confidence:g}% confidence"
    rows = f"{len(starts)} {'rows' if len(starts) == len(score) else 'groups of rows'}"
    words = (
        f"expected quality at least {goal}, {sure}, for traffic like these {rows}"
        if possible
        else f"{rows} cannot promise {goal} {sure} for less than always-strong"
    )
    chosen = describe(
        threshold, score, weak, strong, value=quality, how=words, cost_weak=cost_weak, cost_strong=cost_strong
    )
    return Guarantee(
        chosen, quality, allowed_loss, confidence, float(worst) if possible else 0.0, possible, words
    )


@dataclass(frozen=True)
class LadderGuarantee:
    """A threshold for several targets whose loss against the best single target is bounded.

    Attributes
    ----------
    threshold : float or None
        None where nothing can be promised: unlike a pair's, these thresholds hold no "best single target always".
    p_value : float
        Of the hypothesis that it loses more; of the first threshold tried where there is none.
    words : str
        What is promised, or that it cannot be.
    """

    threshold: float | None
    p_value: float
    words: str


def guaranteed_ladder_threshold(
    prediction: Prediction,
    quality: Floats,
    *,
    share: float = QUALITY_BAR,
    confidence: float = 0.95,
    seed: int = 0,
) -> LadderGuarantee:
    """The highest threshold for which ``E[share · q_t − q_routed] ≤ 0`` can be promised for every single target t.

    Fixed-sequence testing needs no loss that rises with the threshold: each hypothesis is tested at the full level, in an
    order that is fixed beforehand, until one is not rejected. The thresholds tried are therefore the same whatever the
    rows. Which target is the best is not known either, and taking the one that looks best on these rows would be a choice made
    by the same data: so all targets must be rejected, whose largest p-value is that of the union (intersection-union test).

    Parameters
    ----------
    prediction : Prediction
        Of n rows that the bundle was not trained on.
    quality : ndarray, shape (n, T)
        Every label, 0 to 1.
    share : float
        Of the best single target's mean quality, above 0 and at most 1.
    confidence : float
        Above .5 and below 1.
    seed : int
        Of the order in which the rows are bet on.

    Raises
    ------
    UsageError
        An argument is out of range.
    DatasetError
        There are no rows.
    ValueError
        A quality is missing, or not between 0 and 1.
    """
    _check(share, 0.0, confidence)
    n = len(quality)
    if not n:
        raise DatasetError("there are no rows to choose a threshold on")
    if not ((quality >= 0.0) & (quality <= 1.0)).all():
        raise ValueError("the bounds need every quality, between 0 and 1")
    thresholds = np.linspace(0.0, 1.0, LADDER_STEPS + 1)
    choice = np.stack([prediction.choose(float(threshold)) for threshold in thresholds], axis=1)
    routed = np.take_along_axis(quality, choice, axis=1)
    order = np.random.default_rng(seed).permutation(n)
    p_values = np.max(
        [
            betting_p_values(
                (share * single[:, None] - routed)[order].T,
                0.0,
                lowest=-1.0,
                highest=share,
                level=1 - confidence,
            )
            for single in quality.T
        ],
        axis=0,
    )
    refused = np.flatnonzero(p_values > 1 - confidence)
    accepted = int(refused[0]) if len(refused) else len(thresholds)
    goal = f"{share:g} × the best single target's quality"
    if not accepted:
        words = f"{n} rows cannot promise {goal} with {confidence:.0%} confidence"
        return LadderGuarantee(None, float(p_values[0]), words)
    words = (
        f"expected quality at least {goal}, with {confidence:.0%} confidence, for traffic like these {n} rows"
    )
    return LadderGuarantee(float(thresholds[accepted - 1]), float(p_values[accepted - 1]), words)


def betting_p_values(
    losses: Floats, bar: float, *, lowest: float, highest: float, level: float, horizon: int | None = None
) -> Floats:
    """p-values of "the mean loss is above ``bar``", one a candidate.

    Parameters
    ----------
    losses : ndarray, shape (candidates, n)
        Rows independent and identically distributed, in random order.
    bar : float
    lowest, highest : float
        Bounds of a loss.
    level : float
        The level that the bets are tuned for; validity does not depend on it.
    horizon : int, optional
        The number of rows that the bets are tuned for, likewise; n by default.

    Returns
    -------
    ndarray, shape (candidates,)
        By Ville's inequality, one over the largest capital that a gambler reaches who bets on small losses and, were the mean
        loss above the bar, could not expect to win.
    """
    n = losses.shape[1]
    width = highest - lowest
    x = (losses - lowest) / width
    m = (bar - lowest) / width
    count = np.arange(2, n + 2)
    # In place from here on: most of the time goes into moving memory.
    squares = np.cumsum(x, axis=1)
    squares += 0.5
    squares /= count
    squares -= x
    squares *= squares
    # A bet may know the rows before it only: the first is made on a guess of the variance.
    bets = np.full_like(x, 0.25)
    np.cumsum(squares[:, :-1], axis=1, out=bets[:, 1:])
    bets[:, 1:] += 0.25
    bets[:, 1:] /= count[:-1]
    np.divide(2 * math.log(1 / level) / (horizon or n), bets, out=bets)
    np.sqrt(bets, out=bets)
    np.minimum(bets, _LARGEST_BET / max(1 - m, 1e-9), out=bets)
    np.subtract(m, x, out=x)
    x *= bets
    np.log1p(x, out=x)
    capital = np.cumsum(x, axis=1, out=x).max(axis=1)
    p_values: Floats = np.exp(-np.maximum(capital, 0.0))
    return p_values


def _check(quality: float, allowed_loss: float, confidence: float) -> None:
    if not 0.0 < quality <= 1.0 or not 0.0 <= allowed_loss < 1.0:
        raise UsageError(
            "a promise is about a share of strong's quality above 0 and at most 1, and a loss of at least 0"
        )
    if not 0.5 < confidence < 1.0:
        raise UsageError(f"confidence {confidence}: expected a number above 0.5 and below 1, such as 0.95")


def _grid(score: Floats) -> Floats:
    """Rising thresholds; of those that route these rows alike, and so share a p-value, the highest alone."""
    grid = np.linspace(-1.0, 1.0, GRID + 1)
    above = np.searchsorted(np.sort(score), grid, side="right")
    thresholds: Floats = grid[np.append(np.diff(above) > 0, True)]
    return thresholds


def _units(
    n: int, groups: ArrayLike | None, random: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Rows in random order with those of a group together; where each group starts, and its size."""
    if groups is None:
        return random.permutation(n), np.arange(n), np.ones(n, dtype=np.intp)
    _, member, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if member.shape != (n,):
        raise ValueError(f"groups have the shape {member.shape}, expected ({n},)")
    turn = random.permutation(len(sizes))
    order = np.argsort(turn[member], kind="stable")
    sizes = sizes[np.argsort(turn)]
    return order, np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes
