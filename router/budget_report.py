"""How the budgets stand, for a person and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from router.budget_store import Store, Totals
from router.budgets import Budgets, Count, Limit, iso
from router.entry import NANO

if TYPE_CHECKING:
    from rich.table import Table

# Rows of keys and features that the policy does not name itself; those that have used most of their amount.
_MOST = 100


@dataclass(frozen=True, slots=True)
class Standing:
    """One budget.

    Attributes
    ----------
    count : Count
    amount : int
        Nano-dollars.
    totals : Totals
    time : int
        Of which it is told: microseconds since 1970.
    """

    count: Count
    amount: int
    totals: Totals
    time: int

    @property
    def remaining(self) -> int:
        """Nano-dollars that are neither spent nor held; less than none where more was spent than there is."""
        return self.amount - self.totals.spent - self.totals.reserved

    @property
    def used(self) -> float:
        """The share that is spent."""
        return self.totals.spent / self.amount if self.amount else 1.0

    @property
    def pace(self) -> float:
        """How many times the amount is spent by the end of the period, at the mean rate since it began."""
        elapsed = max(self.time - self.count.start, 1) / (self.count.end - self.count.start)
        return self.used / elapsed

    def as_json(self) -> dict[str, Any]:
        """Amounts in dollars."""
        return {
            "scope": self.count.scope,
            "name": self.count.name or None,
            "period": self.count.period,
            "amount": self.amount / NANO,
            "spent": self.totals.spent / NANO,
            "reserved": self.totals.reserved / NANO,
            "remaining": self.remaining / NANO,
            "requests": self.totals.requests,
            "resets_at": iso(self.count.end),
            "pace": round(self.pace, 4),
            "threshold": self.totals.threshold,
        }


def standings(budgets: Budgets, totals: Mapping[Count, Totals], time: int) -> list[Standing]:
    """The budgets at a time: those that the policy names, then others that requests came for, the fullest first."""
    named = budgets.named(time)
    found = [_standing(limit, totals, time) for limit in named]
    others = [
        Standing(count, amount, total, time)
        for count, total in totals.items()
        if count.start <= time < count.end
        and (amount := budgets.amount(count)) is not None
        and Limit(count, amount) not in named
    ]
    return found + sorted(others, key=lambda one: (-one.used, one.count))[:_MOST]


def known_standings(budgets: Budgets, totals: Mapping[Count, Totals], time: int) -> list[Standing]:
    """Of the budgets that the policy names those that are known."""
    return [_standing(limit, totals, time) for limit in budgets.named(time) if limit.count in totals]


def read_standings(budgets: Budgets, store: Store, time: int) -> list[Standing]:
    """:func:`standings` by what a store has; blocks, and raises what a store does."""
    return standings(budgets, store.read(time), time)


def as_json(budgets: Budgets, found: Sequence[Standing]) -> dict[str, Any]:
    """What ``/v1/budgets`` answers."""
    return {
        "at_limit": budgets.at_limit,
        "on_outage": budgets.on_outage,
        "budgets": [one.as_json() for one in found],
    }


def summary(found: Sequence[Standing]) -> str:
    """In one line: the budget that is nearest to its end."""
    if not found:
        return "The policy names no budget, and no request came for another."
    first = max(found, key=lambda one: one.used)
    last = f"; paced: threshold {first.totals.threshold:.4g}" if first.totals.threshold is not None else ""
    spent, amount = first.totals.spent / NANO, first.amount / NANO
    words = first.count.words
    return (
        f"{words[0].upper()}{words[1:]}: ${spent:,.2f} of ${amount:,.2f} spent ({first.used:.0%}), "
        f"{first.pace:.0%} at this pace by {iso(first.count.end)}{last}."
    )


def table(found: Sequence[Standing]) -> Table:
    """All of them, in dollars."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in ("budget", "period"):
        shown.add_column(name)
    for name in ("amount", "spent", "held", "left", "pace", "threshold"):
        shown.add_column(name, justify="right")
    for one in found:
        shown.add_row(*_cells(one))
    return shown


def _cells(one: Standing) -> Iterator[str]:
    yield one.count.scope + (f" {one.count.name}" if one.count.name else "")
    yield one.count.period
    for amount in (one.amount, one.totals.spent, one.totals.reserved, one.remaining):
        yield f"{amount / NANO:,.4f}"
    yield f"{one.pace:.0%}"
    yield "" if one.totals.threshold is None else f"{one.totals.threshold:.4f}"


def _standing(limit: Limit, totals: Mapping[Count, Totals], time: int) -> Standing:
    return Standing(limit.count, limit.amount, totals.get(limit.count, Totals()), time)
