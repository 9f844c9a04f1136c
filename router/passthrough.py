"""Providers that speak the client's dialect: the body goes out as it came, and so comes the answer back.

Nothing is translated, so neither messages nor chunks are taken apart; what a provider adds to the dialect gets
through, both ways. Only the model's name, the mode in the metadata, another family's reasoning, fields that are null and
the asking for a stream's usage are the router's to change. Connections, proxies and certificates are those of litellm's
HTTP client, which the caller hands in. Sending through ``litellm.acompletion`` instead takes three times as long
(tests/BENCHMARKS.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent

from router.errors import UpstreamError
from router.policy import Target
from router.schemas import to_json
from router.upstream import Scrubber, Usage, answered_error, usage_of, usage_of_messages, usage_of_responses

# How long the end of a stream is waited for after its last event.
_DRAIN_SECONDS = 0.05
_ANTHROPIC = "https://api.anthropic.com"
_OPENAI = "https://api.openai.com/v1"
_ANTHROPIC_VERSION = "2023-06-01"

# Of a target's params, the fields of these dialects: the others are litellm's, or chat's.
_FIELDS = {
    "messages": frozenset(
        (
            "context_management",
            "max_tokens",
            "metadata",
            "output_config",
            "service_tier",
            "stop_sequences",
            "temperature",
            "thinking",
            "top_k",
            "top_p",
        )
    ),
    "responses": frozenset(
        (
            "include",
            "max_output_tokens",
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "reasoning",
            "safety_identifier",
            "service_tier",
            "temperature",
            "text",
            "top_p",
            "truncation",
        )
    ),
}

# The first version of Anthropic's API that refuses these.
_WITHOUT_SAMPLING = "2026-10-21"
_SAMPLING = frozenset(("temperature", "top_k", "top_p"))

# Anthropic's error types and OpenAI's codes, for errors that come in a stream and so without a status.
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}

# An event of a streamed answer as it goes to the client, and the usage that it names.
Event = tuple[bytes, Usage | None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a body of one dialect goes.

    Attributes
    ----------
    dialect : str
        ``chat``, ``messages`` or ``responses``.
    url : str
    model : str
        As the provider calls it.
    headers : mapping
        With the key.
    """

    dialect: str
    url: str
    model: str
    headers: Mapping[str, str] = field(repr=False)


def chat(target: Target, model: str, key: str | None) -> Endpoint:
    """The chat completions of a target with an ``api_base``."""
    # A server without a key may still want the header.
    headers = {"authorization": f"Bearer {key or 'none'}"}
    return Endpoint("chat", f"{(target.api_base or '').rstrip('/')}/chat/completions", model, headers)


def messages(
    target: Target, provider: str, model: str, key: str | None, passed: Mapping[str, str]
) -> Endpoint:
    """Anthropic's messages at a target; ``passed`` are the client's headers of that dialect."""
    headers = {"anthropic-version": _ANTHROPIC_VERSION, **passed}
    if provider == "anthropic":
        # Anthropic's own key goes to Anthropic alone: an address that a policy gives comes with a key that it names.
        key = key or (None if target.api_base else os.environ.get("ANTHROPIC_API_KEY"))
        base = (
            (target.api_base or _anthropic_base()).rstrip("/").removesuffix("/messages").removesuffix("/v1")
        )
        return Endpoint("messages", f"{base}/v1/messages", model, headers | {"x-api-key": key or "none"})
    headers |= {"x-api-key": key or "none", "authorization": f"Bearer {key or 'none'}"}
    return Endpoint("messages", f"{(target.api_base or '').rstrip('/')}/messages", model, headers)


def responses(target: Target, model: str, key: str | None) -> Endpoint:
    """OpenAI's responses at a target."""
    key = key or (None if target.api_base else os.environ.get("OPENAI_API_KEY"))
    base = (
        target.api_base or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE") or _OPENAI
    )
    return Endpoint(
        "responses", f"{base.rstrip('/')}/responses", model, {"authorization": f"Bearer {key or 'none'}"}
    )


async def send(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    target: Target,
    body: Mapping[str, Any],
    scrub: Scrubber,
) -> httpx.Response:
    """Send a request; the answer's body is still to be read, and the response to be closed.

    Parameters
    ----------
    client : httpx.AsyncClient
    endpoint : Endpoint
    target : Target
        Its ``params`` are the body's defaults; of them, ``extra_headers`` are headers and ``extra_body`` more defaults.
    body : mapping
        Of the endpoint's dialect, streamed where ``stream`` is true; what is null is left out.
    scrub : Scrubber

    Raises
    ------
    UpstreamError
        The provider answered with an error.
    httpx.HTTPError
        It could not be reached, or closed the connection.
    """
    params = dict(target.params)
    extra_headers, extra_body = params.pop("extra_headers", None), params.pop("extra_body", None)
    fields = _FIELDS.get(endpoint.dialect)
    if fields is not None:
        if endpoint.headers.get("anthropic-version", "") >= _WITHOUT_SAMPLING:
            fields = fields - _SAMPLING
        params = {name: value for name, value in params.items() if name in fields}
    streamed = bool(body.get("stream"))
    headers = httpx.Headers(
        {
            "content-type": "application/json",
            "accept": "text/event-stream" if streamed else "application/json",
            **endpoint.headers,
        }
    )
    # Header names know no case: two spellings of one would go out joined.
    headers.update({name: str(value) for name, value in (extra_headers or {}).items()})
    given = {name: value for name, value in body.items() if value is not None}
    sent = {**params, **(extra_body or {}), **given, "model": endpoint.model}
    if not streamed:
        # Of the target's defaults: providers refuse them on a whole answer.
        sent.pop("stream", None)
        sent.pop("stream_options", None)
    request = client.build_request(
        "POST", endpoint.url, content=to_json(sent), headers=headers, timeout=target.timeout
    )
    response = await client.send(request, stream=True, follow_redirects=False)
    if response.is_success:
        return response
    try:
        await response.aread()
    finally:
        await response.aclose()
    otherwise = ""
    if response.is_redirect:
        otherwise = (
            f"The provider of {target.model} redirects to another address: api_base has to name that one."
        )
    raise answered_error(
        target,
        scrub,
        status=response.status_code,
        body=_object(response.text),
        retry_after=response.headers.get("retry-after"),
        otherwise=otherwise or response.text.strip(),
    )


async def whole(
    response: httpx.Response, target: Target, scrub: Scrubber, dialect: str = "chat"
) -> tuple[bytes, dict[str, Any], Usage | None]:
    """A whole answer: its body, the same as an object, and what it used.

    Parameters
    ----------
    response : httpx.Response
    target : Target
    scrub : Scrubber
    dialect : str
        That of the answer; ``count`` for a count of tokens.

    Raises
    ------
    UpstreamError
        It is an error all the same, or no answer of the dialect.
    """
    try:
        content = await response.aread()
    finally:
        await response.aclose()
    data = _object(content)
    _raise_if_error(data, target, scrub)
    if not data:
        raise UpstreamError(
            f"The provider of {target.model} answered with something other than a JSON object.", status=502
        )
    field, words, usage = _WHOLE[dialect]
    if field not in data:  # an error in words of its own, mostly
        nonsense = f"The provider of {target.model} answered with something other than {words}."
        raise answered_error(target, scrub, status=502, body=data, otherwise=nonsense)
    return content, data, usage(data)


# By dialect: a field that every answer has, what it is called, and how its usage is read.
_WHOLE: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], Usage | None]]] = {
    "chat": ("choices", "a chat completion", usage_of),
    "messages": ("content", "a message", usage_of_messages),
    "responses": ("output", "a response", usage_of_responses),
    "count": ("input_tokens", "a count of tokens", lambda data: None),
}


async def events(response: httpx.Response, target: Target, scrub: Scrubber) -> AsyncGenerator[Event]:
    """The events of a streamed chat completion, ``[DONE]`` among them.

    Raises
    ------
    UpstreamError
        The provider sent an error, or no stream.
    httpx.HTTPError
        The connection broke.
    """
    async with contextlib.aclosing(_received(response, target, scrub)) as received:
        async for event in received:
            usage = None
            # Most chunks hold neither, and need not be parsed.
            if '"usage"' in event.data or '"error"' in event.data:
                data = _object(event.data)
                _raise_if_error(data, target, scrub)
                usage = usage_of(data)
            # An event of several lines goes on as one: in JSON a line's end is a space.
            yield b"data: " + event.data.replace("\n", " ").encode() + b"\n\n", usage
    yield b"data: [DONE]\n\n", None


async def chunks(response: httpx.Response, target: Target, scrub: Scrubber) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a streamed chat completion; raises as :func:`events` does."""
    async with contextlib.aclosing(_received(response, target, scrub)) as received:
        async for event in received:
            data = _object(event.data)
            _raise_if_error(data, target, scrub)
            if data:
                yield data


async def named_events(
    response: httpx.Response, target: Target, scrub: Scrubber, dialect: str
) -> AsyncGenerator[Event]:
    """The events of a streamed answer of ``messages`` or ``responses``, up to the one that ends it.

    Raises as :func:`events` does, and where the provider broke off before the end.
    """
    last, told, read = _NAMED[dialect]
    so_far: Usage | None = None
    ended = False

    async with contextlib.aclosing(_received(response, target, scrub)) as received:
        async for event in received:
            # Every event names itself twice; some servers leave the first out.
            name = event.event if event.event != "message" else str(_object(event.data).get("type"))
            usage = None
            if name in told or name in last or name in _FAILED:
                data = _object(event.data)
                if name in _FAILED:
                    raise _failed(data, target, scrub)
                usage = read(data)
                if usage is not None:
                    usage = so_far = _highest(so_far, usage)
            yield f"event: {name}\ndata: ".encode() + event.data.replace("\n", " ").encode() + b"\n\n", usage
            if name in last:
                ended = True
                await _drain(received)
                break
    if not ended:
        raise UpstreamError(
            f"The provider of {target.model} broke off before the end of its answer.", status=502
        )


# By dialect: the events that end a stream, those that name usage, and how that is read.
_NAMED: dict[str, tuple[frozenset[str], frozenset[str], Callable[[Mapping[str, Any]], Usage | None]]] = {
    "messages": (
        frozenset(("message_stop",)),
        frozenset(("message_start", "message_delta")),
        usage_of_messages,
    ),
    "responses": (
        frozenset(("response.completed", "response.incomplete")),
        frozenset(),
        usage_of_responses,
    ),
}
_FAILED = frozenset(("error", "response.failed"))


async def _received(
    response: httpx.Response, target: Target, scrub: Scrubber
) -> AsyncGenerator[ServerSentEvent]:
    """The events of an answer before ``[DONE]``; the response is closed behind them."""
    try:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            _raise_if_error(_object(await response.aread()), target, scrub)
            raise UpstreamError(f"The provider of {target.model} answered without a stream.", status=502)
        async with contextlib.aclosing(EventSource(response).aiter_sse()) as received:
            async for event in received:
                if event.data == "[DONE]":
                    await _drain(received)
                    return
                if not event.data:
                    continue
                # The ends tell half a chunk, or a page of HTML, without parsing every one.
                if not (event.data.startswith("{") and event.data.rstrip().endswith("}")):
                    nonsense = f"The provider of {target.model} sent something other than JSON objects in its stream."
                    raise UpstreamError(nonsense, status=502)
                yield event
    finally:
        await response.aclose()


async def _drain(received: AsyncGenerator[ServerSentEvent]) -> None:
    """Read a body to its end: otherwise its connection cannot be used again."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in received:
                pass


def _highest(before: Usage | None, now: Usage) -> Usage:
    """Anthropic tells the input at the start, the output at the end, and there the input again or not."""
    if before is None:
        return now
    return Usage(
        input=max(before.input, now.input),
        output=max(before.output, now.output),
        cached=max(before.cached, now.cached),
        cache_write=max(before.cache_write, now.cache_write),
    )


def _failed(data: Mapping[str, Any], target: Target, scrub: Scrubber) -> UpstreamError:
    """The error that a stream's event tells: bare, in ``error``, or in the ``error`` of a response."""
    response = data.get("response")
    data = response if isinstance(response, Mapping) else data
    error = data.get("error")
    error = error if isinstance(error, Mapping) else data
    return answered_error(target, scrub, status=_status(error), body={"error": dict(error)})


def _raise_if_error(data: Mapping[str, Any], target: Target, scrub: Scrubber) -> None:
    """Some providers answer 200 with an error in the body, or send one in a stream."""
    error = data.get("error")
    if error:
        status = _status(error) if isinstance(error, dict) else 502
        raise answered_error(target, scrub, status=status, body=data)


def _status(error: Mapping[str, Any]) -> int:
    """The status of an error that came without one, by its code or its type."""
    code = error.get("code")
    if isinstance(code, int):
        return code
    return next((_STATUSES[str(word)] for word in (error.get("type"), code) if str(word) in _STATUSES), 502)


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the text is something else."""
    try:
        data = json.loads(text)
    except ValueError:  # UnicodeDecodeError is one
        return {}
    return data if isinstance(data, dict) else {}


def _anthropic_base() -> str:
    return os.environ.get("ANTHROPIC_API_BASE") or os.environ.get("ANTHROPIC_BASE_URL") or _ANTHROPIC
