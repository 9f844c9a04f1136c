"""What the requests of one server share: the policy and the bundle in force, connections, counters, threads.

Policy and bundle are in force together, as one :class:`InForce` that never changes: a request takes it once, when it
arrives, and is decided and sent by that one, whatever is put in force meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Protocol

from router.clients import ClientKeys
from router.decision import Decision, RequestFacts, decide, needs_prediction
from router.dispatch import Destination, Dispatcher, destination, scrubber
from router.failover import Failover
from router.features import Prompt
from router.metrics import Metrics
from router.policy import Policy
from router.predictor import Prediction
from router.settings import Settings


class PromptPredictor(Protocol):
    """What the server needs of a :class:`router.predictor.Predictor`."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def threshold(self) -> float: ...

    def predict(self, prompts: Sequence[Prompt]) -> Prediction: ...


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
        self.policy = policy.bound_to(predictor.targets, predictor.threshold) if predictor else policy
        self.predictor = predictor
        self._environment = os.environ if environment is None else environment
        self._scrub = scrubber(policy.targets.values(), self._environment)

    @property
    def bundle(self) -> str | None:
        """The bundle's name."""
        return self.predictor.name if self.predictor else None

    def destination(self, name: str, headers: Mapping[str, str] = MappingProxyType({})) -> Destination:
        """A target with its key, which ``headers`` may hold; raises what :func:`router.dispatch.destination` does."""
        return destination(name, self.policy.targets[name], self._environment, self._scrub, headers)


class Gateway:
    """One server's state; parameters as for :class:`InForce`, which it starts with.

    ``clients`` are those who may use it; anybody, where there are none.
    """

    def __init__(
        self,
        policy: Policy,
        predictor: PromptPredictor | None,
        environment: Mapping[str, str] | None = None,
        clients: ClientKeys | None = None,
    ) -> None:
        self.in_force = InForce(policy, predictor, environment)
        self.clients = clients
        self.dispatcher = Dispatcher()
        self.metrics = Metrics()
        self.failover = Failover(self.metrics)
        self.started = int(time.time())
        # The encoder releases the GIL, so prompts run beside one another; more threads than cores only queue.
        self._executor = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="predict")

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
        """Let the prediction threads end, and close the connections to the providers."""
        await self.dispatcher.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def load_gateway(settings: Settings, policy: Policy) -> Gateway:
    """Load the bundle, where the policy predicts or the settings name one, and check that the two fit.

    Raises
    ------
    BundleError, EncoderError, PolicyError
    RouterError
        The file of clients cannot be used.
    """
    clients = None if settings.clients is None else ClientKeys.of(settings.clients)
    if settings.bundle is None and not policy.uses_prediction():
        return Gateway(policy, None, clients=clients)
    from router.bundle import default_bundle_dir
    from router.predictor import load_predictor

    return Gateway(policy, load_predictor(settings.bundle or default_bundle_dir()), clients=clients)
