"""The Kilo CLI, headless, with its own agents; three ways in which an agent becomes a mode."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stage import AFTER, CLIENT_KEY, MODELS, PREDICTED, ROOT, Reply, Stage, client_environment, in_steps, run

CLIENT = "Kilo CLI"
NOTES = {"plain": "always streams"}
PACKAGES = ROOT / ".clients-node" / "node_modules" / "@kilocode"
BINARY = PACKAGES / "cli-linux-x64-baseline" / "bin" / "kilo"
# Price lists, updates, telemetry, shared sessions: each would wait for a network that is not there.
QUIET = {
    "KILO_DISABLE_MODELS_FETCH": "1",
    "KILO_DISABLE_AUTOUPDATE": "1",
    "KILO_DISABLE_SHARE": "1",
    "KILO_DISABLE_SESSION_INGEST": "1",
    "KILO_DISABLE_LSP_DOWNLOAD": "1",
    "KILO_DISABLE_DEFAULT_PLUGINS": "1",
    "KILO_TELEMETRY_LEVEL": "off",
}
PLUGIN = """
export const RouterMode = async () => ({
  "chat.headers": async (input, output) => {
    output.headers["x-router-mode"] = input.agent
  },
})
"""


def version() -> str:
    if not BINARY.exists():
        pytest.skip("no Kilo binary for this machine in .clients-node; see `make test-clients`")
    done = subprocess.run([str(BINARY), "--version"], capture_output=True, text=True, check=True)
    package = json.loads((PACKAGES / "cli" / "package.json").read_text(encoding="utf-8"))["version"]
    return f"@kilocode/cli {package} (its binary: {done.stdout.strip()})"


def config(router: Stage, **more: Any) -> dict[str, Any]:
    """What stands in ``kilo.json``."""
    limit = {"context": 200_000, "output": 16_000}
    return {
        "provider": {
            "router": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Router",
                "options": {"baseURL": f"{router.url}/v1", "apiKey": CLIENT_KEY},
                "models": {
                    name: {"name": name, "limit": limit} for name in ("auto", "auto:plan", "internal")
                },
            }
        },
        "model": "router/auto",
        "small_model": "router/internal",
        **more,
    }


def kilo(folder: Path, settings: Mapping[str, Any], *arguments: str) -> str:
    more = {"KILO_CONFIG_CONTENT": json.dumps(settings), **QUIET}
    environment = client_environment(folder.parent, **more)
    return run([str(BINARY), "run", *arguments, "Mend the spelling."], folder, environment).stdout


@pytest.mark.shows("streamed")
def test_streamed(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    assert "It is mended." in kilo(folder, config(router))
    sent = router.provider.last.body
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert router.asked()[0] in PREDICTED  # its agent is "code", but it does not say so here


@pytest.mark.shows("tools")
def test_tools(router: Stage, folder: Path) -> None:
    """Two of its own tools, one after the other: the file is read, then changed."""
    path = str(folder / "hello.py")
    router.provider.reply = in_steps(
        Reply(tool="read", arguments={"filePath": path}),
        Reply(tool="edit", arguments={"filePath": path, "oldString": "helo", "newString": "hello"}),
    )
    output = kilo(folder, config(router), "--auto")
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    results = [message for message in router.provider.last.body["messages"] if message["role"] == "tool"]
    assert "print('helo')" in str(results[0]["content"])
    assert len(router.decisions(3)) == 3


@pytest.mark.shows("mode")
@pytest.mark.parametrize("agent", ["plan", "code", "debug", "ask"])
def test_mode_by_its_own_header(router: Stage, folder: Path, agent: str) -> None:
    """Its own provider package sends ``x-kilocode-mode``: the agent, whichever it is."""
    router.provider.reply = in_steps()
    settings = config(router)
    provider = settings["provider"]["router"]
    provider["npm"] = "@kilocode/kilo-gateway"
    provider["options"]["baseURL"] = router.url
    assert "It is mended." in kilo(folder, settings, "--agent", agent)
    assert set(router.asked()) == {MODELS[agent]}
    decision = router.decisions()[0]
    assert (decision["mode"], decision["reason"]) == (agent, "signal")
    assert decision["path"] == "/api/openrouter/chat/completions"
    sent = router.provider.last.body
    assert "usage" not in sent  # OpenRouter's way to ask for it
    assert sent["stream_options"] == {"include_usage": True}


@pytest.mark.shows("mode")
def test_mode_by_the_agents_model(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    kilo(folder, config(router, agent={"plan": {"model": "router/auto:plan"}}), "--agent", "plan")
    assert router.asked() == [MODELS["plan"]]


@pytest.mark.shows("mode")
def test_mode_by_a_plugin(router: Stage, folder: Path) -> None:
    """A hook puts the agent's name into the router's header; the same file serves OpenCode."""
    router.provider.reply = in_steps()
    plugin = folder.parent / "router-mode.js"
    plugin.write_text(PLUGIN, encoding="utf-8")
    kilo(folder, config(router, plugin=[plugin.as_uri()]), "--agent", "debug")
    assert router.asked() == [MODELS["debug"]]
    assert os.listdir(folder) == ["hello.py"]
