"""Readers of public formats: on rows of our own, and on the originals where they are at hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router.errors import DatasetError, UsageError
from training.dataset import load_dataset
from training.sources import SOURCES, ConvertReport, convert, read_source

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_the_names_are_those_of_the_command() -> None:
    assert list(SOURCES) == [
        "routellm-mmlu",
        "routellm-gsm8k",
        "routellm-mtbench",
        "routerbench",
        "alpacaeval",
        "arena",
        "uncommonroute",
        "twinrouterbench",
        "coderouterbench",
    ]
    with pytest.raises(UsageError, match="unknown source 'mmlu'; known are routellm-mmlu,"):
        read_source("mmlu", Path())


@pytest.mark.parametrize("source", SOURCES)
def test_a_path_that_is_not_there_is_a_wrong_call(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_source(source, tmp_path / "nowhere")


# --- RouteLLM


@pytest.mark.parametrize("below", ["", "responses"])  # ours is flat; RouteLLM's repository has a folder more
def test_mmlu_takes_the_subject_from_the_file_and_leaves_contaminated_rows_out(
    tmp_path: Path, below: str
) -> None:
    header = ["prompt", WEAK, STRONG]
    table(tmp_path / below / "mmlu_anatomy.csv", [header, ["Which bone?\nA. x", True, False], ["Seen", 1, 1]])
    table(tmp_path / below / "mmlu_high_school_physics.csv", [header, ["How fast?", "False", "True"]])
    jsonl(tmp_path / "contaminated_prompts.jsonl", [{"train_prompt": "How fast?", "eval_prompt": "Seen"}])
    reading = read_source("routellm-mmlu", tmp_path)
    assert reading.left_out == {"contaminated": 1}
    assert [row["domain"] for row in reading.rows] == ["anatomy", "high_school_physics"]
    assert reading.rows[0]["quality"] == {WEAK: 1.0, STRONG: 0.0}
    assert reading.rows[1]["quality"] == {WEAK: 0.0, STRONG: 1.0}
    assert reading.notes == ()


def test_a_missing_list_of_contaminated_prompts_is_said(tmp_path: Path) -> None:
    file = table(tmp_path / "deep" / "mmlu_law.csv", [["prompt", WEAK], ["q", True]])
    assert "could not be left out" in read_source("routellm-mmlu", file).notes[0]


def test_gsm8k_estimates_output_tokens_from_the_responses(tmp_path: Path) -> None:
    header = ["prompt", WEAK, STRONG, f"{WEAK}_response", f"{STRONG}_response"]
    table(tmp_path / "gsm8k_responses.csv", [header, ["2 + 2?", True, False, "four!", ""]])
    (row,) = read_source("routellm-gsm8k", tmp_path).rows
    assert row["quality"] == {WEAK: 1.0, STRONG: 0.0}
    assert row["output_tokens"] == {WEAK: 2}  # five characters, four a token, rounded up


def test_mtbench_averages_both_turns_and_routes_on_the_first(tmp_path: Path) -> None:
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
        {"question_id": 82, "category": "math", "turns": ["Fine.", "Seen before."]},
    ]
    scores = [(81, WEAK, 1, 4), (81, WEAK, 2, 7), (81, STRONG, 1, 10), (81, STRONG, 2, 9.1), (82, WEAK, 1, 1)]
    keys = ("question_id", "model", "turn", "score")
    jsonl(tmp_path / "question.jsonl", questions)
    judged = jsonl(tmp_path / "judgements.jsonl", [dict(zip(keys, score, strict=True)) for score in scores])
    jsonl(tmp_path / "contaminated_prompts.jsonl", [{"eval_prompt": "Seen before."}])
    reading = read_source("routellm-mtbench", tmp_path)
    assert reading.left_out == {"contaminated": 1}
    (row,) = reading.rows
    assert (row["prompt"], row["domain"]) == ("Write.", "writing")
    assert row["quality"] == pytest.approx({WEAK: 4.5 / 9, STRONG: 8.55 / 9})
    jsonl(judged, [{"question_id": 81, "model": WEAK, "turn": 1, "score": -1}])
    with pytest.raises(DatasetError, match=r"judgements.jsonl:1: score: -1 is not between 1 and 10"):
        read_source("routellm-mtbench", tmp_path)


# --- RouterBench

EXAMPLES = (
    "Pick one.\n\nSky?\nA) red\nAnswer:\nA\n\nGrass?\nA) green\nB) blue\nAnswer:\nA\n\n"
    "Sea?\nA) salty\nAnswer:"
)
HEADER = [
    "",
    "sample_id",
    "prompt",
    "eval_name",
    "m1",
    "m2",
    "m1|model_response",
    "m1|total_cost",
    "m2|total_cost",
]


def test_routerbench_keeps_the_last_question_alone(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        list(HEADER),
        [0, "arc.1", repr([EXAMPLES]), "arc", 1.0, 0.25, "['A']", 0.002, 0.0001],
        [1, "mbpp.1", repr(["Write f.\n\nIt adds."]), "mbpp", 0.0, 1.0, "['']", 0.001, 0.0002],
        [2, "raw.1", "[not a list", "raw", 0.0, 1.0, "", 0.001, 0.0002],
    ]
    reading = read_source("routerbench", table(tmp_path / "rb.csv", rows[:3]))
    assert [row["prompt"] for row in reading.rows] == ["Sea?\nA) salty\nAnswer:", "Write f.\n\nIt adds."]
    assert reading.rows[0]["quality"] == {"m1": 1.0, "m2": 0.25}
    assert reading.rows[0]["cost"] == {"m1": 0.002, "m2": 0.0001}
    with pytest.raises(DatasetError, match=r"rb.csv:\d+: prompt: is not a Python list literal"):
        read_source("routerbench", table(tmp_path / "rb.csv", [HEADER, rows[3]]))


def test_routerbench_joins_a_question_that_stands_in_two_rows(tmp_path: Path) -> None:
    table(tmp_path / "a.csv", [HEADER, [0, "arc.1", repr(["Q?"]), "arc", 1.0, "", "", 0.002, ""]])
    table(tmp_path / "b.csv", [HEADER, [9, "arc.1", repr(["Q?", "Q?"]), "arc", "", 0.5, "", "", 0.1]])
    reading = read_source("routerbench", tmp_path)
    (row,) = reading.rows
    assert row["quality"] == {"m1": 1.0, "m2": 0.5}
    assert "1 rows were joined" in reading.notes[0]


def test_routerbench_never_evaluates_a_prompt_and_never_opens_the_pickle(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    code = f"[open({str(trap)!r}, 'w').write('x')]"
    with pytest.raises(DatasetError, match="list literal"):
        read_source("routerbench", table(tmp_path / "rb.csv", [HEADER, [0, "s", code, "e", 1, 0, "", 1, 1]]))
    assert not trap.exists()
    original = tmp_path / "routerbench_0shot.pkl"
    original.write_bytes(b"\x80\x04.")
    with pytest.raises(DatasetError, match="is a pickle"):
        read_source("routerbench", original)


# --- Preferences


def test_alpacaeval_splits_a_preference_into_shares_won(tmp_path: Path) -> None:
    def annotation(preference: float | None) -> dict[str, Any]:
        return {
            "instruction": f"Say {preference}",
            "dataset": "koala",
            "generator_1": "gpt4",
            "generator_2": "small",
            "output_1": "x" * 9,
            "output_2": "y",
            "preference": preference,
        }

    file = tmp_path / "small" / "judge" / "annotations.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([annotation(p) for p in (1, 2.0, 1.25, None, float("nan"), 0)]))
    reading = read_source("alpacaeval", tmp_path)
    assert [row["quality"] for row in reading.rows] == [
        {"gpt4": 1.0, "small": 0.0},
        {"gpt4": 0.0, "small": 1.0},
        {"gpt4": 0.75, "small": 0.25},
    ]
    assert reading.left_out == {"no preference": 3}
    assert reading.rows[0]["output_tokens"] == {"gpt4": 3, "small": 1}
    assert len({row["id"] for row in reading.rows}) == 3
    file.write_text('{"instruction": "x"}')
    with pytest.raises(DatasetError, match="must be a list of objects"):
        read_source("alpacaeval", file)


BATTLES: list[dict[str, Any]] = [
    {"question_id": "q1", "model_a": "a", "model_b": "b", "winner": "model_a", "prompt": "First"},
    {"question_id": "q2", "model_a": "b", "model_b": "a", "winner": "model_a", "prompt": '["One", "Two"]'},
    {
        "question_id": "q3",
        "model_a": "a",
        "model_b": "b",
        "winner": "tie (bothbad)",
        "conversation_a": json.dumps(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
        ),
    },
    {"question_id": "q4", "model_a": "a", "model_b": "b", "winner": "model_b", "prompt": "[1, 2] is a list"},
    {"question_id": "q5", "model_a": "a", "model_b": "b", "winner": "?", "prompt": "x"},
    {"question_id": "q6", "model_a": "a", "model_b": "a", "winner": "tie", "prompt": "x"},
    {"question_id": "q7", "model_a": "a", "model_b": "b", "winner": "tie", "prompt": " "},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "json"])
def test_arena_reads_battles_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"battles.{suffix}"
    names = ["question_id", "model_a", "model_b", "winner", "prompt", "conversation_a"]
    if suffix == "jsonl":
        jsonl(path, BATTLES)
    elif suffix == "json":
        path.write_text(json.dumps(BATTLES))
    elif suffix == "csv":
        table(path, [names, *([row.get(name, "") for name in names] for row in BATTLES)])
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in BATTLES] for name in names}), path)
    reading = read_source("arena", path)
    assert [row["prompt"] for row in reading.rows] == ["First", "One", "Hi", "[1, 2] is a list"]
    assert [row["quality"]["a"] for row in reading.rows] == [1.0, 0.0, 0.5, 0.0]
    assert all(sum(row["quality"].values()) == 1 for row in reading.rows)
    assert reading.left_out == {
        "no winner": 1,
        "a model against itself": 1,
        "no text in the first user turn": 1,
    }


def test_arena_reads_lists_of_parts_and_columns_of_flags(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]}]
    rows = [
        {"id": 1, "model_a": "a", "model_b": "b", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        {"id": 2, "model_a": "a", "model_b": "b", "winner": "both_bad", "conversation_a": parts},
    ]
    rows[0]["prompt"] = "p"
    reading = read_source("arena", jsonl(tmp_path / "b.jsonl", rows))
    assert [row["quality"]["a"] for row in reading.rows] == [0.0, 0.5]
    assert reading.rows[1]["prompt"] == "Look"
    with pytest.raises(DatasetError, match=r"b.jsonl:1: winner: is missing; found model_a, model_b, prompt"):
        read_source("arena", jsonl(tmp_path / "b.jsonl", [{"model_a": "a", "model_b": "b", "prompt": "p"}]))


# --- Tiers


def test_uncommonroute_tiers_become_growing_gains(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{tier}", "expected_tier": tier, "category": "c", "lang": "en"}
        for tier in ("SIMPLE", "MEDIUM", "COMPLEX", "REASONING", "UNSURE")
    ]
    rows[1]["system_prompt"] = "You are terse."
    reading = read_source("uncommonroute", jsonl(tmp_path / "dev.jsonl", rows))
    gains = [row["quality"]["strong"] - row["quality"]["weak"] for row in reading.rows]
    assert gains == sorted(gains)
    assert len(set(gains)) == 4
    assert reading.left_out == {"unknown tier": 1}
    assert reading.rows[1]["messages"] == [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "pMEDIUM"},
    ]
    assert "judged" in reading.notes[0]


def step(tier: str, index: int) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    return {
        "id": f"run-1-{index}",
        "benchmark": "swebench",
        "instance_id": "run-1",
        "step_index": index,
        "messages": [
            {"role": "system", "content": "You fix bugs."},
            {"role": "user", "content": "Fix the parser."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2 failed, 3 passed"},
        ],
        "functions": [{"name": "bash"}],
        "target_tier": tier,
        "target_tier_id": 0,
    }


def test_twinrouterbench_steps_keep_their_run_and_their_state(tmp_path: Path) -> None:
    rows = [step("low", 1), step("mid_high", 2), step("high", 3), step("?", 4)]
    path = jsonl(tmp_path / "question_bank.jsonl", rows)
    report = convert("twinrouterbench", tmp_path, tmp_path / "out.jsonl")
    assert report.left_out == {"unknown tier": 1}
    dataset = load_dataset([tmp_path / "out.jsonl"])
    assert dataset.targets == ("low", "mid", "mid_high", "high")
    np.testing.assert_array_equal(dataset.quality, [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert len(set(dataset.groups)) == 1
    assert set(dataset.domains) == {"swebench"}
    state = dataset.prompts[0].state
    assert (state.tools_offered, state.last_result, state.last_result_failed_test) == (1, "run", True)
    for row in rows:
        row["messages"] = json.dumps(row["messages"])  # as the Parquet form has it
    assert len(read_source("twinrouterbench", jsonl(path, rows)).rows) == 3


def coderouterbench(folder: Path) -> Path:
    header = "task_id,split,dimension,model,score,cost_usd,input_tokens,output_tokens,cost_source\n"
    lines = [
        "t1,probing,bug_fixing,small,0.5,0.001,10,20,token_log_pricing",
        "t1,probing,bug_fixing,big,1.0,,1000000,100000,token_log_pricing",
        "t2,probing,algorithm,small,0.0,0,0,0,missing_token_record_zero_total",
        "t3,probing,algorithm,small,1.0,0.1,1,1,token_log_pricing",
    ]
    (folder / "id_results_long.csv").write_text(header + "\n".join(lines) + "\n")
    (folder / "id_probing_results_long.csv").write_text(header + lines[0] + "\n")
    tasks = [
        {"task_id": "t1", "dimension": "bug_fixing", "prompt": "Fix it."},
        {"task_id": "t2", "prompt": "Sort."},
    ]
    jsonl(folder / "id_tasks.jsonl", [*tasks, {"task_id": "t3", "dimension": "algorithm"}])
    jsonl(folder / "id_probing_tasks.jsonl", tasks[:1])
    (folder / "ood_results_long.csv").write_text(
        "task_id,bench,model,resolved,in_tok,out_tok,cost_usd\nnew::1,new,big,1,5,6,0.2\n"
    )
    jsonl(folder / "ood_tasks.jsonl", [{"task_id": "new::1", "dimension": "feature", "prompt": "Add it."}])
    models = [{"model": "big", "input_per_1m": 5.0, "output_per_1m": 25.0}]
    (folder / "models.json").write_text(json.dumps({"models": models}))
    return folder


def test_coderouterbench_joins_results_tasks_and_prices(tmp_path: Path) -> None:
    reading = read_source("coderouterbench", coderouterbench(tmp_path))
    rows = {row["prompt"]: row for row in reading.rows}
    assert list(rows) == ["Fix it.", "Sort.", "Add it."]
    assert rows["Fix it."]["quality"] == {"small": 0.5, "big": 1.0}
    assert rows["Fix it."]["cost"] == pytest.approx({"small": 0.001, "big": 7.5})  # tokens × price
    assert rows["Fix it."]["output_tokens"] == {"small": 20, "big": 100_000}
    assert "cost" not in rows["Sort."]  # zero because the record was lost
    assert rows["Add it."]["quality"] == {"big": 1.0}
    assert reading.left_out == {"no text of the task": 1}


def test_coderouterbench_names_the_columns_it_found(tmp_path: Path) -> None:
    coderouterbench(tmp_path)
    file = tmp_path / "ood_results_long.csv"
    file.write_text("task_id,llm,resolved\nnew::1,big,1\n")
    with pytest.raises(
        DatasetError, match="no model: column model is expected; found task_id, llm, resolved"
    ):
        read_source("coderouterbench", file)
    (tmp_path / "ood_tasks.jsonl").unlink()
    with pytest.raises(UsageError, match=r"ood_tasks.jsonl: no such file"):
        read_source("coderouterbench", file)


# --- convert


@pytest.fixture
def battles(tmp_path: Path) -> Path:
    rows = [
        {"question_id": "1", "model_a": "a", "model_b": "b", "winner": "model_a", "prompt": "p1"},
        {"question_id": "2", "model_a": "a", "model_b": "c", "winner": "model_b", "prompt": "p2"},
        {"question_id": "2", "model_a": "a", "model_b": "c", "winner": "model_b", "prompt": "p2"},
        {"question_id": "4", "model_a": "a", "model_b": "c", "winner": "tie", "prompt": "half \ud83d"},
    ]
    return jsonl(tmp_path / "battles.jsonl", rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv.gz", "parquet"])
def test_convert_writes_what_load_dataset_reads(battles: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    report = convert("arena", battles, out)
    assert isinstance(report, ConvertReport)
    assert (report.rows, report.read) == (2, 4)
    assert report.left_out["id: appears twice"] == 1
    assert sum(report.left_out.values()) == 2
    assert report.mean_quality == {"a": 0.5, "b": 0.0, "c": 1.0}
    dataset = load_dataset([out])
    assert dataset.targets == ("a", "b", "c")
    assert not dataset.report.extra_fields


def test_convert_renames_models(battles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    report = convert("arena", battles, out, {"b": "rest", "c": "rest"})
    assert report.mean_quality == {"a": 0.5, "rest": 0.5}
    assert convert("arena", battles, out, {"b": "a"}).left_out["two models of the row take one name"] == 1
    with pytest.raises(UsageError, match="cannot rename x; the source has a, b, c"):
        convert("arena", battles, out, {"x": "y"})


def test_convert_writes_nothing_when_no_row_is_left(battles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DatasetError, match="no row is left"):
        convert("arena", battles, out, {"b": "a", "c": "a"})
    assert not out.exists()


def test_convert_does_not_overwrite_the_original(battles: Path) -> None:
    before = battles.read_bytes()
    with pytest.raises(UsageError, match="is the original itself"):
        convert("arena", battles, battles)
    assert battles.read_bytes() == before


# --- The originals


@pytest.mark.parametrize(
    ("source", "folder", "rows", "read", "strong", "weak"),
    [
        ("routellm-mmlu", "routellm/mmlu", 14_037, 14_042, 0.80587, 0.68091),
        ("routellm-gsm8k", "routellm/gsm8k", 1_307, 1_319, 0.85769, 0.63734),
        ("routellm-mtbench", "routellm/mt_bench", 72, 80, (9.212 - 1) / 9, (8.281 - 1) / 9),
    ],
)
def test_routellm_figures_come_out_exactly(
    bench_data: Path,
    tmp_path: Path,
    source: str,
    folder: str,
    rows: int,
    read: int,
    strong: float,
    weak: float,
) -> None:
    report = convert(source, bench_data / folder, tmp_path / "out.jsonl")
    assert (report.rows, report.read) == (rows, read)
    assert report.left_out == {"contaminated": read - rows}
    tolerance = 5e-4 / 9 if source == "routellm-mtbench" else 5e-6
    assert report.mean_quality[STRONG] == pytest.approx(strong, abs=tolerance)
    assert report.mean_quality[WEAK] == pytest.approx(weak, abs=tolerance)


def test_mmlu_has_105_duplicated_prompts_and_57_subjects(bench_data: Path, tmp_path: Path) -> None:
    convert("routellm-mmlu", bench_data / "routellm/mmlu", tmp_path / "mmlu.jsonl")
    dataset = load_dataset([tmp_path / "mmlu.jsonl"], targets=[WEAK, STRONG])
    assert len(dataset) - len(np.unique(dataset.groups)) == 105
    assert len(np.unique(dataset.domains)) == 57
    weak, strong = dataset.quality.T
    assert 100 * np.mean(strong > weak) == pytest.approx(17.8, abs=0.05)
    assert 100 * np.mean(weak > strong) == pytest.approx(5.3, abs=0.05)


def test_routerbench_has_eleven_models_with_costs(bench_data: Path, tmp_path: Path) -> None:
    report = convert("routerbench", bench_data / "routerbench", tmp_path / "out.jsonl")
    assert report.rows == 3_164
    dataset = load_dataset([tmp_path / "out.jsonl"])
    assert len(dataset.targets) == 11
    assert not np.isnan(dataset.quality).any()
    assert not np.isnan(dataset.cost).any()
    heads = {prompt.text[:256] for prompt in dataset.prompts}
    assert len(heads) > 3_000  # worked examples would give all prompts of a benchmark the same head


def test_alpacaeval_and_uncommonroute_are_read_whole(bench_data: Path, tmp_path: Path) -> None:
    folder = bench_data / "alpaca_eval"
    report = convert("alpacaeval", folder / "Mixtral-8x7B-Instruct-v0.1", tmp_path / "out.jsonl")
    assert (report.rows, report.left_out) == (805, {})
    equal = convert("alpacaeval", folder / "FuseChat-Llama-3.2-3B-Instruct", tmp_path / "out.jsonl")
    assert equal.mean_quality["FuseChat-Llama-3.2-3B-Instruct"] == pytest.approx(0.5, abs=0.03)
    judged = convert("uncommonroute", bench_data / "uncommonroute", tmp_path / "out.jsonl")
    assert (judged.rows, judged.left_out) == (3_378, {})
    assert judged.mean_quality["strong"] - judged.mean_quality["weak"] == pytest.approx(0.175, abs=5e-4)
