"""The ledger behind the server: what a request leaves in it, and what reads it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from provider import USAGE, Provider, provider, serve
from running import ENVIRONMENT, WordPredictor, serve_gateway

from router.app import create_app
from router.errors import PolicyError
from router.gateway import Gateway
from router.ledger import Ledger
from router.policy import Policy
from router.shared_sessions import SharedSessions

CHAT = "/v1/chat/completions"
SMALL = {"input": 1, "output": 4, "cached_read": 0.5}
LARGE = {"input": 5, "output": 25}


def policy(base: str, **changes: Any) -> Policy:
    def target(name: str, prices: dict[str, float], **more: Any) -> dict[str, Any]:
        return {
            "model": f"openai/{name}",
            "api_base": base,
            "api_key_env": "TEST_PROVIDER_KEY",
            "prices": prices,
            **more,
        }

    document = {
        "version": 1,
        "targets": {
            "cheap": target("small", SMALL),
            "frontier": target("large", LARGE),
            "silent": target("small", SMALL, ask_usage=False),
            "broken": target("broken", SMALL, fallbacks=["frontier"]),
            "alone": target("broken", SMALL),
            "midway": target("fails-midway", SMALL),
            "endless": target("endless", SMALL),
            "slow": target("hang", SMALL),
            "breaks": target("fails-midway", SMALL, fallbacks=["frontier"]),
            "lingers": target("", SMALL, model="anthropic/lingers", api_base=base.removesuffix("/v1")),
            "lingers-too": target("lingers", SMALL, speaks=["responses"]),
            "own": target("small", SMALL, api_key_env=None, api_key_header="x-own-key"),
        },
        "tiers": {
            "auto": {"predict": {"weak": "cheap", "strong": "frontier"}, "modes": {"plan": "frontier"}},
            "held-midway": {"default": "breaks", "escalate": {"to": "frontier", "buffer_streams": True}},
        },
        "default_tier": "auto",
    }
    return Policy.model_validate({**document, **changes})


class Served:
    """A server with a ledger, and what stands in it."""

    def __init__(self, url: str, upstream: Provider, file: Path, ledger: Ledger, gateway: Gateway) -> None:
        self.gateway = gateway
        self.http = httpx.Client(base_url=url, timeout=60)
        self.upstream = upstream
        self.file = file
        self.ledger = ledger

    def rows(self) -> list[dict[str, Any]]:
        with sqlite3.connect(f"file:{self.file}?mode=ro", uri=True) as connection:
            connection.row_factory = sqlite3.Row
            found = [dict(row) for row in connection.execute("SELECT * FROM entries ORDER BY time")]
        connection.close()
        return found

    def last(self, count: int) -> dict[str, Any]:
        """The newest row, once there are so many."""
        deadline = time.monotonic() + 10
        while len(rows := self.rows()) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(rows) == count
        return rows[-1]


@contextmanager
def served(file: Path, durability: Any = "strict") -> Iterator[Served]:
    with provider() as upstream:
        ledger = Ledger(str(file), durability=durability, flush_seconds=0.02).open()
        gateway = Gateway(policy(upstream.url), WordPredictor(), ENVIRONMENT, ledger=ledger)
        with serve_gateway(gateway) as url:
            running = Served(url, upstream, file, ledger, gateway)
            with running.http:
                yield running


def body(text: str = "an easy question", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("ledger") / "ledger.db") as running:
        yield running


def test_a_request_leaves_a_row_before_its_answer_is_there(server: Served) -> None:
    before = len(server.rows())
    headers = {"x-router-feature": "search", "x-router-session": "s1", "x-request-id": "mine"}
    server.http.post(CHAT, json=body(), headers=headers).raise_for_status()
    row = server.rows()[-1]
    assert len(server.rows()) == before + 1
    expected = {
        "request": "mine",
        "tier": "auto",
        "mode": None,
        "feature": "search",
        "dialect": "chat",
        "reason": "predicted",
        "score": 0.05,
        "threshold": 0.2,
        "bundle": "words@0",
        "target": "cheap",
        "model": "openai/small",
        "provider": "openai",
        "input_tokens": USAGE["prompt_tokens"],
        "cached_read_tokens": 4,
        "output_tokens": USAGE["completion_tokens"],
        "status": 200,
        "error": None,
        "streamed": 0,
        "cancelled": 0,
        "usage_estimated": 0,
        "fallbacks": 0,
        "client": None,
    }
    assert {name: row[name] for name in expected} == expected
    plain, written = USAGE["prompt_tokens"] - 4, USAGE["completion_tokens"]
    assert row["cost"] == plain * 1000 + 4 * 500 + written * 4000
    assert (row["strongest"], row["strongest_cost"]) == (
        "frontier",
        USAGE["prompt_tokens"] * 5000 + written * 25_000,
    )
    assert len(row["session"]) == 32
    assert "s1" not in row["session"]
    assert row["policy"]
    assert abs(row["time"] / 1e6 - time.time()) < 60
    assert row["latency_us"] > row["decision_us"] > 0
    assert row["first_token_us"] is None
    assert "easy question" not in str(server.rows())


def test_a_stream_is_recorded_with_its_usage_and_its_first_event(server: Served) -> None:
    asked = body(stream=True, stream_options={"include_usage": True}, model="auto:plan")
    with server.http.stream("POST", CHAT, json=asked) as answer:
        assert "[DONE]" in "".join(answer.iter_text())
    row = server.rows()[-1]
    assert (row["reason"], row["mode"], row["target"], row["streamed"]) == ("signal", "plan", "frontier", 1)
    assert row["input_tokens"] == USAGE["prompt_tokens"]
    assert 0 < row["first_token_us"] <= row["latency_us"]


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_a_stream_is_billed_by_a_usage_that_its_client_did_not_ask_for(
    server: Served, options: dict[str, Any]
) -> None:
    answer = server.http.post(CHAT, json=body(stream=True, model="cheap", **options))
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert all(event["choices"] and not event.get("usage") for event in events)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.upstream.last.body["stream_options"] == {"include_usage": True}
    row = server.rows()[-1]
    assert row["usage_estimated"] == 0
    assert (row["input_tokens"], row["output_tokens"]) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


def test_a_stream_without_usage_is_estimated_and_says_so(server: Served) -> None:
    with server.http.stream("POST", CHAT, json=body(stream=True, model="silent")) as answer:
        answer.read()
    assert "stream_options" not in server.upstream.last.body
    row = server.rows()[-1]
    assert row["usage_estimated"] == 1
    assert row["input_tokens"] > 0
    assert row["output_tokens"] > 0
    assert row["cost"] > 0


def test_what_breaks_midway_is_recorded_with_what_it_took(server: Served) -> None:
    with server.http.stream("POST", CHAT, json=body(stream=True, model="midway")) as answer:
        answer.read()
    row = server.rows()[-1]
    assert row["status"] >= 500
    assert row["error"]
    assert row["output_tokens"] > 0


def test_a_client_that_goes_away_leaves_a_row(server: Served) -> None:
    before = len(server.rows())
    with server.http.stream("POST", CHAT, json=body(stream=True, model="endless")) as answer:
        next(answer.iter_bytes())
    row = server.last(before + 1)
    assert (row["cancelled"], row["error"], row["target"]) == (1, "client_gone", "endless")
    assert row["usage_estimated"] == 1
    assert row["cost"] > 0


def test_a_client_that_goes_away_before_the_answer_is_counted_too(server: Served) -> None:
    before = len(server.rows())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(CHAT, json=body(model="slow"), timeout=0.5)
    row = server.last(before + 1)
    assert (row["target"], row["status"], row["cancelled"], row["usage_estimated"]) == ("slow", 499, 1, 1)
    assert row["cost"] > 0


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_client_that_leaves_with_the_last_event_has_everything(server: Served, path: str) -> None:
    before = len(server.rows())
    asked = {**body(), "max_tokens": 20} if path == "/v1/messages" else {"input": "an easy question"}
    model = "lingers" if path == "/v1/messages" else "lingers-too"
    with server.http.stream("POST", path, json={**asked, "model": model, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line in ("event: message_stop", "event: response.completed"):
                break
        # The provider has not ended its body yet.
    row = server.last(before + 1)
    assert (row["status"], row["cancelled"], row["error"], row["usage_estimated"]) == (200, 0, None, 0)
    assert row["output_tokens"] == 3


def test_a_held_stream_that_breaks_is_paid_for(server: Served) -> None:
    with server.http.stream("POST", CHAT, json=body(stream=True, model="held-midway")) as answer:
        assert "[DONE]" in "".join(answer.iter_text())
        assert answer.headers["x-router-target"] == "frontier"
    row = server.rows()[-1]
    assert (row["target"], row["reason"], row["fallbacks"]) == ("frontier", "fallback", 1)
    # Three events came of the first, about a token each: they and the request are what its provider charges for.
    assert row["earlier_tokens"] > 3
    assert row["earlier_cost"] == (row["earlier_tokens"] - 3) * 1000 + 3 * 4000


def test_a_key_that_the_client_did_not_send_leaves_the_target(server: Served) -> None:
    assert server.http.post(CHAT, json=body(model="own")).status_code == 401
    row = server.rows()[-1]
    assert (row["target"], row["model"], row["provider"]) == ("own", "openai/small", "openai")
    assert (row["status"], row["error"], row["cost"]) == (401, "provider_key_missing", 0)


def test_fallbacks_and_failures_are_told(server: Served) -> None:
    server.http.post(CHAT, json=body(model="broken")).raise_for_status()
    row = server.rows()[-1]
    assert (row["target"], row["reason"], row["fallbacks"], row["status"]) == ("frontier", "fallback", 1, 200)
    assert server.http.post(CHAT, json=body(model="alone")).status_code == 500
    row = server.rows()[-1]
    assert (row["target"], row["status"], row["cost"], row["input_tokens"]) == ("alone", 500, 0, 0)
    assert row["error"]


def test_decisions_alone_and_bad_requests_leave_none(server: Served) -> None:
    before = len(server.rows())
    server.http.post("/v1/route", json=body()).raise_for_status()
    assert server.http.post(CHAT, json={"messages": []}).status_code == 400
    assert server.http.post(CHAT, json=body(model="nobody")).status_code == 404
    assert len(server.rows()) == before


def test_every_dialect_is_recorded(server: Served) -> None:
    asked = {"model": "auto", "max_tokens": 20, "messages": body()["messages"]}
    server.http.post("/v1/messages", json=asked).raise_for_status()
    assert server.rows()[-1]["dialect"] == "messages"
    server.http.post("/v1/responses", json={"model": "auto", "input": "an easy question"}).raise_for_status()
    assert server.rows()[-1]["dialect"] == "responses"


def test_the_spend_is_served(server: Served) -> None:
    answer = server.http.get("/v1/spend", params={"by": "target"})
    answer.raise_for_status()
    found = answer.json()
    rows = server.rows()
    assert found["by"] == "target"
    assert found["total"]["requests"] == len(rows)
    assert {group["target"] for group in found["groups"]} == {row["target"] for row in rows}
    for wrong in ({"by": "weather"}, {"since": "whenever"}, {"limit": "many"}, {"colour": "red"}):
        refused = server.http.get("/v1/spend", params=wrong)
        assert refused.status_code == 400, wrong
        assert refused.json()["error"]["message"]


def test_the_page_of_counters_shows_the_ledger(server: Served) -> None:
    page = server.http.get("/metrics").text
    assert f'router_ledger_rows_total{{state="written"}} {float(len(server.rows()))}' in page
    assert 'router_ledger_rows_total{state="lost"} 0.0' in page


def test_rows_in_memory_are_written_when_the_server_stops(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with served(file, "batched") as running:
        for _ in range(20):
            running.http.post(CHAT, json=body()).raise_for_status()
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (20,)
    connection.close()


def test_a_target_without_prices_is_refused(tmp_path: Path) -> None:
    own = policy("http://127.0.0.1:9/v1")
    free = own.targets["cheap"].model_copy(update={"prices": None})
    own = own.model_copy(update={"targets": {**own.targets, "cheap": free}})
    with (
        Ledger(str(tmp_path / "ledger.db")) as ledger,
        pytest.raises(PolicyError, match=r"targets\.cheap\.prices: missing"),
    ):
        Gateway(own, WordPredictor(), {}, ledger=ledger)


def test_without_a_ledger_there_is_no_spend() -> None:
    gateway = Gateway(policy("http://127.0.0.1:9/v1"), WordPredictor(), {})
    with serve(create_app(gateway=gateway)) as url:
        answer = httpx.get(f"{url}/v1/spend")
    assert answer.status_code == 404
    assert "--ledger" in answer.json()["error"]["message"]


def leave_at_done(server: Served) -> dict[str, Any]:
    """Go away when the last event is there, as clients do, though the answer has not ended; the row of that request."""
    before = len(server.rows())
    with server.http.stream("POST", CHAT, json=body(stream=True)) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                break
    return server.last(before + 1)


def test_who_leaves_while_the_session_is_written_has_a_row(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    class Slow:
        shown = "slow"

        def turn(self, reads: Any, writes: Any) -> dict[str, Any]:
            time.sleep(0.3)
            written.extend(writes)
            return {}

        def close(self) -> None:
            pass

    shared = SharedSessions(Slow(), server.gateway.metrics, timeout=5)
    monkeypatch.setattr(server.gateway, "shared", shared)
    monkeypatch.setattr(server.gateway, "sessions", shared)
    assert leave_at_done(server)["status"] == 200
    deadline = time.monotonic() + 5
    while not written and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(written) == 1
    shared.close()


def test_who_leaves_while_the_prompt_is_read_has_a_row(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_thread = asyncio.to_thread

    async def slow(*work: Any) -> Any:
        await asyncio.sleep(0.3)
        return await to_thread(*work)

    server.gateway.put_in_force(
        server.gateway.bind(policy(server.upstream.url, capture={"share": 1}), WordPredictor())
    )
    monkeypatch.setattr(asyncio, "to_thread", slow)
    assert leave_at_done(server)["status"] == 200
    server.gateway.put_in_force(server.gateway.bind(policy(server.upstream.url), WordPredictor()))
