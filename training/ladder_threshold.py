"""Choose the threshold of a bundle with more than two targets, as training.threshold does for a pair."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from router.bundle import CostQualityCurve, Threshold
from router.errors import DatasetError, UsageError
from router.features import Features
from router.predictor import Prediction, Predictor
from training.dataset import Dataset
from training.guarantee import guaranteed_ladder_threshold
from training.ladder import unseen
from training.metrics import QUALITY_BAR, ROUNDING
from training.sweep import Singles, Sweep, chosen_setting, shares, threshold_sweep
from training.threshold import CURVE_POINTS, rounded

# Thresholds that are tried.
SETTINGS = 1000


@dataclass(frozen=True)
class LadderThreshold:
    """A threshold, why it was chosen, and what it does on the rows that it was chosen on.

    Attributes
    ----------
    threshold : float
        The cheapest target whose gain is within it of the best is taken.
    goal : {"quality", "max_cost"}
    value : float
        What was asked: a share of the best single target's quality, or US dollars per 1,000 requests.
    how : str
        The same in words.
    n : int
    shares : mapping of str to float
        Share of calls to each target.
    quality : float
        Expected mean quality.
    cost : float or None
        Expected US dollars a request, over the rows whose costs are known; None where no row's are.
    best_single : str
        The target of the best mean quality.
    best_single_quality : float
    best_single_cost : float or None
    seen, incomplete : int
        Rows left out: the bundle was trained on them; they lack the label of a target.
    """

    threshold: float
    goal: Literal["quality", "max_cost"]
    value: float
    how: str
    n: int
    shares: dict[str, float]
    quality: float
    cost: float | None
    best_single: str
    best_single_quality: float
    best_single_cost: float | None
    seen: int = 0
    incomplete: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self)

    def for_manifest(self, rows: str) -> Threshold:
        """As the manifest records it; ``rows`` says which they were."""
        single = self.best_single_quality
        return Threshold(
            value=self.threshold,
            how=f"{self.how} ({rows})",
            rows=self.n,
            quality_ratio=self.quality / single if single else None,
        )


def ladder_for_quality(
    prediction: Prediction, singles: Singles, quality: float = QUALITY_BAR
) -> LadderThreshold:
    """The cheapest threshold with at least ``quality`` times the best single target's mean quality.

    Without costs the highest such threshold is taken, which asks the cheaper targets.

    Parameters
    ----------
    prediction : Prediction
        Of n rows that the bundle was not trained on.
    singles : Singles
        Of the same rows.
    quality : float
        Above 0. May exceed 1 where targets complement each other.

    Raises
    ------
    UsageError
        ``quality`` is not a positive number, or no threshold reaches it.
    """
    if not (math.isfinite(quality) and quality > 0.0):
        raise UsageError(f"quality {quality}: expected a share of the best target's quality, such as 0.95")
    sweep = threshold_sweep(prediction, SETTINGS)
    reached = sweep.taken(singles.quality).mean(axis=1)
    single = float(singles.quality[:, singles.best].mean())
    setting = chosen_setting(reached, quality * single, singles.mean_of(sweep))
    n = len(singles.quality)
    if setting is None:
        name = prediction.targets[singles.best]
        raise UsageError(
            f"quality {quality:g} × {single:.4f} of {name}, the best single target, cannot be reached on these {n} rows: "
            f"the best is {reached.max() / single if single else 0:.3f} × ({reached.max():.4f})"
        )
    how = f"cheapest with mean quality ≥ {quality:g} × the best single target's, on {n} rows"
    return described(float(sweep.settings[setting]), prediction, singles, "quality", quality, how)


def ladder_for_max_cost(prediction: Prediction, singles: Singles, usd_per_1k: float) -> LadderThreshold:
    """The threshold of the best mean quality that costs at most ``usd_per_1k`` per 1,000 requests.

    Rows without all costs are left out. Of equally good thresholds the cheapest is taken.

    Raises
    ------
    UsageError
        No row has costs, or every threshold costs more.
    """
    if not (math.isfinite(usd_per_1k) and usd_per_1k >= 0.0):
        raise UsageError(f"maximum cost {usd_per_1k}: expected US dollars per 1,000 requests")
    priced = singles.priced
    if not priced.any():
        raise UsageError("a maximum cost needs the costs of all targets, and no row has them: give prices")
    prediction = prediction.take(priced)
    singles = singles.select(priced)
    sweep = threshold_sweep(prediction, SETTINGS)
    cost = singles.mean_of(sweep)
    assert cost is not None
    affordable = 1000.0 * cost <= usd_per_1k + ROUNDING
    n = len(singles.quality)
    if not affordable.any():
        raise UsageError(
            f"maximum cost {usd_per_1k:g} USD per 1,000 requests cannot be reached on these {n} rows: "
            f"the least is {1000 * cost.min():.4g}"
        )
    reached = np.where(affordable, sweep.taken(singles.quality).mean(axis=1), -np.inf)
    setting = chosen_setting(reached, float(reached.max()), cost)
    assert setting is not None
    how = f"best mean quality at ≤ {usd_per_1k:g} USD per 1,000 requests, on {n} rows"
    return described(float(sweep.settings[setting]), prediction, singles, "max_cost", usd_per_1k, how)


def described(
    threshold: float,
    prediction: Prediction,
    singles: Singles,
    goal: Literal["quality", "max_cost"],
    value: float,
    how: str,
) -> LadderThreshold:
    """What a threshold does on these rows."""
    choice = prediction.choose(threshold)
    one = Sweep(np.array([threshold]), choice[None])
    cost, means = singles.mean_of(one), singles.mean_cost
    return LadderThreshold(
        threshold=threshold,
        goal=goal,
        value=value,
        how=how,
        n=len(choice),
        shares=dict(zip(prediction.targets, shares(choice, len(prediction.targets)), strict=True)),
        quality=float(one.taken(singles.quality).mean()),
        cost=None if cost is None else float(cost[0]),
        best_single=prediction.targets[singles.best],
        best_single_quality=float(singles.quality[:, singles.best].mean()),
        best_single_cost=None if means is None else float(means[singles.best]),
    )


def curve_of_ladder(prediction: Prediction, singles: Singles) -> CostQualityCurve | None:
    """What thresholds cost, beside the dearest target alone, and give; None where no row has every cost.

    Parameters are those of :func:`ladder_for_quality`; rows without every cost are left out.
    """
    rows = np.flatnonzero(singles.priced)
    if not len(rows):
        return None
    priced = singles.select(singles.priced)
    sweep = threshold_sweep(prediction.take(rows), CURVE_POINTS)
    alone, cost = priced.mean_cost, priced.mean_of(sweep)
    assert alone is not None
    assert cost is not None
    dearest = float(alone.max())
    if not dearest:
        return None
    quality = sweep.taken(priced.quality).mean(axis=1)
    return CostQualityCurve(
        axis="relative_cost",
        rows=len(rows),
        thresholds=tuple(sweep.settings[::-1].tolist()),
        spend=rounded(cost[::-1] / dearest),
        quality=rounded(quality[::-1]),
        alone={
            name: (round(float(spent) / dearest, 6), round(float(reached), 6))
            for name, spent, reached in zip(
                prediction.targets, alone, priced.quality.mean(axis=0), strict=True
            )
        },
    )


def tune_targets(
    predictor: Predictor,
    dataset: Dataset,
    features: Features,
    *,
    quality: float | None = None,
    confidence: float | None = None,
    max_cost: float | None = None,
) -> LadderThreshold:
    """Choose the threshold of a bundle with any number of targets, on rows with every label that it was not trained on.

    Parameters
    ----------
    quality : float, optional
        Least share of the best single target's mean quality.
    confidence : float, optional
        With ``quality``: how sure that share must be on new rows (:mod:`training.guarantee`). Of rows that share a group
        one is used, since the others tell nothing independent of it.
    max_cost : float, optional
        US dollars per 1,000 requests.

    Raises
    ------
    UsageError
        The goal cannot be reached, or none is given.
    DatasetError
        No row is left, or the rows are too few for a promise.
    """
    rows, prediction, incomplete, seen = unseen(predictor, dataset, features)
    if confidence is not None:
        one = np.sort(np.unique(rows.groups, return_index=True)[1])
        rows = rows.select(one)
        prediction = prediction.take(one)
    singles = Singles.of(rows)
    if quality is not None and confidence is not None:
        promise = guaranteed_ladder_threshold(prediction, rows.quality, share=quality, confidence=confidence)
        if promise.threshold is None:
            raise DatasetError(f"{promise.words}; give more rows, or ask for less quality or confidence")
        chosen = described(promise.threshold, prediction, singles, "quality", quality, promise.words)
    elif quality is not None:
        chosen = ladder_for_quality(prediction, singles, quality)
    elif max_cost is not None:
        chosen = ladder_for_max_cost(prediction, singles, max_cost)
    else:
        raise UsageError("a goal is needed: quality or max_cost")
    return dataclasses.replace(chosen, seen=seen, incomplete=incomplete)
