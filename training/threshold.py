"""Choose the threshold that serving compares scores with: ``score > threshold`` goes to strong.

A threshold stands halfway between two neighbouring scores of the calibration rows, so that a score met again
falls on the side it was counted on. Rows of one score always go the same way.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.bundle import CostQualityCurve
from router.errors import DatasetError, UsageError
from training.metrics import (
    QUALITY_BAR,
    ROUNDING,
    Outcome,
    apply_threshold,
    known_costs,
    outcome_of,
    running_sum,
)

Floats = NDArray[np.float64]
Goal = Literal["quality", "strong_share", "max_cost"]

# Points of the curve that a bundle carries.
CURVE_POINTS = 101
# How far tied scores may push the share away from what was asked.
SHARE_TOLERANCE = 0.05


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold, why it was chosen, and what it does on the calibration rows.

    Attributes
    ----------
    threshold : float
        ``score > threshold`` goes to strong.
    goal : {"quality", "strong_share", "max_cost"}
    value : float
        What was asked: a share of strong's quality, a share of calls, or US dollars per 1,000 requests.
    how : str
        The same in words.
    n : int
        Calibration rows.
    strong_share : float
        Expected share of strong calls.
    quality : float or None
        Expected mean quality; None where the rows have no labels.
    cost : float or None
        Expected US dollars a request; None where the costs are not known.
    """

    threshold: float
    goal: Goal
    value: float
    how: str
    n: int
    strong_share: float
    quality: float | None = None
    cost: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and for ``--json``."""
        return asdict(self)


def for_quality(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    quality: float = QUALITY_BAR,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
) -> ChosenThreshold:
    """The threshold of the lowest strong share whose mean quality is at least ``quality`` times strong's.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Scores, and the qualities of the two targets.
    quality : float
        Above 0. May exceed 1 where weak is right when strong is not.
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request, for the expected cost; NaN where unknown.

    Raises
    ------
    UsageError
        ``quality`` is not a positive number, or no threshold reaches it.
    DatasetError
        There are no rows.
    """
    if not (math.isfinite(quality) and quality > 0.0):
        raise UsageError(f"quality {quality}: expected a share of strong's quality, such as 0.95")
    cuts = _Cuts.of(score, weak, strong, cost_weak, cost_strong)
    assert cuts.quality is not None
    strong_quality = cuts.quality[-1]
    enough = np.flatnonzero(cuts.quality >= quality * strong_quality - ROUNDING)
    if not len(enough):
        best = int(cuts.quality.argmax())
        raise UsageError(
            f"quality {quality:g} × strong's {strong_quality:.4f} cannot be reached on these {cuts.n} rows: "
            f"the best is {_ratio(cuts.quality[best], strong_quality)} ({cuts.quality[best]:.4f}), "
            f"at a strong share of {cuts.share[best]:.1%}"
        )
    how = f"lowest strong share with mean quality ≥ {quality:g} × strong's, on {cuts.n} rows"
    return cuts.choose(int(enough[0]), "quality", quality, how)


def for_strong_share(
    score: ArrayLike,
    share: float,
    weak: ArrayLike | None = None,
    strong: ArrayLike | None = None,
    *,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
) -> ChosenThreshold:
    """The threshold that sends the share of calls nearest to ``share`` to strong; needs no labels.

    Parameters
    ----------
    score : array_like, shape (n,)
    share : float
        0 to 1.
    weak, strong : array_like, shape (n,), optional
        Qualities, for the expected quality.
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request, for the expected cost; NaN where unknown.

    Raises
    ------
    UsageError
        ``share`` is not between 0 and 1, or ties leave every threshold ``SHARE_TOLERANCE`` or more away.
    DatasetError
        There are no rows.
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"strong share {share}: expected a number from 0 to 1")
    cuts = _Cuts.of(score, weak, strong, cost_weak, cost_strong)
    nearest = int(np.abs(cuts.share - share).argmin())
    if abs(cuts.share[nearest] - share) >= max(SHARE_TOLERANCE, 1.0 / cuts.n):
        above = int(np.searchsorted(cuts.share, share))
        raise UsageError(
            f"strong share {share:.1%} cannot be reached on these {cuts.n} rows: many have the same score; "
            f"the nearest are {cuts.share[above - 1]:.1%} and {cuts.share[above]:.1%}"
        )
    how = f"strong share nearest to {share:g}, on {cuts.n} rows"
    return cuts.choose(nearest, "strong_share", share, how)


def for_max_cost(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike,
    cost_strong: ArrayLike,
    *,
    usd_per_1k: float,
) -> ChosenThreshold:
    """The threshold of the best mean quality that costs at most ``usd_per_1k`` per 1,000 requests.

    Rows without both costs are left out. Of equally good thresholds the one with fewer strong calls is taken.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
    cost_weak, cost_strong : array_like, shape (n,)
        US dollars a request; NaN where unknown.
    usd_per_1k : float
        US dollars per 1,000 requests.

    Raises
    ------
    UsageError
        No row has costs, or every threshold costs more.
    DatasetError
        There are no rows.
    """
    if not (math.isfinite(usd_per_1k) and usd_per_1k >= 0.0):
        raise UsageError(f"maximum cost {usd_per_1k}: expected US dollars per 1,000 requests")
    score, weak, strong = (np.asarray(values, dtype=np.float64) for values in (score, weak, strong))
    if (costs := known_costs(cost_weak, cost_strong)) is None:
        raise UsageError("a maximum cost needs the costs of both targets, and no row has them: give prices")
    known, a, b = costs
    cuts = _Cuts.of(score[known], weak[known], strong[known], a, b)
    assert cuts.quality is not None
    assert cuts.cost is not None
    per_1k = 1000.0 * cuts.cost
    affordable = np.flatnonzero(per_1k <= usd_per_1k + ROUNDING)
    if not len(affordable):
        least = int(per_1k.argmin())
        raise UsageError(
            f"maximum cost {usd_per_1k:g} USD per 1,000 requests cannot be reached on these {cuts.n} rows: "
            f"the least is {per_1k[least]:.4g}, at a strong share of {cuts.share[least]:.1%}"
        )
    best = affordable[cuts.quality[affordable].argmax()]
    how = f"best mean quality at ≤ {usd_per_1k:g} USD per 1,000 requests, on {cuts.n} rows"
    return cuts.choose(int(best), "max_cost", usd_per_1k, how)


def describe(
    threshold: float,
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    value: float,
    how: str,
    goal: Goal = "quality",
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
) -> ChosenThreshold:
    """What a threshold that was chosen elsewhere does on these rows."""
    outcome = apply_threshold(score, threshold, weak, strong, cost_weak, cost_strong)
    return ChosenThreshold(
        threshold=threshold,
        goal=goal,
        value=value,
        how=how,
        n=outcome.n,
        strong_share=outcome.strong_share,
        quality=outcome.quality,
        cost=outcome.cost,
    )


def nested_outcome(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    folds: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    *,
    quality: float = QUALITY_BAR,
) -> Outcome:
    """Serve each fold with the threshold that :func:`for_quality` picks on the other folds.

    What a user gets, where a threshold picked on the evaluated rows tells what could have been had.

    Parameters
    ----------
    score : array_like, shape (n,)
        Of rows that their estimator was not fitted on.
    weak, strong, cost_weak, cost_strong : array_like, shape (n,)
        As for :func:`for_quality`.
    folds : array_like, shape (n,)
        Which fold each row belongs to; at least two.
    """
    score, weak, strong = (np.asarray(values, dtype=np.float64) for values in (score, weak, strong))
    folds = np.asarray(folds)
    to_strong = np.zeros(len(score), dtype=bool)
    for fold in np.unique(folds):
        here = folds == fold
        chosen = for_quality(score[~here], weak[~here], strong[~here], quality=quality)
        to_strong[here] = score[here] > chosen.threshold
    return outcome_of(to_strong, weak, strong, cost_weak, cost_strong)


def curve_of_pair(
    score: ArrayLike, weak: ArrayLike, strong: ArrayLike, *, names: tuple[str, str]
) -> CostQualityCurve:
    """The thresholds at every hundredth of strong calls, with what they give on these rows.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Of rows that the estimator was not fitted on.
    names : (str, str)
        Of weak and strong.
    """
    cuts = _Cuts.of(score, weak, strong, None, None)
    assert cuts.quality is not None
    wanted = np.linspace(0.0, 1.0, CURVE_POINTS)
    points = np.unique(np.searchsorted(cuts.share[:-1], wanted))
    return CostQualityCurve(
        axis="strong_share",
        rows=cuts.n,
        thresholds=tuple(cuts.thresholds[points].tolist()),
        spend=rounded(cuts.share[points]),
        quality=rounded(cuts.quality[points]),
        alone={
            names[0]: (0.0, round(float(cuts.quality[0]), 6)),
            names[1]: (1.0, round(float(cuts.quality[-1]), 6)),
        },
    )


@dataclass(frozen=True)
class _Cuts:
    """What every threshold that tells rows apart does: from none to all of them to strong.

    All arrays have the shape (distinct scores + 1,).
    """

    n: int
    thresholds: Floats
    share: Floats
    quality: Floats | None
    cost: Floats | None

    @classmethod
    def of(
        cls,
        score: ArrayLike,
        weak: ArrayLike | None,
        strong: ArrayLike | None,
        cost_weak: ArrayLike | None,
        cost_strong: ArrayLike | None,
    ) -> _Cuts:
        score = np.asarray(score, dtype=np.float64)
        if not len(score):
            raise DatasetError("there are no rows to choose a threshold on")
        if not np.isfinite(score).all():
            raise ValueError("scores must be finite")
        distinct, cut, counts = np.unique(-score, return_inverse=True, return_counts=True)
        quality = cost = None
        if weak is not None and strong is not None:
            low, high = np.asarray(weak, dtype=np.float64), np.asarray(strong, dtype=np.float64)
            if not (np.isfinite(low) & np.isfinite(high)).all():
                raise ValueError("qualities must be finite: leave out rows that lack one")
            quality = _means(low, high, cut, len(distinct))
        if (costs := known_costs(cost_weak, cost_strong)) is not None:
            known, low, high = costs
            cost = _means(low, high, cut[known], len(distinct))
        return cls(
            n=len(score),
            thresholds=_halfway(-distinct),
            share=running_sum(counts) / len(score),
            quality=quality,
            cost=cost,
        )

    def choose(self, cut: int, goal: Goal, value: float, how: str) -> ChosenThreshold:
        return ChosenThreshold(
            threshold=float(self.thresholds[cut]),
            goal=goal,
            value=value,
            how=how,
            n=self.n,
            strong_share=float(self.share[cut]),
            quality=None if self.quality is None else float(self.quality[cut]),
            cost=None if self.cost is None else float(self.cost[cut]),
        )


def _means(low: Floats, high: Floats, cut: NDArray[np.intp], cuts: int) -> Floats:
    """Mean over the rows when those of the first 0 to ``cuts`` scores are ``high``, the others ``low``."""
    means: Floats = low.mean() + running_sum(np.bincount(cut, high - low, minlength=cuts)) / len(low)
    return means


def _halfway(distinct: Floats) -> Floats:
    """Thresholds around falling distinct scores, shape (len(distinct) + 1,).

    A gain lies between −1 and 1, so these two stand for "never" and "always" on rows not yet seen too.
    """
    upper, lower = distinct[:-1], distinct[1:]
    between = lower + (upper - lower) / 2
    # Between two neighbouring floats there is no room: the lower one itself tells them apart.
    between = np.where(between < upper, between, lower)
    never = max(1.0, distinct[0])
    always = min(-1.0, np.nextafter(distinct[-1], -np.inf))
    return np.concatenate(([never], between, [always]))


def rounded(values: Floats) -> tuple[float, ...]:
    """As a bundle's curve keeps them."""
    return tuple(round(float(value), 6) for value in values)


def _ratio(quality: float, strong_quality: float) -> str:
    return f"{quality / strong_quality:.3f} × strong's" if strong_quality > 0.0 else "0 × strong's"
