"""The official ``openai`` SDK."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from stage import CLIENT_KEY, KEY, MODELS, PREDICTED, Stage

CLIENT = "openai (Python)"

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]


def version() -> str:
    return openai.__version__


@pytest.fixture
def client(router: Stage) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key=CLIENT_KEY, max_retries=0) as sdk:
        yield sdk


@pytest.mark.shows("plain")
def test_plain(client: openai.OpenAI, router: Stage) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=ASK)
    assert raw.parse().choices[0].message.content == "Hello there!"
    assert raw.headers["x-router-reason"] == "predicted"
    assert router.asked()[0] in PREDICTED
    assert raw.headers["x-router-target"] == f"to-{router.asked()[0]}"
    assert router.provider.last.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.shows("streamed")
def test_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there!"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 12


@pytest.mark.shows("tools")
@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: openai.OpenAI, router: Stage, stream: bool) -> None:
    if stream:
        with client.chat.completions.stream(model="auto", messages=ASK, tools=[TOOL]) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(model="auto", messages=ASK, tools=[TOOL]).choices[0].message
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    assert router.provider.last.body["tools"] == [TOOL]
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}
    history = [*ASK, message.model_dump(exclude_none=True), result]
    last = client.chat.completions.create(model="auto", messages=history, tools=[TOOL])
    assert last.choices[0].message.content == "Hello there!"
    assert router.provider.last.body["messages"][-1] == result


@pytest.mark.shows("mode")
@pytest.mark.parametrize("mode", ["plan", "code", "edit", "debug"])
@pytest.mark.parametrize("way", ["header", "metadata", "model"])
def test_mode(client: openai.OpenAI, router: Stage, way: str, mode: str) -> None:
    ways = {
        "header": {"model": "auto", "extra_headers": {"x-router-mode": mode}},
        "metadata": {"model": "auto", "metadata": {"mode": mode}},
        "model": {"model": f"auto:{mode}"},
    }
    raw = client.chat.completions.with_raw_response.create(messages=ASK, **ways[way])
    assert router.asked() == [MODELS[mode]]
    assert raw.headers["x-router-reason"] == "signal"
    assert "metadata" not in router.provider.last.body


@pytest.mark.shows("mode")
def test_the_model_names_that_are_listed_work(client: openai.OpenAI, router: Stage) -> None:
    names = [model.id for model in client.models.list()]
    assert {"auto", "top", "internal"} <= set(names)
    for name in names:
        client.chat.completions.create(model=name, messages=ASK)
    assert len(router.asked()) == len(names)
