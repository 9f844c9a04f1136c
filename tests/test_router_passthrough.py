from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest

from router import passthrough
from router.errors import UpstreamError
from router.policy import Target
from router.upstream import Scrubber, Usage

TARGET = Target(model="openai/small", api_base="http://provider.test/v1/")
ANSWER = {"choices": [{"message": {"content": "hi", "reasoning_content": "hm"}}], "vendor": [1]}
STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def sent(response: httpx.Response, target: Target = TARGET, **body: Any) -> tuple[httpx.Request, Any]:
    """The request that went out for a body, and what came back: an answer, or a stream's events."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return response

    async def once() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            endpoint = passthrough.chat(target, "small", "sk-mine")
            got = await passthrough.send(client, endpoint, target, body, Scrubber(["sk-mine"]))
            if body.get("stream"):
                return [event async for event in passthrough.events(got, target, Scrubber([]))]
            content, _, usage = await passthrough.whole(got, target, Scrubber([]))
            return content, usage

    back = asyncio.run(once())
    return requests[0], back


def stream(*pieces: bytes, headers: Any = STREAM) -> httpx.Response:
    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return httpx.Response(200, headers=headers, content=chunks())


def payloads(events: Iterable[tuple[bytes, Usage | None]]) -> list[Any]:
    *told, (last, _) = events
    assert last == b"data: [DONE]\n\n"
    return [json.loads(data.removeprefix(b"data: ")) for data, _ in told]


def test_the_body_goes_out_and_the_answer_comes_back_as_they_are() -> None:
    answer = json.dumps(ANSWER | {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}, indent=1).encode()
    body = {"messages": [{"role": "user", "content": "é\n"}], "model": "auto", "top_k": 3, "stop": None}
    request, (content, usage) = sent(httpx.Response(200, content=answer), **body)
    assert str(request.url) == "http://provider.test/v1/chat/completions"
    assert json.loads(request.content) == {"messages": body["messages"], "model": "small", "top_k": 3}
    assert request.headers["authorization"] == "Bearer sk-mine"
    assert content == answer
    assert usage == Usage(5, 2)


def test_the_targets_params_are_defaults_and_its_extra_headers_are_headers() -> None:
    params = {"temperature": 0.1, "extra_headers": {"x-team": "a"}, "extra_body": {"top_k": 1, "min_p": 0.2}}
    target = TARGET.model_copy(update={"params": params})
    request, _ = sent(httpx.Response(200, json=ANSWER), target, messages=[], top_k=9)
    expected = {"messages": [], "model": "small", "temperature": 0.1, "top_k": 9, "min_p": 0.2}
    assert json.loads(request.content) == expected
    assert request.headers["x-team"] == "a"
    assert "extra_headers" in params


@pytest.mark.parametrize("content", [b"<html>", b"[1]", b"", b"\xff"])
def test_an_answer_that_is_no_json_object_is_a_502(content: bytes) -> None:
    with pytest.raises(UpstreamError, match="openai/small answered with something other") as caught:
        sent(httpx.Response(200, content=content), messages=[])
    assert caught.value.status == 502


def test_a_redirect_is_not_followed_with_the_key() -> None:
    away = httpx.Response(307, headers={"location": "http://elsewhere.test/"})
    with pytest.raises(UpstreamError, match="api_base has to name that one") as caught:
        sent(away, messages=[])
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(422, json={"error": "no such field"}), "no such field"),
        (httpx.Response(422, json={"message": "bare", "type": "t"}), "bare"),
        (httpx.Response(422, text="plain words"), "plain words"),
        (httpx.Response(422, text="<html>"), "an error and no words for it"),
        (httpx.Response(422, json={"error": {"message": "bad key sk-mine"}}), r"bad key \[key\]"),
    ],
)
def test_an_errors_words(response: httpx.Response, message: str) -> None:
    with pytest.raises(UpstreamError, match=message) as caught:
        sent(response, messages=[])
    assert caught.value.status == 422


def test_events_cut_anywhere() -> None:
    whole = 'data: {"choices":[],"a":"é"}\n\n: alive\n\ndata: {"b":1}\r\n\r\ndata:{"c":2}\n\ndata: [DONE]\n\n'
    raw = whole.encode()
    expected = [{"choices": [], "a": "é"}, {"b": 1}, {"c": 2}]
    for size in (1, 2, 7, len(raw)):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        _, events = sent(stream(*pieces), messages=[], stream=True)
        assert payloads(events) == expected


def test_the_streams_usage_is_read() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
    first, last = b'data: {"usage": null}\n\n', f"data: {json.dumps({'usage': usage})}\n\n".encode()
    _, events = sent(stream(first, last), messages=[], stream=True)
    assert [found for _, found in events] == [None, Usage(7, 1, cached=3), None]


@pytest.mark.parametrize(("code", "status"), [(429, 429), ("overloaded", 502)])
def test_an_error_in_the_stream(code: Any, status: int) -> None:
    error = f"data: {json.dumps({'error': {'message': 'too much', 'code': code}})}\n\n".encode()
    with pytest.raises(UpstreamError, match="too much") as caught:
        sent(stream(error), messages=[], stream=True)
    assert caught.value.status == status


def test_an_answer_without_a_stream_is_a_502() -> None:
    with pytest.raises(UpstreamError, match="without a stream") as caught:
        sent(httpx.Response(200, json=ANSWER), messages=[], stream=True)
    assert caught.value.status == 502


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_comes_as_a_success(stream: bool) -> None:
    body = {"error": {"message": "quota is gone", "code": 429}}
    with pytest.raises(UpstreamError, match="quota is gone") as caught:
        sent(httpx.Response(200, json=body), messages=[], stream=stream)
    assert caught.value.status == 429


def test_a_header_of_the_target_replaces_ours_whatever_its_case() -> None:
    params = {"extra_headers": {"Content-Type": "application/json; charset=utf-8", "x-version": 2}}
    target = TARGET.model_copy(update={"params": params})
    request, _ = sent(httpx.Response(200, json=ANSWER), target, messages=[])
    assert request.headers.get_list("content-type") == ["application/json; charset=utf-8"]
    assert request.headers["x-version"] == "2"


def test_stream_options_of_the_target_are_for_streams() -> None:
    options = {"stream_options": {"include_usage": True}}
    target = TARGET.model_copy(update={"params": options})
    request, _ = sent(httpx.Response(200, json=ANSWER), target, messages=[])
    assert "stream_options" not in json.loads(request.content)
    request, _ = sent(stream(b"data: [DONE]\n\n"), target, messages=[], stream=True)
    assert json.loads(request.content)["stream_options"] == {"include_usage": True}


def test_an_event_of_several_lines_goes_on_as_one() -> None:
    _, events = sent(stream(b'data: {"choices":\ndata: []}\n\n'), messages=[], stream=True)
    assert [data for data, _ in events] == [b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"]


def test_a_stream_is_read_to_its_end_so_that_its_connection_serves_again() -> None:
    read: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        for piece in (b"data: {}\n\n", b"data: [DONE]\n\n", b""):
            read.append(piece)
            yield piece
        read.append(b"end")

    _, events = sent(httpx.Response(200, headers=STREAM, content=chunks()), messages=[], stream=True)
    assert payloads(events) == [{}]
    assert read[-1] == b"end"
