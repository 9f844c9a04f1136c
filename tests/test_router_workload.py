from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from provider import provider
from running import ENVIRONMENT, WordPredictor, serve_gateway

from router.bundle import default_bundle_dir
from router.content import Content
from router.dialects import CHAT
from router.errors import RouterError
from router.gateway import Gateway, bound
from router.history import read_history
from router.ledger import Ledger
from router.policy import Policy, example_policy_path, load_policy
from router.replay import Bundle, Scenario, read_policy, replay
from router.sending import send
from router.traffic import FAMILIES
from router.workload import USUAL, Made, body, headers, row, traffic

MANY = list(traffic(4_000, seed=3, days=4))


def test_the_same_numbers_give_the_same_traffic() -> None:
    assert list(traffic(300, seed=5)) == list(traffic(300, seed=5))
    assert list(traffic(300, seed=5)) != list(traffic(300, seed=6))
    assert set(USUAL) == set(FAMILIES)


@pytest.mark.parametrize(("requests", "days"), [(1, 1), (1, 5), (37, 3), (999, 5), (4_001, 2)])
def test_it_is_as_much_as_was_asked_for(requests: int, days: int) -> None:
    assert len(list(traffic(requests, days=days))) == requests


def test_sessions_stand_side_by_side_on_working_days() -> None:
    assert [one.time for one in MANY] == sorted(one.time for one in MANY)
    assert len({one.id for one in MANY}) == len(MANY)
    week = list(traffic(700, days=7))
    days = {datetime.fromtimestamp(one.time / 1e6, UTC).date() for one in week}
    assert [day.weekday() for day in sorted(days)] == [0, 1, 2, 3, 4, 0, 1]
    changes = sum(a.session != b.session for a, b in pairwise(MANY))
    assert changes > len(MANY) / 10
    assert {one.asked for one in MANY} == {"top", "balanced", "free", "internal"}
    assert len({one.client for one in MANY}) >= 3
    assert {"title", "commit-message", "summary", "editor", "terminal", "review"} == {
        one.feature for one in MANY
    }
    assert {one.mode for one in MANY} >= {None, "plan", "edit", "code", "debug", "ask", "commit", "title"}


def test_contexts_grow_and_are_read_from_a_cache() -> None:
    sessions: dict[str, list[Made]] = {}
    for one in MANY:
        assert 0 <= one.cached <= one.context - one.new
        sessions.setdefault(one.session, []).append(one)
    long = max(sessions.values(), key=len)
    assert len(long) > 30
    assert long[0].cached == 0
    assert max(one.context for one in long) > 3 * long[0].context
    used = sum(one.context for one in MANY)
    assert 0.7 < sum(one.cached for one in MANY) / used < 0.97


def test_scaled_traffic_is_the_same_but_shorter() -> None:
    small = list(traffic(500, scale=0.01))
    assert [one.id for one in small] == [one.id for one in traffic(500)]
    assert max(one.context for one in small) < 1_200
    for one in small:
        assert 0 <= one.cached <= one.context
        json.dumps(body(one))


@pytest.mark.parametrize("scale", [1, 0.05])
def test_a_body_has_the_tokens_that_it_stands_for(scale: float) -> None:
    for one in list(traffic(4_000, seed=3, days=4, scale=scale))[:: 40 if scale == 1 else 20]:
        asked = body(one)
        content = Content(asked)
        overhead = 120  # the tools' schemas and the parts
        assert one.context * 0.98 - 5 <= content.needs.tokens <= one.context * 1.02 + overhead
        inbound = CHAT.read(json.dumps(asked).encode(), {})
        kept = row(one)["basis"]
        assert len(inbound.prompt().text) > 10
        results = [[x.tool, x.failed_test] for x in content.results]
        assert results == [[tool, bool(failed)] for tool, _, _, failed in kept.get("results", [])]
        assert ("tools" in content.needs.features) == ("needs" in kept)
        assert headers(one)["x-router-session"] == one.session


def test_a_threads_bodies_begin_alike() -> None:
    checked = 0
    for session in {one.session for one in MANY[:500]}:
        thread = [one for one in MANY if one.session == session and one.step.thread == 0]
        for before, after in pairwise(thread):
            texts = [
                "".join(str(m.get("content") or "") for m in body(one)["messages"]) for one in (before, after)
            ]
            same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), len(texts[0]))
            assert same >= 4 * (before.context - before.new) - 100
            checked += 1
    assert checked > 50


def test_the_tiers_of_the_example_stand_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row(one)) + "\n" for one in MANY[:2_000]), encoding="utf-8")
    bundle = Bundle(default_bundle_dir())
    policy = read_policy(example_policy_path(), bundle)
    tiers = ("top", "balanced", "internal", "free")
    scenarios = [Scenario(tier, policy, "v", bundle, tier) for tier in tiers]
    found = replay(read_history(str(file)), [Scenario("as asked", policy, "v", bundle), *scenarios])
    asked, top, balanced, internal, free = (column.total.cost for column in found.columns)
    assert top > 1.5 * balanced > 10 * internal > free == 0
    assert top > asked > internal
    assert all(column.total.refused == 0 for column in found.columns)
    assert all(column.predictions.left == 0 for column in found.columns)


def test_the_gateway_gets_it_and_the_ledger_has_it(tmp_path: Path) -> None:
    tiers = {name: {"default": "small"} for name in ("top", "balanced", "free", "internal")}
    with provider() as upstream:
        target = {
            "model": "openai/small", "api_base": upstream.url, "api_key_env": "TEST_PROVIDER_KEY",
            "prices": {"input": 1, "output": 1},
        }  # fmt: skip
        policy = Policy.model_validate(
            {"version": 1, "targets": {"small": target}, "tiers": tiers, "default_tier": "top"}
        )
        file = tmp_path / "ledger.db"
        ledger = Ledger(str(file), durability="strict").open()
        gateway = Gateway(policy, WordPredictor(), ENVIRONMENT, ledger=ledger)
        made = list(traffic(60, days=1, scale=0.01))
        told: list[int] = []
        with serve_gateway(gateway) as url:
            first = asyncio.run(
                send(made, url, concurrency=4, progress=lambda report: told.append(report.sent))
            )
            streamed = asyncio.run(send(made[:5], url, stream=True, model="balanced"))
            lost = asyncio.run(send(made[:2], url, model="no-such-model"))
    assert (first.sent, dict(first.answers), max(told)) == (60, {"200": 60}, 60)
    assert 0 < first.quantile(0.5) <= first.quantile(0.99)
    assert (dict(streamed.answers), dict(lost.answers), lost.latencies) == ({"200": 5}, {"404": 2}, [])
    assert "60 requests in" in str(first)
    connection = sqlite3.connect(file)
    rows = connection.execute(
        "SELECT request, mode, feature, tier, streamed FROM entries ORDER BY time"
    ).fetchall()
    connection.close()
    by_id = {one.id: one for one in made}
    assert {kept[0] for kept in rows} == set(by_id)
    for request, mode, feature, tier, _ in rows[:60]:
        one = by_id[request]
        assert (mode, feature, tier) == (one.mode, one.feature, one.asked)
    assert [kept[3:] for kept in rows[60:]] == [("balanced", 1)] * 5
    for session in {one.session for one in made}:  # one after the other
        order = [kept[0] for kept in rows[:60] if by_id[kept[0]].session == session]
        assert order == sorted(order)


def test_nobody_there_is_an_error() -> None:
    for url in ("http://127.0.0.1:9", "nowhere", "http://[bad"):
        with pytest.raises(RouterError, match=r"^--send: nothing answers at "):
            asyncio.run(send(iter(MANY[:1]), url))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(router_command: Run) -> Run:
    return partial(router_command, "traffic")


def test_the_command_writes_what_replay_reads(run: Run) -> None:
    assert run("--requests", "50", "--seed", "2", "--days", "1", "--out", "t.jsonl") == (
        0,
        "",
        "50 requests in t.jsonl\n",
    )
    history = list(read_history("t.jsonl"))
    expected = list(traffic(50, seed=2, days=1))
    assert [one.id for one in history] == [one.id for one in expected]
    assert [one.usage.cached for one in history] == [one.cached for one in expected]
    assert history[0].basis.asked == expected[0].asked
    bound(load_policy(example_policy_path()), Bundle(default_bundle_dir()).manifest)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "say what to do with it: --out FILE.jsonl or --send URL"),
        (["--out", "t.csv"], 2, "--out: t.csv must end in .jsonl"),
        (["--out", "no/where.jsonl"], 1, "no/where.jsonl: No such file"),
        (["--requests", "0", "--out", "t.jsonl"], 2, "--requests"),
        (["--requests", "5", "--send", "http://127.0.0.1:9"], 1, "--send: nothing answers at http://127.0.0.1:9"),
        (["--send", "http://127.0.0.1:9", "--key-env", "NO_SUCH_KEY"], 2, "--key-env: the variable NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line(run: Run, arguments: list[str], status: int, message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (status, "", 1)
    assert message in err
