from __future__ import annotations

import hashlib
import statistics
from itertools import pairwise

import pytest
from study_sessions import PAIRS, STRONG, WEAK, bill, measure, per_request, sticky

from router.sessions import SessionRule
from router.traffic import FAMILIES, Step, Trace, generate, traces

LONG = ("edit_loop", "debug_bursts", "summarised", "sparse_hard", "mostly_hard")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_trace(family: str) -> None:
    assert generate(family, 7) == generate(family, 7)
    assert generate(family, 7) != generate(family, 8)
    assert [trace.seed for trace in traces(family, 3, 5)] == [5, 6, 7]


def test_traces_are_what_they_were() -> None:
    """The families are fixed: whoever changes a number here changes what every figure was measured on."""
    text = "".join(
        f"{step.context} {step.output} {step.needs_strong} {step.gain:.6f}\n"
        for family in FAMILIES
        for step in generate(family, 0).steps
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c937da90d74cdc49"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_a_session(family: str) -> None:
    for trace in traces(family, 20):
        last: dict[int, Step] = {}
        for step in trace.steps:
            before = last.get(step.thread)
            assert step.context - step.new == (before.context if before else 0)
            assert step.new >= (before.output if before else 0)
            assert step.output > 0
            assert 0 < step.gain < 1
            assert (step.mode == "internal") == (step.feature is not None)
            last[step.thread] = step
        times = [step.seconds for step in trace.steps]
        assert times == sorted(times)
        assert trace.steps[0].tool == "none"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "short"])
def test_sessions_have_twelve_requests_and_more(family: str) -> None:
    assert all(len(trace.steps) >= 12 for trace in traces(family, 30))


def test_contexts_grow_to_a_hundred_thousand_tokens() -> None:
    largest = [max(step.context for step in trace.steps) for name in LONG for trace in traces(name, 30)]
    assert max(largest) > 100_000
    assert max(largest) < 110_000
    assert statistics.median(largest) > 60_000


def test_families_are_what_they_say() -> None:
    hard = {
        name: statistics.fmean(step.needs_strong for trace in traces(name, 15) for step in trace.steps)
        for name in FAMILIES
    }
    assert hard["edit_loop"] < 0.1 < hard["random_phases"] < 0.6 < hard["mostly_hard"]
    assert [step.needs_strong for step in generate("early_hard", 0).steps].index(True) == 0
    assert not any(step.needs_strong for step in generate("late_hard", 0).steps[:20])
    turns = [step.needs_strong for step in generate("alternating", 0).steps]
    assert all(before != after for before, after in pairwise(turns))
    pauses = [
        after.seconds - before.seconds
        for trace in traces("idle_gaps", 10)
        for before, after in pairwise(trace.steps)
    ]
    assert 0.3 < sum(pause > 300 for pause in pauses) / len(pauses) < 0.5
    features = {step.feature for trace in traces("asides", 10) for step in trace.steps}
    assert features == {None, "title", "commit-message", "summary"}
    assert all(len({step.thread for step in trace.steps}) == 3 for trace in traces("summarised", 10))


def test_gains_are_calibrated_where_a_quarter_is_hard_and_dull_where_they_say() -> None:
    def mean(family: str, needs_strong: bool) -> float:
        steps = (step for trace in traces(family, 25) for step in trace.steps if step.feature is None)
        return statistics.fmean(step.gain for step in steps if step.needs_strong == needs_strong)

    sharp = 0.25 * mean("edit_loop", True) + 0.75 * mean("edit_loop", False)
    dull = 0.25 * mean("false_alarms", True) + 0.75 * mean("false_alarms", False)
    assert sharp == pytest.approx(0.25, abs=0.03)
    assert dull == pytest.approx(0.25, abs=0.03)
    assert mean("edit_loop", True) - mean("edit_loop", False) > 0.4
    assert mean("false_alarms", True) - mean("false_alarms", False) < 0.25


def step(seconds: float, context: int, new: int, *, thread: int = 0, hard: bool = False) -> Step:
    return Step(seconds, thread, "code", None, "none", context, new, 100, hard, 0.9 if hard else 0.1)


class TestBill:
    PAIR = PAIRS["writes_125"]

    def cost(self, steps: list[Step], targets: list[str]) -> float:
        return bill(Trace("", 0, tuple(steps)), self.PAIR, targets).dollars * 1e6

    def test_reads_what_is_cached_and_writes_the_rest(self) -> None:
        steps = [step(0, 1000, 1000), step(10, 1500, 500)]
        expected = 1000 * 1.25 + 100 * 5 + 1000 * 0.1 + 500 * 1.25 + 100 * 5
        assert self.cost(steps, [WEAK, WEAK]) == pytest.approx(expected)

    def test_another_target_writes_all_of_it_and_the_first_keeps_its_cache(self) -> None:
        steps = [step(0, 1000, 1000), step(10, 1500, 500), step(20, 1800, 300)]
        expected = 1000 * 1.25 + 1500 * 6.25 + (1000 * 0.1 + 800 * 1.25) + 100 * (5 + 25 + 5)
        assert self.cost(steps, [WEAK, STRONG, WEAK]) == pytest.approx(expected)

    def test_a_cache_expires_and_belongs_to_its_thread(self) -> None:
        cold = [step(0, 1000, 1000), step(301, 1000, 0)]
        aside = [step(0, 1000, 1000), step(1, 1000, 1000, thread=1)]
        twice = 2 * (1000 * 1.25 + 100 * 5)
        assert self.cost(cold, [WEAK, WEAK]) == self.cost(aside, [WEAK, WEAK]) == pytest.approx(twice)

    def test_counts_switches_and_missed_steps(self) -> None:
        steps = [step(n, 1000, 0, hard=n != 1) for n in range(4)]
        found = bill(Trace("", 0, tuple(steps)), self.PAIR, [STRONG, WEAK, STRONG, WEAK])
        assert (found.switches, found.hard, found.served) == (3, 3, 2)
        assert found.with_missed(0.5) == pytest.approx(found.dollars + 0.5)

    def test_ways_that_do_not_weigh(self) -> None:
        trace = Trace("", 0, tuple(step(n, 1000, 0, hard=n != 1) for n in range(3)))
        assert per_request(trace, self.PAIR, 0.3) == [STRONG, WEAK, STRONG]
        assert sticky(trace, self.PAIR, 0.3) == [STRONG] * 3


@pytest.mark.parametrize("pair", ["writes_125", "reads_50"])
def test_the_rule_costs_no_more_than_the_better_of_the_two(pair: str) -> None:
    """The study in small: what is measured there on 200 sessions holds on fewer within half a percent."""
    lines = measure(40, SessionRule(), pairs=[pair])
    assert [line.family for line in lines] == list(FAMILIES)
    for line in lines:
        # STUDY_SESSIONS.md says why false alarms are not held against sticky.
        bar = line.per_request if line.family == "false_alarms" else line.better()
        assert line.rule.with_missed() <= bar.with_missed() * 1.005, line.family
        assert line.rule.share >= line.per_request.share - 0.03, line.family
    gained = {line.family: line.ratio() for line in lines}
    assert gained["mostly_hard"] < 0.9
    assert gained["summarised"] < 0.97
