"""RouterBench as CSV: eleven models with scores and dollars (arXiv 2403.12031, withmartian/routerbench).

The originals are pickles, which are never read; RouterDC's repository has parts of them as CSV.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from router.errors import DatasetError
from training.sources.reading import Reading, Row, files_of, number, read_rows, required

_COST = "|total_cost"
# ARC and WinoGrande prompts open with the same worked examples, over 1,200 characters, each ended by its
# answer. What is asked comes after the last of them.
_WORKED_EXAMPLE = re.compile(r"Answer:[ \t]*\n\S{1,3}\n\s*\n")


def read_routerbench(path: Path) -> Reading:
    """The folder of CSV files, or one of them. The benchmark's name is the domain.

    A question whose models are spread over two rows becomes one.
    """
    rows: dict[tuple[str, str], Row] = {}
    joined = 0
    for file in files_of(path, "*.csv"):
        for line, fields in read_rows(file):
            models = [name.removesuffix(_COST) for name in fields if name.endswith(_COST)]
            if not models:
                raise DatasetError(f"{file}:{line}: no column <model>{_COST}; not RouterBench's format")
            name = required(fields, "sample_id", file, line)
            prompt = last_question(required(fields, "prompt", file, line), file, line)
            joined += (name, prompt) in rows
            row = rows.setdefault(
                (name, prompt),
                {
                    "id": f"routerbench/{name}",
                    "prompt": prompt,
                    "source": "routerbench",
                    "domain": fields.get("eval_name"),
                    "quality": {},
                    "cost": {},
                },
            )
            for model in models:
                if model in fields:  # an empty cell is no label
                    row["quality"][model] = number(fields[model], model, file, line)
                    row["cost"][model] = number(fields[model + _COST], model + _COST, file, line)
    notes = (f"{joined} rows were joined to another row of the same question",) if joined else ()
    return Reading(tuple(rows.values()), notes=notes)


def last_question(prompt: str, path: Path, line: int) -> str:
    """The last question of a ``prompt`` cell: a Python list literal, or plain text."""
    text = prompt
    if prompt.startswith("["):
        try:
            turns = ast.literal_eval(prompt)
            text = turns[-1] if isinstance(turns, list) and turns else ""
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DatasetError(f"{path}:{line}: prompt: is not a Python list literal") from None
    if not isinstance(text, str):
        raise DatasetError(f"{path}:{line}: prompt: does not hold text")
    return _WORKED_EXAMPLE.split(text)[-1]
