"""How often prompts are flagged as unlike the training prompts: of the same kind, of others, and what acting on it costs.

Rows of the same kind are measured by arrays and cuts that had not seen them: every fold by a fit on the others, whose own cuts
come from inner folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router.features import Features
from router.predictor import Arrays, novelty, predict, prepare
from training.dataset import Dataset, split_folds
from training.estimator import STACKED, fit_idf, fit_projection
from training.metrics import auc, evaluate_scores, outcome_of, random_strong_share_at
from training.novelty import fit_novelty

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]

FOLDS = 5


@dataclass(frozen=True)
class Flagged:
    """How one kind of rows is seen.

    Attributes
    ----------
    rows : str
        Which.
    n : int
    familiar : bool
        Whether rows of this kind were trained on (not these rows themselves).
    flagged : float
        Share that is flagged.
    auc : float or None
        Chance that such a row is more novel than a held-out row of the training kind; None for these themselves.
    """

    rows: str
    n: int
    familiar: bool
    flagged: float
    auc: float | None


@dataclass(frozen=True)
class Served:
    """What a threshold does on some rows: see :class:`training.metrics.Outcome` and :class:`training.metrics.MethodFigures`.

    Attributes
    ----------
    random_share : float or None
        Strong calls that a router without knowledge needs for the same quality; None where always-strong has less.
    apgr : float or None
    """

    strong_share: float
    quality: float
    random_share: float | None
    apgr: float | None


@dataclass(frozen=True)
class Routed:
    """Rows of another kind routed at the bundle's own threshold: as they are scored, and with flagged rows sent to strong."""

    rows: str
    n: int
    weak_quality: float
    strong_quality: float
    threshold: float
    plain: Served
    flagged_to_strong: Served


@dataclass(frozen=True)
class NoveltyStudy:
    """What is flagged by one bundle.

    Attributes
    ----------
    n : int
        Rows it was trained on.
    lines : tuple of Flagged
    routed : tuple of Routed
    """

    n: int
    lines: tuple[Flagged, ...]
    routed: tuple[Routed, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def novelty_study(
    dataset: Dataset,
    features: Features,
    groups: NDArray[Any],
    arrays: Arrays,
    threshold: float,
    *,
    others: Mapping[str, Features],
    parts: Mapping[str, Mask] | None = None,
    by_domain: bool = False,
    routed: Mapping[str, tuple[Dataset, Features]] | None = None,
    seed: int = 0,
    jobs: int = -1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NoveltyStudy:
    """Measure what a bundle flags.

    Parameters
    ----------
    dataset : Dataset
        What it was trained on, n rows.
    features : Features of the same rows
    groups : ndarray, shape (n,)
        Rows of one group stay on one side.
    arrays : mapping
        Those of the estimator fitted on these rows.
    threshold : float
        The bundle's own.
    others : mapping of str to Features
        Rows of other kinds.
    parts : mapping of str to ndarray of bool, shape (n,), optional
        Rows among the trained ones that are told apart.
    by_domain : bool
        Whether to hold out whole domains too.
    routed : mapping of str to (Dataset, Features), optional
        Rows of other kinds with the labels of the same pair of targets.
    progress : callable
        Called with folds done, and of how many.
    """
    splits = [split_folds(groups, FOLDS, seed)]
    if by_domain:
        splits.append(split_folds(dataset.domains, FOLDS, seed))
    todo = [(s, k) for s, split in enumerate(splits) for k in np.unique(split)]
    results = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_held_out)(features, dataset.sources, groups, splits[s] == k, seed) for s, k in todo
    )
    held_out = np.full((len(splits), len(features)), np.nan)
    progress(0, len(todo))
    for done, ((s, k), found) in enumerate(zip(todo, results, strict=True), start=1):
        held_out[s, splits[s] == k] = found
        progress(done, len(todo))
    known = held_out[0]

    def line(rows: str, values: Floats, familiar: bool) -> Flagged:
        event = np.repeat([0.0, 1.0], [len(known), len(values)])
        above = None if familiar else auc(np.concatenate([known, values]), event)
        return Flagged(rows, len(values), familiar, float((values > 1.0).mean()), above)

    with threadpool_limits(limits=1):
        measures, _ = fit_novelty(features, dataset.sources, groups, prepare(arrays), seed=seed)
    served = prepare({**arrays, **measures})
    lines = [line("all, held out", known, True)]
    sources = np.unique(dataset.sources)
    kinds = {str(source): dataset.sources == source for source in sources} if len(sources) > 1 else {}
    lines += [
        line(f"{name}, held out", known[rows], True) for name, rows in {**kinds, **(parts or {})}.items()
    ]
    if by_domain:
        lines.append(line("whole subjects held out", held_out[1], False))
    lines += [line(name, novelty(rows, served), False) for name, rows in others.items()]
    return NoveltyStudy(
        n=len(dataset),
        lines=tuple(lines),
        routed=tuple(_routed(name, *rows, served, threshold, seed) for name, rows in (routed or {}).items()),
    )


def _held_out(
    features: Features, sources: NDArray[Any], groups: NDArray[Any], test: Mask, seed: int
) -> Floats:
    """Novelty of the test rows as a bundle of the others sees them, shape (test rows,)."""
    inside = np.flatnonzero(~np.isin(groups, groups[test]))
    rows = features.take(inside)
    with threadpool_limits(limits=1):  # folds run beside one another
        arrays = prepare({**fit_projection(rows), "words.idf": fit_idf(rows)})
        measures, _ = fit_novelty(rows, sources[inside], groups[inside], arrays, seed=seed)
        return novelty(features.take(np.flatnonzero(test)), prepare({**arrays, **measures}))


def _routed(
    name: str, dataset: Dataset, features: Features, arrays: Arrays, threshold: float, seed: int
) -> Routed:
    weak, strong = dataset.quality.T
    prediction = predict(features, arrays, dataset.targets, STACKED)
    score, flagged = prediction.score, prediction.unfamiliar

    def served(ranking: Floats, to_strong: Mask) -> Served:
        outcome = outcome_of(to_strong, weak, strong)
        chance = random_strong_share_at(weak, strong, outcome.quality / max(float(strong.mean()), 1e-12))
        figures = evaluate_scores(ranking, weak, strong, seed=seed, resamples=0)
        return Served(outcome.strong_share, outcome.quality, _known(chance), _known(figures.apgr))

    return Routed(
        rows=name,
        n=len(dataset),
        weak_quality=float(weak.mean()),
        strong_quality=float(strong.mean()),
        threshold=threshold,
        plain=served(score, score > threshold),
        # Among themselves flagged rows have no order.
        flagged_to_strong=served(np.where(flagged, score.max() + 1.0, score), flagged | (score > threshold)),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
