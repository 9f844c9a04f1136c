"""Sessions that several servers share, in Redis or PostgreSQL: whoever answers the next request knows of the ones before.

Each server decides by a memory of its own (:class:`router.sessions.SessionStore`). Before a decision the session is fetched
into it, and after the request written back: a round trip each, no text, a few hundred bytes. While the store is away each
server goes on with what it remembers. Of two requests of one session at the same time, the last to be written counts.

Times are kept as ages, and how long ago a session was written is told by the store: the servers' clocks may differ.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from router.errors import UsageError
from router.sessions import FORGET_SECONDS, Cache, Session, SessionStore

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from router.metrics import Metrics

logger = logging.getLogger("router")

T = TypeVar("T")

# Of one round trip. A busy event loop alone takes a tenth of it.
_TIMEOUT = 0.5
_PAUSE = 1.0  # between two looks at a store that is away
# Sessions of the local memory that are younger than the store's by more than this were not written there.
_SAME = 1.0
_CONNECTIONS = 8
_PREFIX = "router:session:1:"  # the number changes with what is written there
_SESSION = frozenset(field.name for field in fields(Session))


class Place(Protocol):
    """Where sessions are kept; raises whatever its driver does."""

    @property
    def shown(self) -> str:
        """For people: without a password."""
        ...

    async def read(self, key: str) -> tuple[str, float] | None:
        """What was last written, and how many seconds ago; None where that is nothing, or too long ago."""
        ...

    async def write(self, key: str, state: str) -> None: ...

    async def close(self) -> None: ...


class SharedSessions(SessionStore):
    """The sessions of several servers, each with a memory of its own; for one event loop.

    Parameters
    ----------
    place : Place
    metrics : Metrics
    timeout, pause : float
        Seconds: of one round trip, and between two looks at a store that is away.
    """

    def __init__(
        self, place: Place, metrics: Metrics, *, timeout: float = _TIMEOUT, pause: float = _PAUSE
    ) -> None:
        super().__init__()
        self._place = place
        self._metrics = metrics
        self._timeout = timeout
        self._pause = pause
        self._looking: asyncio.Task[None] | None = None

    @property
    def shown(self) -> str:
        """The store's address, for people."""
        return self._place.shown

    @property
    def away(self) -> bool:
        """The store did not answer, and has not since: nobody waits for it."""
        return self._looking is not None

    async def look(self) -> None:
        """Find out whether the store answers, and say so where it does not."""
        await self._try("read", self._place.read(""))

    async def fetch(self, key: str, now: float) -> None:
        """Bring what is known here of a session up to date; ``now`` in this process's monotonic seconds."""
        found = await self._try("read", self._place.read(key))
        if found is None:
            return
        state, age = found
        session, mine = decoded(state, now - age), self.get(key, now)
        if session is not None and (mine is None or mine.at <= session.at + _SAME):
            self.put(key, session)

    async def share(self, key: str, now: float) -> None:
        """Let the other servers know what is known here of a session."""
        session = self.get(key, now)
        if session is not None:
            await self._try("write", self._place.write(key, encoded(session, now)))

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        with suppress(Exception):
            async with asyncio.timeout(self._timeout):
                await self._place.close()

    async def _try(self, what: Literal["read", "write"], work: Coroutine[Any, Any, T]) -> T | None:
        """The result; None where there is none, or none in time."""
        if self.away:
            work.close()
            self._metrics.session_store(what, "passed")
            return None
        # A driver that is cancelled may first ask the server to stop: it is not waited for.
        task = asyncio.ensure_future(work)
        task.add_done_callback(_heard)
        await asyncio.wait((task,), timeout=self._timeout)
        error: BaseException | None = TimeoutError(f"no answer in {self._timeout:g} s")
        if task.done():
            error = None if task.cancelled() else task.exception()
        else:
            task.cancel()
        if error is None:
            self._metrics.session_store(what, "ok")
            return task.result()
        self._metrics.session_store(what, "failed")
        self._lost(error)
        return None

    def _lost(self, error: BaseException) -> None:
        if self._looking is None:
            logger.error(
                "sessions: %s cannot be used: %s; each server goes on with its own until it answers",
                self._place.shown,
                " ".join(f"{type(error).__name__}: {error}".split())[:300],
            )
            self._metrics.session_store_away(True)
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        """Until the store answers again."""
        while True:
            await asyncio.sleep(self._pause)
            with suppress(Exception):
                async with asyncio.timeout(self._timeout):
                    await self._place.read("")
                break
        logger.info("sessions: %s answers again", self._place.shown)
        self._metrics.session_store_away(False)
        self._looking = None


def _heard(task: asyncio.Future[Any]) -> None:
    """So that asyncio does not report the error of a task that nobody waited for."""
    if not task.cancelled():
        task.exception()


def encoded(session: Session, now: float) -> str:
    """A session as it is written: all times as ages."""
    state = {name: getattr(session, name) for name in _SESSION - {"at", "caches"}}
    state["age"] = now - session.at
    state["caches"] = [[cache.target, cache.tokens, now - cache.at] for cache in session.caches]
    return json.dumps(state, separators=(",", ":"))


def decoded(state: str, written: float) -> Session | None:
    """A session that was encoded at this time; None where it cannot be one.

    What another version wrote beside it is left out, what it did not write has its default.
    """
    try:
        found = json.loads(state)
        caches = tuple(
            Cache(str(target), int(tokens), written - float(age)) for target, tokens, age in found["caches"]
        )
        known = {name: value for name, value in found.items() if name in _SESSION}
        return Session(**known | {"at": written - float(found["age"]), "caches": caches})
    except (ValueError, TypeError, KeyError):
        return None


class RedisPlace:
    """Sessions in Redis, which forgets them by itself.

    Parameters
    ----------
    url : str
        ``redis://…`` or ``rediss://…``.
    """

    def __init__(self, url: str) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError:
            raise UsageError(
                "Redis' driver is not installed: pip install 'llm-difficulty-router[redis]'"
            ) from None
        self.shown = shown(url)
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_TIMEOUT,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._milliseconds = round(FORGET_SECONDS * 1e3)

    async def read(self, key: str) -> tuple[str, float] | None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.get(_PREFIX + key)
            pipe.pttl(_PREFIX + key)
            state, left = await pipe.execute()
        if state is None:
            return None
        return state, max(self._milliseconds - left, 0) / 1e3

    async def write(self, key: str, state: str) -> None:
        await self._redis.set(_PREFIX + key, state, px=self._milliseconds)

    async def close(self) -> None:
        await self._redis.aclose()


# One transaction: servers that start together make the table one after another.
_TABLE = """
SELECT pg_advisory_xact_lock(7237012, 1);
CREATE UNLOGGED TABLE IF NOT EXISTS router_sessions (
    key text PRIMARY KEY, state text NOT NULL, written timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS router_sessions_written ON router_sessions (written)
"""
_READ = """
SELECT state, extract(epoch FROM clock_timestamp() - written)::float8 FROM router_sessions
WHERE key = %s AND written > clock_timestamp() - make_interval(secs => %s)
"""
_WRITE = """
INSERT INTO router_sessions VALUES (%s, %s, clock_timestamp())
ON CONFLICT (key) DO UPDATE SET state = excluded.state, written = excluded.written
"""
_PURGE = """
DELETE FROM router_sessions WHERE key IN (
    SELECT key FROM router_sessions WHERE written < clock_timestamp() - make_interval(secs => %s)
    ORDER BY written LIMIT %s FOR UPDATE SKIP LOCKED
)
"""
# Unless the URL says otherwise.
_CONNECTION: dict[str, Any] = {
    "connect_timeout": 3,
    "tcp_user_timeout": 10_000,  # ms until a server that is silently gone counts as gone
    "keepalives_idle": 10,
    "application_name": "router-sessions",
}
# More than that many writes can have made.
_PURGE_EVERY, _PURGE_ROWS = 500, 1_000


class PostgresPlace:
    """Sessions in PostgreSQL, in a table that is not written to its log: a crash of the database empties it.

    Parameters
    ----------
    url : str
        ``postgresql://…``; the user may make tables.
    """

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise UsageError(
                "PostgreSQL's driver is not installed: pip install 'llm-difficulty-router[postgres]'"
            ) from None
        self.shown = shown(url)
        try:
            given = psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            raise UsageError("--session-store: the URL cannot be read") from None
        self._conninfo = psycopg.conninfo.make_conninfo(**(_CONNECTION | given))
        # Several, since each is busy for as long as the event loop is.
        self._places = asyncio.Semaphore(_CONNECTIONS)
        self._idle: list[AsyncConnection[Any]] = []
        self._made = False
        self._writes = 0

    async def read(self, key: str) -> tuple[str, float] | None:
        row = await self._run(_READ, key, FORGET_SECONDS)
        return None if row is None else (row[0], max(row[1], 0.0))

    async def write(self, key: str, state: str) -> None:
        await self._run(_WRITE, key, state)
        self._writes += 1
        if self._writes % _PURGE_EVERY == 0:
            await self._run(_PURGE, FORGET_SECONDS, _PURGE_ROWS)

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    async def _run(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        async with self._places:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                if not self._made:
                    await connection.execute(_TABLE)
                    self._made = True
                cursor = await connection.execute(query, values)
                row = await cursor.fetchone() if cursor.description else None
            except BaseException:
                await connection.close()
                await self.close()  # the others are no better
                raise
            self._idle.append(connection)
            return row

    async def _connect(self) -> AsyncConnection[Any]:
        from psycopg import AsyncConnection

        return await AsyncConnection.connect(self._conninfo, autocommit=True)


def session_place(url: str) -> Place:
    """Where a setting says that sessions are shared.

    Raises
    ------
    UsageError
        It names neither Redis nor PostgreSQL, or the driver is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme in ("redis", "rediss"):
        try:
            return RedisPlace(url)
        except ValueError:
            raise UsageError("--session-store: the URL cannot be read") from None
    if scheme in ("postgresql", "postgres"):
        return PostgresPlace(url)
    # Not what was given: what cannot be parsed may be a password.
    raise UsageError("--session-store: give redis://HOST/0 or postgresql://USER:PASSWORD@HOST/DATABASE")


def shown(url: str) -> str:
    """A URL as it may be printed: without user, password and parameters."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"
