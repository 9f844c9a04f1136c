"""One process's share in the budgets: holding, settling, and what happens while the store is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from router.budget_store import LedgerPast, Share, Store, Totals, Turn, Wanted, open_store
from router.budgets import Count, Limit
from router.errors import BudgetError
from router.ledger import Ledger
from router.purse import Full, Hold, Purse

MONTH, DAY = Count("workload", "", "2999-11"), Count("workload", "", "2999-11-22")


def limits(month: int, day: int = 10**9) -> tuple[Limit, ...]:
    return (Limit(MONTH, month), Limit(DAY, day))


class Breakable:
    """A store that can be taken away."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.away = False
        self.turns = 0
        self.shown = store.shown

    def _check(self) -> None:
        if self.away:
            raise BudgetError("it is away")

    def open(self) -> None:
        self._check()
        self.store.open()

    def begin(self, bases: Mapping[Count, Totals]) -> None:
        self._check()
        self.store.begin(bases)

    def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
        self._check()
        self.turns += 1
        return self.store.turn(shares, wanted)

    def read(self, time: int) -> dict[Count, Totals]:
        self._check()
        return self.store.read(time)

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def store(tmp_path: Path) -> Breakable:
    return Breakable(open_store(str(tmp_path / "budgets.sqlite3")))


@pytest.fixture
def purse(store: Breakable) -> Iterator[Purse]:
    with Purse(store) as purse:
        yield purse


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(purse: Purse, amount: int, of: tuple[Limit, ...], **more: bool) -> Hold | Full:
    """A hold of so much, or what has no room for it."""
    hold = Hold(of)
    return asyncio.run(purse.hold(hold, amount, **more)) or hold


def read(store: Breakable) -> Totals:
    return store.store.read(MONTH.start)[MONTH]


def test_a_request_holds_and_settles(purse: Purse, store: Breakable) -> None:
    hold = held(purse, 60, limits(100))
    assert isinstance(hold, Hold)
    assert (hold.amount, read(store)) == (60, Totals(0, 60))
    assert held(purse, 41, limits(100)) == Full(MONTH, False)
    assert held(purse, 101, limits(100)) == Full(MONTH, True)
    purse.settle(hold, 25)
    purse.settle(hold, 25)  # once is enough
    until(lambda: read(store) == Totals(25, 0, 1))
    assert purse.full(limits(100)) is None
    assert purse.full(limits(25)) == Full(MONTH, True)
    assert held(purse, 75, limits(100)) != Full(MONTH, False)


def test_of_two_full_counts_the_one_that_lasts_longer_is_told(purse: Purse) -> None:
    assert held(purse, 10, limits(9, 9)) == Full(MONTH, True)
    assert held(purse, 10, limits(11, 9)) == Full(DAY, True)


def test_what_is_forced_is_counted(purse: Purse, store: Breakable) -> None:
    assert isinstance(held(purse, 500, limits(100), force=True), Hold)
    assert read(store) == Totals(0, 500)


def test_a_request_that_was_refused_is_not_counted(purse: Purse, store: Breakable) -> None:
    hold = Hold(limits(100))
    assert asyncio.run(purse.hold(hold, 101)) == Full(MONTH, True)
    purse.settle(hold, 0)
    held(purse, 1, limits(100))
    assert read(store) == Totals(0, 1, 0)


def test_requests_at_a_time_go_in_few_steps_and_never_beyond_the_amount(
    purse: Purse, store: Breakable
) -> None:
    async def many() -> list[Full | None]:
        return await asyncio.gather(*(purse.hold(Hold(limits(1000)), 7) for _ in range(300)))

    answers = asyncio.run(many())
    assert answers.count(None) == 1000 // 7
    assert read(store) == Totals(0, 1000 // 7 * 7)
    assert store.turns < 100


def test_who_goes_away_while_waiting_holds_nothing(purse: Purse, store: Breakable) -> None:
    async def leave() -> None:
        task = asyncio.create_task(purse.hold(Hold(limits(100)), 60))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    held(purse, 1, limits(100))
    until(lambda: read(store).reserved == 1)


def test_closing_writes_what_was_spent_and_gives_back_what_is_held(store: Breakable) -> None:
    with Purse(store) as purse:
        hold = held(purse, 60, limits(100))
        assert isinstance(hold, Hold)
        held(purse, 30, limits(100))
        purse.settle(hold, 25)
    store.store.open()
    assert read(store) == Totals(25, 0, 1)


def test_a_server_that_starts_again_goes_on_counting(store: Breakable) -> None:
    for expected in (10, 20, 30):
        with Purse(store) as purse:
            hold = held(purse, 15, limits(100))
            assert isinstance(hold, Hold)
            purse.settle(hold, 10)
        store.store.open()
        assert read(store) == Totals(expected, 0, expected // 10)


def test_two_servers_share_what_there_is(store: Breakable, tmp_path: Path) -> None:
    with Purse(store) as one, Purse(open_store(str(tmp_path / "budgets.sqlite3"))) as other:
        assert isinstance(held(one, 60, limits(100)), Hold)
        assert held(other, 50, limits(100)) == Full(MONTH, False)
        assert isinstance(held(other, 40, limits(100)), Hold)
        assert read(store).reserved == 100


def test_a_count_begins_with_the_ledger(store: Breakable, tmp_path: Path) -> None:
    from ledgers import entry

    with Ledger(str(tmp_path / "ledger.sqlite3")) as ledger:
        ledger.record(entry(time=DAY.start))
    past = LedgerPast(ledger.url)
    spent = entry().cost
    assert spent
    with Purse(store, past) as purse:
        assert held(purse, 1, limits(spent)) == Full(MONTH, True)
        assert isinstance(held(purse, 1, limits(spent + 1)), Hold)
        assert read(store) == Totals(spent, 1, 1)
    past.close()


def test_a_clock_that_jumps_finds_the_counts_of_its_period(store: Breakable) -> None:
    october, november = Count("workload", "", "2999-10"), MONTH
    with Purse(store) as purse:
        for count in (october, november, october, november):  # back, and forth again
            hold = held(purse, 10, (Limit(count, 1000),))
            assert isinstance(hold, Hold)
            purse.settle(hold, 10)
    store.store.open()
    found = store.store.read(october.start)
    assert found == {october: Totals(20, 0, 2), november: Totals(20, 0, 2)}


def test_while_the_store_is_away_a_server_goes_by_what_it_knows(
    purse: Purse, store: Breakable, caplog: pytest.LogCaptureFixture
) -> None:
    hold = held(purse, 50, limits(100))
    assert isinstance(hold, Hold)
    store.away = True
    with caplog.at_level(logging.INFO, "router"):
        assert isinstance(held(purse, 20, limits(100)), Hold)
        assert purse.stats.away
        purse.settle(hold, 70)
        assert held(purse, 11, limits(100)) == Full(MONTH, False)
        assert held(purse, 31, limits(100)) == Full(MONTH, True)
        assert isinstance(held(purse, 10, limits(100)), Hold)
        with pytest.raises(BudgetError, match="does not answer"):
            held(purse, 1, limits(100), alone=False)
        store.away = False
        until(lambda: not purse.stats.away)
    until(lambda: read(store) == Totals(70, 30, 1))
    assert [one.message for one in caplog.records if one.levelno == logging.ERROR] == ["it is away"]
    assert "answers again" in caplog.text


def test_a_stale_connection_is_not_an_outage(store: Breakable) -> None:
    class Once(Breakable):
        def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
            self.turns += 1
            if self.turns == 1:
                raise BudgetError("stale")
            return self.store.turn(shares, wanted)

    with Purse(Once(store.store)) as purse:
        assert isinstance(held(purse, 20, limits(100), alone=False), Hold)
        assert purse.stats.failures == 0


def test_counts_that_were_lost_begin_anew(purse: Purse, store: Breakable, tmp_path: Path) -> None:
    held(purse, 20, limits(100))
    (tmp_path / "budgets.sqlite3").unlink()
    held(purse, 30, limits(100))
    assert read(store) == Totals(0, 50)


def test_a_mistake_of_ours_does_not_end_the_thread(store: Breakable) -> None:
    class Wrong(Breakable):
        def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
            if self.away:
                raise ValueError
            return self.store.turn(shares, wanted)

    wrong = Wrong(store.store)
    with Purse(wrong) as purse:
        wrong.away = True
        with pytest.raises(BudgetError):
            held(purse, 1, limits(100), alone=False)
        wrong.away = False
        until(lambda: not purse.stats.away)
        assert isinstance(held(purse, 1, limits(100), alone=False), Hold)


def test_the_store_is_asked_whether_it_is_back(purse: Purse, store: Breakable) -> None:
    store.away = True
    held(purse, 0, ())
    assert isinstance(held(purse, 20, limits(100)), Hold)
    store.away = False
    until(lambda: not purse.stats.away)
    assert read(store) == Totals(0, 20)
