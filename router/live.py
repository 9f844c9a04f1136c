"""Keeps the policy and the bundle in force as their sources say, while requests are served.

A new policy is read, checked whole and bound to the bundle before it is put in force, and a new bundle is loaded and
replays its probes: both off the event loop. What is bad, half-written or cannot be reached changes nothing but the log,
the metrics and ``/readyz``. Putting in force is one assignment; requests that have arrived go on as they began.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from router.errors import BundleError, EncoderError, PolicyError, RouterError, SourceError
from router.gateway import Gateway, PromptPredictor
from router.policy import Policy
from router.sources import Source

logger = logging.getLogger("router")

Signature = tuple[tuple[str, int, int, int], ...]


class Followed:
    """How one of the two, policy or bundle, stands to its source.

    Attributes
    ----------
    since : float
        When what is in force was put there; seconds since the epoch, as all times here.
    confirmed : float
        When that last was what the source says.
    error, error_since : str and float, or None
        Why the source's latest is not in force.
    """

    def __init__(self, what: Literal["policy", "bundle"], clock: Callable[[], float]) -> None:
        self.what = what
        self._clock = clock
        self.since = self.confirmed = clock()
        self.error: str | None = None
        self.error_since: float | None = None

    def good(self) -> None:
        """What is in force is what the source says."""
        self.confirmed = self._clock()
        if self.error is not None:
            logger.info("%s: the one in force is what its source says again", self.what)
        self.error = self.error_since = None

    def bad(self, error: str) -> None:
        """The source's latest is not in force."""
        if error == self.error:
            return  # one line a change, not one a poll
        logger.warning("%s: the last good one stays in force: %s", self.what, error)
        self.error_since = self._clock() if self.error is None else self.error_since
        self.error = error

    def report(self) -> dict[str, Any]:
        """For ``/readyz``."""
        report: dict[str, Any] = {f"{self.what}_since": _iso(self.since)}
        if self.error is not None and self.error_since is not None:
            report[f"{self.what}_error"] = self.error
            report[f"{self.what}_error_since"] = _iso(self.error_since)
        return report


class Live:
    """Follows the sources of one server's policy and bundle.

    Parameters
    ----------
    gateway : Gateway
    policy : Policy
        The one in force, as its source gave it.
    source : Source
    bundle : Path
        The bundle's directory, whether or not the policy predicts.
    seconds : float
        How often the bundle is looked at; 0 leaves it to :meth:`now`.
    clock : callable
        Seconds since the epoch.
    """

    def __init__(
        self,
        gateway: Gateway,
        policy: Policy,
        source: Source,
        bundle: Path,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._gateway = gateway
        self.source = source
        self._bundle = bundle
        self._seconds = seconds
        self._clock = clock
        self.policy = Followed("policy", clock)
        self.bundle = Followed("bundle", clock)
        # Their sources' latest, valid each by itself; whether they fit one another shows when they are bound.
        self._latest: tuple[Policy, PromptPredictor | None] = (policy, gateway.in_force.predictor)
        self._in_force = self._latest
        # Why a source gave nothing, or nothing valid, when it was last asked.
        self._errors: dict[str, RouterError | None] = {"policy": None, "bundle": None}
        self._signature = signature(bundle)
        self._settling = asyncio.Lock()
        self._wake = {"policy": asyncio.Event(), "bundle": asyncio.Event()}
        gateway.metrics.watch(self._show)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the sources, and SIGHUP, until the block ends."""
        loop = asyncio.get_running_loop()
        tasks = [
            asyncio.create_task(self._follow(self.look_at_policy, "policy", lambda: self.source.pause)),
            asyncio.create_task(self._follow(self.look_at_bundle, "bundle", lambda: self._seconds)),
        ]
        hears = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
        if hears:
            before = signal.getsignal(signal.SIGHUP)
            loop.add_signal_handler(signal.SIGHUP, self.now)
        try:
            yield
        finally:
            if hears:
                loop.remove_signal_handler(signal.SIGHUP)
                signal.signal(signal.SIGHUP, before)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def now(self) -> None:
        """Look at both sources at once."""
        for wake in self._wake.values():
            wake.set()

    def report(self) -> dict[str, Any]:
        """For ``/readyz``: where the policy comes from, since when it is in force, what is wrong with its successor."""
        return {"policy_source": self.source.shown, **self.policy.report(), **self.bundle.report()}

    def _show(self) -> None:
        now, policy = self._clock(), self.policy
        version = self._gateway.in_force.version
        self._gateway.metrics.policy(version, now - policy.confirmed, now - policy.since)

    async def look_at_policy(self) -> None:
        """Ask the policy's source, and put in force what it gives."""
        if not self.source.can_change:
            return
        try:
            policy = await self.source.poll()
        except RouterError as error:
            if isinstance(error, SourceError):
                self._gateway.metrics.reloaded("policy", "unreachable")
            elif error is not self._errors["policy"]:
                self._gateway.metrics.reloaded("policy", "invalid")
            self._errors["policy"] = error
            self.policy.bad(str(error))
            return
        async with self._settling:
            if policy is self._latest[0] and self._errors["policy"] is None:
                if policy is self._in_force[0]:
                    self.policy.good()
                return
            self._errors["policy"] = None
            self._latest = (policy, self._latest[1])
            await self._settle()

    async def look_at_bundle(self) -> None:
        """Load the bundle where its files have changed, and put it in force."""
        if self._latest[1] is None and not self._latest[0].uses_prediction():
            return
        found = await asyncio.to_thread(signature, self._bundle)
        if found == self._signature:
            return
        async with self._settling:
            self._signature = found
            try:
                predictor = await asyncio.to_thread(_load, self._bundle)
            except RouterError as error:
                self._errors["bundle"] = error
                self._refused("bundle", error)
                return
            self._errors["bundle"] = None
            self._latest = (self._latest[0], predictor)
            await self._settle()

    async def _settle(self) -> None:
        """Put in force the newest of policy and bundle that fit one another."""
        latest, before = self._latest, self._in_force
        if latest[1] is None and latest[0].uses_prediction():
            try:
                self._signature = await asyncio.to_thread(signature, self._bundle)
                latest = self._latest = (latest[0], await asyncio.to_thread(_load, self._bundle))
            except RouterError as error:
                self._refused("policy", error)
                return
        version = self._gateway.in_force.version
        errors = []
        for policy, predictor in _pairs(latest, before):
            if predictor is None and policy.uses_prediction():
                continue
            try:
                in_force = self._gateway.bind(policy, predictor)
            except PolicyError as error:
                errors.append(error)
                continue
            if in_force.version != version or predictor is not before[1]:
                self._gateway.put_in_force(in_force)
            self._in_force = (policy, predictor)
            break
        policy, predictor = self._in_force
        if policy is not latest[0]:
            self._refused("policy", errors[0])
        else:
            if self._gateway.in_force.version != version:
                self._accepted("policy", self._gateway.in_force.version)
            if self._errors["policy"] is None:
                self.policy.good()
            await asyncio.to_thread(self.source.keep, policy)
        if predictor is not latest[1]:
            self._refused("bundle", errors[0])
        else:
            if predictor is not None and predictor is not before[1]:
                self._accepted("bundle", predictor.name)
            if self._errors["bundle"] is None:
                self.bundle.good()

    def _accepted(self, what: Literal["policy", "bundle"], name: str) -> None:
        self._gateway.metrics.reloaded(what, "ok")
        getattr(self, what).since = self._clock()
        logger.info("%s: %s is in force now", what, name)

    def _refused(self, what: Literal["policy", "bundle"], error: RouterError) -> None:
        self._gateway.metrics.reloaded(what, "invalid")
        where = self.source.shown if what == "policy" else str(self._bundle)
        message = str(error)
        getattr(self, what).bad(message if message.startswith(where) else f"{where}: {message}")

    async def _follow(
        self,
        look: Callable[[], Awaitable[None]],
        what: Literal["policy", "bundle"],
        pause: Callable[[], float],
    ) -> None:
        wake = self._wake[what]
        while True:
            if pause() == 0:
                await wake.wait()
            wake.clear()
            try:
                await look()
            except Exception as error:
                # A mistake of this program; following goes on. Its message might hold part of a policy.
                frames = traceback.extract_tb(error.__traceback__)
                place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
                logger.error("%s: not looked at: %s at %s", what, type(error).__name__, place)
            if seconds := pause():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await wake.wait()


def signature(folder: Path) -> Signature:
    """What shows that one of a directory's files was changed or replaced; empty where there is no directory."""
    try:
        found = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, entry.st_mtime_ns, entry.st_size, entry.st_ino) for name, entry in found)


def _pairs(
    latest: tuple[Policy, PromptPredictor | None], before: tuple[Policy, PromptPredictor | None]
) -> Iterator[tuple[Policy, PromptPredictor | None]]:
    """What to try, the newest first; the last one is in force, and so fits."""
    yield latest
    yield latest[0], before[1]
    yield before[0], latest[1]
    yield before


def _load(bundle: Path) -> PromptPredictor:
    from router.predictor import load_predictor

    try:
        return load_predictor(bundle)
    except (BundleError, EncoderError):
        raise
    except OSError as error:
        raise BundleError(f"{bundle}: cannot be read ({error.strerror})") from None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
