"""One server's share in the budgets: what it may still spend, what it holds for requests under way, what they cost.

A request holds the most that it may cost before it is sent, and settles with what it did cost. One thread speaks to the store:
what comes while it is at it goes together in the next step, so that many requests at a time are no more work than a few.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from router.backoff import backoff
from router.budgets import SECOND, Count, Limit, Pace, Pacing
from router.entry import now
from router.errors import BudgetError
from router.pacing import Sample, Samples, Traffic, paced

if TYPE_CHECKING:
    from router.budget_store import Share, Store, Totals, Turn, Wanted

logger = logging.getLogger("router")

# How often the lease of what is held is renewed: several times before it is over.
_BEAT_SECONDS = 15.0
# What was spent waits so long for a request that wants to hold something: one step for both.
_WAIT_SECONDS = 0.03
# How often the thresholds are looked at again, and so much of the ledger's traffic with them.
_PACE_SECONDS = 5.0
_HISTORY = 15 * 86_400 * SECOND
# A request waits for the store no longer than this.
_PATIENCE_SECONDS = 2.5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
# What is known of a count is kept for so long after its period; a clock may go back.
_KEPT = 3 * 86_400 * SECOND
# Requests in one step at most.
_STEP_REQUESTS = 500


class Past(Protocol):
    """What was spent before anybody counted; the ledger knows."""

    def spent(self, count: Count) -> tuple[int, int]:
        """Nano-dollars and requests of a count; raises :class:`BudgetError` where it cannot be said."""

    def hours(self, count: Count, since: int) -> dict[int, int]:
        """Requests by the hour since 1970, of what is counted, whatever the period, from a time on."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Hold:
    """What one request holds of some counts, in nano-dollars; :meth:`Purse.settle` ends it."""

    limits: tuple[Limit, ...]
    amount: int = 0
    held: bool = False
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Full:
    """A count that has no room for a request.

    Attributes
    ----------
    count : Count
    spent : bool
        Whether it is used up; else requests under way hold what is left, and some of it may come back.
    """

    count: Count
    spent: bool


@dataclass(frozen=True, slots=True)
class PurseStats:
    """How it stands with the store.

    Attributes
    ----------
    away : bool
        It did not answer last time.
    failures : int
    """

    away: bool = False
    failures: int = 0


@dataclass(slots=True)
class _Mine:
    """What this process adds to a count; ``written`` and ``told`` are what the store has of the last two."""

    holder: str = field(default_factory=lambda: secrets.token_hex(8))
    spent: int = 0
    requests: int = 0
    reserved: int = 0
    threshold: float | None = None
    known_spent: int = 0
    known_requests: int = 0
    written: int = 0
    told: float | None = None

    @property
    def state(self) -> tuple[int, int, int, float | None]:
        return self.spent, self.requests, self.reserved, self.threshold


@dataclass(slots=True)
class _Stream:
    """The requests that one budget is for, over all its periods; ``period`` is the one whose requests are counted."""

    traffic: Traffic
    period: int
    samples: Samples = field(default_factory=Samples)


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that waits for its hold; ``full`` is None until the store has answered."""

    hold: Hold
    amount: int
    force: bool
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    full: tuple[Full, ...] | None = None
    given_up: bool = False


class Purse:
    """What one process may spend. :meth:`open` it, and close it: it gives back what it holds.

    Parameters
    ----------
    store : Store
    past : Past or None
        What a count begins with.
    clock : callable, optional
        Microseconds since 1970.
    """

    def __init__(self, store: Store, past: Past | None = None, *, clock: Callable[[], int] = now) -> None:
        self.store = store
        self._past = past
        self._clock = clock
        self._queue: list[_Asked] = []
        self._mine: dict[Count, _Mine] = {}
        self._dirty: set[Count] = set()
        self._known: dict[Count, Totals] = {}
        self._begun: set[Count] = set()
        self._amounts: dict[Count, int] = {}
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._pace_at = 0.0
        self.pacing: Pacing | None = None  # the policy's; None is none
        self._changed = threading.Condition()
        self._closing = False
        self._stats = PurseStats()
        self._pauses = 0
        self._try_again = 0.0
        self._beat_at = time.monotonic() + _BEAT_SECONDS
        self._dirty_since = 0.0
        self._thread: threading.Thread | None = None

    def open(self) -> Purse:
        """Connect; raises :class:`BudgetError` where that cannot be done."""
        self.store.open()
        self.start()
        return self

    def start(self) -> None:
        """Begin to work, whether the store can be reached or not; again is nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="purse", daemon=True)
            self._thread.start()

    @property
    def stats(self) -> PurseStats:
        """How it stands with the store."""
        return self._stats

    def full(self, limits: Sequence[Limit]) -> Full | None:
        """The count that is used up, as far as is known here."""
        with self._changed:
            return _longest(
                Full(limit.count, True)
                for limit in limits
                if (known := self._known.get(limit.count)) is not None and known.spent >= limit.amount
            )

    async def hold(self, hold: Hold, amount: int, *, force: bool = False, alone: bool = True) -> Full | None:
        """Hold so much more for a request, in each of its counts or in none.

        Parameters
        ----------
        hold : Hold
            Of the request.
        amount : int
            Nano-dollars.
        force : bool
            Whether there is room or not; it is counted all the same.
        alone : bool
            Whether to go by what this process knows while the store does not answer.

        Returns
        -------
        Full or None
            What has no room, of several the one that lasts longest; then nothing is held.

        Raises
        ------
        BudgetError
            The store does not answer.
        """
        if not hold.limits:
            return None
        loop = asyncio.get_running_loop()
        asked = _Asked(hold, amount, force, loop, loop.create_future())
        with self._changed:
            waits = not (self._stats.away or self._closing)
            if waits:
                self._queue.append(asked)
                self._changed.notify()
        if waits:
            try:
                await asyncio.wait_for(asked.done, _PATIENCE_SECONDS)
            except TimeoutError:
                pass
            finally:
                with self._changed:
                    asked.given_up = asked.full is None
        if asked.full is not None:
            return _longest(asked.full)
        if not alone:
            raise BudgetError(f"the budget store at {self.store.shown} does not answer")
        with self._changed:
            full = () if force else tuple(self._full_alone(hold, amount))
            if not full:
                self._hold(hold, amount)
            return _longest(full)

    def pace(self, limits: Sequence[Limit]) -> Pace | None:
        """The threshold that a request of these limits is under; of several the highest."""
        if self.pacing is None:
            return None
        with self._changed:
            found = [
                (mine.threshold, limit.count)
                for limit in limits
                if (mine := self._mine.get(limit.count)) is not None and mine.threshold is not None
            ]
        if not found:
            return None
        threshold, count = max(found)
        return Pace(threshold, f"{count.words} has to last: threshold {threshold:.4g}")

    def settle(self, hold: Hold, cost: int, sample: Sample | None = None) -> None:
        """A request is over: what it held is free, what it cost is spent; again is nothing. From any thread.

        ``sample`` says what it would have cost at other thresholds.
        """
        with self._changed:
            if hold.settled:
                return
            hold.settled = True
            if not hold.held:
                return
            if not self._dirty:
                self._dirty_since = time.monotonic()
            for limit in hold.limits:
                mine = self._mine_of(limit.count)
                mine.reserved -= hold.amount
                mine.spent += cost
                mine.requests += 1
                self._dirty.add(limit.count)
            if sample is not None:
                for scope in {(limit.count.scope, limit.count.name) for limit in hold.limits}:
                    if (stream := self._streams.get(scope)) is not None:
                        stream.samples.rows.append(sample)
            self._changed.notify()

    def totals(self) -> dict[Count, Totals]:
        """What is known here of the counts that requests came for."""
        with self._changed:
            return dict(self._known)

    def close(self, timeout: float = 10.0) -> None:
        """Write what is left, give back what is held, and end the thread; blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        self.store.close()
        if self._past is not None:
            self._past.close()

    def __enter__(self) -> Purse:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _full_alone(self, hold: Hold, amount: int) -> Iterator[Full]:
        for limit in hold.limits:
            mine, known = self._mine_of(limit.count), self._known.get(limit.count)
            spent = mine.spent - mine.known_spent + (0 if known is None else known.spent)
            if spent + mine.reserved + amount > limit.amount:
                yield Full(limit.count, spent + amount > limit.amount)

    def _mine_of(self, count: Count) -> _Mine:
        return self._mine.setdefault(count, _Mine())

    def _hold(self, hold: Hold, amount: int) -> None:
        hold.held = True
        hold.amount += amount
        for limit in hold.limits:
            self._amounts[limit.count] = limit.amount
            self._mine_of(limit.count).reserved += amount
            self._dirty.add(limit.count)

    def _run(self) -> None:
        while True:
            with self._changed:
                while (patience := self._patience()) > 0:
                    self._changed.wait(patience)
                closing = self._closing
                asked, self._queue = self._queue[:_STEP_REQUESTS], self._queue[_STEP_REQUESTS:]
                if closing:
                    self._give_back()
                elif time.monotonic() >= self._beat_at:
                    self._beat()
            try:
                self._step(asked)
            except Exception as error:
                # A mistake of ours must not end the thread in silence.
                logger.error("budgets: %s", type(error).__name__)
                self._is_away()
            self._answer(asked)
            if time.monotonic() >= self._pace_at:
                self._pace_at = time.monotonic() + _PACE_SECONDS
                self._set_pace()
            if closing and not self._queue:
                return

    def _patience(self) -> float:
        """Seconds until there is something to do."""
        if self._closing:
            return 0.0
        clock = time.monotonic()
        if self._stats.away:
            return self._try_again - clock
        if self._queue:
            return 0.0
        return (self._dirty_since + _WAIT_SECONDS if self._dirty else self._beat_at) - clock

    def _beat(self) -> None:
        """Renew the leases, and forget what is long over."""
        self._beat_at = time.monotonic() + _BEAT_SECONDS
        self._dirty.update(count for count, mine in self._mine.items() if mine.reserved)
        old = self._clock() - _KEPT
        for count in [count for count in self._known if count.end < old and count not in self._dirty]:
            self._known.pop(count)
            self._mine.pop(count, None)
            self._amounts.pop(count, None)
            self._begun.discard(count)

    def _give_back(self) -> None:
        for count, mine in self._mine.items():
            if mine.reserved:
                mine.reserved = 0
                self._dirty.add(count)

    def _step(self, asked: Sequence[_Asked]) -> None:
        """One step of the store, for all that is new."""
        from router.budget_store import Share, Wanted

        with self._changed:
            waiting = [one for one in asked if not one.given_up]
            counts = self._dirty | {limit.count for one in waiting for limit in one.hold.limits}
            shares = [
                Share(
                    count,
                    mine.holder,
                    mine.spent,
                    mine.requests,
                    mine.known_spent,
                    mine.known_requests,
                    mine.reserved,
                    mine.threshold,
                    count in self._known,
                )
                for count in sorted(counts)
                for mine in (self._mine_of(count),)
            ]
        wanted = [Wanted(one.hold.limits, one.amount, one.force) for one in waiting]
        try:
            if not shares:
                if self._stats.away:
                    self.store.open()
                    self._is_back()
                return
            turn = self._turn(shares, wanted)
        except BudgetError as error:
            self._is_away(error)
            return
        self._is_back()
        with self._changed:
            for share in shares:
                mine = self._mine[share.count]
                mine.known_spent, mine.known_requests = share.spent, share.requests
                mine.written, mine.told = share.reserved, share.threshold
            self._count_traffic(turn.totals)
            self._known.update(turn.totals)
            for one, refused in zip(waiting, turn.refused, strict=True):
                for limit in one.hold.limits if not refused else ():
                    self._mine[limit.count].written += one.amount
                if one.given_up:
                    continue
                by_count = {limit.count: limit.amount for limit in one.hold.limits}
                one.full = tuple(
                    Full(count, turn.totals[count].spent + one.amount > by_count[count]) for count in refused
                )
                if not refused:
                    self._hold(one.hold, one.amount)
            self._dirty = {
                count
                for count in self._dirty | counts
                if (mine := self._mine[count]).state
                != (mine.known_spent, mine.known_requests, mine.written, mine.told)
            }

    def _count_traffic(self, totals: Mapping[Count, Totals]) -> None:
        for count, total in totals.items():
            stream, before = self._streams.get((count.scope, count.name)), self._known.get(count)
            if stream is not None and stream.period == len(count.period):
                # What others have counted since, too.
                more = total.requests - (total.requests if before is None else before.requests)
                stream.traffic.saw(self._clock(), max(more, 0))
            mine = self._mine[count]
            if before is None and mine.threshold is None and self.pacing is not None:
                mine.threshold = total.threshold  # that a server which ran before had come to

    def _set_pace(self) -> None:
        """Look again at the thresholds; where they change, the store is told."""
        now = self._clock()
        rule = self.pacing
        if rule is None:
            return
        with self._changed:
            work = [
                (count, amount, self._known[count], self._streams[count.scope, count.name])
                for count, amount in self._amounts.items()
                if count in self._known and (count.scope, count.name) in self._streams and count.end > now
            ]
        for count, amount, known, stream in work:
            threshold = paced(
                self._mine[count].threshold,
                stream.samples,
                stream.traffic,
                now=now,
                end=count.end,
                amount=amount,
                spent=known.spent,
                reserved=known.reserved,
                rule=rule,
            )
            mine = self._mine[count]
            if threshold == mine.threshold:
                continue
            if threshold is None or mine.threshold is None:
                logger.info("%s: %s", count.words, "paced" if threshold is not None else "not paced any more")
            with self._changed:
                mine.threshold = threshold
                self._dirty.add(count)

    def _turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
        """A step of the store, whose counts begin where they are new; once more where the connection was stale."""
        from router.budget_store import Missing

        for last in (self._stats.away, True):
            try:
                self._begin([share.count for share in shares if share.count not in self._begun])
                try:
                    return self.store.turn(shares, wanted)
                except Missing as missing:
                    self._begin(missing.counts)
                    return self.store.turn(shares, wanted)
            except BudgetError:
                if last:
                    raise
        raise AssertionError("unreachable")

    def _begin(self, counts: Sequence[Count]) -> None:
        from router.budget_store import Totals

        if not counts:
            return
        bases = {}
        for count in counts:
            spent, requests = (0, 0) if self._past is None else self._past.spent(count)
            bases[count] = Totals(spent, requests=requests)
            if (count.scope, count.name) not in self._streams:
                since = self._clock() - _HISTORY
                hours = {} if self._past is None else self._past.hours(count, since)
                with self._changed:
                    self._streams[count.scope, count.name] = _Stream(Traffic(hours), len(count.period))
        self.store.begin(bases)
        self._begun.update(counts)

    def _answer(self, asked: Sequence[_Asked]) -> None:
        def resolve(done: asyncio.Future[None]) -> None:
            if not done.done():
                done.set_result(None)

        for one in asked:
            with suppress(RuntimeError):  # the loop was closed; nobody waits any more
                one.loop.call_soon_threadsafe(resolve, one.done)

    def _is_away(self, error: BudgetError | None = None) -> None:
        self._pauses += 1
        self._try_again = time.monotonic() + backoff(self._pauses, _FIRST_PAUSE, _LONGEST_PAUSE)
        with self._changed:
            if not self._stats.away and error is not None:
                logger.error("%s", error)
            self._stats = PurseStats(True, self._stats.failures + 1)

    def _is_back(self) -> None:
        self._pauses = 0
        with self._changed:
            if self._stats.away:
                logger.info("the budget store at %s answers again", self.store.shown)
                self._stats = PurseStats(False, self._stats.failures)


def _longest(full: Iterable[Full]) -> Full | None:
    """Of several full counts the one whose period is over last."""
    return max(full, key=lambda one: one.count.end, default=None)
