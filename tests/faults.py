"""What a client sees of each way in which a provider can fail: the table in docs/faults.md.

``python tests/faults.py`` runs every fault against the loopback provider and prints the page;
``python tests/faults.py --write`` puts it in its place. A test compares the two.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from running import KEY, running
from starlette.responses import JSONResponse

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
ASK = {"messages": [{"role": "user", "content": "hello"}]}
# The dialects beside chat: path and request.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "`/v1/messages`": ("/v1/messages", {**ASK, "max_tokens": 9}),
    "`/v1/responses`": ("/v1/responses", {"input": "hello"}),
}


def other_rows() -> Iterator[list[str]]:
    """Fault, and what a client of each other dialect saw of it, the target being alone."""
    more = {
        f"t{number}-0": {"asks": fault.asks, "cooldown": None, **fault.fields}
        for number, fault in enumerate(FAULTS)
    }
    with running(more=more) as router, httpx.Client(base_url=router.url, timeout=30) as http:
        for number, fault in enumerate(FAULTS):
            cells = [fault.name]
            for path, ask in OTHERS.values():
                seen = []
                for stream in (False, True):
                    replies = [JSONResponse(body, status, headers) for status, body, headers in fault.answers]
                    router.provider.replies[fault.asks] = type(router.provider.seen)(replies)
                    answer = http.post(path, json={**ask, "model": f"t{number}-0", "stream": stream})
                    seen.append(_seen_otherwise(answer))
                cells.append(seen[0] if seen[0] == seen[1] else f"{seen[0]}<br>stream: {seen[1]}")
            yield cells


def _seen_otherwise(answer: httpx.Response) -> str:
    """What a client of another dialect than chat saw: the shape alone, the words are those of chat."""
    for secret in (KEY, "sk-upstream-secret", "Traceback"):
        assert secret not in answer.text + str(answer.headers)
    words = [str(answer.status_code)]
    streamed = answer.headers["content-type"].startswith("text/event-stream")
    if streamed:
        events = [
            json.loads(line.removeprefix("data: "))
            for line in answer.text.split("\n")
            if line.startswith("data: ")
        ]
        last = events[-1]
        text = "".join(
            event["delta"] if isinstance(event["delta"], str) else event["delta"].get("text", "")
            for event in events
            if event["type"].endswith((".output_text.delta", "content_block_delta"))
        )
        if last["type"] in ("message_stop", "response.completed"):
            assert text == "Hello there!"
            return "200 the answer"
        words.append(f"“{text}”, then")
        if last["type"] == "response.failed":
            words.append(f"`error` and `response.failed`, `{last['response']['error']['code']}`")
        else:
            words.append(f"`event: error`, `{last['error']['type']}`")
    elif answer.status_code == 200:
        return "200 the answer"
    else:
        body = answer.json()
        assert ("type" in body) == ("request-id" in answer.headers)
        words.append(f"`{body['error']['type']}`")
        if "retry-after" in answer.headers:
            words.append(f"`Retry-After: {answer.headers['retry-after']}`")
    return " ".join(words)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Fault, setting, what a client saw of a whole answer, and of a stream."""
    more: dict[str, dict[str, Any]] = {"backup": {"asks": "backup"}}
    for number, fault in enumerate(FAULTS):
        for index, fields in enumerate(SETTINGS.values()):
            # Without cooldowns: each row is a first failure.
            more[f"t{number}-{index}"] = {"asks": fault.asks, "cooldown": None, **fault.fields, **fields}
    with running(more=more) as router, httpx.Client(base_url=router.url, timeout=30) as http:
        http.post("/v1/chat/completions", json={**ASK, "model": "echo"})  # litellm is there from here on
        for number, fault in enumerate(FAULTS):
            for index, setting in enumerate(SETTINGS):
                seen = []
                for stream in (False, True):
                    replies = [JSONResponse(body, status, headers) for status, body, headers in fault.answers]
                    router.provider.replies[fault.asks] = type(router.provider.seen)(replies)
                    started = time.monotonic()
                    body = {**ASK, "model": f"t{number}-{index}", "stream": stream}
                    seen.append(_seen(http.post("/v1/chat/completions", json=body)))
                    seconds = time.monotonic() - started
                    assert seconds < 2 * TIMEOUT + SLACK, f"{fault.name}, {setting}: {seconds:.1f} s"
                yield fault.name, setting, seen[0], seen[1]


def _seen(answer: httpx.Response) -> str:
    """An answer in words; nothing of it is left out that a client could see of the fault."""
    assert "Traceback" not in answer.text
    for secret in (KEY, "sk-upstream-secret"):
        assert secret not in answer.text + str(answer.headers)
    headers = answer.headers
    words = [str(answer.status_code)]
    if answer.status_code != 200:
        words.append(_error(answer.json()["error"]))
        if "retry-after" in headers:
            words.append(f"`Retry-After: {headers['retry-after']}`")
    elif headers["content-type"].startswith("text/event-stream"):
        words.append(_events(answer.text))
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "Hello there!"
        words.append("the answer")
    if headers["x-router-reason"] == "fallback":
        words.append(f"of `{headers['x-router-target']}`")
    attempts = headers.get("x-router-attempts", "0")
    if attempts != "1":
        words.append(f"({attempts} attempts)")
    return re.sub(r"\bt\d+-\d+\b", "it", " ".join(words))


def _events(text: str) -> str:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    content = "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ())
    )
    error = chunks[-1].get("error")
    if error is None:
        assert (content, events[-1]) == ("Hello there!", "[DONE]")
        return "the answer"
    assert "[DONE]" not in events
    return f"“{content}”, then in the stream {_error(error)}"


def _error(error: dict[str, Any]) -> str:
    assert error.keys() == {"message", "type", "param", "code"}
    kind = f"`{error['type']}`" + (f", `{error['code']}`" if error["code"] else "")
    # Which of its words httpx or litellm has for it depends on where the connection broke.
    message = re.sub(r"broke off \(\w+\)", "broke off (…)", error["message"])
    return f"{kind}: {message}"


def page() -> str:
    """The table, as it stands in docs/faults.md below its marker."""
    cells: dict[str, dict[str, str]] = {}
    for fault, setting, whole, streamed in rows():
        told = cells.setdefault(fault, {})
        cell = whole if whole == streamed else f"{whole}<br>stream: {streamed}"
        if told and _without_attempts(cell) == _without_attempts(told["alone"]):
            attempts = re.search(r"\(\d+ attempts\)", cell)
            cell = f"the same {attempts[0]}" if attempts else "the same"
        told[setting] = cell
    lines = [f"| the provider | {' | '.join(SETTINGS)} |", "| --- " * (len(SETTINGS) + 1) + "|"]
    lines += [f"| {fault} | {' | '.join(told.values())} |" for fault, told in cells.items()]
    lines += ["", "In the other dialects, with the target alone; the words of the messages are the same:", ""]
    lines += [f"| the provider | {' | '.join(OTHERS)} |", "| --- " * (len(OTHERS) + 1) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in other_rows()]
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
