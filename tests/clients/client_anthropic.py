"""The official ``anthropic`` SDK against ``/v1/messages``; the provider behind speaks OpenAI's dialect."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from stage import CLIENT_KEY, INTERNAL, KEY, MODELS, PREDICTED, Stage

CLIENT = "anthropic (Python)"

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]


def version() -> str:
    return anthropic.__version__


@pytest.fixture
def client(router: Stage) -> Iterator[anthropic.Anthropic]:
    _skip_without_messages(router.url)
    with anthropic.Anthropic(base_url=router.url, api_key=CLIENT_KEY, max_retries=0) as sdk:
        yield sdk


def _skip_without_messages(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/messages", data=b"{}", method="POST")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 405):
            pytest.skip("this router has no /v1/messages")


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "auto", "max_tokens": 100, "messages": ASK, **more}


@pytest.mark.shows("plain")
def test_plain(client: anthropic.Anthropic, router: Stage) -> None:
    raw = client.messages.with_raw_response.create(**ask(system="Be brief."))
    answer = raw.parse()
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert [block.text for block in answer.content if block.type == "text"] == ["Hello there!"]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 3)
    assert raw.headers["x-router-reason"] == "predicted"
    assert router.asked()[0] in PREDICTED
    sent = router.provider.last
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert [message["role"] for message in sent.body["messages"]] == ["system", "user"]


@pytest.mark.shows("streamed")
def test_streamed(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "".join(block.text for block in final.content if block.type == "text") == "Hello there!"
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 3
    # "text" is the SDK's own, beside the deltas.
    told = [kind for kind in kinds if kind not in ("text", "content_block_delta", "ping")]
    assert told == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.shows("tools")
@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: anthropic.Anthropic, router: Stage, stream: bool) -> None:
    if stream:
        with client.messages.stream(**ask(tools=[TOOL])) as events:
            first = events.get_final_message()
    else:
        first = client.messages.create(**ask(tools=[TOOL]))
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Oslo"})
    assert router.provider.last.body["tools"][0]["function"]["name"] == "get_weather"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "4 degrees"}
    history = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = client.messages.create(**ask(messages=history, tools=[TOOL]))
    assert [block.text for block in last.content if block.type == "text"] == ["Hello there!"]
    sent = router.provider.last.body["messages"][-1]
    assert (sent["role"], sent["tool_call_id"]) == ("tool", call.id)


@pytest.mark.shows("plain")
def test_count_tokens(client: anthropic.Anthropic, router: Stage) -> None:
    short = client.messages.count_tokens(model="auto", messages=ASK)
    long = client.messages.count_tokens(
        model="auto", messages=[{"role": "user", "content": ASK[0]["content"] * 20}]
    )
    assert 0 < short.input_tokens < long.input_tokens
    assert router.asked() == []


@pytest.mark.shows("mode")
@pytest.mark.parametrize("mode", ["plan", "code", "edit", "debug"])
@pytest.mark.parametrize("way", ["header", "model"])
def test_mode(client: anthropic.Anthropic, router: Stage, way: str, mode: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "header": {"extra_headers": {"x-router-mode": mode}},
        "model": {"model": f"auto:{mode}"},
    }
    raw = client.messages.with_raw_response.create(**ask(**ways[way]))
    assert router.asked() == [MODELS[mode]]
    assert raw.headers["x-router-reason"] == "signal"


@pytest.mark.shows("mode")
def test_a_small_models_name_is_an_alias_of_internal(client: anthropic.Anthropic, router: Stage) -> None:
    client.messages.create(**ask(model="claude-haiku-4-5-20251001"))
    assert router.asked() == [INTERNAL]


@pytest.mark.shows("plain")
def test_an_error_has_the_dialects_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**ask(model="no-such-model"))
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"
