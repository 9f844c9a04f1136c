"""What the dashboard shows, read from the ledger and from what is in force.

Every figure of a whole period comes from the sums by hour and by day, so it takes as long over millions of rows as over
hundreds; of single rows the newest are read, a bounded number of them, by the index on time.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, RowMapping, and_, or_, select, text
from sqlalchemy.engine import URL

from router.entry import NANO
from router.errors import UsageError
from router.ledger_migrations import check_version
from router.ledger_store import (
    ALL,
    HOUR,
    database_errors,
    day_sums,
    entries,
    failed,
    hour_sums,
    open_engine,
)
from router.spend import DAY, Spend, check_group, query_spend

if TYPE_CHECKING:
    from router.bundle import Manifest
    from router.policy import Policy

RANGES = ("24h", "7d", "30d", "month")
GROUPS_SHOWN = 10
# Groups with a series of their own; the page has a colour for each.
GROUPS_DRAWN = 6
ROWS_SHOWN = 20
# Of the newest requests, those whose scores are counted.
SCORES_READ = 10_000
_MOST_BINS = 48
_WIDTHS = (0.01, 0.02, 0.025, 0.05, 0.1)  # a score lies between −1 and 1
CSV_GROUPS = 10_000

_READ_SECONDS = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PLAIN = (
    "request", "session", "client", "tier", "mode", "feature", "dialect", "reason", "score", "threshold", "bundle",
    "policy", "target", "model", "provider", "input_tokens", "cached_read_tokens", "cache_write_tokens", "output_tokens",
    "reasoning_tokens", "usage_estimated", "earlier_tokens", "strongest", "status", "error", "streamed", "cancelled",
    "fallbacks",
)  # fmt: skip
_DURATIONS = ("latency", "first_token", "decision")
_DOLLARS = ("cost", "strongest_cost", "earlier_cost")


@dataclass(frozen=True, slots=True)
class Period:
    """A time of whole hours, or of whole days, up to the end of the current one.

    Attributes
    ----------
    name : str
        One of :data:`RANGES`.
    slot : int
        Microseconds of an hour or of a day.
    first, last : int
        Slots since 1970; ``last`` is exclusive.
    """

    name: str
    slot: int
    first: int
    last: int

    @classmethod
    def of(cls, name: str, now: datetime) -> Period:
        """The last 24 hours, 7 or 30 days, the current one among them, or the month so far; UTC.

        Raises
        ------
        UsageError
            It is none of these.
        """
        if name not in RANGES:
            raise UsageError(f"range: {name[:64]!r} is none of {', '.join(RANGES)}")
        slot = HOUR if name == "24h" else 24 * HOUR
        last = (now - _EPOCH) // timedelta(microseconds=slot) + 1
        length = now.astimezone(UTC).day if name == "month" else {"24h": 24, "7d": 7, "30d": 30}[name]
        return cls(name, slot, last - length, last)

    @property
    def since(self) -> int:
        """Microseconds since 1970."""
        return self.first * self.slot

    @property
    def until(self) -> int:
        """Microseconds since 1970, exclusive."""
        return self.last * self.slot

    def as_json(self) -> dict[str, Any]:
        return {
            "range": self.name,
            "slot": "hour" if self.slot == HOUR else "day",
            "slots": [_iso(index * self.slot) for index in range(self.first, self.last)],
        }


@contextmanager
def reading(url: URL, seconds: float = _READ_SECONDS) -> Iterator[Connection]:
    """A connection to read the ledger with, whose queries end after so many seconds.

    Raises
    ------
    LedgerError
        The ledger is not there or cannot be read, or it took too long.
    """
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                end = time.monotonic() + seconds
                driver = connection.connection.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                driver.set_progress_handler(lambda: time.monotonic() > end, 10_000)
            else:
                connection.execute(text(f"SET LOCAL statement_timeout = {int(seconds * 1000)}"))
            check_version(connection)
            yield connection
    except database_errors() as error:
        raise failed(url, error) from None
    finally:
        engine.dispose()


def spend(connection: Connection, by: str, period: Period) -> dict[str, Any]:
    """The spend of a period by group, with what it was in each hour or day.

    Returns
    -------
    dict
        As :meth:`router.spend.Spend.as_json` gives it, and ``period``, ``series`` (all requests, a value a slot), and
        ``drawn``: of the first groups, each with its own.

    Raises
    ------
    UsageError
        There is no such group.
    """
    found = _spend(connection, by, period, GROUPS_SHOWN)
    drawn = [group.value for group in found.groups[:GROUPS_DRAWN]]
    by_group = _series(connection, by, period, [value or "" for value in drawn])
    empty = [0] * (period.last - period.first)
    nothing = {"usd": empty, "tokens": empty}
    whole = _series(connection, ALL, period, [""]).get("", {**nothing, "saved_usd": empty, "requests": empty})
    # In words the period has no end: that of the current day is still to come.
    return found.as_json() | {
        "summary": replace(found, until=None).summary(),
        "period": period.as_json(),
        "series": whole,
        "drawn": [
            {"value": value}
            | {name: by_group[value or ""][name] for name in nothing if (value or "") in by_group}
            for value in drawn
        ],
    }


def spend_csv(connection: Connection, by: str, period: Period) -> str:
    """The same as a table, of all groups up to :data:`CSV_GROUPS`."""
    return _spend(connection, by, period, CSV_GROUPS).as_csv()


def reasons(connection: Connection, period: Period) -> list[dict[str, Any]]:
    """How many requests of a period were decided for which reason, and what they cost; most requests first."""
    found = query_spend(connection, "reason", period.since, period.until, 0)
    groups = sorted(found.groups, key=lambda group: -group.sums.requests)
    return [
        {
            "reason": group.value,
            "requests": group.sums.requests,
            "share": group.sums.requests / found.total.requests,
            "usd": group.sums.cost / NANO,
        }
        for group in groups
    ]


def scores(
    connection: Connection, period: Period, bundle: str | None, threshold: float | None
) -> dict[str, Any]:
    """How the scores of a bundle lie around a threshold, over the newest requests of a period.

    Returns
    -------
    dict
        ``requests`` that were read, ``scored`` among them, ``width`` of a bin, and ``bins``: the lower end of each and how many
        scores lie above it, up to and including the next. The threshold is an end, so a bin goes to one target.
    """
    newest = (
        select(entries.c.score, entries.c.bundle)
        .where(entries.c.time >= period.since, entries.c.time < period.until)
        .order_by(entries.c.time.desc())
        .limit(SCORES_READ)
    )
    rows = connection.execute(newest).all()
    found = [score for score, made_by in rows if score is not None and made_by == bundle]
    origin = threshold or 0.0
    across = max([origin, *found]) - min([origin, *found])
    width = next((width for width in _WIDTHS if across / width <= _MOST_BINS), _WIDTHS[-1])
    counts = Counter(math.ceil((score - origin) / width) - 1 for score in found)
    indexes = range(min(counts), max(counts) + 1) if counts else range(0)
    return {
        "requests": len(rows),
        "scored": len(found),
        "complete": len(rows) < SCORES_READ,
        "width": width,
        "bins": [{"from": origin + index * width, "count": counts[index]} for index in indexes],
    }


def requests(connection: Connection, period: Period, before: tuple[int, str] | None = None) -> dict[str, Any]:
    """The newest requests of a period, those before a row where one is given.

    Parameters
    ----------
    before : (int, str), optional
        Time and id of a row: ``next`` of the page before.
    """
    row = entries.c
    query = select(entries).where(row.time >= period.since, row.time < period.until)
    if before is not None:
        query = query.where(row.time <= before[0])  # so that the index bounds it
        query = query.where(or_(row.time < before[0], and_(row.time == before[0], row.id < before[1])))
    query = query.order_by(row.time.desc(), row.id.desc()).limit(ROWS_SHOWN + 1)
    found = connection.execute(query).mappings().all()
    shown = found[:ROWS_SHOWN]
    last = shown[-1] if len(found) > ROWS_SHOWN else None
    return {
        "requests": [_request(one) for one in shown],
        "next": None if last is None else f"{last['time']}.{last['id']}",
    }


def in_force(policy: Policy, manifest: Manifest | None) -> dict[str, Any]:
    """The thresholds in force, and the bundle's curve with the point of each; no ledger is needed.

    Returns
    -------
    dict
        ``thresholds``: of each tier that predicts, the default one first; ``threshold`` is None where a tier goes by quality per
        dollar. ``curve`` is None where the bundle has none.
    """
    curve = manifest.curve if manifest is not None else None
    thresholds = []
    for name in sorted(policy.tiers, key=lambda name: name != policy.default_tier):
        tier = policy.tiers[name]
        if tier.predict is None or not tier.uses_prediction():
            continue
        by_value = tier.predict.quality_per_dollar is not None
        threshold = None if by_value else tier.predict.threshold
        point = curve.at(threshold) if curve is not None and threshold is not None else None
        thresholds.append(
            {
                "tier": name,
                "default": name == policy.default_tier,
                "threshold": threshold,
                "point": None if point is None else {"spend": point[0], "quality": point[1]},
            }
        )
    return {
        "policy": policy.hash,
        "thresholds": thresholds,
        "curve": None if curve is None else curve.model_dump(exclude={"thresholds"}),
    }


def _spend(connection: Connection, by: str, period: Period, limit: int) -> Spend:
    check_group(by)
    if by == DAY:
        raise UsageError("by: the days are in every answer; give another group")
    return query_spend(connection, by, period.since, period.until, limit)


def _series(
    connection: Connection, by: str, period: Period, values: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Of each value that has any request, what it used and cost in each slot of a period."""
    table = (hour_sums if period.slot == HOUR else day_sums).c
    slots = range(period.first, period.last)
    used = table.input_tokens + table.output_tokens + table.earlier_tokens
    # Slot by slot and value by value, which is the primary key: there may be a group for every session.
    query = select(
        table.slot, table.value, table.requests, used.label("tokens"), table.cost, table.saved
    ).where(table.kind == by, table.slot.in_(slots), table.value.in_(values))
    series: dict[str, dict[str, list[float]]] = {}
    for slot, value, number, tokens, cost, saved in connection.execute(query):
        one = series.setdefault(
            value, {name: [0] * len(slots) for name in ("requests", "tokens", "usd", "saved_usd")}
        )
        for name, amount in (
            ("requests", number),
            ("tokens", tokens),
            ("usd", cost / NANO),
            ("saved_usd", saved / NANO),
        ):
            one[name][slot - period.first] = amount
    return series


def _request(row: RowMapping | Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"time": _iso(row["time"])} | {name: row[name] for name in _PLAIN}
    for name in ("usage_estimated", "streamed", "cancelled"):
        shown[name] = bool(row[name])
    shown |= {f"{name}_usd": None if row[name] is None else row[name] / NANO for name in _DOLLARS}
    shown |= {
        f"{name}_ms": None if row[f"{name}_us"] is None else row[f"{name}_us"] / 1000 for name in _DURATIONS
    }
    return shown


def _iso(micros: int) -> str:
    return (_EPOCH + timedelta(microseconds=micros)).isoformat().replace("+00:00", "Z")
