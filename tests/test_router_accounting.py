from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.accounting import Ended, check_priced, entry_of
from router.content import Content
from router.decision import Decision, RequestFacts
from router.entry import Entry
from router.errors import PolicyError
from router.failover import Attempt
from router.policy import Policy
from router.upstream import Usage

POLICY = Policy.model_validate(
    {
        "version": 1,
        "targets": {
            "cheap": {"model": "openai/small", "prices": {"input": 1, "output": 4}},
            "dear": {"model": "anthropic/large", "prices": {"input": 5, "output": 25}},
            "free": {"echo": True},
            "unpriced": {"model": "openai/other"},
        },
    }
)
DECISION = Decision("cheap", "openai/small", "predicted", "auto", "code", score=0.1, threshold=0.2)
ENDED = Ended(200, None, 0.25, 0.004, None, streamed=False, cancelled=False)
CONTENT = Content({"messages": [{"role": "user", "content": "words " * 100}]})


FACTS = RequestFacts("auto", content=CONTENT)


def entry(decision: Decision, *attempts: Attempt, ended: Ended = ENDED, **headers: str) -> Entry:
    return entry_of(
        decision,
        attempts,
        FACTS,
        ended,
        policy=POLICY,
        time=1_000,
        request="r",
        dialect="chat",
        versions=("p", "b"),
        session="s",
        client=None,
        headers=headers,
    )


def test_what_was_used_is_priced() -> None:
    row = entry(DECISION, Attempt("cheap", "ok", Usage(100, 10, reasoning=6)))
    assert (row.input_tokens, row.output_tokens, row.reasoning_tokens) == (100, 10, 6)
    assert row.cost == 100 * 1000 + 10 * 4000
    assert (row.strongest, row.strongest_cost) == ("dear", 100 * 5000 + 10 * 25_000)
    assert (row.provider, row.latency_us, row.decision_us, row.time) == ("openai", 250_000, 4_000, 1_000)
    assert (row.policy, row.bundle, row.session, row.mode) == ("p", "b", "s", "code")


def test_an_escalation_is_billed_twice_and_told_apart() -> None:
    first, second = Attempt("cheap", "ok", Usage(100, 10)), Attempt("dear", "ok", Usage(100, 20))
    escalated = replace(DECISION, target="dear", model="anthropic/large", reason="escalated")
    row = entry(escalated, first, second)
    assert (row.earlier_tokens, row.earlier_cost) == (110, 140_000)
    assert row.cost == 140_000 + 100 * 5000 + 20 * 25_000
    assert (row.target, row.provider, row.fallbacks, row.output_tokens) == ("dear", "anthropic", 1, 20)


def test_a_call_that_failed_costs_nothing() -> None:
    fallen = replace(DECISION, target="dear", model="anthropic/large", reason="fallback")
    row = entry(fallen, Attempt("cheap", "failed"), Attempt("dear", "ok", Usage(10, 1)))
    assert (row.earlier_tokens, row.earlier_cost, row.cost) == (0, 0, 75_000)
    none = entry(DECISION, Attempt("cheap", "failed"), ended=replace(ENDED, status=502, error="down"))
    assert (none.cost, none.input_tokens, none.status, none.error) == (0, 0, 502, "down")
    assert none.strongest is None


@pytest.mark.parametrize("outcome", ["ok", "failed", "gone"])
def test_an_answer_that_nobody_counted_is_estimated(outcome: Any) -> None:
    row = entry(DECISION, Attempt("cheap", outcome, None, size=12.5))
    assert row.usage_estimated
    assert (row.input_tokens, row.output_tokens) == (CONTENT.needs.tokens, 13)
    assert row.cost == row.input_tokens * 1000 + 13 * 4000


def test_where_nobody_was_asked_the_target_is_the_one_that_was_decided_on() -> None:
    row = entry(DECISION, ended=replace(ENDED, status=401, error="provider_key_missing"))
    assert (row.target, row.provider, row.cost, row.input_tokens) == ("cheap", "openai", 0, 0)


def test_targets_without_prices() -> None:
    with pytest.raises(PolicyError, match=r"^targets\.unpriced\.prices: missing; the ledger counts"):
        check_priced(POLICY)
    assert entry(replace(DECISION, target="free"), Attempt("free", "ok", Usage(10, 10))).cost == 0
    assert entry(replace(DECISION, target="unpriced"), Attempt("unpriced", "ok", Usage(10, 10))).cost is None


def test_the_feature_is_a_short_word_of_the_clients() -> None:
    assert entry(DECISION, **{"x-router-feature": " search "}).feature == "search"
    assert entry(DECISION).feature is None
    long = entry(DECISION, **{"x-router-feature": "x" * 500 + "\n"}).feature
    assert long is not None
    assert len(long) <= 65
