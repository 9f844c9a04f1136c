"""What staying with a warm model is worth: generated agent sessions, served per request, sticky, and by the rule.

``make study-sessions`` runs it and writes the tables of ``tests/STUDY_SESSIONS.md`` to standard output. The ways to serve a session
see what a server sees: the predicted gain, the tokens of the request, the clock. The bill is made from what they cannot
see: the provider's caches, the true length of each answer, and whether a step needed the strong target.

A cache belongs to a target and a thread of the session, holds the longest prefix that was sent, and is gone when it has not
been used for the time to live. Every token that is not read from it is written to it, as agents' clients ask for.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from router.policy import Prices
from router.traffic import FAMILIES, Step, Trace, traces

WEAK, STRONG = "weak", "strong"
# The gain from which the policy in force takes the strong target.
THRESHOLD = 0.3
# What a hard step costs that the weak target got: about ten requests of the strong one, to find out and do it again.
MISSED_DOLLARS = 0.5


@dataclass(frozen=True)
class Pair:
    """Two targets: prices, and the seconds that their caches live."""

    title: str
    weak: Prices
    strong: Prices
    cache_seconds: float = 300

    def prices(self, target: str) -> Prices:
        return self.strong if target == STRONG else self.weak


# US dollars per million tokens, as providers list them: a frontier and a small model of one provider each.
PAIRS: Mapping[str, Pair] = MappingProxyType(
    {
        "writes_125": Pair(
            "reads 10 %, writes 125 %",
            Prices(input=1, output=5, cached_read=0.1, cache_write=1.25),
            Prices(input=5, output=25, cached_read=0.5, cache_write=6.25),
        ),
        "writes_200": Pair(
            "reads 10 %, writes 200 %, kept for an hour",
            Prices(input=1, output=5, cached_read=0.1, cache_write=2),
            Prices(input=5, output=25, cached_read=0.5, cache_write=10),
            cache_seconds=3600,
        ),
        "reads_50": Pair(
            "reads 50 %, free writes",
            Prices(input=0.15, output=0.6, cached_read=0.075),
            Prices(input=2.5, output=10, cached_read=1.25),
        ),
        "reads_10": Pair(
            "reads 10 %, free writes",
            Prices(input=0.25, output=2, cached_read=0.025),
            Prices(input=1.25, output=10, cached_read=0.125),
        ),
    }
)

# The target of each step of a trace.
Serve = Callable[[Trace, Pair, float], list[str]]


@dataclass(frozen=True)
class Bill:
    """What a served session cost.

    Attributes
    ----------
    dollars : float
    switches : int
        Changes of target from one request of the session to the next.
    hard, served : int
        Steps that needed the strong target, and those of them that got it.
    """

    dollars: float
    switches: int
    hard: int
    served: int

    def with_missed(self, price: float) -> float:
        """Dollars, and ``price`` for each hard step that the weak target got."""
        return self.dollars + price * (self.hard - self.served)


def wanted(step: Step, threshold: float) -> str:
    """What the prediction alone says."""
    return STRONG if step.gain > threshold else WEAK


def per_request(trace: Trace, pair: Pair, threshold: float) -> list[str]:
    return [wanted(step, threshold) for step in trace.steps]


def sticky(trace: Trace, pair: Pair, threshold: float) -> list[str]:
    return [wanted(trace.steps[0], threshold)] * len(trace.steps)


def bill(trace: Trace, pair: Pair, targets: Sequence[str]) -> Bill:
    """What the provider charges for a session whose steps went to these targets."""
    dollars = 0.0
    caches: dict[tuple[str, int], tuple[int, float]] = {}  # (target, thread) → tokens, when last used
    for step, target in zip(trace.steps, targets, strict=True):
        tokens, used = caches.get((target, step.thread), (0, -math.inf))
        read = tokens if step.seconds - used <= pair.cache_seconds else 0
        dollars += pair.prices(target).cost(
            input=step.context, output=step.output, cached_read=read, cache_write=step.context - read
        )
        caches[target, step.thread] = (step.context, step.seconds)
    hard = [target for step, target in zip(trace.steps, targets, strict=True) if step.needs_strong]
    switches = sum(before != after for before, after in zip(targets, targets[1:], strict=False))
    return Bill(dollars, switches, len(hard), hard.count(STRONG))
