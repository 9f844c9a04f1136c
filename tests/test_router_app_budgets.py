"""Budgets behind the server: what is refused, what goes to the cheapest target, and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from provider import USAGE, Provider, provider, serve
from running import ENVIRONMENT, WordPredictor, serve_gateway
from test_router_app_ledger import policy

from router import purse as purse_module
from router.app import create_app
from router.budget_store import Share, Totals, open_store
from router.budgets import Amounts, Budgets, Count, bounds, iso, periods
from router.cli import main
from router.clients import Client, ClientKeys
from router.entry import NANO, now
from router.errors import BudgetError, PolicyError
from router.gateway import Gateway
from router.ledger import Ledger
from router.policy import parse_policy, placed
from router.purse import Hold, Purse

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
PLAIN, WRITTEN = USAGE["prompt_tokens"] - 4, USAGE["completion_tokens"]
CHEAP = PLAIN * 1000 + 4 * 500 + WRITTEN * 4000  # nano-dollars, as the provider counts
STRONG = USAGE["prompt_tokens"] * 5000 + WRITTEN * 25_000
ASKS = {
    CHAT: {"messages": [{"role": "user", "content": "a hard question"}], "max_tokens": 100},
    MESSAGES: {"messages": [{"role": "user", "content": "a hard question"}], "max_tokens": 100},
    RESPONSES: {"input": "a hard question", "max_output_tokens": 100},
}


@dataclass
class Served:
    """A server whose policy has budgets."""

    http: httpx.Client
    upstream: Provider
    gateway: Gateway
    file: Path

    def ask(self, path: str = CHAT, text: str | None = None, **more: Any) -> httpx.Response:
        headers = more.pop("headers", {})
        body = {"model": "auto", **ASKS[path], **more}
        if text is not None:
            body["messages"] = [{"role": "user", "content": text}]
        return self.http.post(path, json=body, headers=headers)

    def count(self, scope: str = "workload", name: str = "", kind: int = 0) -> Totals:
        store = open_store(str(self.file))
        store.open()
        found = store.read(now())
        store.close()
        return found.get(Count(scope, name, periods(now())[kind]), Totals())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.count()
            time.sleep(0.02)

    def spend(self, dollars: float, scope: str = "workload", name: str = "", kind: int = 0) -> None:
        """Let somebody else have spent this much."""
        store = open_store(str(self.file))
        store.open()
        store.begin({Count(scope, name, periods(now())[kind]): Totals(round(dollars * NANO))})
        store.close()


@contextmanager
def served(
    tmp_path: Path, budgets: dict[str, Any], clients: ClientKeys | None = None, **changes: Any
) -> Iterator[Served]:
    file = tmp_path / "budgets.sqlite3"
    with provider() as upstream:
        own = policy(upstream.url, budgets=budgets, **changes)
        purse = Purse(open_store(str(file))).open()
        gateway = Gateway(own, WordPredictor(), ENVIRONMENT, clients, purse=purse)
        with serve_gateway(gateway) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield Served(http, upstream, gateway, file)


def test_what_was_spent_is_counted_to_the_nano_dollar(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"month": 5, "day": 1}, "each_feature": {"day": 1}}) as server:
        server.ask().raise_for_status()
        server.ask(text="an easy question", headers={"x-router-feature": "search"}).raise_for_status()
        server.until(lambda: server.count() == Totals(STRONG + CHEAP, 0, 2))
        assert server.count(kind=1) == server.count()
        assert server.count("feature", "search", 1) == Totals(CHEAP, 0, 1)
        server.ask(model="cheap", stream=True, stream_options={"include_usage": True}).raise_for_status()
        streamed = USAGE["prompt_tokens"] * 1000 + WRITTEN * 4000
        server.until(lambda: server.count() == Totals(STRONG + CHEAP + streamed, 0, 3))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_at_its_limit_a_budget_refuses_in_the_shape_of_the_dialect(
    tmp_path: Path, path: str, stream: bool
) -> None:
    with served(tmp_path, {"workload": {"day": 1}, "at_limit": "refuse", "pacing": None}) as server:
        server.spend(1, kind=1)
        answer = server.ask(path, stream=stream)
        assert answer.status_code == 402
        error = answer.json()["error"]
        day = datetime.now(UTC).date()
        assert f"The budget for {day} has no room for this request; it begins anew at " in error["message"]
        assert "T00:00:00Z" in error["message"]
        if path == MESSAGES:
            assert answer.json()["type"] == "error"
            assert error["type"] == "billing_error"
        else:
            assert (error["type"], error["code"]) == ("insufficient_quota", "budget_exceeded")
        left = 86_400 - int(time.time()) % 86_400
        assert abs(int(answer.headers["retry-after"]) - left) <= 2
        assert not server.upstream.seen
        assert server.count(kind=1) == Totals(NANO)
        assert 'router_budget_decisions_total{outcome="refused"} 1.0' in server.http.get("/metrics").text


@pytest.mark.parametrize(
    "asked", [{"max_tokens": 10**30}, {"n": 10**30}, {"max_tokens": 10**17, "n": 10**17}]
)
def test_an_absurd_request_takes_the_budgets_from_nobody(
    tmp_path: Path, asked: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """More than a database can count would be held for it."""
    with served(tmp_path, {"workload": {"month": 5}, "at_limit": "cheapest"}) as server:
        assert server.ask(**asked).headers["x-router-reason"] == "budget"
        server.ask(text="an easy question").raise_for_status()
        server.until(lambda: server.count().requests == 2 and server.count().reserved == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_the_most_a_request_may_cost_has_no_room_for_is_not_sent(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"day": 1}, "at_limit": "refuse"}) as server:
        server.spend(1 - 0.001, kind=1)
        assert server.ask(max_tokens=100).status_code == 402  # 100 tokens at $25 a million
        assert server.ask(max_tokens=10).status_code == 200
        assert server.ask(max_tokens=10, n=8).status_code == 402
        server.until(lambda: server.count(kind=1).requests == 1)


def test_room_that_others_hold_may_come_back_soon(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"day": 0.003}, "at_limit": "refuse"}) as server:
        with server.http.stream(
            "POST", CHAT, json=ASKS[CHAT] | {"model": "endless", "stream": True}
        ) as other:
            chunks = other.iter_bytes()
            next(chunks)
            answer = server.ask(max_tokens=110)
            assert answer.status_code == 402
            assert "beside those that are under way" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "5"
        server.until(lambda: server.count(kind=1).reserved == 0)
        assert server.ask(max_tokens=90).status_code == 200


def test_at_its_limit_everything_goes_to_the_cheapest_target(tmp_path: Path) -> None:
    changes = {
        "tiers": {
            "auto": {
                "predict": {"weak": "cheap", "strong": "frontier"},
                "modes": {"plan": "frontier", "say": "cheap"},
            },
            "single": {"default": "frontier"},
        }
    }
    with served(tmp_path, {"workload": {"month": 1}}, **changes) as server:
        server.spend(1)
        for asked, expected in (
            ({}, ("budget", "cheap")),
            ({"text": "an easy question"}, ("budget", "cheap")),
            ({"model": "auto:plan"}, ("budget", "cheap")),
            ({"model": "frontier"}, ("budget", "cheap")),
            ({"model": "auto:say"}, ("signal", "cheap")),
            ({"model": "single"}, ("default", "frontier")),  # the tier has no other
            ({"model": "cheap"}, ("pinned", "cheap")),
        ):
            answer = server.ask(**asked)
            assert answer.status_code == 200
            assert (answer.headers["x-router-reason"], answer.headers["x-router-target"]) == expected, asked
        server.until(lambda: server.count().requests == 7)
        assert server.count().spent == NANO + 6 * CHEAP + STRONG
        assert server.count().reserved == 0


def test_the_first_that_has_no_room_goes_to_the_cheapest_and_says_why(tmp_path: Path) -> None:
    limits = {"explain": True}
    with served(tmp_path, {"workload": {"month": 1}}, limits=limits) as server:
        server.spend(1 - 0.001)
        answer = server.ask(headers={"x-router-explain": "1"})
        assert (answer.headers["x-router-reason"], answer.headers["x-router-target"]) == ("budget", "cheap")
        assert "has no room" in answer.headers["x-router-trail"]
        route = server.http.post("/v1/route", json=ASKS[CHAT], headers={"x-router-explain": "1"}).json()
        assert route["reason"] == "predicted"  # nothing is held for a decision alone
        server.spend(1.1)
        server.ask(max_tokens=1).raise_for_status()
        route = server.http.post("/v1/route", json=ASKS[CHAT], headers={"x-router-explain": "1"}).json()
        assert (route["reason"], route["target"], route["score"]) == ("budget", "cheap", None)
        assert [stage["stage"] for stage in route["trail"]][-2:] == ["budget", "capability"]


def test_the_cheapest_that_can_take_it(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"month": 1}}) as server:
        server.spend(1)
        targets = dict(server.gateway.in_force.policy.targets)
        targets["cheap"] = targets["cheap"].model_copy(update={"max_output_tokens": 50})
        targets = {name: targets[name] for name in ("cheap", "frontier")}
        own = server.gateway.in_force.policy.model_copy(update={"targets": targets})
        server.gateway.put_in_force(server.gateway.bind(own, WordPredictor()))
        assert server.ask(max_tokens=40).headers["x-router-target"] == "cheap"
        assert server.ask(max_tokens=60).headers["x-router-target"] == "frontier"


def test_keys_have_budgets_of_their_own(tmp_path: Path) -> None:
    def client(name: str) -> Client:
        return Client(id=name, key_sha256=hashlib.sha256(name.encode()).hexdigest(), admin=name == "boss")

    keys = ClientKeys([client(name) for name in ("boss", "team", "guest", "free")])
    budgets = {
        "each_key": {"month": 1},
        "keys": {"team": {"month": 2}, "free": {}},
        "at_limit": "refuse",
    }
    with served(tmp_path, budgets, keys) as server:
        for name in ("team", "guest", "free"):
            server.spend(1, "key", name)

        def status(name: str) -> int:
            return server.ask(headers={"authorization": f"Bearer {name}"}).status_code

        assert [status(name) for name in ("team", "guest", "free", "boss")] == [200, 402, 200, 200]
        server.until(lambda: server.count("key", "team").requests == 1)
        assert server.count("key", "free").requests == 0


def test_errors_and_clients_that_left_leave_nothing_held(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"month": 1}}) as server:
        assert server.ask(model="alone").status_code == 500
        server.until(lambda: server.count() == Totals(0, 0, 1))
        with server.http.stream(
            "POST", CHAT, json=ASKS[CHAT] | {"model": "endless", "stream": True}
        ) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            assert server.count().reserved > 0
        server.until(lambda: server.count().requests == 2)
        assert (server.count().reserved, server.count().spent > 0) == (0, True)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(CHAT, json=ASKS[CHAT] | {"model": "slow"}, timeout=0.5)
        server.until(lambda: server.count().requests == 3)
        assert server.count().reserved == 0
        assert server.ask(model="nobody").status_code == 404
        assert server.ask(messages=7).status_code == 400
        assert server.count().requests == 3


def test_a_fallback_to_a_dearer_target_is_held_for(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"month": 1}, "at_limit": "refuse"}) as server:
        answer = server.ask(model="broken")
        assert answer.headers["x-router-target"] == "frontier"
        server.until(lambda: server.count() == Totals(STRONG, 0, 1))
        server.spend(1 - 0.001)  # enough for the one that is asked first
        answer = server.ask(model="broken")
        assert answer.status_code == 500
        server.until(lambda: server.count().requests == 2)
        assert len([one for one in server.upstream.seen if one.body["model"] == "large"]) == 1


def test_an_escalation_is_held_for(tmp_path: Path) -> None:
    tiers = {
        "auto": {
            "predict": {"weak": "cheap", "strong": "frontier"},
            "escalate": {"to": "strong", "when": ["invalid_json"]},
        }
    }
    wants_json = {"response_format": {"type": "json_object"}, "text": "an easy question"}
    with served(tmp_path, {"workload": {"month": 1}, "at_limit": "refuse"}, tiers=tiers) as server:
        assert server.ask(**wants_json).headers["x-router-reason"] == "escalated"
        server.until(lambda: server.count() == Totals(CHEAP + STRONG, 0, 1))
        server.spend(1 - 0.001)
        answer = server.ask(**wants_json)
        assert (answer.status_code, answer.headers["x-router-target"]) == (200, "cheap")
        server.until(lambda: server.count().requests == 2)


@pytest.mark.parametrize(("order", "status"), [("allow", 200), ("refuse", 503)])
def test_while_the_store_is_away_the_policy_orders(
    tmp_path: Path, order: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, {"workload": {"month": 1}, "on_outage": order}) as server:

        def away(*_: object) -> None:
            raise BudgetError("the budget store at here cannot be used: it is away")

        assert server.gateway.purse is not None
        monkeypatch.setattr(server.gateway.purse.store, "turn", away)
        monkeypatch.setattr(server.gateway.purse.store, "open", away)
        answer = server.ask()
        assert answer.status_code == status
        if order == "refuse":
            assert answer.json()["error"]["code"] == "budgets_unavailable"
            assert answer.headers["retry-after"] == "5"
            assert not server.upstream.seen
        monkeypatch.undo()
        server.until(lambda: server.count().requests == (order == "allow"))


def test_budgets_have_to_be_counted_somewhere(tmp_path: Path) -> None:
    own = policy("http://127.0.0.1:9/v1", budgets={"workload": {"month": 1}})
    with pytest.raises(PolicyError, match="--budget-store"):
        Gateway(own, WordPredictor(), {})


def test_by_default_they_are_counted_beside_the_ledger(tmp_path: Path) -> None:
    from router.gateway import _purse
    from router.settings import Settings

    own = policy("http://127.0.0.1:9/v1", budgets={"workload": {"month": 1}})
    with Ledger(str(tmp_path / "ledger.db")) as ledger:
        purse = _purse(Settings(), own, ledger)
        assert purse is not None
        assert purse.store.shown == f"{tmp_path / 'ledger.db'}.budgets"
        purse.close()
        elsewhere = _purse(Settings(budget_store=str(tmp_path / "other.db")), own, ledger)
        assert elsewhere is not None
        assert elsewhere.store.shown == str(tmp_path / "other.db")
        elsewhere.close()
        with pytest.raises(BudgetError, match="cannot be used"):
            _purse(Settings(budget_store="postgresql://u:p@127.0.0.1:9/d"), own, ledger)
    assert _purse(Settings(), own, None) is None


def test_requests_at_a_time_never_spend_more_than_there_is(tmp_path: Path) -> None:
    """Sixty at a time; there is room for what twenty-five may cost at most."""
    most = 0.0026
    with served(tmp_path, {"workload": {"month": 25 * most}, "at_limit": "refuse"}) as server:

        async def many() -> list[int]:
            async with httpx.AsyncClient(base_url=server.http.base_url, timeout=60) as http:
                answers = await asyncio.gather(
                    *(http.post(CHAT, json=ASKS[CHAT] | {"model": "frontier"}) for _ in range(60))
                )
            return [answer.status_code for answer in answers]

        statuses = asyncio.run(many())
        assert set(statuses) == {200, 402}
        server.until(lambda: server.count().reserved == 0)
        assert server.count() == Totals(STRONG * statuses.count(200), 0, statuses.count(200))
        assert server.count().spent <= 25 * most * NANO


def test_a_server_goes_on_at_the_threshold_that_another_came_to(tmp_path: Path) -> None:
    with served(tmp_path, {"workload": {"month": 1}}, limits={"explain": True}) as server:
        server.spend(0.2)
        store = open_store(str(server.file))
        store.open()
        month = Count("workload", "", periods(now())[0])
        store.turn([Share(month, "another", threshold=0.45, tells=True)], [])
        store.close()
        assert server.ask().headers["x-router-reason"] == "predicted"  # before it has looked
        answer = server.ask(headers={"x-router-explain": "1", "x-router-session": "another"})
        assert (answer.headers["x-router-reason"], answer.headers["x-router-target"]) == ("budget", "cheap")
        assert answer.headers["x-router-threshold"] == "0.45"
        assert "has to last: threshold 0.45: cheap" in answer.headers["x-router-trail"]
        page = server.http.get("/metrics").text
        assert 'router_budget_decisions_total{outcome="paced"} 1.0' in page
        found = 'router_budget_threshold{name="",period="month",scope="workload"} 0.45'
        assert found in page
        assert 'router_budget_usd{name="",period="month",scope="workload",state="amount"} 1.0' in page
        assert "router_budget_store_away 0.0" in page


def test_pacing_raises_the_threshold_while_requests_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty hard requests at a rate that the day's budget does not last for: the next ones are paced."""
    monkeypatch.setattr(purse_module, "_PACE_SECONDS", 0.05)
    with served(tmp_path, {"workload": {"day": 0.05}}) as server:
        for number in range(80):
            answer = server.ask(headers={"x-router-session": str(number)})
            assert answer.status_code == 200
            if answer.headers["x-router-reason"] == "budget":
                break
        assert answer.headers["x-router-target"] == "cheap"
        assert float(answer.headers["x-router-threshold"]) >= 0.4
        assert server.count(kind=1).spent < 0.05 * NANO
        assert server.count(kind=1).threshold


def test_how_the_budgets_stand_is_served(tmp_path: Path) -> None:
    keys = ClientKeys(
        [
            Client(id=name, key_sha256=hashlib.sha256(name.encode()).hexdigest(), admin=name == "boss")
            for name in ("boss", "team")
        ]
    )
    budgets = {"workload": {"month": 2}, "each_key": {"day": 1}, "keys": {"ci": {"day": 3}}}
    with served(tmp_path, budgets, keys) as server:
        server.spend(1)
        team, boss = ({"authorization": f"Bearer {name}"} for name in ("team", "boss"))
        server.ask(headers=team).raise_for_status()
        server.until(lambda: server.count().requests == 1)
        assert server.http.get("/v1/budgets", headers=team).status_code == 403
        found = server.http.get("/v1/budgets", headers=boss).json()
        assert found["at_limit"] == "cheapest"
        names = [(one["scope"], one["name"], one["amount"]) for one in found["budgets"]]
        assert names == [("workload", None, 2.0), ("key", "ci", 3.0), ("key", "team", 1.0)]
        month = found["budgets"][0]
        assert month["spent"] == (NANO + STRONG) / NANO
        assert month["remaining"] == pytest.approx(1 - STRONG / NANO)
        assert (month["reserved"], month["requests"], month["threshold"]) == (0, 1, None)
        start, end = bounds(month["period"])
        assert month["resets_at"] == iso(end)
        assert month["pace"] == pytest.approx(0.5 * (end - start) / (now() - start), rel=0.01)


def test_without_budgets_there_is_no_page_of_them() -> None:
    gateway = Gateway(policy("http://127.0.0.1:9/v1"), WordPredictor(), {})
    with serve(create_app(gateway=gateway)) as url:
        assert httpx.get(f"{url}/v1/budgets").status_code == 404


def test_what_is_wrong_with_budgets_is_told_with_its_line(tmp_path: Path) -> None:
    text = """version: 1
targets:
  a: {model: openai/a}
  b: {echo: true}
tiers: {t: {default: b}}
default_tier: t
budgets:
  workload: {month: -1, week: 5}
  each_key: {day: 9000000}
  at_limit: stop
  pacing: {start: 2, bar: cut}
  on_outage: maybe
"""
    with pytest.raises(PolicyError) as caught:
        parse_policy(text.encode(), "p.yaml")
    lines = placed(caught.value.problems, text.encode(), "p.yaml")
    assert [line.split(": ")[:2] for line in lines] == [
        ["p.yaml:8", "budgets.workload.month"],
        ["p.yaml:8", "budgets.workload.week"],
        ["p.yaml:9", "budgets.each_key.day"],
        ["p.yaml:10", "budgets.at_limit"],
        ["p.yaml:11", "budgets.pacing.start"],
        ["p.yaml:11", "budgets.pacing.bar"],
        ["p.yaml:12", "budgets.on_outage"],
    ]
    for budgets, where, what in (
        ("{}", "p.yaml:7: budgets", "no amount is given"),
        ("{workload: {day: 1}}", "p.yaml:3: targets.a", "prices is missing"),
    ):
        short = text[: text.index("budgets:")] + f"budgets: {budgets}\n"
        with pytest.raises(PolicyError) as caught:
            parse_policy(short.encode(), "p.yaml")
        (line,) = placed(caught.value.problems, short.encode(), "p.yaml")
        assert line.startswith(where)
        assert what in line


def test_a_decision_is_explained_without_counting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, request = tmp_path / "router.yaml", tmp_path / "request.json"
    text = "version: 1\ntargets: {a: {echo: true}}\ntiers: {t: {default: a}}\ndefault_tier: t\n"
    file.write_text(text + "budgets: {workload: {month: 4}}\n")
    request.write_text(json.dumps({"prompt": "hi"}))
    monkeypatch.setattr(sys, "argv", ["router", "explain", str(request), "--policy", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "→ a" in capsys.readouterr().out


def test_the_command_says_how_the_budgets_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["router", "budgets", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    file, store = tmp_path / "router.yaml", str(tmp_path / "counts")
    text = "version: 1\ntargets: {a: {echo: true}}\ntiers: {t: {default: a}}\ndefault_tier: t\n"
    file.write_text(text)
    assert run("--policy", str(file), "--budget-store", store)[0] == 2
    file.write_text(text + "budgets: {workload: {month: 4}, features: {search: {day: 1}}}\n")
    with Purse(open_store(store)) as purse:
        hold = Hold(Budgets(workload=Amounts(month=4)).limits(None, None, now()))
        assert asyncio.run(purse.hold(hold, NANO)) is None
        status, out, _ = run("--policy", str(file), "--budget-store", store, "--json")
        assert status == 0
        rows = json.loads(out)["budgets"]
        assert [(one["scope"], one["reserved"], one["remaining"]) for one in rows] == [
            ("workload", 1.0, 3.0),
            ("feature", 0.0, 1.0),
        ]
        status, out, _ = run("--policy", str(file), "--budget-store", store)
        assert "$0.00 of $4.00 spent (0%)" in out
        assert "feature search" in out
    status, _, err = run("--policy", str(file), "--budget-store", "mysql://h/d")
    assert (status, err.count("\n")) == (1, 1)
