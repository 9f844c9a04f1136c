"""``router serve`` in a process of its own, as whoever starts it sees it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
_URL = re.compile(r"http://[\d.]+:\d+")


@dataclass
class Serving:
    """A server that runs; ``lines`` is what it has said so far on standard error."""

    process: subprocess.Popen[str]
    reader: threading.Thread = field(default_factory=threading.Thread)
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def get(self, path: str) -> httpx.Response:
        """A connection for this one request, so that any worker may get it."""
        return httpx.get(f"{self.url}{path}", timeout=30, verify=False)

    def post(self, path: str, json: object, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, headers=headers, timeout=30, verify=False)

    def metric(self, sample: str) -> float:
        """The sum of the samples that begin so, by whichever worker answers."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(sample))

    def wait_for(self, words: str) -> None:
        """Until it has said so."""
        deadline = time.monotonic() + 30
        while not any(words in line for line in list(self.lines)):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        self.reader.join(30)


@contextmanager
def serving(folder: Path, *arguments: str, environment: Mapping[str, str] = {}) -> Iterator[Serving]:
    """Start the server in a folder, whose ``router.yaml`` is its policy; stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "serve", "--port", "0", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background has interrupts ignored, and so would the server.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    server = Serving(process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip("\n"))

    server.reader = threading.Thread(target=read)
    server.reader.start()
    try:
        server.url = _until_ready(server)
        yield server
        server.stop()
    finally:
        with suppress(ProcessLookupError):  # its workers too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server.reader.join()
        process.stderr.close()


def _until_ready(server: Serving) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        found = next(filter(None, map(_URL.search, list(server.lines))), None)
        if found is not None:
            try:
                httpx.get(f"{found[0]}/healthz", timeout=30, verify=False)
                return found[0]
            except httpx.TransportError:
                pass
        time.sleep(0.02)
    raise AssertionError(server.lines)
