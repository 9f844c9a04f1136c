from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from ledgers import LARGE, SMALL, entry
from sqlalchemy import Engine, func, inspect, select, text
from sqlalchemy.exc import OperationalError

import router.ledger
import router.ledger_migrations
import router.ledger_store
from router.entry import LONGEST_TEXT, MOST_TOKENS, Entry, NanoPrices, nano_dollars, new_id
from router.entry import now as clock_now
from router.errors import LedgerError
from router.ledger import Ledger
from router.ledger_migrations import MIGRATIONS, VERSION, migrate
from router.ledger_store import (
    HOUR,
    by_day,
    captured,
    captures,
    check,
    day_sums,
    default_ledger_path,
    entries,
    forget,
    hour_sums,
    ledger_url,
    open_engine,
    purge,
    shown,
    summed,
    write_batch,
)
from router.policy import Capture, Prices
from router.redaction import redact
from router.spill import REFUSED, SUFFIX
from router.upstream import Usage

ROOT = Path(__file__).parent.parent
SECRET = "sk-proj-0123456789abcdefghij"


@contextmanager
def engine_of(where: str, access: router.ledger_store.Access = "write") -> Iterator[Engine]:
    engine = open_engine(ledger_url(where), access)
    try:
        yield engine
    finally:
        engine.dispose()


def stored(where: str) -> list[dict[str, Any]]:
    with engine_of(where) as engine, engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(entries).order_by(entries.c.id)).mappings()]


def assert_consistent(where: str, rows: int) -> None:
    """The ledger holds so many rows, and its sums are theirs."""
    with engine_of(where) as engine:
        found = check(engine)
        with engine.connect() as connection:
            counted = connection.execute(
                select(func.sum(hour_sums.c.requests)).where(hour_sums.c.kind == "all")
            )
            assert int(counted.scalar() or 0) == rows
    assert (found.rows, found.problems) == (rows, ())


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Lets the database of every ledger of this process be away, and come back."""
    write, connect = router.ledger.write_batch, router.ledger.migrate
    state = {"away": False}

    def unless_away(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            if state["away"]:
                raise OperationalError("INSERT", {}, Exception("the server closed the connection"))
            return call(*arguments)

        return checked

    monkeypatch.setattr("router.ledger.write_batch", unless_away(write))
    monkeypatch.setattr("router.ledger.migrate", unless_away(connect))
    yield lambda is_away: state.update(away=is_away)
    state["away"] = False


# Money


def test_nano_dollars_are_exact() -> None:
    prices = Prices(input=0.075, output=0.3, cached_read=0.01875)
    assert NanoPrices.of(prices) == NanoPrices(75_000_000, 300_000_000, 18_750_000, 75_000_000)
    assert nano_dollars(prices, Usage(1_000_000, 0)) == 75_000_000
    assert (
        nano_dollars(prices, Usage(1000, 10, cached=400, cache_write=100))
        == 600 * 75 + 400 * 75 // 4 + 10 * 300
    )
    assert nano_dollars(Prices(input=0, output=0), Usage(10**9, 10**9)) == 0
    # Ten cents a million is not a binary fraction: floats drift, this does not.
    assert sum(nano_dollars(Prices(input=0.1, output=0), Usage(1, 0)) for _ in range(10_000)) == 1_000_000


@pytest.mark.parametrize(("tokens", "nano"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (9, 4)])
def test_half_a_nano_dollar_rounds_to_even(tokens: int, nano: int) -> None:
    assert nano_dollars(Prices(input=0.0005, output=0), Usage(tokens, 0)) == nano


def test_a_provider_that_caches_more_than_it_read_is_not_paid_back() -> None:
    assert nano_dollars(Prices(input=1, output=0, cached_read=0.5), Usage(10, 0, cached=20)) == 20 * 500


def test_the_sum_over_rows_is_the_independent_sum(where: str) -> None:
    numbers = random.Random(3)
    rows, independent = [], 0
    for _ in range(300):
        cached, written = numbers.randrange(5000), numbers.randrange(5000)
        tokens = {
            "input_tokens": cached + written + numbers.randrange(9000),
            "output_tokens": numbers.randrange(3000),
        }
        prices = numbers.choice((SMALL, LARGE))
        rows.append(
            entry(**tokens, cached_read_tokens=cached, cache_write_tokens=written, prices=prices).row()
        )
        dollars = (
            (tokens["input_tokens"] - cached - written) * Fraction("0.25" if prices is SMALL else "5")
            + cached * Fraction("0.025" if prices is SMALL else "0.5")
            + written * Fraction("0.25" if prices is SMALL else "6.25")
            + tokens["output_tokens"] * Fraction("2" if prices is SMALL else "25")
        ) / 10**6
        independent += round(dollars * 10**9)
    with engine_of(where, "create") as engine:
        migrate(engine)
        with engine.begin() as connection:
            assert write_batch(connection, rows) == 300
        found = check(engine)
    assert found.cost == independent
    assert_consistent(where, 300)


def test_check_finds_a_cost_that_does_not_follow_and_sums_that_differ(where: str) -> None:
    with Ledger(where) as ledger:
        for _ in range(3):
            ledger.record(entry())
    with engine_of(where) as engine:
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE entries SET cost = cost + 1 WHERE id = (SELECT min(id) FROM entries)")
            )
            connection.execute(text("UPDATE hour_sums SET requests = 7 WHERE kind = 'mode'"))
        problems = check(engine).problems
    assert problems[0].startswith("1 rows whose cost does not follow")
    assert any("hour_sums by mode differ from the rows in 1 groups" in problem for problem in problems)


# Rows


def test_every_field_comes_back(where: str) -> None:
    one = entry(
        score=0.25,
        threshold=-0.5,
        reasoning_tokens=20,
        cache_write_tokens=7,
        usage_estimated=True,
        earlier_tokens=90,
        earlier_cost=1234,
        latency_us=1_500_000,
        first_token_us=200_000,
        decision_us=900,
        status=502,
        error="upstream",
        streamed=True,
        cancelled=True,
        fallbacks=2,
        feature="titles ✓",
    )
    with Ledger(where) as ledger:
        ledger.record(one)
    (row,) = stored(where)
    assert row == one.row()
    assert row["price_cache_write"] == 250_000_000
    assert_consistent(where, 1)


def test_what_no_database_takes_is_made_harmless(where: str) -> None:
    with Ledger(where) as ledger:
        ledger.record(entry(mode="a\0b\x1b[2J\n", feature="\ud800x", session="s" * 5000))
        ledger.record(entry(score=float("nan"), threshold=float("inf")))
        ledger.record(entry(input_tokens=10**30, cost=10**40, output_tokens=-5, prices=None))
    assert ledger.stats.refused == 0
    first, second, third = stored(where)
    assert (first["mode"], first["feature"], first["session"]) == ("a�b�[2J�", "�x", "s" * LONGEST_TEXT)
    assert (second["score"], second["threshold"]) == (None, None)
    assert (third["input_tokens"], third["output_tokens"]) == (MOST_TOKENS, 0)


def test_ids_are_unique_and_in_the_order_of_time() -> None:
    ids = []
    for _ in range(50):
        ids.append(new_id())
        time.sleep(2e-6)
    assert ids == sorted(set(ids))
    assert {len(one) for one in ids} == {32}


def test_a_clock_that_jumps_back_loses_nothing(where: str) -> None:
    now = 1_700_000_000_000_000
    with Ledger(where) as ledger:
        for time_shown in (now, now - 50 * HOUR, now - 50 * HOUR + 1, now + 1):
            ledger.record(entry(time=time_shown, latency_us=5))
    assert_consistent(where, 4)
    with engine_of(where) as engine, engine.connect() as connection:
        hours = connection.execute(
            select(hour_sums.c.slot, hour_sums.c.requests)
            .where(hour_sums.c.kind == "all")
            .order_by(hour_sums.c.slot)
        ).all()
    assert [tuple(row) for row in hours] == [(now // HOUR - 50, 2), (now // HOUR, 2)]


# Writing


def test_batched_rows_are_written_together_and_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = router.ledger.write_batch

    def counted(connection: Any, rows: list[Any], prompts: list[Any]) -> int:
        sizes.append(len(rows))
        return write(connection, rows, prompts)

    monkeypatch.setattr("router.ledger.write_batch", counted)
    where = str(tmp_path / "ledger.sqlite3")
    with Ledger(where, flush_seconds=0.3) as ledger:
        started = time.monotonic()
        for _ in range(20):
            assert ledger.record(entry())
        assert time.monotonic() - started < 0.2
        assert ledger.stats.pending == 20
        wait_for(lambda: ledger.stats.written == 20)
        assert 0.25 < time.monotonic() - started < 5
        assert ledger.stats.lag_seconds == 0
        for _ in range(30):
            ledger.record(entry())
    assert sizes == [20, 30]  # the rest when it was closed
    assert_consistent(where, 50)


def test_many_rows_are_not_waited_with(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "l.sqlite3"), flush_seconds=60, flush_rows=10) as ledger:
        for _ in range(10):
            ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 10)


def test_strict_rows_are_on_the_disk_when_the_wait_ends(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions = []
    write = router.ledger.write_batch

    def counted(connection: Any, rows: list[Any], prompts: list[Any]) -> int:
        transactions.append(len(rows))
        return write(connection, rows, prompts)

    monkeypatch.setattr("router.ledger.write_batch", counted)

    async def run(ledger: Ledger) -> None:
        one = entry()
        await ledger.write(one)
        assert [row["id"] for row in stored(where)] == [one.id]
        await asyncio.gather(*(ledger.write(entry()) for _ in range(60)))
        assert len(stored(where)) == 61

    with Ledger(where, durability="strict", flush_seconds=60) as ledger:
        asyncio.run(run(ledger))
    assert sum(transactions) == 61
    assert len(transactions) < 20  # those that wait together share a transaction
    assert_consistent(where, 61)


def test_a_caller_that_gives_up_leaves_its_row(tmp_path: Path) -> None:
    where = str(tmp_path / "ledger.sqlite3")

    async def run(ledger: Ledger) -> None:
        task = asyncio.create_task(ledger.write(entry()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ledger.write(entry())

    with Ledger(where, durability="strict") as ledger:
        asyncio.run(run(ledger))
    assert_consistent(where, 2)


def test_a_batch_that_is_written_again_counts_once(where: str) -> None:
    rows = [entry(session=f"s{i % 3}").row() for i in range(12)]
    with engine_of(where, "create") as engine:
        migrate(engine)
        with engine.begin() as connection:
            assert write_batch(connection, rows[:8]) == 8
        with engine.begin() as connection:
            assert write_batch(connection, rows[:8]) == 0
        with engine.begin() as connection:
            assert write_batch(connection, [*rows[4:], rows[-1]]) == 4
    assert_consistent(where, 12)


def test_recording_does_not_wait_for_a_locked_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.ledger_store._BUSY_SECONDS", 0.05)
    where = str(tmp_path / "ledger.sqlite3")
    with Ledger(where, flush_seconds=0.01) as ledger:
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 1)
        with closing(sqlite3.connect(where, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            for _ in range(200):
                ledger.record(entry())
            assert time.monotonic() - started < 0.5
            wait_for(lambda: ledger.stats.away and ledger.stats.pending == 0)
            other.execute("ROLLBACK")
        wait_for(lambda: ledger.stats.written == 201)
    assert ledger.stats.lost == 0
    assert_consistent(where, 201)


# The database away


@pytest.mark.parametrize("durability", ["batched", "strict"])
def test_while_the_database_is_away_rows_wait_in_a_file(
    where: str, tmp_path: Path, away: Callable[[bool], None], durability: router.ledger.Durability
) -> None:
    spill = tmp_path / "spill"
    with Ledger(where, durability=durability, flush_seconds=0.01, spill=spill) as ledger:
        asyncio.run(ledger.write(entry()))
        wait_for(lambda: ledger.stats.written == 1)
        away(True)
        for _ in range(5):
            asyncio.run(ledger.write(entry()))
        wait_for(lambda: ledger.stats.spilled == 5)
        (file,) = spill.glob(f"*{SUFFIX}")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(file.read_text().splitlines()) == 5
        assert ledger.stats.away
        assert ledger.stats.pending == 0
        away(False)
        wait_for(lambda: ledger.stats.restored == 5)
        asyncio.run(ledger.write(entry()))
        wait_for(lambda: ledger.stats.written == 7)
        wait_for(lambda: not file.exists())
        assert not ledger.stats.away
    assert ledger.stats.lost == 0
    assert_consistent(where, 7)


def test_a_ledger_closed_while_the_database_is_away_leaves_its_rows_to_the_next(
    tmp_path: Path, away: Callable[[bool], None]
) -> None:
    where = str(tmp_path / "ledger.sqlite3")
    with Ledger(where, flush_seconds=60) as ledger:
        wait_for(lambda: ledger._purge_at > 0)
        away(True)
        for _ in range(3):
            ledger.record(entry())
    assert (ledger.stats.spilled, ledger.stats.written) == (3, 0)
    away(False)
    with Ledger(where) as ledger:
        wait_for(lambda: ledger.stats.restored == 3)
    assert_consistent(where, 3)
    assert not list(Path(f"{where}.spill").glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("because", ["the directory cannot be made", "the file is over its bound"])
def test_where_the_file_cannot_be_written_memory_is_bounded_and_drops_are_counted(
    tmp_path: Path, away: Callable[[bool], None], because: str
) -> None:
    where = str(tmp_path / "ledger.sqlite3")
    spill, most = tmp_path / "spill", 10
    if because == "the directory cannot be made":
        spill.write_text("in the way")
        most = 1 << 30
    ledger = Ledger(
        where, durability="strict", flush_seconds=0.01, most_pending=20, spill=spill, most_spill_bytes=most
    )
    with ledger:
        wait_for(lambda: ledger._purge_at > 0)
        away(True)
        with pytest.raises(LedgerError, match="could not be written to the ledger"):
            asyncio.run(ledger.write(entry()))
        wait_for(lambda: ledger.stats.pending == 1)
        taken = [ledger.record(entry()) for _ in range(30)]
        assert taken.count(False) == ledger.stats.lost > 0
        assert ledger.stats.pending <= 20
        kept = 1 + taken.count(True)
        away(False)
        wait_for(lambda: ledger.stats.pending == 0)
    assert_consistent(where, kept)


def test_what_a_dead_process_left_is_taken_over(where: str, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    rows = [entry().row() for _ in range(4)]
    whole = "".join(json.dumps({"row": row}) + "\n" for row in rows[:3])
    missing = {name: value for name, value in rows[3].items() if name != "status"}
    (spill / f"1-dead{SUFFIX}").write_text(
        whole
        + "not json\n"
        + json.dumps({"row": missing})
        + "\n"
        + json.dumps({"row": rows[3] | {"input_tokens": {"a": 1}}})
        + "\n"
        + json.dumps({"row": rows[3] | {"id": "later", "a_column_of_a_later_version": 1}})
        + "\n"
        + json.dumps({"row": rows[3] | {"id": "cut off"}})[:-9]
    )
    # Its process lives: it will read this one back itself.
    living = spill / f"2-living{SUFFIX}"
    living.write_text(json.dumps({"row": rows[3]}) + "\n")
    with living.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Ledger(where, spill=spill) as ledger:
            wait_for(lambda: ledger.stats.restored == 4)
    assert {row["id"] for row in stored(where)} == {*(row["id"] for row in rows[:3]), "later"}
    assert [path.name for path in spill.glob(f"*{SUFFIX}")] == [living.name]
    assert len((spill / REFUSED).read_text().splitlines()) == ledger.stats.refused == 3


def test_a_row_that_is_refused_does_not_hold_up_the_others(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = Entry.row

    def broken(self: Entry) -> dict[str, Any]:
        return row(self) | ({"status": None} if self.request == "broken" else {})

    monkeypatch.setattr(Entry, "row", broken)
    with Ledger(where, flush_seconds=60, spill=tmp_path) as ledger:
        for i in range(21):
            ledger.record(entry(request="broken" if i in (4, 20) else "fine"))
    assert (ledger.stats.written, ledger.stats.refused, ledger.stats.lost) == (19, 2, 0)
    assert len(stored(where)) == 19
    assert len((tmp_path / REFUSED).read_text().splitlines()) == 2


def test_a_file_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    where = tmp_path / "ledger.sqlite3"
    with Ledger(str(where), flush_seconds=0.01) as ledger:
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 1)
        for path in tmp_path.glob("ledger.sqlite3*"):
            if path.is_file():
                path.unlink()
        ledger.record(entry())
        wait_for(lambda: ledger.stats.restored == 1)
    assert_consistent(str(where), 1)


def test_a_server_that_restarts_is_found_again(postgres: str) -> None:
    with Ledger(f"{postgres}&application_name={__name__}", flush_seconds=0.01) as ledger:
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 1)
        with engine_of(postgres) as engine, engine.begin() as connection:
            # What a restart does to a connection.
            ended = connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name"),
                {"name": __name__},
            )
            assert ended.scalars().all() == [True]
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 2)
    assert (ledger.stats.lost, ledger.stats.failures) == (0, 1)
    assert_consistent(postgres, 2)


# Processes


def writer(where: str, durability: str, writers: int, rows: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "ledgers.py"), where, durability, str(writers), str(rows)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_on_one_ledger(where: str) -> None:
    """Both find an empty database, and so both want to migrate it."""
    processes = [writer(where, durability, 16, 100) for durability in ("strict", "batched")]
    ids = []
    for process in processes:
        out, errors = process.communicate(timeout=60)
        assert errors == ""
        ids += [line.split()[0] for line in out.splitlines()]
    assert len(ids) == 200
    assert {row["id"] for row in stored(where)} == set(ids)
    assert_consistent(where, 200)


@pytest.mark.parametrize("durability", ["strict", "batched"])
def test_kill_9(where: str, durability: str) -> None:
    strict = durability == "strict"
    process = writer(where, durability, 16 if strict else 2, 100_000)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    started = time.monotonic()
    while time.monotonic() - started < (0.3 if strict else 2):
        lines.append(process.stdout.readline())
    process.kill()
    killed = time.monotonic()
    rest, _ = process.communicate(timeout=10)
    seen = [line.split() for line in [*lines, *rest.splitlines()] if line.count(" ") == 1]
    present = {row["id"] for row in stored(where)}
    lost = [float(when) for one, when in seen if one not in present]
    assert len(seen) > 20
    assert present
    # What batched may lose is the last 200 ms and the transaction under way; the rest is for a busy machine.
    assert all(when > killed - (0 if strict else 1.2) for when in lost)
    if strict:
        assert lost == []
    with engine_of(where) as engine:
        assert check(engine).problems == ()


# Prompts


def test_no_prompt_is_kept_unless_that_is_turned_on(where: str) -> None:
    with Ledger(where, flush_seconds=0.01) as ledger:
        ledger.record(entry(), "my secret plan")
        wait_for(lambda: ledger.stats.written == 1)
        ledger.capture = Capture(share=1, keep_days=2)
        ledger.record(entry(session="two"), f"write to jane.doe@example.org, the key is {SECRET}\0")
        ledger.record(entry(), None)
    with engine_of(where) as engine:
        (one,) = captured(engine)
        with engine.connect() as connection:
            row = connection.execute(select(captures)).mappings().one()
    assert one["prompt"] == "write to [email], the key is [key]�"
    assert (one["session"], one["cost"]) == ("two", entry().cost)
    assert abs(row["expires"] - clock_now() - 2 * 24 * HOUR) < HOUR


def test_a_share_of_the_prompts() -> None:
    def takes(share: float) -> bool:
        return Ledger(capture=Capture(share=share)).takes(entry())

    taken = sum(takes(0.2) for _ in range(4000))
    assert 650 < taken < 950
    assert not any(takes(0) for _ in range(100))
    assert all(takes(1) for _ in range(100))


def test_prompts_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.ledger._MOST_PROMPT_CHARACTERS", 100)
    monkeypatch.setattr("router.ledger._LONGEST_PROMPT", 60)
    where = str(tmp_path / "l.sqlite3")
    with Ledger(where, capture=Capture(share=1), flush_seconds=60, flush_rows=5) as ledger:
        for length in (61, 60, 41, 40):
            ledger.record(entry(), "x" * length)
        assert ledger.stats.prompts_dropped == 2
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 5)
        ledger.record(entry(), "y" * 60)  # there is room again
    with engine_of(where) as engine:
        assert sorted(len(row["prompt"]) for row in captured(engine)) == [40, 60, 60]
    assert_consistent(where, 6)


def test_spilled_prompts_are_redacted_and_come_back(tmp_path: Path, away: Callable[[bool], None]) -> None:
    where, spill = str(tmp_path / "l.sqlite3"), tmp_path / "spill"
    with Ledger(where, capture=Capture(share=1), flush_seconds=0.01, spill=spill) as ledger:
        wait_for(lambda: ledger._purge_at > 0)
        away(True)
        ledger.record(entry(), f"use {SECRET}")
        wait_for(lambda: ledger.stats.spilled == 1)
        (file,) = spill.iterdir()
        assert "use [key]" in file.read_text()
        assert SECRET not in file.read_text()
        away(False)
        wait_for(lambda: ledger.stats.restored == 1)
    with engine_of(where) as engine:
        assert [row["prompt"] for row in captured(engine)] == ["use [key]"]


def test_prompts_whose_time_is_over_are_deleted(where: str) -> None:
    now = clock_now()
    with engine_of(where, "create") as engine:
        migrate(engine)
        prompts = [
            {
                "id": name,
                "time": now - age * HOUR,
                "expires": expires,
                "session": None,
                "client": None,
                "prompt": "x",
            }
            for name, age, expires in (
                ("over", 1, now - 1),
                ("old", 90, now + HOUR),
                ("fresh", 1, now + HOUR),
            )
        ]
        with engine.begin() as connection:
            write_batch(connection, [entry(id=one["id"]).row() for one in prompts], prompts)
    with Ledger(where) as ledger:
        wait_for(lambda: ledger._purge_at > 0)  # when it starts, and every ten minutes

    def left() -> list[str]:
        with engine_of(where) as engine:
            return [row["id"] for row in captured(engine)]

    assert left() == ["old", "fresh"]
    with engine_of(where) as engine:
        assert purge(engine, now, before=now - 24 * HOUR) == 1
        assert purge(engine, now, before=now - 24 * HOUR) == 0
    assert left() == ["fresh"]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("who", [{"session": "s1"}, {"client": "a"}])
def test_deletion(where: str, who: dict[str, str], rows: bool) -> None:
    with Ledger(where, capture=Capture(share=1)) as ledger:
        for i in range(6):
            ledger.record(entry(session=f"s{i % 3}", client="ab"[i % 3 == 2]), f"prompt {i}")
    with engine_of(where) as engine:
        gone, anonymous = forget(engine, **who, rows=rows)
        left = {row["prompt"] for row in captured(engine)}
    expected = {0, 2, 3, 5} if "session" in who else {2, 5}
    assert left == {f"prompt {i}" for i in expected}
    assert (gone, anonymous) == (6 - len(expected), (6 - len(expected)) * rows)
    for row in stored(where):
        if "session" in who:
            assert (row["session"] != "s1") is rows or row["session"] in ("s0", "s2")
        elif rows:
            assert row["client"] != "a"
            assert row["session"] in (None, "s2")
    assert_consistent(where, 6)  # tokens and dollars stay, and the sums know nobody who is gone


def test_deleted_prompts_are_not_readable_in_the_file(tmp_path: Path) -> None:
    where = tmp_path / "ledger.sqlite3"
    with Ledger(str(where), capture=Capture(share=1)) as ledger:
        for i in range(50):
            ledger.record(entry(session="gone"), f"the launch codename is thunderbird {i}")

    def readable() -> bool:
        return any(
            b"thunderbird" in path.read_bytes() for path in tmp_path.glob("ledger.sqlite3*") if path.is_file()
        )

    assert readable()
    with engine_of(str(where)) as engine:
        assert forget(engine, session="gone") == (50, 0)
    assert not readable()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nothing to hide: x = y + 1", "nothing to hide: x = y + 1"),
        (f"export OPENAI_API_KEY={SECRET}", "export OPENAI_API_KEY=[key]"),
        ("ghp_0123456789abcdefABCDEF0123456789abcd", "[key]"),
        ("Authorization: Bearer abc.def", "Authorization: [key]"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl end", "token [key] end"),
        ("postgresql://ann:hunter22@db.example.org/x", "postgresql://[key]@db.example.org/x"),
        ("mail a.b+c@example.co.uk, or d@e.fr.", "mail [email], or [email]."),
        ("<anna_müller@firma.de>", "<[email]>"),
        ("@decorator and user@localhost", "@decorator and user@localhost"),
        (
            "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nAb+/=\n-----END RSA PRIVATE KEY-----\nb",
            "a\n[key]\nb",
        ),
    ],
)
def test_redaction(before: str, after: str) -> None:
    assert redact(before) == after
    assert redact(after) == after


def test_redaction_takes_time_in_proportion_to_the_text() -> None:
    hostile = (
        "a" * 50_000,
        "a@" * 25_000,
        "-----BEGIN PRIVATE KEY-----" * 500,
        "eyJ" * 16_000,
        "://x:" * 10_000,
    )
    started = time.process_time()
    for text_of_50k in hostile:
        redact(text_of_50k)
    assert time.process_time() - started < 3


# The schema


def test_the_tables_are_what_the_migrations_make(where: str) -> None:
    with engine_of(where, "create") as engine:
        assert migrate(engine) == 0
        found = inspect(engine)
        for table in (entries, hour_sums, day_sums, captures):
            made = found.get_columns(table.name)
            assert [one["name"] for one in made] == [column.name for column in table.c]
            for one, column in zip(made, table.c, strict=True):
                assert one["nullable"] is column.nullable or column.primary_key, column
                assert one["type"].python_type is column.type.python_type, column


@pytest.mark.parametrize("version", range(1, VERSION))
def test_an_old_ledger_is_brought_up(where: str, version: int) -> None:
    rows = [
        entry(time=(100 + i // 4) * HOUR + i, session=f"s{i % 3}", status=500 if i == 2 else 200).row()
        for i in range(10)
    ]
    rows[5] |= {"cost": None, "mode": None, "price_input": None}
    with engine_of(where, "create") as engine:
        assert migrate(engine, to=version) == 0
        with engine.begin() as connection:
            old = [{name: row[name] for name in row if name != "basis"} for row in rows]
            connection.execute(entries.insert(), old)
            if version > 1:
                hours = summed(rows)
                connection.execute(hour_sums.insert(), hours)
                connection.execute(day_sums.insert(), by_day(hours))
        assert migrate(engine) == version
        assert migrate(engine) == VERSION
        with engine.connect() as connection:
            kept = [
                sorted(tuple(row) for row in connection.execute(select(table)))
                for table in (hour_sums, day_sums)
            ]
            applied = (
                connection.execute(text("SELECT version FROM schema_version ORDER BY 1")).scalars().all()
            )
    # What the migration adds up is what writing would have added up.
    hours = summed(rows)
    assert kept == [sorted(tuple(one.values()) for one in totals) for totals in (hours, by_day(hours))]
    assert {slot for _, slot, *_ in kept[1]} == {4}
    assert applied == list(range(1, VERSION + 1))
    with Ledger(where) as ledger:
        ledger.record(entry(time=100 * HOUR))
    assert_consistent(where, 11)


def test_a_ledger_of_a_later_version_is_left_alone(where: str) -> None:
    with engine_of(where, "create") as engine:
        migrate(engine)
        with engine.begin() as connection:
            connection.execute(text(f"INSERT INTO schema_version VALUES ({VERSION + 1}, 0)"))
    with pytest.raises(
        LedgerError, match=f"schema version {VERSION + 1}, this program knows {VERSION}.*upgrade"
    ):
        Ledger(where).open()
    assert len(MIGRATIONS) == VERSION


def test_a_ledger_that_is_up_to_date_waits_for_no_lock(postgres: str) -> None:
    """While a ledger elsewhere in the database is migrated, or this one looked after, servers start and come back."""
    with engine_of(postgres) as engine:
        migrate(engine)
        with engine.begin() as connection:
            connection.execute(text("LOCK TABLE schema_version IN ROW EXCLUSIVE MODE"))
            connection.execute(
                text("SELECT pg_advisory_xact_lock(:lock, hashtext(current_schema()))"),
                {"lock": router.ledger_migrations._LOCK},
            )
            with Ledger(postgres, flush_seconds=0.01) as ledger:
                ledger.record(entry())
                wait_for(lambda: ledger.stats.written == 1)


# Opening


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    where = tmp_path / "new" / "ledger.sqlite3"
    with Ledger(str(where)) as ledger:
        ledger.record(entry())
        wait_for(lambda: ledger.stats.written == 1)
        for path in where.parent.glob("ledger.sqlite3*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        with closing(sqlite3.connect(where)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_without_a_name_it_is_in_the_users_data_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_ledger_path().name == "ledger.sqlite3"
    assert ledger_url().database == str(default_ledger_path())
    assert ledger_url("~/x.db").database == os.path.expanduser("~/x.db")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mysql://u:hunter22@h/d", "cannot be kept in 'mysql'"),
        ("://hunter22", "URL cannot be read"),
        ("sqlite://", "names no file"),
        (
            "postgresql://u:hunter22@127.0.0.1:1/d",
            r"postgresql\+psycopg://u:\*\*\*@127.0.0.1:1/d cannot be used",
        ),
        ("/proc/no/ledger.sqlite3", "/proc/no/ledger.sqlite3: the ledger cannot be made there: "),
    ],
)
def test_a_ledger_that_cannot_be_opened_is_explained(where: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as raised:
        Ledger(where).open()
    assert "hunter22" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and not a database " * 50)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(str(path)).open()
    assert path.read_text().startswith("these are my notes")


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LedgerError, match=r"pip install 'llm-difficulty-router\[postgres\]'"):
        Ledger("postgresql://u@h/d").open()


def test_a_url_is_shown_without_its_password() -> None:
    assert (
        shown(ledger_url("postgresql://u:hunter22@h/d?sslpassword=hunter22"))
        == "postgresql+psycopg://u:***@h/d"
    )
