"""This router beside others: the same rows, the same folds, one table a dataset."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from router import __version__
from router.errors import UsageError
from router.features import Encoder, Features
from training.comparison import RESAMPLES, Table, run
from training.dataset import Dataset
from training.steps import StepTable, StepTask, run_steps
from training.studies import (
    SPLITS,
    STUDIES,
    Study,
    StudyTask,
    guarantee_task,
    ladder_task,
    run_study,
)
from training.tasks import (
    FOLDS,
    TASKS,
    Absent,
    Material,
    cross_validated,
    few_shot,
    merged_groups,
    out_of_fold_score,
)


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
    groups = merged_groups(features, pair.groups)
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
    score = partial(out_of_fold_score, rows, encoder.hash, seed)
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
