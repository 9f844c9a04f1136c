from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families
from provider import provider
from running import ENVIRONMENT, Running, WordPredictor, policy, running
from serving import Serving, serving
from starlette.responses import JSONResponse

from router.decision import Decision
from router.gateway import Gateway
from router.ledger import LedgerStats
from router.metrics import Metrics
from router.upstream import Usage

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Why?"}]}
HARD = {"messages": [{"role": "user", "content": "a hard one"}]}


def read(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a page."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


class Page:
    """What a page says now, or has gained since it was read first."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._before = read(text())

    def now(self, name: str, **labels: str) -> float | None:
        return read(self._text()).get((name, frozenset(labels.items())))

    def gained(self, name: str, **labels: str) -> float:
        return (self.now(name, **labels) or 0) - self._before.get((name, frozenset(labels.items())), 0)


def of(metrics: Metrics) -> Page:
    return Page(lambda: metrics.text().decode())


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    shares = {"asks": "rate-limited", "prices": {"input": 1, "output": 4}}
    with running(more={"twin": shares, "other-twin": shares}, dialects=True) as started:
        yield started


@pytest.fixture
def http(router: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=router.url, timeout=20) as client:
        yield client


@pytest.fixture
def page(http: httpx.Client) -> Page:
    return Page(lambda: http.get("/metrics").text)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_request_is_counted_with_what_was_decided_and_used(http: httpx.Client, page: Page) -> None:
    http.post(CHAT, json=HARD).raise_for_status()
    assert page.gained("router_requests_total", path=CHAT, status="200") == 1
    assert page.gained("router_request_seconds_count", path=CHAT) == 1
    assert page.gained("router_decisions_total", target="frontier", reason="predicted") == 1
    assert page.gained("router_decision_seconds_count") == 1
    assert page.gained("router_signals_total", tier="auto", mode="none") == 1
    # A score of .4 is above the bucket of .3.
    assert page.gained("router_score_bucket", le="0.4") == 1
    assert page.gained("router_score_bucket", le="0.3") == 0
    assert page.now("router_threshold", tier="auto") == 0.2
    assert page.gained("router_tokens_total", target="frontier", kind="input") == 9
    assert page.gained("router_tokens_total", target="frontier", kind="output") == 3
    assert page.gained("router_attempts_total", target="frontier", outcome="ok") == 1
    assert page.gained("router_attempt_seconds_count", target="frontier") == 1
    assert page.gained("router_first_token_seconds_count", target="frontier") == 0


def test_a_stream_has_a_time_to_its_first_event(http: httpx.Client, page: Page) -> None:
    assert http.post(CHAT, json={**ASK, "model": "silent", "stream": True}).text.endswith("[DONE]\n\n")
    # It is counted when its last byte has been sent.
    until(lambda: page.gained("router_first_token_seconds_count", target="silent") == 1)
    assert page.gained("router_first_token_seconds_sum", target="silent") > 0
    assert page.gained("router_uncounted_answers_total", target="silent") == 1  # nobody asked for it
    http.post(CHAT, json={**ASK, "stream": True}).raise_for_status()
    assert page.gained("router_uncounted_answers_total", target="cheap") == 0
    # Through litellm, from another dialect.
    translated = http.post(CHAT, json={**ASK, "model": "claude", "max_tokens": 9, "stream": True})
    assert '"choices":[]' not in translated.text
    assert page.gained("router_uncounted_answers_total", target="claude") == 0
    assert page.gained("router_tokens_total", target="claude", kind="output") > 0
    assert page.gained("router_cost_usd_total", target="cheap") == pytest.approx((9 * 1 + 3 * 4) / 1e6)


def test_every_kind_of_token_is_counted_and_so_are_answers_without_a_count() -> None:
    metrics = Metrics()
    page = of(metrics)
    metrics.used("a", Usage(input=100, output=50, cached=60, cache_write=20, reasoning=30), None)
    kinds = {"input": 100, "output": 50, "cached": 60, "cache_write": 20, "reasoning": 30}
    assert {kind: page.now("router_tokens_total", target="a", kind=kind) for kind in kinds} == kinds
    metrics.used("a", None, None)
    assert page.now("router_uncounted_answers_total", target="a") == 1


def test_what_clients_send_never_becomes_a_label(http: httpx.Client, page: Page, router: Running) -> None:
    named = {"x-router-feature": "feature-of-theirs", "x-router-session": "session-of-theirs"}
    for index in range(5):
        mode = f"mode-of-theirs-{index}"
        # Where the target is named, the mode has no say; it is there all the same.
        for model in ("balanced", "cheap", "auto"):
            headers = {**named, "x-router-mode": mode}
            http.post("/v1/route", json={**ASK, "model": model}, headers=headers).raise_for_status()
        http.post(CHAT, json={**ASK, "model": f"model-of-theirs-{index}"})
        http.post(f"/v1/path-of-theirs-{index}", json=ASK)
    http.post("/v1/route", json={**ASK, "model": "balanced"}, headers={"x-router-mode": "plan"})
    text = http.get("/metrics").text
    assert "of-theirs" not in text
    assert page.gained("router_signals_total", tier="balanced", mode="other") == 5
    assert page.gained("router_signals_total", tier="auto", mode="other") == 5
    assert page.gained("router_signals_total", tier="none", mode="none") == 5
    assert page.gained("router_signals_total", tier="balanced", mode="plan") == 1


def test_a_status_that_is_none_is_other() -> None:
    metrics = Metrics()
    page = of(metrics)
    for status in (799, 999, 42):
        metrics.arrived()
        metrics.answered(CHAT, status, 0.1)
    assert page.now("router_requests_total", path=CHAT, status="other") == 3


def test_counting_tokens_is_no_decision(http: httpx.Client, page: Page) -> None:
    body = {**HARD, "model": "auto", "max_tokens": 9}
    http.post("/v1/messages/count_tokens", json=body).raise_for_status()
    path = "/v1/messages/count_tokens"
    assert page.gained("router_requests_total", path=path, status="200") == 1
    assert page.gained("router_decisions_total", target="frontier", reason="predicted") == 0
    assert page.gained("router_score_count") == page.gained("router_decision_seconds_count") == 0
    http.post("/v1/messages", json=body).raise_for_status()
    assert page.gained("router_decisions_total", target="frontier", reason="predicted") == 1


def test_requests_in_flight_are_those_whose_answer_is_not_complete(router: Running, page: Page) -> None:
    def flying() -> float:
        return page.now("router_requests_in_flight") or 0

    assert flying() == 0
    with httpx.stream(
        "POST", f"{router.url}{CHAT}", json={**ASK, "model": "endless", "stream": True}
    ) as answer:
        events = answer.iter_raw()  # dropped, it would close the connection
        next(events)
        assert flying() == 1
    until(lambda: flying() == 0)  # the client has left
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{router.url}{CHAT}", json={**ASK, "model": "patient"}, timeout=0.3)
    until(lambda: flying() == 0)
    httpx.post(f"{router.url}{CHAT}", content=b"{")
    httpx.get(f"{router.url}/v1/models")
    assert flying() == 0


def test_all_targets_at_one_place_cool_down(http: httpx.Client, router: Running, page: Page) -> None:
    assert http.post(CHAT, json={**ASK, "model": "twin"}).status_code == 429
    until_when = page.now("router_cooling_until_timestamp_seconds", target="twin") or 0
    assert 0 < until_when - time.time() <= 7  # as the provider's Retry-After says
    assert page.now("router_cooling_until_timestamp_seconds", target="other-twin") == pytest.approx(
        until_when, abs=0.1
    )
    assert page.now("router_cooling_until_timestamp_seconds", target="cheap") == 0
    assert page.gained("router_cooldowns_total", target="twin") == 1
    # An answer ends it before its time.
    router.provider.reply("rate-limited", JSONResponse({"choices": [{"message": {"content": "ok"}}]}))
    assert http.post(CHAT, json={**ASK, "model": "other-twin"}).status_code == 200
    assert page.now("router_cooling_until_timestamp_seconds", target="twin") == 0


def test_targets_and_tiers_that_a_new_policy_leaves_out_say_nothing_more() -> None:
    own = policy("http://127.0.0.1:9/v1")
    gateway = Gateway(own, WordPredictor(), {})
    page = of(gateway.metrics)
    gateway.metrics.targets({**dict.fromkeys(own.targets, 0.0), "hang": 99.0})
    assert page.now("router_threshold", tier="auto") == 0.2
    kept = {name: target for name, target in own.targets.items() if name != "hang"}
    tiers = {"balanced": own.tiers["balanced"]}
    changed = own.model_copy(
        update={"targets": kept, "tiers": tiers, "default_tier": "balanced", "aliases": {}}
    )
    gateway.put_in_force(gateway.bind(changed, None))
    assert page.now("router_cooling_until_timestamp_seconds", target="hang") == 0
    assert page.now("router_threshold", tier="auto") != 0.2


def test_the_ledger_s_rows_are_counted_once() -> None:
    metrics = Metrics()
    page = of(metrics)
    stats = LedgerStats(written=5, spilled=2, pending=3, lag_seconds=1.5, away=True)
    metrics.watch(lambda: metrics.ledger(stats))
    for _ in range(3):
        assert page.now("router_ledger_rows_total", state="written") == 5
    stats = LedgerStats(written=9, spilled=2, restored=2)
    assert page.now("router_ledger_rows_total", state="written") == 9
    assert page.now("router_ledger_rows_total", state="restored") == 2
    states = [page.now(f"router_ledger_{name}") for name in ("pending_rows", "lag_seconds", "away")]
    assert states == [0, 0, 0]


def test_a_mode_counts_for_the_tier_that_lists_it() -> None:
    metrics = Metrics()
    page = of(metrics)
    own = policy("http://127.0.0.1:9/v1")
    for tier, mode in (("balanced", "plan"), ("auto", "plan"), ("gone", "plan"), (None, None)):
        metrics.decided(Decision("cheap", "m", "signal", tier, mode), own, 0.001)
    counted = [
        page.now("router_signals_total", tier=tier, mode=mode)
        for tier, mode in (("balanced", "plan"), ("auto", "other"), ("gone", "other"), ("none", "none"))
    ]
    assert counted == [1, 1, 1, 1]


POLICY = """\
version: 1
targets:
  cheap: {{echo: true}}
  slow: {{model: openai/hang, api_base: "{base}", api_key_env: TEST_PROVIDER_KEY, timeout: 60, prices: {{input: 1, output: 1}}}}
tiers: {{auto: {{modes: {{plan: slow}}, default: cheap}}}}
default_tier: auto
"""


def in_file(file: Path, name: str) -> float:
    """What one worker has counted of a metric."""
    values: Any = MmapedDict.read_all_values_from_file(str(file))
    return sum(value for key, value, *_ in values if f'"{name}"' in key)


def refused(server: Serving) -> None:
    """A request whose worker dies."""
    with pytest.raises(httpx.TransportError):
        server.post(CHAT, {**ASK, "model": "slow"})


def test_two_workers_answer_for_both_and_the_dead_are_not_in_flight(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    environment = {**ENVIRONMENT, "PROMETHEUS_MULTIPROC_DIR": str(shared)}
    arguments = ("--workers", "2", "--ledger", str(tmp_path / "ledger.db"), "--log-format", "json")
    with provider() as upstream:
        (tmp_path / "router.yaml").write_text(POLICY.format(base=upstream.url))
        with serving(tmp_path, *arguments, environment=environment) as server:
            until(lambda: server.metric("router_policy_info{") == 2, 60)
            sent = 0

            def both() -> bool:
                nonlocal sent
                server.post(CHAT, ASK).raise_for_status()
                sent += 1
                counts = [in_file(file, "router_requests_total") for file in shared.glob("counter_*.db")]
                return sorted(counts)[-2] >= 3

            until(both, 60)
            # Whichever is asked, for what it knows by itself too.
            for _ in range(6):
                assert server.metric(f'router_requests_total{{path="{CHAT}",status="200"}}') == sent
                assert server.metric("router_decision_seconds_count") == sent
            until(lambda: server.metric('router_ledger_rows_total{state="written"}') == sent)
            assert server.metric("router_policy_age_seconds") < 10
            waiting = threading.Thread(target=refused, args=(server,))
            waiting.start()
            until(lambda: server.metric("router_requests_in_flight") == 1)
            workers = [
                child
                for child in psutil.Process(server.process.pid).children()
                if any("spawn_main" in word for word in child.cmdline())
            ]
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            waiting.join(30)

            def back() -> bool:
                try:
                    return server.metric("router_policy_info{") == 2
                except httpx.TransportError:
                    return False

            until(back, 60)
            assert server.metric("router_requests_in_flight") == 0
            assert server.metric(f'router_requests_total{{path="{CHAT}",status="200"}}') == sent
            server.stop()
            said = [json.loads(line) for line in server.lines]  # of all three processes
            assert sum(line["event"] == "request" for line in said) == sent
            assert sum(line.get("message", "").endswith("died") for line in said) == 2
