"""Inputs written for checking an encoder or a bundle: short and long, code, other scripts, conversations, odd input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS = (
    "hi",
    "What is the capital of Australia?",
    "Undo the last change and run the tests again.",
    "Prove that the square root of 2 is irrational, then generalise to any prime.",
    "def f(xs):\n    return sorted(set(xs), key=xs.index)\n\nWhy is this quadratic, and how would you fix it?",
    "Schreibe eine kurze Absage an einen Lieferanten, freundlich, aber bestimmt.",
    "次の文章を三行で要約してください。機械学習の評価では、分割の仕方が結果を大きく変えることがある。",
    "SELECT customer_id, SUM(total) FROM orders WHERE created_at >= '2026-01-01' GROUP BY 1 HAVING SUM(total) > 100",
    "Our p99 went from 80 ms to 2 s after moving the cache to another zone. Here is what we know so far: "
    "hit rate unchanged, connections doubled, CPU flat. List hypotheses in the order you would test them.",
    "Write a limerick about a database that forgot its index.",
    '{"error": {"code": 429, "message": "rate limited"}} what does this mean for my retry policy?',
    "A train leaves at 14:05 at 72 km/h, another at 14:35 at 96 km/h on the same track. When does it catch up?",
    "Summarise the differences between optimistic and pessimistic locking. " * 6,
    "¿Puedes traducir este correo al inglés y hacerlo más formal?",
    "¯\\_(ツ)_/¯ idk just make it work lol",
    "git commit message for: bump urllib3, drop py3.8, fix flaky retry test",
)

# Rows as a dataset has them; the last two reach past the encoder's window and into a conversation's state.
ROWS: tuple[Mapping[str, Any], ...] = (
    *({"prompt": text} for text in TEXTS),
    {
        "prompt": "Compare these two clauses and say which one favours the tenant.\n"
        + "The tenant shall pay. " * 120
    },
    {
        "messages": [
            {"role": "system", "content": "You are a coding agent."},
            {
                "role": "user",
                "content": "<system-reminder>be brief</system-reminder>Make the parser accept tabs.",
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "run_tests", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2 failed, 31 passed"},
        ],
    },
)
