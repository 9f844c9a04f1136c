"""Pairwise human preferences in the shape of LMArena's releases (Chatbot Arena)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.sources.reading import Reading, files_of, read_rows, required

# ``winner`` → the share of the comparison that model_a won.
_SHARES = {
    "model_a": 1.0,
    "model_b": 0.0,
    "tie": 0.5,
    "tie (bothbad)": 0.5,
    "tie(bothbad)": 0.5,
    "both_bad": 0.5,
    "bothbad": 0.5,
}
# Some releases have a column a result instead of ``winner``.
_FLAGS = {"winner_model_a": "model_a", "winner_model_b": "model_b", "winner_tie": "tie"}
_SUFFIXES = (".jsonl", ".csv", ".parquet", ".json", ".gz")


def read_arena(path: Path) -> Reading:
    """A file or a folder of JSONL, CSV, Parquet or JSON; the prompt is the first user turn.

    Rows have ``model_a``, ``model_b``, ``winner`` and ``prompt`` or ``conversation_a``; a tie is half a win.
    """
    rows, left_out = [], Counter[str]()
    for file in (file for file in files_of(path, "*") if file.suffix.lower() in _SUFFIXES or file == path):
        for line, fields in read_rows(file):
            first = str(required(fields, "model_a", file, line))
            second = str(required(fields, "model_b", file, line))
            share = _SHARES.get(_winner(fields, file, line))
            prompt = _first_turn(fields)
            if share is None:
                left_out["no winner"] += 1
            elif first == second:
                left_out["a model against itself"] += 1
            elif not prompt:
                left_out["no text in the first user turn"] += 1
            else:
                key = fields.get("question_id") or fields.get("id") or f"{file.name}:{line}"
                rows.append(
                    {
                        "id": f"arena/{key}",
                        "prompt": prompt,
                        "source": "arena",
                        "quality": {first: share, second: 1.0 - share},
                    }
                )
    return Reading(tuple(rows), left_out)


def _winner(fields: Mapping[str, Any], path: Path, line: int) -> str:
    if "winner" in fields:
        return str(fields["winner"]).strip().lower()
    for flag, winner in _FLAGS.items():
        if str(fields.get(flag)).lower() in ("1", "1.0", "true"):
            return winner
    if not any(flag in fields for flag in _FLAGS):
        required(fields, "winner", path, line)
    return ""


def _first_turn(fields: Mapping[str, Any]) -> str:
    turns = _parsed(fields.get("prompt"))
    if isinstance(turns, list) and turns:
        turns = turns[0]
    if isinstance(turns, str) and turns.strip():
        return turns
    conversation = _parsed(fields.get("conversation_a"))
    for message in conversation if isinstance(conversation, list) else ():
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text(message.get("content"))
    return ""


def _parsed(value: Any) -> Any:
    """A list that stands as JSON in a cell, or the value as it is: a prompt may well open with a bracket."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "\n".join(part for part in parts if isinstance(part, str)).strip()
    return content if isinstance(content, str) and content.strip() else ""
