"""OpenCode, headless; the Kilo CLI is made of it, so its configuration and its hooks are the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from client_kilo import PLUGIN, config
from stage import AFTER, INTERNAL, MODELS, PREDICTED, ROOT, Reply, Stage, client_environment, in_steps, run

CLIENT = "OpenCode"
NOTES = {"plain": "always streams"}
BINARY = ROOT / ".clients-node" / "node_modules" / "opencode-linux-x64-baseline" / "bin" / "opencode"
QUIET = {
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_SHARE": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
}


def version() -> str:
    if not BINARY.exists():
        pytest.skip("no OpenCode binary for this machine in .clients-node; see `make test-clients`")
    done = subprocess.run([str(BINARY), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def opencode(folder: Path, settings: Mapping[str, Any], *arguments: str) -> str:
    more = {"OPENCODE_CONFIG_CONTENT": json.dumps(settings), **QUIET}
    environment = client_environment(folder.parent, **more)
    return run([str(BINARY), "run", *arguments, "Mend the spelling."], folder, environment).stdout


@pytest.mark.shows("streamed")
@pytest.mark.shows("tools")
def test_streamed_with_tools_and_a_title_by_the_small_model(router: Stage, folder: Path) -> None:
    path = str(folder / "hello.py")
    router.provider.reply = in_steps(
        Reply(tool="read", arguments={"filePath": path}),
        Reply(tool="edit", arguments={"filePath": path, "oldString": "helo", "newString": "hello"}),
    )
    output = opencode(folder, config(router))
    assert "It is mended." in output
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert router.asked().count(INTERNAL) == 1
    rest = [name for name in router.asked() if name != INTERNAL]
    assert len(rest) == 3
    assert set(rest) <= set(PREDICTED)
    assert all(seen.body["stream"] for seen in router.provider.seen)


@pytest.mark.shows("mode")
def test_mode_by_the_agents_model(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    opencode(folder, config(router, agent={"plan": {"model": "router/auto:plan"}}), "--agent", "plan")
    assert sorted(router.asked()) == sorted([INTERNAL, MODELS["plan"]])


@pytest.mark.shows("mode")
def test_mode_by_a_plugin(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    plugin = folder.parent / "router-mode.js"
    plugin.write_text(PLUGIN, encoding="utf-8")
    opencode(folder, config(router, plugin=[plugin.as_uri()]), "--agent", "plan")
    assert MODELS["plan"] in router.asked()
    assert {decision["mode"] for decision in router.decisions(2)} == {"plan", "title"}
