"""A threshold with a promise: quality at least a share of strong's, with a stated confidence.

A threshold tuned on the mean of the calibration rows holds on new rows about every second time. Here a threshold is only
taken when a test rejects, at level 1 − confidence, that it loses too much: Learn then Test (Angelopoulos et al. 2021,
arXiv 2110.01052) with fixed-sequence testing, from always-strong downwards, stopping at the first that is not rejected. The
p-values are those of a betting martingale (Waudby-Smith and Ramdas 2023, arXiv 2010.09686): valid for any bounded loss
without further assumptions, and far tighter than Hoeffding's where the loss varies little, as it does when most rows are
routed alike.

**What is promised**: for new rows drawn like the calibration rows, independent of each other, the expected loss is at most what
was allowed; the promise itself fails with probability at most 1 − confidence over the draw of the calibration rows. Nothing is
promised about other traffic, nor about a single answer.
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

# Thresholds that are tried: at these strong shares of the calibration rows, from 1 downwards.
STEPS = 100
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
        Of the hypothesis that the chosen threshold loses more; 0 for always-strong, which cannot.
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
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    seed: int = 0,
) -> Guarantee:
    """The lowest strong share for which ``E[quality · q_strong − q_routed] ≤ allowed_loss`` can be promised.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Scores of rows that the bundle was not trained on, and the qualities of the two targets, 0 to 1.
    quality : float
        Share of strong's mean quality, above 0 and at most 1.
    allowed_loss : float
        In units of quality, at least 0. ``quality=1, allowed_loss=.02`` promises at most .02 below strong.
    confidence : float
        Above .5 and below 1.
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request; for the expected cost.
    seed : int
        Of the order in which the rows are bet on.

    Raises
    ------
    UsageError
        An argument is out of range.
    DatasetError
        There are no rows.
    """
    _check(quality, allowed_loss, confidence)
    score, weak, strong = (np.asarray(values, dtype=np.float64) for values in (score, weak, strong))
    if not len(score):
        raise DatasetError("there are no rows to choose a threshold on")
    thresholds = _candidates(score)
    # Row by candidate: the loss is bounded by [−1, quality], whatever is routed where.
    routed = np.where(score[:, None] > thresholds, strong[:, None], weak[:, None])
    losses = quality * strong[:, None] - routed
    order = np.random.default_rng(seed).permutation(len(score))
    p_values = betting_p_values(
        losses[order], allowed_loss, lowest=-1.0, highest=quality, level=1 - confidence
    )
    refused = np.flatnonzero(p_values > 1 - confidence)
    accepted = int(refused[0]) if len(refused) else len(thresholds)
    possible = accepted > 0
    threshold = float(thresholds[accepted - 1]) if possible else min(-1.0, float(score.min()) - 1e-9)
    goal = f"{quality:g} × strong's quality" + (f" less {allowed_loss:g}" if allowed_loss else "")
    words = (
        f"expected quality at least {goal}, with {confidence:.0%} confidence, for traffic like these {len(score)} rows"
        if possible
        else f"{len(score)} rows cannot promise {goal} with {confidence:.0%} confidence for less than always-strong"
    )
    chosen = describe(
        threshold, score, weak, strong, value=quality, how=words, cost_weak=cost_weak, cost_strong=cost_strong
    )
    p_value = float(p_values[accepted - 1]) if possible else 0.0
    return Guarantee(chosen, quality, allowed_loss, confidence, p_value, possible, words)


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
    """
    _check(share, 0.0, confidence)
    n = len(quality)
    if not n:
        raise DatasetError("there are no rows to choose a threshold on")
    thresholds = np.linspace(0.0, 1.0, LADDER_STEPS + 1)
    choice = np.stack([prediction.choose(float(threshold)) for threshold in thresholds], axis=1)
    routed = np.take_along_axis(quality, choice, axis=1)
    order = np.random.default_rng(seed).permutation(n)
    p_values = np.max(
        [
            betting_p_values(
                (share * single[:, None] - routed)[order],
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


def betting_p_values(losses: Floats, bar: float, *, lowest: float, highest: float, level: float) -> Floats:
    """p-values of "the mean loss is above ``bar``", one a column.

    Parameters
    ----------
    losses : ndarray, shape (n, candidates)
        Rows independent and identically distributed, in random order.
    bar : float
    lowest, highest : float
        Bounds of a loss.
    level : float
        The level that the bets are tuned for; validity does not depend on it.

    Returns
    -------
    ndarray, shape (candidates,)
        By Ville's inequality, one over the largest capital that a gambler reaches who bets on small losses and, were the mean
        loss above the bar, could not expect to win.
    """
    n = len(losses)
    x = (losses - lowest) / (highest - lowest)
    m = (bar - lowest) / (highest - lowest)
    count = np.arange(1, n + 1)[:, None]
    mean = (0.5 + np.cumsum(x, axis=0)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2, axis=0)) / (count + 1)
    # A bet may know the rows before it only.
    before = np.vstack([np.full((1, x.shape[1]), 0.25), variance[:-1]])
    bets = np.minimum(np.sqrt(2 * math.log(1 / level) / (n * before)), _LARGEST_BET / max(1 - m, 1e-9))
    capital = np.cumsum(np.log1p(bets * (m - x)), axis=0)
    p_values: Floats = np.exp(-np.maximum(capital.max(axis=0), 0.0))
    return p_values


def _check(quality: float, allowed_loss: float, confidence: float) -> None:
    if not 0.0 < quality <= 1.0 or not 0.0 <= allowed_loss < 1.0:
        raise UsageError(
            "a promise is about a share of strong's quality above 0 and at most 1, and a loss of at least 0"
        )
    if not 0.5 < confidence < 1.0:
        raise UsageError(f"confidence {confidence}: expected a number above 0.5 and below 1, such as 0.95")


def _candidates(score: Floats) -> Floats:
    """Rising thresholds at falling strong shares: the quantiles of the scores, always-strong left out."""
    cuts = np.quantile(score, np.linspace(0, 1, STEPS + 1)[1:])
    return np.unique(cuts)
