"""Traces for OpenTelemetry: a span for each request, its decision, and every call of a provider.

Imported only where tracing is on: it takes the extra ``otel``. Where the spans go, and how many of them, is said by
OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, …).

A call of a provider is a client span by the semantic conventions for generative AI (names of October 2026, in development
still). No span holds a prompt, an answer, a header or a key: of an error it tells the kind (:data:`router.failover.Outcome`) and
the status, never the provider's words.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router import __version__
from router.decision import Decision
from router.dispatch import Answer, Destination, Stream, provider_of
from router.errors import UpstreamError, UsageError
from router.escalation import Held
from router.failover import Attempt
from router.policy import printable
from router.upstream import Usage

T = TypeVar("T")

# And no baggage: what a client puts there is nobody's business here, and its reader logs what it cannot read.
_W3C = TraceContextTextMapPropagator()

# The conventions' words for litellm's.
_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
# A collector that does not answer does not keep the server from stopping for longer.
_CLOSING_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443}
_LONGEST_NAME = 128


class Tracing:
    """Makes the spans of one server.

    Parameters
    ----------
    provider : TracerProvider
        Closed with this.
    propagates : bool
        Whether providers are told of the trace, in a header ``traceparent``.
    """

    def __init__(self, provider: TracerProvider, *, propagates: bool = False) -> None:
        self._provider = provider
        self._propagates = propagates
        self._tracer = provider.get_tracer("router", __version__)

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Trace:
        """A request has arrived; its span is a child of the one that its ``traceparent`` names."""
        return Trace(self._tracer, self._propagates, method, path, headers)

    def close(self) -> None:
        """Send what is left; blocks, though not for long."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)


class Trace:
    """The spans of one request; parameters as for :class:`Tracing`."""

    def __init__(
        self, tracer: trace.Tracer, propagates: bool, method: str, path: str, headers: Mapping[str, str]
    ) -> None:
        self._tracer = tracer
        self._propagates = propagates
        attributes = {"http.request.method": method, "http.route": path, "url.path": path}
        self._span = tracer.start_span(
            f"{method} {path}", _W3C.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )
        self._context = trace.set_span_in_context(self._span)
        # Calls whose end is to be told, by their attempt: with an answer that goes on, or since when there is none.
        self._calls: dict[int, tuple[Span, Attempt, int | None]] = {}

    @property
    def ids(self) -> tuple[str, str] | None:
        """Of the trace and of the request's span, in hexadecimal digits."""
        known = self._span.get_span_context()
        if not known.is_valid:
            return None
        return trace.format_trace_id(known.trace_id), trace.format_span_id(known.span_id)

    def decided(self, decision: Decision, seconds: float) -> None:
        """A decision was made, just now and in so many seconds."""
        end = time.time_ns()
        span = self._tracer.start_span(
            "decide",
            self._context,
            attributes=_attributes(decision),
            start_time=end - round(seconds * 1e9),
        )
        span.end(end)

    def calling(
        self, call: Callable[[Destination], Awaitable[T]], attempts: list[Attempt]
    ) -> Callable[[Destination], Awaitable[T]]:
        """The same call of a provider, in a span; whenever it begins, it is the last of ``attempts``."""

        async def traced(to: Destination) -> T:
            attempt = attempts[-1]
            span, started = self._call(to, len(attempts)), time.perf_counter()
            self._calls[id(attempt)] = span, attempt, None
            try:
                answer = await call(_telling(to, span) if self._propagates else to)
            except BaseException as error:
                # What it means is said by whoever catches it: late, or the client has left.
                self._calls[id(attempt)] = span, attempt, time.time_ns()
                if isinstance(error, UpstreamError):
                    span.set_attribute("http.response.status_code", error.status)
                raise
            if span.is_recording():
                span.set_attributes(_known_of(answer, time.perf_counter() - started))
            return answer

        return traced

    def answered(self, attempt: Attempt) -> None:
        """How a call ended is known, and what it used."""
        if attempt.outcome is None or id(attempt) not in self._calls:
            return
        span, _, ended = self._calls.pop(id(attempt))
        if attempt.usage is not None:
            span.set_attributes(_tokens(attempt.usage))
        if attempt.outcome != "ok":
            _ended_badly(span, attempt.outcome)
        span.end(ended)

    def end(self, status: int, decision: Decision | None, known: Mapping[str, str | None]) -> None:
        """The answer is complete, or the client has left; ``known`` is what else there is to say, under ``router.``."""
        for _, attempt, _ in list(self._calls.values()):
            self.answered(attempt)
        span = self._span
        span.set_attribute("http.response.status_code", status)
        span.set_attributes({f"router.{name}": value for name, value in known.items() if value is not None})
        if decision is not None:
            span.set_attributes(_attributes(decision))
        if status >= 500:
            _ended_badly(span, str(status))
        span.end()

    def _call(self, to: Destination, number: int) -> Span:
        provider, model = provider_of(to.target)
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(provider, provider),
            "gen_ai.request.model": model,
            "router.target": to.name,
            "router.attempt": number,
        }
        if to.target.api_base is not None:
            place = urlsplit(to.target.api_base)
            port = place.port or _PORTS.get(place.scheme)
            if place.hostname and port:
                attributes |= {"server.address": place.hostname, "server.port": port}
        return self._tracer.start_span(
            f"chat {model}", self._context, kind=SpanKind.CLIENT, attributes=attributes
        )


def open_tracing(*, propagates: bool = False) -> Tracing:
    """Traces that go where OpenTelemetry's variables say, over OTLP.

    Raises
    ------
    UsageError
        They ask for another exporter or protocol.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    if exporter not in ("otlp", "none"):
        raise UsageError(f"OTEL_TRACES_EXPORTER is {exporter}: traces go out by otlp, or by none")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise UsageError(f"{name} is {protocol}: traces go out by http/protobuf")
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "router"}))
    # It is closed with the gateway; at the end of the process would be too late, and again.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if exporter == "otlp":
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, propagates=propagates)


def _attributes(decision: Decision) -> dict[str, AttributeValue]:
    names = ("target", "model", "reason", "tier", "mode", "score", "threshold", "novelty", "unfamiliar")
    found = ((name, getattr(decision, name)) for name in names)
    return {f"router.{name}": value for name, value in found if value is not None}


def _telling(to: Destination, span: Span) -> Destination:
    """The same destination, whose provider is told of the span, and of nothing else that the client's context holds."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, trace.set_span_in_context(span, Context()))
    params = dict(to.target.params)
    params["extra_headers"] = {**(params.get("extra_headers") or {}), **headers}
    return replace(to, target=to.target.model_copy(update={"params": params}))


def _tokens(usage: Usage) -> dict[str, AttributeValue]:
    counts = {
        "gen_ai.usage.input_tokens": usage.input,
        "gen_ai.usage.output_tokens": usage.output,
    }
    parts = {
        "gen_ai.usage.cache_read.input_tokens": usage.cached,
        "gen_ai.usage.cache_write.input_tokens": usage.cache_write,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning,
    }
    return {**counts, **{name: count for name, count in parts.items() if count}}


def _ended_badly(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _known_of(answer: object, seconds: float) -> dict[str, AttributeValue]:
    """What an answer says of itself beside its content."""
    if isinstance(answer, Answer):
        return _named(_object(answer.body))
    if isinstance(answer, Stream | Held):
        first = answer.first if isinstance(answer, Stream) else b"".join(answer.events[:1])
        data = next((line[5:] for line in first.splitlines() if line.startswith(b"data:")), b"")
        streamed: dict[str, AttributeValue] = {"gen_ai.request.stream": True}
        if isinstance(answer, Stream):
            streamed["gen_ai.response.time_to_first_chunk"] = seconds
        return streamed | _named(_object(data))
    return {}


def _named(data: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """Id, model and reasons to stop of an answer, or of its first event, in any dialect."""
    inner = next((data[key] for key in ("message", "response") if isinstance(data.get(key), dict)), data)
    found: dict[str, AttributeValue] = {}
    for key in ("id", "model"):
        if isinstance(value := inner.get(key), str) and value:
            found[f"gen_ai.response.{key}"] = printable(value, _LONGEST_NAME)
    choices = inner.get("choices")
    choices = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    reasons = [one.get("finish_reason") for one in choices] or [inner.get("stop_reason")]
    told = [printable(one, _LONGEST_NAME) for one in reasons if isinstance(one, str)]
    if told:
        found["gen_ai.response.finish_reasons"] = told
    return found


def _object(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
