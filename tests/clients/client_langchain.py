"""LangChain's ``ChatOpenAI``."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from stage import CLIENT_KEY, MODELS, PREDICTED, Stage

CLIENT = "LangChain ChatOpenAI"
ASK = "What is the weather in Oslo?"


def version() -> str:
    return f"langchain-openai {installed('langchain-openai')}"


def model(router: Stage, name: str = "auto", **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=f"{router.url}/v1", api_key=CLIENT_KEY, max_retries=0, **more)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"4 degrees in {city}"


@pytest.mark.shows("plain")
def test_plain(router: Stage) -> None:
    answer = model(router).invoke(ASK)
    assert answer.content == "Hello there!"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == 12
    assert router.asked()[0] in PREDICTED
    assert router.decisions()[0]["reason"] == "predicted"


@pytest.mark.shows("plain")
def test_headers_of_the_decision(router: Stage) -> None:
    answer = model(router, include_response_headers=True).invoke(ASK)
    assert answer.response_metadata["headers"]["x-router-target"] == f"to-{router.asked()[0]}"


@pytest.mark.shows("streamed")
def test_streamed(router: Stage) -> None:
    chunks = list(model(router, stream_usage=True).stream(ASK))
    assert "".join(str(chunk.content) for chunk in chunks) == "Hello there!"
    assert sum(bool(chunk.content) for chunk in chunks) > 1
    assert [c.usage_metadata["total_tokens"] for c in chunks if c.usage_metadata] == [12]


@pytest.mark.shows("tools")
@pytest.mark.parametrize("stream", [False, True])
def test_tools(router: Stage, stream: bool) -> None:
    bound = model(router, streaming=stream).bind_tools([get_weather])
    first = bound.invoke(ASK)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    result: ToolMessage = get_weather.invoke(call)
    last = bound.invoke([HumanMessage(ASK), first, result])
    assert last.content == "Hello there!"
    assert router.provider.last.body["messages"][-1]["content"] == "4 degrees in Oslo"


@pytest.mark.shows("mode")
@pytest.mark.parametrize("mode", ["plan", "code", "edit", "debug"])
@pytest.mark.parametrize("way", ["default_headers", "extra_headers", "metadata", "model"])
def test_mode(router: Stage, way: str, mode: str) -> None:
    if way == "default_headers":
        model(router, default_headers={"x-router-mode": mode}).invoke(ASK)
    elif way == "extra_headers":
        model(router).invoke(ASK, extra_headers={"x-router-mode": mode})
    elif way == "metadata":
        model(router, extra_body={"metadata": {"mode": mode}}).invoke(ASK)
    else:
        model(router, f"auto:{mode}").invoke(ASK)
    assert router.asked() == [MODELS[mode]]
    assert router.decisions()[0]["reason"] == "signal"
