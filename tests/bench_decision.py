"""How long a decision without a prediction takes: a request of 50 messages with tools, decided 10,000 times.

``python tests/bench_decision.py [N]`` prints percentiles in milliseconds, for each way to decide without the bundle.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.bundle import default_bundle_dir, read_manifest
from router.decision import decide, needs_prediction
from router.dialects import CHAT
from router.gateway import bound
from router.policy import Policy, example_policy_path, load_policy
from router.schemas import read_facts


def conversation(messages: int = 50) -> bytes:
    """An agent's request: a system prompt, an ask, tool calls and their results, and twenty tools; about 100 kB."""
    body: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a coding agent.\n" + "Follow the rules. " * 400},
        {"role": "user", "content": "Fix the failing test in tests/test_app.py."},
    ]
    for i in range((messages - 2) // 2):
        function = {"name": "read_file", "arguments": json.dumps({"path": f"src/module_{i}.py"})}
        body.append(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": f"c{i}", "type": "function", "function": function}],
            }
        )
        body.append(
            {
                "role": "tool",
                "tool_call_id": f"c{i}",
                "content": f"def function_{i}(x):\n    return x\n" * 90,
            }
        )
    schema = {
        "type": "object",
        "properties": {f"field_{k}": {"type": "string", "description": "A field."} for k in range(8)},
    }
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool_{k}", "description": "A tool. " * 20, "parameters": schema},
        }
        for k in range(20)
    ]
    return json.dumps({"model": "top", "messages": body, "tools": tools}).encode()


def example() -> Policy:
    """The example policy as the shipped bundle's manifest binds it."""
    return bound(load_policy(example_policy_path()), read_manifest(default_bundle_dir()))


def timed(
    policy: Policy, content: bytes, headers: Mapping[str, str], n: int
) -> tuple[NDArray[np.float64], str]:
    """Milliseconds of n decisions by the clock and of the processor, shape (2, n); and the reason of the last.

    Reading facts from the parsed body is included. Where other processes keep the cores busy, the clock tells of them.
    """
    chat = CHAT.read(content, {})
    times = np.empty((2, n))
    for i in range(n):
        started, worked = time.perf_counter(), time.thread_time()
        facts = read_facts(chat.body, headers, policy.limits, chat.content())
        assert not needs_prediction(facts, policy)
        decision = decide(facts, policy)
        times[:, i] = time.perf_counter() - started, time.thread_time() - worked
    return times * 1e3, decision.reason


def main(n: int = 10_000) -> None:
    policy, content = example(), conversation()
    narrow = policy.model_copy(
        update={
            "targets": {
                name: target.model_copy(update={"context_window": len(content) // 2})
                for name, target in policy.targets.items()
            }
        }
    )
    cases: dict[str, tuple[Policy, dict[str, str]]] = {
        "mode in a header": (policy, {"x-router-mode": "plan"}),
        "step rule": (policy, {}),
        "mode, tokens counted": (narrow, {"x-router-mode": "plan"}),
    }
    print(f"{len(content):,} bytes, {n:,} decisions each; milliseconds")
    for name, (one, headers) in cases.items():
        times, reason = timed(one, content, headers, n)
        for clock, row in zip(("clock", "processor"), times, strict=True):
            p50, p99, worst = np.percentile(row, [50, 99, 100])
            print(f"{name:21} {reason:7} {clock:10} p50 {p50:.3f}  p99 {p99:.3f}  max {worst:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
