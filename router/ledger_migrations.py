"""The ledger's schema, step by step.

Each step is a function that takes a schema one version further, in the same transaction that writes the number down. A step
that was released never changes; a change is a new step. A step may add tables, indexes and columns that may be null,
so that a server of the version before goes on writing while others are upgraded.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Connection, Engine, inspect, text

from router.errors import LedgerError

# PostgreSQL's name for the lock that lets one process migrate at a time; any number that nothing else uses.
_LOCK = 731_022_854


def _version_1(connection: Connection) -> None:
    """The rows."""
    _run(
        connection,
        """
        CREATE TABLE entries (
            id TEXT PRIMARY KEY, time BIGINT NOT NULL, request TEXT NOT NULL, session TEXT, client TEXT,
            tier TEXT, mode TEXT, feature TEXT, dialect TEXT, reason TEXT,
            score DOUBLE PRECISION, threshold DOUBLE PRECISION, bundle TEXT, policy TEXT,
            target TEXT, model TEXT, provider TEXT,
            input_tokens BIGINT NOT NULL, cached_read_tokens BIGINT NOT NULL, cache_write_tokens BIGINT NOT NULL,
            output_tokens BIGINT NOT NULL, reasoning_tokens BIGINT NOT NULL, usage_estimated BOOLEAN NOT NULL,
            price_input BIGINT, price_output BIGINT, price_cached_read BIGINT, price_cache_write BIGINT,
            cost BIGINT, earlier_tokens BIGINT NOT NULL, earlier_cost BIGINT NOT NULL,
            strongest TEXT, strongest_cost BIGINT,
            latency_us BIGINT, first_token_us BIGINT, decision_us BIGINT,
            status INTEGER NOT NULL, error TEXT, streamed BOOLEAN NOT NULL, cancelled BOOLEAN NOT NULL,
            fallbacks INTEGER NOT NULL
        )
        """,
        "CREATE INDEX entries_time ON entries (time)",
    )


def _version_2(connection: Connection) -> None:
    """The sums by hour and by day of each group, and those of the rows that are there."""
    # Clustered in SQLite; PostgreSQL has no such table, and room left in a page keeps its updates there.
    clustered = "WITHOUT ROWID" if connection.dialect.name == "sqlite" else "WITH (fillfactor = 80)"
    for table in ("hour_sums", "day_sums"):
        _run(
            connection,
            f"""
            CREATE TABLE {table} (
                kind TEXT NOT NULL, slot BIGINT NOT NULL, value TEXT NOT NULL,
                requests BIGINT NOT NULL, failed BIGINT NOT NULL, estimated BIGINT NOT NULL, unpriced BIGINT NOT NULL,
                input_tokens BIGINT NOT NULL, cached_read_tokens BIGINT NOT NULL, cache_write_tokens BIGINT NOT NULL,
                output_tokens BIGINT NOT NULL, reasoning_tokens BIGINT NOT NULL, earlier_tokens BIGINT NOT NULL,
                cost BIGINT NOT NULL, strongest_cost BIGINT NOT NULL, saved BIGINT NOT NULL,
                PRIMARY KEY (kind, slot, value)
            ) {clustered}
            """,
        )
    columns = {
        "all": "''",
        "mode": "coalesce(mode, '')",
        "feature": "coalesce(feature, '')",
        "tier": "coalesce(tier, '')",
        "target": "coalesce(target, '')",
        "model": "coalesce(model, '')",
        "key": "coalesce(client, '')",
        "session": "coalesce(session, '')",
        "reason": "coalesce(reason, '')",
    }
    for kind, value in columns.items():
        _run(
            connection,
            f"""
            INSERT INTO hour_sums
            SELECT '{kind}', time / 3600000000, {value}, count(*),
                sum(CASE WHEN status >= 400 THEN 1 ELSE 0 END), sum(CASE WHEN usage_estimated THEN 1 ELSE 0 END),
                sum(CASE WHEN cost IS NULL THEN 1 ELSE 0 END),
                sum(input_tokens), sum(cached_read_tokens), sum(cache_write_tokens),
                sum(output_tokens), sum(reasoning_tokens), sum(earlier_tokens),
                sum(coalesce(cost, 0)), sum(coalesce(strongest_cost, 0)), sum(coalesce(strongest_cost - cost, 0))
            FROM entries GROUP BY 2, 3
            """,
        )
    _run(
        connection,
        """
        INSERT INTO day_sums
        SELECT kind, slot / 24, value, sum(requests), sum(failed), sum(estimated), sum(unpriced),
            sum(input_tokens), sum(cached_read_tokens), sum(cache_write_tokens),
            sum(output_tokens), sum(reasoning_tokens), sum(earlier_tokens),
            sum(cost), sum(strongest_cost), sum(saved)
        FROM hour_sums GROUP BY 1, 2, 3
        """,
    )


def _version_3(connection: Connection) -> None:
    """Prompts, where a policy has them kept."""
    _run(
        connection,
        """
        CREATE TABLE captures (
            id TEXT PRIMARY KEY, time BIGINT NOT NULL, expires BIGINT NOT NULL,
            session TEXT, client TEXT, prompt TEXT NOT NULL
        )
        """,
        "CREATE INDEX captures_time ON captures (time)",
        "CREATE INDEX captures_expires ON captures (expires)",
        "CREATE INDEX captures_session ON captures (session)",
        "CREATE INDEX captures_client ON captures (client)",
    )


def _version_4(connection: Connection) -> None:
    """What a request was decided on, to decide it again by another policy."""
    _run(
        connection,
        "ALTER TABLE entries ADD COLUMN basis TEXT",
        "ALTER TABLE captures ADD COLUMN state TEXT",
    )


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_version_1, _version_2, _version_3, _version_4)
VERSION = len(MIGRATIONS)


def migrate(engine: Engine, to: int = VERSION) -> int:
    """Bring the schema to a version, the newest by default; does nothing where it is there already.

    Safe where several processes start at once: one migrates, the others wait for it.

    Returns
    -------
    int
        The version that was found; 0 for an empty database.

    Raises
    ------
    LedgerError
        The schema is newer than this program.
    """
    with engine.connect() as connection:
        found = _version(connection)
    if found >= to:
        return found  # without the lock: a server that comes back must not wait for others
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Of this schema: another ledger in the same database has one of its own.
            connection.execute(
                text("SELECT pg_advisory_xact_lock(:lock, hashtext(current_schema()))"), {"lock": _LOCK}
            )
            # A migration reads all rows; what bounds a request's statement must not end it.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
        found = _version(connection)
        if found == 0:
            _run(
                connection,
                "CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied BIGINT NOT NULL)",
            )
        for number in range(found + 1, to + 1):
            MIGRATIONS[number - 1](connection)
            connection.execute(
                text("INSERT INTO schema_version VALUES (:version, :applied)"),
                {"version": number, "applied": time.time_ns() // 1000},
            )
        return found


def check_version(connection: Connection) -> None:
    """Raise :class:`LedgerError` where the schema is not the one that this program reads."""
    found = _version(connection)
    if found == 0:
        raise LedgerError("there is no ledger in this database; a server with a ledger makes one")
    if found < VERSION:
        raise LedgerError(
            f"the ledger has schema version {found}, this program reads {VERSION}; bring it up with: router ledger migrate"
        )


def _version(connection: Connection) -> int:
    if not inspect(connection).has_table("schema_version"):
        return 0
    found = int(connection.execute(text("SELECT coalesce(max(version), 0) FROM schema_version")).scalar_one())
    if found > VERSION:
        raise LedgerError(
            f"the ledger has schema version {found}, this program knows {VERSION}: a newer one has migrated it; upgrade"
        )
    return found


def _run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(text(statement))
