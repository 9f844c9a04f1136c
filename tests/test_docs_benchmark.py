"""The figures that the README leads with are those of the committed benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The README's row: the benchmark's table.
ROWS = {
    "MMLU, 11,230 labels": "mmlu",
    "GSM8K, 1,046 labels": "gsm8k",
    "MMLU, 1,500": "mmlu-1500",
    "MMLU, 500": "mmlu-500",
    "MMLU, 250": "mmlu-250",
    "GSM8K, 400": "gsm8k-400",
    "MMLU, subjects not trained on": "mmlu-subjects",
    "MT-Bench (n = 72) from MMLU and GSM8K": "mtbench",
}


@pytest.mark.parametrize(("row", "table"), ROWS.items(), ids=ROWS.values())
def test_the_readme_says_what_was_measured(row: str, table: str) -> None:
    found = json.loads((ROOT / "training" / "benchmark.json").read_text(encoding="utf-8"))
    (measured,) = [one for one in found["tables"] if one["name"] == table]
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if f"{row} |" in line]
    cells = [cell.strip() for cell in line.strip("| \n").split("|")]
    methods = {name: one for name, one in measured["methods"].items() if "apgr" in one}
    learned = methods.pop("learned")
    best = max(methods, key=lambda name: methods[name]["apgr"])
    assert cells[1] == f"{learned['apgr']:.3f}".lstrip("0")
    value, name = re.fullmatch(r"(\.\d+) \((.+)\)", cells[2]).groups()  # type: ignore[union-attr]
    assert value == f"{methods[best]['apgr']:.3f}".lstrip("0")
    assert name == {"average": "TF-IDF and kNN averaged", "matrix_factorisation": "matrix factorisation"}.get(
        best, best
    )
    assert cells[3] == f"{methods['prompt_length']['apgr']:.3f}".lstrip("0")
