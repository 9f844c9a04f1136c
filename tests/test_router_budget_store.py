"""Where budgets are counted: the same promises of SQLite, PostgreSQL and Redis."""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ledgers import entry

from router import budget_redis
from router.budget_store import (
    LEASE,
    LedgerPast,
    Missing,
    Share,
    SqlStore,
    Store,
    Totals,
    Wanted,
    granted,
    open_store,
)
from router.budgets import Count, Limit
from router.errors import BudgetError
from router.ledger import Ledger

MONTH, DAY = Count("workload", "", "2999-11"), Count("key", "team/a b", "2999-11-22")
BEFORE = MONTH.start  # every period here is still to come


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's URL, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'budgets.sqlite3'}"
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres"))
    return str(request.getfixturevalue("redis"))


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Redis URL, with a prefix of its own for the keys."""
    url = os.environ.get("ROUTER_TEST_REDIS_URL")
    if not url:
        pytest.skip("ROUTER_TEST_REDIS_URL is not set: a Redis server is needed")
    from redis import Redis

    prefix = f"{{router-test-{secrets.token_hex(6)}}}:"
    monkeypatch.setattr(budget_redis, "PREFIX", prefix)
    yield url
    with Redis.from_url(url) as client:
        for key in client.scan_iter(match=prefix + "*"):
            client.delete(key)


def opened(place: str, lease: int = LEASE) -> Store:
    store = open_store(place, lease)
    store.open()
    return store


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    store = opened(place)
    yield store
    store.close()


def limited(*amounts: int) -> tuple[Limit, ...]:
    return tuple(Limit(count, amount) for count, amount in zip((MONTH, DAY), amounts, strict=False))


def test_a_count_begins_once_and_is_never_lowered(store: Store) -> None:
    with pytest.raises(Missing) as caught:
        store.turn([Share(MONTH, "a"), Share(DAY, "a")], [])
    assert set(caught.value.counts) == {MONTH, DAY}
    store.begin({MONTH: Totals(spent=7, requests=2)})
    store.begin({MONTH: Totals(spent=5, requests=3), DAY: Totals()})
    assert store.read(BEFORE) == {DAY: Totals(), MONTH: Totals(7, 0, 3)}
    assert store.read(MONTH.end) == {}


def test_what_is_held_by_all_together_stays_within_the_amount(store: Store) -> None:
    store.begin({MONTH: Totals(spent=10), DAY: Totals()})
    wanted = [Wanted(limited(100, 50), 40), Wanted(limited(100, 50), 20), Wanted(limited(100, 50), 10)]
    turn = store.turn([Share(MONTH, "a"), Share(DAY, "a")], wanted)
    assert turn.refused == ((), (DAY,), ())
    assert turn.totals == {MONTH: Totals(10, 50), DAY: Totals(0, 50)}
    # Another process: forty are left in the month, nothing in the day.
    turn = store.turn([Share(MONTH, "b")], [Wanted(limited(100), 41), Wanted(limited(100), 40)])
    assert turn.refused == ((MONTH,), ())
    assert store.read(BEFORE)[MONTH] == Totals(10, 90)
    forced = store.turn(
        [Share(MONTH, "b", reserved=40), Share(DAY, "b")], [Wanted(limited(100, 50), 7, True)]
    )
    assert forced.refused == ((),)
    assert forced.totals == {MONTH: Totals(10, 97), DAY: Totals(0, 57)}


def test_what_is_written_twice_is_counted_once(store: Store) -> None:
    store.begin({MONTH: Totals()})
    for _ in range(3):
        store.turn([Share(MONTH, "a", spent=30, requests=2, reserved=5)], [])
    assert store.read(BEFORE)[MONTH] == Totals(30, 5, 2)
    store.turn([Share(MONTH, "a", spent=42, requests=3, known_spent=30, known_requests=2)], [])
    store.turn([Share(MONTH, "b", spent=8, requests=1)], [])
    assert store.read(BEFORE)[MONTH] == Totals(50, 0, 4)


def test_what_a_killed_process_held_is_free_when_its_lease_is_over(
    place: str,
) -> None:
    with closing(opened(place, lease=0)) as store:
        store.begin({MONTH: Totals()})
        store.turn([Share(MONTH, "a", spent=3, requests=1)], [Wanted(limited(100), 90)])
        turn = store.turn([Share(MONTH, "b")], [Wanted(limited(100), 97)])
        assert turn.refused == ((),)
        assert turn.totals[MONTH] == Totals(3, 97, 1)
        # It was only asleep: what it had spent is not counted again.
        woken = Share(MONTH, "a", spent=5, requests=2, known_spent=3, known_requests=1, reserved=90)
        assert store.turn([woken], []).totals[MONTH].spent == 5


def test_what_a_process_holds_is_not_free_before_that(store: Store) -> None:
    store.begin({MONTH: Totals()})
    store.turn([Share(MONTH, "a")], [Wanted(limited(100), 90)])
    assert store.turn([Share(MONTH, "b")], [Wanted(limited(100), 11)]).refused == ((MONTH,),)


def test_large_amounts_are_exact(store: Store) -> None:
    most = 5_000_000 * 10**9
    store.begin({MONTH: Totals(spent=most - 3)})
    turn = store.turn(
        [Share(MONTH, "a", spent=1, requests=1, threshold=0.1, tells=True)], [Wanted(limited(most), 2)]
    )
    assert turn.refused == ((),)
    assert store.read(BEFORE)[MONTH] == Totals(most - 2, 2, 1, 0.1)
    turn = store.turn([Share(MONTH, "b")], [Wanted(limited(most), 1)])
    assert (turn.refused, turn.totals[MONTH].threshold) == (((MONTH,),), 0.1)
    assert store.turn([Share(MONTH, "b", tells=True)], []).totals[MONTH].threshold is None
    assert store.read(BEFORE)[MONTH].threshold is None


def test_together_they_never_hold_more_than_there_is(place: str) -> None:
    """Each of six wants 20 times 7 of 500, and keeps what it gets."""
    with closing(opened(place)) as store:
        store.begin({MONTH: Totals(), DAY: Totals()})
        got: list[int] = []
        threads = [threading.Thread(target=lambda: got.append(want(place, 20))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) == 500 // 7
        assert store.read(BEFORE)[MONTH] == Totals(0, sum(got) * 7)


def test_processes_at_one_file_never_hold_more_than_there_is(tmp_path: Path) -> None:
    place = str(tmp_path / "budgets.sqlite3")
    with closing(opened(place)) as store:
        store.begin({MONTH: Totals(), DAY: Totals()})
        code = f"from test_router_budget_store import want; print(want({place!r}, 60))"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        got = sum(int(process.communicate(timeout=60)[0]) for process in processes)
        assert got == 500 // 7
        assert store.read(BEFORE)[MONTH] == Totals(0, got * 7)


def want(place: str, times: int) -> int:
    """How often a process gets 7 of 500."""
    holder, got = secrets.token_hex(4), 0
    with closing(opened(place)) as store:
        for _ in range(times):
            shares = [Share(count, holder, reserved=got * 7) for count in (DAY, MONTH)]
            got += not store.turn(shares, [Wanted(limited(500, 10_000), 7)]).refused[0]
    return got


def test_a_step_is_granted_in_its_order() -> None:
    totals = {MONTH: Totals(spent=50), DAY: Totals(spent=50)}
    turn = granted(totals, [Wanted(limited(100, 60), 20), Wanted(limited(100, 90), 20), Wanted((), 9)])
    assert turn.refused == ((DAY,), (), ())
    assert turn.totals == {MONTH: Totals(50, 20), DAY: Totals(50, 20)}
    assert totals[MONTH].reserved == 0


@pytest.mark.parametrize("durability", ["sqlite", "postgresql"])
def test_a_count_begins_with_what_the_ledger_has_of_its_period(
    durability: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    where = (
        f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
        if durability == "sqlite"
        else str(request.getfixturevalue("postgres"))
    )
    month, day = Count("workload", "", "2026-02"), Count("key", "team", "2026-02-03")
    with Ledger(where) as ledger:
        for time in (month.start - 1, month.start, day.start, day.end - 1, day.end, month.end - 1, month.end):
            ledger.record(entry(time=time, client="team" if time < day.end else None, feature="search"))
    one = entry().cost
    assert one
    past = LedgerPast(ledger.url)
    assert past.spent(month) == (5 * one, 5)
    assert past.spent(day) == (2 * one, 2)
    assert past.spent(Count("feature", "search", "2026-02")) == (5 * one, 5)
    assert past.spent(Count("feature", "other", "2026-02")) == (0, 0)
    past.close()


def test_wrong_urls_are_told_in_one_line(tmp_path: Path) -> None:
    for wrong in ("mysql://u:secret@h/d", "http://h", "postgresql://u:secret@h:x/d", "redis://h:port/secret"):
        with pytest.raises(BudgetError) as caught:
            open_store(wrong)
        assert "secret" not in str(caught.value)
    for unreachable in (
        "sqlite:////proc/self/no/such/file",
        str(tmp_path),
        "postgresql://u:secret@127.0.0.1:9/d",
        "redis://:secret@127.0.0.1:9/0",
    ):
        store = open_store(unreachable)
        with pytest.raises(BudgetError, match=r"budget store at|cannot be made") as caught:
            store.open()
        assert "secret" not in str(caught.value)
        assert "secret" not in store.shown
        assert "ledger" not in str(caught.value)


def test_a_file_that_is_taken_away_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "budgets.sqlite3"
    with closing(opened(str(file))) as store:
        store.begin({MONTH: Totals(spent=5)})
        file.unlink()
        with pytest.raises(Missing):
            store.turn([Share(MONTH, "a")], [])
        store.begin({MONTH: Totals(spent=6)})
        assert store.read(BEFORE)[MONTH].spent == 6


def test_old_counts_are_deleted(tmp_path: Path) -> None:
    old, kept = Count("workload", "", "2001-01"), Count("workload", "", "2998-01")
    with closing(opened(str(tmp_path / "b"))) as store:
        assert isinstance(store, SqlStore)
        store.begin({old: Totals(1), kept: Totals(1)})
        store.begin({MONTH: Totals()})
        assert set(store.read(0)) == {kept, MONTH}
    with sqlite3.connect(tmp_path / "b") as connection:
        assert connection.execute("SELECT count(*) FROM budget_holds").fetchone() == (0,)
    connection.close()
