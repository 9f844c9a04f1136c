"""The Vercel AI SDK, with both of its providers for OpenAI's dialect; ``vercel.mjs`` makes the calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stage import CLIENT_KEY, MODELS, PREDICTED, ROOT, Stage, client_environment, run

CLIENT = "Vercel AI SDK"
PROVIDERS = ("openai-compatible", "openai")
PACKAGES = ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai")

pytestmark = pytest.mark.parametrize("provider", PROVIDERS)


def version() -> str:
    modules = ROOT / ".clients-node" / "node_modules"
    if not modules.is_dir():
        return "-"
    found = (
        json.loads((modules / name / "package.json").read_text(encoding="utf-8"))["version"]
        for name in PACKAGES
    )
    return ", ".join(f"{name} {number}" for name, number in zip(PACKAGES, found, strict=True))


def call(router: Stage, node: Path, provider: str, what: str = "generate", **more: Any) -> dict[str, Any]:
    # It finds its packages from where it stands.
    script = node / "vercel.mjs"
    script.write_bytes(Path(__file__).with_name("vercel.mjs").read_bytes())
    asked = {
        "url": router.url,
        "key": CLIENT_KEY,
        "provider": provider,
        "model": "auto",
        "what": what,
        **more,
    }
    done = run(["node", str(script), json.dumps(asked)], node, client_environment(node))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.shows("plain")
def test_plain(router: Stage, node: Path, provider: str) -> None:
    answer = call(router, node, provider)
    assert (answer["text"], answer["tokens"]) == ("Hello there!", 12)
    assert router.asked()[0] in PREDICTED
    assert answer["headers"]["x-router-target"] == f"to-{router.asked()[0]}"
    assert answer["headers"]["x-router-reason"] == "predicted"


@pytest.mark.shows("streamed")
def test_streamed(router: Stage, node: Path, provider: str) -> None:
    answer = call(router, node, provider, "stream")
    assert (answer["text"], answer["tokens"]) == ("Hello there!", 12)
    assert answer["pieces"] > 1


@pytest.mark.shows("tools")
@pytest.mark.parametrize("what", ["generate with tools", "stream with tools"])
def test_tools(router: Stage, node: Path, provider: str, what: str) -> None:
    answer = call(router, node, provider, what)
    assert (answer["text"], answer["ran"]) == ("Hello there!", ["Oslo"])
    assert "4 degrees in Oslo" in json.dumps(router.provider.last.body["messages"][-1])
    assert len(router.asked()) == 2


@pytest.mark.shows("mode")
@pytest.mark.parametrize("mode", ["plan", "code", "edit", "debug"])
def test_mode_by_header(router: Stage, node: Path, provider: str, mode: str) -> None:
    call(router, node, provider, headers={"x-router-mode": mode})
    assert router.asked() == [MODELS[mode]]
    assert router.decisions()[0]["reason"] == "signal"


@pytest.mark.shows("mode")
@pytest.mark.parametrize(
    "way",
    [{"providerHeaders": {"x-router-mode": "plan"}}, {"metadata": {"mode": "plan"}}, {"model": "auto:plan"}],
)
def test_mode_by_other_ways(router: Stage, node: Path, provider: str, way: dict[str, Any]) -> None:
    call(router, node, provider, "stream", **way)
    assert router.asked() == [MODELS["plan"]]
    assert router.decisions()[0]["mode"] == "plan"
