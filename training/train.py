"""The orchestrator: dataset → features → estimator → calibration → threshold → bundle."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import router
from router.bundle import (
    SCHEMA_VERSION,
    Bundle,
    CostQualityCurve,
    DatasetReference,
    EncoderReference,
    Manifest,
    Probe,
    Threshold,
    load_bundle,
    prompt_hashes,
    prompt_of,
    quality_bar,
    save_bundle,
    write_manifest,
)
from router.errors import DatasetError, UsageError
from router.features import FEATURES_VERSION, Encoder, Features, extract
from router.predictor import PROBE_DIMENSIONS, Prediction, Predictor, load_predictor, predict, prepare
from training.card import write_card
from training.dataset import Dataset
from training.embeddings import embed
from training.estimator import STACKED, QualityEstimator, source_weights
from training.evaluation import Report, pair_rows, report_of
from training.guarantee import guaranteed_threshold
from training.ladder_threshold import curve_of_ladder, ladder_for_quality
from training.metrics import QUALITY_BAR, Interval, gain_interval, random_strong_share_at
from training.novelty import NoveltyFigures, fit_novelty
from training.probes import ROWS
from training.sweep import Singles
from training.threshold import ChosenThreshold, curve_of_pair, for_max_cost, for_quality, for_strong_share

# Fewer rows than this cannot hold a fold for each of fitting, stacking and calibration.
MINIMUM_ROWS = 50


@dataclass(frozen=True)
class Fit:
    """A bundle that was trained and written.

    Attributes
    ----------
    bundle : Bundle
    report : Report or None
        Figures on out-of-fold rows; None where there are more than two targets.
    gain : Interval or None
        The mean gain of strong over weak with its 95 % interval.
    novelty : NoveltyFigures
        How many rows like the training rows are flagged as unlike them.
    warnings : tuple of str
        What a person should know before using it.
    """

    bundle: Bundle
    report: Report | None
    gain: Interval | None
    novelty: NoveltyFigures
    warnings: tuple[str, ...]


def features_of(
    dataset: Dataset, encoder: Encoder, *, progress: Callable[[int], None] = lambda n: None
) -> Features:
    """Features of a dataset's prompts; embeddings come from the cache where they are in it."""
    return extract(dataset.prompts, encoder, embed(dataset.prompts, encoder, progress=progress))


def fit(
    dataset: Dataset,
    features: Features,
    encoder: Encoder,
    out: Path,
    *,
    seed: int = 0,
    parts: Sequence[str] = STACKED,
    command: str = "",
    progress: Callable[[], None] = lambda: None,
) -> Fit:
    """Train a bundle and write it to ``out``; what is there is only replaced when all went well.

    Parameters
    ----------
    dataset : Dataset
        Targets cheapest first.
    features : Features
        Of the same rows.
    parts : sequence of str
        Without ``kernel`` the bundle keeps no embedding of a training prompt.
    command : str
        How to make the bundle again, for its card.
    progress : callable
        Called once an inner fold and once for the final fit.

    Raises
    ------
    DatasetError
        There are too few rows, or a target's labels are all alike.
    """
    _check(dataset)
    estimator = QualityEstimator(dataset.targets, parts=parts, seed=seed)
    estimator.fit(features, dataset.quality, dataset.groups, source_weights(dataset.sources), progress)

    gain = report = None
    if len(dataset.targets) == 2:
        pair = pair_rows(dataset, *dataset.targets)
        both = ~np.isnan(dataset.quality).any(axis=1)
        score = estimator.out_of_fold_.score[both]
        report = report_of(pair, score, estimator.out_of_fold_.quality[both], seed=seed)
        gain = gain_interval(*pair.quality.T, groups=pair.groups, seed=seed)
        threshold = default_threshold(score, pair)
        weak, strong = dataset.targets
        curve: CostQualityCurve | None = curve_of_pair(score, *pair.quality.T, names=(weak, strong))
    else:
        threshold, curve = _default_of_ladder(estimator.out_of_fold_, dataset)
    warnings = _warnings(dataset, gain, report)
    measures, novelty = fit_novelty(
        features, dataset.sources, dataset.groups, prepare(estimator.arrays_), seed=seed
    )

    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=out.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        targets=dataset.targets,
        encoder=EncoderReference(name=encoder.name, hash=encoder.hash, dimension=encoder.dimension),
        features_version=FEATURES_VERSION,
        datasets=tuple(
            DatasetReference(name=Path(file.path).name, sha256=file.digest, rows=file.rows)
            for file in dataset.report.files
        ),
        seed=seed,
        versions={
            name: importlib.metadata.version(name)
            for name in ("numpy", "scikit-learn", "onnxruntime", "tokenizers")
        }
        | {"router": router.__version__},
        parts=tuple(parts),
        thresholds={"default": threshold}
        # A policy may ask for it by its quality, whatever becomes the default later.
        | ({} if threshold.quality_ratio is None else {quality_bar(QUALITY_BAR): threshold}),
        metrics=({} if report is None else {"out_of_fold": report.as_dict()})
        | {"novelty": novelty.as_dict()},
        notes=warnings,
        curve=curve,
        tool_result_rows=sum(prompt.state.last_result != "none" for prompt in dataset.prompts),
    )
    bundle = Bundle(
        manifest=manifest,
        arrays=estimator.arrays_ | measures,
        seen=np.unique(prompt_hashes(dataset.prompts)),
        probes=_probes(estimator, encoder),
        card=write_card(manifest, report, gain, novelty, command),
    )
    Predictor(bundle, encoder)  # replays the probes, before anything is replaced
    saved = save_bundle(bundle, out)
    Predictor(load_bundle(out), encoder)  # what was written is what will be served
    return Fit(saved, report, gain, novelty, warnings)


def default_threshold(score: NDArray[np.float64], pair: Dataset) -> Threshold:
    """The least strong share with 95 % of strong's quality, on rows the estimator was not fitted on."""
    weak, strong = pair.quality.T
    return as_threshold(
        for_quality(score, weak, strong, quality=QUALITY_BAR), float(strong.mean()), "out-of-fold rows"
    )


def _default_of_ladder(prediction: Prediction, dataset: Dataset) -> tuple[Threshold, CostQualityCurve | None]:
    """The cheapest threshold with 95 % of the best single target's quality, and the curve, on fully labelled out-of-fold rows."""
    rows = np.flatnonzero(~np.isnan(dataset.quality).any(axis=1))
    if len(rows) < MINIMUM_ROWS:
        how = "untuned: the cheapest target that is not expected to lose"
        return Threshold(value=0.0, how=how, rows=len(dataset)), None
    prediction, singles = prediction.take(rows), Singles.of(dataset.select(rows))
    curve = curve_of_ladder(prediction, singles)
    try:
        chosen = ladder_for_quality(prediction, singles, QUALITY_BAR)
    except UsageError as error:
        return Threshold(value=0.0, how=f"untuned: {error}", rows=len(rows)), curve
    return chosen.for_manifest("out-of-fold rows"), curve


@dataclass(frozen=True)
class Tuned:
    """A threshold chosen for a bundle.

    Attributes
    ----------
    chosen : ChosenThreshold
    strong_quality : float
        Mean quality of always-strong on the rows it was chosen on.
    random_share : float
        The share of strong calls that a router without knowledge needs for the same quality.
    seen : int
        Rows left out because the bundle was trained on them.
    """

    chosen: ChosenThreshold
    strong_quality: float
    random_share: float
    seen: int


def tune(
    predictor: Predictor,
    pair: Dataset,
    features: Features,
    *,
    quality: float | None = None,
    confidence: float | None = None,
    strong_share: float | None = None,
    max_cost: float | None = None,
    plot: Path | None = None,
) -> Tuned:
    """Choose a bundle's threshold by one of three goals, on rows it was not trained on.

    Parameters
    ----------
    pair : Dataset
        As :func:`training.evaluation.pair_rows` gives it.
    quality : float, optional
        Least share of strong's mean quality.
    confidence : float, optional
        With ``quality``: how sure that share must be on new rows (:mod:`training.guarantee`). Rows that share a group count
        as one, since they tell nothing independent of each other.
    strong_share : float, optional
        Share of calls to strong.
    max_cost : float, optional
        US dollars per 1,000 requests.
    plot : Path, optional
        Where to draw the curve with the chosen point.

    Raises
    ------
    UsageError
        The goal cannot be reached.
    DatasetError
        The bundle was trained on every row, or the rows are too few for a promise.
    """
    fresh = ~predictor.bundle.has_seen(pair.prompts)
    if not fresh.any():
        raise DatasetError(f"all {len(pair)} rows were trained on: a threshold needs rows that were not")
    rows = pair.select(fresh)
    score = predictor.predict_features(features.take(np.flatnonzero(fresh))).score
    weak, strong = rows.quality.T
    low, high = rows.cost.T
    if quality is not None and confidence is not None:
        promise = guaranteed_threshold(
            score,
            weak,
            strong,
            quality=quality,
            confidence=confidence,
            groups=rows.groups,
            cost_weak=low,
            cost_strong=high,
        )
        if not promise.possible:
            raise DatasetError(f"{promise.words}; give more rows, or ask for less quality or confidence")
        chosen = promise.chosen
    elif quality is not None:
        chosen = for_quality(score, weak, strong, quality=quality, cost_weak=low, cost_strong=high)
    elif strong_share is not None:
        chosen = for_strong_share(score, strong_share, weak, strong, cost_weak=low, cost_strong=high)
    elif max_cost is not None:
        chosen = for_max_cost(score, weak, strong, low, high, usd_per_1k=max_cost)
    else:
        raise UsageError("a goal is needed: quality, strong_share or max_cost")
    if plot is not None:
        from training.plot import plot_curve

        plot_curve(plot, score, weak, strong, chosen=chosen, names=(rows.targets[0], rows.targets[1]))
    strong_quality = float(strong.mean())
    assert chosen.quality is not None
    random_share = random_strong_share_at(weak, strong, chosen.quality / max(strong_quality, 1e-12))
    return Tuned(chosen, strong_quality, random_share, int((~fresh).sum()))


def as_threshold(chosen: ChosenThreshold, strong_quality: float, rows: str) -> Threshold:
    """A chosen threshold as the manifest records it."""
    return Threshold(
        value=chosen.threshold,
        how=f"{chosen.how} ({rows})",
        rows=chosen.n,
        strong_share=chosen.strong_share,
        quality_ratio=None
        if chosen.quality is None or not strong_quality
        else chosen.quality / strong_quality,
    )


def write_threshold(
    path: Path, threshold: Threshold, *, quality: float | None = None, default: bool = True
) -> None:
    """Put a threshold into a bundle's manifest.

    Parameters
    ----------
    threshold : Threshold
    quality : float or None
        The share of the best target's quality that it was chosen for: a policy finds it by that.
    default : bool
        Make it the bundle's default; the one before stays under ``previous``.
    """
    manifest = load_predictor(path).manifest
    thresholds = dict(manifest.thresholds)
    if default:
        thresholds |= {"previous": thresholds["default"], "default": threshold}
    if quality is not None:
        thresholds[quality_bar(quality)] = threshold
    manifest = manifest.model_copy(update={"thresholds": thresholds, "schema_version": SCHEMA_VERSION})
    write_manifest(manifest, path)


def _check(dataset: Dataset) -> None:
    if len(dataset.targets) < 2:
        raise UsageError("at least two targets are needed")
    if len(np.unique(dataset.groups)) < MINIMUM_ROWS:
        raise DatasetError(
            f"{len(np.unique(dataset.groups))} distinct prompts are too few to train on; at least {MINIMUM_ROWS} are needed"
        )
    known = ~np.isnan(dataset.quality)
    for t, target in enumerate(dataset.targets):
        # A target is fitted on its own labels, and its gain on the rows that the cheapest has a label for too.
        both = int((known[:, t] & known[:, 0]).sum())
        if both < MINIMUM_ROWS:
            of = target if t == 0 else f"both {dataset.targets[0]} and {target}"
            raise DatasetError(f"{both} rows have a quality for {of}; at least {MINIMUM_ROWS} are needed")
        labels = dataset.quality[known[:, t], t]
        # On a ladder the dearest target always suffices: what varies is how the cheaper ones do.
        if np.ptp(labels) == 0 and (t == 0 or len(dataset.targets) == 2):
            raise DatasetError(
                f"every quality of {target} is {labels[0]:g}: there is a single class, and nothing to learn from it"
            )


def _warnings(dataset: Dataset, gain: Interval | None, report: Report | None) -> tuple[str, ...]:
    if gain is None or report is None:
        return ()
    weak, strong = dataset.targets
    found = []
    if gain.low <= 0 <= gain.high:
        found.append(
            f"the labels do not show that {strong} is better than {weak}: mean gain {gain.value:+.3f}, "
            f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}; a router between them has nothing to recover"
        )
    elif gain.high < 0:
        found.append(
            f"{strong} is worse than {weak} on these labels (mean gain {gain.value:+.3f}): swap the two"
        )
    low = report.methods["learned"].apgr_ci[0]
    if report.methods["learned"].defined and not np.isnan(low) and low <= 0.5:
        found.append(
            "the predictor is not shown to be better than random on held-out rows (APGR interval holds .5)"
        )
    return tuple(found)


def _probes(estimator: QualityEstimator, encoder: Encoder) -> tuple[Probe, ...]:
    features = extract([prompt_of(row) for row in ROWS], encoder)
    scores = predict(features, prepare(estimator.arrays_), tuple(estimator.targets), estimator.parts).score
    return tuple(
        Probe(row, round(float(score), 6), tuple(round(float(x), 5) for x in embedding[:PROBE_DIMENSIONS]))
        for row, score, embedding in zip(ROWS, scores, features.embedding, strict=True)
    )
