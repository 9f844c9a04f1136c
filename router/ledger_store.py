"""The ledger's database: opening it, writing a batch in one transaction, deleting what must go.

SQLite by default, PostgreSQL where several servers share a ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError, StatementError

from router.entry import NanoPrices
from router.errors import LedgerError
from router.settings import APPLICATION
from router.upstream import Usage

HOUR = 3_600_000_000  # microseconds

# How the sums are grouped, and the column that each group is.
GROUPS: Mapping[str, str] = {
    "mode": "mode",
    "feature": "feature",
    "tier": "tier",
    "target": "target",
    "model": "model",
    "key": "client",
    "session": "session",
    "reason": "reason",
}
ALL = "all"  # the group that every row is in

SUMMED = (
    "requests",
    "failed",
    "estimated",
    "unpriced",
    "input_tokens",
    "cached_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "earlier_tokens",
    "cost",
    "strongest_cost",
    "saved",
)

Access = Literal["read", "write", "create"]

_FILE = "ledger.sqlite3"
_BUSY_SECONDS = 5.0
_CONNECT_SECONDS = 3

_metadata = MetaData()


def _required(name: str, kind: type[BigInteger | Boolean | Integer | Text]) -> Column[Any]:
    return Column(name, kind, nullable=False)


# As the migrations leave them; a test holds the two together.
entries = Table(
    "entries",
    _metadata,
    Column("id", Text, primary_key=True),
    _required("time", BigInteger),
    _required("request", Text),
    *(Column(name, Text) for name in ("session", "client", "tier", "mode", "feature", "dialect", "reason")),
    Column("score", Double),
    Column("threshold", Double),
    *(Column(name, Text) for name in ("bundle", "policy", "target", "model", "provider")),
    *(_required(f"{name}_tokens", BigInteger) for name in ("input", "cached_read", "cache_write")),
    *(_required(f"{name}_tokens", BigInteger) for name in ("output", "reasoning")),
    _required("usage_estimated", Boolean),
    *(Column(f"price_{name}", BigInteger) for name in ("input", "output", "cached_read", "cache_write")),
    Column("cost", BigInteger),
    _required("earlier_tokens", BigInteger),
    _required("earlier_cost", BigInteger),
    Column("strongest", Text),
    *(Column(name, BigInteger) for name in ("strongest_cost", "latency_us", "first_token_us", "decision_us")),
    _required("status", Integer),
    Column("error", Text),
    _required("streamed", Boolean),
    _required("cancelled", Boolean),
    _required("fallbacks", Integer),
    Column("basis", Text),
)


def _sums_table(name: str) -> Table:
    return Table(
        name,
        _metadata,
        Column("kind", Text, primary_key=True),
        Column("slot", BigInteger, primary_key=True),
        Column("value", Text, primary_key=True),
        *(_required(column, BigInteger) for column in SUMMED),
    )


# A row for every group, and hour or day since 1970 (``slot``), in which it has any request.
hour_sums = _sums_table("hour_sums")
day_sums = _sums_table("day_sums")

captures = Table(
    "captures",
    _metadata,
    Column("id", Text, primary_key=True),
    _required("time", BigInteger),
    _required("expires", BigInteger),
    Column("session", Text),
    Column("client", Text),
    _required("prompt", Text),
    Column("state", Text),
)


def default_ledger_path() -> Path:
    """The SQLite file in the user's data directory."""
    return platformdirs.user_data_path(APPLICATION) / _FILE


def ledger_url(where: str | None = None) -> URL:
    """The database that a flag or a variable names.

    Parameters
    ----------
    where : str or None
        ``sqlite:///FILE``, the path of a file, or ``postgresql://USER:PASSWORD@HOST/DATABASE``. None is
        :func:`default_ledger_path`, and so is ``default``.

    Raises
    ------
    LedgerError
        It names neither.
    """
    if where is None or where.strip() in ("", "default"):
        return URL.create("sqlite", database=str(default_ledger_path()))
    if "://" not in where:
        return URL.create("sqlite", database=os.path.expanduser(where))
    expected = "give a file, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        # Not even its beginning: what cannot be parsed may be a password.
        raise LedgerError(f"the ledger's URL cannot be read; {expected}") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise LedgerError(f"the ledger's URL names no file; {expected}")
        return url.set(drivername="sqlite")
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise LedgerError(f"a ledger cannot be kept in {backend!r}; {expected}")


def shown(url: URL) -> str:
    """The URL as it may be printed: without its password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(query={}).render_as_string(hide_password=True)


def open_engine(url: URL, access: Access = "read", *, durable: bool = False) -> Engine:
    """An engine on the ledger's database.

    Parameters
    ----------
    url : URL
        Of :func:`ledger_url`.
    access : {"read", "write", "create"}
        ``create`` makes the SQLite file, readable by its owner alone, where it is not there.
    durable : bool
        Commits reach the disk before they return, whatever the PostgreSQL server does by default; SQLite's always do.

    Raises
    ------
    LedgerError
        The file is not there or cannot be made, or PostgreSQL's driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        _check_file(Path(str(url.database)), access == "create")
        engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        # Immediate: a transaction that reads first and then wants to write cannot wait for another that does the same.
        begin = "BEGIN" if access == "read" else "BEGIN IMMEDIATE"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine
    try:
        engine = create_engine(
            url,
            # Parameters in the URL win.
            connect_args={
                "connect_timeout": _CONNECT_SECONDS,
                "tcp_user_timeout": 10_000,  # ms until a server that is silently gone counts as gone
                "keepalives_idle": 10,
                "application_name": "router-ledger",
            }
            | dict(url.query),
        )
    except (ImportError, NoSuchModuleError):
        raise LedgerError(
            "PostgreSQL's driver is not installed: pip install 'llm-difficulty-router[postgres]'"
        ) from None
    if durable:
        event.listen(engine, "connect", _prepare_postgresql)
    return engine


def failed(url: URL, error: Exception) -> LedgerError:
    """A database's error as one line, without the password and without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    words = " ".join(str(cause).split()) or type(cause).__name__
    if url.password:
        words = words.replace(str(url.password), "***")
    return LedgerError(f"the ledger at {shown(url)} cannot be used: {words[:300]}")


def database_errors() -> tuple[type[Exception], ...]:
    """What a database that is away, or refuses, raises."""
    return (SQLAlchemyError, sqlite3.Error, OSError)


def write_batch(
    connection: Connection, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]] = ()
) -> int:
    """Write rows and prompts, and add the rows to the sums, in the connection's transaction.

    What is there already, by its id, stays as it is and is not added again: a batch whose commit failed half-way, or that
    two processes hold, can be written as often as needed.

    Returns
    -------
    int
        The rows that were new.
    """
    new = _insert_new(connection, entries, rows)
    _insert_new(connection, captures, prompts)
    if new:
        _add_all(connection, summed(row for row in rows if row["id"] in new))
    return len(new)


def summed(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sums of rows by hour and group, in an order that all writers share, so that none waits in a circle."""
    totals: dict[tuple[str, int, str], list[int]] = {}
    groups = [(ALL, ""), *GROUPS.items()]
    seen = set()
    for row in rows:
        if row["id"] in seen:
            continue  # twice in one batch: a spill file that was read after a failure
        seen.add(row["id"])
        cost, strongest = row["cost"], row["strongest_cost"]
        values = (
            1,
            int(row["status"] >= 400),
            int(row["usage_estimated"]),
            int(cost is None),
            row["input_tokens"],
            row["cached_read_tokens"],
            row["cache_write_tokens"],
            row["output_tokens"],
            row["reasoning_tokens"],
            row["earlier_tokens"],
            cost or 0,
            strongest or 0,
            0 if cost is None or strongest is None else strongest - cost,
        )
        hour = row["time"] // HOUR
        for kind, column in groups:
            key = (kind, hour, (row[column] or "") if column else "")
            total = totals.get(key)
            if total is None:
                totals[key] = list(values)
            else:
                for i, value in enumerate(values):
                    total[i] += value
    return [
        {"kind": kind, "slot": hour, "value": value, **dict(zip(SUMMED, total, strict=True))}
        for (kind, hour, value), total in sorted(totals.items())
    ]


def forget(
    engine: Engine, *, session: str | None = None, client: str | None = None, rows: bool = False
) -> tuple[int, int]:
    """Delete the captured prompts of a session, or of a client key's id; with ``rows``, take the name off its rows too.

    Its rows then count as nobody's: tokens and dollars still add up.

    Returns
    -------
    prompts, rows : int
        How many prompts were deleted, and how many rows made anonymous.
    """
    if (session is None) == (client is None):
        raise ValueError("give session or client")
    column, value = ("session", session) if session is not None else ("client", client)
    anonymous = 0
    with engine.begin() as connection:
        prompts = connection.execute(delete(captures).where(captures.c[column] == value)).rowcount
        if rows:
            # The session's own name goes with the client's: it tells which rows belong together.
            if column == "client":
                named = select(entries.c.session).where(
                    entries.c.client == value, entries.c.session.is_not(None)
                )
                for name in connection.execute(named.distinct()).scalars().all():
                    _merge(connection, "session", name)
            _merge(connection, "key" if column == "client" else "session", str(value))
            blank = {"session": None, "request": ""} | ({"client": None} if column == "client" else {})
            anonymous = connection.execute(
                update(entries).where(entries.c[column] == value).values(blank)
            ).rowcount
    _truncate(engine)
    return prompts, anonymous


def purge(engine: Engine, now: int, *, before: int | None = None) -> int:
    """Delete the prompts whose time to be kept is over, and those captured before a time; says how many.

    ``now`` and ``before`` are microseconds since 1970, UTC.
    """
    old = captures.c.expires <= now
    if before is not None:
        old = or_(old, captures.c.time < before)
    with engine.begin() as connection:
        gone = connection.execute(delete(captures).where(old)).rowcount
    if gone:
        _truncate(engine)
    return gone


def captured(
    engine: Engine, *, since: int | None = None, until: int | None = None
) -> Iterator[dict[str, Any]]:
    """The captured prompts of a time, in its order, each with its row: what was decided, used and spent."""
    query = (
        select(captures.c.prompt, captures.c.state, entries)
        .join(entries, entries.c.id == captures.c.id)
        .where(
            and_(
                captures.c.time >= (0 if since is None else since),
                *(() if until is None else (captures.c.time < until,)),
            )
        )
        .order_by(captures.c.time, captures.c.id)
        .execution_options(yield_per=500)
    )
    with engine.connect() as connection:
        for row in connection.execute(query).mappings():
            yield dict(row)


def prompts_to_label(
    engine: Engine, *, since: int | None = None, until: int | None = None
) -> Iterator[dict[str, Any]]:
    """The captured prompts of a time as rows to label, each text once, the prompts of a session in one group."""
    seen = set()
    for row in captured(engine, since=since, until=until):
        text = hashlib.sha256(row["prompt"].encode()).digest()
        if text in seen:
            continue  # an agent's steps have the same ask
        seen.add(text)
        kept = {"id": row["id"], "prompt": row["prompt"], "source": "ledger"}
        more = {"domain": row["mode"], "group": row["session"]}
        yield kept | {name: value for name, value in more.items() if value}


@dataclass(frozen=True, slots=True)
class Check:
    """What the rows add up to, and where the ledger disagrees with itself; ``cost`` in nano-dollars."""

    rows: int
    tokens: int
    cost: int
    problems: tuple[str, ...]


def check(engine: Engine) -> Check:
    """Add up all rows again, one by one, and compare: costs with tokens and prices, sums by group with rows."""
    problems: list[str] = []
    rows = tokens = dollars = wrong = 0
    first = ""
    expected: dict[tuple[str, str], list[int]] = {}
    names = ("input_tokens", "output_tokens", "earlier_tokens")
    query = select(entries).execution_options(yield_per=2_000)
    # One transaction: what is written meanwhile is in both or in neither.
    with engine.connect().execution_options(**_snapshot(engine)) as connection:
        for row in connection.execute(query).mappings():
            rows += 1
            tokens += sum(row[name] for name in names)
            dollars += row["cost"] or 0
            if not cost_follows(dict(row)):
                wrong += 1
                first = first or row["id"]
            for kind, column in ((ALL, ""), *GROUPS.items()):
                total = expected.setdefault((kind, (row[column] or "") if column else ""), [0, 0, 0])
                total[0] += 1
                total[1] += sum(row[name] for name in names)
                total[2] += row["cost"] or 0
        kept = {table.name: _kept(connection, table) for table in (hour_sums, day_sums)}
    if wrong:
        problems.append(
            f"{wrong} rows whose cost does not follow from their tokens and prices, the first is {first}"
        )
    for name, found in kept.items():
        for kind in (ALL, *GROUPS):
            differing = sum(
                found.get(key) != expected.get(key)
                for key in found.keys() | expected.keys()
                if key[0] == kind
            )
            if differing:
                problems.append(f"{name} by {kind} differ from the rows in {differing} groups")
    return Check(rows, tokens, dollars, tuple(problems))


def _kept(connection: Connection, table: Table) -> dict[tuple[str, str], list[int]]:
    used = table.c.input_tokens + table.c.output_tokens + table.c.earlier_tokens
    totals = (func.sum(table.c.requests), func.sum(used), func.sum(table.c.cost))
    rows = connection.execute(
        select(table.c.kind, table.c.value, *totals).group_by(table.c.kind, table.c.value)
    )
    return {(row[0], row[1]): [int(total) for total in row[2:]] for row in rows}


def cost_follows(row: Mapping[str, Any]) -> bool:
    """Whether a row's cost is what its tokens cost at its prices, with what earlier attempts cost."""
    if row["price_input"] is None:
        used = row["input_tokens"] + row["output_tokens"]
        return row["cost"] is None or (row["cost"] == row["earlier_cost"] and not used)
    prices = NanoPrices(
        row["price_input"], row["price_output"], row["price_cached_read"], row["price_cache_write"]
    )
    usage = Usage(
        row["input_tokens"], row["output_tokens"], row["cached_read_tokens"], row["cache_write_tokens"]
    )
    return bool(row["cost"] == prices.cost(usage) + row["earlier_cost"])


def _snapshot(engine: Engine) -> dict[str, str]:
    # SQLite's transactions see one state anyway.
    return {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}


def _insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Insert the rows that are not there; their ids."""
    if not rows:
        return set()
    if connection.dialect.name == "postgresql":
        # One parameter in place of forty a row: SQLAlchemy's own way takes ten times as long here.
        columns = ", ".join(f'"{column.name}"' for column in table.c)
        statement = text(
            f"INSERT INTO {table.name} ({columns}) SELECT {columns} "
            f"FROM json_populate_recordset(NULL::{table.name}, CAST(:rows AS json)) "
            "ON CONFLICT (id) DO NOTHING RETURNING id"
        )
        return set(connection.execute(statement, {"rows": json.dumps(list(rows))}).scalars())
    new = sqlite.insert(table).on_conflict_do_nothing(index_elements=["id"]).returning(table.c.id)
    return set(connection.execute(new, list(rows)).scalars())


def by_day(totals: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums by hour, as sums by day."""
    days: dict[tuple[str, int, str], dict[str, Any]] = {}
    for total in totals:
        key = (total["kind"], total["slot"] // 24, total["value"])
        day = days.setdefault(
            key, {"kind": key[0], "slot": key[1], "value": key[2]} | dict.fromkeys(SUMMED, 0)
        )
        for name in SUMMED:
            day[name] += total[name]
    return [days[key] for key in sorted(days)]


def _add_all(connection: Connection, totals: Sequence[Mapping[str, Any]]) -> None:
    for table, more in ((hour_sums, totals), (day_sums, by_day(totals))):
        statement = _insert(connection)(table)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["kind", "slot", "value"],
                set_={name: table.c[name] + statement.excluded[name] for name in SUMMED},
            ),
            list(more),
        )


def _merge(connection: Connection, kind: str, value: str) -> None:
    """Let what a group has count as nobody's."""
    mine = [(table.c.kind == kind) & (table.c.value == value) for table in (hour_sums, day_sums)]
    totals = [
        dict(row) | {"value": ""} for row in connection.execute(select(hour_sums).where(mine[0])).mappings()
    ]
    if totals:
        connection.execute(delete(hour_sums).where(mine[0]))
        connection.execute(delete(day_sums).where(mine[1]))
        _add_all(connection, sorted(totals, key=lambda row: row["slot"]))


def _insert(connection: Connection) -> Any:
    # The same words, but SQLAlchemy has one construct for each.
    return sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert


def _truncate(engine: Engine) -> None:
    """Empty SQLite's log, where deleted text would stay readable until it is written over."""
    if engine.dialect.name == "sqlite":
        with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _check_file(path: Path, create: bool) -> None:
    if path.is_file():
        return
    if not create:
        raise LedgerError(f"{path}: there is no ledger; a server with a ledger makes one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise LedgerError(f"{path}: the ledger cannot be made there: {error.strerror}") from None


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # BEGIN is ours: the driver's own leaves out what makes tables
    with closing(connection.cursor()) as cursor:
        _write_ahead(cursor)
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA secure_delete = ON")  # a deleted prompt is overwritten


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    """WAL, which the file remembers. Where processes start at once, SQLite does not wait for the other but refuses."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _prepare_postgresql(connection: Any, _: object) -> None:
    before = connection.autocommit
    connection.autocommit = True
    connection.execute("SET synchronous_commit = on")
    connection.autocommit = before


def is_refused(error: Exception) -> bool:
    """Whether the database refuses these rows, rather than being away: writing them again would fail again."""
    if isinstance(error, DBAPIError):
        return type(error).__name__ in ("DataError", "IntegrityError")
    return isinstance(error, StatementError | OverflowError | ValueError | TypeError)


def fitting(table: Table, values: object) -> dict[str, Any] | None:
    """A row as it was read from a file, with the table's columns and no others; None where it cannot be one."""
    if not isinstance(values, dict):
        return None
    row = {column.name: values.get(column.name) for column in table.c}
    for column in table.c:
        value = row[column.name]
        if value is None:
            if not column.nullable:
                return None
        elif not isinstance(
            value, (int, float) if isinstance(column.type, Double) else column.type.python_type
        ):
            return None
    return row


def is_in_place(url: URL) -> bool:
    """False where somebody took the SQLite file away: what is written to it then is never found again."""
    return url.get_backend_name() != "sqlite" or os.path.exists(str(url.database))
