"""Reading, checking, splitting and writing labelled datasets."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router.errors import DatasetError, UsageError
from training.dataset import Dataset, load_dataset, split_folds, write_dataset

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "NA", "quality": {"weak": 0, "strong": 1.0}, "cost": {"weak": 0.5}},
    {"id": "b", "prompt": 'null, "quoted"\r\nnext\nlast', "domain": "law", "quality": {"weak": 1.0}},
    {
        "id": "c",
        "messages": [{"role": "user", "content": "nan"}, {"role": "assistant", "content": None}],
        "tools": [{"type": "function", "function": {"name": "ls"}}],
        "source": "agents",
        "quality": {"strong": 0.25},
        "output_tokens": {"weak": 12, "strong": 80},
    },
]


def write(path: Path, rows: Sequence[object]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Say hello", "quality": {"weak": 0.0, "strong": 1.0}, **fields}


def error(path: Path, rows: Sequence[object], **options: Any) -> str:
    with pytest.raises(DatasetError) as raised:
        load_dataset([write(path, rows)], **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "jsonl.gz", "csv.gz", "parquet.gz"])
def test_a_dataset_reads_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    assert write_dataset(ROWS, path) == 3
    dataset = load_dataset([path])
    assert list(dataset.ids) == ["a", "b", "c"]
    assert list(dataset.sources) == ["rows", "rows", "agents"]
    assert list(dataset.domains) == ["", "law", ""]
    assert [prompt.text for prompt in dataset.prompts] == ["NA", 'null, "quoted"\r\nnext\nlast', "nan"]
    assert dataset.prompts[2].state.tools_offered == 1
    assert dataset.prompts[2].state.depth == 2
    assert dataset.targets == ("weak", "strong")
    np.testing.assert_array_equal(dataset.quality, [[0, 1], [1, np.nan], [np.nan, 0.25]])
    np.testing.assert_array_equal(dataset.cost, [[0.5, np.nan], [np.nan, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(dataset.output_tokens, [[np.nan, np.nan], [np.nan, np.nan], [12, 80]])
    assert dataset.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert dataset.report.files[0].rows == 3
    assert not dataset.report.extra_fields


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.gz", "parquet"])
def test_equal_rows_give_equal_files(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
    write_dataset(ROWS, first)
    write_dataset(ROWS, second)
    assert first.read_bytes() == second.read_bytes()
    if suffix.endswith("gz"):
        assert first.read_bytes()[4:8] == bytes(4)  # no time of writing


def test_writing_leaves_the_old_file_when_it_fails(file: Path) -> None:
    file.write_text("old")
    with pytest.raises(TypeError):
        write_dataset([ROWS[0], {"prompt": object()}], file)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_flat_columns_keep_the_formats_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_dataset([{"quality": {"m": 1}, "id": "1"}, {"note": "n", "prompt": "p", "quality": {"k": 0}}], path)
    header = path.read_text().splitlines()[0]
    assert header == "id,prompt,quality.m,quality.k,note"


def test_files_are_joined_and_targets_united(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [row(id="1")])
    two = write(tmp_path / "two.jsonl", [{"id": "2", "prompt": "x", "quality": {"other": 0.5}}])
    dataset = load_dataset([one, two])
    assert dataset.targets == ("weak", "strong", "other")
    np.testing.assert_array_equal(dataset.quality, [[0, 1, np.nan], [np.nan, np.nan, 0.5]])
    assert dataset.digest not in (load_dataset([one]).digest, load_dataset([two, one]).digest)


def test_rows_without_an_id_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one = write(tmp_path / "x" / "rows.jsonl", ["", row(), row(prompt="other")])
    two = write(tmp_path / "y" / "rows.jsonl", [row(id=7)])
    assert list(load_dataset([one]).ids) == ["rows:2", "rows:3"]
    both = load_dataset([one, two])
    assert list(both.ids) == ["x/rows:2", "x/rows:3", "7"]
    assert list(both.sources) == ["x/rows", "x/rows", "y/rows"]
    versions = [write(tmp_path / f"v1.{i}.jsonl", [row()]) for i in (1, 2)]
    assert list(load_dataset(versions).ids) == ["v1.1:1", "v1.2:1"]
    with pytest.raises(DatasetError, match="ids must be unique"):
        load_dataset([one, one])


def test_targets_choose_and_order_the_columns(file: Path) -> None:
    dataset = load_dataset(
        [write(file, [row(), row(prompt="x", quality={"strong": 0.5})])], targets=["strong"]
    )
    assert dataset.targets == ("strong",)
    np.testing.assert_array_equal(dataset.quality, [[1], [0.5]])


def test_a_row_that_no_target_has_a_label_for_is_bad(file: Path) -> None:
    rows = [
        row(),
        row(prompt="x", quality={"strong": 0.5}),
        row(prompt="y", quality={"weak": None, "strong": 1}),
    ]
    message = error(file, rows, targets=["weak"])
    assert f"{file}:2: quality: no label for weak; {file}:3:" in message
    assert "2 bad rows" in message


def test_an_unknown_target_is_a_wrong_call_that_names_the_known(file: Path) -> None:
    write(file, [row()])
    with pytest.raises(UsageError, match=r"unknown model gpt-9; the dataset has labels for weak, strong"):
        load_dataset([file], targets=["weak", "gpt-9"])
    with pytest.raises(UsageError, match="gpt-9"):
        load_dataset([file]).for_targets(["gpt-9"])
    with pytest.raises(UsageError, match="named twice"):
        load_dataset([file], targets=["weak", "weak"])


def test_a_sufficient_target_becomes_qualities_along_the_ladder(file: Path) -> None:
    rows = [{"prompt": str(i), "sufficient": name} for i, name in enumerate(("mid", "low", "high"))]
    dataset = load_dataset([write(file, rows)], ladder=["low", "mid", "high"])
    assert dataset.targets == ("low", "mid", "high")
    np.testing.assert_array_equal(dataset.quality, [[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    assert "rows.jsonl:1: sufficient: needs the ladder" in error(file, rows)
    assert 'sufficient: "high" is not on the ladder low,mid' in error(file, rows, ladder=["low", "mid"])


def test_measured_quality_comes_before_the_ladder(file: Path) -> None:
    rows = [row(sufficient="strong", quality={"weak": 0.5, "strong": 0.25})]
    dataset = load_dataset([write(file, rows)], ladder=["weak", "strong"])
    np.testing.assert_array_equal(dataset.quality, [[0.5, 0.25]])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quality": {"weak": 1.7}}, "quality.weak: 1.7 is not between 0 and 1"),
        ({"quality": {"weak": -0.1}}, "quality.weak: -0.1 is not between 0 and 1"),
        ({"quality": {"weak": True}}, "quality.weak: is the boolean true; write 1"),
        ({"quality": {"weak": "0.5"}}, 'quality.weak: "0.5" is not a number'),
        ({"quality": {"weak": float("nan")}}, "quality.weak: NaN is not a number"),
        ({"quality": {"weak": None}}, "quality: has no label"),
        ({"quality": {}}, "quality: has no label"),
        ({"quality": 1}, "quality: must be an object"),
        ({"quality": {"": 1}}, "quality: a number has no model's name"),
        ({"cost": {"weak": -1}}, "cost.weak: -1 is not 0 or more"),
        ({"cost": {"weak": float("inf")}}, "cost.weak: Infinity is not 0 or more"),
        ({"output_tokens": {"weak": [3]}}, "output_tokens.weak: [3] is not a number"),
        ({"prompt": None}, "prompt: is null"),
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"prompt": 3}, "prompt: must be text, is 3"),
        ({"prompt": "\ud83d"}, "prompt: holds half of a surrogate pair"),
        ({"domain": ["x"]}, 'domain: must be text, is ["x"]'),
        ({"messages": []}, "messages: must be a list with at least one message"),
        ({"messages": [{"content": "x"}]}, "messages[0]: must be an object with a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls: must be a list"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages: hold no text"),
        (
            {"messages": [{"role": "user", "content": "x"}], "tools": ["ls"]},
            "tools: must be a list of objects",
        ),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(file: Path, fields: dict[str, Any], expected: str) -> None:
    message = error(file, [row(prompt="fine"), row(**fields)])
    assert f"{file}:2: {expected}" in message


def test_a_row_without_a_prompt_says_so(file: Path) -> None:
    message = error(file, [{"text": "Hi", "quality": {"weak": 1}}])
    assert f"{file}:1: prompt: is missing; found text, quality" in message


def test_malformed_lines_are_found_in_one_pass(file: Path) -> None:
    deep = "[" * 100_000
    message = error(file, [row(), '{"prompt": ', "[1]", deep, row(id="x"), row(id="x")])
    assert f"{file}:2: malformed JSON at column 11" in message
    assert f"{file}:3: must be a JSON object" in message
    assert f"{file}:4: malformed JSON" in message
    assert f"{file}:6" not in message  # the first three are shown, all are counted
    assert "(4 bad rows in all)" in message


def test_bytes_that_are_not_utf8_are_a_bad_row(file: Path) -> None:
    file.write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DatasetError, match=r"rows.jsonl:2: is not UTF-8"):
        load_dataset([file])


def test_skipped_rows_are_counted_and_listed(file: Path) -> None:
    rows = [row(id="1"), "{", row(id="1"), row(id="2", quality={"weak": 3}), row(id="3", note=1, stars=5)]
    write(file, [*rows, row(id="4", quality={"strong": 1}), row(id="5", quality={"weak": 1})])
    report = load_dataset([file], targets=["weak"], skip_bad_rows=True).report
    found = [(bad.line, bad.field) for bad in report.skipped]
    assert found == [(2, ""), (3, "id"), (4, "quality.weak"), (6, "quality")]
    assert report.files[0].rows == 3
    assert report.extra_fields == {"note": 1, "stars": 1}


def test_a_duplicate_id_names_both_places(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [row(id="x")])
    two = write(tmp_path / "two.jsonl", [row(id="y"), row(id="x")])
    with pytest.raises(DatasetError, match=rf"{two}:2: id: 'x' is also at {one}:1"):
        load_dataset([one, two])


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_has_no_rows(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(DatasetError, match="has no rows"):
        load_dataset([file])


def test_nothing_is_left_when_all_rows_are_bad(file: Path) -> None:
    assert "no usable row is left" in error(file, ["{", "{"], skip_bad_rows=True)


def test_a_single_class_cannot_be_learned(file: Path) -> None:
    rows = [row(prompt=str(i), quality={"weak": 1, "strong": 1.0}) for i in range(3)]
    assert "every quality is 1" in error(file, rows)


def test_a_csv_needs_its_cells_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,quality.weak,quality.strong\nx,0,1\ny,0\nz,true,1\n"a\nb",1,\nq,high,\n')
    with pytest.raises(DatasetError) as raised:
        load_dataset([path])
    message = str(raised.value)
    assert f"{path}:3: has 2 fields where the header has 3" in message
    assert f"{path}:4: quality.weak: is the boolean true; write 1" in message
    assert f'{path}:7: quality.weak: "high" is not a number' in message
    path.write_text("prompt,quality.weak,quality.weak\nx,0,1\n")
    with pytest.raises(DatasetError, match=r"rows.csv:1: column 'quality.weak' appears more than once"):
        load_dataset([path])


def test_a_csv_of_spreadsheets_and_long_prompts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "word " * 50_000
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)  # \r\n at line ends, a byte order mark in front
        writer.writerows([["prompt", "quality.weak"], [long, 1], ["NaN", 0]])
    dataset = load_dataset([path])
    assert dataset.prompts[0].characters == len(long.strip())
    assert dataset.prompts[1].text == "NaN"


def test_parquet_may_nest_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": "hello", "name": None}]
    table = pa.table(
        {
            "messages": [messages, messages],
            "quality": [{"weak": 1.0, "strong": None}, {"weak": 0.0, "strong": 1.0}],
        }
    )
    pq.write_table(table, path)
    np.testing.assert_array_equal(load_dataset([path]).quality, [[1, np.nan], [0, 1]])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        load_dataset([path])


def test_a_truncated_gzip_is_an_error_not_half_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row(id=str(i))) + "\n" for i in range(2000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="damaged gzip file"):
        load_dataset([path], skip_bad_rows=True)


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pickle", "rows.joblib", "rows.pkl.gz", "rows.jsonl", "rows.csv"]
)
def test_a_pickle_is_refused_unread(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(ROWS))
    with pytest.raises(DatasetError, match="is a pickle, and reading a pickle can run any code"):
        load_dataset([path])


def test_a_wrong_path_is_a_wrong_call(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "no.jsonl", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(UsageError, match=what):
            load_dataset([path])
    other = tmp_path / "rows.txt"
    other.write_text("x")
    with pytest.raises(UsageError, match=r"suffix \.txt is not one of \.jsonl, \.csv, \.parquet"):
        load_dataset([other])
    with pytest.raises(UsageError, match="no dataset"):
        load_dataset([])


def test_identical_prompts_and_group_names_join_groups(file: Path) -> None:
    rows = [
        row(id="1", prompt="Hello  World", group="g"),
        row(id="2", prompt="unrelated"),
        row(id="3", prompt="third", group="h"),
        row(id="4", prompt="hello world", group="h"),  # joins g and h
        row(id="5", messages=[{"role": "user", "content": "THIRD\n"}]),
    ]
    assert list(load_dataset([write(file, rows)]).groups) == ["1", "2", "1", "1", "1"]


@pytest.fixture
def dataset(file: Path) -> Dataset:
    rows = [row(id=str(i), prompt=f"p{i}", quality={"weak": i / 10, "strong": 1}) for i in range(6)]
    return load_dataset([write(file, rows)])


def test_select_takes_a_mask_or_indices(dataset: Dataset) -> None:
    by_mask = dataset.select(np.array([True, False, True, False, False, False]))
    assert list(by_mask.ids) == ["0", "2"]
    by_index = dataset.select([4, 1])
    assert list(by_index.ids) == ["4", "1"]
    assert [prompt.text for prompt in by_index.prompts] == ["p4", "p1"]
    np.testing.assert_array_equal(by_index.quality[:, 0], [0.4, 0.1])
    assert by_index.cost.shape == (2, 2)
    assert len(dataset.select([])) == 0
    assert by_index.digest == dataset.digest
    with pytest.raises(ValueError, match="mask of shape"):
        dataset.select([True, False])


def test_for_targets_reorders_every_column(dataset: Dataset) -> None:
    turned = dataset.for_targets(["strong", "weak"])
    assert turned.targets == ("strong", "weak")
    np.testing.assert_array_equal(turned.quality, dataset.quality[:, ::-1])
    assert turned.output_tokens.shape == (6, 2)


def test_folds_keep_groups_whole_and_sizes_even() -> None:
    groups = np.array([f"g{i % 40}" for i in range(400)] + ["big"] * 100)
    folds = split_folds(groups, 5, seed=3)
    for name in np.unique(groups):
        assert len(set(folds[groups == name])) == 1
    np.testing.assert_array_equal(np.bincount(folds), [100] * 5)


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    groups = np.array([f"g{i}" for i in range(50)])
    folds = split_folds(groups, 5, seed=1)
    np.testing.assert_array_equal(folds, split_folds(groups, 5, seed=1))
    assert (folds != split_folds(groups, 5, seed=2)).any()
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(folds[order], split_folds(groups[order], 5, seed=1))


def test_folds_need_enough_groups() -> None:
    with pytest.raises(UsageError, match="2 groups of prompts cannot make 3 folds"):
        split_folds(["a", "b", "a"], 3, seed=0)
    with pytest.raises(UsageError, match="at least 2"):
        split_folds(["a", "b"], 1, seed=0)
