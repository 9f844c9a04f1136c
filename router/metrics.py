"""What the server counts, in Prometheus' text format.

Each label has few values, whatever clients send: paths, targets, tiers, modes and reasons are those that the policy and
this program name; a mode that is not in the policy is ``other``. No label holds a client, a feature or a session.

With several workers each counts for itself, in files that they share, and whichever is asked answers for all: counters and
histograms are sums, gauges the sum or the worst. What is a state rather than an event is looked at by :meth:`Metrics.sample`,
when the page is read and, where workers share it, every second in each of them.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.decision import Decision
from router.entry import NANO
from router.policy import Policy, Prices
from router.upstream import Usage

if TYPE_CHECKING:
    from router.budget_report import Standing
    from router.ledger import LedgerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Set before the workers start, it makes prometheus_client share their counts through files in this directory.
SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

_DECISION_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.05, 0.1, 0.5)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SCORE_BUCKETS = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)
_SAMPLE_SECONDS = 1.0

# The version in force, 12 hexadecimal digits, as a number: a label for each that ever was would stay in the shared files.
# The page says it as router_policy_info{version}.
_POLICY_NUMBER = "router_policy_number"


class Metrics:
    """Counters of one application; a registry of its own, so that two applications do not share them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._sources: list[Callable[[], None]] = []
        self._in_flight = Gauge(
            "router_requests_in_flight",
            "Requests whose answer is not complete yet.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._requests = Counter(
            "router_requests", "Requests answered.", ("path", "status"), registry=self._registry
        )
        self._decisions = Counter(
            "router_decisions",
            "Decisions by target and reason.",
            ("target", "reason"),
            registry=self._registry,
        )
        self._signals = Counter(
            "router_signals",
            "Decisions by tier and mode; none where there is none, other for a mode that the tier does not list.",
            ("tier", "mode"),
            registry=self._registry,
        )
        self._scores = Histogram(
            "router_score",
            "Predicted gains of the best target over the cheapest.",
            buckets=_SCORE_BUCKETS,
            registry=self._registry,
        )
        thresholds = Gauge(
            "router_threshold",
            "The loss of quality that a tier allows by the policy, where it predicts by a threshold.",
            ("tier",),
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._thresholds = _ByName(thresholds, gone=math.nan)
        self._unfamiliar = Counter(
            "router_unfamiliar",
            "Predicted requests whose prompt the bundle flagged as unlike its training data.",
            registry=self._registry,
        )
        self._unknown_modes = Counter(
            "router_unknown_modes",
            "Requests with a mode that their tier does not list.",
            registry=self._registry,
        )
        self._decision_seconds = Histogram(
            "router_decision_seconds",
            "Reading the request, predicting and deciding.",
            buckets=_DECISION_BUCKETS,
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "router_request_seconds",
            "From the request to the last byte of its answer.",
            ("path",),
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._first_token_seconds = Histogram(
            "router_first_token_seconds",
            "From the request to the first event of a streamed answer.",
            ("target",),
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "router_tokens",
            "Tokens as providers counted them; cached and cache_write are parts of input, reasoning of output.",
            ("target", "kind"),
            registry=self._registry,
        )
        self._dollars = Counter(
            "router_cost_usd", "Cost by the policy's prices.", ("target",), registry=self._registry
        )
        self._uncounted = Counter(
            "router_uncounted_answers",
            "Answers whose provider told no tokens: they are missing in tokens and cost.",
            ("target",),
            registry=self._registry,
        )
        self._attempts = Counter(
            "router_attempts",
            "Calls of targets, and places in them that were waited for in vain, by how they ended.",
            ("target", "outcome"),
            registry=self._registry,
        )
        self._attempt_seconds = Histogram(
            "router_attempt_seconds",
            "From a call of a target to the last byte of its answer, or to its error.",
            ("target",),
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._rerouted = Counter(
            "router_rerouted",
            "Answers of a target other than the one that was decided on, by why.",
            ("target", "reason"),
            registry=self._registry,
        )
        self._faults = Counter(
            "router_faulty_answers",
            "Answers that were none, and so asked for again of the stronger target.",
            ("target", "fault"),
            registry=self._registry,
        )
        self._cooldowns = Counter(
            "router_cooldowns",
            "Cooldowns that began, by the target whose call began it.",
            ("target",),
            registry=self._registry,
        )
        # The time, and not a yes or no: a cooldown ends without anybody being there to count it.
        cooling_until = Gauge(
            "router_cooling_until_timestamp_seconds",
            "Until when a target is passed over; 0 where it is not.",
            ("target",),
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._cooling_until = _ByName(cooling_until, gone=0)
        self._session_store = Counter(
            "router_session_store",
            "Sessions read from and written to the shared store; passed: it is away, and was not asked.",
            ("what", "outcome"),
            registry=self._registry,
        )
        self._session_store_away = Gauge(
            "router_session_store_away",
            "1 while the shared store of sessions does not answer, and each server has its own.",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._ledger_rows = Counter(
            "router_ledger_rows",
            "Rows of the ledger by what became of them.",
            ("state",),
            registry=self._registry,
        )
        self._ledger_seen: dict[str, int] = {}
        self._ledger_pending = Gauge(
            "router_ledger_pending_rows",
            "Rows that are on no disk yet.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._ledger_lag = Gauge(
            "router_ledger_lag_seconds",
            "How long the oldest row that is on no disk yet has waited.",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._ledger_away = Gauge(
            "router_ledger_away",
            "Workers for which the ledger's database did not answer last time.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._policy_number = Gauge(
            _POLICY_NUMBER, "The policy in force.", registry=self._registry, multiprocess_mode="liveall"
        )
        self._policy_age = Gauge(
            "router_policy_age_seconds",
            "Since the policy in force was last what its source says.",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._policy_in_force = Gauge(
            "router_policy_in_force_seconds",
            "Since the policy in force was put in force.",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._budget_dollars = Gauge(
            "router_budget_usd",
            "Budgets that the policy names, by what of them: amount, spent, and reserved for requests under way.",
            ("scope", "name", "period", "state"),
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        self._budget_thresholds = Gauge(
            "router_budget_threshold",
            "The threshold that a budget's pacing has in force; NaN where it has none.",
            ("scope", "name", "period"),
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        self._budget_store_away = Gauge(
            "router_budget_store_away",
            "Workers for which the store of the budgets did not answer last time.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._budgets = Counter(
            "router_budget_decisions",
            "Requests that a budget changed something for, by what.",
            ("outcome",),
            registry=self._registry,
        )
        self._reloads = {
            "policy": Counter(
                "router_policy_reloads",
                "New policies: ok is in force, invalid is not; unreachable counts attempts.",
                ("result",),
                registry=self._registry,
            ),
            "bundle": Counter(
                "router_bundle_reloads",
                "New bundles: ok is in force, invalid is not.",
                ("result",),
                registry=self._registry,
            ),
        }

    def watch(self, sample: Callable[[], None]) -> None:
        """Call this whenever states are looked at; it sets gauges."""
        self._sources.append(sample)

    def sample(self) -> None:
        """Look at all that is a state."""
        for sample in self._sources:
            sample()

    async def sampling(self) -> None:
        """Look every second, where another worker may be asked for what this one knows."""
        while is_shared():
            self.sample()
            await asyncio.sleep(_SAMPLE_SECONDS)

    def policy(self, version: str, age: float, in_force: float) -> None:
        """The policy in force, and for how many seconds it is confirmed, and in force."""
        self._policy_number.set(int(version, 16))
        self._policy_age.set(age)
        self._policy_in_force.set(in_force)

    def reloaded(
        self, what: Literal["policy", "bundle"], result: Literal["ok", "invalid", "unreachable"]
    ) -> None:
        self._reloads[what].labels(result).inc()

    def arrived(self) -> None:
        self._in_flight.inc()

    def decided(self, decision: Decision, policy: Policy, seconds: float) -> None:
        self._decisions.labels(decision.target, decision.reason).inc()
        tier = policy.tiers.get(decision.tier or "")
        mode = decision.mode
        if mode is not None and (tier is None or mode not in tier.modes):
            mode = "other"
        self._signals.labels(decision.tier or "none", mode or "none").inc()
        if decision.score is not None:
            self._scores.observe(decision.score)
        if decision.unfamiliar:
            self._unfamiliar.inc()
        if decision.unknown_mode:
            self._unknown_modes.inc()
        self._decision_seconds.observe(seconds)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request that :meth:`arrived` is answered, to the last byte or as far as it went."""
        self._in_flight.dec()
        # What a provider says is passed on, whatever number it is.
        self._requests.labels(path, str(status) if 100 <= status < 600 else "other").inc()
        self._request_seconds.labels(path).observe(seconds)

    def began(self, target: str, seconds: float) -> None:
        """The first event of a streamed answer was sent after so many seconds."""
        self._first_token_seconds.labels(target).observe(seconds)

    def used(self, target: str, usage: Usage | None, prices: Prices | None) -> None:
        if usage is None:
            self._uncounted.labels(target).inc()
            return
        self._tokens.labels(target, "input").inc(usage.input)
        self._tokens.labels(target, "output").inc(usage.output)
        for kind in ("cached", "cache_write", "reasoning"):
            if count := getattr(usage, kind):
                self._tokens.labels(target, kind).inc(count)
        if prices is not None:
            self._dollars.labels(target).inc(usage.cost(prices))

    def attempted(self, target: str, outcome: str, seconds: float | None = None) -> None:
        """A target was called, for so many seconds; or it was not, and ``outcome`` says why."""
        self._attempts.labels(target, outcome).inc()
        if seconds is not None:
            self._attempt_seconds.labels(target).observe(seconds)

    def rerouted(self, target: str, reason: str) -> None:
        self._rerouted.labels(target, reason).inc()

    def faulty(self, target: str, fault: str) -> None:
        self._faults.labels(target, fault).inc()

    def cooled(self, target: str) -> None:
        self._cooldowns.labels(target).inc()

    def targets(self, until: Mapping[str, float]) -> None:
        """Each target of the policy, and until when it is passed over, in seconds since 1970; 0 where it is not."""
        self._cooling_until.set(until)

    def tiers(self, thresholds: Mapping[str, float]) -> None:
        """Each tier of the policy that predicts by a threshold."""
        self._thresholds.set(thresholds)

    def session_store(
        self, what: Literal["read", "write"], outcome: Literal["ok", "failed", "passed"]
    ) -> None:
        self._session_store.labels(what, outcome).inc()

    def session_store_away(self, away: bool) -> None:
        self._session_store_away.set(away)

    def budget(self, outcome: str) -> None:
        """A budget changed something for a request: ``refused``, ``cheapest``, ``paced``, …"""
        self._budgets.labels(outcome).inc()

    def budgets(self, standings: Iterable[Standing], away: bool) -> None:
        """How the budgets stand that the policy names."""
        self._budget_store_away.set(away)
        for one in standings:
            scope, name, period = one.count.scope, one.count.name, "day" if one.count.period[8:] else "month"
            amounts = {
                "amount": one.amount,
                "spent": one.totals.spent,
                "reserved": one.totals.reserved,
            }
            for state, amount in amounts.items():
                self._budget_dollars.labels(scope, name, period, state).set(amount / NANO)
            threshold = one.totals.threshold
            self._budget_thresholds.labels(scope, name, period).set(
                math.nan if threshold is None else threshold
            )

    def ledger(self, stats: LedgerStats) -> None:
        """What the ledger has done, as of now."""
        for state in ("written", "spilled", "restored", "refused", "lost"):
            count = getattr(stats, state)
            self._ledger_rows.labels(state).inc(count - self._ledger_seen.get(state, 0))
            self._ledger_seen[state] = count
        self._ledger_pending.set(stats.pending)
        self._ledger_lag.set(stats.lag_seconds)
        self._ledger_away.set(stats.away)

    def text(self) -> bytes:
        """The page that Prometheus reads; of all workers, where they share their counts."""
        self.sample()
        if not is_shared():
            return generate_latest(_Page(self._registry))
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(_Page(shared))


def is_shared() -> bool:
    """Whether this process is one of several that share their counts."""
    return bool(os.environ.get(SHARED_DIRECTORY))


def forget_worker(pid: int) -> None:
    """A worker has ended: what it counted stays, its states do not."""
    if is_shared():
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


class _ByName:
    """A gauge by one label, whose names are those of the policy in force.

    Files that workers share give no name back: one that the policy no longer has keeps ``gone``.
    """

    def __init__(self, gauge: Gauge, gone: float) -> None:
        self._gauge = gauge
        self._gone = gone
        self._names: set[str] = set()

    def set(self, values: Mapping[str, float]) -> None:
        self._names.update(values)
        for name in self._names:
            self._gauge.labels(name).set(values.get(name, self._gone))


class _Page(Collector):
    """What is collected, with the policies' numbers as their versions, and how many workers have each in force."""

    def __init__(self, collected: CollectorRegistry) -> None:
        self._collected = collected

    def collect(self) -> Iterator[Metric]:
        for metric in self._collected.collect():
            yield _by_version(metric) if metric.name == _POLICY_NUMBER else metric


def _by_version(numbers: Metric) -> Metric:
    versions = [f"{int(sample.value):012x}" for sample in numbers.samples if sample.value]
    info = GaugeMetricFamily(
        "router_policy_info", "The policy in force, and how many workers have it.", labels=("version",)
    )
    for version in sorted(set(versions)):
        info.add_metric((version,), versions.count(version))
    return info
