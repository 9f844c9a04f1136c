"""CodeRouterBench: coding tasks with the score and the cost of eight models.

https://huggingface.co/datasets/Lance1573/CodeRouterBench (MIT, arXiv 2606.22902). As released, only the 176
agentic tasks (``ood176``) come with their text; the others are left out unless their
``*_tasks.jsonl`` has a ``prompt``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router.errors import DatasetError, UsageError
from training.sources.reading import Reading, Row, files_of, number, read_json, read_rows

_RESULTS = "_results_long.csv"
_TASKS = "_tasks.jsonl"
# Names that a column goes by, the in-distribution files' first.
_COLUMNS = {
    "task": ("task_id",),
    "model": ("model",),
    "score": ("score", "resolved"),
    "cost": ("cost_usd", "cost"),
    "input tokens": ("input_tokens", "in_tok"),
    "output tokens": ("output_tokens", "out_tok"),
    "text": ("prompt", "task_text", "text"),
}


def read_coderouterbench(path: Path) -> Reading:
    """The folder with ``*_results_long.csv``, ``*_tasks.jsonl`` and ``models.json``, or one file of results.

    Files that repeat others (``id`` is ``id_probing`` and ``id_test`` together) add nothing twice.
    """
    results = files_of(path, f"*{_RESULTS}")
    tasks: dict[str, dict[str, Any]] = {}
    for file in results:
        beside = file.with_name(file.name.removesuffix(_RESULTS) + _TASKS)
        if not beside.is_file():
            raise UsageError(f"{beside}: no such file; the results need the text of their tasks")
        for line, fields in read_rows(beside):
            tasks[str(_value(fields, "task", beside, line))] = fields
    prices = _prices(results[0].with_name("models.json"))
    answers: dict[str, Row] = {}
    for file in results:
        for line, fields in read_rows(file):
            task = str(_value(fields, "task", file, line))
            model = str(_value(fields, "model", file, line))
            row = answers.setdefault(task, {"quality": {}, "cost": {}, "output_tokens": {}})
            row["quality"][model] = number(_value(fields, "score", file, line), "score", file, line)
            cost, tokens = _spent(fields, prices.get(model), file, line)
            if cost is not None:
                row["cost"][model] = cost
            if tokens is not None:
                row["output_tokens"][model] = tokens
    rows, left_out = [], Counter[str]()
    for task, row in answers.items():
        text = _find(tasks.get(task, {}), "text")
        if text is None:
            left_out["no text of the task"] += 1
            continue
        rows.append(
            {
                "id": f"coderouterbench/{task}",
                "prompt": text,
                "source": "coderouterbench",
                "domain": tasks[task].get("dimension"),
                **row,
            }
        )
    return Reading(tuple(rows), left_out)


def _spent(
    fields: Mapping[str, Any], price: tuple[float, float] | None, path: Path, line: int
) -> tuple[float | None, float | None]:
    """Dollars and output tokens of one answer, None where they are not known."""
    # Where the token record was lost the columns hold zero, which is not what was spent.
    if str(fields.get("cost_source", "")).startswith("missing"):
        return None, None
    cost, read, written = (_find(fields, name) for name in ("cost", "input tokens", "output tokens"))
    tokens = None if written is None else number(written, "output tokens", path, line)
    if cost is not None:
        return number(cost, "cost", path, line), tokens
    if price is None or read is None or tokens is None:
        return None, tokens
    return (number(read, "input tokens", path, line) * price[0] + tokens * price[1]) / 1e6, tokens


def _prices(path: Path) -> dict[str, tuple[float, float]]:
    """Model → US dollars per million input and output tokens; empty where there is no such file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    models = content.get("models") if isinstance(content, dict) else content
    try:
        return {m["model"]: (float(m["input_per_1m"]), float(m["output_per_1m"])) for m in models or ()}
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{path}: models need model, input_per_1m and output_per_1m") from None


def _find(fields: Mapping[str, Any], what: str) -> Any:
    return next((fields[name] for name in _COLUMNS[what] if fields.get(name) not in (None, "")), None)


def _value(fields: Mapping[str, Any], what: str, path: Path, line: int) -> Any:
    value = _find(fields, what)
    if value is None:
        names = " or ".join(_COLUMNS[what])
        raise DatasetError(f"{path}:{line}: no {what}: column {names} is expected; found {', '.join(fields)}")
    return value
