"""Providers of OpenAI's dialect: the client's body goes out as it came, and the answer comes back as it came.

Nothing is translated, so neither messages nor chunks are taken apart; what a provider adds to the dialect gets
through, both ways. Connections, proxies and certificates are those of litellm's HTTP client, which the caller hands
in. Sending through ``litellm.acompletion`` instead takes three times as long (tests/BENCHMARKS.md).
"""

from __future__ import annotations

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
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream" if body.get("stream") else "application/json",
        # A server without a key may still want the header.
        "authorization": f"Bearer {key or 'none'}",
        **(extra_headers or {}),
    }
    given = {field: value for field, value in body.items() if value is not None}
    sent = {**params, **(extra_body or {}), **given, "model": model}
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


async def whole(response: httpx.Response, target: Target) -> tuple[bytes, Usage | None]:
    """A whole answer's body, and what it used.

    Raises
    ------
    UpstreamError
        It is no JSON object.
    """
    try:
        content = await response.aread()
    finally:
        await response.aclose()
    data = _object(content)
    if not data:
        raise UpstreamError(
            f"The provider of {target.model} answered with something other than a JSON object.", status=502
        )
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
            raise UpstreamError(f"The provider of {target.model} answered without a stream.", status=502)
        async for event in EventSource(response).aiter_sse():
            if event.data == "[DONE]":
                return
            if not event.data:
                continue
            usage = None
            # Most chunks hold neither, and need not be parsed.
            if '"usage"' in event.data or '"error"' in event.data:
                data = _object(event.data)
                if data.get("error"):
                    code = data["error"].get("code") if isinstance(data["error"], dict) else None
                    raise answered_error(
                        target, scrub, status=code if isinstance(code, int) else 502, body=data
                    )
                usage = usage_of(data)
            yield event.data.encode(), usage
    finally:
        await response.aclose()


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the text is something else."""
    try:
        data = json.loads(text)
    except ValueError:  # UnicodeDecodeError is one
        return {}
    return data if isinstance(data, dict) else {}
