"""How far the threshold has to rise so that a budget lasts: pure, from what was spent, the traffic and what requests cost.

Of recent requests it is known what each would have cost at every threshold. The lowest threshold is taken at which the
requests that are still to come in the period, each like these, cost what is left. Because that is asked again every few
seconds, an error in any of its guesses is made good by the rest of the period.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from router.budgets import SECOND, Pacing

HOUR = 3600 * SECOND
_DAY, _WEEK = 24, 168  # hours
_KEPT_HOURS = 15 * _DAY

# Requests that a threshold is made from.
SAMPLES = 1_000
_FEWEST_SAMPLES = 30
# A threshold stays that lets so much of what is left be spent, and changes by no more than this at a time.
_CLOSE = 0.98
_STEP = 0.05
# Traffic that grew or shrank is taken to go on so, within these.
_LEAST_GROWTH, _MOST_GROWTH = 0.25, 4.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one request costs, by the threshold.

    Attributes
    ----------
    cost : int
        Nano-dollars by the policy's own rule.
    savings : tuple of (float, int)
        Thresholds, rising, from each of which on so much less is paid; none where no threshold moves it.
    """

    cost: int
    savings: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, losses: Sequence[float], costs: Sequence[int]) -> Sample:
        """A request that goes to the last of some targets by itself, and to the first whose loss a threshold allows.

        Parameters
        ----------
        losses : sequence of float
            The quality that each target is predicted to lose against the best, cheapest first.
        costs : sequence of int
            Nano-dollars of the request at each.
        """
        savings = []
        below = math.inf  # where a cheaper one takes over
        paid = costs[0]
        for loss, cost in zip(losses[:-1], costs[:-1], strict=True):
            if loss < below:
                if below < math.inf:
                    savings.append((below, cost - paid))
                below, paid = loss, cost
        if below < math.inf:
            savings.append((below, costs[-1] - paid))
        return cls(costs[-1], tuple(reversed(savings)))


class Samples:
    """The most recent requests; ``rows`` may be appended to."""

    def __init__(self, rows: Iterable[Sample] = ()) -> None:
        self.rows: deque[Sample] = deque(rows, maxlen=SAMPLES)

    def __len__(self) -> int:
        return len(self.rows)

    def curve(self) -> Curve:
        """What a request costs in the mean, by the threshold."""
        rows = tuple(self.rows)
        savings = sorted(saving for row in rows for saving in row.savings)
        thresholds = np.array([threshold for threshold, _ in savings])
        saved = np.cumsum([amount for _, amount in savings], dtype=np.float64)
        total = float(sum(row.cost for row in rows))
        return Curve(thresholds, saved / max(len(rows), 1), total / max(len(rows), 1))


@dataclass(frozen=True, slots=True)
class Curve:
    """Nano-dollars a request, in the mean: ``cost`` without pacing, and from each threshold on so much less (``saved``)."""

    thresholds: np.ndarray
    saved: np.ndarray
    cost: float

    def at(self, threshold: float | None) -> float:
        """What a request costs with this threshold, or by the policy's own rule."""
        if threshold is None:
            return self.cost
        index = int(np.searchsorted(self.thresholds, threshold, side="right"))
        return self.cost - (float(self.saved[index - 1]) if index else 0.0)

    def lowest(self, cost: float) -> float | None:
        """The lowest threshold at which a request costs no more than this; inf where none does, None where none is needed."""
        if self.cost <= cost:
            return None
        enough = self.saved >= self.cost - cost
        return float(self.thresholds[int(enough.argmax())]) if enough.any() else math.inf


class Traffic:
    """Requests by the hour, and how many are still to come: as many as in the same hours of the last week.

    Times are microseconds since 1970.
    """

    def __init__(self, hours: dict[int, int] | None = None) -> None:
        self._hours = dict(hours or {})
        self._since: int | None = min(self._hours) * HOUR if self._hours else None

    def saw(self, now: int, requests: int) -> None:
        """So many more requests have come."""
        if self._since is None or now < self._since:
            self._since = now
        hour = now // HOUR
        self._hours[hour] = self._hours.get(hour, 0) + requests
        while len(self._hours) > _KEPT_HOURS:
            del self._hours[min(self._hours)]

    def expected(self, now: int, until: int) -> float:
        """Requests from now on until then."""
        if self._since is None or until <= now:
            return 0.0
        this = now // HOUR
        first = -(-self._since // HOUR)  # the first hour that was seen whole
        total = sum(count for hour, count in self._hours.items() if hour <= this)
        mean = total * HOUR / max(now - self._since, HOUR // 60)
        growth = self._growth(this, first)

        def like(hour: int) -> float:
            """Requests of an hour, by the last that was like it."""
            for cycle in (_WEEK, _DAY):
                past = hour - cycle * max(-(-(hour - this + 1) // cycle), 1)
                if past >= first:
                    return growth * self._hours.get(past, 0)
            return mean

        last = (until - 1) // HOUR
        whole = sum(like(hour) for hour in range(this + 1, last))
        if last == this:
            return like(this) * (until - now) / HOUR
        rest = like(this) * ((this + 1) * HOUR - now) / HOUR
        return whole + rest + like(last) * (until - last * HOUR) / HOUR

    def _growth(self, this: int, first: int) -> float:
        """The last day against the same day a week before."""
        if this - _DAY - _WEEK < first:
            return 1.0
        recent = sum(self._hours.get(hour, 0) for hour in range(this - _DAY, this))
        before = sum(self._hours.get(hour, 0) for hour in range(this - _DAY - _WEEK, this - _WEEK))
        return min(max(recent / before, _LEAST_GROWTH), _MOST_GROWTH) if before else 1.0


def next_threshold(
    current: float | None,
    curve: Curve,
    *,
    left: int,
    requests: float,
    rule: Pacing,
) -> float | None:
    """The threshold from now on; None where the policy's own rule is enough.

    Parameters
    ----------
    current : float or None
        The one in force.
    curve : Curve
    left : int
        Nano-dollars of the budget that are neither spent nor held.
    requests : float
        Still to come in the period.
    rule : Pacing
    """
    allowed = left / requests if requests > 0 else math.inf
    if current is not None and _CLOSE * allowed <= curve.at(current) <= allowed:
        return current
    wanted = curve.lowest(max(allowed, 0.0))
    lowest = float(curve.thresholds[0]) if len(curve.thresholds) else rule.highest_threshold
    if wanted is None:
        # Back by steps too, until nothing is held back any more.
        return None if current is None or current - _STEP < lowest else current - _STEP
    wanted = min(wanted, rule.highest_threshold)
    before = lowest if current is None else current
    return min(max(wanted, before - _STEP), before + _STEP, rule.highest_threshold)


def paced(
    current: float | None,
    samples: Samples,
    traffic: Traffic,
    *,
    now: int,
    end: int,
    amount: int,
    spent: int,
    reserved: int,
    rule: Pacing,
) -> float | None:
    """:func:`next_threshold` of a count whose period is over at ``end``.

    As it was, where too few requests are known, and none before the share of the amount is spent from which on it is paced.
    """
    if len(samples) < _FEWEST_SAMPLES or amount <= 0 or (current is None and spent < rule.start * amount):
        return current
    requests = traffic.expected(now, end)
    left = amount - spent - reserved
    return next_threshold(current, samples.curve(), left=left, requests=requests, rule=rule)
