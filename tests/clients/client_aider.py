"""Aider, headless: its main, editor and weak models are pointed at modes by their names."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stage import (
    AFTER,
    BEFORE,
    CLIENT_KEY,
    INTERNAL,
    MODELS,
    PREDICTED,
    ROOT,
    Reply,
    Stage,
    client_environment,
    run,
)

CLIENT = "Aider"
NOTES = {"tools": "sends none"}
PYTHON = ROOT / ".venv-aider" / "bin" / "python"
# Nothing asked, nothing looked up, nothing sent but to the model.
QUIET = (
    "--yes-always",
    "--no-check-update",
    "--no-show-release-notes",
    "--no-show-model-warnings",
    "--analytics-disable",
    "--no-gitignore",
    "--no-pretty",
    "--no-suggest-shell-commands",
    "--no-detect-urls",
    "--map-tokens=0",
)
EDIT = f"hello.py\n```python\n<<<<<<< SEARCH\n{BEFORE}=======\n{AFTER}>>>>>>> REPLACE\n```\n"
WHOLE = f"hello.py\n```\n{AFTER}```\n"


def version() -> str:
    if not PYTHON.exists():
        pytest.skip("no .venv-aider; see `make test-clients`")
    # Its import of a price list would go to the network.
    command = [str(PYTHON), "-c", "import importlib.metadata as m; print(m.version('aider-chat'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def aider(router: Stage, folder: Path, *arguments: str, git: bool = False) -> str:
    environment = client_environment(
        folder.parent,
        OPENAI_API_BASE=f"{router.url}/v1",
        OPENAI_API_KEY=CLIENT_KEY,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    command = [str(PYTHON), "-m", "aider", *QUIET, *([] if git else ["--no-git"]), *arguments, "hello.py"]
    return run(command, folder, environment).stdout


@pytest.mark.shows("mode")
@pytest.mark.shows("plain")
def test_plain(router: Stage, folder: Path) -> None:
    router.provider.reply = lambda body: Reply(EDIT)
    message = ("--edit-format=diff", "--message", "Mend the spelling.")
    output = aider(router, folder, "--model=openai/auto:code", "--no-stream", *message)
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert router.asked() == [MODELS["code"]]
    sent = router.provider.last.body
    assert not sent.get("stream")
    assert "tools" not in sent  # its edits are text


@pytest.mark.shows("streamed")
def test_streamed_and_without_a_mode(router: Stage, folder: Path) -> None:
    router.provider.reply = lambda body: Reply(EDIT)
    message = ("--edit-format=diff", "--message", "Mend the spelling.")
    output = aider(router, folder, "--model=openai/auto", "--stream", *message)
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert router.provider.last.body["stream"] is True
    assert router.asked()[0] in PREDICTED


@pytest.mark.shows("mode")
@pytest.mark.parametrize("mode", ["plan", "debug"])
def test_mode_by_the_name_of_the_model(router: Stage, folder: Path, mode: str) -> None:
    aider(router, folder, f"--model=openai/auto:{mode}", "--message", "What is this?", "--edit-format=ask")
    assert router.asked() == [MODELS[mode]]
    assert router.decisions()[0]["mode"] == mode


@pytest.mark.shows("mode")
def test_architect_and_editor_and_commit_message(router: Stage, folder: Path) -> None:
    """One change by three models: the architect plans, the editor edits, the weak model names the commit."""

    def reply(body: Mapping[str, Any]) -> Reply:
        return {
            MODELS["plan"]: Reply("Print 'hello' instead of 'helo'."),
            MODELS["edit"]: Reply(WHOLE),
            INTERNAL: Reply("fix: spelling of hello"),
        }[body["model"]]

    for command in (
        "init -q",
        "config user.name A",
        "config user.email a@example.org",
        "add .",
        "commit -qm a",
    ):
        run(["git", *command.split()], folder, client_environment(folder.parent))
    router.provider.reply = reply
    output = aider(
        router,
        folder,
        "--architect",
        "--auto-accept-architect",
        "--model=openai/auto:plan",
        "--editor-model=openai/auto:edit",
        "--editor-edit-format=editor-whole",
        "--weak-model=openai/internal",
        "--message",
        "Mend the spelling.",
        git=True,
    )
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert router.asked() == [MODELS["plan"], MODELS["edit"], INTERNAL]
    assert [decision["reason"] for decision in router.decisions(3)] == ["signal", "signal", "default"]
    log = run(["git", "log", "-1", "--format=%s"], folder, client_environment(folder.parent)).stdout
    assert re.search("fix: spelling of hello", log)
