"""Sending a request to a target that may not answer: retries, fallbacks, cooldown, and a limit of requests at a time.

All of it happens before the first byte of an answer reaches the client; what breaks later is told in the stream.

The order is that of the policy: the target that was decided on, then its ``fallbacks``. A target that is cooling down
is passed over, and tried last: a cooldown chooses among targets, it never leaves a request without one. An error that is
the request's own fault (a 4xx) ends the journey, since another target would find the same; but not where the context was
too long and a fallback has a larger window.

What is known of a place (a model at an address, called with a key) is kept for the process, whatever the policy calls it.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from anyio import CapacityLimiter, WouldBlock

from router.backoff import backoff
from router.dispatch import Destination
from router.errors import RequestError, UpstreamError
from router.metrics import Metrics
from router.policy import Cooldown, Target
from router.upstream import Usage, late

logger = logging.getLogger("router")

T = TypeVar("T")

# Waited before the first retry, and twice as long before each further one, up to the longest.
_BACKOFF_SECONDS = 0.25
_LONGEST_BACKOFF_SECONDS = 4.0
# A provider that wants to be left alone for longer is not asked again by the same request.
_PATIENCE_SECONDS = 2.0
# A provider's Retry-After is believed up to this.
_LONGEST_COOLING_SECONDS = 300.0

# In the words of OpenAI, Anthropic, Gemini, vLLM and others, where their error has no code for it.
_TOO_LONG = re.compile(
    r"context.?length|context.?window|maximum context|prompt is too long|too many (?:input )?tokens"
    r"|input token count .{0,40}exceeds|input is too long|reduce the length of the (?:messages|prompt|input)",
    re.IGNORECASE,
)

Outcome = Literal[
    "ok",  # answered
    "failed",  # not reached, broke off before the first byte, answered 5xx or nonsense
    "late",  # no answer in time
    "rate_limited",  # 429
    "key_refused",  # 401, 402, 403, or a quota used up: the provider's word on the key
    "refused",  # another 4xx: the request's own fault
    "too_long",  # for this target's context window
    "broke_off",  # after the first byte
    "gone",  # the client left
    "busy",  # not sent: as many requests as the policy allows were there
    "no_key",  # not sent: the target's key is not set
    "unfit",  # not sent: the target cannot take a field of the body
]


@dataclass(slots=True)
class Attempt:
    """One call of a provider.

    ``usage`` is known when the answer is complete, and where the provider tells it; ``size`` is about how many tokens
    the answer has, as it came; ``estimated`` says that ``usage`` was completed by it, since the answer broke off.
    """

    target: str
    outcome: Outcome | None = None
    usage: Usage | None = None
    size: float = 0.0
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """An answer, or one that has begun; where it came from; and the stay there, which has to be ended."""

    answer: T
    to: Destination
    attempt: Attempt
    stay: Stay


class Place:
    """What is known of one model at one address with one key."""

    def __init__(self) -> None:
        self.limiter = CapacityLimiter(math.inf)
        self.cooling_until = 0.0
        self._cooled_at = -math.inf
        self._failures = 0
        self._failed_at = -math.inf
        self._probed = False

    def open(self, now: float) -> bool:
        """Whether requests may go there as usual; after a cooldown one at a time may, the probe."""
        return not self.cooling_until or (now >= self.cooling_until and not self._probed)

    def enter(self) -> bool:
        """A request goes there; gives whether it is the probe."""
        if not self.cooling_until or self._probed:
            return False
        self._probed = True
        return True

    def leave(self, probe: bool) -> None:
        if probe:
            self._probed = False

    def alive(self, since: float) -> None:
        """A request that came at ``since`` is answered; but that may still break off, so the row of failures is not over."""
        # One that was under way when the cooldown began says nothing of the time since.
        if since >= self._cooled_at:
            self.cooling_until = 0.0

    def well(self, since: float) -> None:
        """A request that came at ``since`` was answered to the end."""
        self.alive(since)
        if not self.cooling_until:
            self._failures = 0

    def failed(self, cooldown: Cooldown, now: float, retry_after: float | None) -> bool:
        """It did not answer; gives whether it cools down from now on."""
        in_a_row = now - self._failed_at <= cooldown.seconds or self.cooling_until > 0
        self._failures = self._failures + 1 if in_a_row else 1
        self._failed_at = now
        if retry_after is not None:
            seconds = min(retry_after, _LONGEST_COOLING_SECONDS)
        elif self._failures >= cooldown.failures or self.cooling_until:
            seconds = cooldown.seconds
        else:
            return False
        was_cooling = self.cooling_until > now
        self.cooling_until = max(self.cooling_until, now + seconds)
        self._cooled_at = now
        return not was_cooling


class Stay:
    """One request at one place; :meth:`end` it with how it went."""

    def __init__(self, failover: Failover, place: Place, to: Destination, attempt: Attempt) -> None:
        self._failover = failover
        self._place = place
        self._to = to
        self._attempt = attempt
        self._since = 0.0
        self._probe = False
        self._ended = False

    def entered(self, now: float) -> None:
        """Its turn has come."""
        self._since = now
        self._probe = self._place.enter()

    def begun(self) -> None:
        """The first byte came: others may go there too."""
        self._place.alive(self._since)
        self._place.leave(self._probe)
        self._probe = False

    def end(self, error: UpstreamError | None = None, *, outcome: Outcome = "ok") -> None:
        """Free the place, and remember how it went there; later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        if error is not None:
            outcome = "broke_off"
        self._attempt.outcome = outcome
        self._failover.attempted(self._to.name, outcome, self._since)
        self._place.limiter.release_on_behalf_of(self)
        if outcome in ("ok", "refused", "too_long"):
            self._place.well(self._since)
        elif error is not None:
            self._failover.failed(self._place, self._to, error)
        self._place.leave(self._probe)


class Failover:
    """What one server knows of its targets, and how it sends. Limits and cooldowns are those of one process.

    Parameters
    ----------
    metrics : Metrics
    clock, wall_clock, sleep, uniform : callable, optional
        Time and chance, for tests.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._uniform = uniform
        self._places: dict[tuple[str, str | None, str | None], Place] = {}

    def cooling(self, targets: Iterable[tuple[str, Target]]) -> dict[str, float]:
        """Of these targets, those that are cooling down, with the seconds that are left."""
        now = self._clock()
        known = ((name, self._places.get(_identity(target, target.api_key_env))) for name, target in targets)
        return {
            name: round(place.cooling_until - now, 3)
            for name, place in known
            if place is not None and place.cooling_until > now
        }

    def attempted(self, name: str, outcome: Outcome, since: float) -> None:
        """A call of a target has ended that began at ``since``."""
        self.metrics.attempted(name, outcome, self._clock() - since)

    async def send(
        self,
        names: Sequence[str],
        destination: Callable[[str], Destination],
        call: Callable[[Destination], Awaitable[T]],
        attempts: list[Attempt],
    ) -> Sent[T]:
        """Send one request to the first of some targets that answers.

        Parameters
        ----------
        names : sequence of str
            The target that was decided on, then its fallbacks.
        destination : callable
            The target with its key.
        call : callable
            Sends the request; done with the whole answer, or with the first byte of a stream.
        attempts : list of Attempt
            Every call of a provider is added to it.

        Returns
        -------
        Sent
            Its ``stay`` is to be ended when the answer is complete.

        Raises
        ------
        RequestError
            The target that was decided on cannot take the request.
        UpstreamError
            No target answered: the error of the first, and in its message the statuses of the others.
        """
        failed: list[tuple[str, UpstreamError]] = []
        window: int | None = None  # of a target that was too small
        queue = deque((name, len(names) == 1) for name in names)
        while queue:
            name, at_any_rate = queue.popleft()
            try:
                to = destination(name)
            except RequestError:
                if name == names[0]:
                    raise
                continue  # a fallback that takes a client's own key, and there is none
            except UpstreamError as error:
                self.metrics.attempted(name, "no_key")
                failed.append((name, error))
                continue
            if window is not None and (to.target.context_window or 0) <= window:
                continue
            place = self._place(to)
            if not at_any_rate and not place.open(self._clock()):
                queue.append((name, True))
                continue
            try:
                return await self._try(place, to, call, attempts, once=at_any_rate and len(names) > 1)
            except UpstreamError as error:
                failed.append((name, error))
                kind = outcome_of(error)
                if kind == "too_long" and to.target.context_window is not None:
                    window = max(window or 0, to.target.context_window)
                elif (kind in ("refused", "too_long") or (kind == "key_refused" and to.clients_key)) and all(
                    waiting != names[0] for waiting, _ in queue
                ):
                    break
            except RequestError as error:
                if name == names[0]:
                    raise
                failed.append((name, UpstreamError(str(error), status=error.status)))
        raise _told(failed)

    async def _try(
        self,
        place: Place,
        to: Destination,
        call: Callable[[Destination], Awaitable[T]],
        attempts: list[Attempt],
        *,
        once: bool,
    ) -> Sent[T]:
        """One target, with its retries; raises what :meth:`send` does."""
        target = to.target
        left = target.timeout  # seconds; while it waits for a place the provider has nothing to answer
        retries = 0 if once else target.retries
        for retry in range(retries + 1):
            attempt = Attempt(to.name)
            stay = await self._enter(place, to, attempt)
            entered = self._clock()
            # Before the call: one that is cancelled has reached the provider too.
            attempts.append(attempt)
            with _ended_if_raised(stay):
                try:
                    async with asyncio.timeout(max(left, 0)):
                        answer = await call(to)
                except TimeoutError:
                    error = late(target)
                except UpstreamError as caught:
                    error = caught
                except RequestError:  # nothing was sent
                    attempts.remove(attempt)
                    raise
                else:
                    stay.begun()
                    return Sent(answer, to, attempt, stay)
                stay.end(outcome=outcome_of(error))
                if outcome_of(error) not in ("refused", "too_long"):
                    self.failed(place, to, error)
            wait = self._wait(error, retry)
            left -= self._clock() - entered
            if retry == retries or wait is None or wait >= left:
                raise error
            left -= wait
            await self._sleep(wait)
        raise AssertionError("unreachable")

    async def _enter(self, place: Place, to: Destination, attempt: Attempt) -> Stay:
        limit = to.target.max_concurrency
        place.limiter.total_tokens = math.inf if limit is None else limit
        stay = Stay(self, place, to, attempt)
        try:
            place.limiter.acquire_on_behalf_of_nowait(stay)
        except WouldBlock:
            await self._queue(place, stay, to)
        stay.entered(self._clock())
        return stay

    async def _queue(self, place: Place, stay: Stay, to: Destination) -> None:
        try:
            async with asyncio.timeout(to.target.queue_seconds):
                await place.limiter.acquire_on_behalf_of(stay)
        except TimeoutError:
            self.metrics.attempted(to.name, "busy")
            raise UpstreamError(
                f"The target {to.name} has as many requests as it may have at a time, and none ended within "
                f"{to.target.queue_seconds:g} s.",
                status=503,
                retry_after="1",
                type="overloaded_error",
                code="target_busy",
            ) from None

    def _wait(self, error: UpstreamError, retry: int) -> float | None:
        """Seconds until the same target may be asked again; None where it should not be."""
        outcome = outcome_of(error)
        if outcome not in ("failed", "rate_limited"):
            return None
        asked = self._retry_after(error)
        if asked is not None:
            return asked if asked <= _PATIENCE_SECONDS else None
        return backoff(retry + 1, _BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS, self._uniform)

    def failed(self, place: Place, to: Destination, error: UpstreamError) -> None:
        """Remember a failure, and say so where it means something beyond this request."""
        outcome = outcome_of(error)
        if outcome == "key_refused" and not to.clients_key:
            logger.error(
                "target %s: the provider refused the key in %s (%d)",
                to.name,
                to.target.api_key_env,
                error.status,
            )
        # What a provider says of a client's own key says nothing of the others'.
        if to.target.cooldown is None or (to.clients_key and outcome in ("key_refused", "rate_limited")):
            return
        retry_after = self._retry_after(error) if error.status in (429, 503) else None
        if place.failed(to.target.cooldown, self._clock(), retry_after):
            seconds = place.cooling_until - self._clock()
            self.metrics.cooled(to.name)
            logger.warning(
                "target %s cools down for %.0f s (%s, %d)", to.name, seconds, outcome, error.status
            )

    def _retry_after(self, error: UpstreamError) -> float | None:
        """Seconds that the provider's ``Retry-After`` asks for: a number, or a date."""
        text = error.retry_after
        if text is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - self._wall_clock()
            except ValueError:
                return None
        return max(seconds, 0.0) if math.isfinite(seconds) else None

    def _place(self, to: Destination) -> Place:
        identity = _identity(to.target, None if to.clients_key else to.target.api_key_env)
        return self._places.setdefault(identity, Place())


@contextmanager
def _ended_if_raised(stay: Stay) -> Iterator[None]:
    """No stay outlasts its attempt, unless an answer began."""
    try:
        yield
    except BaseException as error:
        stay.end(outcome="gone" if isinstance(error, asyncio.CancelledError) else "unfit")
        raise


def outcome_of(error: UpstreamError) -> Outcome:
    """What an error before the first byte means."""
    if error.code in ("provider_key_missing", "target_busy"):
        return "no_key" if error.code == "provider_key_missing" else "busy"
    if error.code == "upstream_timeout":
        return "late"
    if error.status in (401, 402, 403) or error.code == "insufficient_quota":
        return "key_refused"
    if error.status == 429:
        return "rate_limited"
    if error.status >= 500 or error.status in (408, 425):
        return "failed"
    too_long = error.code == "context_length_exceeded" or _TOO_LONG.search(str(error)) is not None
    return "too_long" if error.status in (400, 413, 422) and too_long else "refused"


def _identity(target: Target, key: str | None) -> tuple[str, str | None, str | None]:
    return target.model, target.api_base, key


def _told(failed: Sequence[tuple[str, UpstreamError]]) -> UpstreamError:
    """The first error, with the statuses of the others."""
    (_, first), *others = failed
    if not others:
        return first
    statuses = ", ".join(f"{name}: {error.status}" for name, error in others)
    return UpstreamError(
        f"{first} (Its fallbacks gave no answer either; {statuses}.)",
        status=first.status,
        retry_after=first.retry_after,
        type=first.type,
        code=first.code,
        param=first.param,
    )
