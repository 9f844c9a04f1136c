"""Budgets of a policy: how much, for whom, in which period, and what happens where it runs out.

A count is what one budget counts: of the whole workload, of a client's key or of a feature, in one calendar month or day
of UTC. It is named by its period, so that a clock that goes backwards finds the count of before, and none is ever reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Scope = Literal["workload", "key", "feature"]
SECOND = 1_000_000  # microseconds
_NANO = 1_000_000_000

# Nano-dollars of more than this are not exact in a Lua script, whose numbers are doubles.
_MOST_DOLLARS = 5_000_000

Dollars = Annotated[float, Field(ge=0, le=_MOST_DOLLARS)]
Share = Annotated[float, Field(ge=0, le=1)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Amounts(_Section):
    """US dollars of a calendar month and of a day, both by UTC; None is no limit."""

    month: Dollars | None = None
    day: Dollars | None = None


class Pacing(_Section):
    """How spending is slowed down so that a budget lasts.

    Attributes
    ----------
    start : float
        The share of the amount from which on it is looked at.
    highest_threshold : float
        The threshold is raised up to this and no further.
    bar : {"hold", "cross"}
        What becomes of a tier or mode that asks for a ``quality``: its threshold stays, or is raised like any other. Both are
        told and counted.
    """

    start: Share = 0.1
    highest_threshold: Annotated[float, Field(ge=-1, le=1)] = 1
    bar: Literal["hold", "cross"] = "hold"


class Budgets(_Section):
    """What may be spent.

    Attributes
    ----------
    workload : Amounts
        By all requests together.
    each_key, each_feature : Amounts
        By each client's key, and by each feature that requests are tagged with, which is not listed.
    keys, features : mapping
        By some of them, in the place of that; ``{}`` is no limit.
    at_limit : {"cheapest", "refuse"}
        What becomes of a request that the budget has no room for.
    pacing : Pacing or None
    on_outage : {"allow", "refuse"}
        What becomes of requests while the counts cannot be reached.
    """

    workload: Amounts = Amounts()
    each_key: Amounts = Amounts()
    keys: Mapping[Tag, Amounts] = Field(default_factory=dict)
    each_feature: Amounts = Amounts()
    features: Mapping[Tag, Amounts] = Field(default_factory=dict)
    at_limit: Literal["cheapest", "refuse"] = "cheapest"
    pacing: Pacing | None = Pacing()
    on_outage: Literal["allow", "refuse"] = "allow"

    @model_validator(mode="after")
    def _limits_something(self) -> Budgets:
        if not any(amounts.model_dump(exclude_none=True) for amounts in self._all()):
            raise ValueError(
                "no amount is given: a month or a day of workload, each_key, keys, each_feature or features"
            )
        return self

    def _all(self) -> Iterator[Amounts]:
        yield from (self.workload, self.each_key, self.each_feature)
        yield from self.keys.values()
        yield from self.features.values()

    def limits(self, client: str | None, feature: str | None, time: int) -> tuple[Limit, ...]:
        """What limits a request of this client's key and feature, which came at ``time``, microseconds since 1970."""
        found = [("workload", "", self.workload)]
        if client:
            found.append(("key", client, self.keys.get(client, self.each_key)))
        if feature:
            found.append(("feature", feature, self.features.get(feature, self.each_feature)))
        return tuple(_limits(found, time))

    def named(self, time: int) -> tuple[Limit, ...]:
        """What the policy names itself: of the workload, and of the listed keys and features."""
        found = [("workload", "", self.workload)]
        found += [("key", name, amounts) for name, amounts in self.keys.items()]
        found += [("feature", name, amounts) for name, amounts in self.features.items()]
        return tuple(_limits(found, time))

    def amount(self, count: Count) -> int | None:
        """Nano-dollars that the policy allows to a count; None where it does not limit it."""
        time = count.start
        client = count.name if count.scope == "key" else None
        feature = count.name if count.scope == "feature" else None
        limits = {limit.count: limit.amount for limit in self.limits(client, feature, time)}
        return limits.get(count)


@dataclass(frozen=True, slots=True, order=True)
class Count:
    """What one budget counts; ``period`` is ``2026-11`` or ``2026-11-22``."""

    scope: str
    name: str
    period: str

    @property
    def id(self) -> str:
        """One text for all of it, as the stores know it."""
        return f"{self.period}/{self.scope}/{self.name}"

    @classmethod
    def of(cls, id: str) -> Count:
        """The count with this :attr:`id`."""
        period, scope, name = id.split("/", 2)
        return cls(scope, name, period)

    @property
    def start(self) -> int:
        """When its period began, microseconds since 1970."""
        return bounds(self.period)[0]

    @property
    def end(self) -> int:
        """When its period is over, and the next begins."""
        return bounds(self.period)[1]

    @property
    def words(self) -> str:
        """For a person: ``the budget of key team-a for 2026-11``."""
        whose = "the budget" if self.scope == "workload" else f"the budget of {self.scope} {self.name}"
        return f"{whose} for {self.period}"


@dataclass(frozen=True, slots=True)
class Limit:
    """A count, and the nano-dollars that it may come to."""

    count: Count
    amount: int


@dataclass(frozen=True, slots=True)
class Pace:
    """The threshold that pacing has in force for a request.

    Attributes
    ----------
    threshold : float
    why : str
        In words for a person.
    """

    threshold: float
    why: str


@lru_cache(maxsize=256)
def bounds(period: str) -> tuple[int, int]:
    """When a period begins and when it is over, microseconds since 1970, UTC."""
    year, month, *day = (int(part) for part in period.split("-"))
    if day:
        start = datetime(year, month, day[0], tzinfo=UTC)
        end = start + timedelta(days=1)
    else:
        start = datetime(year, month, 1, tzinfo=UTC)
        end = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    return _microseconds(start), _microseconds(end)


def periods(time: int) -> tuple[str, str]:
    """The month and the day that a time, microseconds since 1970, is in, by UTC."""
    return _periods(time // SECOND // 86_400)


def iso(time: int) -> str:
    """A time in microseconds since 1970 as a person reads it, to the second."""
    return datetime.fromtimestamp(time // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(maxsize=16)
def _periods(day: int) -> tuple[str, str]:
    text = datetime.fromtimestamp(day * 86_400, UTC).strftime("%Y-%m-%d")
    return text[:7], text


def _limits(found: list[tuple[str, str, Amounts]], time: int) -> Iterator[Limit]:
    month, day = periods(time)
    for scope, name, amounts in found:
        for period, dollars in ((month, amounts.month), (day, amounts.day)):
            if dollars is not None:
                yield Limit(Count(scope, name, period), round(dollars * _NANO))


def _microseconds(time: datetime) -> int:
    return int(time.timestamp()) * SECOND
