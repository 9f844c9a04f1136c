"""Claude Code, headless, against ``/v1/messages``: only where ROUTER_TEST_CLAUDE names its binary.

It is not installed with the others: whoever uses it agrees to its own terms.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from stage import (
    AFTER,
    CLIENT_KEY,
    INTERNAL,
    MODELS,
    PREDICTED,
    Reply,
    Stage,
    client_environment,
    in_steps,
    run,
)

CLIENT = "Claude Code"
NOTES = {"plain": "always streams"}
BINARY = os.environ.get("ROUTER_TEST_CLAUDE", "")
NAMES = {
    "ANTHROPIC_DEFAULT_OPUS_MODEL": "auto:plan",
    "ANTHROPIC_DEFAULT_SONNET_MODEL": "auto:code",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "internal",
}


def version() -> str:
    if not BINARY:
        pytest.skip("ROUTER_TEST_CLAUDE is not set to the path of Claude Code's binary")
    environment = client_environment(Path("/nonexistent"))
    command = [BINARY, "--version"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def claude(router: Stage, folder: Path, *arguments: str, **variables: str) -> str:
    environment = client_environment(
        folder.parent,
        ANTHROPIC_BASE_URL=router.url,
        ANTHROPIC_AUTH_TOKEN=CLIENT_KEY,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
        **variables,
    )
    return run([BINARY, "-p", "Mend the spelling.", *arguments], folder, environment).stdout


@pytest.mark.shows("streamed")
@pytest.mark.shows("tools")
def test_streamed_with_tools(router: Stage, folder: Path) -> None:
    path = str(folder / "hello.py")
    change = {"file_path": path, "old_string": "helo", "new_string": "hello"}
    router.provider.reply = in_steps(
        Reply(tool="Read", arguments={"file_path": path}), Reply(tool="Edit", arguments=change)
    )
    output = claude(router, folder, "--model", "auto", "--permission-mode", "acceptEdits")
    assert "It is mended." in output
    assert (folder / "hello.py").read_text(encoding="utf-8") == AFTER, output
    assert {name for name in router.asked() if name != INTERNAL} <= set(PREDICTED)


@pytest.mark.shows("mode")
def test_its_own_models_are_aliases(router: Stage, folder: Path) -> None:
    """Without any setting its models are those of the policy's patterns, the small one ``internal``."""
    router.provider.reply = in_steps()
    claude(router, folder, "--model", "haiku")
    assert set(router.asked()) == {INTERNAL}


@pytest.mark.shows("mode")
def test_mode_by_a_header(router: Stage, folder: Path) -> None:
    router.provider.reply = in_steps()
    claude(router, folder, "--model", "auto", ANTHROPIC_CUSTOM_HEADERS="x-router-mode: debug")
    assert MODELS["debug"] in router.asked()
    assert set(router.asked()) <= {MODELS["debug"], INTERNAL}


@pytest.mark.shows("mode")
@pytest.mark.parametrize(("permissions", "mode"), [("plan", "plan"), ("default", "code")])
def test_plan_mode_by_the_names_of_its_models(
    router: Stage, folder: Path, permissions: str, mode: str
) -> None:
    """Its model ``opusplan`` is one model while it plans and another while it works."""
    router.provider.reply = in_steps()
    claude(router, folder, "--model", "opusplan", "--permission-mode", permissions, **NAMES)
    assert {name for name in router.asked() if name != INTERNAL} == {MODELS[mode]}
