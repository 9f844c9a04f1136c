"""What is wrong with a request is told in its dialect's shape, with the right status, and nothing of it is echoed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running import KEY, Running, running

WORDS = "the quick brown fox"
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
GOOD: dict[str, dict[str, Any]] = {
    "chat": {"model": "cheap", "messages": [{"role": "user", "content": WORDS}]},
    "messages": {"model": "cheap", "max_tokens": 9, "messages": [{"role": "user", "content": WORDS}]},
    "responses": {"model": "cheap", "input": [{"role": "user", "content": WORDS}]},
}
ANY = tuple(PATHS)
TURNS = ("chat", "messages")

# What is wrong, in which dialects, and the status.
BYTES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"\xff\xfe", 400),
    (b'{"model": NaN}', 400),
    (b"[" * 100_000, 400),
    (
        b'{"model": "cheap", "messages": [{"role": "user", "content": "\\ud800"}], "input": "x", "max_tokens": 1}',
        400,
    ),
    (b" " * 40_000 + b"{}", 413),
]
FIELDS: list[tuple[tuple[str, ...], dict[str, Any], int]] = [
    (ANY, {"model": 4}, 400),
    (ANY, {"model": "nothing-of-the-kind"}, 404),
    (ANY, {"stream": "yes"}, 400),
    (ANY, {"metadata": [1]}, 400),
    (ANY, {"metadata": {"mode": 4}}, 400),
    (ANY, {"tools": {}}, 400),
    (ANY, {"tools": [WORDS]}, 400),
    (TURNS, {"messages": None}, 400),
    (TURNS, {"messages": []}, 400),
    (TURNS, {"messages": WORDS}, 400),
    (TURNS, {"messages": [WORDS]}, 400),
    (TURNS, {"messages": [{"content": WORDS}]}, 400),
    (TURNS, {"messages": [{"role": 4, "content": WORDS}]}, 400),
    (TURNS, {"messages": [{"role": "user", "content": 4}]}, 400),
    (TURNS, {"messages": [{"role": "user", "content": [WORDS]}]}, 400),
    (TURNS, {"messages": [{"role": "assistant", "tool_calls": [4]}]}, 400),
    (("messages",), {"max_tokens": None}, 400),
    (("messages",), {"max_tokens": "9"}, 400),
    (("messages",), {"max_tokens": True}, 400),
    (("messages",), {"max_tokens": -1}, 400),
    (("messages",), {"system": 4}, 400),
    (("messages",), {"system": [WORDS]}, 400),
    (("messages",), {"thinking": WORDS}, 400),
    (("messages",), {"tool_choice": "auto"}, 400),
    (("messages",), {"stop_sequences": [4]}, 400),
    (("messages",), {"mcp_servers": [{"url": "https://x.test"}]}, 400),
    (("responses",), {"input": None}, 400),
    (("responses",), {"input": []}, 400),
    (("responses",), {"input": 4}, 400),
    (("responses",), {"input": [WORDS]}, 400),
    (("responses",), {"input": [{"role": "user"}]}, 400),
    (("responses",), {"input": [{"content": WORDS}]}, 400),
    (("responses",), {"input": [{"type": 4}]}, 400),
    (("responses",), {"input": [{"role": "user", "content": [WORDS]}]}, 400),
    (("responses",), {"input": [{"type": "item_reference", "id": "msg_1"}]}, 400),
    (("responses",), {"instructions": [WORDS]}, 400),
    (("responses",), {"reasoning": "high"}, 400),
    (("responses",), {"text": []}, 400),
    (("responses",), {"max_output_tokens": 0}, 400),
    (("responses",), {"store": True}, 400),
    (("responses",), {"background": True}, 400),
    (("responses",), {"previous_response_id": "resp_1"}, 400),
    (("responses",), {"conversation": {"id": "conv_1"}}, 400),
    (("responses",), {"prompt": {"id": "pmpt_1"}}, 400),
]


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    with running(limits={"body_bytes": 150_000}) as started:
        yield started


@pytest.fixture(scope="module")
def http(router: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=router.url) as client:
        yield client


def check(dialect: str, answer: httpx.Response, status: int) -> str:
    """The error's message, of an answer in the dialect's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    if dialect == "messages":
        assert body.keys() == {"type", "error", "request_id"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
        assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    expected = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large"}[status]
    assert body["error"]["type"] == expected
    for leak in (WORDS, KEY, "Traceback", "litellm", "site-packages", ".py"):
        assert leak not in answer.text
    message: str = body["error"]["message"]
    assert message.endswith((".", "]")) or status == 404
    return message


@pytest.mark.parametrize("dialect", PATHS)
@pytest.mark.parametrize(("content", "status"), BYTES, ids=range(len(BYTES)))
def test_bodies_that_cannot_be_read(
    router: Running, http: httpx.Client, dialect: str, content: bytes, status: int
) -> None:
    if status == 413:
        content = content * 4
    before = len(router.provider.seen)
    check(dialect, http.post(PATHS[dialect], content=content), status)
    assert len(router.provider.seen) == before


@pytest.mark.parametrize(
    ("dialect", "change", "status"),
    [(dialect, change, status) for dialects, change, status in FIELDS for dialect in dialects],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_are_wrong(
    router: Running, http: httpx.Client, dialect: str, change: dict[str, Any], status: int, stream: bool
) -> None:
    body = {**GOOD[dialect], **({"stream": True} if stream else {}), **change}
    before = len(router.provider.seen)
    message = check(dialect, http.post(PATHS[dialect], json=body), status)
    assert len(router.provider.seen) == before
    if status == 400:
        (field,) = change
        assert field in message


def test_a_message_needs_a_limit_and_its_count_none(http: httpx.Client) -> None:
    body = {name: value for name, value in GOOD["messages"].items() if name != "max_tokens"}
    assert "max_tokens" in check("messages", http.post("/v1/messages", json=body), 400)
    counted = http.post("/v1/messages/count_tokens", json=body)
    assert counted.json().keys() == {"input_tokens"}
    check("messages", http.post("/v1/messages/count_tokens", json={}), 400)


@pytest.mark.parametrize("dialect", PATHS)
def test_what_passes_beside_it(http: httpx.Client, dialect: str) -> None:
    odd = {"tools": None, "metadata": None, "stream": None, "temperature": None}
    assert http.post(PATHS[dialect], json={**GOOD[dialect], **odd}).status_code == 200


# Blocks and items of the right outer form and nonsense inside: whatever is made of them, it is no server error.
NONSENSE: list[Any] = [
    {},
    {"type": None},
    {"type": "text"},
    {"type": "text", "text": 4},
    {"type": "image"},
    {"type": "image", "source": "x"},
    {"type": "image", "source": {"type": "base64"}},
    {"type": "tool_use", "input": "x", "id": 4},
    {"type": "tool_result", "content": 4},
    {"type": "tool_result", "content": [4, {"type": "image", "source": {"type": "url"}}]},
    {"type": "thinking", "thinking": 4, "signature": 4},
    {"type": "thinking", "signature": "router:1:x:eyJ9"},
    {"type": "reasoning", "summary": 4, "encrypted_content": 4},
    {"type": "reasoning", "encrypted_content": "router:1:anthropic:eyJ0aGlua2luZ19ibG9ja3MiOiA0fQ=="},
    {"type": "function_call", "arguments": {}},
    {"type": "function_call_output", "output": 4},
    {"type": "function_call_output", "output": [4, {"type": "input_image"}]},
    {"type": "custom_tool_call", "input": 4},
    {"type": "input_image", "image_url": 4},
    {"type": "unheard_of"},
]


@pytest.mark.parametrize("target", ["cheap", "echo", "claude"])
@pytest.mark.parametrize("nonsense", NONSENSE, ids=json.dumps)
def test_nonsense_inside_is_no_server_error(
    http: httpx.Client, nonsense: dict[str, Any], target: str
) -> None:
    for role in ("user", "assistant", "tool", "system", "x"):
        turns = [{"role": "user", "content": WORDS}, {"role": role, "content": [nonsense]}]
        bodies = {
            "chat": {"messages": turns, "tools": [nonsense]},
            "messages": {"messages": turns, "max_tokens": 9, "system": [nonsense], "tools": [nonsense]},
            "responses": {"input": [*turns, nonsense], "tools": [nonsense]},
        }
        for dialect, body in bodies.items():
            answer = http.post(PATHS[dialect], json={**body, "model": target})
            assert answer.status_code in (200, 400), (dialect, role, answer.text)
