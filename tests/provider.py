"""A loopback provider that speaks OpenAI's chat completions (and enough of Anthropic's messages).

What it answers is chosen by the model's name, so that a policy can hold one target per behaviour. Every
request is recorded as it arrived. For tests it runs in a thread; for measurements
``python tests/provider.py --port 9999`` runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
SECRET = "sk-upstream-secret-0123456789"


@dataclass
class Seen:
    """One request as the provider received it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    disconnected: threading.Event = field(default_factory=threading.Event)


class Provider:
    """Starlette application with the requests it has seen."""

    def __init__(self) -> None:
        self.seen: deque[Seen] = deque(maxlen=1000)  # a measurement sends more than memory should hold
        self.url = ""
        self.replies: dict[str, deque[Response]] = {}  # by model, answered first, each once
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/messages", self.messages, methods=["POST"]),
            ]
        )

    def reply(self, model: str, *replies: Response) -> None:
        """Let the next requests for a model be answered so."""
        self.replies.setdefault(model, deque()).extend(replies)

    @property
    def last(self) -> Seen:
        return self.seen[-1]

    async def chat(self, request: Request) -> Response:
        seen = Seen(request.url.path, dict(request.headers), json.loads(await request.body()))
        self.seen.append(seen)
        body = seen.body
        model = body["model"]
        if self.replies.get(model):
            return self.replies[model].popleft()
        if model == "rate-limited":
            return _error(
                429, "Rate limit reached", "rate_limit_error", "rate_limit_exceeded", {"retry-after": "7"}
            )
        if model == "broken":
            return _error(500, f"The server had an error with key {SECRET}", "server_error", None)
        if model == "not-json":
            return Response("<html>bad gateway</html>", status_code=502, media_type="text/html")
        if model == "picky":
            return _error(
                400, "Unsupported value", "invalid_request_error", "unsupported_value", param="temperature"
            )
        if model == "garbage":
            half = '{"id": "chatcmpl-1", "choi'
            if body.get("stream"):
                return Response(f"data: {half}\n\n", media_type="text/event-stream")
            return Response(half, media_type="application/json")
        if model == "detail-in-200":
            return JSONResponse({"detail": f"model is loading ({SECRET})"})
        if model == "error-in-200":
            return _error(200, f"Provider returned error ({SECRET})", "server_error", None)
        if model == "resets":
            media_type = "text/event-stream" if body.get("stream") else "application/json"
            return StreamingResponse(_reset(), media_type=media_type)
        if model == "hang":
            await _until_gone(request, seen)
            return Response(status_code=499)
        if body.get("stream"):
            return StreamingResponse(self._stream(request, seen), media_type="text/event-stream")
        return JSONResponse(_completion(body))

    async def _stream(self, request: Request, seen: Seen) -> AsyncIterator[bytes]:
        body = seen.body
        model = body["model"]
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        try:
            yield _event(head, {"role": "assistant", "content": ""})
            if body.get("tools") and body["messages"][-1]["role"] != "tool":
                call = {"index": 0, "id": "call_1", "type": "function"}
                yield _event(
                    head, {"tool_calls": [call | {"function": {"name": "get_weather", "arguments": ""}}]}
                )
                for piece in ('{"city":', '"Oslo"}'):
                    yield _event(head, {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
                yield _event(head, {}, finish="tool_calls")
            else:
                for word in ("Hello", " there", "!"):
                    yield _event(head, {"content": word})
                    if model == "fails-midway":
                        error = {
                            "message": f"overloaded ({SECRET})",
                            "type": "server_error",
                            "code": None,
                            "param": None,
                        }
                        yield f"data: {json.dumps({'error': error})}\n\n".encode()
                        return
                    if model == "drops-midway":
                        raise ConnectionResetError
                    if model == "stalls-midway":
                        await asyncio.sleep(30)
                    if model == "endless":
                        for _ in range(10_000):
                            yield _event(head, {"content": "."})
                            await asyncio.sleep(0.01)
                yield _event(head, {}, finish="stop")
            if (body.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps(head | {'choices': [], 'usage': USAGE})}\n\n".encode()
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            seen.disconnected.set()
            raise

    async def messages(self, request: Request) -> Response:
        seen = Seen(request.url.path, dict(request.headers), json.loads(await request.body()))
        self.seen.append(seen)
        return JSONResponse(
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": seen.body["model"],
                "content": [{"type": "text", "text": "Hello there!"}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 9, "output_tokens": 3},
            }
        )


async def _reset() -> AsyncIterator[bytes]:
    """The head of an answer, and then no connection."""
    yield b""
    raise ConnectionResetError


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "Hello there!", "refusal": None}
    finish = "stop"
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        function = {"name": "get_weather", "arguments": '{"city":"Oslo"}'}
        message["content"] = None
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        finish = "tool_calls"
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"] + "-2025-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 4}},
        "system_fingerprint": "fp_1",
        "service_tier": "default",
    }


def _event(head: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode()


def _error(
    status: int,
    message: str,
    type_: str,
    code: str | None,
    headers: dict[str, str] | None = None,
    param: str | None = None,
) -> JSONResponse:
    error = {"message": message, "type": type_, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _until_gone(request: Request, seen: Seen) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    seen.disconnected.set()


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port of the loopback interface, in a thread; gives its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def provider() -> Iterator[Provider]:
    """A running :class:`Provider`; ``url`` ends in ``/v1``."""
    running = Provider()
    with serve(running.app) as url:
        running.url = f"{url}/v1"
        yield running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9999)
    port = parser.parse_args().port
    uvicorn.run(Provider().app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
