"""Measure routers on labelled rows: cross-validation, and evaluation of a bundle on rows it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from router.errors import DatasetError, UsageError
from router.features import Features
from router.predictor import PARTS, Prediction, Predictor, predict_part, prepare
from training.baselines import BASELINES, minilm_knn, standardised_mean, tfidf_logistic
from training.dataset import Dataset, split_folds
from training.estimator import STACKED, QualityEstimator, source_weights
from training.metrics import (
    QUALITY_BAR,
    Calibration,
    MethodFigures,
    Outcome,
    evaluate_random,
    evaluate_scores,
    gain_calibration,
    mean_figures,
    oracle_scores,
    outcome_of,
    quality_calibration,
)
from training.threshold import for_quality, nested_outcome

Floats = NDArray[np.float64]

# Below this many rows a source gets no table of its own.
MINIMUM_ROWS = 50


@dataclass(frozen=True)
class Report:
    """What methods reach on one set of rows.

    Attributes
    ----------
    n : int
    weak, strong : str
        The targets.
    weak_quality, strong_quality : float
        Mean qualities.
    methods : mapping of str to MethodFigures
        ``learned``, its parts alone, ``random``, ``prompt_length``, ``oracle`` and the baselines.
    calibration : Calibration
        Of the learned gain, and of the quality heads where their predictions were given.
    by_source : mapping of str to Report
        The same for each source, where there are several.
    seen : int
        Rows left out because the bundle was trained on them.
    unfamiliar : float or None
        Share of the rows that the bundle flags as unlike its training rows; None where nothing flags.
    """

    n: int
    weak: str
    strong: str
    weak_quality: float
    strong_quality: float
    methods: Mapping[str, MethodFigures]
    calibration: Calibration
    by_source: Mapping[str, Report] = field(default_factory=dict)
    seen: int = 0
    unfamiliar: float | None = None

    @property
    def calibration_error(self) -> float:
        """Of the learned gain: mean distance between predicted and observed gain over ten bins."""
        return self.calibration.gain.ece

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        return {
            "n": self.n,
            "weak": self.weak,
            "strong": self.strong,
            "weak_quality": self.weak_quality,
            "strong_quality": self.strong_quality,
            "calibration_error": self.calibration_error,
            "calibration": self.calibration.as_dict(),
            "seen": self.seen,
            "unfamiliar": self.unfamiliar,
            "methods": {name: figures.as_dict() for name, figures in self.methods.items()},
            "by_source": {name: report.as_dict() for name, report in self.by_source.items()},
        }


def pair_rows(dataset: Dataset, weak: str, strong: str) -> Dataset:
    """The rows that both targets have a label for, with the targets in this order.

    Raises
    ------
    UsageError
        A target is unknown.
    DatasetError
        No row has both labels.
    """
    pair = dataset.for_targets((weak, strong))
    both = pair.select(~np.isnan(pair.quality).any(axis=1))
    if not len(both):
        raise DatasetError(f"no row has a quality for both {weak} and {strong}")
    return both


def groups_by(dataset: Dataset, by: str) -> NDArray[np.str_]:
    """Group labels by a field: ``group`` (identical prompts), ``domain`` or ``source``, shape (n,)."""
    if by == "group":
        return dataset.groups
    if by not in ("domain", "source"):
        raise UsageError(f"--group-by {by}: expected group, domain or source")
    values = dataset.domains if by == "domain" else dataset.sources
    if not (values != "").all():
        raise UsageError(f"--group-by {by}: {int((values == '').sum())} of {len(values)} rows have no {by}")
    return values


def crossval(
    dataset: Dataset,
    features: Features,
    *,
    folds: int = 5,
    repeats: int = 1,
    groups: ArrayLike | None = None,
    seed: int = 0,
    parts: Sequence[str] = STACKED,
    jobs: int = -1,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Cross-validate the estimator and the baselines on a pair of targets.

    Every choice is made inside the training folds: features' statistics, stacking weights, calibration, and the
    threshold of the nested figures, which for the learned router comes from its inner folds and for a baseline from the
    other outer folds. With ``repeats`` the figures are means over fold seeds ``seed``, ``seed + 1``, …

    Parameters
    ----------
    dataset : Dataset
        As :func:`pair_rows` gives it.
    features : Features of the same rows
    groups : array_like of str, shape (n,), optional
        ``dataset.groups`` by default.
    progress : callable
        Called once a fold: ``folds × repeats`` times.
    """
    labels = dataset.groups if groups is None else np.asarray(groups)
    split = [split_folds(labels, folds, seed + r) for r in range(repeats)]
    tasks = [(r, k) for r in range(repeats) for k in range(folds)]
    results = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_fold)(
            dataset, features, np.flatnonzero(split[r] != k), np.flatnonzero(split[r] == k), parts, seed + r
        )
        for r, k in tasks
    )
    names = ("learned", *parts, "tfidf_logistic", "minilm_knn")
    scores = {name: np.empty((repeats, len(dataset))) for name in names}
    nested = np.empty((repeats, len(dataset)), dtype=bool)
    quality = np.empty((repeats, *dataset.quality.shape))
    for (r, k), (to_strong, heads, found) in zip(tasks, results, strict=True):
        rows = split[r] == k
        nested[r, rows] = to_strong
        quality[r, rows] = heads
        for name in names:
            scores[name][r, rows] = found[name]
        progress()

    def report(rows: NDArray[np.bool_]) -> Report:
        part = dataset.select(rows)
        args, costs, group = _pair(part), _costs(part), part.groups
        methods = _untrained(part, split[0][rows], seed)
        folds_of = [one[rows] for one in split]
        methods["learned"] = mean_figures(
            [
                evaluate_scores(
                    scores["learned"][r, rows], *args, *costs, seed=seed, groups=group
                ).with_nested(outcome_of(nested[r, rows], *args, *costs))
                for r in range(repeats)
            ]
        )
        for name in names[1:]:
            methods[name] = _baseline(part, scores[name][:, rows], folds_of, seed)
        pairs = zip(scores["tfidf_logistic"][:, rows], scores["minilm_knn"][:, rows], strict=True)
        both = np.stack([standardised_mean(a, b) for a, b in pairs])
        methods["average"] = _baseline(part, both, folds_of, seed)
        return _report(part, methods, scores["learned"][0, rows], quality[0, rows])

    everything = np.ones(len(dataset), dtype=bool)
    return _with_sources(report(everything), dataset, report)


def evaluate(predictor: Predictor, dataset: Dataset, features: Features, *, seed: int = 0) -> Report:
    """Evaluate a bundle on a pair's rows; rows that it was trained on are left out and counted.

    The nested figures use the bundle's own threshold. ``unknown_to_strong`` is the learned router under a policy that sends
    flagged rows to strong: its ranking has them first, in no order.

    Raises
    ------
    DatasetError
        The bundle has seen every row.
    """
    fresh = ~predictor.bundle.has_seen(dataset.prompts)
    if not fresh.any():
        raise DatasetError(f"all {len(dataset)} rows were trained on: nothing is left to evaluate on")
    dataset, features = dataset.select(fresh), features.take(np.flatnonzero(fresh))
    prediction = predictor.predict_features(features)
    score, flagged = prediction.score, prediction.unfamiliar
    rankings = {"learned": (score, score > predictor.threshold)}
    if prediction.novelty is not None:
        first = np.where(flagged, score.max() + 1.0, score)
        rankings["unknown_to_strong"] = (first, flagged | (score > predictor.threshold))

    def report(rows: NDArray[np.bool_]) -> Report:
        part = dataset.select(rows)
        args, costs = _pair(part), _costs(part)
        methods = _untrained(part, None, seed)
        for name, (ranking, to_strong) in rankings.items():
            methods[name] = evaluate_scores(
                ranking[rows], *args, *costs, seed=seed, groups=part.groups
            ).with_nested(outcome_of(to_strong[rows], *args, *costs))
        share = None if prediction.novelty is None else float(flagged[rows].mean())
        return replace(_report(part, methods, score[rows], prediction.quality[rows]), unfamiliar=share)

    everything = np.ones(len(dataset), dtype=bool)
    return _with_sources(report(everything), dataset, report, seen=int((~fresh).sum()))


def report_of(dataset: Dataset, score: Floats, quality: Floats | None = None, *, seed: int = 0) -> Report:
    """The figures of given scores, by source: for scores of rows that their estimator was not fitted on.

    Parameters
    ----------
    dataset : Dataset
        As :func:`pair_rows` gives it.
    score : ndarray, shape (n,)
    quality : ndarray, shape (n, 2), optional
        The predicted qualities of the two targets, for their calibration.
    seed : int
    """

    def report(rows: NDArray[np.bool_]) -> Report:
        part = dataset.select(rows)
        methods = _untrained(part, None, seed)
        methods["learned"] = evaluate_scores(
            score[rows], *_pair(part), *_costs(part), seed=seed, groups=part.groups
        )
        return _report(part, methods, score[rows], None if quality is None else quality[rows])

    return _with_sources(report(np.ones(len(dataset), dtype=bool)), dataset, report)


@dataclass(frozen=True)
class Fold:
    """What the estimator, fitted on some rows, says of m others.

    Attributes
    ----------
    prediction : Prediction of m rows
    to_strong : ndarray of bool, shape (m,)
        By the threshold of ``QUALITY_BAR`` that was picked on the fitted rows' inner folds.
    parts : mapping of str to ndarray, shape (m,)
        The score of each part alone.
    """

    prediction: Prediction
    to_strong: NDArray[np.bool_]
    parts: Mapping[str, Floats]


def learned_fold(
    dataset: Dataset,
    features: Features,
    train: NDArray[np.intp],
    test: NDArray[np.intp],
    *,
    parts: Sequence[str] = STACKED,
    seed: int = 0,
) -> Fold:
    """Fit the estimator on the rows ``train`` of a pair's dataset and predict the rows ``test``."""
    inside = dataset.select(train)
    asked = features.take(test)
    with threadpool_limits(limits=1):  # folds run beside one another
        estimator = QualityEstimator(dataset.targets, parts=parts, seed=seed)
        estimator.fit(features.take(train), inside.quality, inside.groups, source_weights(inside.sources))
        chosen = for_quality(estimator.out_of_fold_.score, *_pair(inside), quality=QUALITY_BAR)
        prediction = estimator.predict(asked)
        alone, arrays = {}, prepare(estimator.arrays_)
        for part in parts:
            quality = predict_part(part, asked, arrays)
            alone[part] = quality[:, 1] - quality[:, 0]
    return Fold(prediction, prediction.score > chosen.threshold, alone)


def _fold(
    dataset: Dataset,
    features: Features,
    train: NDArray[np.intp],
    test: NDArray[np.intp],
    parts: Sequence[str],
    seed: int,
) -> tuple[NDArray[np.bool_], Floats, dict[str, Floats]]:
    """Of each test row: whether the nested threshold sends it to strong, its two qualities, and its score by every method."""
    learned = learned_fold(dataset, features, train, test, parts=parts, seed=seed)
    scores = {"learned": learned.prediction.score, **learned.parts}
    rows = (dataset.select(train), dataset.select(test))
    embeddings = (features.embedding[train], features.embedding[test])
    with threadpool_limits(limits=1):
        scores["tfidf_logistic"] = tfidf_logistic(*rows, *embeddings, seed)
        scores["minilm_knn"] = minilm_knn(*rows, *embeddings, seed)
    return learned.to_strong, learned.prediction.quality, scores


def _untrained(part: Dataset, folds: NDArray[Any] | None, seed: int) -> dict[str, MethodFigures]:
    """Random, prompt length and the oracle; with nested figures where folds are given."""
    args, costs = _pair(part), _costs(part)
    empty = np.zeros((len(part), 0))
    length = BASELINES["prompt_length"](part, part, empty, empty, seed)
    split = [] if folds is None else [folds]
    return {
        "random": evaluate_random(*args, *costs, seed=seed, groups=part.groups),
        "prompt_length": _baseline(part, length[None], split, seed),
        "oracle": evaluate_scores(oracle_scores(*args), *args, *costs, seed=seed, groups=part.groups),
    }


def _baseline(part: Dataset, scores: Floats, split: Sequence[NDArray[Any]], seed: int) -> MethodFigures:
    """Mean figures over the runs of ``scores``, shape (runs, n)."""
    args, costs = _pair(part), _costs(part)
    runs = []
    for r, score in enumerate(scores):
        figures = evaluate_scores(score, *args, *costs, seed=seed, groups=part.groups)
        if split and len(np.unique(split[r])) > 1:
            figures = figures.with_nested(_nested(score, part, split[r]))
        runs.append(figures)
    return mean_figures(runs)


def _nested(score: Floats, part: Dataset, folds: NDArray[Any]) -> Outcome:
    return nested_outcome(score, *_pair(part), folds, *_costs(part))


def _report(
    part: Dataset, methods: dict[str, MethodFigures], learned: Floats, quality: Floats | None
) -> Report:
    weak, strong = _pair(part)
    heads = (
        {}
        if quality is None
        else {
            target: quality_calibration(quality[:, t], part.quality[:, t])
            for t, target in enumerate(part.targets)
        }
    )
    order = (
        "learned",
        "unknown_to_strong",
        *PARTS,
        "average",
        "tfidf_logistic",
        "minilm_knn",
        "prompt_length",
        "random",
        "oracle",
    )
    return Report(
        n=len(part),
        weak=part.targets[0],
        strong=part.targets[1],
        weak_quality=float(weak.mean()),
        strong_quality=float(strong.mean()),
        methods={name: methods[name] for name in order if name in methods},
        calibration=Calibration(heads, gain_calibration(learned, weak, strong)),
    )


def _with_sources(
    whole: Report, dataset: Dataset, report: Callable[[NDArray[np.bool_]], Report], seen: int = 0
) -> Report:
    names, counts = np.unique(dataset.sources, return_counts=True)
    kept = [str(name) for name, count in zip(names, counts, strict=True) if count >= MINIMUM_ROWS]
    by_source = {name: report(dataset.sources == name) for name in kept} if len(names) > 1 else {}
    return replace(whole, by_source=by_source, seen=seen)


def _pair(part: Dataset) -> tuple[Floats, Floats]:
    return part.quality[:, 0], part.quality[:, 1]


def _costs(part: Dataset) -> tuple[Floats, Floats]:
    return part.cost[:, 0], part.cost[:, 1]
