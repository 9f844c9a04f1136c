from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import write_jsonl

import training.cli
from router import __version__
from router.bundle import load_bundle, read_manifest
from router.features import prompt_from_text
from router.predictor import load_predictor
from training.dataset import load_dataset

Run = Callable[..., tuple[int, str, str]]
PAIR = ("--weak", "weak", "--strong", "strong")
SEEN = "150 rows left out, the bundle was trained on them"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process: status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["router-train", *map(str, arguments)])
        # Folds in turn, not in processes: a test is too short for these.
        with joblib.parallel_config(backend="sequential"), pytest.raises(SystemExit) as ended:
            training.cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return call


def strictly(text: str) -> dict[str, Any]:
    """A single JSON object, without NaN, and nothing else."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    assert text.count("\n") == 1
    return found


def one_line(err: str) -> str:
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("router-train: ")
    assert "Traceback" not in err
    return err


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may tune."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def few_file(sample_rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """As few rows as can be trained on, with costs and tokens."""
    rows = [
        {**row, "output_tokens": {"weak": 100, "strong": 200}, "cost": {"weak": 0.0001, "strong": 0.004}}
        for row in sample_rows[:60]
    ]
    write_jsonl(tmp_path / "few.jsonl", rows)
    return tmp_path / "few.jsonl"


# --- The command itself ----------------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"router-train {__version__}\n", "")


def test_help(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for command in ("convert", "fetch", "label", "crossval", "fit", "evaluate", "tune", "export-encoder"):
        assert command in out
        status, text, _ = run(command, "--help")
        assert status == 0
        assert "Usage" in text


def test_without_a_command_the_help_is_shown_as_an_error(run: Run) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "crossval" in err
    assert err.count("\n") > 10


def test_an_interrupted_command_leaves_no_trace(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_file: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.dataset.load_dataset", interrupt)
    status, out, err = run("fit", tiny_file, *PAIR, "--out", "b")
    assert (status, out) == (130, "")
    assert "Traceback" not in err


def test_what_the_system_refuses_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_file: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/cache/x")

    monkeypatch.setattr("training.train.embed", refuse)
    status, _, err = run("fit", tiny_file, *PAIR, "--out", "b")
    assert status == 1
    assert err.splitlines()[-1] == "router-train: /cache/x: Permission denied"


# --- convert -------------------------------------------------------------------------------------------------------


def original(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "votes.jsonl"
    write_jsonl(path, rows)
    return path


VOTES = [
    {"model_a": "small", "model_b": "large", "winner": winner, "prompt": f"Question {i}?"}
    for i, winner in enumerate(["model_a", "model_b", "tie", "model_b"])
]


def test_convert_tells_what_it_did(run: Run, tmp_path: Path) -> None:
    path = original(tmp_path, VOTES)
    status, out, err = run("convert", "arena", path, "--out", "rows.jsonl", "--rename", "large=big", "--json")
    assert status == 0
    report = strictly(out)
    assert (report["rows"], report["read"], report["out"]) == (4, 4, "rows.jsonl")
    assert report["mean_quality"] == {"small": 0.375, "big": 0.625}
    assert "rows.jsonl: 4 of 4 rows" in err
    assert load_dataset([tmp_path / "rows.jsonl"]).quality.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 1]]


GSM8K = "prompt,mistralai/Mixtral-8x7B-Instruct-v0.1,gpt-4-1106-preview\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (GSM8K, "no row"),
        (GSM8K + "Two trains,True,False\nHow many,True", "gsm8k_responses.csv:3"),
        (GSM8K + "Two trains,True,maybe\n", "gsm8k_responses.csv:2"),
        ("", "no row is left"),
    ],
    ids=["no rows", "cut short", "bad value", "empty"],
)
def test_convert_of_a_damaged_original_writes_nothing(
    run: Run, tmp_path: Path, content: str, named: str
) -> None:
    (tmp_path / "gsm8k_responses.csv").write_text(content)
    status, out, err = run("convert", "routellm-gsm8k", tmp_path, "--out", "rows.jsonl", "--json")
    assert (status, out) == (1, "")
    assert named in one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["gsm8k_responses.csv"]


def test_convert_of_an_unknown_source_lists_those_there_are(run: Run, tmp_path: Path) -> None:
    status, _, err = run("convert", "nonsense", tmp_path, "--out", "rows.jsonl")
    assert status == 2
    for name in ("routellm-mmlu", "routerbench", "alpacaeval", "arena"):
        assert name in one_line(err)


@pytest.mark.parametrize("pair", ["small", "=x", "small=", ""])
def test_a_rename_is_old_and_new(run: Run, tmp_path: Path, pair: str) -> None:
    status, _, err = run("convert", "arena", original(tmp_path, VOTES), "--out", "x.jsonl", "--rename", pair)
    assert status == 2
    assert "expected OLD=NEW" in one_line(err)


# --- crossval ------------------------------------------------------------------------------------------------------


def test_crossval_in_json(run: Run, few_file: Path) -> None:
    status, out, err = run("crossval", few_file, *PAIR, "--folds", 2, "--seed", 3, "--json")
    assert status == 0
    report = strictly(out)
    assert report["n"] == 60
    assert 0 < report["weak_quality"] < report["strong_quality"] <= 1
    methods = report["methods"]
    expected = {"learned", "random", "prompt_length", "oracle", "tfidf_logistic", "minilm_knn", "average"}
    assert expected <= methods.keys()
    for figures in methods.values():
        assert {"apgr", "apgr_ci", "cpt50", "cpt80", "strong_share_at_95"} <= figures.keys()
        assert len(figures["apgr_ci"]) == 2
        assert figures["cost_saving_at_95"] is not None
    assert {"nested_strong_share_at_95", "nested_quality"} <= methods["learned"].keys()
    assert methods["learned"]["nested_quality"] > 0
    # For people: every method in a table, wide enough to be read.
    for name in expected:
        assert name in err
    assert "2 folds by group × 1" in err
    assert "$ saved" in err
    assert "…" not in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--folds", "1"), "--folds"),
        (("--folds", "61"), "60 groups of prompts cannot make 61 folds"),
        (("--repeats", "0"), "--repeats"),
        (("--seed", "-1"), "--seed"),
        (("--group-by", "language"), "expected group, domain or source"),
        (("--group-by", "source"), "1 groups of prompts cannot make 5 folds"),
        (("--prices", "no.yaml"), "no.yaml"),
        (("--encoder", "no/encoder"), "no/encoder"),
    ],
)
def test_crossval_with_wrong_options(
    run: Run, few_file: Path, options: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # looks for models on the net
    status, out, err = run("crossval", few_file, *PAIR, *options)
    assert status == (1 if "--encoder" in options else 2)
    assert out == ""
    message = err.splitlines()[-1]
    assert named in message
    # A line about fields that are not read may stand before it.
    assert [line for line in err.splitlines() if line.startswith("router-train")] == [message]


# --- fit -----------------------------------------------------------------------------------------------------------


def test_fit_writes_a_bundle_that_serves(run: Run, few_file: Path, tmp_path: Path) -> None:
    status, out, err = run("fit", few_file, *PAIR, "--out", "b", "--seed", 2, "--no-neighbours", "--json")
    assert status == 0
    report = strictly(out)
    assert report["bundle"] == "b"
    assert report["targets"] == ["weak", "strong"]
    assert report["parts"] == ["words", "trees", "factors"]
    manifest = read_manifest(tmp_path / "b")
    assert manifest.seed == 2
    assert json.loads(manifest.model_dump_json()) == {k: v for k, v in report.items() if k != "bundle"}
    assert load_predictor(tmp_path / "b").name in err
    assert "out of fold: n = 60" in err
    assert f"{manifest.metrics['novelty']['flagged']:.1%} are flagged as unfamiliar" in err
    strange = load_predictor(tmp_path / "b").predict([prompt_from_text("zq " * 2_000)])
    assert strange.unfamiliar.tolist() == [True]
    assert f"router-train fit {few_file}" in load_bundle(tmp_path / "b").card


def test_fit_warns_where_there_is_nothing_to_gain(
    run: Run, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [
        {**row, "quality": {"weak": i % 2, "strong": i // 2 % 2}} for i, row in enumerate(sample_rows[:60])
    ]
    write_jsonl(tmp_path / "even.jsonl", rows)
    status, out, err = run("fit", "even.jsonl", *PAIR, "--out", "b")
    assert (status, out) == (0, "")
    warned = " ".join(err.split())
    assert "warning: the labels do not show that strong is better than weak" in warned
    assert load_bundle(tmp_path / "b").manifest.notes


def test_fit_orders_targets_by_price(run: Run, sample_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [
        {
            **{name: value for name, value in row.items() if name != "quality"},
            "quality": {"a": row["quality"]["strong"], "b": row["quality"]["weak"], "c": (i % 3) / 2},
            "output_tokens": {"a": 100, "b": 100, "c": 100},
        }
        for i, row in enumerate(sample_rows[:60])
    ]
    write_jsonl(tmp_path / "three.jsonl", rows)
    (tmp_path / "prices.yaml").write_text(
        "a: {input: 5, output: 25}\nb: {input: 1, output: 2}\nc: {input: 1, output: 9}\n"
    )
    status, _, err = run("fit", "three.jsonl", "--targets", "a, b,c", "--prices", "prices.yaml", "--out", "b")
    assert status == 0, err
    assert read_manifest(tmp_path / "b").targets == ("b", "c", "a")


# --- Three targets ---------------------------------------------------------------------------------------------------

LADDER = ("--ladder", "low,mid,high")


def test_fit_takes_the_targets_from_the_ladder(
    run: Run, ladder_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ladder_rows[:60])
    status, _, err = run("fit", "rows.jsonl", *LADDER, "--no-neighbours", "--out", "b")
    assert status == 0, err
    assert read_manifest(tmp_path / "b").targets == ("low", "mid", "high")
    assert "best single target's" in " ".join(err.split())
    status, _, err = run("fit", "rows.jsonl", "--targets", "low,mid,high", "--out", "b")
    assert status == 1
    assert "--ladder low,mid,high" in one_line(err)


def test_a_ladder_from_labels_to_threshold(
    run: Run, ladder_bundle: Path, ladder_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(ladder_bundle, tmp_path / "bundle"))
    assert "0.95 × the best single target's" in read_manifest(bundle).thresholds["default"].how
    write_jsonl(tmp_path / "rows.jsonl", ladder_rows[110:230])
    status, out, err = run("evaluate", bundle, "rows.jsonl", *LADDER, "--json")
    assert status == 0, err
    report = strictly(out)
    assert (report["n"], report["seen"], report["incomplete"]) == (80, 40, 0)
    assert report["targets"] == ["low", "mid", "high"]
    assert report["best_single"] == "high"
    assert report["methods"]["learned"]["nested_quality"] > 0
    assert report["methods"]["oracle"]["perf_gain"] == 0
    assert "PerfGain" in err
    assert "40 rows left out" in err

    status, out, err = run("tune", bundle, "rows.jsonl", *LADDER, "--quality", ".8", "--write", "--json")
    assert status == 0, err
    tuned = strictly(out)
    assert (tuned["n"], tuned["goal"], tuned["written"]) == (80, "quality", True)
    assert tuned["quality"] >= 0.8 * tuned["best_single_quality"]
    assert load_predictor(bundle).threshold == tuned["threshold"]
    assert "written to" in err
    sure = ("--quality", ".5", "--confidence", ".9")
    status, out, err = run("tune", bundle, "rows.jsonl", *LADDER, *sure, "--json")
    assert status == 0, err
    assert "with 90% confidence" in strictly(out)["how"]


def test_three_targets_by_cost(
    run: Run, ladder_bundle: Path, ladder_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    cost = {"low": 0.001, "mid": 0.003, "high": 0.01}
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "cost": cost} for row in ladder_rows[110:230]])
    status, out, err = run("tune", ladder_bundle, "rows.jsonl", *LADDER, "--max-cost", "4", "--json")
    assert status == 0, err
    tuned = strictly(out)
    assert tuned["cost"] <= 0.004
    assert tuned["cost"] == pytest.approx(sum(cost[name] * share for name, share in tuned["shares"].items()))
    assert "per 1,000 requests" in err
    status, out, _ = run("evaluate", ladder_bundle, "rows.jsonl", *LADDER, "--json")
    report = strictly(out)
    assert report["methods"].keys() >= {"learned", "learned_value", "best_single", "zero", "random", "oracle"}
    assert 0 < report["methods"]["learned"]["aiq"] < report["methods"]["oracle"]["aiq"]


def test_goals_of_a_pair_are_not_for_three_targets(run: Run, ladder_bundle: Path, fresh_file: Path) -> None:
    for options in (("--strong-share", ".3"), ("--quality", ".9", "--plot", "curve.png")):
        status, _, err = run("tune", ladder_bundle, fresh_file, *options)
        assert status == 2
        assert "two targets, and this one has 3; tune it by --quality or --max-cost" in one_line(err)


def test_crossval_of_three_targets(run: Run, few_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in few_file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["quality"]["mid"] = (i % 3) / 2
        row["cost"]["mid"] = 0.00005
    write_jsonl(tmp_path / "three.jsonl", rows)
    targets = ("--targets", "weak,mid,strong")
    status, out, err = run("crossval", "three.jsonl", *targets, *PAIR, "--folds", 2, "--json")
    assert status == 0, err
    report = strictly(out)
    assert report["n"] == 60
    expected = {
        "learned",
        "learned_value",
        "knn",
        "clusters",
        "pair",
        "best_single",
        "zero",
        "random",
        "oracle",
    }
    assert report["methods"].keys() == expected
    for name in expected:
        assert name in err
    assert "cheapest first; by the rows' mean costs that is mid,weak,strong" in err
    assert "…" not in err
    status, _, err = run("crossval", "three.jsonl", *targets, "--repeats", 2)
    assert status == 2
    assert "--repeats" in one_line(err)
    status, _, err = run("crossval", "three.jsonl")
    assert status == 2
    assert "give --weak and --strong, or --targets" in one_line(err)


WRONG_CALLS: dict[str, tuple[tuple[str, ...], str]] = {
    "no targets": ((), "give --weak and --strong, or --targets"),
    "half a pair": (("--weak", "weak"), "give --weak and --strong, or --targets"),
    "both ways": ((*PAIR, "--targets", "weak,strong"), "give --weak and --strong, or --targets"),
    "twice the same": (("--weak", "weak", "--strong", "weak"), "at least two different"),
    "one target": (("--targets", "weak,"), "at least two different"),
    "unknown model": (("--weak", "weak", "--strong", "gpt-9"), "unknown model gpt-9"),
    "unknown flag": ((*PAIR, "--colour", "red"), "--colour"),
    "seed in words": ((*PAIR, "--seed", "one"), "--seed"),
    "seed below zero": ((*PAIR, "--seed", "-5"), "--seed"),
}


@pytest.mark.parametrize(("options", "named"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_wrong_call_is_one_line_and_status_2(
    run: Run, tiny_file: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    status, out, err = run("fit", tiny_file, "--out", "b", *options)
    assert (status, out) == (2, "")
    assert named in one_line(err)
    assert list(tmp_path.iterdir()) == []


def bad_row(**changes: Any) -> Callable[[Path], Path]:
    """Sixty good rows with one bad one at line 7."""

    def make(tmp_path: Path) -> Path:
        rows: list[dict[str, Any]] = [
            {"prompt": f"question {i}", "quality": {"weak": i % 2, "strong": 1}} for i in range(60)
        ]
        rows[6] |= changes
        write_jsonl(tmp_path / "bad.jsonl", rows)
        return tmp_path / "bad.jsonl"

    return make


def text_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


BAD_INPUT: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "missing path": (lambda tmp_path: tmp_path / "no.jsonl", 2, "no.jsonl: no such file"),
    "a directory": (lambda tmp_path: tmp_path, 2, "is a directory"),
    "unknown suffix": (text_file("rows.txt", b"{}"), 2, ".txt"),
    "empty": (text_file("empty.jsonl", b""), 1, "empty.jsonl: has no rows"),
    "quality of 1.7": (
        bad_row(quality={"weak": 1.7, "strong": 1}),
        1,
        "bad.jsonl:7: quality.weak: 1.7 is not between 0 and 1",
    ),
    "prompt is null": (bad_row(prompt=None), 1, "bad.jsonl:7: prompt: is null"),
    "prompt is empty": (bad_row(prompt="  "), 1, "bad.jsonl:7: prompt: is empty"),
    "half a surrogate": (
        text_file("rows.jsonl", b'{"prompt": "\\ud800", "quality": {"weak": 0, "strong": 1}}\n'),
        1,
        "rows.jsonl:1: prompt: holds half of a surrogate pair",
    ),
    "not JSON": (text_file("rows.jsonl", b'{"prompt": "x"\n'), 1, "rows.jsonl:1: malformed JSON"),
    "pickle": (text_file("rows.pkl", b"\x80\x04N."), 1, "is a pickle"),
    "pickle in disguise": (text_file("rows.jsonl", b"\x80\x04N."), 1, "is a pickle"),
    "torn gzip": (
        text_file("rows.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 9)[:-9]),
        1,
        "damaged gzip",
    ),
}


@pytest.mark.parametrize(("make", "status", "named"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
@pytest.mark.parametrize("command", ["fit", "evaluate", "tune"])
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Run,
    tmp_path: Path,
    tiny_bundle: Path,
    command: str,
    make: Callable[[Path], Path],
    status: int,
    named: str,
) -> None:
    data = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "fit": ("fit", data, *PAIR, "--out", "b"),
        "evaluate": ("evaluate", tiny_bundle, data),
        "tune": ("tune", tiny_bundle, data, "--quality", ".9", "--write"),
    }
    found, out, err = run(*arguments[command], *(() if command == "tune" else ("--json",)))
    assert (found, out) == (status, "")
    assert named in one_line(err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_single_class_of_one_target_is_refused_by_fit(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "quality": {"weak": i % 2, "strong": 1}} for i in range(60)]
    write_jsonl(tmp_path / "single.jsonl", rows)
    status, out, err = run("fit", "single.jsonl", *PAIR, "--out", "b", "--json")
    assert (status, out) == (1, "")
    assert "every quality of strong is 1: there is a single class" in one_line(err)
    assert not (tmp_path / "b").exists()


def test_a_single_class_of_all_is_refused_by_crossval_too(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "quality": {"weak": 1, "strong": 1}} for i in range(60)]
    write_jsonl(tmp_path / "alike.jsonl", rows)
    status, _, err = run("crossval", "alike.jsonl", *PAIR)
    assert status == 1
    assert "every quality is 1" in one_line(err)


def test_bad_rows_can_be_skipped_and_are_listed(run: Run, tmp_path: Path) -> None:
    data = bad_row(quality={"weak": 1.7, "strong": 1})(tmp_path)
    lines = data.read_text().splitlines()
    lines[8] = "not JSON"
    # Another class for strong, so that there is something to learn.
    lines[20] = json.dumps({"prompt": "question 20", "quality": {"weak": 1, "strong": 0}})
    data.write_text("\n".join(lines) + "\n")
    status, out, err = run("fit", data, *PAIR, "--out", "b", "--skip-bad-rows", "--json")
    assert status == 0, err
    assert "2 bad rows skipped" in err
    assert "bad.jsonl:7: quality.weak: 1.7" in err
    assert "bad.jsonl:9: malformed JSON" in err
    assert strictly(out)["datasets"][0]["rows"] == 58


def test_a_directory_that_is_no_bundle_is_refused_before_any_work(
    run: Run, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("work")
    monkeypatch.setattr("training.train.embed", None)  # would fail where it is called
    status, out, err = run("fit", tiny_file, *PAIR, "--out", "thesis", "--json")
    assert (status, out) == (1, "")
    assert "thesis exists and is not a bundle" in one_line(err)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


# --- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate_leaves_out_what_was_trained_on(
    run: Run, tiny_bundle: Path, tiny_file: Path, fresh_file: Path
) -> None:
    status, out, err = run("evaluate", tiny_bundle, tiny_file, fresh_file, "--json")
    assert status == 0
    report = strictly(out)
    assert (report["n"], report["seen"]) == (100, 150)
    assert {"learned", "random", "prompt_length", "oracle"} <= report["methods"].keys()
    assert report["methods"]["learned"]["nested_quality"] > 0
    assert SEEN in err
    status, out, err = run("evaluate", tiny_bundle, tiny_file)
    assert (status, out) == (1, "")
    assert "all 150 rows were trained on" in err.splitlines()[-1]


def test_evaluate_with_other_names_and_prices(
    run: Run, tiny_bundle: Path, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [
        {
            "prompt": row["prompt"],
            "quality": {"mistral": row["quality"]["weak"], "gpt": row["quality"]["strong"]},
            "output_tokens": {"mistral": 100, "gpt": 100},
        }
        for row in sample_rows[200:260]
        if "prompt" in row
    ]
    write_jsonl(tmp_path / "other.jsonl", rows)
    (tmp_path / "prices.yaml").write_text("weak: {input: 1, output: 2}\nstrong: {input: 5, output: 25}\n")
    names = ("--rename", "mistral=weak", "--rename", "gpt=strong")
    status, out, err = run(
        "evaluate", tiny_bundle, "other.jsonl", *names, "--prices", "prices.yaml", "--json"
    )
    assert status == 0, err
    report = strictly(out)
    assert (report["weak"], report["strong"]) == ("weak", "strong")
    assert 0 < report["methods"]["learned"]["cost_saving_at_95"] < 1
    status, _, err = run("evaluate", tiny_bundle, "other.jsonl")
    assert status == 2
    assert "unknown model" in one_line(err)
    status, _, err = run("evaluate", tiny_bundle, "other.jsonl", "--rename", "mistral=gpt")
    assert status == 2
    assert "NEW one of weak, strong" in one_line(err)


def test_a_bundle_that_is_not_there_is_a_wrong_call(run: Run, fresh_file: Path) -> None:
    for arguments in (
        ("evaluate", "nothing", fresh_file),
        ("tune", "nothing", fresh_file, "--quality", ".9"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert "nothing: no such bundle directory" in one_line(err)


def test_a_damaged_bundle_is_work_that_failed(run: Run, bundle: Path, fresh_file: Path) -> None:
    (bundle / "estimator.safetensors").write_bytes(b"torn")
    status, _, err = run("evaluate", bundle, fresh_file)
    assert status == 1
    assert "truncated or changed" in one_line(err)


# --- tune ----------------------------------------------------------------------------------------------------------


def test_tune_shows_and_writes_only_where_it_is_told_to(
    run: Run, bundle: Path, tiny_file: Path, fresh_file: Path
) -> None:
    before = read_manifest(bundle)
    status, out, err = run("tune", bundle, tiny_file, fresh_file, "--quality", ".9", "--json")
    assert status == 0
    chosen = strictly(out)
    assert (chosen["goal"], chosen["value"], chosen["n"], chosen["seen"]) == ("quality", 0.9, 100, 150)
    assert chosen["quality"] >= 0.9 * chosen["strong_quality"] - 1e-9
    assert chosen["written"] is False
    assert SEEN in err
    assert "random needs" in " ".join(err.split())
    assert read_manifest(bundle) == before

    status, out, err = run("tune", bundle, tiny_file, fresh_file, "--quality", ".9", "--write", "--json")
    assert status == 0
    assert strictly(out)["written"] is True
    predictor = load_predictor(bundle)
    assert predictor.threshold == chosen["threshold"]
    assert predictor.manifest.thresholds["previous"] == before.thresholds["default"]
    assert "0.9" in predictor.manifest.thresholds["default"].how
    assert "written to" in err


def test_tune_with_a_confidence_is_more_careful(run: Run, bundle: Path, fresh_file: Path) -> None:
    status, out, _ = run("tune", bundle, fresh_file, "--quality", ".6", "--json")
    plain = strictly(out)
    status, out, err = run("tune", bundle, fresh_file, "--quality", ".6", "--confidence", ".9", "--json")
    assert status == 0, err
    promised = strictly(out)
    assert promised["strong_share"] >= plain["strong_share"]
    assert "with 90% confidence" in promised["how"]


def test_a_promise_that_the_rows_cannot_carry_is_not_made(run: Run, bundle: Path, fresh_file: Path) -> None:
    before = read_manifest(bundle)
    status, out, err = run("tune", bundle, fresh_file, "--quality", ".99", "--confidence", ".99", "--write")
    assert (status, out) == (1, "")
    assert "100 rows cannot promise" in err.splitlines()[-1]
    assert read_manifest(bundle) == before
    status, _, err = run("tune", bundle, fresh_file, "--strong-share", ".3", "--confidence", ".9")
    assert status == 2
    assert "goes with --quality" in one_line(err)


def test_tune_by_share_draws_the_curve(run: Run, bundle: Path, fresh_file: Path, tmp_path: Path) -> None:
    status, out, _ = run(
        "tune", bundle, fresh_file, "--strong-share", ".3", "--plot", "curve.png", "--write", "--json"
    )
    assert status == 0
    assert strictly(out)["strong_share"] == pytest.approx(0.3, abs=0.01)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_manifest(bundle).thresholds["default"].strong_share == pytest.approx(0.3, abs=0.01)


def test_tune_by_cost(run: Run, bundle: Path, sample_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**row, "output_tokens": {"weak": 200, "strong": 400}} for row in sample_rows[150:250]]
    write_jsonl(tmp_path / "tokens.jsonl", rows)
    (tmp_path / "prices.yaml").write_text("weak: {input: 0, output: 1}\nstrong: {input: 0, output: 25}\n")
    status, out, err = run(
        "tune", bundle, "tokens.jsonl", "--max-cost", "5", "--prices", "prices.yaml", "--json"
    )
    assert status == 0, err
    chosen = strictly(out)
    # .2 USD per 1,000 requests where all are weak, 10 where all are strong.
    assert 1000 * chosen["cost"] == pytest.approx(0.2 + 9.8 * chosen["strong_share"])
    assert 1000 * chosen["cost"] <= 5.0
    assert "per 1,000 requests" in err
    status, _, err = run("tune", bundle, "tokens.jsonl", "--max-cost", "5")
    assert status == 2
    assert "give prices" in err.splitlines()[-1]
    status, _, err = run("tune", bundle, "tokens.jsonl", "--max-cost", ".1", "--prices", "prices.yaml")
    assert status == 2
    assert "the least is 0.2" in err.splitlines()[-1]


WRONG_GOALS: dict[str, tuple[tuple[str, ...], str]] = {
    "none": ((), "give one of --quality, --strong-share and --max-cost"),
    "two": (("--quality", ".9", "--strong-share", ".3"), "give one of"),
    "quality that cannot be had": (("--quality", "3"), "cannot be reached"),
    "quality of nothing": (("--quality", "0"), "expected a share of strong's quality"),
    "share above one": (("--strong-share", "30"), "expected a number from 0 to 1"),
    "not a number": (("--strong-share", "nan"), "expected a number from 0 to 1"),
    "plot of another kind": (("--quality", ".9", "--plot", "curve.docx"), "curve.docx"),
    "plot in no directory": (("--quality", ".9", "--plot", "no/curve.png"), "no/curve.png"),
}


@pytest.mark.parametrize(("options", "named"), WRONG_GOALS.values(), ids=WRONG_GOALS.keys())
def test_a_wrong_goal_changes_nothing(
    run: Run, bundle: Path, fresh_file: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, out, err = run("tune", bundle, fresh_file, *options, "--write", "--json")
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("router-train: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- label ---------------------------------------------------------------------------------------------------------


def test_a_question_without_an_answer_spends_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, _, err = run("label", "prompts.jsonl", *PAIR, "--out", "labels.jsonl")
    assert status == 1
    assert "Traceback" not in err
    assert "no answer was given" in err.splitlines()[-1]
    assert not (tmp_path / "labels.jsonl").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    status, _, err = run("label", "prompts.jsonl", *PAIR, "--out", "labels.jsonl")
    assert status == 2
    assert "nothing was spent" in err


def test_benchmark_tells_what_is_wrong_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROUTER_BENCH_DATA", raising=False)
    status, _, err = run("benchmark")
    assert status == 2
    assert "--data" in one_line(err)
    status, _, err = run("benchmark", "--data", tmp_path, "--only", "nonsense")
    assert status == 2
    assert "known are mmlu" in one_line(err)
    status, _, err = run("benchmark", "--data", tmp_path, "--out", "report.pdf")
    assert status == 2
    assert "REPORT.md" in one_line(err)


def test_benchmark_measures_reports_and_draws(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds: five fits of the estimator. CodeRouterBench's shape: the cheapest model against the best, in dollars."""
    monkeypatch.setattr("training.comparison.PEERS", {})  # each is a process
    folder = tmp_path / "coderouterbench"
    folder.mkdir()
    lines = ["task_id,dimension,model,score,cost_usd"]
    for i in range(40):
        lines += [f"t{i},d,small,{i % 2},0.001", f"t{i},d,middle,0.5,0.002", f"t{i},d,big,1,0.01"]
    (folder / "id_results_long.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ("sort", "parse", "merge", "cache", "graph", "tree", "socket", "regex", "matrix", "date")
    tasks = [
        {
            "task_id": f"t{i}",
            "prompt": f"{words[i % 10]} a {words[(3 * i) % 10]} of {i * i} {words[i // 4]}s"
            + " then print" * (i % 2),
        }
        for i in range(40)
    ]
    write_jsonl(folder / "id_tasks.jsonl", tasks)
    given = ("--data", tmp_path, "--only", "coderouterbench", "--repeats", "1")
    status, out, err = run("benchmark", *given, "--out", tmp_path / "report.md", "--json")
    assert status == 0, err
    found = strictly(out)
    (table,) = found["tables"]
    assert (table["weak"], table["strong"], table["n"]) == ("small", "big", 40)
    assert found["versions"]["litellm"].startswith("1.")
    methods = table["methods"]
    assert methods["random"]["call_saving_at_95"] == pytest.approx(0.1)  # in closed form
    assert methods["random"]["cost_saving_at_95"] == pytest.approx(0.1 * 0.9)
    assert methods["learned"]["nested_quality"] is not None
    assert methods["learned"]["learned_ahead"] is None
    assert set(methods["random"]["learned_ahead"]) == {"value", "low", "high"}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "--only coderouterbench --repeats 1" in report
    assert table["digest"][:12] in report
    assert "![quality against strong calls](report.png)" in report
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_tune_keeps_a_bar_beside_the_default(run: Run, bundle: Path, fresh_file: Path) -> None:
    before = read_manifest(bundle)
    status, out, err = run("tune", bundle, fresh_file, "--quality", ".9", "--write-bar", "--json")
    assert (status, strictly(out)["written"]) == (0, True)
    assert "written to" in err
    after = read_manifest(bundle)
    assert after.bars[0.9] == strictly(out)["threshold"]
    assert after.thresholds["default"] == before.thresholds["default"]
    status, _, err = run("tune", bundle, fresh_file, "--strong-share", ".3", "--write-bar")
    assert status == 2
    assert "--write-bar goes with --quality" in one_line(err)
