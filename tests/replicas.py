"""Servers in processes of their own, as a deployment runs them: replicas of one policy, on one ledger and one session store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from running import ENVIRONMENT

ROOT = Path(__file__).parent.parent
READY_SECONDS = 180  # loading litellm takes seconds, on a busy machine many
PLANNING = {"plan": "frontier"}


class Replica:
    """One `router serve`, which can be killed and started again at the same address.

    Parameters
    ----------
    flags : sequence of str
        Of the command, without an address.
    log : Path
        Its standard error is added here.
    environment : mapping
        Added to this process's own.
    """

    def __init__(self, flags: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._flags = tuple(flags)
        self._log = log
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "ROUTER_LOG_LEVEL": "warning", **ENVIRONMENT, **(environment or {}),
        }  # fmt: skip
        self._port = 0
        self._said_before = 0
        self.url = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Replica:
        """Start the process; :meth:`ready` waits until it answers."""
        command = [sys.executable, "-m", "router", "serve", *self._flags, f"--port={self._port}"]
        with self._log.open("a") as log:
            self._said_before = log.tell()
            self.process = subprocess.Popen(command, env=self._environment, stderr=log, text=True)
        return self

    def ready(self) -> Replica:
        assert self.process is not None
        deadline = time.monotonic() + READY_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := re.search(r"^router \S+ on (http://\S+:(\d+))$", self.said(), re.M):
                self.url, self._port = found[1], int(found[2])
                with suppress(httpx.TransportError):
                    if httpx.get(f"{self.url}/readyz").json()["dispatch"] == "ready":
                        return self
            time.sleep(0.05)
        raise RuntimeError(f"the server is not ready: {self.said()}")

    def said(self) -> str:
        """What this process wrote to its log."""
        with self._log.open() as log:
            log.seek(self._said_before)
            return log.read()

    def kill(self) -> None:
        """As a machine that loses its power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """As an orchestrator does; the status that it ends with."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=40)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def policy_file(path: Path, base: str, modes: Mapping[str, str] = PLANNING, **changes: Any) -> Path:
    """A policy of two targets at a provider: planning goes to the dear one, and a session stays where it is."""

    def target(name: str, **prices: float) -> dict[str, Any]:
        return {
            "model": f"openai/{name}", "api_base": base, "api_key_env": next(iter(ENVIRONMENT)), "prices": prices,
        }  # fmt: skip

    document = {
        "version": 1,
        "targets": {
            "cheap": target("small", input=0.25, output=2, cached_read=0.025),
            "frontier": target("large", input=5, output=25, cached_read=0.5, cache_write=6.25),
        },
        "tiers": {"auto": {"modes": dict(modes), "default": "cheap", "steps": [{"to": "stay"}]}},
        "default_tier": "auto",
    }
    path.write_text(yaml.safe_dump(document | changes))
    return path
