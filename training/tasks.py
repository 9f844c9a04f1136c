"""The public originals as tasks of the benchmark: which rows, how they are split, and what is studied on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from joblib import Memory
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router.bundle import prompt_hashes
from router.features import Encoder, Features
from training.comparison import Floats, Rows, Task, code_version
from training.dataset import Dataset, load_dataset, split_folds, write_dataset
from training.embeddings import cache_dir, near_duplicate_groups
from training.estimator import QualityEstimator, source_weights
from training.evaluation import pair_rows
from training.novelty_study import NoveltyStudy, novelty_study
from training.records import read_records
from training.sources import convert
from training.sources.twinrouterbench import LADDER
from training.steps import StepTask
from training.studies import (
    GroupedRows,
    StudyTask,
    guarantee_task,
    ladder_task,
)
from training.train import default_threshold, features_of


class Absent(Exception):
    """The files of a task are not in the folder."""


def merged_groups(features: Features, groups: NDArray[np.str_]) -> NDArray[np.str_]:
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
            self._loaded[key] = (dataset, features, merged_groups(features, dataset.groups))
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

FOLDS = 5

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
    pair: GroupedRows,
    repeats: int,
    seed: int,
    *,
    by: NDArray[np.str_] | None = None,
    **options: Any,
) -> Task:
    """A task of ``FOLDS``-fold cross-validation, split by group, or by the labels ``by`` of shape (n,)."""
    groups = pair[2]
    runs = []
    for r in range(repeats):
        fold = split_folds(groups if by is None else by, FOLDS, seed + r)
        runs.append(
            tuple(_apart(np.flatnonzero(fold != k), np.flatnonzero(fold == k), groups) for k in range(FOLDS))
        )
    rows = round(float(np.mean([len(train) for train, _ in runs[0]])))
    learned_from = f"{rows:,} of these rows" + ("" if by is None else ", other subjects")
    return Task(name, title, *pair, tuple(runs), learned_from, **options)


def few_shot(
    name: str,
    title: str,
    pair: GroupedRows,
    rows: int,
    draws: int,
    seed: int,
) -> Task:
    """A task that trains on ``rows`` drawn rows, in whole groups, and tests on all others."""
    groups = pair[2]
    if len(groups) <= rows:
        raise Absent(f"{len(groups)} rows are too few to draw {rows} of them")
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    runs = []
    for r in range(draws):
        shuffled = np.random.default_rng(seed + r).permutation(len(sizes))
        # The last group may carry the draw a few rows beyond what was asked.
        enough = int(np.searchsorted(np.cumsum(sizes[shuffled]), rows)) + 1
        drawn = np.isin(member, shuffled[:enough])
        runs.append(((np.flatnonzero(drawn), np.flatnonzero(~drawn)),))
    return Task(name, title, *pair, tuple(runs), f"{rows:,} rows of the same benchmark", curve=False)


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
    rows = material.pair(_MMLU + _GSM8K + _MTBENCH, _MIXTRAL, _GPT4)
    there = rows[0].sources == "routellm-mtbench"
    train, test = _apart(np.flatnonzero(~there), np.flatnonzero(there), rows[2])
    title = "MT-Bench, by what MMLU and GSM8K taught"
    yield Task("mtbench", title, *rows, (((train, test),),), f"{len(train):,} rows of MMLU and GSM8K")


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


def out_of_fold_score(rows: GroupedRows, encoder_hash: str, seed: int) -> Floats:
    return whole_fit(rows, encoder_hash, seed).score


def _guarantee(material: Material, repeats: int, seed: int) -> Iterator[StudyTask]:
    for name, title, sources in (
        ("mmlu", "MMLU", _MMLU),
        ("gsm8k", "GSM8K", _GSM8K),
        ("mixed", "MMLU and GSM8K together", _MMLU + _GSM8K),
    ):
        rows = material.pair(sources, _MIXTRAL, _GPT4)
        score = partial(out_of_fold_score, rows, material.encoder.hash, seed)
        yield guarantee_task(f"guarantee-{name}", f"Promises on {title}", rows, score, seed)


def _ladder(material: Material, repeats: int, seed: int) -> Iterator[StudyTask]:
    place = "routerbench"
    whole = load_dataset([material.convert("routerbench", place)])
    means = np.nanmean(whole.cost, axis=0)
    dataset = whole.for_targets([whole.targets[t] for t in np.argsort(means, kind="stable")])
    features = material.features(dataset, place)
    rows = (dataset, features, merged_groups(features, dataset.groups))
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
