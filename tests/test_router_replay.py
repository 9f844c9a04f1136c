from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ledgers import entry
from provider import provider
from running import ENVIRONMENT, WordPredictor, serve_gateway

import router.cli
from router.basis import Basis, state_of
from router.capability import KnownNeeds
from router.content import KnownContent
from router.entry import NANO, NanoPrices
from router.features import prompt_from_text
from router.gateway import Gateway, bound
from router.history import Past, read_history
from router.ledger import Ledger
from router.ledger_migrations import migrate
from router.ledger_store import ledger_url, open_engine, write_batch
from router.policy import Capture, Policy
from router.predictor import Predictor
from router.replay import BY, Bundle, Replay, Scenario, replay
from router.sessions import SessionRule
from router.steps import KnownResult
from router.upstream import Usage

CHAT = "/v1/chat/completions"
SMALL = {"input": 1, "output": 4, "cached_read": 0.1, "cache_write": 1.25}
LARGE = {"input": 5, "output": 25, "cached_read": 0.5}
MINUTE = 60_000_000


class Words(Bundle):
    """The bundle of :class:`WordPredictor`, without files."""

    def __init__(self) -> None:
        known = WordPredictor()
        self.manifest: Any = SimpleNamespace(
            id=known.name, targets=known.targets, threshold=known.threshold, bars={}, knows_steps=False
        )

    def predict(self, past: Past) -> Any:
        assert past.prompt is not None
        return WordPredictor().predict([prompt_from_text(past.prompt)])


def policy(**changes: Any) -> Policy:
    document = {
        "version": 1,
        "targets": {
            "cheap": {"model": "openai/small", "prices": SMALL},
            "frontier": {"model": "openai/large", "prices": LARGE},
        },
        "tiers": {
            "auto": {
                "predict": {"weak": "cheap", "strong": "frontier"},
                "modes": {"plan": "frontier", "code": "cheap"},
            },
            "top": {"default": "frontier"},
        },
        "default_tier": "auto",
        "aliases": {"gpt-*": "auto"},
        "sessions": {"enabled": False},
    }
    return Policy.model_validate({**document, **changes})


def scenario(own: Policy | None = None, tier: str | None = None) -> Scenario:
    own = own or policy()
    words = Words()
    return Scenario("new", bound(own, words.manifest), own.hash, words, tier)


def past(target: str | None = "cheap", **changes: Any) -> Past:
    """A request of 1,000 tokens, 800 of them cached, with an answer of 10."""
    usage = changes.pop("usage", Usage(1_000, 10, 800, 100))
    prices = {"cheap": SMALL, "frontier": LARGE}.get(target or "")
    own = None if prices is None else NanoPrices.of(policy().targets[str(target)].prices)  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "id": "1", "time": MINUTE, "request": None, "session": "s", "client": None, "tier": "auto", "mode": "code",
        "feature": None, "reason": "signal", "bundle": "words@0", "target": target,
        "model": {"cheap": "openai/small", "frontier": "openai/large"}.get(target or ""), "score": None,
        "usage": usage, "earlier_tokens": 0, "earlier_cost": 0, "prices": own,
        "cost": None if own is None else own.cost(usage), "status": 200, "basis": Basis("auto"),
    }  # fmt: skip
    return Past(**(fields | changes))


def replayed(history: list[Past], *scenarios: Scenario, by: str = "mode") -> Replay:
    return replay(history, list(scenarios) or [scenario()], by)


# What really happened, replayed


@contextmanager
def served(file: Path, **changes: Any) -> Any:
    """A server whose ledger is kept, and the policy that it serves."""
    with provider() as upstream:

        def target(name: str, prices: Any, **more: Any) -> dict[str, Any]:
            keys = {"api_base": upstream.url, "api_key_env": "TEST_PROVIDER_KEY", "cooldown": None}
            return {"model": f"openai/{name}", "prices": prices, **keys, **more}

        own = policy(
            targets={
                "cheap": target("small", SMALL),
                "frontier": target("large", LARGE),
                "broken": target("broken", SMALL, fallbacks=["frontier"]),
                "narrow": target("small", SMALL, context_window=5_000),
                "silent": target("empty", SMALL),
            },
            tiers={
                "auto": {
                    "predict": {"weak": "cheap", "strong": "frontier"},
                    "modes": {"plan": "frontier", "code": "cheap", "small": "narrow", "risky": "broken"},
                    "steps": [{"kind": "run", "failed_test": True, "to": "frontier"}],
                },
            },
            sessions={"quality_dollars": 0.0001},
            capture=Capture(share=1),
            **changes,
        )
        ledger = Ledger(str(file), durability="strict").open()
        gateway = Gateway(own, WordPredictor(), ENVIRONMENT, ledger=ledger)
        with serve_gateway(gateway) as url, httpx.Client(base_url=url, timeout=240) as http:
            yield http, own


def test_the_same_policy_gives_the_same_bill(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    asked: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}], **more}
        for text, more in [
            ("an easy question", {}),
            ("a hard question", {}),
            ("an easy one again, after it", {}),  # which the session's warm cache may keep where it is
            ("a strange question", {}),
            ("anything", {"model": "gpt-4o", "metadata": {"mode": "plan"}}),
            ("anything", {"model": "auto:code"}),
            ("anything", {"model": "frontier"}),
            ("word " * 8_000, {"metadata": {"mode": "small"}}),
            ("anything", {"metadata": {"mode": "risky"}}),
            ("anything", {"model": "gpt-4o", "stream": True}),
        ]
    ]
    asked.append(
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "1 failed"},
            ]
        }
    )
    with served(file) as (http, own):
        for number, body in enumerate(asked * 2):
            session = {"x-router-session": f"s{number % 3}"}
            http.post(CHAT, json=body, headers=session).raise_for_status()
    history = list(read_history(str(file)))
    assert {one.reason for one in history} >= {
        "predicted", "unknown", "signal", "pinned", "capability", "fallback", "step",
    }  # fmt: skip
    found = replay(history, [scenario(own)], "target")
    (column,) = found.columns
    assert len(history) == len(asked) * 2
    assert (column.total.moved, column.total.refused, column.moves) == (0, 0, {})
    assert column.total.cost == found.before.total.cost == sum(one.cost or 0 for one in history) > 0
    assert column.groups == found.before.groups
    assert column.predictions.recorded > 0
    assert (column.predictions.again, column.predictions.left) == (0, 0)
    (sentence,) = found.lines()
    assert "would have cost the same: $" in sentence
    assert "0 of 22 requests would have gone elsewhere" in sentence


def test_another_policy_decides_from_what_the_rows_hold(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with served(file) as (http, own):
        for text in ("an easy question", "a hard question"):
            http.post(CHAT, json={"messages": [{"role": "user", "content": text}]}).raise_for_status()
        http.post(
            CHAT, json={"model": "gpt-4o:plan", "messages": [{"role": "user", "content": "hard"}]}
        ).raise_for_status()
    document = own.model_dump(exclude_unset=True)
    lax = Policy.model_validate(
        document | {"tiers": {"auto": {"predict": {"weak": "cheap", "strong": "frontier", "threshold": 0.5}}}}
    )
    found = replay(read_history(str(file)), [scenario(lax)])
    (column,) = found.columns
    # The one that had told its mode was not predicted then: its captured prompt is now.
    assert (column.predictions.recorded, column.predictions.again, column.predictions.left) == (2, 1, 0)
    assert {key: move.requests for key, move in column.moves.items()} == {("frontier", "cheap"): 2}
    assert column.total.cost < found.before.total.cost


# Costs


def test_what_stays_costs_what_it_did_and_what_moves_what_its_tokens_cost_there() -> None:
    history = [past(mode="code"), past("frontier", mode="plan", session="t")]
    changed = policy(tiers={"auto": {"default": "cheap"}})
    found = replayed(history, scenario(), scenario(changed))
    same, moved = found.columns
    assert same.total.cost == found.before.total.cost
    # 900 tokens that the other target has never seen are written to its cache.
    expected = (history[0].cost or 0) + 100 * 1_000 + 900 * 1_250 + 10 * 4_000
    assert moved.total.cost == expected
    assert moved.moves[("frontier", "cheap")].requests == 1
    assert moved.moves[("frontier", "cheap")].before == history[1].cost
    assert found.before.groups["plan"].cost == history[1].cost


def test_prices_of_the_new_policy_count_where_nothing_moves() -> None:
    dearer = policy(
        targets={
            "cheap": {"model": "openai/small", "prices": {"input": 2, "output": 2}},
            "frontier": {"model": "openai/large", "prices": LARGE},
        }
    )
    history = [past(earlier_cost=7, earlier_tokens=3, cost=1)]
    (column,) = replayed(history, scenario(dearer)).columns
    assert (column.total.cost, column.total.moved) == (1_000 * 2_000 + 10 * 2_000 + 7, 0)


def session_of(*steps: tuple[str, int, int]) -> list[Past]:
    """A conversation: for each request the target, its tokens, and those of them that were read from the cache."""
    return [
        past(
            target,
            time=n * MINUTE,
            mode="plan" if target == "frontier" else "code",
            usage=Usage(tokens, 10, read, tokens - read),
        )
        for n, (target, tokens, read) in enumerate(steps, 1)
    ]


def cached_by(history: list[Past], own: Policy) -> int:
    return replayed(history, scenario(own)).columns[0].total.cached


ALL_CHEAP = policy(tiers={"auto": {"default": "cheap"}})
ALL_FRONTIER = policy(tiers={"auto": {"default": "frontier"}})


def test_a_session_that_moves_as_a_whole_keeps_its_cache_but_for_its_first_request() -> None:
    history = session_of(("cheap", 1_000, 500), ("cheap", 1_500, 1_000), ("cheap", 1_800, 1_500))
    assert cached_by(history, policy()) == 3_000
    # The first read 500 that another session had left there, which nobody left at the other target.
    assert cached_by(history, ALL_FRONTIER) == 2_500


def test_a_switch_that_did_not_happen_leaves_the_cache_warm_and_a_new_one_cold() -> None:
    history = session_of(("cheap", 1_000, 0), ("frontier", 1_500, 0), ("cheap", 1_800, 1_000))
    # Nothing was read after the switch; staying, the conversation that was sent before would have been.
    assert cached_by(history, ALL_CHEAP) == 0 + 1_000 + 1_500
    steady = session_of(("cheap", 1_000, 0), ("cheap", 1_500, 1_000), ("cheap", 1_800, 1_500))
    steady[1].mode = "plan"
    # To the frontier and back: what the first target was sent is there still, and no more than that.
    assert cached_by(steady, policy()) == 0 + 0 + 1_000


def test_a_cache_is_gone_after_its_time() -> None:
    history = session_of(("cheap", 1_000, 0), ("frontier", 1_500, 0))
    history[1].time = history[0].time + 6 * MINUTE
    assert cached_by(history, ALL_CHEAP) == 0
    patient = policy(tiers={"auto": {"default": "cheap"}}, sessions={"enabled": False, "idle_seconds": 600})
    assert cached_by(history, patient) == 1_000


def test_a_request_of_its_own_does_not_read_the_conversations_cache() -> None:
    history = session_of(("cheap", 9_000, 0), ("frontier", 500, 0), ("cheap", 9_500, 9_000))
    assert cached_by(history, ALL_CHEAP) == 9_000


def test_providers_that_count_no_cache_have_none() -> None:
    history = session_of(("cheap", 1_000, 0), ("cheap", 1_500, 0))
    for one in history:
        one.usage = Usage(one.usage.input, 10)
    (column,) = replayed(history, scenario(ALL_FRONTIER)).columns
    assert column.total.cost == 2_500 * 5_000 + 20 * 25_000


# Deciding


def test_a_second_chance_is_kept_where_the_decision_is_the_same() -> None:
    escalated = past("frontier", reason="escalated", basis=Basis("auto", decided="cheap"), earlier_cost=999)
    escalated.cost = (escalated.cost or 0) + 999
    (same,) = replayed([escalated]).columns
    assert (same.total.cost, same.total.moved) == (escalated.cost, 0)
    # Decided for the stronger one at once, the first try is not paid for.
    (direct,) = replayed([escalated], scenario(ALL_FRONTIER)).columns
    assert (direct.total.cost, direct.total.moved) == (escalated.cost - 999, 0)


def test_what_a_policy_cannot_answer_is_refused_and_costs_nothing() -> None:
    tiny = policy(
        targets={"cheap": {"model": "openai/small", "prices": SMALL, "context_window": 100}},
        tiers={"auto": {"default": "cheap"}},
    )
    found = replayed([past(), past(basis=Basis("gone")), past(basis=Basis("gpt-4o"))], scenario(tiny))
    (column,) = found.columns
    assert (column.total.requests, column.total.refused, column.total.cost) == (3, 3, 0)
    assert "and 3 would have been refused (they cost nothing)" in next(found.lines())


def test_a_forced_tier_leaves_what_names_a_target() -> None:
    history = [past(), past(basis=Basis("cheap"), session="t"), past(basis=Basis("gpt-9"), session="u")]
    found = replayed(history, scenario(tier="top"))
    assert found.columns[0].total.moved == 2
    assert next(found.lines()).startswith("Forcing this traffic onto new would have cost $")


def test_step_rules_and_capabilities_are_decided_from_what_was_kept() -> None:
    ruled = policy(
        tiers={"auto": {"default": "cheap", "steps": [{"tool": "bash", "larger_than": 90, "to": "frontier"}]}}
    )
    result = KnownResult("bash", 100)
    content = KnownContent(KnownNeeds(frozenset({"tools"})), (result,))
    (column,) = replayed([past(mode=None, basis=Basis("auto", content=content))], scenario(ruled)).columns
    assert column.moves.keys() == {("cheap", "frontier")}
    blind = policy(
        targets={
            "cheap": {"model": "openai/small", "prices": SMALL, "supports": ["images"]},
            "frontier": {"model": "openai/large", "prices": LARGE},
        }
    )
    (column,) = replayed([past(basis=Basis("auto", content=content))], scenario(blind), by="reason").columns
    assert column.groups.keys() == {"capability"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"score": 0.4}, (1, 0, 0)),
        ({"score": 0.4, "bundle": None}, (1, 0, 0)),
        ({"score": 0.4, "bundle": "another@1"}, (0, 0, 1)),
        ({"score": None}, (0, 0, 1)),
        ({"score": 0.4, "bundle": "another@1", "prompt": "a hard one"}, (0, 1, 0)),
        ({"score": 0.05, "prompt": "a hard one"}, (1, 0, 0)),  # what was read then was not redacted
    ],
)
def test_where_a_prediction_comes_from(changes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    (column,) = replayed([past(mode=None, **changes)]).columns
    said = column.predictions
    assert (said.recorded, said.again, said.left) == expected
    hard = changes["score"] == 0.4 and not said.left
    assert column.total.moved == hard
    if said.left:
        assert column.total.cost == past().cost


def test_a_captured_prompt_is_predicted_by_the_given_bundle(
    tiny_bundle: Path, tiny_predictor: Predictor
) -> None:
    prompts = [prompt_from_text(text) for text in ("Prove that there are infinitely many primes.", "hi")]
    scores = [float(tiny_predictor.predict([prompt]).score[0]) for prompt in prompts]
    own = policy(
        tiers={
            "auto": {
                "predict": {
                    "weak": "cheap",
                    "strong": "frontier",
                    "threshold": min(scores),
                    "unknown": "predict",
                }
            }
        }
    )
    bundle = Bundle(tiny_bundle)
    history = [
        past("cheap", mode=None, bundle="older@1", prompt=prompt.text, state=state_of(prompt), session=str(n))
        for n, prompt in enumerate(prompts)
    ]
    found = replay(history, [Scenario("p", bound(own, bundle.manifest), "v", bundle)])
    assert found.columns[0].predictions.again == 2
    assert found.columns[0].total.moved == sum(score > min(scores) for score in scores) == 1


def test_rows_of_before_are_decided_by_what_they_hold(where: str) -> None:
    engine = open_engine(ledger_url(where), "create")
    migrate(engine)
    with engine.begin() as connection:
        write_batch(
            connection,
            [
                entry(id="a", time=1, tier="auto", mode="plan", target="cheap", model="openai/small").row(),
                entry(id="b", time=2, tier=None, mode=None, reason="pinned", target="cheap").row(),
                entry(id="c", time=3, target=None, model=None, status=401, input_tokens=0, output_tokens=0,
                      cached_read_tokens=0).row(),
            ],
        )  # fmt: skip
    engine.dispose()
    history = list(read_history(where))
    assert [one.basis.asked for one in history[:2]] == ["auto", "cheap"]
    found = replay(history, [scenario()])
    assert found.columns[0].moves.keys() == {("cheap", "frontier")}
    assert found.unused == 1
    assert [one.id for one in read_history(where, since=2, until=3)] == ["b"]


def test_traffic_that_was_never_sent_is_held_against_the_first_policy() -> None:
    history = [past(None, cost=None, reason=None, status=None, mode=mode) for mode in ("plan", "code")]
    found = replayed(history, scenario(), scenario(tier="top"))
    assert not found.sent
    assert found.before is found.columns[0]
    assert found.columns[1].moves.keys() == {("cheap", "frontier")}
    first, second = found.lines()
    assert first.startswith("new: $")
    assert "more: " in second


@pytest.mark.parametrize("by", BY)
def test_every_group_adds_up(by: str) -> None:
    history = [past(session=str(n % 3), mode=("plan", "code", None)[n % 3], score=0.4) for n in range(9)]
    found = replayed(history, scenario(ALL_FRONTIER), by=by)
    for column in (found.before, *found.columns):
        assert sum(group.cost for group in column.groups.values()) == column.total.cost
        assert sum(group.requests for group in column.groups.values()) == 9
    assert json.dumps(found.as_json())


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, router_command: Run, tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("ROUTER_LEDGER", "ROUTER_BUNDLE", "ROUTER_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    write_policy("new.yaml", ALL_CHEAP)
    write_policy("top.yaml", ALL_FRONTIER)
    Path("t.jsonl").write_text("".join(json.dumps(line(n)) + "\n" for n in range(4)), encoding="utf-8")
    return router_command


def write_policy(file: str, own: Policy, **changes: Any) -> None:
    document = own.model_dump(mode="json", exclude_unset=True) | changes
    Path(file).write_text(json.dumps(document), encoding="utf-8")


def line(n: int) -> dict[str, Any]:
    return {
        "id": str(n), "time": f"2026-01-05T09:0{n}:00Z", "session": "0123456789abcdef" * 2, "mode": "code",
        "input_tokens": 1_000, "output_tokens": 10, "target": "frontier", "model": "openai/large",
        "cost": 5_250_000, "status": 200, "basis": {"asked": "auto"},
    }  # fmt: skip


def test_the_report(run: Run) -> None:
    status, out, err = run(
        "replay", "t.jsonl", "--policy", "new.yaml", "--policy", "top.yaml", "--by", "session"
    )
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == (
        "With new.yaml this traffic would have cost $0.0168 less: $0.004160 instead of $0.0210 (80 % less); "
        "4 of 4 requests would have gone elsewhere."
    )
    assert "top.yaml this traffic would have cost the same" in lines[1]
    assert lines[3].split() == ["session", "requests", "as", "it", "was", "new.yaml", "top.yaml"]
    assert lines[4].startswith("0123456789abcdef0123456789abcdef ")  # whole, to be copied
    assert lines[-1].split() == ["new.yaml", "frontier", "cheap", "4", "$0.0210", "$0.004160"]
    assert "another model would have answered with others" in err


def test_json_and_the_file_of_moved_requests(run: Run) -> None:
    status, out, err = run(
        "replay", "t.jsonl", "--policy", "new.yaml", "--json", "--moved", "moved.jsonl", "--since",
        "2026-01-05T09:01", "--until", "2026-01-05T09:03",
    )  # fmt: skip
    found = json.loads(out)
    assert (status, err) == (0, "")
    (column,) = found["policies"]
    assert column["difference_nano_usd"] == 2 * (1_040_000 - 5_250_000)
    assert column["total"]["cost_usd"] == column["total"]["cost_nano_usd"] / NANO
    assert column["moves"][0]["requests"] == 2
    assert (column["version"], column["bundle"]) == (ALL_CHEAP.hash, None)
    rows = [json.loads(text) for text in Path("moved.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["1", "2"]
    assert (rows[0]["from"], rows[0]["to"], rows[0]["cost_nano_usd"]) == ("frontier", "cheap", 1_040_000)


def test_a_threshold_in_the_place_of_the_policys(run: Run, tiny_bundle: Path) -> None:
    own = policy(
        tiers={
            "auto": {
                "predict": {"weak": "cheap", "strong": "frontier", "quality": 0.77, "unknown": "predict"},
                "modes": {"ask": {"predict": {"threshold": 0.9}}},
            }
        }
    )
    write_policy("predicts.yaml", own)
    Path("t.jsonl").write_text(
        "".join(
            json.dumps(line(n) | {"mode": mode, "score": 0.3, "session": str(n)}) + "\n"
            for n, mode in enumerate((None, "ask"))
        ),
        encoding="utf-8",
    )
    arguments = ("replay", "t.jsonl", "--policy", "predicts.yaml", "--bundle", str(tiny_bundle), "--json")
    for threshold, moved in (("0.2", 1), ("0.4", 2)):
        status, out, err = run(*arguments, "--threshold", threshold)
        assert (status, err) == (0, "")
        assert json.loads(out)["policies"][0]["total"]["moved_requests"] == moved
    status, out, err = run(*arguments)
    assert status == 1
    assert "predicts.yaml:1: tiers.auto.predict.quality: the bundle holds no threshold for 0.77" in err


def test_a_ledger_and_its_lines_are_replayed_alike(run: Run) -> None:
    with Ledger("l.db", capture=Capture(share=1)) as ledger:
        for number in range(6):
            ledger.record(
                entry(tier="auto", target="cheap", model="openai/small", mode=("code", "plan")[number % 2]),
                f"prompt {number}",
            )
    Path("c.jsonl").write_text(run("ledger", "captures", "--ledger", "l.db")[1], encoding="utf-8")
    with gzip.open("c.jsonl.gz", "wb") as file:
        file.write(Path("c.jsonl").read_bytes())
    found = [
        json.loads(run("replay", source, "--policy", "top.yaml", "--json")[1])
        for source in ("l.db", "sqlite:///l.db", "c.jsonl", "c.jsonl.gz")
    ]
    assert found[0]["policies"][0]["total"]["moved_requests"] == 6
    assert all(one == found[0] for one in found)


GOOD = {"time": 1, "input_tokens": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "t.jsonl:2: not valid JSON"),
        ("[]", "t.jsonl:2: must be a JSON object"),
        ({}, "t.jsonl:2: time: is missing"),
        ({"time": "noon"}, "t.jsonl:2: time: must be a date and time"),
        ({"time": 0}, "t.jsonl:2: time: is before that of the line above"),
        ({"input_tokens": "many"}, "t.jsonl:2: input_tokens: must be a whole number"),
        ({"cached_read_tokens": 6}, "t.jsonl:2: input_tokens: must hold the cached ones too"),
        ({"mode": 7}, "t.jsonl:2: mode: must be a text"),
        ({"cost": -1}, "t.jsonl:2: cost: must be a whole number"),
        ({"price_input": 3}, "t.jsonl:2: price_output: is missing"),
        ({"score": "high"}, "t.jsonl:2: score: must be a number"),
        ({"basis": "{"}, "t.jsonl:2: basis: cannot be read"),
        ({"basis": []}, "t.jsonl:2: basis: must be an object"),
        ({"basis": {"needs": ["magic"]}}, "t.jsonl:2: basis.needs: 'magic' is none of"),
        ({"target": "cheap"}, "t.jsonl:2: target: all requests must name the one that answered, or none"),
    ],
)
def test_a_broken_line_is_told_by_file_line_and_field(run: Run, text: Any, message: str) -> None:
    second = text if isinstance(text, str) else json.dumps(GOOD | text if text else {})
    Path("t.jsonl").write_text(f"{json.dumps(GOOD)}\n{second}\n", encoding="utf-8")
    status, out, err = run("replay", "t.jsonl", "--policy", "new.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"router: {message}")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["t.jsonl"], 2, "say by which policy: --policy FILE"),
        (["t.jsonl", "--policy", "new.yaml", "--by", "colour"], 2, "--by: there is no group 'colour'; there are: mode"),
        (["none.jsonl", "--policy", "new.yaml"], 2, "none.jsonl: no requests can be read there (No such file"),
        (["none.db", "--policy", "new.yaml"], 1, "none.db: there is no ledger"),
        (["text.db", "--policy", "new.yaml"], 1, "text.db cannot be used: file is not a database"),
        (["latin.jsonl", "--policy", "new.yaml"], 1, "latin.jsonl: not a text file in UTF-8"),
        (["half.jsonl.gz", "--policy", "new.yaml"], 1, "half.jsonl.gz: cannot be read to its end"),
        (["--policy", "new.yaml"], 1, "ledger.sqlite3: there is no ledger"),
        (["t.jsonl", "--policy", "none.yaml"], 2, "none.yaml: no policy can be read there"),
        (["t.jsonl", "--policy", "free.yaml"], 1, "free.yaml:1: targets.cheap.prices: missing"),
        (["t.jsonl", "--policy", "new.yaml", "--tier", "best"], 2, "--tier: there is no tier 'best'; there are: auto"),
        (["t.jsonl", "--policy", "new.yaml", "--moved", "no/where.jsonl"], 1, "no/where.jsonl: No such file"),
        (["t.jsonl", "--policy", "new.yaml", "--since", "soon"], 2, "--since: 'soon' is no time"),
        (["t.jsonl", "--policy", "predicts.yaml", "--bundle", "no"], 1, "no"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line(run: Run, arguments: list[str], status: int, message: str) -> None:
    Path("text.db").write_text("my notes, not a database " * 99)
    Path("latin.jsonl").write_bytes(b'{"mode": "\xe9"}\n')
    with gzip.open("half.jsonl.gz", "wb") as file:
        file.write(b'{"time": 1, "input_tokens": 5}\n' * 50)
    Path("half.jsonl.gz").write_bytes(Path("half.jsonl.gz").read_bytes()[:-20])
    write_policy(
        "free.yaml", ALL_CHEAP, targets={"cheap": {"model": "openai/small"}, "frontier": {"echo": True}}
    )
    write_policy("predicts.yaml", policy())
    code, out, err = run("replay", *arguments)
    assert (code, out, err.count("\n")) == (status, "", 1)
    assert err.startswith("router: ")
    assert message in err


def test_no_requests_is_no_error(run: Run) -> None:
    Path("t.jsonl").write_text("\n")
    assert run("replay", "t.jsonl", "--policy", "new.yaml")[:2] == (0, "No requests to replay.\n")


def test_nothing_is_sent_and_litellm_is_not_loaded(run: Run, tiny_bundle: Path) -> None:
    write_policy("predicts.yaml", policy())
    Path("t.jsonl").write_text(json.dumps(line(0) | {"mode": None, "prompt": "Why?"}) + "\n")
    code = (
        "import sys, socket; socket.socket.connect = None\n"
        "from router.cli import app\n"
        f"app(['replay', 't.jsonl', '--policy', 'predicts.yaml', '--bundle', {str(tiny_bundle)!r}], standalone_mode=False)\n"
        "print('litellm' in sys.modules, 'torch' in sys.modules)"
    )
    path = [str(Path(router.cli.__file__).parent.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path)},
    )
    assert done.stdout.splitlines()[-1] == "False False"
    assert "by the captured prompt 1" in done.stderr


def test_a_session_is_kept_where_its_cache_is_warm() -> None:
    targets = {
        "cheap": {"model": "openai/small", "prices": SMALL},
        "frontier": {"model": "openai/large", "prices": {"input": 5, "output": 5, "cached_read": 0.05}},
    }
    history = [
        past("frontier", mode=None, time=n * MINUTE, score=score, usage=Usage(50_000, 10, 49_900, 100))
        for n, score in enumerate((0.3, 0.1, 0.1), 1)
    ]
    rule = SessionRule(quality_dollars=0)
    found = replayed(history, scenario(policy(targets=targets, sessions=rule)), by="reason")
    assert {name: group.requests for name, group in found.columns[0].groups.items()} == {
        "signal": 3
    }  # they are where they were, for what reason ever
    assert found.columns[0].total.moved == 0
    alone = replayed(history, scenario(policy(targets=targets)), by="reason")
    assert (alone.columns[0].total.moved, alone.columns[0].groups["predicted"].requests) == (2, 2)
