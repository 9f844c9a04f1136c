"""What staying with a warm model is worth: generated agent sessions, served per request, sticky, and by the rule.

``make study-sessions`` runs it and writes the tables of ``tests/STUDY_SESSIONS.md`` to standard output. The ways to serve
a session see what a server sees: the predicted gain, the tokens of the request, the clock. The bill is made from what they cannot
see: the provider's caches, the true length of each answer, and whether a step needed the strong target.

A cache belongs to a target and a thread of the session, holds the longest prefix that was sent, and is gone when it has not
been used for the time to live. Every token that is not read from it is written to it, as agents' clients ask for.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from router.policy import Prices
from router.sessions import Session, SessionRule, keep_or_switch, requested
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


def by_rule(rule: SessionRule) -> Serve:
    """As a server would: it sees what was, and of a step that comes its size, its time and the predicted gain."""

    def serve(trace: Trace, pair: Pair, threshold: float) -> list[str]:
        known = rule.model_copy(update={"idle_seconds": pair.cache_seconds})
        session: Session | None = None
        targets = []
        for step in trace.steps:
            target = wanted(step, threshold)
            if session is not None:
                weighing = keep_or_switch(
                    session,
                    target,
                    incumbent_prices=pair.prices(session.incumbent),
                    candidate_prices=pair.prices(target),
                    context=step.context,
                    gain=step.gain if target == STRONG else -step.gain,
                    rule=known,
                    now=step.seconds,
                )
                target = target if weighing.leave else session.incumbent
            before = session
            session = requested(
                session,
                target,
                context=step.context,
                now=step.seconds,
                rule=known,
                gain=step.gain,
            )
            if before is None or session.requests != before.requests:
                session = session.answered(step.output)
            targets.append(target)
        return targets

    return serve


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
    switches = sum(before != after for before, after in pairwise(targets))
    return Bill(dollars, switches, len(hard), hard.count(STRONG))


@dataclass(frozen=True)
class Served:
    """The bills of one way to serve a family's sessions, in the order of their seeds."""

    bills: tuple[Bill, ...]

    @classmethod
    def of(cls, sessions: Sequence[Trace], pair: Pair, serve: Serve, threshold: float = THRESHOLD) -> Served:
        return cls(tuple(bill(trace, pair, serve(trace, pair, threshold)) for trace in sessions))

    @property
    def dollars(self) -> float:
        return statistics.fmean(one.dollars for one in self.bills)

    @property
    def switches(self) -> float:
        return statistics.fmean(one.switches for one in self.bills)

    @property
    def share(self) -> float:
        """The share of hard steps that got the strong target."""
        return sum(one.served for one in self.bills) / sum(one.hard for one in self.bills)

    def with_missed(self, price: float = MISSED_DOLLARS) -> float:
        return statistics.fmean(one.with_missed(price) for one in self.bills)


@dataclass(frozen=True)
class Line:
    """One family under one pair of prices."""

    pair: str
    family: str
    per_request: Served
    sticky: Served
    rule: Served

    def better(self, price: float = MISSED_DOLLARS) -> Served:
        """The better of the two ways that do not weigh."""
        return min(self.per_request, self.sticky, key=lambda served: served.with_missed(price))

    def difference(self, price: float = MISSED_DOLLARS) -> tuple[float, float]:
        """The rule's dollars with missed steps less the better one's, and half the width of its 95 % interval.

        Session by session: both served the same ones.
        """
        pairs = zip(self.rule.bills, self.better(price).bills, strict=True)
        each = [mine.with_missed(price) - other.with_missed(price) for mine, other in pairs]
        return statistics.fmean(each), 1.96 * statistics.stdev(each) / math.sqrt(len(each))

    def ratio(self, price: float = MISSED_DOLLARS) -> float:
        return self.rule.with_missed(price) / self.better(price).with_missed(price)


def measure(
    count: int,
    rule: SessionRule,
    *,
    threshold: float = THRESHOLD,
    first_seed: int = 0,
    pairs: Sequence[str] = tuple(PAIRS),
    families: Sequence[str] = tuple(FAMILIES),
) -> list[Line]:
    """Each family under each pair of prices, ``count`` sessions of it."""
    lines = []
    for family in families:
        sessions = list(traces(family, count, first_seed))
        for name in pairs:
            ways = (per_request, sticky, by_rule(rule))
            served = (Served.of(sessions, PAIRS[name], way, threshold) for way in ways)
            lines.append(Line(name, family, *served))
    return sorted(lines, key=lambda line: list(pairs).index(line.pair))


def at_the_share(line: Line, sessions: Sequence[Trace]) -> float:
    """Dollars of deciding per request at the threshold that serves the rule's share of hard steps, chosen in hindsight."""
    tried = (
        Served.of(sessions, PAIRS[line.pair], per_request, float(threshold))
        for threshold in np.geomspace(0.02, 0.9, 20)
    )
    points = sorted((served.share, served.dollars) for served in tried)
    return float(
        np.interp(line.rule.share, [share for share, _ in points], [dollars for _, dollars in points])
    )


def table(lines: Sequence[Line], first_seed: int = 0) -> str:
    """One pair's lines as markdown."""
    rows = [
        "| family | $ | | | | $ with missed | | | the rule's, less the better one's | switches | | | "
        "share of hard steps served | | |",
        "| --- | " + "--- | " * 14,
        "| | per request | sticky | rule | per request at the rule's share | per request | sticky | rule | 95 % | "
        + "per request | sticky | rule | per request | sticky | rule |",
    ]
    for line in lines:
        ways = (line.per_request, line.sticky, line.rule)
        count = len(line.rule.bills)
        same = at_the_share(line, list(traces(line.family, count, first_seed)))
        mean, half = line.difference()
        mark = "**" if line.ratio() > 1 else ""
        cells = [
            f"`{line.family}`",
            *(f"{way.dollars:.3f}" for way in ways),
            f"{same:.3f}",
            *(f"{way.with_missed():.3f}" for way in ways),
            f"{mark}{mean:+.4f} ± {half:.4f}{mark}",
            *(f"{way.switches:.1f}" for way in ways),
            *(f"{way.share:.3f}" for way in ways),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def over(lines: Sequence[Line], price: float = MISSED_DOLLARS) -> str:
    """How many lines cost more by the rule than by the better way, and the worst of all."""
    worst = max(lines, key=lambda line: line.ratio(price))
    more = sum(line.ratio(price) > 1 for line in lines)
    ratio = statistics.fmean(line.ratio(price) for line in lines)
    where = f"`{worst.family}`, {PAIRS[worst.pair].title}"
    return f"{more} of {len(lines)} | {worst.ratio(price) - 1:+.3f} ({where}) | {ratio - 1:+.3f}"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=200, help="of each family")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    rule = SessionRule()
    lines = measure(options.sessions, rule, first_seed=options.first_seed)
    for name, pair in PAIRS.items():
        print(f"\n### {pair.title}\n")
        print(table([line for line in lines if line.pair == name], options.first_seed), flush=True)
    print("\n### Other numbers\n")
    print("| | the rule costs more | worst | mean |\n| --- | --- | --- | --- |")
    print(f"| as above | {over(lines)} |")
    for price in (0.25, 1.0):
        print(
            f"| a missed step costs ${price:.2f}, the rule still believes ${MISSED_DOLLARS:.2f} | {over(lines, price)} |"
        )
    for price in (0.0, 0.25, 1.0):
        told = rule.model_copy(update={"quality_dollars": price})
        others = measure(options.sessions, told, first_seed=options.first_seed)
        cost = f"a missed step costs ${price:.2f}" if price else "a missed step costs nothing: the bill alone"
        print(f"| {cost}, and the rule is told so | {over(others, price)} |", flush=True)
    for threshold in (0.2, 0.4):
        others = measure(options.sessions, rule, threshold=threshold, first_seed=options.first_seed)
        print(f"| threshold {threshold} | {over(others)} |", flush=True)
    for staying in (0.3, 0.6):
        other = rule.model_copy(update={"worth_staying": staying})
        others = measure(options.sessions, other, first_seed=options.first_seed)
        print(f"| `worth_staying` {staying} | {over(others)} |", flush=True)


if __name__ == "__main__":
    main()
