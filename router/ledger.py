"""The ledger: every request, off the request path, by one thread that owns the database's connection.

Two durabilities:

``batched``
    :meth:`Ledger.record` only queues. Rows are written every 200 ms, or 500 at a time, and when the server stops. A process
    that is killed loses the requests in flight and the rows of the last 200 ms and of the transaction under way.
``strict``
    :meth:`Ledger.write` returns when its row is on the disk, so that a request whose answer ended has its row. Requests
    that wait together share a transaction. A process that is killed loses none that was waited for.

While the database is away, rows go to a local file, written to the disk as a commit would be (see :mod:`router.spill`), and are
read back when it answers again: requests go on, at neither durability is a row lost, and memory does not grow. Where that
file cannot be written either, or is over its bound, rows wait in memory; beyond that bound the newest are dropped and counted.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import platformdirs
from sqlalchemy import Engine
from sqlalchemy.engine import URL

from router.backoff import backoff
from router.entry import Entry, now
from router.errors import LedgerError
from router.ledger_migrations import migrate
from router.ledger_store import (
    captures,
    database_errors,
    entries,
    failed,
    fitting,
    is_in_place,
    is_refused,
    ledger_url,
    open_engine,
    purge,
    shown,
    write_batch,
)
from router.policy import Capture
from router.redaction import redact
from router.settings import APPLICATION
from router.spill import Spill

logger = logging.getLogger("router")

Durability = Literal["batched", "strict"]

# Rows in one transaction at most.
_TRANSACTION_ROWS = 2_000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_PURGE_SECONDS = 600.0
_LONGEST_PROMPT = 1_000_000  # characters
_MOST_PROMPT_CHARACTERS = 64_000_000  # that wait at a time


@dataclass(frozen=True, slots=True)
class LedgerStats:
    """What the ledger has done since it was opened, in rows.

    Attributes
    ----------
    written : int
        In the database, by this process; those that were spilled and read back among them.
    spilled, restored : int
        Put into the local file, and from there into the database (of other processes' files too).
    refused : int
        That the database would not take: kept in ``refused.jsonl``.
    lost : int
        Dropped: the database was away, the local file could not be written, and memory was at its bound.
    prompts_dropped : int
        Prompts that were not captured since they were too long, or too many waited.
    failures : int
        Transactions that failed and were tried again.
    pending : int
        On no disk yet.
    away : bool
        The database did not answer last time.
    lag_seconds : float
        How long the oldest of these has waited.
    """

    written: int = 0
    spilled: int = 0
    restored: int = 0
    refused: int = 0
    lost: int = 0
    prompts_dropped: int = 0
    failures: int = 0
    pending: int = 0
    away: bool = False
    lag_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that is not written yet, and who waits for it."""

    entry: Entry
    prompt: str | None
    state: str | None
    keep_days: float
    since: float
    loop: asyncio.AbstractEventLoop | None = None
    done: asyncio.Future[None] | None = None


class Ledger:
    """Writes entries to the database. Open it with :meth:`open`, and close it: it flushes.

    Parameters
    ----------
    where : str or None
        As :func:`router.ledger_store.ledger_url` reads it; a SQLite file in the user's data directory by default.
    durability : {"batched", "strict"}
    flush_seconds : float
        How long a row waits for others.
    flush_rows : int
        Rows that are not waited with.
    most_pending : int
        Rows in memory at most.
    capture : Capture or None
        Whether prompts are kept; may be assigned while the ledger is open.
    spill : Path or None
        The directory of the local file. By default beside the SQLite file, or in the user's data directory.
    most_spill_bytes : int
        Of the local file.
    """

    def __init__(
        self,
        where: str | None = None,
        *,
        durability: Durability = "batched",
        flush_seconds: float = 0.2,
        flush_rows: int = 500,
        most_pending: int = 50_000,
        capture: Capture | None = None,
        spill: Path | None = None,
        most_spill_bytes: int = 1 << 30,
    ) -> None:
        self.url = ledger_url(where)
        self.strict = durability == "strict"
        self.capture = capture
        self._flush_seconds = flush_seconds
        self._flush_rows = flush_rows
        self._most_pending = most_pending
        self._spill = Spill(spill or _spill_folder(self.url), most_spill_bytes)
        self._engine: Engine | None = None
        self._queue: deque[_Waiting] = deque()
        self._writing: list[_Waiting] = []  # taken from the queue, and not safe yet
        self._prompt_characters = 0
        self._waiters = 0
        self._changed = threading.Condition()
        self._closing = False
        self._stats = LedgerStats()
        self._pauses = 0  # failures in a row
        self._try_again = 0.0
        self._unsaved = False  # neither the database nor the local file took the last batch
        self._purge_at = 0.0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def open(self) -> Ledger:
        """Connect, migrate, and start to write.

        Raises
        ------
        LedgerError
            The database cannot be reached or made, or has a newer schema.
        """
        try:
            self._connect()
        except database_errors() as error:
            raise failed(self.url, error) from None
        self._thread.start()
        return self

    def _connect(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
        self._engine = open_engine(self.url, "create", durable=self.strict)
        try:
            migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise

    def takes(self, entry: Entry) -> bool:
        """Whether the prompt of this request is to be kept: by its row's id, the last digits of which are random."""
        return self.capture is not None and int(entry.id[-8:], 16) < self.capture.share * 2**32

    def record(self, entry: Entry, prompt: str | None = None, state: str | None = None) -> bool:
        """Queue a row; never waits for a disk. From any thread.

        Parameters
        ----------
        entry : Entry
        prompt : str or None
            Kept, redacted, where :meth:`takes` says so.
        state : str or None
            Kept beside it: numbers of the conversation that the prompt ends, as :func:`router.basis.state_of` writes them.

        Returns
        -------
        bool
            False where the row had to be dropped; it is counted.
        """
        return self._put(entry, prompt, state, None, None)

    async def write(self, entry: Entry, prompt: str | None = None, state: str | None = None) -> None:
        """Record a row, and where the ledger is strict, wait until it is on the disk.

        A caller that is cancelled meanwhile leaves the row behind: it is written all the same.

        Raises
        ------
        LedgerError
            Strict, and neither the database nor the local file could take it. It stays in memory, where there is room.
        """
        if not self.strict:
            self.record(entry, prompt, state)
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._put(entry, prompt, state, loop, done):
            raise _not_saved(self.url)
        await done

    @property
    def stats(self) -> LedgerStats:
        """Counts since the start, and the state at this moment."""
        with self._changed:
            oldest = (self._writing or self._queue or (None,))[0]
            lag = 0.0 if oldest is None else time.monotonic() - oldest.since
            pending = len(self._queue) + len(self._writing)
            return replace(self._stats, pending=pending, lag_seconds=lag)

    def close(self, timeout: float = 30.0) -> None:
        """Write what is left, to the database or to the local file, and end the thread; blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._engine is not None:
            self._engine.dispose()

    def __enter__(self) -> Ledger:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(
        self,
        entry: Entry,
        prompt: str | None,
        state: str | None,
        loop: asyncio.AbstractEventLoop | None,
        done: asyncio.Future[None] | None,
    ) -> bool:
        capture = self.capture
        keep = prompt if prompt and self.takes(entry) else None
        with self._changed:
            if self._closing or len(self._queue) + len(self._writing) >= self._most_pending:
                self._count(lost=1)
                return False
            if keep is not None:
                room = _MOST_PROMPT_CHARACTERS - self._prompt_characters
                if len(keep) > min(room, _LONGEST_PROMPT):
                    self._count(prompts_dropped=1)
                    keep = None
                else:
                    self._prompt_characters += len(keep)
            days = capture.keep_days if capture is not None else 0.0
            self._queue.append(_Waiting(entry, keep, state, days, time.monotonic(), loop, done))
            self._waiters += done is not None
            # The thread looks by itself when the first row's time is over.
            if done is not None or len(self._queue) in (1, self._flush_rows):
                self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while (patience := self._patience()) > 0:
                    self._changed.wait(patience)
                batch = self._take()
                closing = self._closing and not self._queue
            try:
                self._turn(batch)
            except Exception as error:
                # A mistake of ours must not end the thread, and so the ledger, in silence.
                logger.error("ledger: %s", type(error).__name__)
                _tell(batch, _not_saved(self.url))
                with self._changed:
                    self._count(lost=len(self._writing))
                    self._writing = []
                self._try_again = self._purge_at = time.monotonic() + _LONGEST_PAUSE
            if closing:
                self._spill.close()
                return

    def _take(self) -> list[_Waiting]:
        """The next batch; the lock is held."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), _TRANSACTION_ROWS))]
        self._waiters -= sum(one.done is not None for one in batch)
        self._writing = batch
        return batch

    def _patience(self) -> float:
        """Seconds until there is something to do; the lock is held."""
        if self._closing:
            return 0
        clock = time.monotonic()
        due = clock + _LONGEST_PAUSE if self._stats.away else self._purge_at
        if self._stats.away or self._spill.lines:
            due = min(due, self._try_again)
        if self._queue:
            if self._unsaved:
                due = min(due, self._try_again)
            elif self._waiters or len(self._queue) >= self._flush_rows:
                return 0
            else:
                due = min(due, self._queue[0].since + self._flush_seconds)
        return max(due - clock, 0)

    def _turn(self, batch: list[_Waiting]) -> None:
        """Write a batch, and whatever else is due."""
        clock = time.monotonic()
        due = clock >= self._try_again or (self._closing and not self._stats.away)
        if self._stats.away:
            # First, so that who waits for a row does not wait for a database that is away.
            self._set_aside(batch, *_rows(batch))
        elif batch:
            self._write(batch)
        if due:
            self._restore()
        if clock >= self._purge_at and not self._stats.away:
            self._purge_at = clock + _PURGE_SECONDS
            self._attempt(self._purge)

    def _write(self, batch: Sequence[_Waiting]) -> None:
        rows, prompts = _rows(batch)
        error = self._commit(rows, prompts)
        if error is None:
            self._settle(batch)
        else:
            self._set_aside(batch, rows, prompts)

    def _commit(self, rows: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> Exception | None:
        """Write to the database; the error where it is away. What it refuses is kept aside, the rest is written."""
        assert self._engine is not None
        try:
            if not is_in_place(self.url):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            with self._engine.begin() as connection:
                written = write_batch(connection, rows, prompts)
        except Exception as error:
            if not is_refused(error):
                self._is_away(error)
                return error
            if rows and prompts:
                return self._commit(rows, []) or self._commit([], prompts)
            if len(rows) + len(prompts) > 1:
                # Find the one that is refused, in halves.
                half, rest = len(rows) // 2, len(prompts) // 2
                return self._commit(rows[:half], prompts[:rest]) or self._commit(rows[half:], prompts[rest:])
            with suppress(OSError, ValueError, TypeError):
                self._spill.refuse(json.dumps({"row": rows[0]} if rows else {"prompt": prompts[0]}).encode())
            with self._changed:
                self._count(refused=len(rows))
            logger.error("ledger: a row was refused: %s", type(error).__name__)
            return None
        with self._changed:
            self._count(written=written)
        self._pauses = 0
        return None

    def _set_aside(
        self, batch: Sequence[_Waiting], rows: list[dict[str, Any]], prompts: list[dict[str, Any]]
    ) -> None:
        """Into the local file, or where that fails back into memory."""
        if not batch:
            return
        try:
            saved = self._spill.append(rows, prompts)
        except OSError as error:
            logger.error("ledger: %s: %s", self._spill.folder, error.strerror)
            saved = False
        if saved:
            with self._changed:
                self._count(spilled=len(rows))
            self._unsaved = False
            self._settle(batch)
            return
        _tell(batch, _not_saved(self.url))
        with self._changed:
            self._writing = []
            if self._closing:
                self._count(lost=len(batch))
                return
            self._queue.extendleft(replace(one, loop=None, done=None) for one in reversed(batch))
            self._unsaved = True
            self._try_again = max(self._try_again, time.monotonic() + _FIRST_PAUSE)

    def _restore(self) -> None:
        """Where the database answers, read back what was spilled; between its parts, new rows are written."""
        if self._stats.away:
            # Anew: the file, or the tables, may be gone, and rows that went there would be lost in silence.
            if not self._attempt(self._connect):
                return
            self._unsaved = False
            with self._changed:
                self._stats = replace(self._stats, away=False)
        self._try_again = time.monotonic() + _LONGEST_PAUSE
        try:
            for path in self._spill.waiting():
                if not self._restore_file(path):
                    return
        except OSError as error:
            logger.error("ledger: %s: %s", self._spill.folder, error.strerror)

    def _restore_file(self, path: Path) -> bool:
        part: list[tuple[dict[str, Any], bytes]] = []
        for line in self._spill.read(path):
            part.append(line)
            if len(part) == _TRANSACTION_ROWS and not self._restore_part(part):
                return False
        if part and not self._restore_part(part):
            return False
        self._spill.remove(path)
        return True

    def _restore_part(self, part: list[tuple[dict[str, Any], bytes]]) -> bool:
        rows, prompts = [], []
        for line, content in part:
            if (row := fitting(entries, line.get("row"))) is not None:
                rows.append(row)
            elif (prompt := fitting(captures, line.get("prompt"))) is not None:
                if prompt["expires"] > now():
                    prompts.append(prompt)
            else:
                self._spill.refuse(content)
                with self._changed:
                    self._count(refused=1)
        part.clear()
        before = self._stats.written
        if self._commit(rows, prompts) is not None:
            return False
        with self._changed:
            self._count(restored=self._stats.written - before)
            batch = self._take()
        failures = self._stats.failures
        if batch:
            self._write(batch)
        return self._stats.failures == failures

    def _purge(self) -> None:
        assert self._engine is not None
        purge(self._engine, now())

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            self._is_away(error)
            return False
        return True

    def _is_away(self, error: Exception) -> None:
        self._pauses += 1
        self._try_again = time.monotonic() + backoff(self._pauses, _FIRST_PAUSE, _LONGEST_PAUSE)
        with self._changed:
            first = not self._stats.away
            self._count(failures=1)
            self._stats = replace(self._stats, away=True)
        if first:
            logger.error("%s; rows go to %s until it answers", failed(self.url, error), self._spill.folder)

    def _settle(self, batch: Sequence[_Waiting]) -> None:
        """The batch is on a disk."""
        with self._changed:
            self._writing = []
            self._prompt_characters -= sum(len(one.prompt) for one in batch if one.prompt is not None)
        _tell(batch, None)

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + count for name, count in more.items()}
        )


def _rows(batch: Sequence[_Waiting]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [one.entry.row() for one in batch], [_prompt_row(one) for one in batch if one.prompt is not None]


def _prompt_row(one: _Waiting) -> dict[str, Any]:
    entry = one.entry.row()
    text = redact(one.prompt or "").replace("\0", "�").encode(errors="replace").decode()
    return {
        "id": entry["id"],
        "time": entry["time"],
        "expires": now() + int(one.keep_days * 86_400e6),
        "session": entry["session"],
        "client": entry["client"],
        "prompt": text,
        "state": one.state,
    }


def _tell(batch: Sequence[_Waiting], error: LedgerError | None) -> None:
    """Let those go on who wait for a row of this batch."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for one in batch:
        if one.loop is not None and one.done is not None:
            loops.setdefault(one.loop, []).append(one.done)

    def resolve(waiting: list[asyncio.Future[None]]) -> None:
        for done in waiting:
            if not done.done():  # cancelled: its client is gone
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    for loop, waiting in loops.items():
        with suppress(RuntimeError):  # the loop was closed; nobody waits any more
            loop.call_soon_threadsafe(resolve, waiting)


def _not_saved(url: URL) -> LedgerError:
    return LedgerError(
        f"the request could not be written to the ledger at {shown(url)}, nor to the local file beside it"
    )


def _spill_folder(url: URL) -> Path:
    """By the database: rows of one ledger must not end up in another."""
    if url.get_backend_name() == "sqlite":
        return Path(f"{url.database}.spill")
    name = hashlib.sha256(shown(url).encode()).hexdigest()[:12]
    return platformdirs.user_data_path(APPLICATION) / "spill" / name
