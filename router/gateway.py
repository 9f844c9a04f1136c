"""What the requests of one server share: the policy and the bundle in force, connections, counters, threads.

Policy and bundle are in force together, as one :class:`InForce` that never changes: a request takes it once, when it
arrives, and is decided and sent by that one, whatever is put in force meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from router.accounting import check_priced
from router.clients import ClientKeys
from router.decision import Decision, RequestFacts, decide, needs_prediction
from router.dispatch import Destination, Dispatcher, destination, scrubber
from router.entry import now
from router.errors import PolicyError, UsageError
from router.failover import Failover
from router.features import Prompt
from router.login import login_secret
from router.metrics import Metrics
from router.policy import Policy
from router.predictor import Prediction
from router.reasoning import family_of
from router.sessions import SessionStore
from router.settings import Settings, policy_source
from router.shared_sessions import Place, SharedSessions, session_place

if TYPE_CHECKING:
    from router.ledger import Ledger
    from router.live import Live
    from router.purse import Purse
    from router.tracing import Tracing

logger = logging.getLogger("router")

NOT_CAPTURED = "the policy has prompts captured, but no ledger is kept (--ledger): none is"
_UNCOUNTED = (
    "budgets: they have to be counted somewhere; start with --ledger, or say where with --budget-store"
)


class BundleFacts(Protocol):
    """What a policy leaves to its bundle; a manifest has it, and a predictor."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def threshold(self) -> float: ...

    @property
    def bars(self) -> Mapping[float, float]: ...

    @property
    def knows_steps(self) -> bool: ...


class PromptPredictor(BundleFacts, Protocol):
    """What the server needs of a :class:`router.predictor.Predictor`."""

    @property
    def name(self) -> str: ...

    def predict(self, prompts: Sequence[Prompt]) -> Prediction: ...


def bound(policy: Policy, bundle: BundleFacts) -> Policy:
    """The policy with all spelled out that it leaves to the bundle; :class:`PolicyError` where the two do not fit."""
    return policy.bound_to(bundle.targets, bundle.threshold, bars=bundle.bars, knows_steps=bundle.knows_steps)


class InForce:
    """A policy and the bundle that it predicts with; unchanging.

    Parameters
    ----------
    policy : Policy
    predictor : PromptPredictor or None
        None where the policy predicts nothing.
    environment : mapping, optional
        Where the providers' keys are; the process's own by default.

    Raises
    ------
    PolicyError
        The policy's predictions do not fit the bundle's targets.
    """

    def __init__(
        self,
        policy: Policy,
        predictor: PromptPredictor | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.version = policy.hash
        self.policy = policy if predictor is None else bound(policy, predictor)
        self.predictor = predictor
        self._environment = os.environ if environment is None else environment
        self._scrub = scrubber(policy.targets.values(), self._environment)

    @property
    def bundle(self) -> str | None:
        """The bundle's name."""
        return self.predictor.name if self.predictor else None

    def families(self, names: Iterable[str]) -> frozenset[str]:
        """The families of some targets, of those that the policy still has."""
        targets = self.policy.targets
        return frozenset(family_of(targets[name]) for name in names if name in targets)

    def destination(self, name: str, headers: Mapping[str, str] = MappingProxyType({})) -> Destination:
        """A target with its key, which ``headers`` may hold; raises what :func:`router.dispatch.destination` does."""
        return destination(name, self.policy.targets[name], self._environment, self._scrub, headers)


class Gateway:
    """One server's state; parameters as for :class:`InForce`, which it starts with.

    ``clients`` are those who may use it; anybody, where there are none. ``ledger`` is open, and closed with the gateway,
    and so is ``purse``, which a policy with budgets needs where the server ``spends``. ``place`` is where sessions are shared
    with other servers; they stay in this process, where it is None. ``live`` keeps policy and bundle as their sources say,
    where they have such.
    """

    live: Live | None = None
    tracing: Tracing | None = None

    def __init__(
        self,
        policy: Policy,
        predictor: PromptPredictor | None,
        environment: Mapping[str, str] | None = None,
        clients: ClientKeys | None = None,
        ledger: Ledger | None = None,
        place: Place | None = None,
        purse: Purse | None = None,
        spends: bool = True,
    ) -> None:
        self.environment = os.environ if environment is None else environment
        self.ledger = ledger
        self.purse = purse
        self._spends = spends
        self.put_in_force(self.bind(policy, predictor))
        self.clients = clients
        self.dispatcher = Dispatcher()
        self.metrics = Metrics()
        self.failover = Failover(self.metrics)
        self.shared = SharedSessions(place, self.metrics) if place is not None else None
        self.sessions: SessionStore = SessionStore() if self.shared is None else self.shared
        self.login_secret = secrets.token_bytes(32)  # of the dashboard's logins
        self.started = int(time.time())
        self.metrics.watch(self._show)
        # The encoder releases the GIL, so prompts run beside one another; more threads than cores only queue.
        self._executor = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="predict")

    def bind(self, policy: Policy, predictor: PromptPredictor | None) -> InForce:
        """What would be in force with these; :class:`PolicyError` where it cannot be: with a ledger every target needs prices."""
        if self.ledger is not None:
            check_priced(policy)
        if policy.budgets is not None and self._spends:
            if self.purse is None:
                raise PolicyError(_UNCOUNTED)
            self.purse.start()
        return InForce(policy, predictor, self.environment)

    def put_in_force(self, in_force: InForce) -> None:
        """Decide and send by this from the next request on; those that have arrived keep theirs."""
        self.in_force = in_force
        if self.purse is not None:
            budgets = in_force.policy.budgets
            self.purse.pacing = None if budgets is None else budgets.pacing
        capture = in_force.policy.capture
        if self.ledger is not None:
            self.ledger.capture = capture
        elif capture is not None:
            logger.warning("%s", NOT_CAPTURED)

    def _show(self) -> None:
        """Say to the metrics what state targets, tiers and ledger are in."""
        policy = self.in_force.policy
        cooling, clock = self.failover.cooling(policy.targets.items()), time.time()
        self.metrics.targets(
            {name: clock + cooling[name] if name in cooling else 0 for name in policy.targets}
        )
        self.metrics.tiers(policy.thresholds())
        if self.ledger is not None:
            self.metrics.ledger(self.ledger.stats)
        if self.purse is not None and policy.budgets is not None:
            from router.budget_report import known_standings

            found = known_standings(policy.budgets, self.purse.totals(), now())
            self.metrics.budgets(found, self.purse.stats.away)

    async def decide(self, in_force: InForce, facts: RequestFacts, prompt: Callable[[], Prompt]) -> Decision:
        """Decide on one request; ``prompt`` is called, off the event loop, where a prediction is needed."""
        policy, predictor = in_force.policy, in_force.predictor
        if not needs_prediction(facts, policy):
            return decide(facts, policy)
        assert predictor is not None
        prediction = await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: predictor.predict([prompt()])
        )
        return decide(facts, policy, prediction)

    async def close(self) -> None:
        """Let the prediction threads end, close the connections to the providers, and write what the ledger holds."""
        try:
            await self.dispatcher.close()
        finally:
            if self.shared is not None:
                await asyncio.to_thread(self.shared.close)
            if self.purse is not None:
                await asyncio.to_thread(self.purse.close)
            if self.ledger is not None:
                await asyncio.to_thread(self.ledger.close)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)
            self.metrics.sample()  # what was written last, for the workers that are left
        self._executor.shutdown(wait=False, cancel_futures=True)


def load_gateway(settings: Settings, policy: Policy, *, spends: bool = True) -> Gateway:
    """Load the bundle, where the policy predicts or the settings name one, and check that the two fit.

    A policy from a URL that does not fit gives way to the one that was last in force. One that only decides, and never
    ``spends``, counts no budgets.

    Raises
    ------
    BundleError, EncoderError, PolicyError
    RouterError
        The file of clients or the ledger cannot be used.
    """
    clients = None if settings.clients is None else ClientKeys.of(settings.clients)
    secret = None if clients is None else login_secret()
    from router.bundle import default_bundle_dir
    from router.live import Live

    place = None if settings.session_store is None else session_place(settings.session_store)
    ledger = _ledger(settings)
    source = policy_source(settings)
    bundle = settings.bundle or default_bundle_dir()

    purse: Purse | None = None

    def made(policy: Policy) -> Gateway:
        predictor = _predictor(settings, policy, bundle)
        return Gateway(
            policy, predictor, clients=clients, ledger=ledger, place=place, purse=purse, spends=spends
        )

    try:
        purse = _purse(settings, policy, ledger) if spends else None
        try:
            gateway = made(policy)
        except PolicyError as error:
            kept = source.kept()
            if kept is None:
                raise
            logger.warning("%s: %s; the policy that was last in force is taken instead", source.shown, error)
            policy = kept
            gateway = made(policy)
    except BaseException:
        for opened in (purse, ledger):
            if opened is not None:
                opened.close()
        raise
    if secret is not None:
        gateway.login_secret = secret
    gateway.live = Live(gateway, policy, source, bundle, settings.bundle_seconds)
    gateway.tracing = _tracing(settings)
    return gateway


def _ledger(settings: Settings) -> Ledger | None:
    if settings.ledger is None:
        return None
    from router.ledger import Ledger

    return Ledger(settings.ledger, durability=settings.ledger_durability).open()


def _tracing(settings: Settings) -> Tracing | None:
    if settings.tracing == "off":
        return None
    try:
        from router.tracing import open_tracing
    except ModuleNotFoundError:
        raise UsageError(
            "tracing takes OpenTelemetry's SDK and exporter, which are not installed: "
            "pip install 'llm-difficulty-router[otel]'"
        ) from None
    return open_tracing(propagates=settings.tracing == "propagate")


def _purse(settings: Settings, policy: Policy, ledger: Ledger | None) -> Purse | None:
    """The purse; connected where the policy has budgets, since a later one may."""
    if settings.budget_store is None and ledger is None:
        return None
    from router.budget_store import LedgerPast, open_store, store_beside
    from router.purse import Purse

    if settings.budget_store is not None:
        store = open_store(settings.budget_store)
    else:
        assert ledger is not None
        store = store_beside(ledger.url)
    purse = Purse(store, None if ledger is None else LedgerPast(ledger.url))
    return purse if policy.budgets is None else purse.open()


def _predictor(settings: Settings, policy: Policy, bundle: Path) -> PromptPredictor | None:
    if settings.bundle is None and not policy.uses_prediction():
        return None
    from router.predictor import load_predictor

    return load_predictor(bundle)
