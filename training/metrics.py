"""How well scores rank prompts: cost/quality curves, APGR, CPT, savings, calibration.

PGR, APGR and CPT are RouteLLM's (arXiv 2406.18665) as its evaluation computes them, so that figures
compare: the thresholds are the 11 edges of ``pandas.qcut(scores, 10, retbins=True)`` on the evaluated rows,
and a prompt goes to strong when its score is at or above the edge (above, for the last).
How many prompts that is depends on the number of rows alone, so the curve is read off a running sum of the
gains in the order of the scores. Equal scores would break ``qcut``; a seeded random order stands for an
infinitely small jitter.

Qualities may be fractions, on any scale with a meaningful zero. Arrays have the shape (n,) unless said
otherwise; ``weak`` and ``strong`` are the qualities of the two targets on each row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.errors import DatasetError

Floats = NDArray[np.float64]
Counts = NDArray[np.uint8]

# Bins of the curve that APGR and CPT are read from.
BINS = 10
# The saving is told at this share of strong's quality.
QUALITY_BAR = 0.95
# Bins of a reliability diagram, and of its error.
RELIABILITY_BINS = 10
# Runs that a random router is averaged over.
RANDOM_RUNS = 10
# Means of the same numbers, summed in another order, differ by less.
ROUNDING = 1e-12
# Standard deviations that hold 95 % of a normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Curve:
    """Quality against the share of prompts sent to strong; ascending in share.

    Attributes
    ----------
    share : ndarray, shape (points,)
        0 to 1.
    quality : ndarray, shape (points,)
        Mean quality at that share.
    thresholds : ndarray, shape (points,)
        The score at which the share is cut off.
    cost : ndarray, shape (points,), or None
        Mean US dollars a request at that share, over the rows whose costs are known; None where no row's are.
    """

    share: Floats
    quality: Floats
    thresholds: Floats
    cost: Floats | None = None


@dataclass(frozen=True)
class Interval:
    """A mean, or a figure, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """What a threshold does on ``n`` rows.

    Attributes
    ----------
    n : int
    strong_share : float
        0 to 1.
    quality : float
        Mean quality of the answers.
    cost : float or None
        US dollars a request, over the rows whose costs are known; None where no row's are.
    cost_saving : float or None
        Share of the dollars of always-strong that is saved, on the same rows.
    """

    n: int
    strong_share: float
    quality: float
    cost: float | None = None
    cost_saving: float | None = None


@dataclass(frozen=True)
class MethodFigures:
    """The figures of one method on one set of rows.

    Attributes
    ----------
    n : int
    defined : bool
        Whether strong is better than weak on these rows. Where it is not there is no gap to recover:
        ``apgr``, ``apgr_ci``, ``cpt50`` and ``cpt80`` are NaN.
    apgr : float
    apgr_ci : tuple of float
        95 % bootstrap interval; NaN where the gap's own interval reaches zero: the ratio is then unbounded.
    cpt50, cpt80 : float
        Strong-call share, in %, that recovers 50 and 80 % of the gap.
    strong_share_at_95 : float
        Least strong-call share with at least 95 % of strong's quality, the threshold picked on these rows.
    call_saving_at_95 : float
        ``1 - strong_share_at_95``.
    cost_saving_at_95 : float or None
        Share of always-strong's dollars saved there; None where no costs are known.
    nested_strong_share_at_95, nested_quality, nested_cost_saving : float or None
        The same with the threshold picked on other rows, where that was measured, and the quality it gave.
    apgr_sd : float or None
        Standard deviation of ``apgr``, where the figures are means over runs.
    """

    n: int
    defined: bool
    apgr: float
    apgr_ci: tuple[float, float]
    cpt50: float
    cpt80: float
    strong_share_at_95: float
    call_saving_at_95: float
    cost_saving_at_95: float | None = None
    nested_strong_share_at_95: float | None = None
    nested_quality: float | None = None
    nested_cost_saving: float | None = None
    apgr_sd: float | None = None

    def with_nested(self, outcome: Outcome) -> MethodFigures:
        """These figures beside what thresholds picked on other rows did."""
        return dataclasses.replace(
            self,
            nested_strong_share_at_95=outcome.strong_share,
            nested_quality=outcome.quality,
            nested_cost_saving=outcome.cost_saving,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None stands for it."""
        fields = dataclasses.asdict(self)
        fields["apgr_ci"] = [_or_none(bound) for bound in self.apgr_ci]
        return {name: _or_none(value) for name, value in fields.items()}


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows with neighbouring predictions.

    Attributes
    ----------
    n : int
    predicted, observed : float
        Means.
    low, high : float
        95 % interval of the observed mean.
    """

    n: int
    predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationFigures:
    """How far a predicted quality, or gain, can be taken at its word.

    Attributes
    ----------
    n : int
    ece : float
        Expected calibration error, :func:`expected_calibration_error`.
    ece_by_chance : float
        What it would be on these rows if every bin's true mean were the predicted one: an error of this size is noise.
    brier : float
        Mean squared error; the Brier score where labels are 0 or 1.
    base_brier : float
        The same of the mean label of these rows, told of every row.
    auc : float
        Area under the ROC curve for the event; NaN where it always or never happens.
    bins : tuple of ReliabilityBin
        Rising, of equally many rows.
    """

    n: int
    ece: float
    ece_by_chance: float
    brier: float
    base_brier: float
    auc: float
    bins: tuple[ReliabilityBin, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no tuples: None and lists stand for them."""
        fields = dataclasses.asdict(self)
        return fields | {"auc": _or_none(self.auc), "bins": list(fields["bins"])}


@dataclass(frozen=True)
class Calibration:
    """Of a pair of targets: of each quality, by the target's name, and of the gain."""

    quality: Mapping[str, CalibrationFigures]
    gain: CalibrationFigures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quality": {name: figures.as_dict() for name, figures in self.quality.items()},
            "gain": self.gain.as_dict(),
        }


def cost_quality_curve(score: ArrayLike, weak: ArrayLike, strong: ArrayLike, *, seed: int = 0) -> Curve:
    """RouteLLM's curve of 11 points.

    Parameters
    ----------
    score : array_like, shape (n,)
        Higher goes to strong first.
    weak, strong : array_like, shape (n,)
    seed : int
        Orders equal scores.

    Raises
    ------
    DatasetError
        There are no rows.
    ValueError
        Shapes differ, or a value is not finite.
    """
    score, weak, strong = _rows(score, weak, strong)
    n = len(score)
    calls = _bin_counts(n)
    gained = running_sum((strong - weak)[_order(score, seed)])
    edges = np.quantile(score, np.linspace(1.0, 0.0, BINS + 1))
    return Curve(share=calls / n, quality=weak.mean() + gained[calls] / n, thresholds=edges)


def full_curve(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    *,
    seed: int = 0,
) -> Curve:
    """The curve at every number of strong calls, 0 to n: n + 1 points.

    ``thresholds`` holds the score of the last prompt that goes to strong; infinity where none does. The
    arguments and errors are those of :func:`cost_quality_curve` and :func:`apply_threshold`.
    """
    score, weak, strong = _rows(score, weak, strong)
    n = len(score)
    order = _order(score, seed)
    cost = None
    if (costs := known_costs(cost_weak, cost_strong)) is not None:
        known, a, b = costs
        extra = np.zeros(n)
        extra[known] = b - a
        cost = a.mean() + running_sum(extra[order]) / len(a)
    return Curve(
        share=np.arange(n + 1) / n,
        quality=weak.mean() + running_sum((strong - weak)[order]) / n,
        thresholds=np.concatenate(([np.inf], score[order])),
        cost=cost,
    )


def pgr(quality: ArrayLike, weak_quality: float, strong_quality: float) -> Floats:
    """Performance gap recovered, for any shape of ``quality``; NaN where strong is not better than weak."""
    quality = np.asarray(quality, dtype=np.float64)
    if not _gap_is_positive(weak_quality, strong_quality):
        return np.full(quality.shape, np.nan)
    recovered: Floats = (quality - weak_quality) / (strong_quality - weak_quality)
    return recovered


def apgr(curve: Curve) -> float:
    """Average PGR over the strong-call share, by trapezoids; NaN where strong is not better than weak."""
    weak_quality, strong_quality = _ends(curve)
    return float(np.trapezoid(pgr(curve.quality, weak_quality, strong_quality), curve.share))


def cpt(curve: Curve, recovered: float) -> float:
    """Call-performance threshold: the strong-call share, in %, at which PGR is ``recovered`` (0 to 1).

    ``numpy.interp`` as RouteLLM calls it, which takes the quality to rise with the share; where a noisy curve
    falls in between, it settles on one of the crossings. NaN where strong is not better than weak.
    """
    weak_quality, strong_quality = _ends(curve)
    if not _gap_is_positive(weak_quality, strong_quality):
        return math.nan
    wanted = recovered * (strong_quality - weak_quality) + weak_quality
    return 100.0 * float(np.interp(wanted, curve.quality, curve.share))


def strong_share_at(curve: Curve, quality: float = QUALITY_BAR) -> float:
    """Least strong-call share with at least ``quality`` times strong's quality; NaN if none has it."""
    _, strong_quality = _ends(curve)
    enough = np.flatnonzero(curve.quality >= quality * strong_quality - ROUNDING)
    return float(curve.share[enough[0]]) if len(enough) else math.nan


def random_strong_share_at(weak: ArrayLike, strong: ArrayLike, quality: float = QUALITY_BAR) -> float:
    """The share that a router without any knowledge needs for ``quality`` times strong's quality.

    Its quality is a straight line between weak's and strong's. 0 where weak alone has that quality; NaN where
    neither has (``quality`` above 1).
    """
    _, weak, strong = _rows(weak, weak, strong)
    weak_quality, strong_quality = float(weak.mean()), float(strong.mean())
    wanted = quality * strong_quality
    if weak_quality >= wanted - ROUNDING:
        return 0.0
    if strong_quality < wanted - ROUNDING:
        return math.nan
    return (wanted - weak_quality) / (strong_quality - weak_quality)


def random_router_scores(n: int, *, runs: int = RANDOM_RUNS, seed: int = 0) -> Floats:
    """Scores of a router that knows nothing, shape (runs, n)."""
    return np.random.default_rng(seed).random((runs, n))


def oracle_scores(weak: ArrayLike, strong: ArrayLike) -> Floats:
    """Scores of a router that knows both qualities beforehand: the gain itself."""
    return np.asarray(strong, dtype=np.float64) - np.asarray(weak, dtype=np.float64)


def apply_threshold(
    score: ArrayLike,
    threshold: float,
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
) -> Outcome:
    """Serve the rows with a threshold picked elsewhere: ``score > threshold`` goes to strong.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
    threshold : float
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request; NaN where unknown.
    """
    score, weak, strong = _rows(score, weak, strong)
    return outcome_of(score > threshold, weak, strong, cost_weak, cost_strong)


def outcome_of(
    to_strong: NDArray[np.bool_],
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
) -> Outcome:
    """What it comes to when the rows of ``to_strong`` (shape (n,)) go to strong and the others to weak."""
    cost = saving = None
    if (costs := known_costs(cost_weak, cost_strong)) is not None:
        known, a, b = costs
        cost = float(np.where(to_strong[known], b, a).mean())
        saving = _saving(cost, float(b.mean()))
    return Outcome(
        n=len(to_strong),
        strong_share=float(to_strong.mean()),
        quality=float(np.where(to_strong, strong, weak).mean()),
        cost=cost,
        cost_saving=saving,
    )


def known_costs(
    cost_weak: ArrayLike | None, cost_strong: ArrayLike | None
) -> tuple[NDArray[np.bool_], Floats, Floats] | None:
    """Which rows have both costs, and these costs; None where no row has."""
    if cost_weak is None or cost_strong is None:
        return None
    a, b = np.asarray(cost_weak, dtype=np.float64), np.asarray(cost_strong, dtype=np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    return (known, a[known], b[known]) if known.any() else None


def running_sum(values: ArrayLike) -> Floats:
    """From 0 to the sum of all, shape (n + 1,)."""
    return np.concatenate(([0.0], np.cumsum(values)))


def evaluate_scores(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    *,
    seed: int = 0,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
) -> MethodFigures:
    """All figures of one method.

    Parameters
    ----------
    score : array_like, shape (n,)
        Higher goes to strong first.
    weak, strong : array_like, shape (n,)
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request; NaN where unknown. Dollars are told over the rows where both are known.
    seed : int
        Orders equal scores and draws the bootstrap's resamples.
    groups : array_like, shape (n,), optional
        The bootstrap draws whole groups: rows of one group are not independent of each other.
    resamples : int
        0 leaves ``apgr_ci`` NaN.

    Raises
    ------
    DatasetError
        There are no rows.
    ValueError
        Shapes differ, or a score or quality is not finite.
    """
    score, weak, strong = _rows(score, weak, strong)
    curve = cost_quality_curve(score, weak, strong, seed=seed)
    full = full_curve(score, weak, strong, cost_weak, cost_strong, seed=seed)
    share = strong_share_at(full)
    saving = None
    if full.cost is not None:
        saving = _saving(float(np.interp(share, full.share, full.cost)), float(full.cost[-1]))
    return MethodFigures(
        n=len(score),
        defined=_gap_is_positive(*_ends(curve)),
        apgr=apgr(curve),
        apgr_ci=_apgr_interval(score, weak, strong, groups, resamples, seed),
        cpt50=cpt(curve, 0.5),
        cpt80=cpt(curve, 0.8),
        strong_share_at_95=share,
        call_saving_at_95=1.0 - share,
        cost_saving_at_95=saving,
    )


def evaluate_random(
    weak: ArrayLike,
    strong: ArrayLike,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    *,
    seed: int = 0,
    groups: ArrayLike | None = None,
    resamples: int = 200,
) -> MethodFigures:
    """The figures of a random router, averaged over ``RANDOM_RUNS`` runs.

    Its saving is the closed form of :func:`random_strong_share_at`: picking the luckiest cut of a random
    order on the evaluated rows would credit it with noise.
    """
    _, weak, strong = _rows(weak, weak, strong)
    if groups is not None:
        groups = _numbered(groups)
    runs = mean_figures(
        [
            evaluate_scores(score, weak, strong, seed=seed, groups=groups, resamples=resamples)
            for score in random_router_scores(len(weak), seed=seed)
        ]
    )
    share = random_strong_share_at(weak, strong)
    saving = None
    if (costs := known_costs(cost_weak, cost_strong)) is not None:
        _, a, b = costs
        saving = _saving((1.0 - share) * float(a.mean()) + share * float(b.mean()), float(b.mean()))
    return dataclasses.replace(
        runs, strong_share_at_95=share, call_saving_at_95=1.0 - share, cost_saving_at_95=saving
    )


def mean_figures(runs: Sequence[MethodFigures]) -> MethodFigures:
    """The mean of each figure over runs on the same rows, with the standard deviation of APGR.

    The interval's bounds are averaged too: they tell the spread of the rows, ``apgr_sd`` that of the runs.
    """
    averaged: dict[str, Any] = {}
    for field in dataclasses.fields(MethodFigures):
        if field.name not in ("n", "defined", "apgr_ci", "apgr_sd"):
            values = [getattr(run, field.name) for run in runs]
            averaged[field.name] = None if None in values else float(np.mean(values))
    low, high = np.mean([run.apgr_ci for run in runs], axis=0)
    return dataclasses.replace(
        runs[0],
        defined=all(run.defined for run in runs),
        apgr_ci=(float(low), float(high)),
        apgr_sd=float(np.std([run.apgr for run in runs], ddof=1)) if len(runs) > 1 else None,
        **averaged,
    )


def draw_resamples(
    n: int, *, groups: ArrayLike | None = None, resamples: int = 1000, seed: int = 0
) -> Counts:
    """How often each bootstrap resample draws each of n rows, shape (resamples, n); whole groups are drawn.

    Drawn once and given to :func:`resampled_apgr` for several methods, they make their differences paired.
    """
    # A group is drawn once on average: 255 times does not happen.
    drawn = np.empty((resamples, n), dtype=np.uint8)
    for i, counts in enumerate(bootstrap_counts(n, groups, resamples, seed)):
        drawn[i] = counts
    return drawn


def resampled_apgr(
    scores: ArrayLike, weak: ArrayLike, strong: ArrayLike, drawn: Counts, *, seed: int = 0
) -> Floats:
    """APGR in each resample, averaged over runs.

    The thresholds are each resample's own deciles: what RouteLLM's evaluation gives on those rows.

    Parameters
    ----------
    scores : array_like, shape (runs, n)
        NaN where a row was not tested in a run.
    weak, strong : array_like, shape (n,)
    drawn : ndarray, shape (resamples, n)
        As :func:`draw_resamples` gives it.
    seed : int
        Orders equal scores; ``seed + r`` in run r.

    Returns
    -------
    ndarray, shape (resamples,)
        NaN where strong is not better than weak.
    """
    gain = oracle_scores(weak, strong)
    total = np.zeros(len(drawn))
    runs = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    for r, score in enumerate(runs):
        tested = np.flatnonzero(~np.isnan(score))
        order = tested[_order(score[tested], seed + r)]
        total += _apgr_of_resamples(gain[order], (counts[order] for counts in drawn), len(drawn))
    return total / len(runs)


def percentile_interval(values: Floats, value: float = math.nan) -> Interval:
    """``value`` with the 95 % interval of its bootstrap ``values``.

    Both ends are NaN where more than 2.5 % of the values are: the gap's own interval reaches zero then, and a ratio to
    it has no bounds.
    """
    undefined = np.isnan(values)
    if not len(values) or undefined.mean() > 0.025:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(values[~undefined], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def gain_interval(
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean gain of strong over weak with its 95 % bootstrap interval.

    Where the interval holds zero, the rows do not show that there is a strong side at all.
    """
    _, weak, strong = _rows(weak, weak, strong)
    gain = strong - weak
    means = [
        float(counts @ gain / counts.sum()) for counts in bootstrap_counts(len(gain), groups, resamples, seed)
    ]
    return percentile_interval(np.array(means), float(gain.mean()))


def expected_calibration_error(
    predicted: ArrayLike, actual: ArrayLike, *, bins: int = RELIABILITY_BINS
) -> float:
    """Mean distance between predicted and actual quality (or gain), over bins of equally many rows.

    Rows are binned in the order of the prediction; each bin's |mean predicted − mean actual| counts by its
    rows (adaptive binning as in Nixon et al. 2019, arXiv 1904.01685).
    """
    predicted, actual, _ = _rows(predicted, actual, actual)
    error = (predicted - actual)[np.argsort(predicted, kind="stable")]
    parts = np.array_split(error, min(bins, len(error)))
    return float(sum(abs(part.sum()) for part in parts) / len(error))


def quality_calibration(predicted: ArrayLike, quality: ArrayLike) -> CalibrationFigures:
    """Calibration of a predicted quality.

    The intervals are Wilson's where labels are 0 or 1, and the normal ones of a mean where they are fractions. The event of the
    AUC is a good answer: a quality q counts q as one and 1 − q as none, as where the curve is fitted.

    Parameters
    ----------
    predicted : array_like, shape (n,)
    quality : array_like, shape (n,)
        0 to 1.

    Raises
    ------
    DatasetError
        There are no rows.
    ValueError
        Shapes differ, or a value is not finite.
    """
    predicted, quality, _ = _rows(predicted, quality, quality)
    binary = bool(((quality == 0.0) | (quality == 1.0)).all())
    return _calibration(predicted, quality, quality, _wilson if binary else partial(_normal, lowest=0.0))


def gain_calibration(predicted: ArrayLike, weak: ArrayLike, strong: ArrayLike) -> CalibrationFigures:
    """Calibration of a predicted gain.

    The intervals are the normal ones of a mean. The event of the AUC is "only strong is right", which is what a strong call is
    paid for, against all the rest; a fractional gain counts as that much of it, a negative one as none.

    Parameters
    ----------
    predicted : array_like, shape (n,)
    weak, strong : array_like, shape (n,)
        Qualities, 0 to 1.

    Raises
    ------
    As :func:`quality_calibration`.
    """
    predicted, weak, strong = _rows(predicted, weak, strong)
    gain = strong - weak
    return _calibration(predicted, gain, np.maximum(gain, 0.0), _normal)


def auc(score: ArrayLike, event: ArrayLike) -> float:
    """Chance that a row with the event scores above one without, equal scores counting half (Mann and Whitney 1947).

    Parameters
    ----------
    score, event : array_like, shape (n,)
        The event from 0 to 1; a fraction is that much of a row with it, and the rest of one without.

    Returns
    -------
    float
        NaN where every row has the event, or none.
    """
    score, event, _ = _rows(score, event, event)
    _, level = np.unique(score, return_inverse=True)
    positive, negative = np.bincount(level, event), np.bincount(level, 1.0 - event)
    pairs = positive.sum() * negative.sum()
    if pairs <= ROUNDING:
        return math.nan
    return float(positive @ (np.cumsum(negative) - negative / 2)) / float(pairs)


def _calibration(
    predicted: Floats, actual: Floats, event: Floats, interval: Callable[[Floats], tuple[float, float]]
) -> CalibrationFigures:
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(RELIABILITY_BINS, len(predicted)))
    # The mean of a normal's distance from its centre is √(2/π) standard deviations.
    noise = [math.sqrt(2 / math.pi * len(part) * float(actual[part].var())) for part in parts]
    return CalibrationFigures(
        n=len(predicted),
        ece=expected_calibration_error(predicted, actual),
        ece_by_chance=sum(noise) / len(predicted),
        brier=float(((predicted - actual) ** 2).mean()),
        base_brier=float(actual.var()),
        auc=auc(predicted, event),
        bins=tuple(
            ReliabilityBin(
                len(part), float(predicted[part].mean()), float(actual[part].mean()), *interval(actual[part])
            )
            for part in parts
        ),
    )


def _wilson(values: Floats) -> tuple[float, float]:
    """Of a share (Wilson 1927): also of use where all rows are alike, unlike the normal one."""
    n, mean = len(values), float(values.mean())
    z2 = _Z**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + z2 / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _normal(values: Floats, lowest: float = -1.0) -> tuple[float, float]:
    """Of a mean of values between ``lowest`` and 1."""
    half = _Z * float(values.std()) / math.sqrt(len(values))
    return max(float(values.mean()) - half, lowest), min(float(values.mean()) + half, 1.0)


def aiq(cost: ArrayLike, quality: ArrayLike) -> float:
    """Average improvement in quality (RouterBench, arXiv 2403.12031).

    The area under the non-decreasing convex hull of the points (cost, quality), divided by the range of cost.

    Parameters
    ----------
    cost, quality : array_like, shape (points,)
        A router at several thresholds, always-weak and always-strong among them.

    Returns
    -------
    float
        On the scale of ``quality``; NaN where all costs are equal.
    """
    cost, quality, _ = _rows(cost, quality, quality)
    width = float(np.ptp(cost))
    if width == 0.0:
        return math.nan
    hull = upper_hull(cost, quality)
    x, y = np.array([*hull, (float(cost.max()), hull[-1][1])]).T
    return float(np.trapezoid(y, x)) / width


def upper_hull(cost: ArrayLike, quality: ArrayLike) -> list[tuple[float, float]]:
    """Corners (cost, quality) of the non-decreasing concave hull over points of the shape (points,), both rising."""
    cost, quality, _ = _rows(cost, quality, quality)
    hull: list[tuple[float, float]] = []
    # By cost, the better first where costs are equal: a point no better than a cheaper one is off the hull.
    for i in np.lexsort((-quality, cost)):
        x, y = float(cost[i]), float(quality[i])
        if hull and y <= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def perf_gain(quality: ArrayLike, single: float) -> float:
    """PerfGain (LLMRouterBench, arXiv 2601.07206): how far a router at its best lies above the best single target.

    Parameters
    ----------
    quality : array_like, shape (points,)
        A router's mean quality at several settings.
    single : float
        Mean quality of the best single target.

    Returns
    -------
    float
        As a share of ``single``; negative where the router never gets there, NaN where ``single`` is 0.
    """
    return float(np.max(quality)) / single - 1.0 if single > 0.0 else math.nan


def cost_save(cost: ArrayLike, quality: ArrayLike, single_cost: float, wanted: float) -> float:
    """CostSave (LLMRouterBench): the largest share of the best single target's dollars saved at its quality.

    Parameters
    ----------
    cost, quality : array_like, shape (points,)
        A router's mean cost and quality at several settings.
    single_cost : float
        Mean cost of the best single target.
    wanted : float
        Its mean quality; a share of it where less is asked.

    Returns
    -------
    float
        NaN where no setting has the quality, or the best single target is free.
    """
    enough = np.asarray(quality, dtype=np.float64) >= wanted - ROUNDING
    if not enough.any() or single_cost <= 0.0:
        return math.nan
    return 1.0 - float(np.asarray(cost, dtype=np.float64)[enough].min()) / single_cost


def _rows(*arrays: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Three arrays of one length as float64."""
    first, second, third = (np.asarray(array, dtype=np.float64) for array in arrays)
    if not first.shape == second.shape == third.shape or first.ndim != 1:
        raise ValueError(
            f"expected three arrays of one length, got {first.shape}, {second.shape}, {third.shape}"
        )
    if not len(first):
        raise DatasetError("there are no rows to measure")
    if not all(np.isfinite(array).all() for array in (first, second, third)):
        raise ValueError("scores and qualities must be finite: leave out rows that lack one")
    return first, second, third


def _order(score: Floats, seed: int) -> NDArray[np.intp]:
    """Rows by falling score, equal scores at random."""
    jitter = np.random.default_rng(seed).random(len(score))
    return np.lexsort((-jitter, -score))


def _bin_counts(n: int) -> NDArray[np.int64]:
    """How many of n rows lie at or above each edge of ``qcut``, rising; edge i has rank i (n − 1) / BINS."""
    # Where the rank is whole the edge is a row and takes it; pandas' rounding may lose that one row.
    edges = np.arange(BINS)
    below = -(-edges * (n - 1) // BINS)  # rounded up, in integers
    return np.concatenate(([0], (n - below)[::-1]))


def _ends(curve: Curve) -> tuple[float, float]:
    """Quality of always-weak and of always-strong."""
    return float(curve.quality[0]), float(curve.quality[-1])


def _gap_is_positive(weak_quality: float, strong_quality: float) -> bool:
    return strong_quality - weak_quality > ROUNDING


def _apgr_interval(
    score: Floats,
    weak: Floats,
    strong: Floats,
    groups: ArrayLike | None,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile interval of APGR over resampled rows or groups."""
    order = _order(score, seed)
    drawn = (counts[order] for counts in bootstrap_counts(len(score), groups, resamples, seed))
    interval = percentile_interval(_apgr_of_resamples((strong - weak)[order], drawn, resamples))
    return (interval.low, interval.high)


def _apgr_of_resamples(gain: Floats, drawn: Iterable[NDArray[Any]], resamples: int) -> Floats:
    """APGR in each resample, shape (resamples,), of rows in the order of their scores; NaN where there is no gap."""
    values = np.full(resamples, np.nan)
    calls_so_far = np.zeros(len(gain) + 1)
    gained_so_far = np.zeros(len(gain) + 1)
    for i, counts in enumerate(drawn):
        # A row drawn m times is m rows of one score: sorting once serves all resamples.
        np.cumsum(counts, out=calls_so_far[1:])
        np.cumsum(counts * gain, out=gained_so_far[1:])
        total = gained_so_far[-1]
        if total > ROUNDING * len(gain):
            n = int(calls_so_far[-1])
            calls = _bin_counts(n)
            values[i] = np.trapezoid(np.interp(calls, calls_so_far, gained_so_far), calls) / n / total
    return values


def bootstrap_counts(n: int, groups: ArrayLike | None, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of n rows is drawn, shape (n,), once a resample; rows of a group are drawn together."""
    random = np.random.default_rng(seed)
    if groups is None:
        for _ in range(resamples):
            yield np.bincount(random.integers(n, size=n), minlength=n).astype(np.float64)
        return
    group = _numbered(groups)
    if group.shape != (n,):
        raise ValueError(f"groups have the shape {group.shape}, expected ({n},)")
    m = int(group.max()) + 1
    for _ in range(resamples):
        drawn = np.bincount(random.integers(m, size=m), minlength=m)
        yield drawn[group].astype(np.float64)


def _numbered(groups: ArrayLike) -> NDArray[np.intp]:
    """Groups as numbers from 0, shape (n,)."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _saving(cost: float, always_strong: float) -> float | None:
    return 1.0 - cost / always_strong if always_strong > 0.0 else None


def _above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether the line from left to right passes at or above the point in the middle."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return rise >= (middle[1] - left[1]) * (right[0] - left[0])


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
