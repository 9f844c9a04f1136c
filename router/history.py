"""Requests that were, in the order of their time: the rows of a ledger, or of a file of JSON lines with the same fields."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from router.basis import NOTHING, Basis
from router.entry import NanoPrices
from router.errors import RouterError, UsageError
from router.upstream import MOST_TOKENS, Usage

_TEXTS = (
    "request", "session", "client", "tier", "mode", "feature", "reason", "bundle", "target", "model",
)  # fmt: skip
_COUNTS = (
    "input_tokens", "cached_read_tokens", "cache_write_tokens", "output_tokens", "earlier_tokens", "earlier_cost",
)  # fmt: skip
_PRICES = ("price_input", "price_output", "price_cached_read", "price_cache_write")
# Of a ledger's row, what is read.
COLUMNS = ("id", "time", *_TEXTS, "score", *_COUNTS, *_PRICES, "cost", "status", "basis")
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(slots=True)
class Past:
    """One request. Fields are those of :class:`router.entry.Entry`; ``prompt`` and ``state`` where they were captured.

    A request that was never sent, as a generator makes it, has neither target nor cost.
    """

    id: str
    time: int
    request: str | None
    session: str | None
    client: str | None
    tier: str | None
    mode: str | None
    feature: str | None
    reason: str | None
    bundle: str | None
    target: str | None
    model: str | None
    score: float | None
    usage: Usage
    earlier_tokens: int
    earlier_cost: int
    prices: NanoPrices | None
    cost: int | None
    status: int | None
    basis: Basis
    prompt: str | None = None
    state: str | None = None

    @property
    def tokens(self) -> int:
        return self.usage.input + self.usage.output + self.earlier_tokens


def is_file_of_lines(source: str) -> bool:
    """Whether a source is a file of JSON lines, by its name; else it is a ledger."""
    return source.endswith(_SUFFIXES)


def read_history(source: str | None, since: int | None = None, until: int | None = None) -> Iterator[Past]:
    """The requests of a time, in its order, one by one: what is read is not kept.

    Parameters
    ----------
    source : str or None
        A file that ends in ``.jsonl`` or ``.jsonl.gz``, or a ledger, as :func:`router.ledger_store.ledger_url` reads it.
    since, until : int or None
        Microseconds since 1970, UTC; ``until`` is exclusive.

    Raises
    ------
    UsageError
        The file is not there.
    RouterError
        A line cannot be read; the message names file, line and field.
    LedgerError
        The ledger is not there, or cannot be read.
    """
    if source is not None and is_file_of_lines(source):
        return _of_lines(Path(source), since, until)
    return _of_ledger(source, since, until)


def _of_ledger(source: str | None, since: int | None, until: int | None) -> Iterator[Past]:
    from sqlalchemy import select

    from router.ledger_migrations import check_version
    from router.ledger_store import captures, database_errors, entries, failed, ledger_url, open_engine

    url = ledger_url(source)
    engine = open_engine(url)
    query = (
        select(*(entries.c[name] for name in COLUMNS), captures.c.prompt, captures.c.state)
        .outerjoin_from(entries, captures, captures.c.id == entries.c.id)
        .where(
            entries.c.time >= (0 if since is None else since),
            *(() if until is None else (entries.c.time < until,)),
        )
        .order_by(entries.c.time, entries.c.id)
        .execution_options(yield_per=1_000)
    )
    names = (*COLUMNS, "prompt", "state")
    try:
        with engine.connect() as connection:
            check_version(connection)
            for row in connection.execute(query):
                yield _past(dict(zip(names, row, strict=True)))
    except database_errors() as error:
        raise failed(url, error) from None
    finally:
        engine.dispose()


def _of_lines(path: Path, since: int | None, until: int | None) -> Iterator[Past]:
    before = 0
    sent: bool | None = None
    with _opened(path) as lines:
        for number, line in enumerate(_decoded(path, lines), 1):
            if not line.strip():
                continue
            try:
                past = _past(_checked(_object(line)))
                if past.time < before:
                    raise ValueError(
                        "time: is before that of the line above; the lines must stand in their order"
                    )
                if sent is not None and sent != (past.target is not None):
                    raise ValueError("target: all requests must name the one that answered, or none")
            except ValueError as error:
                raise RouterError(f"{path}:{number}: {error}") from None
            before = past.time
            sent = past.target is not None
            if (since is None or past.time >= since) and (until is None or past.time < until):
                yield past


def _opened(path: Path) -> BinaryIO:
    try:
        return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UsageError(f"{path}: no requests can be read there ({error.strerror})") from None


def _decoded(path: Path, lines: BinaryIO) -> Iterator[str]:
    try:
        for line in lines:
            yield line.decode("utf-8")
    except UnicodeDecodeError:
        raise RouterError(f"{path}: not a text file in UTF-8") from None
    except (OSError, EOFError) as error:
        raise RouterError(f"{path}: cannot be read to its end ({error})") from None


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(row, dict):
        raise ValueError("must be a JSON object")
    return row


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line's fields as a ledger's row has them; :class:`ValueError` names the one that is wrong."""
    found: dict[str, Any] = {name: row.get(name) for name in (*COLUMNS, "prompt", "state")}
    for name in ("id", *_TEXTS, "prompt", "state"):
        if not isinstance(found[name], str | None):
            raise ValueError(f"{name}: must be a text")
    found["id"] = found["id"] or ""
    found["time"] = _time(found["time"])
    for name in _COUNTS:
        found[name] = _count(name, 0 if found[name] is None else found[name])
    for name in (*_PRICES, "cost", "status"):
        if found[name] is not None:
            _count(name, found[name])
    if found["cached_read_tokens"] + found["cache_write_tokens"] > found["input_tokens"]:
        raise ValueError("input_tokens: must hold the cached ones too")
    prices = [found[name] for name in _PRICES]
    if None in prices and any(price is not None for price in prices):
        raise ValueError(f"{_PRICES[prices.index(None)]}: is missing")
    if isinstance(found["score"], bool) or not isinstance(found["score"], int | float | None):
        raise ValueError("score: must be a number")
    return found


def _time(value: Any) -> int:
    """Microseconds since 1970, given as such or as a date and time."""
    if isinstance(value, str):
        try:
            read = datetime.fromisoformat(value.upper())
        except ValueError:
            raise ValueError("time: must be a date and time, or microseconds since 1970") from None
        read = read if read.tzinfo is not None else read.replace(tzinfo=UTC)
        return round(read.timestamp() * 1e6)
    if value is None:
        raise ValueError("time: is missing")
    return _count("time", value, 1 << 62)


def _count(name: str, value: Any, most: int = MOST_TOKENS * 1_000) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name}: must be a whole number, 0 or more")
    return value


def _past(row: Mapping[str, Any]) -> Past:
    prices = None
    if row["price_input"] is not None:
        prices = NanoPrices(*(row[name] for name in _PRICES))
    usage = Usage(
        row["input_tokens"], row["output_tokens"], row["cached_read_tokens"], row["cache_write_tokens"]
    )
    return Past(
        row["id"], row["time"], row["request"], row["session"], row["client"], row["tier"], row["mode"],
        row["feature"], row["reason"], row["bundle"], row["target"], row["model"], row["score"], usage,
        row["earlier_tokens"], row["earlier_cost"], prices, row["cost"], row["status"], _basis(row),
        row["prompt"], row["state"],
    )  # fmt: skip


def _basis(row: Mapping[str, Any]) -> Basis:
    """What a row was decided on; of one that was written before that was kept, what follows from the rest of it."""
    kept = row["basis"]
    if kept is None:
        pinned = row["tier"] is None and row["target"] is not None
        return Basis(row["target"] if pinned else row["tier"] or "auto", content=NOTHING)
    if isinstance(kept, str):
        try:
            kept = json.loads(kept)
        except ValueError:
            raise ValueError("basis: cannot be read") from None
    if not isinstance(kept, dict):
        raise ValueError("basis: must be an object")
    try:
        return Basis.read(kept)
    except ValueError as error:
        raise ValueError(f"basis.{error}") from None
