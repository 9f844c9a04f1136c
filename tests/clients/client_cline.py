"""Cline's CLI, headless: its provider's model carries the mode, or a header in its settings does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
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

CLIENT = "Cline CLI"
NOTES = {"plain": "always streams"}
BINARY = ROOT / ".clients-node" / "node_modules" / "@cline" / "cli-linux-x64" / "bin" / "cline"
PROVIDER = "openai-compatible"


def version() -> str:
    if not BINARY.exists():
        pytest.skip("no Cline binary for this machine in .clients-node; see `make test-clients`")
    done = subprocess.run([str(BINARY), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cline(router: Stage, folder: Path, *arguments: str, model: str = "auto", **settings: Any) -> str:
    environment = client_environment(folder.parent, CLINE_TELEMETRY_DISABLED="1", DO_NOT_TRACK="1")
    login = ["auth", "-p", PROVIDER, "-k", CLIENT_KEY, "-m", model, "-b", f"{router.url}/v1"]
    run([str(BINARY), *login], folder, environment)
    path = folder.parent / ".cline" / "data" / "settings" / "providers.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["providers"][PROVIDER]["settings"].update(settings)
    path.write_text(json.dumps(stored), encoding="utf-8")
    ask = ["--provider", PROVIDER, "--timeout", "60", *arguments, "Mend the spelling."]
    return run([str(BINARY), *ask], folder, environment).stdout


@pytest.mark.shows("streamed")
@pytest.mark.shows("tools")
def test_streamed_with_tools(router: Stage, folder: Path) -> None:
    path = str(folder / "hello.py")
    change = {"command": "str_replace", "path": path, "old_text": "helo", "new_text": "hello"}
    router.provider.reply = in_steps(
        Reply(tool="read_files", arguments={"files": [{"path": path}]}),
        Reply(tool="editor", arguments=change),
    )
    output = cline(router, folder)
    assert "It is mended." in output
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert set(router.asked()) <= set(PREDICTED)
    assert router.provider.last.body["stream"] is True


@pytest.mark.shows("mode")
def test_mode_by_the_name_of_the_model(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    cline(router, folder, "--plan", "--model", "auto:plan")
    assert set(router.asked()) == {MODELS["plan"]}


@pytest.mark.shows("mode")
def test_mode_by_a_header_of_the_provider(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    cline(router, folder, headers={"x-router-mode": "debug"})
    assert set(router.asked()) == {MODELS["debug"]}
