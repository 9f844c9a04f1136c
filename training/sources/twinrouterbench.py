"""TwinRouterBench, static track: prefixes of agent runs with the cheapest tier that still solves the task.

https://huggingface.co/datasets/Amorph/TwinRouterBench (Apache-2.0, arXiv 2605.18859).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from training.sources.reading import Reading, Row, files_of, read_rows, required

LADDER = ("low", "mid", "mid_high", "high")


def read_twinrouterbench(path: Path) -> Reading:
    """``question_bank.jsonl`` (or its Parquet form) or the folder it is in.

    Quality is 1 from ``target_tier`` up and 0 below. The run (``instance_id``) is the group, the benchmark is
    the domain, and ``functions`` are the tools that were offered.
    """
    rows: list[Row] = []
    left_out = Counter[str]()
    (file,) = files_of(path, "question_bank.jsonl")[:1]
    for line, fields in read_rows(file):
        tier = required(fields, "target_tier", file, line)
        if tier not in LADDER:
            left_out["unknown tier"] += 1
            continue
        lowest = LADDER.index(tier)
        row: Row = {
            "id": f"twinrouterbench/{required(fields, 'id', file, line)}",
            "messages": _parsed(required(fields, "messages", file, line)),
            "source": "twinrouterbench",
            "domain": fields.get("benchmark"),
            "group": f"twinrouterbench/{required(fields, 'instance_id', file, line)}",
            "quality": {name: float(step >= lowest) for step, name in enumerate(LADDER)},
        }
        if tools := _parsed(fields.get("tools") or fields.get("functions")):
            row["tools"] = tools
        rows.append(row)
    return Reading(tuple(rows), left_out)


def _parsed(value: Any) -> Any:
    """The Parquet form has lists as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # left out and counted where the format is checked
    return value
