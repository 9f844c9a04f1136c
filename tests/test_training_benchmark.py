from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import Labelled, labelled

from router.encoder import OnnxEncoder
from router.errors import UsageError
from router.features import Features
from router.predictor import Prediction
from training import comparison
from training.baselines import matrix_factorisation, prompt_length
from training.benchmark import Benchmark, benchmark
from training.comparison import FITTED, METHODS, ORDERS, Table, Task, code_version, run
from training.dataset import Dataset
from training.evaluation import Fold
from training.metrics import apgr, cost_quality_curve
from training.peers import PeerError, PeerScores, peer_scores
from training.tables import benchmark_markdown
from training.tasks import Absent, cross_validated, few_shot

Floats = NDArray[np.float64]
ROWS = 240


def dataset_of(rows: Labelled, groups: NDArray[np.str_], dollars: bool = False) -> Dataset:
    n = len(rows.prompts)
    cost = np.tile([0.001, 0.01], (n, 1)) if dollars else np.full((n, 2), np.nan)
    return Dataset(
        ids=rows.groups,
        sources=np.full(n, "synthetic"),
        domains=np.array([f"d{i % 6}" for i in range(n)]),
        groups=rows.groups,
        prompts=rows.prompts,
        targets=("weak", "strong"),
        quality=rows.quality,
        cost=cost,
        output_tokens=np.full((n, 2), np.nan),
        digest="0" * 64,
    )


def material(dollars: bool = False) -> tuple[Dataset, Features, NDArray[np.str_]]:
    rows = labelled(ROWS, word_signal=2.5, embedding_signal=2.5, seed=3)
    # Every third row stands for a near-duplicate of the one before it.
    groups = np.array([f"g{i - (i % 3 == 1)}" for i in range(ROWS)])
    return dataset_of(rows, groups, dollars), rows.features, groups


@pytest.fixture(scope="module")
def task() -> Task:
    dataset, features, groups = material(dollars=True)
    made = cross_validated("synthetic", "Synthetic", (dataset, features, groups), 2, 0, reversed_length=True)
    return replace(made, parts={"d0": dataset.domains == "d0"})


def quick_fold(
    dataset: Dataset, features: Features, train: NDArray[np.intp], test: NDArray[np.intp], *, seed: int
) -> Fold:
    """Stands for the estimator, which takes seconds a fold and has tests of its own."""
    gain = matrix_factorisation(
        dataset.select(train), dataset.select(test), features.embedding[train], features.embedding[test], seed
    )
    weak = np.full(len(test), dataset.quality[train, 0].mean())
    prediction = Prediction(
        dataset.targets, np.stack([weak, weak + gain], axis=1), np.stack([0 * gain, gain], axis=1)
    )
    return Fold(prediction, gain > 0.0, {})


def quick_peer(name: str, prompts: Sequence[str], python: str) -> PeerScores:
    """Stands for the peers' processes: half of the scores are equal."""
    return PeerScores("peer 1.0", [float(max(len(prompt), 40)) for prompt in prompts])


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "learned_fold", quick_fold)
        patch.setattr(comparison, "peer_scores", quick_peer)
        yield


@pytest.fixture(scope="module")
def tables(task: Task) -> list[Table]:
    return run(task, resamples=100, jobs=1)


def test_every_method_has_a_line_with_what_it_was_trained_on(tables: list[Table]) -> None:
    whole, part = tables
    assert [line.method for line in whole.lines] == list(METHODS)
    assert whole.n == ROWS
    assert part.n == ROWS // 6
    for line in whole.lines:
        assert line.trained_on
        if line.method == "uncommonroute":
            assert line.figures is None
            assert "--peers" in line.why_not
        else:
            assert line.figures is not None
            assert 0.0 < line.figures.apgr < 1.5
            assert line.figures.cost_saving_at_95 is not None


def test_rows_that_were_merged_are_counted_and_not_split(task: Task, tables: list[Table]) -> None:
    assert tables[0].merged == ROWS // 3
    assert tables[0].groups == ROWS - ROWS // 3
    for folds in task.runs:
        assert sorted(np.concatenate([test for _, test in folds])) == list(range(ROWS))
        for train, test in folds:
            assert not set(task.groups[train]) & set(task.groups[test])


def test_the_learned_router_is_ahead_of_chance_and_the_marks_say_so(tables: list[Table]) -> None:
    lines = {line.method: line for line in tables[0].lines}
    learned, random = lines["learned"], lines["random"]
    assert learned.ahead is None
    assert learned.figures is not None
    assert random.figures is not None
    assert random.ahead is not None
    assert random.ahead.value == pytest.approx(learned.figures.apgr - random.figures.apgr)
    assert 0.0 < random.ahead.low < random.ahead.value < random.ahead.high
    assert learned.figures.nested_quality is not None
    assert random.figures.nested_quality is None
    text = benchmark_markdown(Benchmark(tuple(tables), {"gsm8k": "not there"}, SETTINGS), "router-train …")
    (row,) = [line for line in text.splitlines() if line.startswith("| random") and "0." in line][:1]
    assert f"**{random.ahead.value:+.3f}" in row
    assert "not run: no --peers" in text
    assert "Skipped: gsm8k: not there." in text


SETTINGS = {
    "versions": {"numpy": "2"},
    "encoder": {"name": "e", "hash": "0" * 64},
    "seed": 0,
    "repeats": 2,
    "resamples": 100,
    "seconds": 60.0,
}


def test_the_same_seed_gives_the_same_figures_from_the_cache_and_without(
    task: Task, tables: list[Table], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "learned_fold", fail)
        patch.setattr(comparison, "BASELINES", {})
        patch.setattr(comparison, "peer_scores", fail)
        again = run(task, resamples=100, jobs=1)
    assert [table.as_dict() for table in again] == [table.as_dict() for table in tables]
    monkeypatch.setenv("ROUTER_CACHE_DIR", str(tmp_path))
    quick = replace(task, runs=(task.runs[0][:1],), parts={})
    monkeypatch.setattr(comparison, "PEERS", {})
    one, two = run(quick, resamples=20, jobs=1), run(quick, resamples=20, jobs=1)
    assert one[0].as_dict() == two[0].as_dict()
    json.dumps(one[0].as_dict(), allow_nan=False)


def test_a_change_to_the_estimator_leaves_the_baselines_scores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {method: code_version(method) for method in FITTED}
    for name in ("baselines.py", "calibration.py", "dataset.py", "estimator.py", "threshold.py"):
        (tmp_path / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(comparison, "__file__", str(tmp_path / "comparison.py"))
    changed = {method: code_version(method) for method in FITTED}
    (tmp_path / "estimator.py").write_text("x = 1", encoding="utf-8")
    again = {method: code_version(method) for method in FITTED}
    assert len(set(before.values())) == 2
    assert [method for method in FITTED if changed[method] != again[method]] == ["learned"]


def test_held_out_subjects_are_not_trained_on() -> None:
    dataset, features, groups = material()
    made = cross_validated("s", "S", (dataset, features, dataset.groups), 1, 0, by=dataset.domains)
    for train, test in made.runs[0]:
        assert not set(dataset.domains[train]) & set(dataset.domains[test])
    # Groups that reach over two subjects: the training side gives way.
    made = cross_validated("s", "S", (dataset, features, groups), 1, 0, by=dataset.domains)
    for train, test in made.runs[0]:
        assert not set(groups[train]) & set(groups[test])


def test_few_rows_are_drawn_in_whole_groups_and_the_rest_tests() -> None:
    dataset, features, groups = material()
    made = few_shot("few", "Few", (dataset, features, groups), 50, 3, seed=1)
    drawn = [folds[0][0] for folds in made.runs]
    for ((train, test),) in made.runs:
        assert 50 <= len(train) <= 51
        assert len(train) + len(test) == ROWS
        assert not set(groups[train]) & set(groups[test])
    assert len({tuple(train) for train in drawn}) == 3
    with pytest.raises(Absent, match="too few"):
        few_shot("few", "Few", (dataset, features, groups), ROWS, 3, seed=1)


def test_rows_that_a_run_does_not_test_count_in_none_of_its_figures() -> None:
    dataset, features, groups = material()
    made = few_shot("few", "Few", (dataset, features, groups), 120, 2, seed=1)
    (table,) = run(made, resamples=20, jobs=1)
    (length,) = [line.figures for line in table.lines if line.method == "prompt_length"]
    assert length is not None
    score = prompt_length(dataset, dataset, features.embedding, features.embedding, 0)
    by_hand = []
    for r in range(ORDERS):
        ((_, test),) = made.runs[r % 2]
        curve = cost_quality_curve(score[test], *dataset.quality[test].T, seed=r)
        by_hand.append(apgr(curve))
    assert length.apgr == pytest.approx(np.mean(by_hand))


def test_a_peer_that_is_not_installed_says_so() -> None:
    with pytest.raises(PeerError, match="uncommon_route"):
        peer_scores("uncommonroute", ["Why?"], sys.executable)
    with pytest.raises(PeerError, match="no-such-python"):
        peer_scores("uncommonroute", ["Why?"], "no-such-python")


def test_litellms_routers_score_each_prompt_in_order() -> None:
    """Two seconds: litellm is imported, in its own process."""
    hard = "Prove the theorem step by step:\n" + "solve the equation, then analyse the algorithm. " * 30
    found = peer_scores("litellm_rules", ["Hi", hard, "Hi"])
    assert found.version.startswith("litellm 1.")
    assert found.scores[0] == found.scores[2] < found.scores[1]


def test_what_is_wrong_with_the_call_is_said(tmp_path: Path, encoder: OnnxEncoder) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        benchmark(tmp_path / "nowhere", encoder)
    with pytest.raises(UsageError, match=r"known are mmlu, gsm8k"):
        benchmark(tmp_path, encoder, only=["mmlu", "nonsense"])
    with pytest.raises(UsageError, match=r"gsm8k: .*not there"):
        benchmark(tmp_path, encoder, only=["gsm8k"])


@pytest.mark.parametrize(
    ("peer", "expected", "tolerance"), [("litellm_heuristic_v2", 0.491, 0.01), ("litellm_rules", 0.538, 0.02)]
)
def test_litellm_on_gsm8k(
    peer: str, expected: float, tolerance: float, bench_data: Path, tmp_path: Path
) -> None:
    """Seconds, for an import and 1,307 prompts. Means over the orders of equal scores, of which there are many."""
    from training.dataset import load_dataset
    from training.sources import convert

    convert("routellm-gsm8k", bench_data / "routellm" / "gsm8k", tmp_path / "gsm8k.jsonl")
    rows = load_dataset([tmp_path / "gsm8k.jsonl"])
    score = peer_scores(peer, [prompt.text for prompt in rows.prompts]).scores
    found = [apgr(cost_quality_curve(score, *rows.quality.T, seed=seed)) for seed in range(ORDERS)]
    assert np.mean(found) == pytest.approx(expected, abs=tolerance)
