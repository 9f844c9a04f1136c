"""AlpacaEval annotations: 805 instructions, a model's output preferred to GPT-4's or not.

https://github.com/tatsu-lab/alpaca_eval, ``results/<model>/<annotator>/annotations.json``.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from training.dataset import estimated_tokens
from training.sources.reading import Reading, files_of, read_rows, required


def read_alpacaeval(path: Path) -> Reading:
    """``annotations.json``, or a folder of them.

    ``preference`` is 1 where the first output won, 2 where the second did, and between where the annotator's
    probabilities are weighed. Quality is the share won: preference − 1 for the second, the rest for
    the first.
    """
    rows, left_out = [], Counter[str]()
    for file in files_of(path, "annotations.json"):
        for line, fields in read_rows(file):
            share = _share_of_second(fields.get("preference"))
            if share is None:
                left_out["no preference"] += 1
                continue
            first = str(required(fields, "generator_1", file, line))
            second = str(required(fields, "generator_2", file, line))
            outputs = {first: fields.get("output_1"), second: fields.get("output_2")}
            annotator = fields.get("annotator") or file.parent.name
            rows.append(
                {
                    "id": f"alpacaeval/{second}/{annotator}/{line}",
                    "prompt": required(fields, "instruction", file, line),
                    "source": "alpacaeval",
                    "domain": fields.get("dataset"),
                    "quality": {first: 1.0 - share, second: share},
                    "output_tokens": {
                        name: estimated_tokens(text)
                        for name, text in outputs.items()
                        if isinstance(text, str)
                    },
                }
            )
    return Reading(tuple(rows), left_out)


def _share_of_second(preference: Any) -> float | None:
    if isinstance(preference, bool) or not isinstance(preference, int | float) or math.isnan(preference):
        return None
    return preference - 1.0 if 1 <= preference <= 2 else None
