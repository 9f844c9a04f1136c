from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from provider import serve
from running import KEY, Running, running
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.errors import UsageError
from router.tracing import Tracing, open_tracing

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SECRET = "SECRET-PROMPT"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ROOT = Path(__file__).parent.parent


def asking(path: str, model: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"hard {SECRET}"}]
    body: dict[str, Any] = {"model": model, **more}
    return body | ({"input": messages} if path == RESPONSES else {"messages": messages, "max_tokens": 50})


class Traced:
    """A router whose spans are kept in memory."""

    def __init__(self, router: Running) -> None:
        self.router = router
        self.http = httpx.Client(base_url=router.url, timeout=30)
        self.kept = InMemorySpanExporter()
        self.use()

    def use(self, *, propagates: bool = False, **options: Any) -> None:
        provider = TracerProvider(shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.router.gateway.tracing = Tracing(provider, propagates=propagates)
        self.kept.clear()

    def spans(self) -> list[ReadableSpan]:
        """Those of one request, once it has ended: its own is the last. No prompt and no key is in any."""
        deadline = time.monotonic() + 20
        while not (found := self.kept.get_finished_spans()) or found[-1].kind is not SpanKind.SERVER:
            assert time.monotonic() < deadline, [span.name for span in found]
            time.sleep(0.01)
        text = "".join(span.to_json() for span in found)
        for secret in (SECRET, KEY, "Hello", "upstream-secret", "Reached", "had an error"):
            assert secret not in text
        assert {span.context.trace_id for span in found} == {found[-1].context.trace_id}
        for span in found[:-1]:
            assert span.parent is not None
            assert span.parent.span_id == found[-1].context.span_id
            assert found[-1].start_time <= span.start_time <= span.end_time <= found[-1].end_time
        self.kept.clear()
        return [*sorted(found[:-1], key=lambda span: span.start_time or 0), found[-1]]

    def calls(self) -> list[dict[str, Any]]:
        return [dict(span.attributes or {}) for span in self.spans() if span.kind is SpanKind.CLIENT]


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    more: dict[str, dict[str, Any]] = {
        "first": {"asks": "rate-limited", "fallbacks": ["second"], "retries": 0},
        "second": {"asks": "second"},
        "twice": {"asks": "twice", "retries": 1},
        "empty": {"asks": "empty"},
    }
    tiers = {
        "auto": {"predict": {"weak": "cheap", "strong": "frontier"}},
        "escalates": {"default": "empty", "escalate": {"to": "second", "when": ["empty"]}},
        "held": {"default": "cheap", "escalate": {"to": "second", "when": ["empty"], "buffer_streams": True}},
    }
    with running(more=more, dialects=True, tiers=tiers, aliases={}) as started:
        yield started


@pytest.fixture
def traced(router: Running) -> Iterator[Traced]:
    one = Traced(router)
    yield one
    one.http.close()
    router.gateway.tracing = None


def test_a_request_its_decision_and_its_call(traced: Traced) -> None:
    answer = traced.http.post(CHAT, json=asking(CHAT, "auto"), headers={"x-request-id": "one-1"})
    assert answer.status_code == 200
    decision, call, request = traced.spans()
    assert (request.name, call.name, decision.name) == (f"POST {CHAT}", "chat large", "decide")
    assert request.attributes is not None
    assert call.attributes is not None
    assert decision.attributes is not None
    assert request.parent is None
    assert request.status.status_code is StatusCode.UNSET
    told = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "router.request": "one-1",
        "router.policy": traced.router.gateway.in_force.version,
        "router.target": "frontier",
        "router.reason": "predicted",
    }
    assert told.items() <= dict(request.attributes).items()
    decided = {
        "router.tier": "auto",
        "router.score": 0.4,
        "router.threshold": 0.2,
        "router.target": "frontier",
        "router.reason": "predicted",
    }
    assert decided.items() <= dict(decision.attributes).items()
    port = int(traced.router.provider.url.split(":")[2].partition("/")[0])
    assert dict(call.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "large",
        "gen_ai.response.model": "large-2025-01-01",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "server.address": "127.0.0.1",
        "server.port": port,
        "router.target": "frontier",
        "router.attempt": 1,
    }


@pytest.mark.parametrize(
    ("path", "model", "answers_as"),
    [
        (CHAT, "cheap", "small"),
        (MESSAGES, "claude", "claude-sonnet-4-5"),
        (MESSAGES, "cheap", "small"),
        (RESPONSES, "spoken", "spoken"),
        (RESPONSES, "claude", "claude-sonnet-4-5"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_dialect_plain_and_streamed(
    traced: Traced, path: str, model: str, answers_as: str, stream: bool
) -> None:
    more: dict[str, Any] = {"stream": stream}
    if stream and path == CHAT:
        more["stream_options"] = {"include_usage": True}
    answer = traced.http.post(path, json=asking(path, model, **more))
    assert answer.status_code == 200, answer.text
    (call,) = traced.calls()
    assert call["gen_ai.response.model"].startswith(answers_as)
    assert call["gen_ai.response.id"]
    assert call["gen_ai.usage.input_tokens"] > 0
    assert call["gen_ai.usage.output_tokens"] > 0
    assert call["gen_ai.provider.name"] == ("anthropic" if model == "claude" else "openai")
    assert call.get("gen_ai.request.stream", False) is stream
    assert (0 < call["gen_ai.response.time_to_first_chunk"] < 20) if stream else True
    assert "error.type" not in call


def test_every_attempt_has_a_span_and_errors_tell_their_kind_alone(traced: Traced) -> None:
    assert traced.http.post(CHAT, json=asking(CHAT, "first")).status_code == 200
    _, failed, answered, request = traced.spans()
    assert [span.attributes["router.attempt"] for span in (failed, answered) if span.attributes] == [1, 2]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description is None
    assert not failed.events
    assert failed.attributes is not None
    assert request.attributes is not None
    told = ("error.type", "http.response.status_code", "router.target", "gen_ai.request.model")
    assert [failed.attributes[name] for name in told] == ["rate_limited", 429, "first", "rate-limited"]
    assert (request.attributes["router.target"], request.attributes["router.reason"]) == (
        "second",
        "fallback",
    )


def test_a_retry_is_an_attempt(traced: Traced) -> None:
    again = JSONResponse({"error": {"message": SECRET}}, 503, {"retry-after": "0"})
    traced.router.provider.reply("twice", again)
    assert traced.http.post(CHAT, json=asking(CHAT, "twice")).status_code == 200
    assert [call.get("error.type") for call in traced.calls()] == ["failed", None]


def test_an_escalation_is_an_attempt(traced: Traced) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    choice = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    traced.router.provider.reply("empty", JSONResponse({"id": "1", "choices": [choice], "usage": usage}))
    answer = traced.http.post(CHAT, json=asking(CHAT, "escalates"))
    assert answer.headers["x-router-reason"] == "escalated", answer.text
    calls = traced.calls()
    assert [call["router.target"] for call in calls] == ["empty", "second"]
    assert [call["gen_ai.usage.output_tokens"] for call in calls] == [1, 3]


def test_a_stream_that_is_held_back(traced: Traced) -> None:
    assert traced.http.post(CHAT, json=asking(CHAT, "held", stream=True)).text.endswith("[DONE]\n\n")
    (call,) = traced.calls()
    assert (call["gen_ai.request.stream"], call["gen_ai.response.model"]) == (True, "small")


@pytest.mark.parametrize(
    ("model", "kind", "status"),
    [("broken", "failed", 500), ("hang", "late", 504), ("down", "failed", 502), ("picky", "refused", 400)],
)
def test_what_a_provider_failed_by(traced: Traced, model: str, kind: str, status: int) -> None:
    fields = asking(CHAT, model)
    assert traced.http.post(CHAT, json=fields).status_code == status
    *_, call, request = traced.spans()
    assert call.attributes is not None
    assert request.attributes is not None
    assert call.attributes["error.type"] == kind
    # By the conventions a client's error is none of the server's.
    told = StatusCode.ERROR if status >= 500 else StatusCode.UNSET
    assert request.status.status_code is told
    assert request.attributes.get("error.type") == (str(status) if status >= 500 else None)


@pytest.mark.parametrize(
    ("path", "model"), [(CHAT, "fails-midway"), (CHAT, "drops-midway"), (MESSAGES, "claude-ends-midway")]
)
def test_a_stream_that_breaks_off(traced: Traced, path: str, model: str) -> None:
    traced.http.post(path, json=asking(path, model, stream=True))
    (call,) = traced.calls()
    assert (call["error.type"], call["gen_ai.request.stream"]) == ("broke_off", True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(traced: Traced, stream: bool) -> None:
    url = f"{traced.router.url}{CHAT}"
    if stream:
        with httpx.stream("POST", url, json=asking(CHAT, "endless", stream=True)) as answer:
            events = answer.iter_raw()
            next(events)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=asking(CHAT, "patient"), timeout=0.5)
    _, call, request = traced.spans()
    assert call.attributes is not None
    assert request.attributes is not None
    assert call.attributes["error.type"] == "gone"
    assert request.attributes["http.response.status_code"] == 499


def test_a_request_that_is_wrong_has_its_own_span_alone(traced: Traced) -> None:
    traced.http.post(CHAT, json={"messages": SECRET})
    (request,) = traced.spans()
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 400


def test_the_span_is_a_child_of_the_client_s_and_the_log_names_it(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "router"):
        traced.http.post("/v1/route", json={"prompt": "x"}, headers={"traceparent": PARENT})
        _, request = traced.spans()
        until(lambda: any("trace=0af7651916cd43dd8448eb211c80319c" in one.message for one in caplog.records))
    assert request.parent is not None
    assert f"{request.parent.trace_id:032x}-{request.parent.span_id:016x}" == PARENT[3:-3]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("model", ["cheap", "claude", "keyless"])
def test_providers_are_told_of_the_trace_only_if_asked(traced: Traced, model: str) -> None:
    sent = {"traceparent": PARENT, "tracestate": "a=b", "baggage": f"said={SECRET}"}
    traced.http.post(CHAT, json=asking(CHAT, model), headers=sent)
    _, call, _ = traced.spans()
    assert not {"traceparent", "tracestate", "baggage"} & traced.router.provider.last.headers.keys()
    traced.use(propagates=True)
    traced.http.post(CHAT, json=asking(CHAT, model), headers=sent)
    _, call, _ = traced.spans()
    headers = traced.router.provider.last.headers
    assert headers["traceparent"] == f"{PARENT[:36]}{call.context.span_id:016x}-01"
    assert "baggage" not in headers


def test_what_is_not_sampled_is_no_span_and_no_error(traced: Traced) -> None:
    traced.use(sampler=ALWAYS_OFF)
    assert traced.http.post(CHAT, json=asking(CHAT, "cheap", stream=True)).status_code == 200
    assert traced.http.post(CHAT, json=asking(CHAT, "cheap")).status_code == 200
    assert traced.kept.get_finished_spans() == ()


def test_requests_at_once_do_not_mix(traced: Traced) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = [asking(CHAT, "cheap" if index % 2 else "frontier") for index in range(40)]
        list(pool.map(lambda body: httpx.post(f"{traced.router.url}{CHAT}", json=body, timeout=30), bodies))
    until(lambda: len(traced.kept.get_finished_spans()) == 120)
    spans = traced.kept.get_finished_spans()
    by_trace: dict[int, set[Any]] = {}
    for span in spans:
        assert span.attributes is not None
        by_trace.setdefault(span.context.trace_id, set()).add(span.attributes["router.target"])
    assert len(by_trace) == 40
    assert all(len(targets) == 1 for targets in by_trace.values())


POLICY = """\
version: 1
targets: {cheap: {echo: true}}
tiers: {auto: {default: cheap}}
default_tier: auto
"""


def test_spans_reach_a_collector_when_the_server_stops(tmp_path: Path) -> None:
    received: list[bytes] = []

    async def collect(request: Request) -> Response:
        received.append(await request.body())
        return Response(b"", media_type="application/x-protobuf")

    (tmp_path / "router.yaml").write_text(POLICY)
    with serve(Starlette(routes=[Route("/v1/traces", collect, methods=["POST"])])) as url:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_SERVICE_NAME": "router-of-a-test"}
        with serving(tmp_path, "--tracing", "on", environment=environment) as server:
            server.post("/v1/route", {"prompt": SECRET}).raise_for_status()
            server.stop()
    sent = [ExportTraceServiceRequest.FromString(body) for body in received]
    resources = [one for request in sent for one in request.resource_spans]
    names = [span.name for one in resources for scope in one.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/route", "decide"]
    known = {item.key: item.value.string_value for item in resources[0].resource.attributes}
    assert known["service.name"] == "router-of-a-test"
    assert SECRET.encode() not in b"".join(received)


def test_a_collector_that_is_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setattr("router.tracing._CLOSING_SECONDS", 0.2)
    tracing = open_tracing()
    tracing.request("POST", CHAT, {}).end(200, None, {})
    started = time.monotonic()
    tracing.close()
    assert time.monotonic() - started < 2


def test_what_cannot_be_sent_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(UsageError, match="OTEL_TRACES_EXPORTER is zipkin"):
        open_tracing()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_PROTOCOL is grpc"):
        open_tracing()


def test_without_the_extra_one_line_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "router.yaml").write_text(POLICY)
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; sys.argv = ['router', 'serve', '--port', '0', {}];"
        "from router.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format("'--tracing', 'on'")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "router: tracing takes OpenTelemetry's SDK and exporter, which are not installed: "
        "pip install 'llm-difficulty-router[otel]'\n"
    )


def test_where_nothing_is_traced_the_sdk_is_not_loaded() -> None:
    code = (
        "import sys, router.app, router.cli, router.gateway;"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry.') or name == 'router.tracing'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    # The web framework brings the API by itself.
    assert not {name for name in loaded if "sdk" in name or "exporter" in name or name == "router.tracing"}
