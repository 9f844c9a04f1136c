"""Methods side by side on one task: scores by fold, and a table with paired intervals."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from joblib import Memory, Parallel, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router.features import Features
from training import evaluation
from training.baselines import BASELINES, prompt_length, standardised_mean
from training.dataset import Dataset
from training.embeddings import cache_dir
from training.evaluation import learned_fold
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
from training.peers import PEERS, PeerError, peer_scores

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]

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
    code = {method: code_version(method) for method in FITTED}

    def call(method: str, r: int, train: Rows, test: Rows) -> tuple[Any, ...]:
        rows = hashlib.sha256(train.tobytes() + b"|" + test.tobytes()).hexdigest()
        return method, code[method], data, rows, seed + r, task.dataset, task.features, train, test

    folds = [(r, train, test) for r, folds in enumerate(task.runs) for train, test in folds]
    # Scores that are kept are read here: to hand all rows to another process takes longer.
    kept: list[tuple[str, int, Rows, Rows]] = []
    new: list[tuple[str, int, Rows, Rows]] = []
    for method in reversed(FITTED):
        for fold in folds:
            one = (method, *fold)
            (kept if remembered.check_call_in_cache(*call(*one)) else new).append(one)
    results = itertools.chain(
        (remembered(*call(*one)) for one in kept),
        Parallel(n_jobs=jobs, return_as="generator")(delayed(remembered)(*call(*one)) for one in new),
    )
    todo = [*kept, *new]
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
