"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.decision import Decision
from router.policy import Prices
from router.upstream import Usage

if TYPE_CHECKING:
    from router.ledger import LedgerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Set before the workers start, it makes prometheus_client share their counts through files in this directory.
SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

_DECISION_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.05, 0.1, 0.5)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one application; a registry of its own, so that two applications do not share them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "router_requests", "Requests answered.", ("path", "status"), registry=self._registry
        )
        self._decisions = Counter(
            "router_decisions",
            "Decisions by target and reason.",
            ("target", "reason"),
            registry=self._registry,
        )
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
        self._tokens = Counter(
            "router_tokens", "Tokens as providers counted them.", ("target", "kind"), registry=self._registry
        )
        self._dollars = Counter(
            "router_cost_usd", "Cost by the policy's prices.", ("target",), registry=self._registry
        )

        self._attempts = Counter(
            "router_attempts",
            "Calls of targets, and places in them that were waited for in vain, by how they ended.",
            ("target", "outcome"),
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
            "router_cooldowns", "Cooldowns that began.", ("target",), registry=self._registry
        )
        # The time, and not a yes or no: a cooldown ends without anybody being there to count it.
        self._cooling_until = Gauge(
            "router_cooling_until_timestamp_seconds",
            "Until when a target is passed over; it is cooling down while this is in the future.",
            ("target",),
            registry=self._registry,
            multiprocess_mode="livemax",
        )
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
        self._ledger_rows = Gauge(
            "router_ledger_rows",
            "Rows of the ledger since the start, by what became of them; pending ones are on no disk yet.",
            ("state",),
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._ledger_lag = Gauge(
            "router_ledger_lag_seconds",
            "How long the oldest row that is on no disk yet has waited.",
            registry=self._registry,
            multiprocess_mode="livemax",
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
        self._policy: _PolicyCollector | None = None

    def show_policy(self, state: Callable[[], tuple[str, float]]) -> None:
        """Let the page show the policy in force: its version, and seconds since it was last what its source says."""
        self._policy = _PolicyCollector(state)
        self._registry.register(self._policy)

    def reloaded(
        self, what: Literal["policy", "bundle"], result: Literal["ok", "invalid", "unreachable"]
    ) -> None:
        self._reloads[what].labels(result).inc()

    def decided(self, decision: Decision, seconds: float) -> None:
        self._decisions.labels(decision.target, decision.reason).inc()
        if decision.unfamiliar:
            self._unfamiliar.inc()
        if decision.unknown_mode:
            self._unknown_modes.inc()
        self._decision_seconds.observe(seconds)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def used(self, target: str, usage: Usage | None, prices: Prices | None) -> None:
        if usage is None:
            return
        self._tokens.labels(target, "input").inc(usage.input)
        self._tokens.labels(target, "output").inc(usage.output)
        if usage.cached:
            self._tokens.labels(target, "cached").inc(usage.cached)
        if prices is not None:
            self._dollars.labels(target).inc(usage.cost(prices))

    def attempted(self, target: str, outcome: str) -> None:
        self._attempts.labels(target, outcome).inc()

    def rerouted(self, target: str, reason: str) -> None:
        self._rerouted.labels(target, reason).inc()

    def faulty(self, target: str, fault: str) -> None:
        self._faults.labels(target, fault).inc()

    def cooled(self, target: str, until: float) -> None:
        """A target cools down until this time, in seconds since 1970."""
        self._cooldowns.labels(target).inc()
        self._cooling_until.labels(target).set(until)

    def session_store(
        self, what: Literal["read", "write"], outcome: Literal["ok", "failed", "passed"]
    ) -> None:
        self._session_store.labels(what, outcome).inc()

    def session_store_away(self, away: bool) -> None:
        self._session_store_away.set(away)

    def ledger(self, stats: LedgerStats) -> None:
        """What the ledger has done, as of now."""
        for state in ("written", "spilled", "restored", "refused", "lost", "pending"):
            self._ledger_rows.labels(state).set(getattr(stats, state))
        self._ledger_lag.set(stats.lag_seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads; of all workers, where they share their counts."""
        if not os.environ.get(SHARED_DIRECTORY):
            return generate_latest(self._registry)
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        if self._policy is not None:
            shared.register(self._policy)
        return generate_latest(shared)


class _PolicyCollector(Collector):
    """The policy that the process which is asked has in force; one sample, however many versions there were."""

    def __init__(self, state: Callable[[], tuple[str, float]]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        version, age = self._state()
        info = GaugeMetricFamily("router_policy_info", "The policy in force.", labels=("version",))
        info.add_metric((version,), 1)
        yield info
        yield GaugeMetricFamily(
            "router_policy_age_seconds", "Since the policy in force was last what its source says.", age
        )
