"""More than two targets: routers cross-validated, and bundles evaluated.

**Rows without every label.** A row is trained on with the labels it has. It is measured on only where every target has a
label: were a row measured whenever the *chosen* target has one, each router would be measured on other rows, which its own
choices pick. The rows left out are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from router.errors import DatasetError
from router.features import Features
from router.predictor import Prediction, Predictor, unit_rows
from training.baselines import CLUSTERS, NEAREST_CLUSTERS, nearest_rows
from training.dataset import Dataset, split_folds
from training.estimator import STACKED, QualityEstimator, source_weights
from training.metrics import QUALITY_BAR
from training.sweep import (
    LadderFigures,
    Singles,
    Sweep,
    chosen_setting,
    sweep_figures,
    threshold_sweep,
    value_sweep,
)

Floats = NDArray[np.float64]
Choices = NDArray[np.intp]
Embeddings = NDArray[np.floating[Any]]

# Below this many rows a source gets no table of its own.
MINIMUM_ROWS = 50


@dataclass(frozen=True)
class LadderReport:
    """What routers over several targets reach on one set of rows.

    Attributes
    ----------
    n : int
    incomplete : int
        Rows left out because a target has no label for them.
    targets : tuple of str
    mean_quality : tuple of float
        Of each target.
    mean_cost : tuple of float, or None
        US dollars a request; None where unknown.
    best_single : str
        The target of the best mean quality on these rows; of equals the cheapest.
    methods : mapping of str to LadderFigures
        ``learned`` (rule: threshold), ``learned_value`` (rule: value), the baselines, ``pair`` (the router between two),
        ``best_single``, ``zero`` (the best random mix of single targets, RouterBench's zero router: what is saved without
        looking at a prompt), ``random`` (every target alike) and ``oracle`` (the cheapest best target of each row).
    by_source : mapping of str to LadderReport
        The same for each source; for each domain where there is one source.
    seen : int
        Rows left out because the bundle was trained on them.
    """

    n: int
    incomplete: int
    targets: tuple[str, ...]
    mean_quality: tuple[float, ...]
    mean_cost: tuple[float, ...] | None
    best_single: str
    methods: Mapping[str, LadderFigures]
    by_source: Mapping[str, LadderReport] = field(default_factory=dict)
    seen: int = 0

    def random_saving(self, quality: float) -> float | None:
        """Share of the best single target's dollars that the best random mix of targets saves at a mean quality."""
        if self.mean_cost is None:
            return None
        return _mixed_saving(
            self.methods["zero"], self.mean_cost[self.targets.index(self.best_single)], quality
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **fields,
            "methods": {name: figures.as_dict() for name, figures in self.methods.items()},
            "by_source": {name: report.as_dict() for name, report in self.by_source.items()},
        }


def complete(dataset: Dataset) -> NDArray[np.bool_]:
    """Shape (n,): which rows have a label for every target.

    Raises
    ------
    DatasetError
        None has.
    """
    rows: NDArray[np.bool_] = np.all(~np.isnan(dataset.quality), axis=1)
    if not rows.any():
        raise DatasetError(f"no row has a quality for all of {', '.join(dataset.targets)}")
    return rows


# --- Routers ---------------------------------------------------------------------------------------------------------


def nearest_neighbours(train: Dataset, seen: Embeddings, asked: Embeddings) -> Floats:
    """kNN: each target's mean quality over the training prompts nearest by cosine, shape (m, T).

    Parameters
    ----------
    train : Dataset
        n rows; a missing label is left out of the mean.
    seen, asked : ndarray, shape (n, d) and (m, d)
        Embeddings of the training prompts and of those asked for.
    """
    found = np.empty((len(asked), len(train.targets)))
    for rows, nearest in nearest_rows(seen, asked):
        found[rows] = _means(train.quality[nearest], np.nanmean(train.quality, axis=0))
    return found


def cluster_means(
    train: Dataset, seen: Embeddings, asked: Embeddings, cost: Floats, seed: int
) -> tuple[Floats, Floats]:
    """Quality and cost by k-means clusters, in the manner of Avengers-Pro (arXiv 2508.12631).

    In each cluster the targets' mean qualities and mean costs are scaled to 0 to 1; a prompt gets the mean of its nearest
    clusters. Avengers-Pro then takes the best α · quality + (1 − α) · (1 − cost), which is the rule *value* with
    λ = (1 − α) / α on these scales.

    Parameters
    ----------
    train : Dataset
        n rows.
    seen, asked : ndarray, shape (n, d) and (m, d)
    cost : ndarray, shape (T,)
        Where a cluster has no costs.

    Returns
    -------
    tuple of ndarray, shape (m, T)
        Scaled quality and scaled cost.
    """
    from sklearn.cluster import KMeans

    seen, asked = unit_rows(seen), unit_rows(asked)
    model = KMeans(min(CLUSTERS, len(seen)), n_init=4, random_state=seed).fit(seen)
    members = [model.labels_ == cluster for cluster in range(model.n_clusters)]
    overall = np.nanmean(train.quality, axis=0)
    quality = np.stack([_means(train.quality[rows][None], overall)[0] for rows in members])
    spent = np.stack([_means(train.cost[rows][None], cost)[0] for rows in members])
    distance = model.transform(asked)
    nearest = np.argsort(distance, axis=1)[:, : min(NEAREST_CLUSTERS, model.n_clusters)]
    return _scaled(quality)[nearest].mean(axis=1), _scaled(spent)[nearest].mean(axis=1)


def _means(values: Floats, otherwise: Floats) -> Floats:
    """Mean over the second axis, shape (m, k, T) → (m, T), of what is known; ``otherwise``, shape (T,), where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    means: Floats = np.where(
        count > 0, np.where(known, values, 0.0).sum(axis=1) / np.maximum(count, 1), otherwise
    )
    return means


def _scaled(values: Floats) -> Floats:
    """Each row from 0 to 1; zeros where all are equal."""
    low, width = values.min(axis=1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    scaled: Floats = (values - low) / np.where(width > 0, width, 1.0)
    return scaled


# --- Measuring -------------------------------------------------------------------------------------------------------


def crossval_targets(
    dataset: Dataset,
    features: Features,
    *,
    pair: tuple[str, str] | None = None,
    folds: int = 5,
    groups: ArrayLike | None = None,
    seed: int = 0,
    parts: Sequence[str] = STACKED,
    jobs: int = -1,
    progress: Callable[[], None] = lambda: None,
) -> LadderReport:
    """Cross-validate routers over all targets of a dataset.

    Nested figures pick each fold's setting on the held-out rows of the other folds. The rule *value* takes the mean costs of
    the training rows. Without costs there is no such rule: kNN is then swept over the threshold, and clusters are left out.

    Parameters
    ----------
    dataset : Dataset
        Targets cheapest first. Rows without every label are trained on, not measured on.
    features : Features of the same rows
    pair : tuple of str, optional
        Weak and strong of a two-target router to stand beside the others.
    groups : array_like of str, shape (n,), optional
        ``dataset.groups`` by default.
    progress : callable
        Called once a fold.

    Raises
    ------
    DatasetError
        No row has every label.
    UsageError
        A target of the pair is unknown.
    """
    if pair is not None:
        dataset.for_targets(pair)  # raises where one is unknown
    whole = complete(dataset)
    labels = dataset.groups if groups is None else np.asarray(groups)
    split = split_folds(labels, folds, seed)
    results = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_fold)(
            dataset, features, np.flatnonzero(split != k), np.flatnonzero(split == k), pair, parts, seed
        )
        for k in range(folds)
    )
    found: dict[str, Floats] = {}
    for k, result in enumerate(results):
        for name, values in result.items():
            found.setdefault(name, np.full((len(dataset), values.shape[1]), np.nan))[split == k] = values
        progress()
    rows = dataset.select(whole)
    sweeps = _sweeps({name: values[whole] for name, values in found.items()}, rows.targets, pair)
    measured, singles = split[whole], Singles.of(rows)

    def report(part: NDArray[np.bool_]) -> LadderReport:
        here, alone = {name: sweep.select(part) for name, sweep in sweeps.items()}, singles.select(part)
        methods = {
            name: _with_nested(sweep_figures(sweep, alone, groups=rows.groups[part], seed=seed), nested)
            for name, sweep in here.items()
            for nested in [_nested(sweep, alone, measured[part])]
        }
        return _report(rows.select(part), methods, alone, seed)

    return _with_parts(report, rows, incomplete=int((~whole).sum()))


def evaluate_targets(
    predictor: Predictor, dataset: Dataset, features: Features, *, seed: int = 0
) -> LadderReport:
    """Evaluate a bundle on rows with every label that it was not trained on; the others are counted.

    The nested figures are those of the bundle's own threshold. The rule *value* takes the mean costs of these rows.

    Raises
    ------
    DatasetError
        No such row is left.
    """
    rows, prediction, incomplete, seen = unseen(predictor, dataset, features)
    singles = Singles.of(rows)
    sweeps = {"learned": threshold_sweep(prediction)}
    if (cost := singles.mean_cost) is not None:
        sweeps["learned_value"] = value_sweep(
            prediction.quality, np.broadcast_to(cost, prediction.quality.shape)
        )
    chosen = prediction.choose(predictor.threshold)

    def report(part: NDArray[np.bool_]) -> LadderReport:
        alone = singles.select(part)
        methods = {
            name: sweep_figures(sweep.select(part), alone, groups=rows.groups[part], seed=seed)
            for name, sweep in sweeps.items()
        }
        methods["learned"] = _with_nested(methods["learned"], _outcome(chosen[part], alone, alone.best))
        return _report(rows.select(part), methods, alone, seed)

    return _with_parts(report, rows, incomplete, seen)


def unseen(
    predictor: Predictor, dataset: Dataset, features: Features
) -> tuple[Dataset, Prediction, int, int]:
    """The rows with every label that a bundle was not trained on, its predictions for them, and how many were left out.

    Returns
    -------
    tuple
        The rows, the prediction, the rows without every label, the rows that were trained on.

    Raises
    ------
    DatasetError
        No row is left.
    """
    fresh = ~predictor.bundle.has_seen(dataset.prompts)
    if not fresh.any():
        raise DatasetError(f"all {len(dataset)} rows were trained on: nothing is left to measure on")
    whole = complete(dataset)
    used = np.flatnonzero(fresh & whole)
    if not len(used):
        raise DatasetError(
            f"no row that was not trained on has a quality for all of {', '.join(dataset.targets)}"
        )
    prediction = predictor.predict_features(features.take(used))
    return dataset.select(used), prediction, int((fresh & ~whole).sum()), int((~fresh).sum())


def _fold(
    dataset: Dataset,
    features: Features,
    train: Choices,
    test: Choices,
    pair: tuple[str, str] | None,
    parts: Sequence[str],
    seed: int,
) -> dict[str, Floats]:
    """What each router expects of the test rows, shape (m, T) each; the pair's score has the shape (m, 1)."""
    inside, seen, asked = dataset.select(train), features.take(train), features.take(test)
    costs = np.full((len(test), len(dataset.targets)), np.nan)
    with threadpool_limits(limits=1):  # folds run beside one another
        estimator = QualityEstimator(inside.targets, parts=parts, seed=seed)
        estimator.fit(seen, inside.quality, inside.groups, source_weights(inside.sources))
        prediction = estimator.predict(asked)
        found = {"gain": prediction.gain, "quality": prediction.quality, "cost": costs}
        embeddings = seen.embedding, asked.embedding
        found["knn"] = nearest_neighbours(inside, *embeddings)
        priced = np.isfinite(inside.cost).all(axis=1)
        if priced.any():
            mean = inside.cost[priced].mean(axis=0)
            costs[:] = mean
            found["clusters"], found["clusters_cost"] = cluster_means(inside, *embeddings, mean, seed)
        if pair is not None:
            two = inside.for_targets(pair)
            both = np.flatnonzero(~np.isnan(two.quality).any(axis=1))
            two = two.select(both)
            estimator = QualityEstimator(pair, parts=parts, seed=seed)
            estimator.fit(seen.take(both), two.quality, two.groups, source_weights(two.sources))
            found["pair"] = estimator.predict(asked).score[:, None]
    return found


def _sweeps(
    found: Mapping[str, Floats], targets: tuple[str, ...], pair: tuple[str, str] | None
) -> dict[str, Sweep]:
    cost = found["cost"]
    sweeps = {"learned": threshold_sweep(_expecting(targets, found["gain"]))}
    if np.isfinite(cost).all():
        sweeps["learned_value"] = value_sweep(found["quality"], cost)
        sweeps["knn"] = value_sweep(found["knn"], cost)
        sweeps["clusters"] = value_sweep(found["clusters"], found["clusters_cost"])
    else:
        sweeps["knn"] = threshold_sweep(_expecting(targets, found["knn"] - found["knn"][:, :1]))
    if pair is not None:
        score = np.hstack([np.zeros_like(found["pair"]), found["pair"]])
        two = threshold_sweep(_expecting(pair, score))
        sweeps["pair"] = Sweep(two.settings, np.array([targets.index(name) for name in pair])[two.choice])
    return sweeps


def _expecting(targets: tuple[str, ...], gain: Floats) -> Prediction:
    return Prediction(targets, gain, gain)


def _nested(sweep: Sweep, singles: Singles, folds: NDArray[Any]) -> tuple[float, float | None] | None:
    """Quality, and saving against the best single target, with each fold's setting picked on the other folds."""
    if len(np.unique(folds)) < 2:
        return None
    chosen, reference = np.empty(len(folds), dtype=np.intp), np.empty(len(folds), dtype=np.intp)
    for fold in np.unique(folds):
        here = folds == fold
        others, alone = sweep.select(~here), singles.select(~here)
        quality = others.taken(alone.quality).mean(axis=1)
        cost = alone.mean_of(others)
        setting = chosen_setting(quality, QUALITY_BAR * float(alone.quality.mean(axis=0)[alone.best]), cost)
        if setting is None:
            # What cannot be had: the nearest to it.
            setting = int(quality.argmax())
        chosen[here], reference[here] = sweep.choice[setting][here], alone.best
    return _outcome(chosen, singles, reference)


def _outcome(choice: Choices, singles: Singles, reference: Choices | int) -> tuple[float, float | None]:
    """Quality of these choices, and what they save against always taking ``reference``."""
    rows = np.arange(len(choice))
    saving = None
    if singles.priced.any():
        spent, single = (singles.cost[rows, which][singles.priced].mean() for which in (choice, reference))
        saving = 1.0 - float(spent / single) if single > 0 else None
    return float(singles.quality[rows, choice].mean()), saving


def _with_nested(figures: LadderFigures, nested: tuple[float, float | None] | None) -> LadderFigures:
    if nested is None:
        return figures
    return dataclasses.replace(figures, nested_quality=nested[0], nested_cost_saving=nested[1])


def _report(rows: Dataset, methods: Mapping[str, LadderFigures], singles: Singles, seed: int) -> LadderReport:
    """The routers' figures beside those of routers that were not trained."""
    n, count = singles.quality.shape
    alone = np.tile(np.arange(count)[:, None], (1, n))
    means = singles.mean_cost
    unset = np.full(count, np.nan)
    # The cheapest best target of each row, and on the way to the cheapest what its quality is worth.
    ideal = Sweep(unset[:1], _cheapest_best(singles.quality, means)[None])
    if means is not None:
        worth = value_sweep(singles.quality, np.broadcast_to(means, singles.quality.shape))
        ideal = Sweep(np.append(0.0, worth.settings), np.vstack([ideal.choice, worth.choice]))
    best = np.full((1, n), singles.best)
    drawn = np.random.default_rng(seed).integers(count, size=(1, n))
    untrained = {
        "best_single": Sweep(unset[:1], best),
        # Mixing targets at random reaches every point between theirs: the hull of the single targets.
        "zero": Sweep(unset, alone),
        "random": Sweep(unset[:1], drawn),
        "oracle": ideal,
    }
    figures = {
        name: sweep_figures(sweep, singles, groups=rows.groups, seed=seed)
        for name, sweep in untrained.items()
    }
    if means is not None:
        bar = QUALITY_BAR * float(singles.quality.mean(axis=0)[singles.best])
        # A mix is no target alone, which is what the sweep holds.
        saving = _mixed_saving(figures["zero"], float(means[singles.best]), bar)
        figures["zero"] = dataclasses.replace(figures["zero"], cost_saving_at_95=saving)
    return LadderReport(
        n=n,
        incomplete=0,
        targets=rows.targets,
        mean_quality=tuple(map(float, singles.quality.mean(axis=0))),
        mean_cost=None if means is None else tuple(map(float, means)),
        best_single=rows.targets[singles.best],
        methods={**methods, **figures},
    )


def _mixed_saving(zero: LadderFigures, single_cost: float, quality: float) -> float | None:
    """Share of a cost that the best random mix of targets saves at a quality: it lies on the hull of the targets."""
    if zero.hull is None or single_cost <= 0.0:
        return None
    cost, reached = np.array(zero.hull).T
    return 1.0 - float(np.interp(quality, reached, cost)) / single_cost


def _cheapest_best(quality: Floats, cost: Floats | None) -> Choices:
    order = np.arange(quality.shape[1]) if cost is None else np.argsort(cost, kind="stable")
    chosen: Choices = order[quality[:, order].argmax(axis=1)]
    return chosen


def _with_parts(
    report: Callable[[NDArray[np.bool_]], LadderReport], rows: Dataset, incomplete: int, seen: int = 0
) -> LadderReport:
    by = rows.sources if len(np.unique(rows.sources)) > 1 else rows.domains
    names, counts = np.unique(by, return_counts=True)
    kept = [str(name) for name, n in zip(names, counts, strict=True) if name and n >= MINIMUM_ROWS]
    return dataclasses.replace(
        report(np.ones(len(rows), dtype=bool)),
        by_source={name: report(by == name) for name in kept} if len(names) > 1 else {},
        incomplete=incomplete,
        seen=seen,
    )
