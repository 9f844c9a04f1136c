"""Our server beside the LiteLLM proxy: latency at concurrency 1, throughput at concurrency 8.

``make bench-gateway`` runs it. One worker each, one provider on the loopback interface for both, prompts of about
20 tokens. The proxy chooses between two deployments with its own learned classifier, ``heuristic_v2``; ours with
a bundle. Beside them stand ours with the target pinned, the proxy without routing, and the provider alone: what
the load generator itself can measure.

Neighbours on the machine, its clock and its temperature change within minutes. So every round measures all of
them one after another, the next round in the opposite order; ratios are taken within a round, and the table shows
the median over the rounds. CPU time is the server process's own, and suffers least from neighbours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import uvloop

ROOT = Path(__file__).resolve().parent.parent

# 20 tokens, give or take one, with a number of four digits. Every request has another: none can be answered by a cache.
PROMPTS = (
    "Rename parse_config to load_config everywhere, as {} asks.",
    "Write a commit message for change {}, which retries failed uploads up to three times.",
    "Which planets of our solar system have rings, and which ring was found first, in {}?",
    "Prove that the square root of {} is irrational, then generalise the proof to primes.",
    "My unit test {} passes locally but fails in CI with a timeout; where do I look?",
    "Summarise the meeting notes of room {} in three sentences for somebody who was away.",
    "Translate into German: your delivery {} will be two days late because of the storm at sea.",
    "Explain why quicksort is quadratic on {} sorted rows and how one can avoid that.",
)

START_SECONDS = 300
ANSWER_SECONDS = 30

# The proxy as its documentation runs it in production, but without a key, as ours is; nothing from the network.
PROXY_ENVIRONMENT = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_AUTOROUTER_PRESETS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
}


@dataclass(frozen=True)
class Server:
    """A running server process.

    Attributes
    ----------
    ready_s : float
        Seconds from its start until it called itself ready.
    first_answer_s : float
        Seconds from its start until it had answered a chat completion.
    """

    process: psutil.Process
    port: int
    ready_s: float
    first_answer_s: float


@dataclass(frozen=True)
class Subject:
    """What is measured: a server, and the model that it is asked for.

    ``header`` is a header line that its answers must hold: that it really predicted, or really did not.
    """

    name: str
    server: Server
    model: str
    header: bytes = b""


@dataclass(frozen=True)
class Run:
    """Some requests to one subject at one concurrency, in one round. ``cpu_ms`` is of the server, per request."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_second: float
    cpu_ms: float


class Client:
    """One connection that stays open, speaking just enough HTTP/1.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer; an answer other than 200 ends the benchmark."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        body = await self._reader.readexactly(int(length or 0))
        if not head.startswith(b"http/1.1 200 "):
            raise SystemExit(f"bench-gateway: {(head + body).decode(errors='replace')}")
        return head, body

    def close(self) -> None:
        self._writer.close()


def chat_request(model: str, number: int) -> bytes:
    """A chat completion as it goes over the wire; the number makes its prompt another than all others."""
    prompt = PROMPTS[number % len(PROMPTS)].format(1000 + number)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def measure(subject: Subject, concurrency: int, numbers: range) -> Run:
    """Send the numbered requests over ``concurrency`` connections, the next as soon as one is answered."""
    requests = iter([chat_request(subject.model, number) for number in numbers])
    clients = [await Client.connect(subject.server.port) for _ in range(concurrency)]
    seconds: list[float] = []

    async def work(client: Client) -> None:
        for request in requests:
            started = time.perf_counter()
            head, _ = await client.post(request)
            seconds.append(time.perf_counter() - started)
            if subject.header not in head:
                raise SystemExit(
                    f"bench-gateway: {subject.name}: no {subject.header.decode().strip()} in its answer"
                )

    cpu = _cpu_seconds(subject.server)
    started = time.perf_counter()
    async with asyncio.timeout(ANSWER_SECONDS + len(numbers)), asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(work(client))
    elapsed = time.perf_counter() - started
    cpu = _cpu_seconds(subject.server) - cpu
    for client in clients:
        client.close()
    ranked = sorted(seconds)
    return Run(
        p50_ms=statistics.median(ranked) * 1e3,
        p95_ms=ranked[int(0.95 * len(ranked))] * 1e3,
        p99_ms=ranked[int(0.99 * len(ranked))] * 1e3,
        per_second=len(numbers) / elapsed,
        cpu_ms=cpu / len(numbers) * 1e3,
    )


async def compare(
    subjects: Sequence[Subject], rounds: int, counts: Mapping[int, int], warm_up: int
) -> dict[str, dict[int, list[Run]]]:
    """Runs by subject and concurrency, one a round; ``counts`` gives the requests at each concurrency."""
    for subject in subjects:
        _say(f"warming up: {subject.name}")
        for concurrency in counts:
            await measure(subject, concurrency, range(warm_up))
    runs: dict[str, dict[int, list[Run]]] = {s.name: {c: [] for c in counts} for s in subjects}
    start = warm_up
    for number in range(rounds):
        order = subjects if number % 2 == 0 else subjects[::-1]
        for concurrency, count in counts.items():
            numbers = range(start, start := start + count)
            for subject in order:
                runs[subject.name][concurrency].append(await measure(subject, concurrency, numbers))
        _say(f"round {number + 1} of {rounds}")
    return runs


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    model: str,
    ready: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server, wait until it has answered once, and end it by its process id."""
    log = folder / f"{name}.log"
    inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    _say(f"starting: {name}")
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:

        def seconds_until(request: bytes) -> float:
            while not _answers(port, request):
                if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    raise SystemExit(f"bench-gateway: {name} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - started

        ready_s = seconds_until(f"GET {ready} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()) if ready else 0.0
        first_answer_s = seconds_until(chat_request(model, 0))
        yield Server(psutil.Process(process.pid), port, ready_s, first_answer_s)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int, request: bytes) -> bool:
    async def once() -> bool:
        client = await Client.connect(port)
        try:
            await asyncio.wait_for(client.post(request), ANSWER_SECONDS)
        finally:
            client.close()
        return True

    try:
        return asyncio.run(once())
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        return False


def _cpu_seconds(server: Server) -> float:
    times = server.process.cpu_times()
    return float(times.user + times.system)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def policy(provider: str) -> dict[str, Any]:
    """Ours: two targets at the provider, and the bundle between them."""
    targets = {name: {"model": f"openai/{name}", "api_base": provider} for name in ("weak", "strong")}
    tiers = {"auto": {"predict": {"weak": "weak", "strong": "strong"}}}
    return {"version": 1, "targets": targets, "tiers": tiers, "default_tier": "auto"}


def proxy_config(provider: str) -> dict[str, Any]:
    """The proxy's: the same two deployments, and its learned classifier between them."""

    def deployment(name: str, **params: Any) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": params}

    classifier = {
        "classifier_type": "heuristic_v2",
        "tiers": {"SIMPLE": "weak", "MEDIUM": "weak", "COMPLEX": "strong", "REASONING": "strong"},
    }
    return {
        "model_list": [
            *(
                deployment(name, model=f"openai/{name}", api_base=provider, api_key="none")
                for name in ("weak", "strong")
            ),
            deployment(
                "auto",
                model="auto_router/complexity_router",
                complexity_router_default_model="strong",
                complexity_router_config=classifier,
            ),
        ],
        "litellm_settings": {"set_verbose": False, "num_retries": 0, "request_timeout": 600},
    }


def servers(stack: ExitStack, bundle: Path | None, proxy: Path | None) -> list[Subject]:
    """Start everything; the stack ends it."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gateway-")))

    def start(
        name: str,
        command: Callable[[str, Path], Sequence[str]],
        config: Mapping[str, Any] | None = None,
        ready: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
        port = _free_port()
        return stack.enter_context(
            running(name, command(str(port), file), port, "weak", ready, folder, environment)
        )

    provider = start("provider", lambda port, _: [sys.executable, "-m", "tests.provider", "--port", port])
    url = f"http://127.0.0.1:{provider.port}/v1"

    def router_serve(port: str, file: Path) -> list[str]:
        chosen = ["--bundle", str(bundle)] if bundle else []
        return [sys.executable, "-m", "router", "serve", "--policy", str(file), "--port", port, *chosen]

    ours = start("router", router_serve, policy(url), "/readyz")
    subjects = [
        Subject("router, predicted", ours, "auto", b"\r\nx-router-reason: predicted\r\n"),
        Subject("router, pinned", ours, "weak", b"\r\nx-router-reason: pinned\r\n"),
        Subject("provider alone", provider, "weak"),
    ]
    if proxy is None:
        return subjects

    def litellm(port: str, file: Path) -> list[str]:
        where = ["--config", str(file), "--host", "127.0.0.1", "--port", port]
        return [str(proxy), *where, "--num_workers", "1", "--telemetry", "False"]

    theirs = start("proxy", litellm, proxy_config(url), "/health/readiness", PROXY_ENVIRONMENT)
    cause = b"\r\nx-litellm-complexity-router-cause: heuristic_v2\r\n"
    return [
        subjects[0],
        Subject("proxy, heuristic_v2", theirs, "auto", cause),
        subjects[1],
        Subject("proxy, no routing", theirs, "weak"),
        subjects[2],
    ]


def report(
    subjects: Sequence[Subject], runs: Mapping[str, Mapping[int, Sequence[Run]]], rss: Mapping[str, float]
) -> dict[str, Any]:
    """Everything measured: by subject, and ours against the proxy's within each round."""
    measured = {
        subject.name: {
            "ready_s": subject.server.ready_s,
            "first_answer_s": subject.server.first_answer_s,
            "rss_mb": rss[subject.name],
            "concurrency": {
                str(concurrency): {
                    field: _spread([asdict(run)[field] for run in rounds])
                    for field in ("p50_ms", "p95_ms", "per_second", "cpu_ms")
                }
                for concurrency, rounds in runs[subject.name].items()
            },
        }
        for subject in subjects
    }
    ratios = {}
    for ours, theirs in (
        ("router, predicted", "proxy, heuristic_v2"),
        ("router, pinned", "proxy, no routing"),
    ):
        if theirs in runs:
            ratios[f"{ours} / {theirs}"] = {
                str(concurrency): {
                    field: _spread(
                        [
                            asdict(a)[field] / asdict(b)[field]
                            for a, b in zip(runs[ours][concurrency], runs[theirs][concurrency], strict=True)
                        ]
                    )
                    for field in ("p50_ms", "per_second", "cpu_ms")
                }
                for concurrency in runs[ours]
            }
    return {"measured": measured, "ratios": ratios}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(data: Mapping[str, Any]) -> str:
    """The report for people: medians, with the least and the most over the rounds."""

    def spread(values: Mapping[str, float], digits: int) -> str:
        return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}–{values['max']:.{digits}f})"

    low, high = next(iter(data["measured"].values()))["concurrency"]
    head = (
        "",
        f"p50 ms, c={low}",
        f"requests/s, c={high}",
        f"CPU ms/request, c={high}",
        "RSS MB",
        "ready s",
        "first answer s",
    )
    rows: list[tuple[str, ...]] = []
    for name, subject in data["measured"].items():
        at = subject["concurrency"]
        rows.append(
            (
                name,
                spread(at[low]["p50_ms"], 2),
                spread(at[high]["per_second"], 0),
                spread(at[high]["cpu_ms"], 2),
                f"{subject['rss_mb']:.0f}",
                f"{subject['ready_s']:.1f}",
                f"{subject['first_answer_s']:.1f}",
            )
        )
    for name, at in data["ratios"].items():
        figures = (at[low]["p50_ms"], at[high]["per_second"], at[high]["cpu_ms"])
        rows.append((name, *(spread(values, 2) for values in figures), "", "", ""))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--proxy", type=Path, metavar="FILE", help="the command litellm; ours alone without it"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the one that comes along by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--latency-requests", type=int, default=150, help="a round, at concurrency 1")
    parser.add_argument("--throughput-requests", type=int, default=400, help="a round, at concurrency 8")
    parser.add_argument("--warm-up", type=int, default=100, help="requests before, at each concurrency")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    bundle, proxy = (path and path.resolve() for path in (options.bundle, options.proxy))
    counts = {1: options.latency_requests, 8: options.throughput_requests}
    # Who ends the benchmark ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        subjects = servers(stack, bundle, proxy)
        runs = uvloop.run(compare(subjects, options.rounds, counts, options.warm_up))
        rss = {subject.name: subject.server.process.memory_info().rss / 1e6 for subject in subjects}
    data = report(subjects, runs, rss)
    print(json.dumps(data, indent=2) if options.json else table(data))


if __name__ == "__main__":
    main()
