"""What the ledger, and a shared session store, cost a request: the same server with and without, in one interleaved run.

``make bench-ledger-cost`` runs it: one server for each way, the target pinned (so that all else is as cheap as it gets), one
provider. A round measures all of them one after another, the next in the opposite order; ratios are taken within a round
against the server without a ledger. PostgreSQL and Redis are those of ROUTER_TEST_POSTGRES_URL and ROUTER_TEST_REDIS_URL, left
out where these are not set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from bench_gateway import Run, Subject, _free_port, compare, running
from ledgers import own_schema

NOTHING = "no ledger"
FIELDS = ("p50_ms", "p99_ms", "per_second", "cpu_ms")


def ways(stack: ExitStack, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Flags of each server, by what it does."""
    yield NOTHING, []
    for durability in ("batched", "strict"):
        yield (
            f"SQLite, {durability}",
            [f"--ledger={folder / durability}.db", f"--ledger-durability={durability}"],
        )
    if os.environ.get("ROUTER_TEST_POSTGRES_URL"):
        for durability in ("batched", "strict"):
            url = stack.enter_context(own_schema())
            yield f"PostgreSQL, {durability}", [f"--ledger={url}", f"--ledger-durability={durability}"]
        yield "sessions in PostgreSQL", [f"--session-store={stack.enter_context(own_schema())}"]
    if redis := os.environ.get("ROUTER_TEST_REDIS_URL"):
        yield "sessions in Redis", [f"--session-store={redis}"]


def policy(base: str) -> dict[str, Any]:
    weak = {"model": "openai/weak", "api_base": base, "prices": {"input": 0.25, "output": 2}}
    return {
        "version": 1,
        "targets": {"weak": weak},
        "tiers": {"auto": {"default": "weak"}},
        "default_tier": "auto",
    }


def start(stack: ExitStack) -> list[Subject]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-ledger-cost-")))
    port = _free_port()
    command = [sys.executable, "-m", "tests.provider", "--port", str(port)]
    stack.enter_context(running("provider", command, port, "weak", "", folder))
    file = folder / "policy.json"
    file.write_text(json.dumps(policy(f"http://127.0.0.1:{port}/v1")))
    subjects = []
    for number, (name, flags) in enumerate(ways(stack, folder)):
        port = _free_port()
        command = [
            sys.executable,
            "-m",
            "router",
            "serve",
            "--policy",
            str(file),
            "--port",
            str(port),
            *flags,
        ]
        environment = {"ROUTER_LOG_LEVEL": "warning", "XDG_DATA_HOME": str(folder / str(number))}
        server = stack.enter_context(
            running(f"way-{number}", command, port, "weak", "/readyz", folder, environment)
        )
        subjects.append(Subject(name, server, "weak", b"\r\nx-router-reason: pinned\r\n"))
    return subjects


def report(runs: Mapping[str, Mapping[int, Sequence[Run]]]) -> dict[str, Any]:
    """Medians over the rounds, and medians of the ratios (of the differences of milliseconds too) within a round."""
    found: dict[str, Any] = {}
    for name, by_concurrency in runs.items():
        for concurrency, rounds in by_concurrency.items():
            mine = [asdict(run) for run in rounds]
            none = [asdict(run) for run in runs[NOTHING][concurrency]]
            found.setdefault(name, {})[str(concurrency)] = {
                field: {
                    "median": statistics.median(run[field] for run in mine),
                    "ratio": statistics.median(a[field] / b[field] for a, b in zip(mine, none, strict=True)),
                    "more": statistics.median(a[field] - b[field] for a, b in zip(mine, none, strict=True)),
                }
                for field in FIELDS
            }
    return found


def table(found: Mapping[str, Any]) -> str:
    low, high = next(iter(found.values()))
    head = (
        "",
        f"p50 ms, c = {low}",
        f"p99 ms, c = {low}",
        f"p50 ms, c = {high}",
        f"p99 ms, c = {high}",
        f"requests/s, c = {high}",
        f"CPU ms a request, c = {high}",
    )
    columns = [
        (low, "p50_ms"),
        (low, "p99_ms"),
        (high, "p50_ms"),
        (high, "p99_ms"),
        (high, "per_second"),
        (high, "cpu_ms"),
    ]
    lines = [head, ("---",) * len(head)]
    for name, at in found.items():
        cells = [name]
        for concurrency, field in columns:
            value = at[concurrency][field]
            digits = 0 if field == "per_second" else 2
            ratio = "" if name == NOTHING else f" (× {value['ratio']:.2f})"
            cells.append(f"{value['median']:.{digits}f}{ratio}")
        lines.append(tuple(cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def measured(subjects: Sequence[Subject], options: argparse.Namespace) -> dict[str, Any]:
    counts = {1: options.alone, options.concurrency: options.together}
    return report(await compare(subjects, options.rounds, counts, options.alone))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--alone", type=int, default=300, help="requests a round at concurrency 1")
    parser.add_argument("--together", type=int, default=800, help="requests a round at the other concurrency")
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    with ExitStack() as stack:
        subjects = start(stack)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measured(subjects, options))
    print(table(found), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
