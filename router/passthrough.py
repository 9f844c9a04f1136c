"""Providers of OpenAI's dialect: messages, tools and whatever else go out as they came, and so comes the answer back.

Nothing is translated, so neither messages nor chunks are taken apart; what a provider adds to the dialect gets
through, both ways. Only the model's name, the mode in the metadata and fields that are null are the router's to
change. Connections, proxies and certificates are those of litellm's HTTP client, which the caller hands in. Sending
through ``litellm.acompletion`` instead takes three times as long (tests/BENCHMARKS.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
from httpx_sse import EventSource

from router.errors import UpstreamError
from router.policy import Target
from router.schemas import to_json
from router.upstream import Scrubber, Usage, answered_error, usage_of

_PATH = "/chat/completions"
# How long the end of a stream is waited for after its last event.
_DRAIN_SECONDS = 0.05


async def send(
    client: httpx.AsyncClient,
    target: Target,
    model: str,
    body: Mapping[str, Any],
    key: str | None,
    scrub: Scrubber,
) -> httpx.Response:
    """Send a chat completion; the answer's body is still to be read, and the response to be closed.

    Parameters
    ----------
    client : httpx.AsyncClient
    target : Target
        With an ``api_base``. Its ``params`` are the body's defaults; of them, ``extra_headers`` are headers and
        ``extra_body`` more defaults.
    model : str
        As the provider calls it.
    body : mapping
        Of a chat completion, streamed where ``stream`` is true; what is null is left out.
    key : str or None
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
    streamed = bool(body.get("stream"))
    headers = httpx.Headers(
        {
            "content-type": "application/json",
            "accept": "text/event-stream" if streamed else "application/json",
            # A server without a key may still want the header.
            "authorization": f"Bearer {key or 'none'}",
        }
    )
    # Header names know no case: two spellings of one would go out joined.
    headers.update({name: str(value) for name, value in (extra_headers or {}).items()})
    given = {field: value for field, value in body.items() if value is not None}
    sent = {**params, **(extra_body or {}), **given, "model": model}
    if not streamed:
        # Of the target's defaults: providers refuse them on a whole answer.
        sent.pop("stream", None)
        sent.pop("stream_options", None)
    request = client.build_request(
        "POST",
        f"{(target.api_base or '').rstrip('/')}{_PATH}",
        content=to_json(sent),
        headers=headers,
        timeout=target.timeout,
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


async def whole(response: httpx.Response, target: Target, scrub: Scrubber) -> tuple[bytes, Usage | None]:
    """A whole answer's body, and what it used.

    Raises
    ------
    UpstreamError
        It is an error all the same, or no chat completion.
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
    if "choices" not in data:  # an error in words of its own, mostly
        nonsense = f"The provider of {target.model} answered with something other than a chat completion."
        raise answered_error(target, scrub, status=502, body=data, otherwise=nonsense)
    return content, usage_of(data)


async def events(
    response: httpx.Response, target: Target, scrub: Scrubber
) -> AsyncGenerator[tuple[bytes, Usage | None]]:
    """The chunks of a streamed answer up to its end, each as JSON with the usage that it names.

    Raises
    ------
    UpstreamError
        The provider sent an error, or no stream.
    httpx.HTTPError
        The connection broke.
    """
    try:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            _raise_if_error(_object(await response.aread()), target, scrub)
            raise UpstreamError(f"The provider of {target.model} answered without a stream.", status=502)
        async with contextlib.aclosing(EventSource(response).aiter_sse()) as received:
            async for event in received:
                if event.data == "[DONE]":
                    # A connection whose body was not read to its end cannot be used again.
                    with contextlib.suppress(TimeoutError, httpx.HTTPError):
                        async with asyncio.timeout(_DRAIN_SECONDS):
                            async for _ in received:
                                pass
                    return
                if not event.data:
                    continue
                # The ends tell half a chunk, or a page of HTML, without parsing every one.
                if not (event.data.startswith("{") and event.data.rstrip().endswith("}")):
                    nonsense = f"The provider of {target.model} sent something other than JSON objects in its stream."
                    raise UpstreamError(nonsense, status=502)
                usage = None
                # Most chunks hold neither, and need not be parsed.
                if '"usage"' in event.data or '"error"' in event.data:
                    data = _object(event.data)
                    _raise_if_error(data, target, scrub)
                    usage = usage_of(data)
                # An event of several lines goes on as one: in JSON a line's end is a space.
                yield event.data.replace("\n", " ").encode(), usage
    finally:
        await response.aclose()


def _raise_if_error(data: Mapping[str, Any], target: Target, scrub: Scrubber) -> None:
    """Some providers answer 200 with an error in the body, or send one in a stream."""
    error = data.get("error")
    if error:
        code = error.get("code") if isinstance(error, dict) else None
        raise answered_error(target, scrub, status=code if isinstance(code, int) else 502, body=data)


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the text is something else."""
    try:
        data = json.loads(text)
    except ValueError:  # UnicodeDecodeError is one
        return {}
    return data if isinstance(data, dict) else {}
