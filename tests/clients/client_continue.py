"""Continue's CLI, headless: its models carry a mode in their name, or in a header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage import (
    AFTER,
    CLIENT_KEY,
    MODELS,
    PREDICTED,
    ROOT,
    Reply,
    Stage,
    client_environment,
    in_steps,
    run,
)

CLIENT = "Continue CLI"
NOTES = {"plain": "always streams"}
PACKAGE = ROOT / ".clients-node" / "node_modules" / "@continuedev" / "cli"


def version() -> str:
    if not PACKAGE.is_dir():
        pytest.skip("no Continue CLI in .clients-node; see `make test-clients`")
    return str(json.loads((PACKAGE / "package.json").read_text(encoding="utf-8"))["version"])


def cn(router: Stage, folder: Path, **model: Any) -> str:
    entry = {
        "name": "Router",
        "provider": "openai",
        "model": "auto",
        "apiBase": f"{router.url}/v1",
        "apiKey": CLIENT_KEY,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
        **model,
    }
    path = folder.parent / "config.yaml"
    settings = {"name": "router", "version": "1.0.0", "schema": "v1", "models": [entry]}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = client_environment(folder.parent, CONTINUE_TELEMETRY_ENABLED="0", FORCE_NO_TTY="true")
    command = ["node", str(PACKAGE / "dist" / "cn.js"), "--print", "--auto", "--config", str(path)]
    return run([*command, "Mend the spelling."], folder, environment).stdout


@pytest.mark.shows("streamed")
@pytest.mark.shows("tools")
def test_streamed_with_tools(router: Stage, folder: Path) -> None:
    path = str(folder / "hello.py")
    change = {"file_path": path, "old_string": "helo", "new_string": "hello"}
    router.provider.reply = in_steps(
        Reply(tool="Read", arguments={"filepath": path}), Reply(tool="Edit", arguments=change)
    )
    output = cn(router, folder)
    assert "It is mended." in output
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert set(router.asked()) <= set(PREDICTED)
    assert len(router.asked()) == 3
    assert router.provider.last.body["stream"] is True


@pytest.mark.shows("mode")
def test_mode_by_the_name_of_the_model(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    cn(router, folder, model="auto:plan")
    assert set(router.asked()) == {MODELS["plan"]}


@pytest.mark.shows("mode")
def test_mode_by_a_header_of_the_model(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    cn(router, folder, requestOptions={"headers": {"x-router-mode": "debug"}})
    assert set(router.asked()) == {MODELS["debug"]}
