"""This router beside others: the same rows, the same folds, one table a dataset."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from joblib import Memory, Parallel, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router import __version__
from router.bundle import prompt_hashes
from router.errors import UsageError
from router.features import Encoder, Features
from training import evaluation
from training.baselines import BASELINES, prompt_length, standardised_mean
from training.dataset import Dataset, load_dataset, split_folds, write_dataset
from training.embeddings import cache_dir, near_duplicate_groups
from training.estimator import QualityEstimator, source_weights
from training.evaluation import learned_fold, pair_rows
from training.metrics import (
    Calibration,
    CalibrationFigures,
    Interval,
    MethodFigures,
    draw_resamples,
    evaluate_scores,
    full_curve,
    gain_calibration,
    gain_interval,
    mean_figures,
    outcome_of,
    percentile_interval,
    quality_calibration,
    random_router_scores,
    random_strong_share_at,
    resampled_apgr,
)
from training.novelty_study import NoveltyStudy, novelty_study
from training.peers import PEERS, PeerError, peer_scores
from training.records import read_records
from training.sources import convert
from training.sources.twinrouterbench import LADDER
from training.steps import StepTable, StepTask, run_steps
from training.studies import (
    SPLITS,
    STUDIES,
    GroupedRows,
    Study,
    StudyTask,
    guarantee_task,
    ladder_task,
    run_study,
)
from training.train import default_threshold, features_of

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]

FOLDS = 5
RESAMPLES = 1000
# Equal scores are ordered at random: a method without folds is measured over at least this many orders.
ORDERS = 10
# Points of the curves that are drawn.
CURVE_POINTS = 101
# Methods that are fitted on each fold's training rows, the average of two of them left out.
FITTED = ("learned", "tfidf_logistic", "minilm_knn", "clusters", "matrix_factorisation")
# In this order they stand in a table.
METHODS = (
    "learned",
    "average",
    "tfidf_logistic",
    "minilm_knn",
    "clusters",
    "matrix_factorisation",
    "prompt_length",
    "prompt_shortness",
    *PEERS,
    "random",
)
UNFITTED_ON = MappingProxyType(
    {
        "prompt_length": "nothing",
        "prompt_shortness": "nothing",
        "random": "nothing",
        "litellm_heuristic_v2": "UltraFeedback, as shipped",
        "litellm_rules": "nothing: rules",
        "uncommonroute": "its authors' tier labels, as shipped",
    }
)
# What the learned scores follow from, beside the function that makes them: they are kept as long as these stand.
_ESTIMATOR = (
    *("training/calibration.py", "training/dataset.py", "training/estimator.py", "training/threshold.py"),
    *("router/conversation.py", "router/encoder.py", "router/features.py", "router/predictor.py"),
)


@dataclass(frozen=True)
class Published:
    """A row from a paper: not run, and not trained on what the others were."""

    method: str
    trained_on: str
    apgr: float
    cpt50: float | None
    cpt80: float | None
    source: str = "arXiv 2406.18665"


_ARENA = "Chatbot Arena"
_GOLD = Published("RouteLLM SW ranking", f"{_ARENA} + about 1,500 gold labels of MMLU", 0.603, 35.40, 71.55)
PUBLISHED: Mapping[str, tuple[Published, ...]] = MappingProxyType(
    {
        "mmlu": (
            _GOLD,
            Published("RouteLLM, best of five", _ARENA, 0.524, None, None),
        ),
        "mmlu-1500": (_GOLD,),
        "gsm8k": (
            Published("RouteLLM causal LLM (8B)", f"{_ARENA} + judge labels", 0.622, 33.64, 63.26),
            Published("RouteLLM, best of five", _ARENA, 0.497, None, None),
        ),
    }
)


@dataclass(frozen=True)
class Task:
    """Rows of a pair and how they are split.

    Attributes
    ----------
    name, title : str
    dataset : Dataset
        Weak and strong, in this order; each row labelled for both.
    features : Features of the same rows
    groups : ndarray of str, shape (n,)
        Near-duplicates share a group; no group is on both sides of a fold.
    runs : tuple of tuple of (ndarray, ndarray)
        Runs of folds, a fold being the indices of its training and of its test rows.
    trained_on : str
        What the fitted methods learn from.
    parts : mapping of str to ndarray of bool, shape (n,)
        Rows with a table of their own.
    reversed_length : bool
        Whether the shortest prompts first is a baseline too.
    curve : bool
        Whether it is drawn.
    """

    name: str
    title: str
    dataset: Dataset
    features: Features
    groups: NDArray[np.str_]
    runs: tuple[tuple[tuple[Rows, Rows], ...], ...]
    trained_on: str
    parts: Mapping[str, Mask] = field(default_factory=dict)
    reversed_length: bool = False
    curve: bool = True

    def tested(self) -> Mask:
        """Which rows each run tests, shape (runs, n)."""
        mask = np.zeros((len(self.runs), len(self.dataset)), dtype=bool)
        for r, folds in enumerate(self.runs):
            for _, test in folds:
                mask[r, test] = True
        return mask


@dataclass(frozen=True)
class Line:
    """One method in a table.

    Attributes
    ----------
    method, trained_on : str
    figures : MethodFigures or None
        None where it was not run.
    ahead : Interval or None
        APGR of the learned router minus this one's, over the same resamples.
    why_not : str
        Why it was not run.
    curve : ndarray, shape (2, CURVE_POINTS), or None
        Mean quality over runs and its standard deviation, at even strong shares from 0 to 1.
    """

    method: str
    trained_on: str
    figures: MethodFigures | None = None
    ahead: Interval | None = None
    why_not: str = ""
    curve: Floats | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "trained_on": self.trained_on,
            **(self.figures.as_dict() if self.figures else {"not_run": self.why_not}),
            "learned_ahead": _interval(self.ahead),
            "curve": None
            if self.curve is None
            else {"quality": self.curve[0].tolist(), "sd": self.curve[1].tolist()},
        }


@dataclass(frozen=True)
class Table:
    """What the methods reach on one set of rows.

    Attributes
    ----------
    name, title : str
    n, groups, merged, runs, folds : int
        Rows, groups of near-duplicates, rows that were merged into another's group, and how it was split.
    train_rows : int
        Rows that the fitted methods learn from, in the mean.
    weak, strong : str
    weak_quality, strong_quality : float
    gain : Interval
        Mean gain of strong with its bootstrap interval; where that holds zero there is hardly a strong side.
    random_share_at_95 : float
        Strong calls that a router without knowledge needs for 95 % of strong's quality.
    lines : tuple of Line
    published : tuple of Published
    calibration : Calibration
        Of the learned router on held-out rows: means over runs; the bins are the first run's.
    digest : str
        SHA-256 of the converted dataset.
    seconds : float
    drawn : bool
        Whether its curves are.
    """

    name: str
    title: str
    n: int
    groups: int
    merged: int
    runs: int
    folds: int
    train_rows: int
    weak: str
    strong: str
    weak_quality: float
    strong_quality: float
    gain: Interval
    random_share_at_95: float
    lines: tuple[Line, ...]
    published: tuple[Published, ...]
    calibration: Calibration
    digest: str
    seconds: float = 0.0
    drawn: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        plain = {
            key: value
            for key, value in vars(self).items()
            if key not in ("lines", "published", "gain", "calibration")
        }
        return {
            **plain,
            "gain": _interval(self.gain),
            "methods": {line.method: line.as_dict() for line in self.lines},
            "published": [asdict(row) for row in self.published],
            "calibration": self.calibration.as_dict(),
        }


@dataclass(frozen=True)
class Benchmark:
    """All tables of a run, what was skipped and why, and what it ran with."""

    tables: tuple[Table, ...]
    skipped: Mapping[str, str]
    settings: Mapping[str, Any]
    steps: tuple[StepTable, ...] = ()
    studies: tuple[Study, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **self.settings,
            "skipped": dict(self.skipped),
            "tables": [table.as_dict() for table in self.tables],
            "steps": [table.as_dict() for table in self.steps],
            **{
                kind: [study.as_dict() for study in self.studies if isinstance(study.found, of)]
                for kind, of in STUDIES.items()
            },
        }


class Absent(Exception):
    """The files of a task are not in the folder."""


def benchmark(
    folder: Path,
    encoder: Encoder,
    *,
    only: Sequence[str] = (),
    repeats: int = 20,
    seed: int = 0,
    peers: str | None = None,
    resamples: int = RESAMPLES,
    jobs: int = -1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Benchmark:
    """Run the tasks whose originals are in ``folder``.

    Parameters
    ----------
    folder : Path
        The public originals, laid out as ``router-train fetch`` and data/README.md have them.
    only : sequence of str
        Names of :data:`TASKS`; all by default.
    repeats : int
        Fold seeds, ``seed``, ``seed + 1``, …, or draws of few rows.
    peers : str, optional
        The interpreter of the environment that has UncommonRoute.
    resamples : int
        Of the bootstrap.
    progress : callable
        Called with what is being done, how much of it is, and of how much.

    Raises
    ------
    UsageError
        The folder is not there, a name is not known, or nothing named is in the folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; --data takes the one with the public originals")
    if unknown := [name for name in only if name not in TASKS]:
        raise UsageError(f"--only {', '.join(unknown)}: not known; known are {', '.join(TASKS)}")
    tables: list[Table] = []
    steps: list[StepTable] = []
    studies: list[Study] = []
    skipped: dict[str, str] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        material = Material(folder, Path(scratch), encoder, progress)
        for name in only or TASKS:
            try:
                tasks = list(TASKS[name](material, repeats, seed))
            except Absent as reason:
                skipped[name] = str(reason)
                continue
            for task in tasks:
                since = time.monotonic()
                if isinstance(task, StepTask):
                    one = run_steps(task, seed=seed, jobs=jobs, progress=partial(progress, task.title))
                    steps.append(replace(one, seconds=time.monotonic() - since))
                    continue
                if isinstance(task, StudyTask):
                    studies.append(run_study(task, jobs=jobs, progress=partial(progress, task.title)))
                    continue
                found = run(
                    task,
                    seed=seed,
                    peers=peers,
                    resamples=resamples,
                    jobs=jobs,
                    encoder_hash=encoder.hash,
                    progress=partial(progress, task.title),
                )
                seconds = time.monotonic() - since
                tables += [replace(table, seconds=seconds) for table in found]
    if not (tables or steps or studies):
        raise UsageError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    settings = _settings(encoder, repeats, seed, resamples) | {"seconds": time.monotonic() - began}
    return Benchmark(tuple(tables), skipped, settings, tuple(steps), tuple(studies))


def benchmark_rows(
    pair: Dataset,
    features: Features,
    encoder: Encoder,
    *,
    title: str = "these rows",
    few: Sequence[int] = (),
    repeats: int = 1,
    seed: int = 0,
    splits: int = SPLITS,
    resamples: int = RESAMPLES,
    jobs: int = -1,
) -> Benchmark:
    """The comparison, the few-row curve, the promises and the ladder on one's own rows, without the routers that are processes.

    Parameters
    ----------
    pair : Dataset
        As :func:`training.evaluation.pair_rows` gives it.
    features : Features of the same rows
    encoder : Encoder
        The one that made them.
    few : sequence of int
        Numbers of training rows to draw beside cross-validation.
    splits : int
        Random halves that promises are studied on.

    Notes
    -----
    The ladder, here of two targets, needs costs and is left out where no row has them.
    """
    began = time.monotonic()
    groups = _merged_groups(features, pair.groups)
    rows = (pair, features, groups)
    tasks = [cross_validated("rows", title, rows, repeats, seed)]
    tasks += [few_shot(f"rows-{n}", f"{title} from {n:,} rows", rows, n, repeats, seed) for n in few]
    tables = [
        table
        for task in tasks
        for table in run(
            task, seed=seed, routers=(), resamples=resamples, jobs=jobs, encoder_hash=encoder.hash
        )
    ]
    score = partial(_out_of_fold, rows, encoder.hash, seed)
    asked = [guarantee_task("guarantee-rows", f"Promises on {title}", rows, score, seed, splits)]
    if np.isfinite(pair.cost).all(axis=1).any():
        asked.append(ladder_task("ladder-rows", f"Ladder on {title}", rows, None, FOLDS, seed))
    studies = [run_study(task, jobs=jobs) for task in asked]
    settings = _settings(encoder, repeats, seed, resamples) | {"seconds": time.monotonic() - began}
    return Benchmark(tuple(tables), {}, settings, (), tuple(studies))


def _settings(encoder: Encoder, repeats: int, seed: int, resamples: int) -> dict[str, Any]:
    return {
        "repeats": repeats,
        "folds": FOLDS,
        "seed": seed,
        "resamples": resamples,
        "encoder": {"name": encoder.name, "hash": encoder.hash},
        "versions": {
            "llm-difficulty-router": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in ("numpy", "scikit-learn", "scipy", "litellm")},
        },
    }


def run(
    task: Task,
    *,
    seed: int = 0,
    peers: str | None = None,
    routers: Iterable[str] | None = None,
    resamples: int = RESAMPLES,
    jobs: int = -1,
    encoder_hash: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Table]:
    """Score a task's test rows by every method and measure: the whole first, then its parts.

    ``routers`` are the other projects' to ask, all of :data:`training.peers.PEERS` by default. The scores of a fold are kept
    on disk under what they follow from, so that only what changed is computed again.
    """
    fitted, learned = _fitted_scores(task, seed, encoder_hash, jobs, progress)
    scores, why_not, on = dict(fitted), dict[str, str](), dict(UNFITTED_ON)
    pairs = zip(scores["tfidf_logistic"], scores["minilm_knn"], strict=True)
    scores["average"] = np.stack([_where_tested(standardised_mean, *pair) for pair in pairs])
    for method in (*FITTED, "average"):
        on[method] = task.trained_on
    unfitted = _unfitted_scores(task, seed, peers, PEERS if routers is None else routers, why_not, on)
    scores |= unfitted
    order = [method for method in METHODS if method in scores or method in why_not]

    everything = np.ones(len(task.dataset), dtype=bool)
    parts = {"": everything, **task.parts}
    tables = []
    for name, mask in parts.items():
        rows = np.flatnonzero(mask & task.tested().any(axis=0))
        tables.append(
            _table(
                task,
                name,
                rows,
                {method: score[:, rows] for method, score in scores.items()},
                {key: value[:, rows] for key, value in learned.items()},
                [(method, on[method], why_not.get(method, "")) for method in order],
                seed,
                resamples,
                jobs,
            )
        )
    return tables


def _table(
    task: Task,
    part: str,
    rows: Rows,
    scores: Mapping[str, Floats],
    learned: Mapping[str, NDArray[Any]],
    order: Sequence[tuple[str, str, str]],
    seed: int,
    resamples: int,
    jobs: int,
) -> Table:
    dataset, groups = task.dataset.select(rows), task.groups[rows]
    weak, strong = dataset.quality.T
    costs = (dataset.cost[:, 0], dataset.cost[:, 1])
    share = random_strong_share_at(weak, strong)
    drawn = draw_resamples(len(rows), groups=groups, resamples=resamples, seed=seed)
    names = [name for name, _, why_not in order if not why_not]
    values = dict(
        zip(
            names,
            Parallel(n_jobs=jobs)(
                delayed(resampled_apgr)(scores[name], weak, strong, drawn, seed=seed) for name in names
            ),
            strict=True,
        )
    )
    lines = []
    for name, trained_on, why_not in order:
        if why_not:
            lines.append(Line(name, trained_on, why_not=why_not))
            continue
        runs, curves = [], []
        for r, score in enumerate(scores[name]):
            at = np.flatnonzero(~np.isnan(score))
            args = (weak[at], strong[at], costs[0][at], costs[1][at])
            figures = evaluate_scores(score[at], *args, seed=seed + r, resamples=0)
            if name == "learned":
                figures = figures.with_nested(outcome_of(learned["to_strong"][r, at] > 0, *args))
            if name == "random":
                figures = replace(figures, **_random_saving(*args))
            runs.append(figures)
            full = full_curve(score[at], *args[:2], seed=seed + r)
            curves.append(np.interp(np.linspace(0.0, 1.0, CURVE_POINTS), full.share, full.quality))
        interval = percentile_interval(values[name])
        figures = replace(mean_figures(runs), apgr_ci=(interval.low, interval.high))
        lines.append(
            Line(name, trained_on, figures, curve=np.stack([np.mean(curves, axis=0), np.std(curves, axis=0)]))
        )
    ours = next(line.figures for line in lines if line.method == "learned")
    assert ours is not None
    lines = [
        replace(
            line,
            ahead=percentile_interval(values["learned"] - values[line.method], ours.apgr - line.figures.apgr),
        )
        if line.figures is not None and line.method != "learned"
        else line
        for line in lines
    ]
    calibration = [
        Calibration(
            {
                target: quality_calibration(learned[head][r, at], dataset.quality[at, t])
                for t, (target, head) in enumerate(zip(dataset.targets, ("weak", "strong"), strict=True))
            },
            gain_calibration(scores["learned"][r, at], weak[at], strong[at]),
        )
        for r in range(len(scores["learned"]))
        for at in [np.flatnonzero(~np.isnan(scores["learned"][r]))]
    ]
    return Table(
        name=f"{task.name}/{part}" if part else task.name,
        title=f"{task.title}: {part}" if part else task.title,
        n=len(rows),
        groups=len(np.unique(groups)),
        merged=int((np.asarray(dataset.groups) != groups).sum()),
        runs=len(task.runs),
        folds=len(task.runs[0]),
        train_rows=round(float(np.mean([len(train) for folds in task.runs for train, _ in folds]))),
        weak=dataset.targets[0],
        strong=dataset.targets[1],
        weak_quality=float(weak.mean()),
        strong_quality=float(strong.mean()),
        gain=gain_interval(weak, strong, groups=groups, resamples=resamples, seed=seed),
        random_share_at_95=share,
        lines=tuple(lines),
        published=() if part else PUBLISHED.get(task.name, ()),
        calibration=Calibration(
            {
                target: _mean_calibration([one.quality[target] for one in calibration])
                for target in dataset.targets
            },
            _mean_calibration([one.gain for one in calibration]),
        ),
        digest=dataset.digest,
        drawn=task.curve and not part,
    )


def _mean_calibration(runs: Sequence[CalibrationFigures]) -> CalibrationFigures:
    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in runs]))

    return replace(
        runs[0],
        ece=mean("ece"),
        ece_by_chance=mean("ece_by_chance"),
        brier=mean("brier"),
        base_brier=mean("base_brier"),
        auc=mean("auc"),
    )


def _random_saving(weak: Floats, strong: Floats, cost_weak: Floats, cost_strong: Floats) -> dict[str, Any]:
    """Random's saving in closed form: the luckiest cut of a random order would credit it with noise."""
    share = random_strong_share_at(weak, strong)
    saved: dict[str, Any] = {"strong_share_at_95": share, "call_saving_at_95": 1.0 - share}
    known = np.isfinite(cost_weak) & np.isfinite(cost_strong)
    if known.any() and cost_strong[known].sum() > 0.0:
        saved["cost_saving_at_95"] = (1.0 - share) * (1.0 - cost_weak[known].sum() / cost_strong[known].sum())
    return saved


def _fitted_scores(
    task: Task, seed: int, encoder_hash: str, jobs: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Scores by method, and what else the learned router says of each row; shape (runs, n), NaN where not tested."""
    shape = (len(task.runs), len(task.dataset))
    scores = {method: np.full(shape, np.nan) for method in FITTED}
    learned = {name: np.full(shape, np.nan) for name in ("to_strong", "weak", "strong")}
    remembered = Memory(cache_dir() / "benchmark", verbose=0).cache(
        _score_fold, ignore=["dataset", "features", "train", "test"]
    )
    data = hashlib.sha256(
        "\n".join([task.dataset.digest, encoder_hash, *task.dataset.targets, *task.dataset.ids]).encode()
    ).hexdigest()
    folds = [(r, train, test) for r, folds in enumerate(task.runs) for train, test in folds]
    todo = [(method, *fold) for method in reversed(FITTED) for fold in folds]
    results = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(remembered)(
            method,
            code_version(method),
            data,
            hashlib.sha256(train.tobytes() + b"|" + test.tobytes()).hexdigest(),
            seed + r,
            task.dataset,
            task.features,
            train,
            test,
        )
        for method, r, train, test in todo
    )
    progress(0, len(todo))
    for done, ((method, r, _, test), found) in enumerate(zip(todo, results, strict=True), start=1):
        scores[method][r, test] = found["score"]
        if method == "learned":
            for name in learned:
                learned[name][r, test] = found[name]
        progress(done, len(todo))
    return scores, learned


def _score_fold(
    method: str,
    code: str,
    data: str,
    rows: str,
    seed: int,
    dataset: Dataset,
    features: Features,
    train: Rows,
    test: Rows,
) -> dict[str, NDArray[Any]]:
    """The first five arguments are the cache's key; the others follow from them."""
    if method == "learned":
        fold = learned_fold(dataset, features, train, test, seed=seed)
        weak, strong = fold.prediction.quality.T
        return {"score": fold.prediction.score, "to_strong": fold.to_strong, "weak": weak, "strong": strong}
    with threadpool_limits(limits=1):  # folds run beside one another
        score = BASELINES[method](
            dataset.select(train),
            dataset.select(test),
            features.embedding[train],
            features.embedding[test],
            seed,
        )
    return {"score": score}


def code_version(method: str) -> str:
    """SHA-256 of the source that a method's scores follow from.

    A baseline's is its module; the learned router's those of ``_ESTIMATOR``.
    """
    digest = hashlib.sha256()
    if method == "learned":
        digest.update(inspect.getsource(evaluation.learned_fold).encode())
        # Found, not imported: nothing of the server is loaded.
        packages = {"training": Path(__file__).parent, "router": Path(str(files("router")))}
        sources = [packages[name.split("/")[0]] / name.split("/")[1] for name in _ESTIMATOR]
    else:
        sources = [Path(__file__).parent / "baselines.py"]
    libraries = "".join(version(name) for name in ("numpy", "scikit-learn", "scipy"))
    digest.update(libraries.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _unfitted_scores(
    task: Task,
    seed: int,
    peers: str | None,
    routers: Iterable[str],
    why_not: dict[str, str],
    on: dict[str, str],
) -> dict[str, Floats]:
    """Scores of what is not fitted here, shape (runs, n); the rows that a run tests are those of the fitted methods."""
    tested = task.tested()
    mask = tested[np.arange(max(len(tested), ORDERS)) % len(tested)]
    n = len(task.dataset)
    length = prompt_length(task.dataset, task.dataset, np.zeros((n, 0)), np.zeros((n, 0)), seed)
    flat: dict[str, Floats] = {"prompt_length": length}
    if task.reversed_length:
        flat["prompt_shortness"] = -length
    asked = np.flatnonzero(tested.any(axis=0))
    texts = [task.dataset.prompts[row].text for row in asked]
    for name in routers:
        python = peers if name == "uncommonroute" else sys.executable
        if python is None:
            why_not[name] = "no --peers interpreter (make peers)"
            continue
        try:
            found = _peer(name, texts, python)
        except PeerError as error:
            why_not[name] = str(error)
            continue
        flat[name] = np.full(n, np.nan)
        flat[name][asked] = found[1]
        on[name] = f"{on[name]} ({found[0]})"
    scores = {name: np.where(mask, score, np.nan) for name, score in flat.items()}
    scores["random"] = np.where(mask, random_router_scores(n, runs=len(mask), seed=seed), np.nan)
    return scores


def _peer(name: str, texts: Sequence[str], python: str) -> tuple[str, list[float]]:
    """A peer's scores, kept under the prompts' digest, the interpreter and the peer's script."""
    remembered = Memory(cache_dir() / "benchmark", verbose=0).cache(_run_peer, ignore=["texts"])
    script = hashlib.sha256((Path(__file__).parent / "peers.py").read_bytes()).hexdigest()
    prompts = hashlib.sha256(repr(texts).encode()).hexdigest()
    found: tuple[str, list[float]] = remembered(name, script, version("litellm"), prompts, python, texts)
    return found


def _run_peer(
    name: str, script: str, litellm: str, prompts: str, python: str, texts: Sequence[str]
) -> tuple[str, list[float]]:
    found = peer_scores(name, texts, python)
    return found.version, found.scores


def _where_tested(combine: Callable[..., Floats], *scores: Floats) -> Floats:
    tested = ~np.isnan(scores[0])
    combined = np.full(len(tested), np.nan)
    combined[tested] = combine(*(score[tested] for score in scores))
    return combined


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {name: _finite(value) for name, value in asdict(interval).items()}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _merged_groups(features: Features, groups: NDArray[np.str_]) -> NDArray[np.str_]:
    """Groups with near-duplicates merged, by centred embeddings: all of an encoder's point somewhat the same way."""
    with threadpool_limits(limits=1):
        return near_duplicate_groups(features.embedding - features.embedding.mean(axis=0), groups)


class Material:
    """The originals of a folder as datasets with features, each converted once."""

    def __init__(
        self, folder: Path, scratch: Path, encoder: Encoder, progress: Callable[[str, int, int], None]
    ) -> None:
        self.folder = folder
        self._scratch = scratch
        self.encoder = encoder
        self._progress = progress
        self._loaded: dict[tuple[tuple[str, str], ...], tuple[Dataset, Features, NDArray[np.str_]]] = {}

    def convert(self, source: str, place: str) -> Path:
        """The dataset file of an original; raises :class:`Absent` where the folder has none."""
        original = self.folder / place
        if not original.exists():
            raise Absent(f"{place}: not there")
        out = self._scratch / f"{place.replace(os.sep, '-')}.jsonl"
        if not out.exists():
            convert(source, original, out)
        return out

    def pair(
        self, sources: Sequence[tuple[str, str]], weak: str, strong: str, more: Sequence[Path] = ()
    ) -> tuple[Dataset, Features, NDArray[np.str_]]:
        """Rows of a pair, their features, and their groups with near-duplicates merged."""
        key = (*sources, *((str(path), "") for path in more), (weak, strong))
        if key not in self._loaded:
            paths = [*(self.convert(source, place) for source, place in sources), *more]
            dataset = pair_rows(load_dataset(paths, targets=(weak, strong)), weak, strong)
            features = self.features(
                dataset, " + ".join([*(place for _, place in sources), *(p.name for p in more)])
            )
            self._loaded[key] = (dataset, features, _merged_groups(features, dataset.groups))
        return self._loaded[key]

    def sample(self, weak: str, strong: str) -> tuple[Path, frozenset[str]] | None:
        """data/sample.jsonl for a pair's names, and the ids of its rows that are not English; None where it is not there."""
        if not SAMPLE.is_file():
            return None
        names = {"weak": weak, "strong": strong}
        rows = [record.fields for record in read_records(SAMPLE)]
        out = self._scratch / SAMPLE.name
        write_dataset(
            ({**row, "quality": {names[k]: v for k, v in row["quality"].items()}} for row in rows), out
        )
        return out, frozenset(str(row["id"]) for row in rows if row["language"] != "en")

    def features(self, dataset: Dataset, name: str) -> Features:
        """Features of a dataset; its embeddings come from the cache where they are in it."""
        done = 0

        def show(n: int) -> None:
            nonlocal done
            done += n
            self._progress(f"embedding {name}", done, len(dataset))

        return features_of(dataset, self.encoder, progress=show)


Build = Callable[[Material, int, int], Iterator[Task | StepTask | StudyTask]]
SAMPLE = Path("data", "sample.jsonl")

_MIXTRAL, _GPT4 = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
_MMLU, _GSM8K, _MTBENCH = (
    (("routellm-mmlu", "routellm/mmlu"),),
    (("routellm-gsm8k", "routellm/gsm8k"),),
    (("routellm-mtbench", "routellm/mt_bench"),),
)
FEW_ROWS = (250, 500, 1500, 5000)
# Five draws of 5,000 rows cost what twenty of 1,500 do, and vary less.
FEW_DRAWS_ABOVE, FEW_DRAWS = 1500, 5


def cross_validated(
    name: str,
    title: str,
    material: tuple[Dataset, Features, NDArray[np.str_]],
    repeats: int,
    seed: int,
    *,
    by: NDArray[np.str_] | None = None,
    **options: Any,
) -> Task:
    """A task of ``FOLDS``-fold cross-validation, split by group, or by the labels ``by`` of shape (n,)."""
    dataset, features, groups = material
    runs = []
    for r in range(repeats):
        fold = split_folds(groups if by is None else by, FOLDS, seed + r)
        runs.append(
            tuple(_apart(np.flatnonzero(fold != k), np.flatnonzero(fold == k), groups) for k in range(FOLDS))
        )
    rows = round(float(np.mean([len(train) for train, _ in runs[0]])))
    return Task(
        name=name,
        title=title,
        dataset=dataset,
        features=features,
        groups=groups,
        runs=tuple(runs),
        trained_on=f"{rows:,} of these rows" + ("" if by is None else ", other subjects"),
        **options,
    )


def few_shot(
    name: str,
    title: str,
    material: tuple[Dataset, Features, NDArray[np.str_]],
    rows: int,
    draws: int,
    seed: int,
) -> Task:
    """A task that trains on ``rows`` drawn rows, in whole groups, and tests on all others."""
    dataset, features, groups = material
    if len(dataset) <= rows:
        raise Absent(f"{len(dataset)} rows are too few to draw {rows} of them")
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    runs = []
    for r in range(draws):
        shuffled = np.random.default_rng(seed + r).permutation(len(sizes))
        # The last group may carry the draw a few rows beyond what was asked.
        enough = int(np.searchsorted(np.cumsum(sizes[shuffled]), rows)) + 1
        drawn = np.isin(member, shuffled[:enough])
        runs.append(((np.flatnonzero(drawn), np.flatnonzero(~drawn)),))
    return Task(
        name=name,
        title=title,
        dataset=dataset,
        features=features,
        groups=groups,
        runs=tuple(runs),
        trained_on=f"{rows:,} rows of the same benchmark",
        curve=False,
    )


def _apart(train: Rows, test: Rows, groups: NDArray[np.str_]) -> tuple[Rows, Rows]:
    """The fold without training rows that share a group with a test row."""
    return train[~np.isin(groups[train], groups[test])], test


def _mmlu(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    rows = material.pair(_MMLU, _MIXTRAL, _GPT4)
    yield cross_validated("mmlu", "RouteLLM MMLU", rows, repeats, seed)


def _gsm8k(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    rows = material.pair(_GSM8K, _MIXTRAL, _GPT4)
    yield cross_validated("gsm8k", "RouteLLM GSM8K", rows, repeats, seed)


def _mmlu_subjects(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    rows = material.pair(_MMLU, _MIXTRAL, _GPT4)
    title = "RouteLLM MMLU, whole subjects held out"
    yield cross_validated("mmlu-subjects", title, rows, repeats, seed, by=rows[0].domains)


def _mmlu_few(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    pair = material.pair(_MMLU, _MIXTRAL, _GPT4)
    for rows in FEW_ROWS:
        draws = repeats if rows <= FEW_DRAWS_ABOVE else min(repeats, FEW_DRAWS)
        yield few_shot(f"mmlu-{rows}", f"RouteLLM MMLU from {rows:,} rows", pair, rows, draws, seed)


def _gsm8k_few(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    pair = material.pair(_GSM8K, _MIXTRAL, _GPT4)
    yield few_shot("gsm8k-400", "RouteLLM GSM8K from 400 rows", pair, 400, repeats, seed)


def _alpacaeval(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    folder = material.folder / "alpaca_eval"
    found = sorted(folder.glob("*/*/annotations.json"))
    if not found:
        raise Absent(f"{folder}: no <model>/<annotator>/annotations.json")
    for file in found:
        place = str(file.parent.relative_to(material.folder))
        # The first target of a row is GPT-4, whom the others are compared with.
        strong, weak = load_dataset([material.convert("alpacaeval", place)]).targets
        rows = material.pair((("alpacaeval", place),), weak, strong)
        yield cross_validated(
            f"alpacaeval-{weak}", f"AlpacaEval {weak}", rows, repeats, seed, reversed_length=True
        )


def _routerbench(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    rows = material.pair((("routerbench", "routerbench"),), "mistralai/mixtral-8x7b-chat", _GPT4)
    domains = rows[0].domains
    parts = {str(domain): domains == domain for domain in np.unique(domains)}
    yield cross_validated("routerbench", "RouterBench", rows, repeats, seed, parts=parts)


def _mtbench(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    dataset, features, groups = material.pair(_MMLU + _GSM8K + _MTBENCH, _MIXTRAL, _GPT4)
    there = dataset.sources == "routellm-mtbench"
    train, test = _apart(np.flatnonzero(~there), np.flatnonzero(there), groups)
    yield Task(
        name="mtbench",
        title="MT-Bench, by what MMLU and GSM8K taught",
        dataset=dataset,
        features=features,
        groups=groups,
        runs=(((train, test),),),
        trained_on=f"{len(train):,} rows of MMLU and GSM8K",
    )


def _coderouterbench(material: Material, repeats: int, seed: int) -> Iterator[Task]:
    place = "coderouterbench"
    whole = load_dataset([material.convert("coderouterbench", place)])
    if np.isnan(whole.cost).all(axis=0).any():
        raise Absent(f"{place}: a model has no cost, so there is no cheapest one")
    weak = whole.targets[int(np.nanmean(whole.cost, axis=0).argmin())]
    strong = whole.targets[int(np.nanmean(whole.quality, axis=0).argmax())]
    if weak == strong:
        raise Absent(f"{place}: {weak} is both the cheapest and the best model, there is nothing to route")
    rows = material.pair((("coderouterbench", place),), weak, strong)
    yield cross_validated("coderouterbench", "CodeRouterBench", rows, repeats, seed)


def _twinrouterbench(material: Material, repeats: int, seed: int) -> Iterator[StepTask]:
    place = "twinrouterbench"
    dataset = load_dataset([material.convert("twinrouterbench", place)], targets=LADDER)
    features = material.features(dataset, place)
    yield StepTask.of(
        "twinrouterbench", "TwinRouterBench, steps of agents", dataset, features, FOLDS, repeats, seed
    )


# --- Studies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeFit:
    """The estimator on all rows, as ``fit`` makes a bundle of them: out-of-fold scores of shape (n,), and its arrays."""

    score: Floats
    arrays: Mapping[str, NDArray[Any]]


def whole_fit(rows: GroupedRows, encoder_hash: str, seed: int) -> WholeFit:
    """Fit on all rows of a pair; kept on disk as the folds' scores are."""
    dataset, features, groups = rows
    key = hashlib.sha256(
        "\n".join([dataset.digest, encoder_hash, *dataset.targets, *dataset.ids, *groups]).encode()
    ).hexdigest()
    remembered = Memory(cache_dir() / "benchmark", verbose=0).cache(
        _fit_whole, ignore=["dataset", "features", "groups"]
    )
    score, arrays = remembered(code_version("learned"), key, seed, dataset, features, groups)
    return WholeFit(score, arrays)


def _fit_whole(
    code: str, data: str, seed: int, dataset: Dataset, features: Features, groups: NDArray[np.str_]
) -> tuple[Floats, dict[str, NDArray[Any]]]:
    """The first three arguments are the cache's key."""
    estimator = QualityEstimator(dataset.targets, seed=seed)
    estimator.fit(features, dataset.quality, groups, source_weights(dataset.sources))
    return estimator.out_of_fold_.score, estimator.arrays_


def _out_of_fold(rows: GroupedRows, encoder_hash: str, seed: int) -> Floats:
    return whole_fit(rows, encoder_hash, seed).score


def _guarantee(material: Material, repeats: int, seed: int) -> Iterator[StudyTask]:
    for name, title, sources in (
        ("mmlu", "MMLU", _MMLU),
        ("gsm8k", "GSM8K", _GSM8K),
        ("mixed", "MMLU and GSM8K together", _MMLU + _GSM8K),
    ):
        rows = material.pair(sources, _MIXTRAL, _GPT4)
        score = partial(_out_of_fold, rows, material.encoder.hash, seed)
        yield guarantee_task(f"guarantee-{name}", f"Promises on {title}", rows, score, seed)


def _ladder(material: Material, repeats: int, seed: int) -> Iterator[StudyTask]:
    place = "routerbench"
    whole = load_dataset([material.convert("routerbench", place)])
    means = np.nanmean(whole.cost, axis=0)
    dataset = whole.for_targets([whole.targets[t] for t in np.argsort(means, kind="stable")])
    features = material.features(dataset, place)
    rows = (dataset, features, _merged_groups(features, dataset.groups))
    title = f"RouterBench, {len(dataset.targets)} models"
    yield ladder_task("ladder-routerbench", title, rows, ("mistralai/mixtral-8x7b-chat", _GPT4), FOLDS, seed)


def _novelty(material: Material, repeats: int, seed: int) -> Iterator[StudyTask]:
    sample = material.sample(_MIXTRAL, _GPT4)
    mixture = (_MMLU + _GSM8K + _MTBENCH, [sample[0]] if sample else [])
    for name, title, sources, more in (
        ("mmlu", "MMLU alone", _MMLU, []),
        ("gsm8k", "GSM8K alone", _GSM8K, []),
        ("mixture", "MMLU, GSM8K, MT-Bench" + " and the sample" * bool(sample), *mixture),
    ):
        rows = material.pair(sources, _MIXTRAL, _GPT4, more)
        yield StudyTask(
            f"novelty-{name}",
            f"What a bundle of {title} flags",
            f"{len(rows[0]):,} rows",
            rows[0].digest,
            partial(_measure_novelty, material, rows, sample, name == "mmlu", seed),
        )


def _measure_novelty(
    material: Material,
    rows: GroupedRows,
    sample: tuple[Path, frozenset[str]] | None,
    by_domain: bool,
    seed: int,
    jobs: int,
    progress: Callable[[int, int], None],
) -> NoveltyStudy:
    dataset, features, groups = rows
    others: dict[str, Features] = {}

    seen = prompt_hashes(dataset.prompts)

    def fresh(found: Dataset, known: Features) -> tuple[Dataset, Features]:
        rows = np.flatnonzero(~np.isin(prompt_hashes(found.prompts), seen))
        return found.select(rows), known.take(rows)

    def add(name: str, found: Dataset, known: Features) -> None:
        if len(left := fresh(found, known)[1]):
            others[name] = left

    parts = {}
    for name, one in (("MMLU", _MMLU), ("GSM8K", _GSM8K), ("MT-Bench", _MTBENCH)):
        with suppress(Absent):
            if one[0][0] not in dataset.sources:
                add(name, *material.pair(one, _MIXTRAL, _GPT4)[:2])
    if sample is not None:
        path, foreign = sample
        if (here := np.isin(dataset.ids, list(foreign))).any():
            parts["sample, not English"] = here
        else:
            labelled, known, _ = material.pair((), _MIXTRAL, _GPT4, [path])
            english = ~np.isin(labelled.ids, list(foreign))
            add("sample, English", labelled.select(english), known.take(np.flatnonzero(english)))
            add("sample, not English", labelled.select(~english), known.take(np.flatnonzero(~english)))
    routed = {}
    for file in sorted((material.folder / "alpaca_eval" / _MIXTRAL.split("/")[1]).glob("*/annotations.json")):
        place = str(file.parent.relative_to(material.folder))
        strong, weak = load_dataset([material.convert("alpacaeval", place)]).targets
        found, known, _ = material.pair((("alpacaeval", place),), weak, strong)
        add("AlpacaEval", found, known)
        routed["AlpacaEval"] = fresh(found, known)
    for name, source in (
        ("RouterBench", "routerbench"),
        ("UncommonRoute", "uncommonroute"),
        ("CodeRouterBench", "coderouterbench"),
    ):
        with suppress(Absent):
            whole = load_dataset([material.convert(source, source)])
            add(name, whole, material.features(whole, source))
    fitted = whole_fit(rows, material.encoder.hash, seed)
    return novelty_study(
        dataset,
        features,
        groups,
        fitted.arrays,
        default_threshold(fitted.score, dataset).value,
        others=others,
        parts=parts,
        by_domain=by_domain,
        routed=routed,
        seed=seed,
        jobs=jobs,
        progress=progress,
    )


TASKS: Mapping[str, Build] = MappingProxyType(
    {
        "mmlu": _mmlu,
        "gsm8k": _gsm8k,
        "mmlu-subjects": _mmlu_subjects,
        "alpacaeval": _alpacaeval,
        "routerbench": _routerbench,
        "mtbench": _mtbench,
        "mmlu-few": _mmlu_few,
        "gsm8k-400": _gsm8k_few,
        "coderouterbench": _coderouterbench,
        "twinrouterbench": _twinrouterbench,
        "guarantee": _guarantee,
        "ladder": _ladder,
        "novelty": _novelty,
    }
)
