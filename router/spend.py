"""Where the money goes: tokens and dollars of the ledger by group.

Whole days and hours come from the sums that are kept with the rows, what is left of the first and the last hour from the
rows themselves: exact for any time, and over millions of rows as fast as there are few groups.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    RowMapping,
    Select,
    Subquery,
    Table,
    Text,
    case,
    cast,
    func,
    literal,
    select,
    text,
    union_all,
)

from router.entry import NANO
from router.errors import UsageError
from router.ledger_migrations import check_version
from router.ledger_store import (
    ALL,
    GROUPS,
    HOUR,
    SUMMED,
    database_errors,
    day_sums,
    entries,
    failed,
    hour_sums,
    ledger_url,
    open_engine,
)

DAY = "day"
BY = (*GROUPS, DAY)

_WORDS = ("today", "yesterday", "week", "month", "year", "now")
_TOKENS = ("input_tokens", "output_tokens", "earlier_tokens")
_SLOTS = ((day_sums, 24 * HOUR), (hour_sums, HOUR), (entries, 1))  # in microseconds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RELATIVE = re.compile(r"(\d{1,6})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class Sums:
    """What some requests used and cost.

    Attributes
    ----------
    requests, failed : int
        ``failed``: answered with a status of 400 or more.
    estimated : int
        Requests whose provider sent no usage: their tokens are an estimate.
    unpriced : int
        Requests to a target without prices: in the tokens, but not in the dollars.
    input_tokens, output_tokens : int
        ``cached_read_tokens`` and ``cache_write_tokens`` are parts of the former, ``reasoning_tokens`` of the latter.
    earlier_tokens : int
        Of attempts before the one that answered.
    cost : int
        Nano-dollars.
    strongest_cost, saved : int
        Nano-dollars: what the same tokens would have cost at the strongest target, and how much more that is. Estimates.
    """

    requests: int = 0
    failed: int = 0
    estimated: int = 0
    unpriced: int = 0
    input_tokens: int = 0
    cached_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    earlier_tokens: int = 0
    cost: int = 0
    strongest_cost: int = 0
    saved: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.input_tokens + self.output_tokens + self.earlier_tokens

    @property
    def cache_share(self) -> float:
        """The part of the input that was read from a cache."""
        return self.cached_read_tokens / self.input_tokens if self.input_tokens else 0.0

    def __sub__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(Sums)))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Sums)))


@dataclass(frozen=True, slots=True)
class Group:
    """One value of what is grouped by; None is for requests without one."""

    value: str | None
    sums: Sums


@dataclass(frozen=True, slots=True)
class Spend:
    """The spend of a time, by group.

    Attributes
    ----------
    by : str
        One of :data:`BY`.
    since, until : int or None
        Microseconds since 1970, UTC; ``until`` is exclusive. None: from the first row, to the last.
    total : Sums
    groups : tuple of Group
        Those with the most tokens, in that order.
    dearest : Group or None
        The one with the most dollars.
    groups_total : int
        How many there are.
    """

    by: str
    since: int | None
    until: int | None
    total: Sums
    groups: tuple[Group, ...]
    dearest: Group | None
    groups_total: int

    @property
    def others(self) -> Sums:
        """All groups that are not in ``groups``, together."""
        return self.total - sum((group.sums for group in self.groups), Sums())

    def share(self, sums: Sums) -> float:
        """Of all tokens."""
        return sums.tokens / self.total.tokens if self.total.tokens else 0.0

    def summary(self) -> str:
        """Where the spend is, in words."""
        total, time = self.total, _period(self.since, self.until)
        if not total.requests:
            return f"No requests {time}."
        sizes = (
            f"{dollars(total.cost)} for {count(total.tokens)} tokens in {_requests(total.requests)} {time}."
        )
        if not total.tokens or self.dearest is None:
            return f"Nothing was used: {sizes}"
        most, dearest = self.groups[0], self.dearest
        if self.groups_total == 1 and most.value is None:
            return f"No request names a {self.by} (try another --by): {sizes}"
        takes = "take" if most.value is None else "takes"
        tokens = f"{percent(self.share(most.sums))} of the tokens"
        if not total.cost:
            return f"{_named(self.by, most.value)} {takes} {tokens}: {sizes}"
        money = f"{percent(dearest.sums.cost / total.cost)} of the dollars"
        if dearest.value == most.value:
            return f"{_named(self.by, most.value)} {takes} {money} and {tokens}: {sizes}"
        takes = "take" if dearest.value is None else "takes"
        other = _named(self.by, most.value)
        return f"{_named(self.by, dearest.value)} {takes} {money}, {other[0].lower()}{other[1:]} {tokens}: {sizes}"

    def as_json(self) -> dict[str, Any]:
        """For a program: integers in nano-dollars, beside them dollars; ``*_estimate`` are estimates."""
        return {
            "by": self.by,
            "since": _iso(self.since),
            "until": _iso(self.until),
            "summary": self.summary(),
            "total": self._row(self.total),
            "groups": [{self.by: group.value, **self._row(group.sums)} for group in self.groups],
            "groups_total": self.groups_total,
            "others": self._row(self.others) if self.groups_total > len(self.groups) else None,
        }

    def as_csv(self) -> str:
        """A line a group, under a line of names; the columns are those of :meth:`as_json`.

        A value that a spreadsheet would run as a formula gets an apostrophe in front: clients choose some of them.
        """
        file = io.StringIO()
        writer = csv.DictWriter(file, [self.by, *self._row(Sums())], lineterminator="\n")
        writer.writeheader()
        for group in self.groups:
            writer.writerow({self.by: _harmless(group.value or ""), **self._row(group.sums)})
        return file.getvalue()

    def _row(self, sums: Sums) -> dict[str, Any]:
        return {
            "requests": sums.requests,
            "failed": sums.failed,
            "input_tokens": sums.input_tokens,
            "cached_read_tokens": sums.cached_read_tokens,
            "cache_write_tokens": sums.cache_write_tokens,
            "output_tokens": sums.output_tokens,
            "reasoning_tokens": sums.reasoning_tokens,
            "earlier_tokens": sums.earlier_tokens,
            "tokens": sums.tokens,
            "tokens_share": round(self.share(sums), 6),
            "cache_share": round(sums.cache_share, 6),
            "cost_nano_usd": sums.cost,
            "cost_usd": sums.cost / NANO,
            "strongest_cost_usd_estimate": sums.strongest_cost / NANO,
            "saved_usd_estimate": sums.saved / NANO,
            "usage_estimated_requests": sums.estimated,
            "unpriced_requests": sums.unpriced,
        }


def read_spend(
    where: str | None = None,
    *,
    by: str = "mode",
    since: str | None = None,
    until: str | None = None,
    limit: int = 20,
) -> Spend:
    """The spend of a ledger.

    Parameters
    ----------
    where : str or None
        As :func:`router.ledger_store.ledger_url` reads it.
    by : str
        One of :data:`BY`.
    since, until : str or None
        As :func:`moment` reads them.
    limit : int
        Groups at most; 0 for all.

    Raises
    ------
    UsageError
        There is no such group or time.
    LedgerError
        The ledger is not there, or cannot be read.
    """
    now = datetime.now(UTC)
    check_group(by)
    start = None if since is None else moment(since, now, "--since")
    end = None if until is None else moment(until, now, "--until")
    url = ledger_url(where)
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            check_version(connection)
            return query_spend(connection, by, start, end, limit)
    except database_errors() as error:
        raise failed(url, error) from None
    finally:
        engine.dispose()


def check_group(by: str) -> None:
    """Raise :class:`UsageError` where there is no such group."""
    if by not in BY:
        raise UsageError(f"--by: there is no group {by[:64]!r}; there are: {', '.join(BY)}")


def query_spend(
    connection: Connection,
    by: str = "mode",
    since: int | None = None,
    until: int | None = None,
    limit: int = 20,
) -> Spend:
    """As :func:`read_spend`, on a connection; times are microseconds since 1970, UTC."""
    if since is not None and until is not None and since >= until:
        raise UsageError("--since: must be before --until")
    if connection.dialect.name == "postgresql":
        # For the groups of all sessions: with the usual 4 MB they go over the disk; compiling takes longer than it saves.
        connection.execute(text("SET LOCAL work_mem = '64MB'"))
        connection.execute(text("SET LOCAL jit = off"))
    first, groups_total = None, None
    if limit:
        # First which are wanted, by few of the sums: there may be a group for every session.
        first, groups_total = _first(connection, by, since, until, limit)
    groups = [_group(by, row) for row in connection.execute(_grouped(by, since, until, first)).mappings()]
    groups.sort(key=lambda group: (-group.sums.tokens, group.value or ""))
    everything = connection.execute(_grouped(ALL, since, until)).mappings().first()
    return Spend(
        by,
        since,
        until,
        Sums() if everything is None else _sums(everything),
        tuple(groups[:limit] if limit else groups),
        max(groups, key=lambda group: group.sums.cost, default=None),
        len(groups) if groups_total is None else groups_total,
    )


def moment(written: str, now: datetime, flag: str) -> int:
    """A time as people write it, in microseconds since 1970.

    ``2026-01-31`` (its first moment), ``2026-01`` (the month's), ``2026-01-31T12:00`` (UTC, or with an offset), ``30m`` ``24h``
    ``7d`` ``2w`` (ago), ``today`` ``yesterday`` ``week`` ``month`` ``year`` (when it began) and ``now``, all UTC.

    Raises
    ------
    UsageError
        It is none of these.
    """
    word = written.strip().lower()
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if word in _WORDS:
        begins = {
            "now": now,
            "today": today,
            "yesterday": today - timedelta(days=1),
            "week": today - timedelta(days=today.weekday()),
            "month": today.replace(day=1),
            "year": today.replace(month=1, day=1),
        }
        return _micros(begins[word])
    try:
        if ago := _RELATIVE.fullmatch(word):
            return _micros(now - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        if re.fullmatch(r"\d{4}-\d{2}", word):
            word += "-01"
        read = datetime.fromisoformat(word.upper())
        return _micros(read if read.tzinfo is not None else read.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise UsageError(
            f"{flag}: {written[:64]!r} is no time; give 2026-01-31, 2026-01-31T12:00, 7d, 24h, or {', '.join(_WORDS)}"
        ) from None


def count(number: int) -> str:
    """A number of tokens or requests, short."""
    for size, sign in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= max(size, 10_000):
            parts = number / size
            return f"{parts:,.0f} {sign}" if abs(parts) >= 99.95 else f"{parts:.3g} {sign}"
    return f"{number:,}"


def dollars(nano: int) -> str:
    """Nano-dollars as a person reads them: cents from a dollar up, more digits below."""
    amount, sign = abs(nano) / NANO, "-" if nano < 0 else ""
    if nano == 0 or amount >= 1:
        return f"{sign}${amount:,.2f}"
    if amount >= 0.01:
        return f"{sign}${amount:.4f}"
    return f"{sign}${amount:.6f}" if amount >= 1e-6 else f"{sign}<$0.000001".replace("-<", "<-")


def percent(share: float) -> str:
    """A share: whole from 10 % up; never 100 % for less than all, nor 0 % for more than nothing."""
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.995 <= share < 1:
        return ">99 %"
    return f"{share:.0%}".replace("%", " %") if share >= 0.0995 or share == 0 else f"{share * 100:.1f} %"


def table(spend: Spend) -> Any:
    """The groups as a rich table."""
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column(spend.by, overflow="fold")
    for name in ("requests", "tokens", "share", "in", "cached", "out", "dollars", "saved (est.)"):
        view.add_column(name, justify="right", no_wrap=True)

    def add(name: Text, sums: Sums, style: str = "") -> None:
        view.add_row(
            name,
            f"{sums.requests:,}",
            count(sums.tokens),
            percent(spend.share(sums)),
            count(sums.input_tokens),
            percent(sums.cache_share),
            count(sums.output_tokens),
            dollars(sums.cost) if sums.cost or sums.unpriced < sums.requests else "no price",
            dollars(sums.saved),
            style=style,
        )

    for group in spend.groups:
        add(Text("(none)", "italic") if group.value is None else Text(group.value), group.sums)
    more = spend.groups_total - len(spend.groups)
    if more > 0:
        add(Text(f"({more:,} more)", "italic"), spend.others)
    if spend.groups_total > 1:
        add(Text("all"), spend.total, "bold")
    return view


def notes(spend: Spend) -> Iterator[str]:
    """What must be known to read the figures."""
    total = spend.total
    if total.saved:
        yield "saved: an estimate, the same tokens at the strongest target's prices"
    if total.estimated:
        yield f"{_requests(total.estimated)} without usage from the provider: tokens and dollars are estimates"
    if total.unpriced:
        yield f"{_requests(total.unpriced)} to targets without prices: not in the dollars"
    if total.earlier_tokens:
        yield f"{count(total.earlier_tokens)} tokens went to attempts that did not give the answer: in tokens and dollars"


def _first(
    connection: Connection, by: str, since: int | None, until: int | None, limit: int
) -> tuple[list[str], int]:
    """The values with the most tokens and the one with the most dollars, and how many there are.

    By sums in floating point: PostgreSQL adds integers up as decimals, which takes three times as long.
    """
    rows = _rows_of(by, since, until, (*_TOKENS, "cost"))
    used = rows.c.input_tokens + rows.c.output_tokens + rows.c.earlier_tokens
    every = (
        select(
            rows.c.value,
            func.sum(cast(used, Double)).label("tokens"),
            func.sum(cast(rows.c.cost, Double)).label("cost"),
        )
        .group_by(rows.c.value)
        .cte("every")
    )
    order = (every.c.tokens.desc(), every.c.value)
    most = select(every.c.value).order_by(*order).limit(limit).subquery()
    dearest = select(every.c.value).order_by(every.c.cost.desc(), *order).limit(1).subquery()
    total = select(literal("total"), cast(func.count(), Text)).select_from(every)
    wanted = [select(literal("wanted"), one.c.value) for one in (most, dearest)]
    found = connection.execute(union_all(total, *wanted)).all()
    values = {value for what, value in found if what == "wanted"}
    return sorted(values), next(int(value) for what, value in found if what == "total")


def _grouped(by: str, since: int | None, until: int | None, only: Sequence[str] | None = None) -> Select[Any]:
    """Sums by value, of these values alone where they are given."""
    rows = _rows_of(by, since, until, SUMMED, only)
    return select(rows.c.value, *(func.sum(rows.c[name]).label(name) for name in SUMMED)).group_by(
        rows.c.value
    )


def _rows_of(
    by: str, since: int | None, until: int | None, names: Sequence[str], only: Sequence[str] | None = None
) -> Subquery:
    """What is to be added up by value: whole days and hours as they are kept, what is left of an hour from the rows."""
    parts = [
        _of_rows(by, start, end, names, only)
        if table is entries
        else _of_sums(by, table, start, end, names, only)
        for table, start, end in _slices(since, until)
    ]
    return (parts[0] if len(parts) == 1 else union_all(*parts)).subquery()


def _slices(
    since: int | None, until: int | None, tables: tuple[tuple[Table, int], ...] = _SLOTS
) -> Iterator[tuple[Table, int | None, int | None]]:
    """A time, cut into whole days, whole hours and the rest: a table each, with its first slot and the one after its last."""
    table, size = tables[0]
    first = None if since is None else -(-since // size)
    last = None if until is None else until // size
    if first is not None and last is not None and first >= last and size > 1:
        yield from _slices(since, until, tables[1:])
        return
    yield table, first, last
    if since is not None and first is not None and since < first * size:
        yield from _slices(since, first * size, tables[1:])
    if until is not None and last is not None and until > last * size:
        yield from _slices(last * size, until, tables[1:])


def _of_sums(
    by: str,
    table: Table,
    first: int | None,
    last: int | None,
    names: Sequence[str],
    only: Sequence[str] | None,
) -> Select[Any]:
    day = table.c.slot if table is day_sums else table.c.slot // 24
    value = cast(day, Text) if by == DAY else table.c.value
    query = select(value.label("value"), *(table.c[name] for name in names))
    query = query.where(table.c.kind == (ALL if by == DAY else by))
    if only is not None:
        query = query.where(value.in_(only))
    if first is not None:
        query = query.where(table.c.slot >= first)
    return query if last is None else query.where(table.c.slot < last)


def _of_rows(
    by: str, since: int | None, until: int | None, names: Sequence[str], only: Sequence[str] | None
) -> Select[Any]:
    if by == DAY:
        value: ColumnElement[Any] = cast(entries.c.time // (24 * HOUR), Text)
    else:
        value = literal("") if by == ALL else func.coalesce(entries.c[GROUPS[by]], "")
    row = entries.c
    summed: dict[str, ColumnElement[Any]] = {
        "requests": literal(1),
        "failed": case((row.status >= 400, 1), else_=0),
        "estimated": case((row.usage_estimated, 1), else_=0),
        "unpriced": case((row.cost.is_(None), 1), else_=0),
        "cost": func.coalesce(row.cost, 0),
        "strongest_cost": func.coalesce(row.strongest_cost, 0),
        "saved": func.coalesce(row.strongest_cost - row.cost, 0),
    }
    columns = ((summed[name] if name in summed else row[name]).label(name) for name in names)
    query = select(value.label("value"), *columns).where(row.time >= since, row.time < until)
    return query if only is None else query.where(value.in_(only))


def _group(by: str, row: RowMapping) -> Group:
    value: str | None = row["value"] or None
    if by == DAY and value is not None:
        value = (_EPOCH + timedelta(days=int(value))).date().isoformat()
    return Group(value, _sums(row))


def _sums(row: RowMapping) -> Sums:
    return Sums(**{name: int(row[name]) for name in SUMMED})  # PostgreSQL adds integers up to decimals


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _iso(micros: int | None) -> str | None:
    return None if micros is None else (_EPOCH + timedelta(microseconds=micros)).isoformat()


def _period(since: int | None, until: int | None) -> str:
    def shown(micros: int) -> str:
        time = _EPOCH + timedelta(microseconds=micros)
        return time.strftime("%Y-%m-%d" if not micros % (24 * HOUR) else "%Y-%m-%d %H:%M")

    if since is None:
        return "so far" if until is None else f"before {shown(until)}"
    return f"since {shown(since)}" + ("" if until is None else f", before {shown(until)}")


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{count(number)} requests"


def _named(by: str, value: str | None) -> str:
    return f"Requests without a {by}" if value is None else f"{by.capitalize()} {value}"


def _harmless(value: str) -> str:
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
