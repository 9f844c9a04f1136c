"""Where budgets are counted: SQLite for the servers of one machine, PostgreSQL or Redis for those of several.

A count is the sum of what all servers add to it. Each server process keeps, for each count, what it has spent itself and
what it holds for requests that are under way, and writes both as they are, not as a difference: written twice, or again after
the store lost its last moments, they are there once. What a process holds is on a lease that it renews; of one that was
killed it is free again when the lease is over. Deciding and writing is one step that no other process comes between, so that
together they never grant more than there is.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    Connection,
    Double,
    Engine,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    event,
    func,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from router.budgets import SECOND, Count, Limit
from router.entry import now
from router.errors import BudgetError, LedgerError
from router.ledger_store import (
    ALL,
    HOUR,
    database_errors,
    day_sums,
    failed,
    hour_sums,
    ledger_url,
    open_engine,
    shown,
)

# How long a process that says nothing keeps what it holds.
LEASE = 60 * SECOND
# How long a count is kept after its period, to be looked at.
KEPT = 40 * 86_400 * SECOND

_STATEMENT_MILLISECONDS = 2_000
# PostgreSQL's name for the lock that lets one process make the tables; any number that nothing else uses.
_LOCK = 731_022_855


@dataclass(frozen=True, slots=True)
class Totals:
    """What stands in a count.

    Attributes
    ----------
    spent, reserved : int
        Nano-dollars; ``reserved`` is held for requests that are under way.
    requests : int
    threshold : float or None
        That pacing last put in force, in some server.
    """

    spent: int = 0
    reserved: int = 0
    requests: int = 0
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What one process adds to a count.

    Attributes
    ----------
    count : Count
    holder : str
        The process's name for itself, in this count.
    spent, requests : int
        All that it has spent in it; never less than before.
    known_spent, known_requests : int
        Those of it that the store is known to have taken.
    reserved : int
        That it holds, without what it wants now.
    threshold : float or None
        That its pacing has in force.
    tells : bool
        Whether that is to be kept: not before the process has heard of the one that another came to.
    """

    count: Count
    holder: str
    spent: int = 0
    requests: int = 0
    known_spent: int = 0
    known_requests: int = 0
    reserved: int = 0
    threshold: float | None = None
    tells: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """Nano-dollars to hold for one request in some counts, all or none; ``force``: whether there is room or not."""

    limits: tuple[Limit, ...]
    amount: int
    force: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one step.

    Attributes
    ----------
    totals : mapping of Count to Totals
        After it.
    refused : tuple of tuple of Count
        For each that was wanted, the counts that had no room; empty where it was granted.
    """

    totals: Mapping[Count, Totals]
    refused: tuple[tuple[Count, ...], ...]


class Missing(Exception):
    """Counts that are not there: they have to begin."""

    def __init__(self, counts: Iterable[Count]) -> None:
        super().__init__()
        self.counts = tuple(counts)


class Store(Protocol):
    """A shared count. All of it blocks; what a store raises when it is away is :class:`BudgetError`."""

    @property
    def shown(self) -> str:
        """Where it is, without a password."""

    def open(self) -> None:
        """Connect, and make what is not there."""

    def begin(self, bases: Mapping[Count, Totals]) -> None:
        """Make these counts where they are not there; where they are, raise them to at least this."""

    def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
        """Take in what a process has spent, and grant what is wanted, in its order, as far as there is room.

        ``shares`` has one for every count that ``wanted`` speaks of. Raises :class:`Missing`.
        """

    def read(self, time: int) -> dict[Count, Totals]:
        """All counts whose period is not over by a time, microseconds since 1970."""

    def close(self) -> None: ...


def open_store(where: str, lease: int = LEASE) -> Store:
    """The store that a setting names, not connected yet.

    Parameters
    ----------
    where : str
        ``redis://…`` or ``rediss://…``, ``postgresql://…``, ``sqlite:///FILE`` or the path of a file.
    lease : int
        Microseconds.

    Raises
    ------
    BudgetError
        It names none of them, or the driver is not installed.
    """
    expected = (
        "give a file, sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE or redis://HOST:PORT/NUMBER"
    )
    if where.startswith(("redis://", "rediss://", "unix://")):
        from router.budget_redis import RedisStore

        return RedisStore(where, lease)
    if "://" in where:
        try:
            backend = make_url(where).get_backend_name()
        except (ArgumentError, ValueError):
            # Not even its beginning: what cannot be parsed may be a password.
            raise BudgetError(f"the budget store's URL cannot be read; {expected}") from None
        if backend not in ("sqlite", "postgresql", "postgres"):
            raise BudgetError(f"budgets cannot be counted in {backend!r}; {expected}")
    try:
        return SqlStore(ledger_url(where), lease)
    except LedgerError as error:
        raise BudgetError(f"{error}".replace("ledger", "budget store")) from None


def store_beside(ledger: URL) -> Store:
    """Where budgets are counted if nothing else is said: in the ledger's database.

    Of a SQLite ledger in a file beside it: SQLite has one writer at a time, and no request should wait for a batch of rows.
    """
    if ledger.get_backend_name() == "sqlite":
        return SqlStore(ledger.set(database=f"{ledger.database}.budgets"))
    return SqlStore(ledger)


_metadata = MetaData()
_counts = Table(
    "budget_counts",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("ends", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("threshold", Double),
)
_holds = Table(
    "budget_holds",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("holder", Text, primary_key=True),
    Column("spent", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
)


# Made once: every request waits for them. The rows are locked in one order by all, so that none waits in a circle.
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_LOCK_COUNTS = (
    select(_counts).where(_counts.c.id.in_(_IDS)).order_by(_counts.c.id).with_for_update(key_share=True)
)
_READ_HOLDS = select(_holds).where(_holds.c.id.in_(_IDS))
_WRITE_COUNTS = (
    update(_counts)
    .where(_counts.c.id == bindparam("key"))
    .values({name: bindparam(f"new_{name}") for name in ("spent", "requests", "threshold")})
)


class SqlStore:
    """Counts in SQLite or PostgreSQL: two tables, made where they are not there.

    Parameters
    ----------
    url : URL
        Of :func:`router.ledger_store.ledger_url`.
    lease : int
        Microseconds.
    """

    def __init__(self, url: URL, lease: int = LEASE) -> None:
        self._url = url
        self._lease = lease
        self._engine: Engine | None = None
        statement = self._insert(_holds)
        self._write_holds = statement.on_conflict_do_update(
            index_elements=["id", "holder"],
            set_={name: statement.excluded[name] for name in ("spent", "requests", "reserved", "expires")},
        )

    @property
    def shown(self) -> str:
        return shown(self._url)

    def open(self) -> None:
        self.close()
        try:
            engine = open_engine(self._url, "create")
        except LedgerError as error:
            raise BudgetError(f"{error}".replace("ledger", "budget store")) from None
        event.listen(engine, "connect", _prepare_sqlite if self._is_sqlite else _prepare_postgresql)
        try:
            with engine.begin() as connection:
                if not self._is_sqlite:
                    connection.execute(
                        text("SELECT pg_advisory_xact_lock(:lock, hashtext(current_schema()))"),
                        {"lock": _LOCK},
                    )
                _metadata.create_all(connection)
        except database_errors() as error:
            engine.dispose()
            raise self._failed(error) from None
        self._engine = engine

    def begin(self, bases: Mapping[Count, Totals]) -> None:
        rows = [
            {"id": count.id, "ends": count.end, "spent": base.spent, "requests": base.requests}
            for count, base in sorted(bases.items(), key=lambda item: item[0].id)
        ]
        statement = self._insert(_counts).values(
            **{name: bindparam(name) for name in ("id", "ends", "spent", "requests")}
        )
        greatest = func.max if self._is_sqlite else func.greatest
        raised = {name: greatest(_counts.c[name], statement.excluded[name]) for name in ("spent", "requests")}
        statement = statement.on_conflict_do_update(index_elements=["id"], set_=raised)
        with self._transaction() as connection:
            connection.execute(statement, rows)
            # In passing: what nobody will look at any more.
            old = select(_counts.c.id).where(_counts.c.ends < now() - KEPT)
            for table in (_holds, _counts):
                connection.execute(delete(table).where(table.c.id.in_(old)))

    def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
        ids = [share.count.id for share in shares]
        with self._transaction() as connection:
            counts = {row.id: row for row in connection.execute(_LOCK_COUNTS, {"ids": ids})}
            if missing := [share.count for share in shares if share.count.id not in counts]:
                raise Missing(missing)
            time = self._time(connection)
            own = {(share.count.id, share.holder) for share in shares}
            before: dict[tuple[str, str], Any] = {}
            others = dict.fromkeys(ids, 0)
            dead = []
            for row in connection.execute(_READ_HOLDS, {"ids": ids}):
                if (row.id, row.holder) in own:
                    before[row.id, row.holder] = row
                elif row.expires > time:
                    others[row.id] += row.reserved
                else:
                    dead.append((row.id, row.holder))
            totals = {}
            for share in shares:
                count = counts[share.count.id]
                mine = before.get((share.count.id, share.holder))
                totals[share.count] = Totals(
                    count.spent + share.spent - (share.known_spent if mine is None else mine.spent),
                    others[share.count.id] + share.reserved,
                    count.requests
                    + share.requests
                    - (share.known_requests if mine is None else mine.requests),
                    share.threshold if share.tells else count.threshold,
                )
            turn = granted(totals, wanted)
            connection.execute(
                _WRITE_COUNTS,
                [
                    {
                        "key": count.id,
                        "new_spent": total.spent,
                        "new_requests": total.requests,
                        "new_threshold": total.threshold,
                    }
                    for count, total in turn.totals.items()
                ],
            )
            connection.execute(
                self._write_holds,
                [
                    {
                        "id": share.count.id,
                        "holder": share.holder,
                        "spent": share.spent,
                        "requests": share.requests,
                        "reserved": turn.totals[share.count].reserved - others[share.count.id],
                        "expires": time + self._lease,
                    }
                    for share in shares
                ],
            )
            if dead:
                connection.execute(delete(_holds).where(tuple_(_holds.c.id, _holds.c.holder).in_(dead)))
        return turn

    def read(self, time: int) -> dict[Count, Totals]:
        with self._transaction() as connection:
            clock = self._time(connection)
            reserved: dict[str, int] = {}
            for hold in connection.execute(select(_holds).where(_holds.c.expires > clock)):
                reserved[hold.id] = reserved.get(hold.id, 0) + hold.reserved
            rows = connection.execute(select(_counts).where(_counts.c.ends > time).order_by(_counts.c.id))
            return {
                Count.of(row.id): Totals(row.spent, reserved.get(row.id, 0), row.requests, row.threshold)
                for row in rows
            }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def _insert(self, table: Table) -> Any:
        return (sqlite if self._is_sqlite else postgresql).insert(table)

    def _time(self, connection: Connection) -> int:
        """Of the machine that all share: leases do not end earlier where a server's clock is ahead."""
        if self._is_sqlite:
            return now()
        clock = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)")
        return int(connection.execute(clock).scalar_one())

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        # Somebody may take a file away: what is written to it then is never found again.
        if self._engine is None or (self._is_sqlite and not os.path.exists(str(self._url.database))):
            self.open()
        assert self._engine is not None
        try:
            with self._engine.begin() as connection:
                yield connection
        except database_errors() as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> BudgetError:
        """Its error as one line, without the password and without the statement and its values."""
        cause = getattr(error, "orig", None) or error
        words = " ".join(str(cause).split()) or type(cause).__name__
        if self._url.password:
            words = words.replace(str(self._url.password), "***")
        return BudgetError(f"the budget store at {self.shown} cannot be used: {words[:300]}")


class LedgerPast:
    """What the ledger's rows of a period come to: with this a count begins that is put on in the middle of it.

    Parameters
    ----------
    url : URL
        The ledger's, whose schema is there.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._engine = open_engine(url)

    def spent(self, count: Count) -> tuple[int, int]:
        kind = ALL if count.scope == "workload" else count.scope
        day = 24 * HOUR
        of_it = (
            day_sums.c.kind == kind,
            day_sums.c.value == count.name,
            day_sums.c.slot >= count.start // day,
            day_sums.c.slot < count.end // day,
        )
        sums = [func.coalesce(func.sum(day_sums.c[name]), 0) for name in ("cost", "requests")]
        try:
            with self._engine.connect() as connection:
                cost, requests = connection.execute(select(*sums).where(*of_it)).one()
        except database_errors() as error:
            raise BudgetError(f"{failed(self._url, error)}") from None
        return int(cost), int(requests)

    def hours(self, count: Count, since: int) -> dict[int, int]:
        kind = ALL if count.scope == "workload" else count.scope
        of_it = (
            hour_sums.c.kind == kind,
            hour_sums.c.value == count.name,
            hour_sums.c.slot >= since // HOUR,
        )
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(select(hour_sums.c.slot, hour_sums.c.requests).where(*of_it))
                return {row.slot: row.requests for row in rows}
        except database_errors() as error:
            raise BudgetError(f"{failed(self._url, error)}") from None

    def close(self) -> None:
        self._engine.dispose()


def granted(totals: Mapping[Count, Totals], wanted: Sequence[Wanted]) -> Turn:
    """Grant what is wanted, in its order, as far as each count has room for it: pure, and the same in every store."""
    after = dict(totals)
    refused = []
    for one in wanted:
        full = tuple(
            limit.count
            for limit in one.limits
            if after[limit.count].spent + after[limit.count].reserved + one.amount > limit.amount
        )
        refused.append(() if one.force else full)
        if one.force or not full:
            for limit in one.limits:
                total = after[limit.count]
                after[limit.count] = replace(total, reserved=total.reserved + one.amount)
    return Turn(after, tuple(refused))


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    # Without waiting for the disk: what a crash of the machine takes is written again, or counted from the ledger.
    with closing(connection.cursor()) as cursor:
        cursor.execute("PRAGMA synchronous = NORMAL")


def _prepare_postgresql(connection: Any, _: object) -> None:
    before = connection.autocommit
    connection.autocommit = True
    connection.execute("SET synchronous_commit = off")  # as in SQLite
    connection.execute(f"SET statement_timeout = {_STATEMENT_MILLISECONDS}")
    connection.autocommit = before
