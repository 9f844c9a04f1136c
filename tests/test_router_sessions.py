from __future__ import annotations

import math
import time
import tracemalloc
from typing import Any

import pytest
from pydantic import ValidationError

from router.policy import Prices
from router.sessions import (
    SESSION_HEADERS,
    Cache,
    Session,
    SessionRule,
    SessionStore,
    Weighing,
    conversation_identity,
    keep_or_switch,
    requested,
    session_key,
)

RULE = SessionRule()
SMALL = Prices(input=1, output=5, cached_read=0.1, cache_write=1.25)
LARGE = Prices(input=5, output=25, cached_read=0.5, cache_write=6.25)
PRICES = {"small": SMALL, "large": LARGE}

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are an agent."},
    {"role": "user", "content": "Fix the parser."},
]


def session(incumbent: str, *, requests: int = 10, context: int = 40_000, **known: Any) -> Session:
    """A warm session with one target, whose last request was at second 1000."""
    fields: dict[str, Any] = {
        "first_context": context // 4, "output": 400 * requests, "hard_share": 0.2, "weight": 8.0,
        "caches": (Cache(incumbent, context, 1000.0),),
    }  # fmt: skip
    return Session(incumbent, 1000.0, context=context, requests=requests, **(fields | known))


def weigh(known: Session | None, candidate: str, **other: Any) -> Weighing:
    prices = {
        "incumbent_prices": PRICES.get(known.incumbent) if known else None,
        "candidate_prices": PRICES[candidate],
    }
    request = {"context": 41_000, "gain": 0.0, "rule": RULE, "now": 1010.0}
    return keep_or_switch(known, candidate, **(prices | request | other))


class TestKey:
    def test_the_first_header_that_is_present_names_the_session(self) -> None:
        headers = {name: f"s-{number}" for number, name in enumerate(SESSION_HEADERS)}
        keys = []
        while headers:
            keys.append(session_key(headers, "i", "k"))
            assert keys[-1] == session_key({"x-router-session": next(iter(headers.values()))}, "other", "k")
            del headers[next(iter(headers))]
        assert len(set(keys)) == 5
        assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)

    def test_two_clients_never_share_a_session(self) -> None:
        assert session_key({"x-session-id": "a"}, "i", "one") != session_key(
            {"x-session-id": "a"}, "i", "two"
        )
        assert session_key({}, "i", "one") != session_key({}, "i", "two")

    def test_a_header_cannot_name_a_conversation(self) -> None:
        assert session_key({"x-session-id": "i"}, "", "k") != session_key({}, "i", "k")
        assert session_key({}, "b", "a") != session_key({}, "", "ab")

    @pytest.mark.parametrize("value", ["", "   ", "x" * 257, "a\x00b", "line\nbreak", "\x1b[31m"])
    def test_a_header_that_cannot_be_a_name_is_passed_over(self, value: str) -> None:
        alone = session_key({}, "i", "k")
        assert session_key({"x-router-session": value}, "i", "k") == alone
        named = {"x-router-session": value, "x-kilocode-taskid": "t"}
        assert session_key(named, "i", "k") == session_key({"x-kilocode-taskid": "t"}, "i", "k") != alone

    def test_the_longest_name(self) -> None:
        assert session_key({"x-session-id": "x" * 256}, "i", "k") != session_key({}, "i", "k")


class TestIdentity:
    def test_is_the_same_for_all_requests_of_a_conversation(self) -> None:
        later = [
            *TALK,
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": "And the lexer."},
        ]
        assert conversation_identity(TALK) == conversation_identity(later)

    @pytest.mark.parametrize(
        "other",
        [
            [TALK[0], {"role": "user", "content": "Fix the lexer."}],
            [{"role": "system", "content": "You are a poet."}, TALK[1]],
            [{"role": "developer", "content": TALK[0]["content"]}, TALK[1]],
            [TALK[1]],
            [],
        ],
    )
    def test_tells_conversations_apart(self, other: list[dict[str, Any]]) -> None:
        assert conversation_identity(TALK) != conversation_identity(other)

    def test_of_a_long_text_the_end_and_the_length_count_too(self) -> None:
        long = "word " * 100_000
        texts = [long + "a", long + "b", long + "word b", "word " + long + "b"]
        identities = [conversation_identity([{"role": "user", "content": text}]) for text in texts]
        assert len(set(identities[:3])) == 3
        assert identities[2] == identities[3]

    def test_reads_parts_and_text_that_cannot_be_encoded(self) -> None:
        parts = [{"role": "user", "content": [{"type": "text", "text": "Fix the parser."}]}]
        assert conversation_identity(parts) == conversation_identity(TALK[1:])
        assert len(conversation_identity([{"role": "user", "content": "\ud800"}])) == 32

    def test_takes_no_longer_for_a_long_conversation(self) -> None:
        turns = [{"role": "assistant", "content": "word " * 2_000}, {"role": "user", "content": "more"}]
        long = [{"role": "system", "content": "word " * 80_000}, TALK[1], *turns * 50]
        start = time.perf_counter()
        for _ in range(100):
            conversation_identity(long)
        assert (time.perf_counter() - start) / 100 < 0.002


class TestStore:
    def test_gives_back_what_was_put(self) -> None:
        store = SessionStore()
        assert store.get("a", 0.0) is None
        store.put("a", session("small"))
        assert store.get("a", 1000.0) == session("small")

    def test_forgets_after_the_idle_time(self) -> None:
        store = SessionStore(forget_seconds=60)
        store.put("a", session("small"))
        assert store.get("a", 1060.0) is not None
        assert store.get("a", 1060.5) is None
        assert len(store) == 0

    def test_drops_the_session_that_was_longest_unused(self) -> None:
        store = SessionStore(most=2)
        for key in ("a", "b", "a", "c"):
            store.put(key, session("small"))
        assert [key for key in "abc" if store.get(key, 1000.0)] == ["a", "c"]
        assert len(store) == 2

    @pytest.mark.parametrize("bad", [{"most": 0}, {"forget_seconds": 0}])
    def test_needs_room(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="room"):
            SessionStore(**bad)

    def test_an_entry_takes_about_what_is_said(self) -> None:
        store = SessionStore()
        tracemalloc.start()
        for number in range(1000):
            caches = tuple(Cache(f"target-{n}", 1000 + number, float(number)) for n in range(2))
            share = number / 1001
            store.put(
                f"{number:032x}", session("small", context=70_000 + number, hard_share=share, caches=caches)
            )
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 300 < size / 1000 < 1_500


class TestRequested:
    def test_counts(self) -> None:
        known = requested(None, "small", context=10_000, now=0.0, rule=RULE, gain=0.1, mode="code").answered(
            300
        )
        assert (known.requests, known.switches, known.first_context, known.mode) == (1, 0, 10_000, "code")
        known = requested(known, "large", context=12_000, now=5.0, rule=RULE, gain=0.9).answered(500)
        assert (known.requests, known.switches, known.context, known.output) == (2, 1, 12_000, 800)
        assert known.incumbent == "large"
        assert known.cached("small", 6.0, RULE) == 10_000
        assert known.cached("large", 6.0, RULE) == 12_000
        assert known.cached("large", 305.1, RULE) == 0
        assert known.cached("other", 6.0, RULE) == 0

    def test_learns_how_hard_the_session_is(self) -> None:
        easy = hard = unknown = requested(None, "small", context=9_000, now=0.0, rule=RULE)
        for number in range(12):
            request = {"context": 9_000 + number, "now": float(number), "rule": RULE}
            easy = requested(easy, "small", gain=0.05, **request)
            hard = requested(hard, "small", gain=0.7, **request)
            unknown = requested(unknown, "small", gain=None, **request)
        assert easy.hard_share < 0.1 < RULE.usual_gain == unknown.hard_share < 0.6 < hard.hard_share

    def test_a_request_of_another_context_changes_nothing(self) -> None:
        before = session("large")
        after = requested(before, "small", context=800, now=1005.0, rule=RULE, gain=0.01)
        assert (after.incumbent, after.requests, after.caches, after.at) == (
            "large",
            10,
            before.caches,
            1000.0,
        )
        back = requested(after, "large", context=41_000, now=1010.0, rule=RULE, gain=0.5)
        assert (back.requests, back.asides) == (11, 0)

    def test_a_conversation_that_was_summarised_begins_anew(self) -> None:
        known = session("large")
        for number in range(3):
            known = requested(known, "small", context=9_000 + number, now=1005.0 + number, rule=RULE)
        assert (known.incumbent, known.context, known.requests) == ("small", 9_002, 1)
        assert known.cached("large", 1010.0, RULE) == 0

    def test_remembers_few_targets(self) -> None:
        known = None
        for number in range(9):
            known = requested(known, f"t{number}", context=9_000 + number, now=float(number), rule=RULE)
        assert known is not None
        assert [cache.target for cache in known.caches] == ["t5", "t6", "t7", "t8"]


class TestKeepOrSwitch:
    def test_the_first_request_is_decided_alone(self) -> None:
        assert weigh(None, "large") == Weighing(True, "first")

    def test_the_incumbent_stays_the_incumbent(self) -> None:
        assert weigh(session("large"), "large") == Weighing(False, "same")

    @pytest.mark.parametrize("missing", ["incumbent_prices", "candidate_prices"])
    def test_without_prices_each_request_is_decided_alone(self, missing: str) -> None:
        assert weigh(session("large"), "small", **{missing: None}) == Weighing(True, "unpriced")

    def test_a_cold_cache_holds_nobody(self) -> None:
        known = session("large", requests=3, hard_share=0.9)
        assert weigh(known, "small", gain=-0.7, now=1300.0).leave is False
        assert weigh(known, "small", gain=-0.7, now=1300.1) == Weighing(True, "cold")
        hour = RULE.model_copy(update={"idle_seconds": 3600})
        assert weigh(known, "small", gain=-0.7, now=1300.1, rule=hour).leave is False

    def test_a_cold_cache_makes_no_dearer_target_free(self) -> None:
        known = session("small")
        free = RULE.model_copy(update={"quality_dollars": 0.0})
        assert weigh(known, "large", gain=0.4, now=1400.0) == Weighing(True, "cold")
        found = weigh(known, "large", gain=0.4, now=1400.0, rule=free)
        assert (found.why, found.leave) == ("weighed", False)
        assert not weigh(known, "large", gain=None, now=1400.0).leave
        # Back to the cheaper one it goes at once.
        assert weigh(session("large"), "small", gain=-0.4, now=1400.0, rule=free) == Weighing(True, "cold")

    def test_another_context_is_decided_alone(self) -> None:
        assert weigh(session("large"), "small", context=900) == Weighing(True, "other_context")

    def test_no_context_at_all(self) -> None:
        known = session("large", context=0, first_context=0)
        assert weigh(known, "small", context=0) == Weighing(True, "cold")

    def test_leaving_costs_what_must_be_written_anew(self) -> None:
        found = weigh(session("large"), "small", gain=-0.01)
        stays = 40_000 * 0.5 + 1_000 * 6.25 + 400 * 25
        goes = 41_000 * 1.25 + 400 * 5
        assert found.leaving == pytest.approx((goes - stays) / 1e6)
        assert found.why == "weighed"

    def test_what_the_candidate_still_holds_is_not_written_again(self) -> None:
        caches = (Cache("small", 38_000, 990.0), Cache("large", 40_000, 1000.0))
        found = weigh(session("large", caches=caches), "small")
        stays = 40_000 * 0.5 + 1_000 * 6.25 + 400 * 25
        goes = 38_000 * 0.1 + 3_000 * 1.25 + 400 * 5
        assert found.leaving == pytest.approx((goes - stays) / 1e6)
        assert found.leave

    def test_prices_for_the_cache_default_to_that_of_input(self) -> None:
        plain = Prices(input=1, output=5)
        spelled = Prices(input=1, output=5, cached_read=1, cache_write=1)
        known = session("large")
        assert weigh(known, "small", candidate_prices=plain) == weigh(
            known, "small", candidate_prices=spelled
        )

    def test_a_cheaper_target_is_worth_it_once_enough_requests_are_expected(self) -> None:
        dear = Prices(input=2, output=25, cached_read=0.2, cache_write=6)
        near = Prices(input=2, output=20, cached_read=0.19, cache_write=5)
        young = session("large", requests=2, hard_share=0.01, first_context=39_000, output=800)
        old = session("large", requests=400, hard_share=0.01, first_context=0, output=160_000)
        short = SessionRule(fewest_remaining=1, most_remaining=1000)
        prices = {"incumbent_prices": dear, "candidate_prices": near, "gain": -0.01, "rule": short}
        assert not weigh(young, "small", **prices).leave
        assert weigh(young, "small", **prices).remaining == 2
        assert weigh(old, "small", **prices).leave
        assert weigh(old, "small", **prices).remaining == 400

    def test_a_hard_step_leaves_for_the_strong_target_and_a_doubtful_one_does_not(self) -> None:
        known = session("small", requests=3, context=60_000, hard_share=0.05, weight=10.0)
        assert weigh(known, "large", context=61_000, gain=0.97).leave
        doubtful = weigh(known, "large", context=61_000, gain=0.4)
        assert not doubtful.leave
        assert doubtful.gained == pytest.approx(0.4 * RULE.quality_dollars)
        assert doubtful.leaving > 0.3

    def test_a_session_of_hard_requests_is_believed_sooner(self) -> None:
        doubtful = {"context": 61_000, "gain": 0.4}
        hard = session("small", requests=3, context=60_000, hard_share=0.8, weight=10.0)
        assert weigh(hard, "large", **doubtful).gained > 0.8 * RULE.quality_dollars
        assert weigh(hard, "large", **doubtful).leave

    def test_quality_without_a_price_is_not_bought(self) -> None:
        free = RULE.model_copy(update={"quality_dollars": 0.0})
        assert not weigh(session("small"), "large", gain=0.99, rule=free).leave
        assert not weigh(session("small"), "large", gain=None).leave

    def test_an_easy_looking_request_of_a_hard_session_stays(self) -> None:
        hard = weigh(session("large", hard_share=0.85, weight=12.0), "small", gain=-0.25)
        assert not hard.leave
        assert hard.gained < -0.25 * RULE.quality_dollars
        easy = weigh(session("large", hard_share=0.1, weight=12.0), "small", gain=-0.25)
        assert easy.leave
        assert easy.gained == 0

    def test_a_candidate_that_is_better_and_cheaper_is_credited(self) -> None:
        assert weigh(session("large"), "small", gain=0.1).gained == pytest.approx(0.1 * RULE.quality_dollars)

    def test_equal_prices_leave_nothing_to_save(self) -> None:
        same = {"incumbent_prices": SMALL, "candidate_prices": SMALL}
        found = weigh(session("large"), "small", gain=0.0, **same)
        assert not found.leave
        assert found.leaving == pytest.approx(40_000 * (1.25 - 0.1) / 1e6)

    def test_free_targets(self) -> None:
        nothing = Prices(input=0, output=0)
        found = weigh(session("large"), "small", incumbent_prices=nothing, candidate_prices=nothing)
        assert not found.leave
        assert found.leaving == 0

    @pytest.mark.parametrize("gain", [-1.0, 0.0, 1.0])
    @pytest.mark.parametrize("candidate", ["small", "large"])
    def test_numbers_stay_numbers(self, gain: float, candidate: str) -> None:
        incumbent = "small" if candidate == "large" else "large"
        known = session(incumbent, hard_share=1.0 if gain < 0 else 0.0, requests=1, output=0)
        found = weigh(known, candidate, gain=gain)
        assert all(math.isfinite(x) for x in (found.leaving, found.saving, found.gained, found.remaining))

    def test_says_what_it_weighed(self) -> None:
        text = weigh(session("large"), "small", gain=-0.05).explained()
        assert text.startswith("the session leaves its target: leaving costs $")
        assert "requests still expected" in text
        assert "nothing is lost" in Weighing(True, "cold").explained()


def test_the_rule_refuses_what_it_cannot_mean() -> None:
    for wrong in ({"idle_seconds": 0}, {"usual_gain": 1.0}, {"quality_dollars": math.inf}, {"hurry": 1}):
        with pytest.raises(ValidationError):
            SessionRule(**wrong)
