"""The ledger with millions of rows: how long it takes to ask where the money went, and to bring an old ledger up.

``make bench-ledger`` runs it on SQLite; with ROUTER_TEST_POSTGRES_URL also on PostgreSQL, in a schema of its own that is
dropped again. The rows are made as of one month, evenly over its hours: 5 million of 250,000 sessions by default. They are
put into a ledger of version 1 by the database's own bulk load, and the migrations make the sums, as they would for
somebody's old ledger. With ``--at`` the ledger is kept, and found there again: its queries can be asked at a quieter time.
``--write`` measures the way that a server writes instead: rows per second through :class:`Ledger`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from router import panels
from router.entry import Entry, NanoPrices
from router.errors import RouterError
from router.ledger import Ledger
from router.ledger_migrations import migrate
from router.ledger_store import HOUR, entries, ledger_url, open_engine
from router.policy import Prices
from router.spend import BY, query_spend

MONTH_HOURS = 720
FIRST = 1_767_225_600_000_000  # 2026-01-01, UTC
CHUNK = 50_000

MODES = (("code", 0.45), ("debug", 0.2), ("plan", 0.1), ("review", 0.1), ("title", 0.1), (None, 0.05))
FEATURES = (("agent", 0.7), ("chat", 0.2), (None, 0.1))
TARGETS = (
    ("small", 0.6, "openai/small"),
    ("medium", 0.25, "openai/medium"),
    ("large", 0.15, "anthropic/large"),
)
PRICES = {
    "small": NanoPrices.of(Prices(input=0.25, output=2, cached_read=0.025)),
    "medium": NanoPrices.of(Prices(input=1.25, output=10, cached_read=0.125)),
    "large": NanoPrices.of(Prices(input=5, output=25, cached_read=0.5, cache_write=6.25)),
}
REASONS = (("signal", 0.5), ("predicted", 0.3), ("sticky", 0.15), ("pinned", 0.05))


def picked(random: np.random.Generator, choices: Sequence[tuple[Any, ...]], number: int) -> list[Any]:
    chances = np.array([choice[1] for choice in choices])
    indexes = random.choice(len(choices), size=number, p=chances / chances.sum())
    return [choices[i][0] for i in indexes]


def chunks(rows: int, sessions: int, clients: int) -> Iterator[list[tuple[Any, ...]]]:
    """Rows in the order of the table's columns; a session's requests follow one another within an hour or two."""
    random = np.random.default_rng(0)
    models = {name: model for name, _, model in TARGETS}
    large = PRICES["large"]
    for start in range(0, rows, CHUNK):
        number = min(CHUNK, rows - start)
        index = np.arange(start, start + number)
        times = FIRST + (index * (MONTH_HOURS * HOUR / rows)).astype(np.int64)
        # As many sessions at a time as are open within an hour.
        open_at_once = max(1, sessions // MONTH_HOURS)
        session = (index * sessions // rows // open_at_once) * open_at_once + random.integers(
            0, open_at_once, number
        )
        inputs = random.lognormal(8.5, 1, number).astype(np.int64)
        cached = (inputs * random.random(number) * 0.9).astype(np.int64)
        outputs = random.lognormal(5, 1, number).astype(np.int64)
        columns = zip(
            times.tolist(), session.tolist(), inputs.tolist(), cached.tolist(), outputs.tolist(),
            picked(random, MODES, number), picked(random, FEATURES, number), picked(random, TARGETS, number),
            picked(random, REASONS, number), random.integers(0, clients, number).tolist(),
            strict=True,
        )  # fmt: skip
        made = []
        for row, (when, one, tokens, read, out, mode, feature, target, reason, client) in enumerate(
            columns, start
        ):
            price = PRICES[target]
            millionths = (tokens - read) * price.input + read * price.cached_read + out * price.output
            strongest = (tokens - read) * large.input + read * large.cached_read + out * large.output
            made.append(
                (
                    f"{when:014x}{row:018x}", when, f"req_{row:032x}", f"{one:032x}", f"client-{client}",
                    "balanced", mode, feature, "openai", reason,
                    0.1, 0.2, "default@1", "0123456789ab", target, models[target], "openai",
                    tokens, read, 0, out, 0, False,
                    price.input, price.output, price.cached_read, price.cache_write,
                    round(millionths / 1e6), 0, 0, "large", round(strongest / 1e6),
                    900_000, 200_000, 1500, 200, None, True, False, 0,
                )
            )  # fmt: skip
        yield made


def load(where: str, rows: Iterator[list[tuple[Any, ...]]]) -> None:
    """Into a ledger of version 1, by the way that is fastest."""
    engine = open_engine(ledger_url(where), "create")
    migrate(engine, to=1)
    columns = [column.name for column in entries.c if column.name != "basis"]
    names = ", ".join(columns)
    with closing(engine.raw_connection()) as connection:
        driver: Any = connection.driver_connection
        cursor = driver.cursor()
        for chunk in rows:
            if engine.dialect.name == "sqlite":
                cursor.execute("BEGIN")
                marks = ", ".join("?" * len(columns))
                cursor.executemany(f"INSERT INTO entries ({names}) VALUES ({marks})", chunk)
            else:
                with cursor.copy(f"COPY entries ({names}) FROM STDIN") as copy:
                    for row in chunk:
                        copy.write_row(row)
            driver.commit()
        cursor.close()
    engine.dispose()


def timed(call: Any, times: int = 1, clock: Any = time.perf_counter) -> list[float]:
    seconds = []
    for _ in range(times):
        started = clock()
        call()
        seconds.append(clock() - started)
    return seconds


def fill(where: str, rows: int, sessions: int, clients: int) -> dict[str, Any]:
    loaded = timed(lambda: load(where, chunks(rows, sessions, clients)))[0]
    engine = open_engine(ledger_url(where), "write")
    migrated = timed(lambda: migrate(engine))[0]
    if engine.dialect.name == "postgresql":
        # As autovacuum does behind such a load.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE entries")
            connection.exec_driver_sql("VACUUM ANALYZE hour_sums")
            connection.exec_driver_sql("VACUUM ANALYZE day_sums")
    engine.dispose()
    return {"load_s": round(loaded, 1), "migrate_s": round(migrated, 1)}


def measure_queries(where: str) -> dict[str, Any]:
    """Seconds of each query; SQLite's processor time too, which other work on the machine does not lengthen."""
    figures: dict[str, Any] = {"queries": {}}
    reader = open_engine(ledger_url(where))
    # A whole month; a month that begins and ends within an hour, so that rows must be read too; a day.
    spans = {
        "month": (FIRST, FIRST + MONTH_HOURS * HOUR),
        "month, edges within an hour": (FIRST + HOUR // 2, FIRST + MONTH_HOURS * HOUR - HOUR // 3),
        "day": (FIRST + 240 * HOUR, FIRST + 264 * HOUR),
    }
    with reader.connect() as connection:
        for name, (since, until) in spans.items():
            for by in BY:
                ask = partial(query_spend, connection, by, since, until)
                seconds, cpu = timed(ask, 5), timed(ask, 3, time.process_time)
                figures["queries"][f"{name} by {by}"] = {
                    "first_s": round(seconds[0], 3),
                    "median_s": round(statistics.median(seconds), 3),
                    "worst_s": round(max(seconds), 3),
                } | ({"cpu_s": round(statistics.median(cpu), 3)} if reader.dialect.name == "sqlite" else {})
        figures["dashboard"] = measure_dashboard(connection)
        spend = query_spend(connection)
        figures["requests"] = spend.total.requests
        for table in ("hour_sums", "day_sums"):
            figures[table] = connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar()
    reader.dispose()
    return figures


def measure_dashboard(connection: Connection) -> dict[str, float]:
    """Median seconds of what the dashboard asks for, as on the month's last day."""
    now = datetime.fromtimestamp((FIRST + MONTH_HOURS * HOUR) / 1e6 - 1, UTC)
    figures = {}
    for name in panels.RANGES:
        period = panels.Period.of(name, now)
        asks: dict[str, Callable[[], Any]] = {
            f"spend by {by}": partial(panels.spend, connection, by, period)
            for by in ("mode", "key", "session")
        }
        asks["reasons"] = partial(panels.reasons, connection, period)
        asks["scores"] = partial(panels.scores, connection, period, "default@1", 0.2)
        asks["requests"] = partial(panels.requests, connection, period)
        for what, ask in asks.items():
            figures[f"{name}: {what}"] = round(statistics.median(timed(ask, 5)), 3)
    return figures


def measure_writing(where: str, rows: int) -> dict[str, Any]:
    """Rows a second that the thread writes, and what queueing one costs the caller."""
    price = PRICES["small"]
    made = [
        Entry(session=f"s{i // 20}", client=f"c{i % 10}", mode="code", target="small", model="openai/small",
              input_tokens=1000, output_tokens=100, prices=price, cost=450_000)
        for i in range(rows)
    ]  # fmt: skip
    with Ledger(where, most_pending=rows + 1) as ledger:
        cpu = time.process_time()
        queued = timed(lambda: [ledger.record(one) for one in made])[0]
        started = time.perf_counter()
        while ledger.stats.pending:
            time.sleep(0.005)
        seconds = time.perf_counter() - started + queued
        cpu = time.process_time() - cpu
    return {
        "rows_per_s": round(rows / seconds),
        "cpu_us_per_row": round(cpu / rows * 1e6, 1),
        "record_us": round(queued / rows * 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--sessions", type=int, default=250_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="measure writing instead")
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--at", metavar="URL", help="a ledger to keep, and not to fill again")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        for kind, where in [("kept", options.at)] if options.at else databases(stack, options.only):
            if options.write:
                results[kind] = measure_writing(where, min(options.rows, 50_000))
            else:
                size = (options.rows, options.sessions, options.clients)
                filled = {} if options.at and is_filled(where) else fill(where, *size)
                results[kind] = filled | measure_queries(where)
            print(kind, json.dumps(results[kind], indent=2), file=sys.stderr)
    print(json.dumps(results))


def is_filled(where: str) -> bool:
    """Whether the ledger is there, with rows; one that was not filled to its end has no sums."""
    try:
        engine = open_engine(ledger_url(where))
        with engine.connect() as connection:
            return bool(connection.exec_driver_sql("SELECT count(*) FROM day_sums").scalar())
    except (RouterError, SQLAlchemyError):
        return False


def databases(stack: ExitStack, only: str | None) -> Iterator[tuple[str, str]]:
    if only != "postgresql":
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-ledger-"))
        yield "sqlite", str(Path(folder) / "ledger.sqlite3")
    server = os.environ.get("ROUTER_TEST_POSTGRES_URL")
    if server and only != "sqlite":
        import psycopg

        schema = f"router_bench_{secrets.token_hex(4)}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
            try:
                yield "postgresql", f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{schema}"
            finally:
                connection.execute(f"DROP SCHEMA {schema} CASCADE")


if __name__ == "__main__":
    main()
