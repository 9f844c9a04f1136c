"""The HTTP server: read the request, predict off the event loop, decide, dispatch."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from router import __version__
from router.decision import Decision, RequestFacts
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect
from router.dialects.messages import COUNT_PATH
from router.dispatch import Stream
from router.errors import RequestError, RouterError, UpstreamError
from router.features import Prompt
from router.gateway import Gateway, load_gateway
from router.metrics import CONTENT_TYPE
from router.openapi import description
from router.schemas import (
    read_facts,
    read_route,
    request_id,
    route_answer,
    to_json,
    trail_header,
    wants_trail,
)
from router.settings import Settings, load_settings
from router.upstream import Usage

logger = logging.getLogger("router")

T = TypeVar("T")

# Who counted the tokens of an answer of count_tokens: ``provider``, or ``estimate``.
TOKEN_COUNT_HEADER = "x-router-token-count"

# nginx's status for a client that went away before its answer. It is logged and counted; nobody receives it.
CLIENT_GONE = 499


def create_app(settings: Settings | None = None, gateway: Gateway | None = None) -> FastAPI:
    """The ASGI application; loads policy and bundle, so that it never runs without them.

    Parameters
    ----------
    settings : Settings, optional
        Found in the documented order otherwise.
    gateway : Gateway, optional
        One that is loaded already.

    Raises
    ------
    RouterError
        Policy or bundle cannot be loaded.
    """
    if gateway is None:
        settings, policy = load_settings(**(settings.model_dump(exclude_unset=True) if settings else {}))
        gateway = load_gateway(settings, policy)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # litellm loads behind the server, which can predict already.
        asyncio.get_running_loop().call_soon(gateway.dispatcher.warm_up)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(gateway.close)
            if gateway.live is not None:
                await stack.enter_async_context(gateway.live.following())
            yield

    app = FastAPI(
        title="router",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
    )

    @app.post(CHAT.path)
    async def chat_completions(request: Request) -> Response:
        return await Exchange(request, gateway, CHAT).run(_answer)

    @app.post(MESSAGES.path)
    async def messages(request: Request) -> Response:
        return await Exchange(request, gateway, MESSAGES).run(_answer)

    @app.post(RESPONSES.path)
    async def responses(request: Request) -> Response:
        return await Exchange(request, gateway, RESPONSES).run(_answer)

    @app.post(COUNT_PATH)
    async def count_tokens(request: Request) -> Response:
        return await Exchange(request, gateway, MESSAGES).run(_count_tokens)

    @app.post("/v1/route")
    async def route(request: Request) -> Response:
        return await Exchange(request, gateway).run(_route)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        data = [
            {"id": name, "object": "model", "created": gateway.started, "owned_by": "router"}
            for name in gateway.in_force.policy.names()
        ]
        return _json_response({"object": "list", "data": data})

    @app.get("/healthz")
    async def healthz() -> Response:
        return _json_response({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        dispatch = gateway.dispatcher.state
        state = {
            "status": "unavailable" if dispatch == "failed" else "ready",
            "bundle": gateway.in_force.bundle,
            "policy": gateway.in_force.version,
            "dispatch": dispatch,
            **(gateway.live.report() if gateway.live is not None else {}),
        }
        if dispatch == "failed":
            state["detail"] = "litellm cannot be loaded; the log says why"
        return _json_response(state, 503 if dispatch == "failed" else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return _json_response(description(__version__))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # Starlette's own: no such path, no such method.
        dialect = MESSAGES if request.url.path.startswith(MESSAGES.path) else CHAT
        wrong = RequestError(f"{error.detail}.", status=error.status_code)
        return _json_response(dialect.error_body(wrong), error.status_code, dict(error.headers or {}))

    return app


def app_from_environment() -> FastAPI:
    """The application as worker processes make it; ends the process with one line where it cannot be made."""
    try:
        return create_app()
    except RouterError as error:
        logger.error("%s", error)
        raise SystemExit(3) from None  # tells uvicorn not to start this worker again and again


@dataclass
class Exchange:
    """One request and its answer: identity, time, decision, and the one line that is logged about it."""

    request: Request
    gateway: Gateway
    dialect: Dialect = CHAT
    started: float = field(default_factory=time.perf_counter)
    decision: Decision | None = None
    decision_ms: float = 0.0

    def __post_init__(self) -> None:
        self.in_force = self.gateway.in_force
        self.id = request_id(self.request.headers) or f"req_{uuid.uuid4().hex}"
        self.path = self.request.url.path
        self.wants_trail = wants_trail(self.request.headers, self.in_force.policy.limits)

    async def run(self, handle: Callable[[Exchange], Coroutine[Any, Any, Response]]) -> Response:
        """Answer with what ``handle`` returns, or with its error in the client's dialect; never a traceback."""
        try:
            response = await handle(self)
        except (RequestError, UpstreamError) as error:
            response = _json_response(self.dialect.error_body(error, self.id), error.status, self.headers())
            if isinstance(error, UpstreamError) and error.retry_after is not None:
                response.headers["retry-after"] = error.retry_after
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except Exception as error:
            self._log_bug(error)
            response = _json_response(self.dialect.error_body(error, self.id), 500, self.headers())
        if not isinstance(response, EventStream):
            self.finish(response.status_code)
        return response

    async def body(self) -> bytes:
        """All of the request's body; :class:`RequestError` 413 as soon as it is over the limit."""
        limit = self.in_force.policy.limits.body_bytes
        length = self.request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        chunks = []
        size = 0
        async for chunk in self.request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)

    async def decide(self, facts: RequestFacts, prompt: Callable[[], Prompt]) -> Decision:
        """Decide, and take the time."""
        started = time.perf_counter()
        self.decision = await self.gateway.decide(self.in_force, facts, prompt)
        seconds = time.perf_counter() - started
        self.decision_ms = seconds * 1e3
        self.gateway.metrics.decided(self.decision, seconds)
        return self.decision

    def headers(self) -> dict[str, str]:
        """What every answer carries, as far as it is known."""
        headers = {"x-request-id": self.id, "x-router-policy": self.in_force.version}
        if self.dialect is MESSAGES:
            headers["request-id"] = self.id  # Anthropic's name for it
        decision = self.decision
        if decision is not None:
            headers["x-router-target"] = decision.target
            headers["x-router-model"] = decision.model
            headers["x-router-reason"] = decision.reason
            headers["x-router-decision-ms"] = f"{self.decision_ms:.3f}"
            if decision.tier is not None:
                headers["x-router-tier"] = decision.tier
            if decision.score is not None:
                headers["x-router-score"] = f"{decision.score:.6g}"
            if decision.threshold is not None:
                headers["x-router-threshold"] = f"{decision.threshold:.6g}"
            if self.wants_trail:
                headers["x-router-trail"] = trail_header(decision.trail)
        return headers

    def finish(self, status: int) -> None:
        """Count and log; called once, when the answer is complete."""
        seconds = time.perf_counter() - self.started
        self.gateway.metrics.answered(self.path, status, seconds)
        decision = self.decision or Decision("-", "-", "default")
        logger.info(
            "%s %s %d %.1f ms id=%s target=%s reason=%s tier=%s mode=%s score=%s policy=%s decision=%.1f ms",
            self.request.method,
            self.path,
            status,
            seconds * 1e3,
            self.id,
            decision.target,
            decision.reason if self.decision else "-",
            decision.tier or "-",
            decision.mode or "-",
            "-" if decision.score is None else f"{decision.score:.4f}",
            self.in_force.version,
            self.decision_ms,
        )

    def _log_bug(self, error: Exception) -> None:
        # Where it happened, and not its message: that may hold part of the prompt.
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
        logger.error("id=%s %s at %s", self.id, type(error).__name__, place)


class EventStream(Response):
    """Server-sent events that stop, at the provider too, when the client goes away.

    Starlette's StreamingResponse notices a client that left only with the next chunk that it sends.
    """

    def __init__(self, stream: Stream, exchange: Exchange) -> None:
        self.status_code = 200
        self.background = None
        self._stream = stream
        self._exchange = exchange
        # Proxies must not hold chunks back.
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        self.init_headers(headers | exchange.headers())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = self.status_code
        try:
            await send({"type": "http.response.start", "status": status, "headers": self.raw_headers})
            await unless_gone(receive, self._send_all(send))
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            await self._stream.aclose()
            if self._stream.error is not None:
                status = self._stream.error.status
            _count_usage(self._exchange, self._stream.usage)
            self._exchange.finish(status)

    async def _send_all(self, send: Send) -> None:
        async for event in self._stream:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client goes away first: :class:`ClientDisconnect`."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            # So that the connection to the provider is closed before this returns.
            await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(exchange: Exchange) -> Response:
    inbound = exchange.dialect.read(await exchange.body(), exchange.request.headers)
    limits = exchange.in_force.policy.limits
    facts = read_facts(inbound.body, exchange.request.headers, limits, inbound.content())

    async def dispatch() -> Response:
        decision = await exchange.decide(facts, inbound.prompt)
        to = exchange.in_force.destination(decision.target)
        dispatcher = exchange.gateway.dispatcher
        if inbound.stream:
            return EventStream(await dispatcher.stream(to, inbound), exchange)
        answer = await dispatcher.complete(to, inbound)
        _count_usage(exchange, answer.usage)
        return Response(answer.body, headers=exchange.headers(), media_type="application/json")

    return await unless_gone(exchange.request.receive, dispatch())


async def _count_tokens(exchange: Exchange) -> Response:
    inbound = MESSAGES.read_count(await exchange.body(), exchange.request.headers)
    limits = exchange.in_force.policy.limits
    facts = read_facts(inbound.body, exchange.request.headers, limits, inbound.content())

    async def count() -> Response:
        decision = await exchange.decide(facts, inbound.prompt)
        to = exchange.in_force.destination(decision.target)
        counted = await exchange.gateway.dispatcher.count_tokens(to, inbound)
        headers = exchange.headers() | {TOKEN_COUNT_HEADER: "estimate" if counted.estimated else "provider"}
        return Response(counted.body, headers=headers, media_type="application/json")

    return await unless_gone(exchange.request.receive, count())


async def _route(exchange: Exchange) -> Response:
    limits = exchange.in_force.policy.limits
    body = read_route(await exchange.body(), limits)
    facts = read_facts(body.body, exchange.request.headers, limits)

    async def decisions() -> list[dict[str, Any]]:
        answers = []
        for index in range(len(body)):
            one = replace(facts, content=body.content(index))
            decision = await exchange.decide(one, partial(body.prompt, index))
            in_force, trail = exchange.in_force, exchange.wants_trail
            answers.append(
                route_answer(decision, in_force.version, in_force.bundle, exchange.decision_ms, trail=trail)
            )
        return answers

    answers = await unless_gone(exchange.request.receive, decisions())
    if body.many:
        exchange.decision = None  # one header cannot speak for many prompts
        return _json_response({"decisions": answers}, headers=exchange.headers())
    return _json_response(answers[0], headers=exchange.headers())


def _count_usage(exchange: Exchange, usage: Usage | None) -> None:
    decision = exchange.decision
    if decision is not None:
        target = exchange.in_force.policy.targets[decision.target]
        exchange.gateway.metrics.used(decision.target, usage, target.prices)


def _json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(data), status_code=status, headers=headers, media_type="application/json")


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body is over the limit of {limit:,} bytes.", status=413, code="request_too_large"
    )
