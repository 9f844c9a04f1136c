"""What a client sees of each way in which a provider can fail: the table in docs/faults.md.

``python tests/faults.py`` runs every fault against the loopback provider and prints the page;
``python tests/faults.py --write`` puts it in its place. A test compares the two.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from running import KEY, running
from starlette.responses import JSONResponse

from router.dialects import CHAT, RESPONSES, Dialect
from router.dialects import MESSAGES as MESSAGES_DIALECT
from router.escalation import gist_of_answer, gist_of_events

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
TIMEOUT = 0.4
# Beyond the timeout of a target: reading, deciding, and a busy machine.
SLACK = 3.0
MARKER = "<!-- Everything below is written by tests/faults.py --write. -->\n\n"


@dataclass(frozen=True)
class Fault:
    """One way to fail, and the target of the test policy that does."""

    name: str
    asks: str
    fields: dict[str, Any]
    answers: Sequence[tuple[int, dict[str, Any], dict[str, str]]] = ()


def _fault(
    name: str, asks: str, *answers: tuple[int, dict[str, Any], dict[str, str]], **fields: Any
) -> Fault:
    return Fault(name, asks, fields, answers)


def _said(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


FAULTS = [
    _fault("is down: nothing listens", "small", api_base="http://127.0.0.1:9/v1"),
    _fault("is slow: nothing within the target's timeout", "hang", timeout=TIMEOUT),
    _fault("breaks off before the first chunk, or in the middle of a whole answer", "resets"),
    _fault("breaks off in the middle of a stream", "drops-midway"),
    _fault("stalls in the middle of a stream", "stalls-midway", timeout=TIMEOUT),
    _fault("sends an error in the middle of a stream", "fails-midway"),
    _fault("429, `Retry-After: 7`", "rate-limited"),
    _fault(
        "429, `Retry-After: 0`, then well",
        "once",
        (429, _said("Slow down", "rate_limit_error"), {"retry-after": "0"}),
    ),
    _fault("500", "broken"),
    _fault("503 once, then well", "shaky", (503, _said("Overloaded", "overloaded_error"), {})),
    _fault("502 with a page of HTML", "not-json"),
    _fault("200 with half a JSON object", "garbage"),
    _fault("200 with an error in the body", "error-in-200"),
    _fault("200 with something else in the body", "detail-in-200"),
    _fault(
        "401: the provider refuses the server's key",
        "locked",
        *[(401, _said(f"Incorrect API key {KEY}", "authentication_error"), {})] * 9,
    ),
    _fault("has no key: its variable is not set", "small", api_key_env="NOT_SET_ANYWHERE"),
    _fault("400: the request's own fault", "picky"),
]
# How the target is written in the policy.
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "`retries: 1`": {"retries": 1},
    "`fallbacks: [backup]`": {"fallbacks": ["backup"]},
}
MESSAGES = [{"role": "user", "content": "hello"}]
# The dialects, with a body that asks hello.
ASKS: dict[Dialect, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    MESSAGES_DIALECT: {"messages": MESSAGES, "max_tokens": 50},
    RESPONSES: {"input": "hello"},
}


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Fault, setting or dialect, what a client saw of a whole answer, and of a stream."""
    more: dict[str, dict[str, Any]] = {"backup": {"asks": "backup"}}
    for number, fault in enumerate(FAULTS):
        for index, fields in enumerate(SETTINGS.values()):
            # Without cooldowns: each row is a first failure.
            more[f"t{number}-{index}"] = {"asks": fault.asks, "cooldown": None, **fault.fields, **fields}
    with running(more=more) as router, httpx.Client(base_url=router.url, timeout=30) as http:

        def seen(fault: Fault, target: str, dialect: Dialect, stream: bool) -> str:
            replies = [JSONResponse(body, status, headers) for status, body, headers in fault.answers]
            router.provider.replies[fault.asks] = deque(replies)
            started = time.monotonic()
            answer = http.post(dialect.path, json={**ASKS[dialect], "model": target, "stream": stream})
            seconds = time.monotonic() - started
            assert seconds < 2 * TIMEOUT + SLACK, f"{fault.name}, {target}: {seconds:.1f} s"
            return _seen(answer, dialect)

        for number, fault in enumerate(FAULTS):
            for index, setting in enumerate(SETTINGS):
                target = f"t{number}-{index}"
                yield fault.name, setting, *(seen(fault, target, CHAT, stream) for stream in (False, True))
            for dialect in ASKS:
                if dialect is not CHAT:
                    told = (seen(fault, f"t{number}-0", dialect, stream) for stream in (False, True))
                    yield fault.name, dialect.path, *told


def _seen(answer: httpx.Response, dialect: Dialect) -> str:
    """An answer in words; nothing of it is left out that a client could see of the fault."""
    assert "Traceback" not in answer.text
    for secret in (KEY, "sk-upstream-secret"):
        assert secret not in answer.text + str(answer.headers)
    headers = answer.headers
    words = [str(answer.status_code)]
    if answer.status_code != 200:
        words.append(_error(answer.json(), dialect))
        if "retry-after" in headers:
            words.append(f"`Retry-After: {headers['retry-after']}`")
    elif headers["content-type"].startswith("text/event-stream"):
        words.append(_events(answer.text, dialect))
    else:
        assert gist_of_answer(answer.json()).text == "Hello there!"
        words.append("the answer")
    if headers["x-router-reason"] == "fallback":
        words.append(f"of `{headers['x-router-target']}`")
    attempts = headers.get("x-router-attempts", "0")
    if attempts != "1":
        words.append(f"({attempts} attempts)")
    return re.sub(r"\bt\d+-\d+\b", "it", " ".join(words))


def _events(text: str, dialect: Dialect) -> str:
    parts = [part for part in text.split("\n\n") if part]
    datas = [part.partition("data: ")[2] for part in parts]
    events = [json.loads(data) for data in datas if data != "[DONE]"]
    names = [event.get("type") for event in events]
    ends = {
        CHAT: datas[-1] == "[DONE]",
        MESSAGES_DIALECT: "message_stop" in names,
        RESPONSES: "response.completed" in names,
    }
    errors = [
        event for event in events if event.get("error") or event.get("type") in ("error", "response.failed")
    ]
    if ends[dialect]:
        assert not errors
        assert gist_of_events([text.encode()]).text == "Hello there!"
        return "the answer"
    content = "".join(map(_words, events))
    return f"“{content}”, then in the stream {' and '.join(_error(event, dialect) for event in errors)}"


def _words(event: dict[str, Any]) -> str:
    """What one event of any dialect says."""
    if "choices" in event:
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    delta = event.get("delta")
    if event.get("type") == "response.output_text.delta":
        return str(delta)
    return str(delta.get("text", "")) if isinstance(delta, dict) else ""


def _error(body: dict[str, Any], dialect: Dialect) -> str:
    """An error whose shape is checked on the way: a body, or an event."""
    kind = body.get("type")
    error = body.get("error")
    event = ""
    if dialect is MESSAGES_DIALECT:
        assert kind == "error"
        assert error.keys() == {"type", "message"}
    elif kind == "response.failed":
        event, error = f"`{kind}` ", body["response"]["error"]
        assert error.keys() == {"code", "message"}
    elif kind == "error":  # of the responses' stream
        event, error = f"`{kind}` ", body
        assert body.keys() >= {"code", "message", "param", "sequence_number"}
    else:
        assert error.keys() == {"message", "type", "param", "code"}
    named = [
        f"`{error[field]}`" for field in ("type", "code") if error.get(field) and error[field] != "error"
    ]
    # Which of its words httpx or litellm has for it depends on where the connection broke.
    message = re.sub(r"broke off \(\w+\)", "broke off (…)", error["message"])
    return f"{event}{', '.join(named)}{': ' if named else ''}{message}"


def page() -> str:
    """The tables, as they stand in docs/faults.md below its marker."""
    cells: dict[str, dict[str, str]] = {}
    for fault, column, whole, streamed in rows():
        told = cells.setdefault(fault, {})
        cell = whole if whole == streamed else f"{whole}<br>stream: {streamed}"
        if column in SETTINGS and told and _without_attempts(cell) == _without_attempts(told["alone"]):
            attempts = re.search(r"\(\d+ attempts\)", cell)
            cell = f"the same {attempts[0]}" if attempts else "the same"
        told[column] = cell
    by_setting = _table(cells, list(SETTINGS), list(SETTINGS))
    others = [dialect.path for dialect in ASKS if dialect is not CHAT]
    by_dialect = _table(cells, others, [f"`{path}`" for path in others])
    return (
        f"`{CHAT.path}`:\n\n{by_setting}\nThe other dialects, where the target stands alone:\n\n{by_dialect}"
    )


def _table(cells: dict[str, dict[str, str]], columns: list[str], heads: list[str]) -> str:
    lines = [f"| the provider | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    lines += [
        f"| {fault} | {' | '.join(told[column] for column in columns)} |" for fault, told in cells.items()
    ]
    return "\n".join(lines) + "\n"


def _without_attempts(cell: str) -> str:
    return re.sub(r" \(\d+ attempts\)", "", cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    made = page()
    if not parser.parse_args().write:
        print(made, end="")
        return
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    PAGE.write_text(head + MARKER + made, encoding="utf-8")


if __name__ == "__main__":
    main()
