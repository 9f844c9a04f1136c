"""Questions of the benchmark that are no comparison of methods on one pair: promises, more than two targets, novelty."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.features import Features
from training.dataset import Dataset
from training.guarantee_study import GuaranteeStudy, guarantee_study
from training.ladder import LadderReport, crossval_targets
from training.novelty_study import NoveltyStudy

Floats = NDArray[np.float64]
# A dataset, its features, and its groups with near-duplicates merged.
GroupedRows = tuple[Dataset, Features, NDArray[np.str_]]

# Random halves that promises are studied on.
SPLITS = 200


@dataclass(frozen=True)
class StudyTask:
    """A question that is no comparison of methods on one pair.

    Attributes
    ----------
    name, title, trained_on, digest : str
    measure : callable
        Given the processes it may use and what to tell its progress (done, of how many).
    """

    name: str
    title: str
    trained_on: str
    digest: str
    measure: Callable[[int, Callable[[int, int], None]], GuaranteeStudy | LadderReport | NoveltyStudy]


@dataclass(frozen=True)
class Study:
    """What a :class:`StudyTask` found."""

    name: str
    title: str
    trained_on: str
    digest: str
    found: GuaranteeStudy | LadderReport | NoveltyStudy
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self), "found": self.found.as_dict()}


STUDIES: Mapping[str, type] = MappingProxyType(
    {"guarantee": GuaranteeStudy, "ladder": LadderReport, "novelty": NoveltyStudy}
)


def run_study(
    task: StudyTask,
    *,
    jobs: int = -1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Study:
    """Measure, and tell how long it took."""
    began = time.monotonic()
    found = task.measure(jobs, progress)
    return Study(task.name, task.title, task.trained_on, task.digest, found, time.monotonic() - began)


def guarantee_task(
    name: str, title: str, rows: GroupedRows, score: Callable[[], Floats], seed: int, splits: int = SPLITS
) -> StudyTask:
    """What promised thresholds cost and how often they break, on out-of-fold scores, shape (n,); a group counts as one row."""
    dataset, _, groups = rows

    def measure(jobs: int, progress: Callable[[int, int], None]) -> GuaranteeStudy:
        done = 0

        def show() -> None:
            nonlocal done
            done += 1
            progress(done, splits)

        progress(0, splits)
        weak, strong = dataset.quality.T
        return guarantee_study(score(), weak, strong, groups, splits=splits, seed=seed, progress=show)

    return StudyTask(name, title, f"{len(dataset):,} of these rows, out of fold", dataset.digest, measure)


def ladder_task(
    name: str, title: str, rows: GroupedRows, pair: tuple[str, str] | None, folds: int, seed: int
) -> StudyTask:
    """Routers over all targets of a dataset, cheapest first, cross-validated."""
    dataset, features, groups = rows

    def measure(jobs: int, progress: Callable[[int, int], None]) -> LadderReport:
        done = 0

        def show() -> None:
            nonlocal done
            done += 1
            progress(done, folds)

        progress(0, folds)
        return crossval_targets(
            dataset, features, pair=pair, folds=folds, groups=groups, seed=seed, jobs=jobs, progress=show
        )

    trained_on = f"{round(len(dataset) * (1 - 1 / folds)):,} of these rows"
    return StudyTask(name, title, trained_on, dataset.digest, measure)
