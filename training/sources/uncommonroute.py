"""UncommonRoute's tier labels: short prompts in many languages.

https://github.com/CommonstackAI/UncommonRoute, ``bench/data`` (MIT).

The labels are its authors' judgement of how demanding a prompt is; no model's response was measured.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from training.sources.reading import Reading, Row, files_of, read_rows, required

# Tier → (quality of "weak", quality of "strong"). The order of the gains is the labels', the sizes are ours:
# the mean gain (.175) lies between those measured for a small and a frontier model on MMLU (.125) and GSM8K
# (.220). Strong models fail too, so nothing is 1.
JUDGED_QUALITY = {
    "SIMPLE": (0.95, 0.97),
    "MEDIUM": (0.80, 0.92),
    "COMPLEX": (0.50, 0.85),
    "REASONING": (0.35, 0.80),
}


def read_uncommonroute(path: Path) -> Reading:
    """The folder with train, dev and test, or one file; targets are named ``weak`` and ``strong``."""
    rows: list[Row] = []
    left_out = Counter[str]()
    for file in files_of(path, "*.jsonl"):
        for line, fields in read_rows(file):
            tier = str(required(fields, "expected_tier", file, line)).strip().upper()
            if tier not in JUDGED_QUALITY:
                left_out["unknown tier"] += 1
                continue
            prompt = required(fields, "prompt", file, line)
            row: Row = {"id": f"uncommonroute/{file.name.split('.')[0]}/{line}"}
            if fields.get("system_prompt"):
                row["messages"] = [
                    {"role": "system", "content": fields["system_prompt"]},
                    {"role": "user", "content": prompt},
                ]
            else:
                row["prompt"] = prompt
            weak, strong = JUDGED_QUALITY[tier]
            row |= {"source": "uncommonroute", "domain": fields.get("category")}
            row["quality"] = {"weak": weak, "strong": strong}
            rows.append(row)
    return Reading(
        tuple(rows),
        left_out,
        ("qualities are judged, a constant a tier (training/sources/uncommonroute.py), not measured",),
    )
