"""Sessions that several servers share, in Redis or PostgreSQL: whoever answers the next request knows of the ones before.

Each server decides by a memory of its own (:class:`router.sessions.SessionStore`). Before a decision the session is fetched
into it, and after the request written back: no text, a few hundred bytes. One thread speaks to the store, and what comes while
it is at it goes together in the next round trip. While the store is away each server goes on with what it remembers.
Of two requests of one session at the same time, the last to be written counts.

Times are kept as ages, and how long ago a session was written is told by the store: the servers' clocks may differ.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from router.errors import UsageError
from router.sessions import FORGET_SECONDS, Cache, Session, SessionStore

if TYPE_CHECKING:
    from psycopg import Connection

    from router.metrics import Metrics

logger = logging.getLogger("router")

# A request waits for the store no longer than this.
_TIMEOUT = 0.5
_PAUSE = 1.0  # between two looks at a store that is away
# Sessions of the local memory that are younger than the store's by more than this were not written there.
_SAME = 1.0
_MOST_AT_ONCE = 500
_PREFIX = "router:session:1:"  # the number changes with what is written there
_SESSION = frozenset(field.name for field in fields(Session))

Found = tuple[str, float]  # what was written, and how many seconds ago


class Place(Protocol):
    """Where sessions are kept; used by one thread. Connects by itself, and raises whatever its driver does."""

    @property
    def shown(self) -> str:
        """For people: without a password."""
        ...

    def turn(self, reads: Sequence[str], writes: Mapping[str, str]) -> Mapping[str, Found]:
        """Write, and then read: what was last written under these keys, where that was not too long ago."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that waits: to read a session, or to write one."""

    key: str
    state: str | None
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    answered: bool = False
    found: Found | None = None


class SharedSessions(SessionStore):
    """The sessions of several servers, each with a memory of its own; for one event loop.

    Parameters
    ----------
    place : Place
    metrics : Metrics
    timeout, pause : float
        Seconds that a request waits, and between two looks at a store that is away.
    """

    def __init__(
        self, place: Place, metrics: Metrics, *, timeout: float = _TIMEOUT, pause: float = _PAUSE
    ) -> None:
        super().__init__()
        self._place = place
        self._metrics = metrics
        self._timeout = timeout
        self._pause = pause
        self.away = False  # the store did not answer, and has not since: nobody waits for it
        self._queue: list[_Asked] = []
        self._since: float | None = None  # when the turn under way began
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def shown(self) -> str:
        """The store's address, for people."""
        return self._place.shown

    async def look(self) -> None:
        """Find out whether the store answers, and say so where it does not."""
        await self._answer(self._ask("", None))

    async def fetch(self, key: str, now: float) -> None:
        """Bring what is known here of a session up to date; ``now`` in this process's monotonic seconds."""
        found = await self._answer(self._ask(key, None))
        if found is None:
            return
        state, age = found
        session, mine = decoded(state, now - age), self.get(key, now)
        if session is not None and (mine is None or mine.at <= session.at + _SAME):
            self.put(key, session)

    def share(self, key: str, now: float) -> asyncio.Future[Any]:
        """Let the other servers know what is known here of a session; done when they can.

        It is on its way when this returns: a caller that is cancelled does not hold it up.
        """
        session = self.get(key, now)
        asked = None if session is None else self._ask(key, encoded(session, now))
        return asyncio.ensure_future(self._answer(asked))

    def close(self) -> None:
        """End the thread, which has nothing to keep; blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(2 * self._timeout)

    def _ask(self, key: str, state: str | None) -> _Asked | None:
        """Put a question to the thread; None where the store is away."""
        if self.away:
            self._metrics.session_store("read" if state is None else "write", "passed")
            return None
        loop = asyncio.get_running_loop()
        asked = _Asked(key, state, loop, loop.create_future())
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
                self._thread.start()
            self._queue.append(asked)
            self._changed.notify()
        return asked

    async def _answer(self, asked: _Asked | None) -> Found | None:
        """What there is, if the store says so in time."""
        if asked is None:
            return None
        what: Literal["read", "write"] = "read" if asked.state is None else "write"
        await asyncio.wait((asked.done,), timeout=self._timeout)
        # A busy event loop may see the time run out before it sees the answer.
        if not asked.answered:
            self._metrics.session_store(what, "failed")
            since = self._since
            if since is not None and time.monotonic() - since >= self._timeout / 2:
                self._is_away(TimeoutError(f"no answer in {self._timeout:g} s"))
            return None
        self._metrics.session_store(what, "ok")
        return asked.found

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._closing and (self.away or not self._queue):
                    self._changed.wait(self._pause if self.away else None)
                if self._closing:
                    break
                batch, self._queue = self._queue[:_MOST_AT_ONCE], self._queue[_MOST_AT_ONCE:]
                self._since = time.monotonic()
            try:
                self._turn(batch)
            except Exception as error:
                self._is_away(error)
            else:
                self._is_back()
            self._since = None
            _tell(batch)
        with suppress(Exception):
            self._place.close()

    def _turn(self, batch: Sequence[_Asked]) -> None:
        reads = [one.key for one in batch if one.state is None]
        writes = {one.key: one.state for one in batch if one.state is not None}
        found = self._place.turn(reads, writes)
        for one in batch:
            one.found = found.get(one.key) if one.state is None else None
            one.answered = True

    def _is_away(self, error: Exception) -> None:
        with self._changed:
            first, self.away = not self.away, True
        if first:
            logger.error(
                "sessions: %s cannot be used: %s; each server goes on with its own until it answers",
                self._place.shown,
                " ".join(f"{type(error).__name__}: {error}".split())[:300],
            )
            self._metrics.session_store_away(True)

    def _is_back(self) -> None:
        with self._changed:
            first, self.away = self.away, False
        if first:
            logger.info("sessions: %s answers again", self._place.shown)
            self._metrics.session_store_away(False)


def _tell(batch: Iterable[_Asked]) -> None:
    """Let those go on who wait."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for one in batch:
        loops.setdefault(one.loop, []).append(one.done)

    def resolve(waiting: Iterable[asyncio.Future[None]]) -> None:
        for done in waiting:
            if not done.done():  # cancelled: its client is gone
                done.set_result(None)

    for loop, waiting in loops.items():
        with suppress(RuntimeError):  # the loop was closed; nobody waits any more
            loop.call_soon_threadsafe(resolve, waiting)


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
            from redis import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise UsageError(
                "Redis' driver is not installed: pip install 'llm-difficulty-router[redis]'"
            ) from None
        self.shown = shown(url)
        self._redis = Redis.from_url(
            url,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 1),  # a connection may be stale
            decode_responses=True,
        )
        self._milliseconds = round(FORGET_SECONDS * 1e3)

    def turn(self, reads: Sequence[str], writes: Mapping[str, str]) -> Mapping[str, Found]:
        with self._redis.pipeline(transaction=False) as pipe:
            for key, state in writes.items():
                pipe.set(_PREFIX + key, state, px=self._milliseconds)
            for key in reads:
                pipe.get(_PREFIX + key)
                pipe.pttl(_PREFIX + key)
            answers = pipe.execute()[len(writes) :]
        return {
            key: (state, max(self._milliseconds - left, 0) / 1e3)
            for key, state, left in zip(reads, answers[::2], answers[1::2], strict=True)
            if state is not None
        }

    def close(self) -> None:
        self._redis.close()


# One transaction: servers that start together make the table one after another.
_TABLE = """
SELECT pg_advisory_xact_lock(7237012, 1);
CREATE UNLOGGED TABLE IF NOT EXISTS router_sessions (
    key text PRIMARY KEY, state text NOT NULL, written timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS router_sessions_written ON router_sessions (written)
"""
_READ = """
SELECT key, state, extract(epoch FROM clock_timestamp() - written)::float8 FROM router_sessions
WHERE key = ANY(%s) AND written > clock_timestamp() - make_interval(secs => %s)
"""
_WRITE = """
INSERT INTO router_sessions SELECT *, clock_timestamp() FROM unnest(%s::text[], %s::text[])
ON CONFLICT (key) DO UPDATE SET state = excluded.state, written = excluded.written
"""
_PURGE = """
DELETE FROM router_sessions WHERE key IN (
    SELECT key FROM router_sessions WHERE written < clock_timestamp() - make_interval(secs => %s)
    ORDER BY written LIMIT %s FOR UPDATE SKIP LOCKED
)
"""
# More than that many writes can have made.
_PURGE_EVERY, _PURGE_ROWS = 500, 1_000
# Unless the URL says otherwise.
_CONNECTION: dict[str, Any] = {
    "connect_timeout": 3,
    "tcp_user_timeout": 10_000,  # ms until a server that is silently gone counts as gone
    "keepalives_idle": 10,
    "application_name": "router-sessions",
}


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
        self._connection: Connection[Any] | None = None
        self._writes = 0

    def turn(self, reads: Sequence[str], writes: Mapping[str, str]) -> Mapping[str, Found]:
        stale = self._connection is not None
        try:
            return self._turn(reads, writes)
        except Exception:
            self.close()
            if not stale:
                raise
            return self._turn(reads, writes)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _turn(self, reads: Sequence[str], writes: Mapping[str, str]) -> Mapping[str, Found]:
        connection = self._connection = self._connection or self._connected()
        if writes:
            keys = sorted(writes)  # in an order that all servers share, so that none waits in a circle
            connection.execute(_WRITE, (keys, [writes[key] for key in keys]))
            self._writes += len(keys)
            if self._writes >= _PURGE_EVERY:
                self._writes = 0
                connection.execute(_PURGE, (FORGET_SECONDS, _PURGE_ROWS))
        if not reads:
            return {}
        rows = connection.execute(_READ, (list(reads), FORGET_SECONDS))
        return {key: (state, max(age, 0.0)) for key, state, age in rows}

    def _connected(self) -> Connection[Any]:
        from psycopg import Connection

        connection = Connection.connect(self._conninfo, autocommit=True)
        try:
            connection.execute(_TABLE)
        except BaseException:
            connection.close()
            raise
        return connection


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
