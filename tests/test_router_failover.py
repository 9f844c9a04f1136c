"""Failover by itself, with time and providers that are played."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from router.dispatch import Destination, destination, scrubber
from router.errors import RequestError, UpstreamError
from router.failover import Attempt, Failover, Sent, outcome_of
from router.metrics import Metrics
from router.policy import Target

DOWN = UpstreamError("down", status=503)
LATE = UpstreamError("late", status=504, code="upstream_timeout")
BAD = UpstreamError("bad", status=400)
TOO_LONG = UpstreamError("This model's maximum context length is 8 tokens.", status=400)
REFUSED_KEY = UpstreamError("Incorrect API key", status=401)


def limited(retry_after: str | None = None) -> UpstreamError:
    return UpstreamError("slow down", status=429, retry_after=retry_after)


class Played:
    """A clock that only waiting moves, and targets that answer as they are told to: a text, or an error."""

    def __init__(self, **targets: dict[str, Any]) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.calls: list[str] = []
        self.replies: dict[str, deque[Any]] = {name: deque() for name in targets}
        self.targets = {
            name: Target.model_validate({"model": f"openai/{name}", **fields})
            for name, fields in targets.items()
        }
        self.environment: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.metrics = Metrics()
        self.failover = Failover(
            self.metrics,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            sleep=self.sleep,
            uniform=lambda low, high: high,
        )

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def destination(self, name: str) -> Destination:
        target = self.targets[name]
        return destination(name, target, self.environment, scrubber([], {}), self.headers)

    async def call(self, to: Destination) -> str:
        self.calls.append(to.name)
        reply = self.replies[to.name].popleft() if self.replies[to.name] else f"answer of {to.name}"
        if isinstance(reply, Exception):
            raise reply
        return str(reply)

    async def send(self, *names: str) -> Sent[str]:
        self.attempts: list[Attempt] = []
        self.calls.clear()
        return await self.failover.send(names, self.destination, self.call, self.attempts)

    def answered(self, *names: str) -> str:
        """One request, from beginning to end; the target that answered, or the error's status."""

        async def once() -> str:
            try:
                sent = await self.send(*names)
            except UpstreamError as error:
                self.error = error
                return str(error.status)
            sent.stay.end()
            return sent.to.name

        return asyncio.run(once())

    def counted(self, name: str) -> float:
        lines = self.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def outcomes(attempts: Iterable[Attempt]) -> list[tuple[str, str | None]]:
    return [(attempt.target, attempt.outcome) for attempt in attempts]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DOWN, "failed"),
        (UpstreamError("", status=529), "failed"),
        (UpstreamError("", status=408), "failed"),
        (LATE, "late"),
        (limited(), "rate_limited"),
        (UpstreamError("", status=429, code="insufficient_quota"), "key_refused"),
        (REFUSED_KEY, "key_refused"),
        (UpstreamError("", status=403), "key_refused"),
        (UpstreamError("", status=402), "key_refused"),
        (BAD, "refused"),
        (UpstreamError("no such model", status=404), "refused"),
        (UpstreamError("", status=413), "refused"),
        (UpstreamError("", status=422), "refused"),
        (TOO_LONG, "too_long"),
        (UpstreamError("", status=400, code="context_length_exceeded"), "too_long"),
        (UpstreamError("prompt is too long: 205000 tokens > 200000 maximum", status=400), "too_long"),
        (UpstreamError("The input token count (9) exceeds the maximum of 8", status=400), "too_long"),
        (UpstreamError("max_tokens is too large", status=400), "refused"),
    ],
)
def test_what_an_error_means(error: UpstreamError, outcome: str) -> None:
    assert outcome_of(error) == outcome


def test_nothing_is_retried_unless_the_policy_says_so() -> None:
    played = Played(a={})
    played.replies["a"].append(DOWN)
    assert played.answered("a") == "503"
    assert outcomes(played.attempts) == [("a", "failed")]
    assert str(played.error) == "down"


def test_retries_wait_longer_each_time_and_give_up() -> None:
    played = Played(a={"retries": 6})
    played.replies["a"].extend([DOWN] * 6)
    assert played.answered("a") == "a"
    assert played.waits == [0.25, 0.5, 1, 2, 4, 4]
    assert len(played.attempts) == 7
    played.replies["a"].extend([DOWN] * 9)
    assert played.answered("a") == "503"
    assert len(played.attempts) == 7


def test_the_wait_has_chance_in_it() -> None:
    failover = Failover(Metrics())
    waits = {failover._wait(DOWN, 3) for _ in range(20)}
    assert len(waits) > 10
    assert all(wait is not None and 1 <= wait <= 2 for wait in waits)


@pytest.mark.parametrize(
    "error", [BAD, LATE, REFUSED_KEY, TOO_LONG, limited("3"), limited("Sun, 06 Nov 2094 08:49:37 GMT")]
)
def test_what_is_not_retried(error: UpstreamError) -> None:
    played = Played(a={"retries": 3})
    played.replies["a"].append(error)
    assert played.answered("a") == str(error.status)
    assert (played.calls, played.waits) == (["a"], [])


@pytest.mark.parametrize(
    ("retry_after", "wait"), [("1.5", 1.5), ("0", 0), ("-3", 0), ("soon", 0.25), ("nan", 0.25)]
)
def test_a_short_retry_after_is_waited_for(retry_after: str, wait: float) -> None:
    played = Played(a={"retries": 1})
    played.replies["a"].append(limited(retry_after))
    assert played.answered("a") == "a"
    assert played.waits == [wait]


def test_retries_stay_within_the_timeout_of_the_target() -> None:
    played = Played(a={"retries": 9, "timeout": 2})
    played.replies["a"].extend([DOWN] * 9)
    assert played.answered("a") == "503"
    assert played.waits == [0.25, 0.5, 1]  # .25 s are left, and 2 would come next


def test_a_provider_that_hangs_is_late_for_its_retries_too() -> None:
    played = Played(a={"timeout": 0.05, "retries": 5}, b={})

    async def hang(to: Destination) -> str:
        if to.name == "a":
            await asyncio.Event().wait()
        return to.name

    async def once() -> Sent[str]:
        return await played.failover.send(["a", "b"], played.destination, hang, attempts)

    attempts: list[Attempt] = []
    sent = asyncio.run(once())
    assert sent.answer == "b"
    assert outcomes(attempts) == [("a", "late"), ("b", None)]  # b's answer is not complete yet


def test_fallbacks_are_tried_in_their_order_once_each() -> None:
    played = Played(a={}, b={"retries": 1}, c={})
    played.replies["a"].append(DOWN)
    played.replies["b"].extend([limited(), LATE])
    assert played.answered("a", "b", "c") == "c"
    assert played.calls == ["a", "b", "b", "c"]
    assert outcomes(played.attempts) == [("a", "failed"), ("b", "rate_limited"), ("b", "late"), ("c", "ok")]
    assert played.counted('router_attempts_total{outcome="late",target="b"}') == 1


def test_where_nobody_answers_the_first_error_is_told_with_the_statuses_of_the_others() -> None:
    played = Played(a={}, b={}, c={"api_key_env": "NOT_SET"})
    played.replies["a"].append(limited("9"))
    played.replies["b"].append(DOWN)
    assert played.answered("a", "b", "c") == "429"
    assert str(played.error) == "slow down (Its fallbacks gave no answer either; b: 503, c: 401.)"
    assert played.error.retry_after == "9"
    assert played.calls == ["a", "b"]
    assert played.counted('router_attempts_total{outcome="no_key",target="c"}') == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_the_request_s_own_fault_goes_nowhere_else(status: int) -> None:
    played = Played(a={"retries": 2}, b={})
    played.replies["a"].append(UpstreamError("your fault", status=status))
    assert played.answered("a", "b") == str(status)
    assert played.calls == ["a"]


def test_a_prompt_too_long_goes_only_where_the_window_is_larger() -> None:
    played = Played(
        a={"context_window": 100},
        b={"context_window": 100},
        c={},
        d={"context_window": 200},
        e={"context_window": 300},
    )
    for name in "ad":
        played.replies[name].append(TOO_LONG)
    assert played.answered("a", "b", "c", "d", "e") == "e"
    assert played.calls == ["a", "d", "e"]
    unknown = Played(a={}, b={"context_window": 10**6})
    unknown.replies["a"].append(TOO_LONG)
    assert unknown.answered("a", "b") == "400"


def test_a_refused_key_falls_back_and_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    played = Played(a={"api_key_env": "KEY_OF_A"}, b={})
    played.environment["KEY_OF_A"] = "sk-value-of-the-key"
    played.replies["a"].append(REFUSED_KEY)
    assert played.answered("a", "b") == "b"
    assert "target a: the provider refused the key in KEY_OF_A (401)" in caplog.text
    assert "sk-value" not in caplog.text
    assert played.counted('router_attempts_total{outcome="key_refused",target="a"}') == 1


def test_a_request_that_the_first_target_cannot_take_is_told_so() -> None:
    played = Played(a={}, b={})
    played.replies["a"].append(RequestError("'x' has no translation", param="x"))
    with pytest.raises(RequestError, match="no translation"):
        played.answered("a", "b")
    assert played.calls == ["a"]
    # A fallback that cannot take it is no answer, but not what the client asked for either.
    played.replies["a"].append(DOWN)
    played.replies["b"].append(RequestError("'x' has no translation", param="x"))
    assert played.answered("a", "b") == "503"
    assert "b: 400" in str(played.error)


def failures(played: Played, *errors: UpstreamError, seconds: float = 0) -> None:
    for error in errors:
        played.now += seconds
        played.replies["a"].append(error)
        assert played.answered("a", "b") in ("b", str(error.status))


COOLDOWN = {"cooldown": {"failures": 3, "seconds": 10}}


def test_a_target_that_fails_in_a_row_is_passed_over_then_probed_by_one() -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, DOWN, LATE)
    assert played.answered("a", "b") == "a"  # a good answer ends the row
    failures(played, DOWN, DOWN)
    assert played.failover.cooling(played.targets.items()) == {}
    failures(played, DOWN)
    assert played.failover.cooling(played.targets.items()) == {"a": 10}
    assert played.counted('router_cooldowns_total{target="a"}') == 1
    played.now += 9.9
    assert played.answered("a", "b") == "b"
    assert played.calls == ["b"]
    played.now += 0.2

    async def two_at_once() -> list[str]:
        probing, done = asyncio.Event(), asyncio.Event()

        async def slow(to: Destination) -> str:
            probing.set()
            await done.wait()
            return to.name

        probe = asyncio.create_task(played.failover.send(["a", "b"], played.destination, slow, []))
        await probing.wait()
        other = await played.send("a", "b")
        done.set()
        return [(await probe).to.name, other.to.name]

    assert asyncio.run(two_at_once()) == ["a", "b"]
    assert played.answered("a", "b") == "a"


def test_a_probe_that_fails_cools_the_target_again_at_once() -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, DOWN, DOWN, DOWN)
    played.now += 11
    failures(played, DOWN)
    assert played.failover.cooling(played.targets.items()) == {"a": 10}
    played.now += 11
    assert played.answered("a", "b") == "a"
    failures(played, DOWN, DOWN)
    assert played.answered("a", "b") == "a"


def test_failures_far_apart_are_no_row() -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, DOWN, DOWN, DOWN, DOWN, seconds=10.1)
    assert played.failover.cooling(played.targets.items()) == {}


def test_what_is_the_request_s_fault_ends_the_row() -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, DOWN, DOWN, BAD, DOWN, DOWN)
    assert played.failover.cooling(played.targets.items()) == {}


@pytest.mark.parametrize(("retry_after", "seconds"), [("7", 7), ("86400", 300), ("0", None)])
def test_retry_after_cools_at_once_and_is_believed_up_to_five_minutes(
    retry_after: str, seconds: float | None
) -> None:
    played = Played(a={}, b={})
    failures(played, limited(retry_after))
    assert played.failover.cooling(played.targets.items()) == ({"a": seconds} if seconds else {})


def test_an_answer_to_what_was_asked_before_does_not_end_a_cooldown() -> None:
    played = Played(a={}, b={})

    async def both() -> None:
        early = await played.send("a", "b")
        played.now += 1
        played.replies["a"].append(limited("60"))
        (await played.send("a", "b")).stay.end()
        early.stay.end()

    asyncio.run(both())
    assert played.failover.cooling(played.targets.items()) == {"a": 60}


def test_without_a_cooldown_nothing_is_passed_over() -> None:
    played = Played(a={"cooldown": None}, b={})
    failures(played, *[DOWN] * 9, limited("60"))
    assert played.answered("a", "b") == "a"


@pytest.mark.parametrize("unfit", [RequestError("cannot take it"), BAD], ids=["nothing sent", "refused"])
def test_a_fallback_that_cannot_take_the_request_does_not_hide_a_cooling_target(unfit: Exception) -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, limited("60"))
    played.replies["b"].append(unfit)
    assert played.answered("a", "b") == "a"
    assert played.calls == ["b", "a"]


def test_a_cooling_target_is_tried_last_and_alone_as_ever() -> None:
    played = Played(a={**COOLDOWN, "retries": 1}, b={})
    failures(played, limited("60"))
    played.replies["b"].append(DOWN)
    assert played.answered("a", "b") == "a"
    assert played.calls == ["b", "a"]
    failures(played, limited("60"))
    assert played.answered("a") == "a"


def test_a_stream_that_breaks_off_counts_as_a_failure() -> None:
    played = Played(a={"cooldown": {"failures": 2, "seconds": 10}}, b={})

    async def breaks_off() -> None:
        sent = await played.send("a", "b")
        sent.stay.end(DOWN)
        sent.stay.end()  # has ended: says nothing more

    asyncio.run(breaks_off())
    asyncio.run(breaks_off())
    assert outcomes(played.attempts) == [("a", "broke_off")]
    assert played.failover.cooling(played.targets.items()) == {"a": 10}


def test_what_is_known_outlives_the_policy_and_goes_by_place() -> None:
    played = Played(a=COOLDOWN, b={})
    failures(played, limited("60"))
    again = {
        "renamed": played.targets["a"],
        "elsewhere": played.targets["a"].model_copy(update={"api_base": "http://x"}),
    }
    assert played.failover.cooling(again.items()) == {"renamed": 60}


def test_a_client_s_own_key_says_nothing_of_the_others() -> None:
    played = Played(a={"api_key_header": "x-own-key", "api_key_env": "OURS", **COOLDOWN}, b={})
    played.environment["OURS"] = "sk-ours"
    played.headers = {"x-own-key": "sk-theirs"}
    for error in (REFUSED_KEY, limited("60"), UpstreamError("", status=403)):
        played.replies["a"].append(error)
        played.answered("a", "b")
    assert (
        played.failover.cooling({"a": played.targets["a"].model_copy(update={"api_key_env": None})}.items())
        == {}
    )
    assert played.failover.cooling(played.targets.items()) == {}


def test_a_client_s_own_key_that_is_refused_does_not_fall_back_to_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    played = Played(a={"api_key_header": "x-own-key"}, b={"api_key_header": "x-other-key"}, c={})
    played.headers = {"x-own-key": "sk-theirs"}
    played.replies["a"].append(REFUSED_KEY)
    assert played.answered("a", "c") == "401"
    assert caplog.text == ""
    played.replies["a"].append(DOWN)
    assert played.answered("a", "b", "c") == "c"  # b wants a key that did not come
    played.headers = {}
    with pytest.raises(RequestError, match="in the header x-own-key"):
        played.answered("a", "c")


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_no_more_requests_at_a_time_than_the_policy_says() -> None:
    played = Played(a={"max_concurrency": 2, "queue_seconds": 5}, b={})

    async def work() -> None:
        first, second = await played.send("a"), await played.send("a")
        third = asyncio.create_task(played.send("a"))
        await asyncio.sleep(0.01)
        assert not third.done()
        first.stay.end()
        assert (await third).to.name == "a"
        waiting = asyncio.create_task(played.send("a"))
        await asyncio.sleep(0.01)
        waiting.cancel()  # the client leaves while it waits
        await asyncio.wait([waiting])
        second.stay.end()
        fifth = await asyncio.wait_for(played.send("a"), 1)
        fifth.stay.end()

    run(work)


def test_a_full_target_is_left_for_a_fallback_and_without_one_is_503() -> None:
    played = Played(a={"max_concurrency": 1, "queue_seconds": 0.02}, b={})

    async def work() -> None:
        await played.send("a", "b")
        assert (await played.send("a", "b")).to.name == "b"
        with pytest.raises(UpstreamError, match="as many requests as it may have") as caught:
            await played.send("a")
        assert (caught.value.status, caught.value.code) == (503, "target_busy")
        assert caught.value.retry_after == "1"

    run(work)
    assert played.counted('router_attempts_total{outcome="busy",target="a"}') == 2
    assert played.failover.cooling(played.targets.items()) == {}  # being full is no failure of the provider


def test_no_time_to_queue_means_none() -> None:
    played = Played(a={"max_concurrency": 1, "queue_seconds": 0})

    async def work() -> None:
        for _ in range(3):
            (await played.send("a")).stay.end()
        await played.send("a")
        with pytest.raises(UpstreamError, match="as many"):
            await played.send("a")

    run(work)


def test_a_client_that_leaves_frees_the_place_and_is_no_failure() -> None:
    played = Played(a={"max_concurrency": 1, "queue_seconds": 0, "cooldown": {"failures": 1, "seconds": 9}})

    async def work() -> None:
        async def hang(to: Destination) -> str:
            await asyncio.Event().wait()
            return ""

        sending = asyncio.create_task(played.failover.send(["a"], played.destination, hang, []))
        await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
        assert (await played.send("a")).to.name == "a"

    run(work)
    assert played.counted('router_attempts_total{outcome="gone",target="a"}') == 1
    assert played.failover.cooling(played.targets.items()) == {}


def test_a_client_that_leaves_while_a_retry_waits_ends_the_waiting() -> None:
    played = Played(a={"retries": 5})
    played.replies["a"].extend([DOWN] * 6)
    played.failover._sleep = asyncio.sleep

    async def work() -> None:
        sending = asyncio.create_task(played.send("a"))
        await asyncio.sleep(0.05)
        sending.cancel()
        await asyncio.wait([sending])

    run(work)
    assert played.calls == ["a"]


def test_a_bug_frees_the_place() -> None:
    played = Played(a={"max_concurrency": 1, "queue_seconds": 0})

    async def work() -> None:
        played.replies["a"].append(KeyError("bug"))
        with pytest.raises(KeyError):
            await played.send("a")
        assert (await played.send("a")).to.name == "a"

    run(work)


def test_waiting_for_a_place_is_not_the_target_s_time() -> None:
    played = Played(a={"max_concurrency": 1, "timeout": 2, "queue_seconds": 60, "cooldown": {"failures": 1}})

    async def both() -> list[str]:
        first = await played.send("a")
        second = asyncio.create_task(
            played.failover.send(["a"], played.destination, slow_call, list[Attempt]())
        )
        await asyncio.sleep(0)
        played.now += 30  # the first takes its time
        first.stay.end()
        answered = await second
        answered.stay.end()
        return [first.answer, answered.answer]

    async def slow_call(to: Destination) -> str:
        await asyncio.sleep(0.01)
        return "the second"

    assert asyncio.run(both()) == ["answer of a", "the second"]
    assert played.failover.cooling(played.targets.items()) == {}
    assert played.counted('router_attempts_total{outcome="late"') == 0


def test_a_wait_for_a_place_leaves_the_retries_their_time() -> None:
    played = Played(a={"max_concurrency": 1, "timeout": 2, "queue_seconds": 60, "retries": 1})
    played.replies["a"].extend(["the first", DOWN, "the second"])

    async def both() -> str:
        first = await played.send("a")
        second = asyncio.create_task(played.send("a"))
        await asyncio.sleep(0)
        played.now += 30
        first.stay.end()
        answered = await second
        answered.stay.end()
        return answered.answer

    assert asyncio.run(both()) == "the second"
    assert played.waits == [0.25]
