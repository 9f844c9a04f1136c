"""Many requests while the policy is rewritten all the time, good and bad in turn.

``make soak`` sends 10,000, to a server in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from provider import serve

from router.app import create_app
from router.gateway import load_gateway
from router.policy import parse_policy
from router.settings import load_settings

ROOT = Path(__file__).parent.parent
SOAK = "ROUTER_SOAK_REQUESTS"
REQUESTS = int(os.environ.get(SOAK, "2000"))
CONCURRENCY = 32
EVERY_SECONDS = 0.05
CHAT_SHARE = 20  # one request in so many is dispatched, to an echo


def good(number: int) -> bytes:
    """A policy like no other, whose requests go to ``even`` or ``odd``."""
    target = ("even", "odd")[number % 2]
    return (
        "version: 1\n"
        "targets: {even: {echo: true}, odd: {echo: true}, never: {echo: true}}\n"
        f"tiers: {{auto: {{modes: {{plan: {target}}}, default: {target}}}}}\n"
        f"limits: {{prompts: {1000 + number}}}\n"
        "default_tier: auto\n"
    ).encode()


def bad(number: int) -> bytes | None:
    """A policy that is wrong, each in another way, and would send requests to ``never``; None is no file at all."""
    text = good(number).replace(b"plan: even", b"plan: never").replace(b"default: even", b"default: never")
    wrong = text.replace(b"plan: odd", b"plan: never").replace(b"default: odd", b"default: never")
    return (
        wrong.replace(b"default_tier: auto", b"default_tier: other"),
        wrong + b"nonsense: 1\n",
        wrong[: len(wrong) // 2],
        b"",
        wrong.replace(b"echo: true", b"echo: [true", 1),
        wrong.replace(b"version: 1", b"version: 2"),
        wrong + b"# caf\xe9\n",
        wrong + b"#" * 2**20,
        wrong.replace(b"never: {echo: true}", b"no: {echo: true}"),
        None,
    )[number % 10]


async def rewrite(path: Path, written: dict[str, str], counts: Counter[str]) -> None:
    """Good and bad in turn; in place and half by half, or by a new file."""
    number = 0
    while True:
        started = time.monotonic()
        number += 1
        if number % 2:
            content: bytes | None = good(number // 2)
            assert content is not None
            policy = parse_policy(content, "written")
            written[policy.hash] = policy.tiers["auto"].default
        else:
            content = bad(number // 2)
        counts["good" if number % 2 else "bad"] += 1
        if content is None:
            path.unlink()
        elif number % 3:
            scratch = path.with_suffix(".new")
            scratch.write_bytes(content)
            scratch.replace(path)
        else:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                await asyncio.sleep(0.005)
                file.write(content[len(content) // 2 :])
        await asyncio.sleep(max(EVERY_SECONDS - (time.monotonic() - started), 0))


def request(path: str, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def ask(port: int, todo: Iterator[int], seen: list[tuple[str, str, float]]) -> None:
    """Send requests on one connection until there are none; anything but the right answer ends the test."""
    route = request("/v1/route", {"prompt": "x"})
    chat = request("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in todo:
        dispatched = number % CHAT_SHARE == 0
        started = time.perf_counter()
        writer.write(chat if dispatched else route)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(re.findall(r"^([a-z-]+): (.*)\r$", head, re.MULTILINE))
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        seconds = time.perf_counter() - started
        assert head.startswith("HTTP/1.1 200 "), head
        target, version = headers["x-router-target"], headers["x-router-policy"]
        if dispatched:
            assert body["choices"][0]["message"]["content"] == f"[{target}] hello"
        else:
            assert (body["target"], body["policy"]) == (target, version)
        seen.append((version, target, seconds))
    writer.close()
    await writer.wait_closed()


@contextmanager
def served(policy: Path) -> Iterator[str]:
    with in_a_process(policy) if SOAK in os.environ else in_a_thread(policy) as url:
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/readyz").json()["dispatch"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url


@contextmanager
def in_a_thread(policy: Path) -> Iterator[str]:
    gateway = load_gateway(*load_settings(policy=policy, reload_seconds=0.01))
    with serve(create_app(gateway=gateway)) as url:
        yield url


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx.get(f"{url}/healthz")
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def in_a_process(policy: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "serve", "--policy", str(policy), "--port=0"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "ROUTER_RELOAD_SECONDS": "0.01",
            "ROUTER_LOG_LEVEL": "error",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found
        wait_for(found[0])
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def load(
    url: str, policy: Path, written: dict[str, str], counts: Counter[str]
) -> list[tuple[str, str, float]]:
    seen: list[tuple[str, str, float]] = []
    port, todo = int(url.rpartition(":")[2]), iter(range(REQUESTS))
    writer = asyncio.create_task(rewrite(policy, written, counts))
    await asyncio.gather(*(ask(port, todo, seen) for _ in range(CONCURRENCY)))
    assert not writer.done()
    writer.cancel()
    return seen


def test_no_request_fails_or_sees_a_policy_that_never_was(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_bytes(good(0))
    written: dict[str, str] = {parse_policy(good(0), "first").hash: "even"}
    counts: Counter[str] = Counter()
    with served(policy) as url:
        started = time.perf_counter()
        seen = asyncio.run(load(url, policy, written, counts))
        seconds = time.perf_counter() - started
        page = httpx.get(f"{url}/metrics").text
    assert len(seen) == REQUESTS
    assert all(written.get(version) == target for version, target, _ in seen)
    reloads = {
        result: int(float(value))
        for result, value in re.findall(r'router_policy_reloads_total\{result="(\w+)"\} (\S+)', page)
    }
    # Otherwise nothing was shown.
    assert reloads["ok"] >= 2
    assert reloads["invalid"] >= REQUESTS / 1000
    assert len({version for version, _, _ in seen}) >= 2
    assert {target for _, target, _ in seen} == {"even", "odd"}
    took = np.array([one for *_, one in seen]) * 1e3
    print(
        f"\n{len(seen)} requests in {seconds:.1f} s, 0 failed; written: {dict(counts)}; reloads: {reloads}; "
        f"policies that decided: {len({version for version, _, _ in seen})}; "
        f"p50 {np.percentile(took, 50):.1f} ms, p99 {np.percentile(took, 99):.1f} ms"
    )
