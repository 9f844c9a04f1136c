"""The HTTP server: read the request, predict off the event loop, decide, dispatch."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from router import __version__
from router.account import Account
from router.accounting import Ended, entry_of, feature_of
from router.basis import state_of
from router.capability import lacks
from router.clients import Client
from router.content import Content, KnownContent
from router.dashboard import PATH as DASHBOARD
from router.dashboard import Dashboard
from router.decision import Decision, RequestFacts
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect, Inbound
from router.dialects.messages import COUNT_PATH
from router.dispatch import Answer, Destination, Stream
from router.entry import now
from router.errors import BudgetError, LedgerError, RequestError, RouterError, UpstreamError, UsageError
from router.escalation import Held, fault_of, gist_of_answer, gist_of_events
from router.exposure import ThisMachineOnly, for_this_machine
from router.failover import Attempt, Sent
from router.features import Prompt
from router.gateway import Gateway, load_gateway
from router.logs import Access
from router.metrics import CONTENT_TYPE
from router.openapi import description
from router.policy import Fault, Limits, printable
from router.schemas import (
    read_facts,
    read_route,
    request_id,
    route_answer,
    to_json,
    trail_header,
    wants_trail,
)
from router.sessions import requested, session_key
from router.settings import Settings, load_settings
from router.upstream import Usage

if TYPE_CHECKING:
    from router.tracing import Trace

logger = logging.getLogger("router")

T = TypeVar("T")
Complete = TypeVar("Complete", Answer, Held, Answer | Held)
Handle = Callable[["Exchange"], Coroutine[Any, Any, Response]]

# Who counted the tokens of an answer of count_tokens: ``provider``, or ``estimate``.
TOKEN_COUNT_HEADER = "x-router-token-count"

# nginx's status for a client that went away before its answer. It is logged and counted; nobody receives it.
CLIENT_GONE = 499

# For a client's rate of tokens, where a provider does not count: too many rather than too few.
_BYTES_PER_TOKEN = 4


def create_app(settings: Settings | None = None, gateway: Gateway | None = None) -> FastAPI:
    """The ASGI application; loads policy and bundle, so that it never runs without them.

    Parameters
    ----------
    settings : Settings, optional
        Found in the documented order where no gateway is given. Where they name no client keys and do not open the server to
        anyone, it answers this machine alone (:class:`router.exposure.ThisMachineOnly`).
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
            sampling = asyncio.create_task(gateway.metrics.sampling())
            stack.callback(sampling.cancel)
            if gateway.live is not None:
                await stack.enter_async_context(gateway.live.following())
            if gateway.shared is not None:
                await gateway.shared.look()
            if gateway.clients is not None:
                watching = asyncio.create_task(gateway.clients.watch())
                stack.callback(watching.cancel)
            yield

    app = FastAPI(
        title="router",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
    )

    def serve(
        path: str,
        handle: Handle,
        dialect: Dialect = CHAT,
        *,
        method: str = "POST",
        counted: bool = True,
    ) -> None:
        async def endpoint(request: Request) -> Response:
            return await Exchange(request, gateway, dialect).run(handle, counted=counted)

        # Starlette's plain route: what FastAPI's reads of a function's signature, a gateway's bodies have no use for.
        app.add_route(path, endpoint, methods=[method])

    # Kilo's own provider, the one that sends x-kilocode-mode, puts this path behind its base URL.
    serve("/api/openrouter/chat/completions", _converse)
    serve(CHAT.path, _converse)
    serve(MESSAGES.path, _converse, MESSAGES)
    serve(RESPONSES.path, _converse, RESPONSES)
    serve(COUNT_PATH, _count_tokens, MESSAGES)
    serve("/v1/route", _route)
    serve("/v1/models", _models, method="GET", counted=False)
    serve("/metrics", _metrics, method="GET", counted=False)
    serve("/v1/spend", _spend, method="GET", counted=False)
    serve("/v1/budgets", _budgets, method="GET", counted=False)

    async def healthz(request: Request) -> Response:
        return _json_response({"status": "ok"})

    async def readyz(request: Request) -> Response:
        return _readyz(request, gateway)

    dashboard = Dashboard(gateway)
    app.add_route(DASHBOARD, dashboard.page, methods=["GET"])
    app.mount(DASHBOARD, dashboard.app)

    async def openapi(request: Request) -> Response:
        return _json_response(description(__version__))

    app.add_route("/healthz", healthz, methods=["GET"])
    app.add_route("/readyz", readyz, methods=["GET"])
    app.add_route("/openapi.json", openapi, methods=["GET"])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # Starlette's own: no such path, no such method.
        refused = _refused(request.url.path, RequestError(f"{error.detail}.", status=error.status_code))
        refused.headers.update(error.headers or {})
        return refused

    if settings is not None and for_this_machine(settings):
        app.add_middleware(ThisMachineOnly, refuse=_refused)
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
    client: Client | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.in_force = self.gateway.in_force
        self._decided: Decision | None = None
        self._session: str | None = None
        self._content: Content | KnownContent | None = None
        self._facts: RequestFacts | None = None
        self._prompt: Callable[[], Prompt] | None = None
        self._account: Account | None = None
        self._body_bytes = 0
        self._arrived = now()
        self.dispatches = False  # until it is known to, and again when it is recorded
        self.trace: Trace | None = None
        self.streamed = False
        self.first_seconds: float | None = None
        self.error: str | None = None
        self.id = request_id(self.request.headers) or f"req_{uuid.uuid4().hex}"
        self.path = self.request.url.path
        self.wants_trail = False

    @property
    def client_id(self) -> str:
        """The client's id; empty where the server has no clients' keys."""
        return self.client.id if self.client else ""

    @property
    def limits(self) -> Limits:
        """What this client may do: the policy's limits, and what its own key is for."""
        limits = self.in_force.policy.limits
        if self.client is None:
            return limits
        own = {"threshold_override": self.client.threshold_override, "explain": self.client.explain}
        return limits.model_copy(update=own)

    async def run(self, handle: Handle, *, counted: bool = True) -> Response:
        """Answer with what ``handle`` returns, or with its error in the client's dialect; never a traceback.

        ``counted`` says whether the request counts in the client's rates, the metrics and the log.
        """
        if counted:
            self.gateway.metrics.arrived()
            if (tracing := self.gateway.tracing) is not None:
                self.trace = tracing.request(self.request.method, self.path, self.request.headers)
        try:
            self._admit(counted)
            response = await handle(self)
        except RequestError as error:
            self.error = error.code or "invalid_request"
            response = self._error(error, error.status)
            response.headers.update(error.headers)
        except UpstreamError as error:
            self.error = error.code or error.type or "upstream_error"
            response = self._error(error, error.status)
            if error.retry_after is not None:
                response.headers["retry-after"] = error.retry_after
        except ClientDisconnect:
            self._left()
            response = Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:  # the server stops
            self._left()
            with suppress(LedgerError):
                await self.record(CLIENT_GONE)
            if counted:
                self.finish(CLIENT_GONE)
            raise
        except Exception as error:
            self._log_bug(error)
            self.error = "internal_error"
            response = self._error(error, 500)
        if counted and not isinstance(response, EventStream):
            sharing = self.remember(response.status_code)
            try:
                await self.record(response.status_code)
            except LedgerError as error:
                logger.error("id=%s %s", self.id, error)
                response = self._error(RequestError("The request could not be recorded.", status=503), 503)
            if sharing is not None:
                await sharing
            status = response.status_code

            async def finish() -> None:
                self.finish(status)

            # With the answer on its way, and before any other request is read: nothing is awaited in between.
            response.background = BackgroundTask(finish)
        return response

    def _left(self) -> None:
        """Nobody waits for the answer any longer; what the last call took is an estimate."""
        if self.attempts and self.attempts[-1].usage is None and not self.attempts[-1].size:
            self.used(self.attempts[-1], None, size=0)

    def _error(self, error: Exception, status: int) -> Response:
        return _json_response(self.dialect.error_body(error, self.id), status, self.headers())

    def _admit(self, counted: bool) -> None:
        clients = self.gateway.clients
        if clients is not None:
            self.client = clients.identify(self.request.headers)
            if counted:
                clients.admit(self.client)
        self.wants_trail = wants_trail(self.request.headers, self.limits)

    def check_admin(self) -> None:
        """Raise :class:`RequestError`, 403, where the client may not see other clients' traffic."""
        if self.client is not None and not self.client.admin:
            raise RequestError(
                "This page shows other clients' traffic: it takes a key with the admin scope.",
                status=403,
                code="not_allowed",
            )

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
        self._body_bytes = size
        return b"".join(chunks)

    async def facts(self, inbound: Inbound) -> RequestFacts:
        """What the decision on a conversation needs; raises :class:`RequestError`."""
        return await self.in_session(
            read_facts(inbound.body, self.request.headers, self.limits, inbound.content())
        )

    async def in_session(self, facts: RequestFacts) -> RequestFacts:
        """The facts, with what is known of the conversation that the request is part of."""
        assert facts.content is not None
        self._content = facts.content
        self._session = session_key(self.request.headers, facts.content.identity, self.client_id)
        now = time.monotonic()
        if self.gateway.shared is not None:
            await self.gateway.shared.fetch(self._session, now)
        return replace(facts, session=self.gateway.sessions.get(self._session, now), now=now)

    async def decide(
        self, facts: RequestFacts, prompt: Callable[[], Prompt], *, counted: bool = True, spends: bool = False
    ) -> Decision:
        """Decide, and take the time; raises :class:`RequestError` for what the client may not ask for.

        ``counted`` says whether an answer follows, so that the decision counts in the metrics. With
        ``spends``, what it may cost is held of its budgets.
        """
        if self.client is not None:
            self.client.check(self.in_force.policy, facts.model)
            facts = replace(facts, names=frozenset(self.client.names(self.in_force.policy)))
        self._facts, self._prompt = facts, prompt
        started = time.perf_counter()
        self._account = self._own_account()
        if self._account is not None:
            facts = self._account.known_to(facts)
        self.decision = await self.gateway.decide(self.in_force, facts, prompt)
        if self._account is not None and spends:
            await self._afford(self._account, facts, prompt)
        seconds = time.perf_counter() - started
        self.decision_ms = seconds * 1e3
        if self.trace is not None:
            self.trace.decided(self.decision, seconds)
        if counted:
            self.gateway.metrics.decided(self.decision, self.in_force.policy, seconds)
        return self.decision

    def _own_account(self) -> Account | None:
        policy, purse = self.in_force.policy, self.gateway.purse
        if policy.budgets is None or purse is None:
            return None
        feature = feature_of(self.request.headers)
        return Account(purse, policy, self.client_id, feature, self._arrived, self.gateway.metrics)

    async def _afford(self, account: Account, facts: RequestFacts, prompt: Callable[[], Prompt]) -> None:
        """Hold what the decision may cost; where there is no room, decide once more or raise :class:`RequestError`, 402."""
        content = facts.content
        assert self.decision is not None
        assert content is not None
        over = facts.at_limit is not None
        full = await account.hold(self.decision.target, content, force=over)
        if full is not None:
            facts = account.at_limit(facts, full)
            self.decision = await self.gateway.decide(self.in_force, facts, prompt)
            await account.hold(self.decision.target, content, force=True)
        if facts.at_limit is not None:
            self.gateway.metrics.budget("cheapest")
        account.tell(self.decision, self.id)

    async def hold_again(self, target: str) -> None:
        """Hold what the call that begins may cost, where an earlier one was held for."""
        if self._account is not None and self._content is not None and len(self.attempts) > 1:
            await self._account.hold_again(target, self._content, self.attempts[:-1])

    async def send(self, names: Sequence[str], call: Callable[[Destination], Awaitable[T]]) -> Sent[T]:
        """Send to the first of these targets that answers; raises what :meth:`Failover.send` does."""
        await self.gateway.dispatcher.loaded()  # before anything is timed
        headers = self.request.headers
        if self.trace is not None:
            call = self.trace.calling(call, self.attempts)
        return await self.gateway.failover.send(
            names, lambda name: self.in_force.destination(name, headers), call, self.attempts
        )

    def answered_by(self, name: str, reason: Literal["fallback", "escalated"]) -> None:
        """Another target than the one that was decided on has the answer."""
        assert self.decision is not None
        self._decided = self._decided or self.decision
        model = self.in_force.policy.targets[name].model
        trail = (*self.decision.trail, (reason, f"{name} answered in place of {self.decision.target}"))
        self.decision = replace(self.decision, target=name, model=model, reason=reason, trail=trail)
        self.gateway.metrics.rerouted(name, reason)

    def complete(self, sent: Sent[Any], answer: Complete) -> Complete:
        """A complete answer came: its place is free again, and what it took is counted."""
        sent.stay.end()
        size = len(answer.body) / _BYTES_PER_TOKEN if isinstance(answer, Answer) else len(answer.events)
        self.used(sent.attempt, answer.usage, size=size)
        return answer

    async def hold(self, stream: Stream) -> Held:
        """Read a stream to its end; what it took is counted where it does not come there. Raises what ``Held.fill`` does."""
        held = Held(stream)
        try:
            await held.fill()
        except BaseException:  # it broke off, was too late, or the client left
            self.used(self.attempts[-1], held.usage, size=len(held.events), broken=True)
            raise
        return held

    def used(self, attempt: Attempt, usage: Usage | None, *, size: float, broken: bool = False) -> None:
        """Count what an answer took.

        ``size`` is about how many tokens it has, where the provider does not say; ``broken``, that it is not complete.
        """
        if usage is not None and broken and size > usage.output:
            # Anthropic's streams begin with a usage, of one token of output.
            usage = replace(usage, output=math.ceil(size))
            attempt.estimated = True
        attempt.usage, attempt.size = usage, size
        if self.trace is not None:
            self.trace.answered(attempt)
        target = self.in_force.policy.targets[attempt.target]
        self.gateway.metrics.used(attempt.target, usage, target.prices)
        if self.client is not None and self.gateway.clients is not None:
            about = self._body_bytes / _BYTES_PER_TOKEN + size
            tokens = usage.input + usage.output if usage is not None else math.ceil(about)
            self.gateway.clients.used(self.client, tokens)

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
        if self._decided is not None:
            headers["x-router-decided-target"] = self._decided.target
        if self.attempts:
            headers["x-router-attempts"] = str(len(self.attempts))
        return headers

    async def record(self, status: int, *, streamed: bool = False) -> None:
        """Put the request into the ledger, once; waits until it is on the disk where the ledger is strict.

        What was never decided on is not recorded.

        Raises
        ------
        LedgerError
            Strict, and it could not be kept.
        """
        ledger, decision, facts = self.gateway.ledger, self.decision, self._facts
        if decision is None or facts is None or not self.dispatches:
            return
        if ledger is None and self._account is None:
            return
        self.dispatches = False
        seconds, gone = time.perf_counter() - self.started, status == CLIENT_GONE
        error = "client_gone" if gone else self.error
        ended = Ended(
            status, error, seconds, self.decision_ms / 1e3, self.first_seconds, streamed, cancelled=gone
        )
        entry = entry_of(
            decision,
            self.attempts,
            facts,
            ended,
            policy=self.in_force.policy,
            time=self._arrived,
            request=self.id,
            dialect=self.dialect.name,
            versions=(self.in_force.version, self.in_force.bundle),
            session=self._session,
            client=self.client_id or None,
            headers=self.request.headers,
            decided=self._decided.target if self._decided else None,
        )
        if self._account is not None:
            self._account.settle(entry, decision)
        if ledger is None:
            return
        if self.in_force.policy.capture is None or gone or not ledger.takes(entry):
            await ledger.write(entry)
            return
        assert self._prompt is not None
        try:
            prompt = await asyncio.to_thread(self._prompt)
        except asyncio.CancelledError:  # whoever leaves now leaves a row behind all the same
            ledger.record(entry)
            raise
        await ledger.write(entry, prompt.text, state_of(prompt))

    def remember(self, status: int) -> asyncio.Future[Any] | None:
        """Keep where the session's request went, and how long its answer was.

        What this returns is done when other servers can know: before the answer ends, for the next request may go to them.
        """
        decision, content = self.decision, self._content
        if self._session is None or not self.attempts or status >= 400:
            return None
        assert decision is not None
        assert content is not None
        now = time.monotonic()
        rule = self.in_force.policy.sessions
        before = self.gateway.sessions.get(self._session, now)
        after = requested(
            before,
            decision.target,
            # Where nothing is weighed, nobody asks for its tokens; its target counts all the same (`stay`, reasoning).
            context=content.needs.tokens if rule.enabled else 0,
            now=now,
            rule=rule,
            gain=decision.score,
            mode=decision.mode,
        )
        usage = self.attempts[-1].usage
        if usage is not None and (before is None or after.requests != before.requests):
            after = after.answered(usage.output)
        self.gateway.sessions.put(self._session, after)
        return None if self.gateway.shared is None else self.gateway.shared.share(self._session, now)

    def finish(self, status: int) -> None:
        """Count and log; called once, when the answer is complete."""
        if self._account is not None:
            self._account.settle(None)  # where nothing was recorded
        seconds = time.perf_counter() - self.started
        self.gateway.metrics.answered(self.path, status, seconds)
        if self.first_seconds is not None and self.decision is not None:
            self.gateway.metrics.began(self.decision.target, self.first_seconds)
        if self.trace is not None:
            known = {"request": self.id, "client": self.client_id or None, "session": self._session}
            self.trace.end(status, self.decision, known | {"policy": self.in_force.version})
        if logger.isEnabledFor(logging.INFO):
            logger.info(self._access(status, seconds))

    def _access(self, status: int, seconds: float) -> Access:
        used = [
            (one.usage, self.in_force.policy.targets[one.target].prices) for one in self.attempts if one.usage
        ]
        trace, span = (self.trace.ids if self.trace is not None else None) or (None, None)
        costs = [usage.cost(prices) for usage, prices in used if prices is not None]
        return Access(
            method=self.request.method,
            path=self.path,
            status=status,
            ms=seconds * 1e3,
            id=self.id,
            client=self.client_id or None,
            session=self._session,
            decision=self.decision,
            stream=self.streamed,
            first_ms=None if self.first_seconds is None else self.first_seconds * 1e3,
            attempts=len(self.attempts),
            input_tokens=sum(usage.input for usage, _ in used) if used else None,
            output_tokens=sum(usage.output for usage, _ in used) if used else None,
            cached_tokens=sum(usage.cached for usage, _ in used) if used else None,
            cost=sum(costs) if costs else None,
            policy=self.in_force.version,
            bundle=self.in_force.bundle,
            decision_ms=self.decision_ms,
            error="client_gone" if status == CLIENT_GONE else self.error,
            trace=trace,
            span=span,
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

    def __init__(self, stream: Stream | Held, sent: Sent[Any] | None, exchange: Exchange) -> None:
        self.status_code = 200
        self.background = None
        exchange.streamed = True
        self._stream = stream
        self._sent = sent  # None where the stream is complete, and counted
        self._exchange = exchange
        self._events = 0
        self._ended = False  # the client has the last event
        # Proxies must not hold chunks back.
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        self.init_headers(headers | exchange.headers())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, complete = self.status_code, False
        try:
            await send({"type": "http.response.start", "status": status, "headers": self.raw_headers})
            await unless_gone(receive, self._send_events(send))
            complete = True
        except ClientDisconnect:
            # Clients may leave as soon as they have the last event: then they have everything.
            status = status if self._ended else CLIENT_GONE
        except asyncio.CancelledError:  # the server stops
            status = CLIENT_GONE
            raise
        finally:
            await self._stream.aclose()
            if (error := self._stream.error) is not None:
                status = error.status
            await self._settle(status)
            if complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            self._exchange.finish(status)

    async def _send_events(self, send: Send) -> None:
        async for event in self._stream:
            if not self._events:
                self._exchange.first_seconds = time.perf_counter() - self._exchange.started
            self._events += 1
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._ended = self._exchange.dialect.ends(event)

    async def _settle(self, status: int) -> None:
        """Count and record what the answer took; before it ends, so that a strict ledger has it by then."""
        error = self._stream.error
        if error is not None:
            self._exchange.error = error.code or error.type or "upstream_error"
        if self._sent is not None:
            self._sent.stay.end(error, outcome="gone" if status == CLIENT_GONE else "ok")
            broken = error is not None or status == CLIENT_GONE
            # About a token an event.
            self._exchange.used(self._sent.attempt, self._stream.usage, size=self._events, broken=broken)
        # Both are on their way before anything is waited for: whoever leaves now holds up neither.
        sharing = self._exchange.remember(status)
        try:
            await self._exchange.record(status, streamed=True)
        except LedgerError as problem:
            # Its events are with the client already.
            logger.error("id=%s %s", self._exchange.id, problem)
        if sharing is not None:
            await sharing


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


async def _converse(exchange: Exchange) -> Response:
    inbound = exchange.dialect.read(await exchange.body(), exchange.request.headers)
    facts = await exchange.facts(inbound)
    exchange.dispatches = True
    if facts.session is not None:
        inbound = replace(inbound, families=exchange.in_force.families(facts.session.targets))

    async def answer() -> Response:
        await exchange.decide(facts, inbound.prompt, spends=True)
        return await _answer(exchange, inbound, facts.content)

    return await unless_gone(exchange.request.receive, answer())


async def _answer(exchange: Exchange, inbound: Inbound, content: Content | KnownContent | None) -> Response:
    """Send a request where it was decided; then where the policy falls back to, or escalates."""
    policy = exchange.in_force.policy
    decision = exchange.decision
    assert decision is not None
    escalate = policy.tiers[decision.tier].escalate if decision.tier is not None else None
    held = inbound.stream and escalate is not None and escalate.buffer_streams

    async def call(to: Destination) -> Answer | Stream | Held:
        dispatcher = exchange.gateway.dispatcher
        await exchange.hold_again(to.name)
        if not inbound.stream:
            return await dispatcher.complete(to, inbound)
        stream = await dispatcher.stream(to, inbound)
        return await exchange.hold(stream) if held else stream

    def able(name: str) -> bool:
        return content is None or lacks(policy.targets[name], content.needs) is None

    fallbacks = filter(able, policy.targets[decision.target].fallbacks)
    sent = await exchange.send([decision.target, *fallbacks], call)
    if sent.to.name != decision.target:
        exchange.answered_by(sent.to.name, "fallback")
    if isinstance(sent.answer, Stream):
        return EventStream(sent.answer, sent, exchange)
    answer = exchange.complete(sent, sent.answer)
    if escalate is not None and decision.tier is not None:
        stronger = policy.stronger(decision.tier)
        fault = await asyncio.to_thread(_fault, answer, inbound.body, escalate.when)
        if fault is not None and sent.to.name != stronger and able(stronger):
            exchange.gateway.metrics.faulty(sent.to.name, fault)
            answer = await _escalated(exchange, stronger, call) or answer
    if isinstance(answer, Held):
        return EventStream(answer, None, exchange)
    return Response(answer.body, headers=exchange.headers(), media_type="application/json")


async def _escalated(
    exchange: Exchange, stronger: str, call: Callable[[Destination], Awaitable[Answer | Stream | Held]]
) -> Answer | Held | None:
    """The stronger target's answer; None where it gives none, and the first has to do. What both took is counted."""
    try:
        sent = await exchange.send([stronger], call)
    except (RequestError, UpstreamError) as error:
        logger.warning("id=%s no answer of %s to escalate to (%d)", exchange.id, stronger, error.status)
        return None
    assert not isinstance(sent.answer, Stream)
    exchange.answered_by(stronger, "escalated")
    return exchange.complete(sent, sent.answer)


def _fault(answer: Answer | Held, asked: Mapping[str, Any], faults: Collection[Fault]) -> Fault | None:
    if isinstance(answer, Held):
        return fault_of(gist_of_events(answer.events), asked, faults)
    return fault_of(gist_of_answer(json.loads(answer.body)), asked, faults)


async def _count_tokens(exchange: Exchange) -> Response:
    inbound = MESSAGES.read_count(await exchange.body(), exchange.request.headers)
    facts = await exchange.facts(inbound)

    async def count() -> Response:
        decision = await exchange.decide(facts, inbound.prompt, counted=False)
        to = exchange.in_force.destination(decision.target, exchange.request.headers)
        counted = await exchange.gateway.dispatcher.count_tokens(to, inbound)
        headers = exchange.headers() | {TOKEN_COUNT_HEADER: "estimate" if counted.estimated else "provider"}
        return Response(counted.body, headers=headers, media_type="application/json")

    return await unless_gone(exchange.request.receive, count())


async def _route(exchange: Exchange) -> Response:
    limits = exchange.limits
    body = read_route(await exchange.body(), limits)
    facts = read_facts(body.body, exchange.request.headers, limits)

    async def decisions() -> list[dict[str, Any]]:
        answers = []
        for index in range(len(body)):
            one = replace(facts, content=body.content(index))
            if not body.many:
                one = await exchange.in_session(one)
            decision = await exchange.decide(one, partial(body.prompt, index))
            in_force, trail = exchange.in_force, exchange.wants_trail
            answers.append(
                route_answer(decision, in_force.version, in_force.bundle, exchange.decision_ms, trail=trail)
            )
        return answers

    # One decision is made before it would be noticed that nobody waits for it.
    answers = await (unless_gone(exchange.request.receive, decisions()) if body.many else decisions())
    if body.many:
        exchange.decision = None  # one header cannot speak for many prompts
        return _json_response({"decisions": answers}, headers=exchange.headers())
    return _json_response(answers[0], headers=exchange.headers())


async def _models(exchange: Exchange) -> Response:
    policy = exchange.in_force.policy
    names = policy.names() if exchange.client is None else exchange.client.names(policy)
    created = exchange.gateway.started
    data = [{"id": name, "object": "model", "created": created, "owned_by": "router"} for name in names]
    return _json_response({"object": "list", "data": data})


async def _spend(exchange: Exchange) -> Response:
    """The ledger's sums, as `router spend --json` gives them."""
    exchange.check_admin()
    ledger = exchange.gateway.ledger
    if ledger is None:
        raise RequestError("This server keeps no ledger: it was started without --ledger.", status=404)
    asked = exchange.request.query_params
    unknown = sorted(set(asked) - {"by", "since", "until", "limit"})
    if unknown:
        raise RequestError(
            f"'{printable(unknown[0])}' is none of by, since, until and limit.", param=unknown[0][:64]
        )
    limit = asked.get("limit", "20")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 6):
        raise RequestError("'limit' must be a whole number.", param="limit")
    from router.spend import read_spend

    url = ledger.url.render_as_string(hide_password=False)
    try:
        found = await asyncio.to_thread(
            read_spend,
            url,
            by=asked.get("by", "mode"),
            since=asked.get("since"),
            until=asked.get("until"),
            limit=int(limit),
        )
    except UsageError as error:
        raise RequestError(f"{error}".replace("--", "")) from None
    except LedgerError as error:
        logger.error("%s", error)
        raise RequestError("The ledger cannot be read; the log says why.", status=503) from None
    return _json_response(found.as_json())


async def _budgets(exchange: Exchange) -> Response:
    """How the budgets stand, as `router budgets --json` gives it."""
    exchange.check_admin()
    budgets, purse = exchange.in_force.policy.budgets, exchange.gateway.purse
    if budgets is None or purse is None:
        raise RequestError("The policy has no budgets.", status=404)
    from router.budget_report import as_json, read_standings

    try:
        found = await asyncio.to_thread(read_standings, budgets, purse.store, now())
    except BudgetError as error:
        logger.error("%s", error)
        raise RequestError("The budgets cannot be read; the log says why.", status=503) from None
    return _json_response(as_json(budgets, found))


async def _metrics(exchange: Exchange) -> Response:
    exchange.check_admin()
    return Response(exchange.gateway.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _readyz(request: Request, gateway: Gateway) -> Response:
    """Whether the server can answer; to those who may see other clients' traffic, in what state it is."""
    dispatch = gateway.dispatcher.state
    failed = dispatch == "failed"
    state: dict[str, Any] = {"status": "unavailable" if failed else "ready"}
    if _sees_all(request, gateway):
        in_force = gateway.in_force
        state |= {"bundle": in_force.bundle, "policy": in_force.version, "dispatch": dispatch}
        state |= gateway.live.report() if gateway.live is not None else {}
        if gateway.shared is not None:
            state["session_store"] = "away" if gateway.shared.away else "ready"
        if failed:
            state["detail"] = "litellm cannot be loaded; the log says why"
        if cooling := gateway.failover.cooling(in_force.policy.targets.items()):
            state["cooling"] = cooling
        if gateway.clients is not None and gateway.clients.error is not None:
            state["clients_error"] = gateway.clients.error
    return _json_response(state, 503 if failed else 200)


def _sees_all(request: Request, gateway: Gateway) -> bool:
    if gateway.clients is None:
        return True
    try:
        return gateway.clients.identify(request.headers).admin
    except RequestError:
        return False


def _json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(data), status_code=status, headers=headers, media_type="application/json")


def _refused(path: str, error: RequestError) -> Response:
    """The answer to a request that no endpoint saw."""
    dialect = MESSAGES if path.startswith(MESSAGES.path) else CHAT
    return _json_response(dialect.error_body(error), error.status)


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body is over the limit of {limit:,} bytes.", status=413, code="request_too_large"
    )
