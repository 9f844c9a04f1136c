"""Routers over several targets, swept over their setting, and measured in quality and dollars.

Such a router expects a quality of each target for each prompt, and has one setting that trades quality for dollars. There are
two rules:

- *threshold*: the cheapest target whose expected gain is within a threshold of the best (:meth:`Prediction.choose`);
- *value*: the target of the highest expected quality − λ · cost (:meth:`Prediction.choose_by_value`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.predictor import Prediction, choose_by_value
from training.dataset import Dataset
from training.metrics import QUALITY_BAR, ROUNDING, aiq, bootstrap_counts, cost_save, perf_gain, upper_hull

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]

# Settings that a router is swept over; more change no figure's third digit.
SETTINGS = 200
RESAMPLES = 200


@dataclass(frozen=True)
class Sweep:
    """A router's choices for n rows at K settings, from the dearest setting to the cheapest.

    Attributes
    ----------
    settings : ndarray, shape (K,)
        Rising thresholds, or rising λ in quality per US dollar; NaN for a router without a setting.
    choice : ndarray, shape (K, n)
        Indices of targets.
    """

    settings: Floats
    choice: Choices

    def select(self, rows: NDArray[np.bool_]) -> Sweep:
        """The same settings on some of the rows."""
        return Sweep(self.settings, self.choice[:, rows])

    def taken(self, values: Floats) -> Floats:
        """Shape (K, n): of values a target, shape (n, T), those of the chosen targets."""
        taken: Floats = values[np.arange(len(values)), self.choice]
        return taken


def threshold_sweep(prediction: Prediction, settings: int = SETTINGS) -> Sweep:
    """Sweep the threshold, from "the best other target always" to "the cheapest always".

    The thresholds stand between the values at which a row changes its target, at equal numbers of changes.
    """
    changes = np.hstack([prediction.score[:, None], prediction.score[:, None] - prediction.gain[:, 1:]])
    steps = np.unique(changes)
    between = (steps[1:] + steps[:-1]) / 2
    inner = _thinned(between, settings - 2)
    # A gain lies between −1 and 1, so the ends hold on rows not yet seen too.
    ends = min(-1.0, float(steps[0]) - 1e-9), max(1.0, float(steps[-1]))
    thresholds = np.concatenate(([ends[0]], inner, [ends[1]]))
    return Sweep(thresholds, np.stack([prediction.choose(float(threshold)) for threshold in thresholds]))


def value_sweep(expected: Floats, cost: Floats, settings: int = SETTINGS) -> Sweep:
    """Sweep λ, from 0 (the best target, whatever it costs) to the cheapest always.

    Parameters
    ----------
    expected, cost : ndarray, shape (n, T)
        Expected quality and US dollars.
    """
    rows = np.arange(len(expected))
    best = choose_by_value(expected, cost, 0.0)
    # The λ at which a cheaper target is as good a buy as the best one, and the λ from which none beats the cheapest.
    lost, saved = expected[rows, best][:, None] - expected, cost[rows, best][:, None] - cost
    changes = np.unique(lost[saved > 0] / saved[saved > 0])
    cheapest = cost.argmin(axis=1)
    more, dearer = expected - expected[rows, cheapest][:, None], cost - cost[rows, cheapest][:, None]
    end = float((more[dearer > 0] / dearer[dearer > 0]).max(initial=0.0))
    inner = _thinned((changes[1:] + changes[:-1]) / 2, settings - 2)
    lams = np.concatenate(([0.0], inner[inner < end], [1.01 * end + 1.0]))
    return Sweep(lams, np.stack([choose_by_value(expected, cost, float(lam)) for lam in lams]))


def _thinned(values: Floats, most: int) -> Floats:
    """At most so many of some sorted values, evenly spaced in rank."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).round().astype(np.int64)]


@dataclass(frozen=True)
class LadderFigures:
    """The figures of one router on one set of rows; dollars are told over the rows whose costs are all known.

    Attributes
    ----------
    aiq : float or None
        Average improvement in quality (RouterBench), over the range from the cheapest to the dearest single target, the
        cheapest target being a point of every router. None where costs are unknown, as for all dollars.
    aiq_ci : tuple of float, or None
        95 % bootstrap interval.
    perf_gain : float
        PerfGain (LLMRouterBench): quality at the best setting over the best single target's, less 1.
    cost_save : float or None
        CostSave (LLMRouterBench): the best single target's dollars saved at its quality; None also where no setting has it.
    quality, cost : float, float or None
        Mean quality and US dollars a request at the setting of the best quality.
    cost_saving_at_95 : float or None
        The best single target's dollars saved at 95 % of its quality.
    setting_at_95 : float or None
        The threshold or λ there; None where no setting has that quality, as for the shares.
    shares_at_95 : tuple of float, or None
        Share of calls to each target there.
    nested_quality, nested_cost_saving : float or None
        Quality and saving with that setting picked on other rows, where that was measured: what a user gets.
    hull : tuple of (float, float), or None
        (cost, quality) at the corners of the concave hull of all settings, both rising: what mixing settings reaches.

    ``perf_gain``, ``cost_save`` and ``cost_saving_at_95`` pick the setting on the rows they are told for, as papers do.
    """

    aiq: float | None
    aiq_ci: tuple[float, float] | None
    perf_gain: float
    cost_save: float | None
    quality: float
    cost: float | None
    cost_saving_at_95: float | None
    setting_at_95: float | None
    shares_at_95: tuple[float, ...] | None
    nested_quality: float | None = None
    nested_cost_saving: float | None = None
    hull: tuple[tuple[float, float], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None stands for it."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class Singles:
    """The targets alone, on the rows that a router is measured on.

    Attributes
    ----------
    quality : ndarray, shape (n, T)
        Complete.
    cost : ndarray, shape (n, T)
        US dollars; zeros in the rows that are not priced.
    priced : ndarray of bool, shape (n,)
        Rows whose costs are all known.
    """

    quality: Floats
    cost: Floats
    priced: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Dataset) -> Singles:
        """Of rows with every label."""
        priced: NDArray[np.bool_] = np.all(np.isfinite(rows.cost), axis=1)
        return cls(rows.quality, np.where(priced[:, None], rows.cost, 0.0), priced)

    @property
    def mean_cost(self) -> Floats | None:
        """Shape (T,)."""
        means: Floats | None = self.cost[self.priced].mean(axis=0) if self.priced.any() else None
        return means

    def mean_of(self, sweep: Sweep) -> Floats | None:
        """Mean US dollars a request at each setting, shape (K,)."""
        if not self.priced.any():
            return None
        means: Floats = sweep.taken(self.cost)[:, self.priced].mean(axis=1)
        return means

    @property
    def best(self) -> int:
        """The target of the best mean quality; of equals the cheapest."""
        means = self.quality.mean(axis=0)
        return int(np.flatnonzero(means >= means.max() - ROUNDING)[0])

    def select(self, rows: NDArray[np.bool_]) -> Singles:
        return Singles(self.quality[rows], self.cost[rows], self.priced[rows])


def sweep_figures(
    sweep: Sweep, singles: Singles, *, groups: ArrayLike | None = None, seed: int = 0
) -> LadderFigures:
    """All figures of one router on n complete rows.

    Parameters
    ----------
    sweep : Sweep
        Of the same rows.
    singles : Singles
    groups : array_like, shape (n,), optional
        The bootstrap draws whole groups.
    """
    by_row = sweep.taken(singles.quality)
    quality = by_row.mean(axis=1)
    single = float(singles.quality.mean(axis=0)[singles.best])
    cost = saved = interval = area = None
    if (means := singles.mean_cost) is not None:
        cost, single_cost = singles.mean_of(sweep), float(means[singles.best])
        assert cost is not None
        saved = _known(cost_save(cost, quality, single_cost, single))
        area = _known(_area(cost, quality, means, singles.quality.mean(axis=0)))
        if area is not None:
            interval = _area_interval(sweep, by_row, singles, groups, seed)
    best = _cheapest_of(quality >= quality.max() - ROUNDING, cost)
    bar = chosen_setting(quality, QUALITY_BAR * single, cost)
    return LadderFigures(
        aiq=area,
        aiq_ci=interval,
        perf_gain=perf_gain(quality, single),
        cost_save=saved,
        quality=float(quality[best]),
        cost=None if cost is None else float(cost[best]),
        cost_saving_at_95=None
        if cost is None or bar is None
        else _known(cost_save(cost, quality, single_cost, QUALITY_BAR * single)),
        setting_at_95=None if bar is None else float(sweep.settings[bar]),
        shares_at_95=None if bar is None else shares(sweep.choice[bar], singles.quality.shape[1]),
        hull=None if cost is None else tuple(upper_hull(cost, quality)),
    )


def chosen_setting(quality: Floats, wanted: float, cost: Floats | None) -> int | None:
    """The cheapest setting with the quality that is wanted; None where there is none.

    Parameters
    ----------
    quality : ndarray, shape (K,)
        Mean quality at each setting.
    cost : ndarray, shape (K,), or None
        Without costs the last setting counts as the cheapest.
    """
    enough = quality >= wanted - ROUNDING
    return _cheapest_of(enough, cost) if enough.any() else None


def shares(choice: Choices, targets: int) -> tuple[float, ...]:
    """Share of calls to each target."""
    return tuple(float(share) for share in np.bincount(choice, minlength=targets) / len(choice))


def _cheapest_of(settings: NDArray[np.bool_], cost: Floats | None) -> int:
    index = np.flatnonzero(settings)
    if cost is None:
        return int(index[-1])
    # Of equals the last setting, which uses cheaper targets.
    return int(index[::-1][cost[index[::-1]].argmin()])


def _area(cost: Floats, quality: Floats, single_cost: Floats, single_quality: Floats) -> float:
    """AIQ over the range of the single targets' costs.

    What a router spends beyond it does not count; what costs less than the cheapest target counts as if it cost as much.
    """
    cheapest, dearest = int(single_cost.argmin()), float(single_cost.max())
    x = np.concatenate(([single_cost[cheapest]], np.maximum(cost, single_cost[cheapest])))
    y = np.concatenate(([single_quality[cheapest]], quality))
    # The dearest target alone is inside, however its mean was rounded.
    inside = x <= dearest * (1 + 1e-9)
    x = np.minimum(x, dearest)
    # Past its dearest setting a router stays as good as it is.
    level = float(y[inside].max())
    return aiq(np.append(x[inside], dearest), np.append(y[inside], level))


def _area_interval(
    sweep: Sweep, by_row: Floats, singles: Singles, groups: ArrayLike | None, seed: int
) -> tuple[float, float] | None:
    spent, priced = sweep.taken(singles.cost), singles.priced
    areas = []
    for count in bootstrap_counts(len(priced), groups, RESAMPLES, seed):
        weight, paid = count / count.sum(), count * priced
        if not paid.any():
            continue
        paid = paid / paid.sum()
        areas.append(_area(spent @ paid, by_row @ weight, paid @ singles.cost, weight @ singles.quality))
    # Of few rows a draw may hold only such as cost the same at every target.
    areas = [area for area in areas if not math.isnan(area)]
    if not areas:
        return None
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
