"""What every real client is put in front of: ``router serve`` as a user starts it, and a loopback provider behind it.

The policy sends each mode to a target of its own, so that the model which the provider was asked for says which mode
arrived. The provider answers as a test tells it to: a client that edits files needs edits that apply.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from provider import USAGE, Provider, Seen, serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-the-servers-own-key-0000000000"
CLIENT_KEY = "sk-any"

# What an agent is asked to mend, and how it then reads.
BEFORE = "print('helo')\n"
AFTER = "print('hello')\n"

# Mode → the model that the provider is then asked for.
MODELS = {
    "plan": "big-plan",
    "architect": "big-architect",
    "debug": "big-debug",
    "code": "mid-code",
    "edit": "mid-edit",
    "ask": "mid-ask",
}
INTERNAL = "tiny"
PREDICTED = ("small", "large")

_DECISION = re.compile(
    r"(?P<method>[A-Z]+) (?P<path>/\S+) (?P<status>\d{3}) .* target=(?P<target>\S+) reason=(?P<reason>\S+) "
    r"tier=(?P<tier>\S+) mode=(?P<mode>\S+)"
)


@dataclass(frozen=True)
class Reply:
    """What the provider answers: a text, or one call of a tool."""

    text: str = "Hello there!"
    tool: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def hello(body: Mapping[str, Any]) -> Reply:
    """Call the first tool that is offered, once; then, or without tools, say hello."""
    tools = body.get("tools")
    if tools and body["messages"][-1]["role"] != "tool":
        return Reply(tool=tools[0]["function"]["name"], arguments={"city": "Oslo"})
    return Reply()


def in_steps(*steps: Reply) -> Callable[[Mapping[str, Any]], Reply]:
    """One reply after each tool result, then "It is mended."; what asks without tools gets that at once."""

    def reply(body: Mapping[str, Any]) -> Reply:
        done = sum(message["role"] == "tool" for message in body["messages"])
        return steps[done] if body.get("tools") and done < len(steps) else Reply("It is mended.")

    return reply


class ScriptedProvider(Provider):
    """The loopback provider with answers that a test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.reply: Callable[[Mapping[str, Any]], Reply] = hello

    async def chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.seen.append(Seen(request.url.path, dict(request.headers), body))
        reply = self.reply(body)
        if body.get("stream"):
            return StreamingResponse(_chunks(body, reply), media_type="text/event-stream")
        call = {"id": _call_id(body), "type": "function"}
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.tool is not None:
            function = {"name": reply.tool, "arguments": json.dumps(reply.arguments)}
            message |= {"content": None, "tool_calls": [call | {"function": function}]}
        choice = {"index": 0, "message": message, "finish_reason": _finish(reply)}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return JSONResponse(head | {"choices": [choice], "usage": USAGE})


@dataclass
class Stage:
    """A running ``router serve`` and its provider.

    Attributes
    ----------
    url : str
        The router's, without a path.
    provider : ScriptedProvider
    log : list of str
        What the router has written on standard error.
    """

    url: str
    provider: ScriptedProvider
    log: list[str]

    def clear(self) -> None:
        """Forget earlier requests, so that a test sees its own."""
        self.provider.seen.clear()
        self.provider.reply = hello
        self.log.clear()

    def asked(self) -> list[str]:
        """The models that the provider was asked for, in order."""
        return [seen.body["model"] for seen in self.provider.seen]

    def decisions(self, count: int = 1) -> list[dict[str, str]]:
        """What the router says that it decided on chat requests, once it has said so ``count`` times."""
        deadline = time.monotonic() + 5
        while True:
            found = [match.groupdict() for line in self.log if (match := _DECISION.search(line))]
            found = [decision for decision in found if decision["method"] == "POST"]
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.01)


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Start provider and router, each on a free port of the loopback interface; ``folder`` is to be empty."""
    upstream = ScriptedProvider()
    with serve(upstream.app) as base:
        path = folder / "policy.yaml"
        path.write_text(yaml.safe_dump(policy(f"{base}/v1"), sort_keys=False), encoding="utf-8")
        # Nothing of the machine's own settings gets in, ./router.yaml and variables included.
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TEST_PROVIDER_KEY": KEY}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", "router", "serve", "--policy", str(path), "--port", "0"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        log: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            url = _address(process, log)
            _until_ready(url)
            yield Stage(url, upstream, log)
        finally:
            process.terminate()
            process.wait(40)
            reader.join(5)
            process.stderr.close()


def policy(base: str) -> dict[str, Any]:
    """A target per mode, a tier for what is small, and a prediction for the rest."""
    names = [*MODELS.values(), INTERNAL, *PREDICTED]
    return {
        "version": 1,
        "targets": {
            f"to-{name}": {"model": f"openai/{name}", "api_base": base, "api_key_env": "TEST_PROVIDER_KEY"}
            for name in names
        },
        "tiers": {
            "top": {
                "modes": {mode: f"to-{model}" for mode, model in MODELS.items()},
                # Whatever the bundle thinks of a test's short prompts, they are predicted.
                "predict": {
                    "weak": f"to-{PREDICTED[0]}",
                    "strong": f"to-{PREDICTED[1]}",
                    "unknown": "predict",
                },
            },
            "internal": {"default": f"to-{INTERNAL}"},
        },
        "default_tier": "top",
        "aliases": {"gpt-*": "auto", "claude-haiku-*": "internal", "claude-*": "auto"},
    }


def client_environment(home: Path, **more: str) -> dict[str, str]:
    """Variables for a client that is a program: a home of its own, and a dead proxy for all but the loopback.

    What it tries to send elsewhere fails at once, instead of waiting for a network.
    """
    dead = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), dead)
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    # Some install plugins by npm, which would try again for a minute.
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "npm_config_fetch_retries": "0"}
    return {**own, **proxies, **local, **more}


def run(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end; its output is the test's message where it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        timeout=timeout,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}"
    return done


async def _chunks(body: Mapping[str, Any], reply: Reply) -> AsyncIterator[bytes]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode()

    yield event({"role": "assistant", "content": "" if reply.tool is None else None})
    if reply.tool is None:
        for piece in re.findall(r"\s*\S+\s*?|\s+", reply.text):
            yield event({"content": piece})
    else:
        function = {"name": reply.tool, "arguments": ""}
        call = {"index": 0, "id": _call_id(body), "type": "function", "function": function}
        yield event({"tool_calls": [call]})
        arguments = json.dumps(reply.arguments)
        for piece in (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :]):
            yield event({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
    yield event({}, _finish(reply))
    if (body.get("stream_options") or {}).get("include_usage"):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': USAGE})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _call_id(body: Mapping[str, Any]) -> str:
    """Another one for each step: some clients tell calls apart by it."""
    return f"call_{1 + sum(message['role'] == 'tool' for message in body['messages'])}"


def _finish(reply: Reply) -> str:
    return "stop" if reply.tool is None else "tool_calls"


# On a machine that is busy with other things, starting and loading litellm each take long.
_START_SECONDS = 180


def _address(process: subprocess.Popen[str], log: Sequence[str]) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"^router \S+ on (http://\S+)$", "".join(log), re.MULTILINE)
        if found:
            return found.group(1)
        time.sleep(0.02)
    raise RuntimeError(f"the router did not start:\n{''.join(log)}")


def _until_ready(url: str) -> None:
    """Until litellm is loaded, so that a client's time limit does not count that."""
    deadline = time.monotonic() + _START_SECONDS
    state = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                state = json.load(answer)
            if state["dispatch"] == "ready":
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the router did not become ready: {state}")
