"""Routers of agent steps: how often the tier picked for a step is enough, for whole runs, and what a run costs.

One step that was sent too low can lose the run, and one sent too high is paid for: so steps are counted alone, by run,
and in dollars over the run (arXiv 2605.18859).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from router.features import Features
from router.predictor import Prediction
from training.dataset import CHARACTERS_A_TOKEN, Dataset, split_folds
from training.estimator import QualityEstimator, source_weights

Floats = NDArray[np.float64]
Steps = NDArray[np.intp]

# The share of steps that must be served well enough, on the training rows, when the threshold is picked.
SUFFICIENT = 0.95
# US dollars per million input tokens of TwinRouterBench's tiers: DeepSeek v3.2, MiniMax M2.7, Gemini 3 Flash and
# Claude Opus 4.6 on 2026-04-23, as its paper lists them. What an answer is long, and what a cache spares, is in no row.
TIER_PRICES: Mapping[str, float] = MappingProxyType({"low": 0.252, "mid": 0.3, "mid_high": 0.5, "high": 5.0})


@dataclass(frozen=True)
class StepFigures:
    """What a router of steps does.

    Attributes
    ----------
    exact : float
        Share of steps sent to the cheapest tier that is enough.
    sufficient : float
        Share of steps sent to a tier that is enough.
    runs_sufficient : float
        Share of runs all of whose steps are.
    cost : float
        US dollars a run, of the input alone.
    cost_saving : float
        Share of the dollars of always the highest tier that is saved.
    """

    exact: float
    sufficient: float
    runs_sufficient: float
    cost: float
    cost_saving: float


@dataclass(frozen=True)
class StepTable:
    """Routers of steps on one dataset; figures are means over fold seeds."""

    name: str
    title: str
    n: int
    runs: int
    repeats: int
    lines: tuple[tuple[str, str, StepFigures], ...]
    digest: str
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        methods = {name: {"trained_on": on, **asdict(figures)} for name, on, figures in self.lines}
        return {**{key: value for key, value in vars(self).items() if key != "lines"}, "methods": methods}


@dataclass(frozen=True)
class StepTask:
    """Steps with the quality of each tier: 1 from the cheapest that is enough upwards; a group is a run."""

    name: str
    title: str
    dataset: Dataset
    features: Features
    folds: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(
        cls, name: str, title: str, dataset: Dataset, features: Features, folds: int, repeats: int, seed: int
    ) -> StepTask:
        """Whole runs in one fold, for each of ``repeats`` seeds."""
        split = tuple(split_folds(dataset.groups, folds, seed + r) for r in range(repeats))
        return cls(name, title, dataset, features, split)


def step_figures(chosen: Steps, needed: Steps, runs: NDArray[Any], cost: Floats) -> StepFigures:
    """Measure the tiers that were chosen.

    Parameters
    ----------
    chosen, needed : ndarray of int, shape (n,)
        Tiers from cheapest to dearest; the least that is enough.
    runs : ndarray, shape (n,)
        The run that a step is of.
    cost : ndarray, shape (n, T)
        US dollars of a step at each tier.
    """
    enough = chosen >= needed
    _, run = np.unique(runs, return_inverse=True)
    steps, good = np.bincount(run), np.bincount(run, enough)
    spent, highest = cost[np.arange(len(chosen)), chosen].sum(), cost[:, -1].sum()
    return StepFigures(
        exact=float((chosen == needed).mean()),
        sufficient=float(enough.mean()),
        runs_sufficient=float((good == steps).mean()),
        cost=float(spent / len(steps)),
        cost_saving=float(1.0 - spent / highest),
    )


def sufficient_threshold(prediction: Prediction, needed: Steps, share: float = SUFFICIENT) -> float:
    """The highest threshold with which at least ``share`` of the steps get a tier that is enough.

    The predictions must be of rows that their estimator was not fitted on.
    """
    losses = np.quantile(prediction.gain.max(axis=1, keepdims=True) - prediction.gain, np.linspace(1, 0, 101))
    for threshold in losses:
        if (prediction.choose(float(threshold)) >= needed).mean() >= share:
            return float(threshold)
    return -1.0  # pays for the dearest that could be worth it


def run_steps(
    task: StepTask,
    *,
    seed: int = 0,
    jobs: int = -1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepTable:
    """Route the steps of held-out runs: by the learned router, by a logistic regression, and blindly."""
    dataset = task.dataset
    tiers = len(dataset.targets)
    needed = (dataset.quality > 0).argmax(axis=1)
    characters = np.array([prompt.state.characters or prompt.characters for prompt in dataset.prompts])
    price = np.array([TIER_PRICES[name] for name in dataset.targets])
    cost = characters[:, None] / CHARACTERS_A_TOKEN * price / 1e6

    todo = [(r, k) for r, fold in enumerate(task.folds) for k in np.unique(fold)]
    results = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_fold)(dataset, task.features, needed, task.folds[r] != k, seed + r) for r, k in todo
    )
    chosen = {name: np.zeros((len(task.folds), len(dataset)), dtype=np.intp) for name in _TRAINED}
    for done, ((r, k), found) in enumerate(zip(todo, results, strict=True), start=1):
        for name, tier in zip(_TRAINED, found, strict=True):
            chosen[name][r, task.folds[r] == k] = tier
        progress(done, len(todo))
    for t, target in enumerate(dataset.targets):
        chosen[f"always {target}"] = np.full((1, len(dataset)), t)
    chosen["random"] = np.random.default_rng(seed).integers(tiers, size=(10, len(dataset)))

    rows = round(float(np.mean([(task.folds[0] != k).sum() for k in np.unique(task.folds[0])])))
    lines = []
    for name, runs in chosen.items():
        figures = [asdict(step_figures(one, needed, dataset.groups, cost)) for one in runs]
        mean = StepFigures(**{key: float(np.mean([one[key] for one in figures])) for key in figures[0]})
        lines.append((name, f"{rows:,} of these steps" if name in _TRAINED else "nothing", mean))
    return StepTable(
        name=task.name,
        title=task.title,
        n=len(dataset),
        runs=len(np.unique(dataset.groups)),
        repeats=len(task.folds),
        lines=tuple(lines),
        digest=dataset.digest,
    )


_TRAINED = ("learned", "logistic")


def _fold(
    dataset: Dataset, features: Features, needed: Steps, train: NDArray[np.bool_], seed: int
) -> tuple[Steps, Steps]:
    """Tiers for the rows that are not trained on: the learned router's and the logistic regression's."""
    inside, outside = np.flatnonzero(train), np.flatnonzero(~train)
    part = dataset.select(inside)
    with threadpool_limits(limits=1):  # folds run beside one another
        estimator = QualityEstimator(dataset.targets, seed=seed)
        estimator.fit(features.take(inside), part.quality, part.groups, source_weights(part.sources))
        threshold = sufficient_threshold(estimator.out_of_fold_, needed[inside])
        learned = estimator.predict(features.take(outside)).choose(threshold)
        # TwinRouterBench's own baseline: a logistic regression on the state of the conversation and its embedding.
        inputs = np.hstack([features.embedding, features.dense]).astype(np.float64)
        tiers = np.unique(needed[inside])
        if len(tiers) == 1:
            return learned, np.full(len(outside), tiers[0])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, random_state=seed))
        model.fit(inputs[inside], needed[inside])
        logistic: Steps = model.predict(inputs[outside])
    return learned, logistic
