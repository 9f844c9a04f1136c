"""The official SDK against a running router and a loopback provider."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from provider import SECRET
from running import KEY, Running, running

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    with running() as started:
        yield started


@pytest.fixture
def client(router: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="sk-the-clients-own", max_retries=0) as sdk:
        yield sdk


def test_plain(client: openai.OpenAI, router: Running) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=ASK)
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    assert answer.model == "small-2025-01-01"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 3)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.system_fingerprint == "fp_1"
    assert raw.headers["x-router-target"] == "cheap"
    assert raw.headers["x-router-model"] == "openai/small"
    assert raw.headers["x-router-reason"] == "predicted"
    assert raw.headers["x-router-tier"] == "auto"
    assert float(raw.headers["x-router-score"]) == 0.05
    assert float(raw.headers["x-router-threshold"]) == 0.2
    assert float(raw.headers["x-router-decision-ms"]) > 0
    assert raw.headers["x-request-id"].startswith("req_")
    assert router.provider.last.body == {"model": "small", "messages": ASK}


def test_the_hard_prompt_goes_to_the_strong_target(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "A hard question"}]
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=messages)
    assert raw.headers["x-router-target"] == "frontier"


def test_streamed_with_usage(client: openai.OpenAI, router: Running) -> None:
    stream = client.chat.completions.create(
        model="auto", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    assert stream.response.headers["x-router-target"] == "cheap"
    chunks = list(stream)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello there!"
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert router.provider.last.body["stream_options"] == {"include_usage": True}


def test_streamed_without_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="auto", messages=ASK, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_round_trip(client: openai.OpenAI, router: Running, stream: bool) -> None:
    if stream:
        with client.chat.completions.stream(model="auto", messages=ASK, tools=[TOOL]) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = (
            client.chat.completions.create(model="auto", messages=ASK, tools=[TOOL], tool_choice="auto")
            .choices[0]
            .message
        )
    assert message.content is None or message.content == ""
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert (call.id, call.type, call.function.name) == ("call_1", "function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert router.provider.last.body["tools"] == [TOOL]

    call_message = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude_none=True)]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 °C"}
    followed = client.chat.completions.create(
        model="auto", messages=[*ASK, call_message, result], tools=[TOOL]
    )
    assert followed.choices[0].message.content == "Hello there!"
    assert router.provider.last.body["messages"] == [*ASK, call_message, result]


def test_what_the_router_does_not_read_passes_untouched(client: openai.OpenAI, router: Running) -> None:
    messages = [
        {"role": "developer", "content": "Answer briefly."},
        {
            "role": "user",
            "name": "bob",
            "content": [
                {"type": "text", "text": "What is this?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,iVBORw0=", "detail": "low"},
                },
            ],
        },
        {"role": "assistant", "content": "A cat.", "refusal": None, "cache_control": {"type": "ephemeral"}},
        {"role": "user", "content": "Sure?"},
    ]
    schema = {"type": "object", "properties": {"animal": {"type": "string"}}, "additionalProperties": False}
    sent = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "strict": True, "schema": schema},
        },
        "temperature": 0.3,
        "stop": ["a", "b", "c", "d", "e"],
        "seed": 7,
        "user": "u1",
        "reasoning_effort": "low",
        "logit_bias": {"50": 1},
    }
    extra = {"top_k": 4, "chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(
        model="auto", messages=messages, metadata={"mode": "plan", "team": "x"}, extra_body=extra, **sent
    )
    # The mode was for the router, the rest of the metadata is the provider's.
    expected = {"model": "small", "messages": messages, "metadata": {"team": "x"}, **sent, **extra}
    assert router.provider.last.body == expected


@pytest.mark.parametrize(
    "field", ["api_base", "base_url", "mock_response", "custom_llm_provider", "fallbacks"]
)
def test_a_client_cannot_steer_litellm(client: openai.OpenAI, router: Running, field: str) -> None:
    answer = client.chat.completions.create(
        model="auto", messages=ASK, extra_body={field: "http://127.0.0.1:1"}
    )
    assert answer.choices[0].message.content == "Hello there!"
    assert router.provider.last.body[field] == "http://127.0.0.1:1"


def test_the_key_of_the_policy_goes_out_and_the_clients_does_not(
    client: openai.OpenAI, router: Running
) -> None:
    client.chat.completions.create(model="cheap", messages=ASK, extra_headers={"x-secret": "mine"})
    sent = router.provider.last.headers
    assert sent["authorization"] == f"Bearer {KEY}"
    assert "the-clients-own" not in str(sent)
    assert "x-secret" not in sent


def test_a_server_without_a_key_gets_none(
    client: openai.OpenAI, router: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-alone")
    client.chat.completions.create(model="keyless", messages=ASK)
    assert router.provider.last.headers["authorization"] == "Bearer none"


def test_a_key_that_is_not_set_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="TEST_KEY_THAT_IS_NOT_SET is not set") as caught:
        client.chat.completions.create(model="no-key", messages=ASK)
    assert caught.value.code == "provider_key_missing"


@pytest.mark.parametrize("stream", [False, True])
def test_rate_limit_keeps_status_and_retry_after(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.RateLimitError, match="Rate limit reached") as caught:
        client.chat.completions.create(model="rate-limited", messages=ASK, stream=stream)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.response.headers["x-router-target"] == "rate-limited"
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_server_error_keeps_status_and_loses_secrets(
    client: openai.OpenAI, router: Running, stream: bool
) -> None:
    before = len(router.provider.seen)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="broken", messages=ASK, stream=stream)
    assert caught.value.status_code == 500
    assert caught.value.response.json()["error"]["message"] == "The server had an error with key [key]"
    assert SECRET not in caught.value.response.text
    assert "litellm" not in caught.value.response.text.lower()
    assert len(router.provider.seen) == before + 1  # nothing retried behind the client's back


def test_an_error_that_is_not_json(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="not-json", messages=ASK)
    assert caught.value.status_code == 502
    assert "<html>" not in caught.value.response.text


def test_a_refused_parameter_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="picky", messages=ASK)
    assert (caught.value.param, caught.value.code) == ("temperature", "unsupported_value")


def test_a_provider_that_is_down(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="down", messages=ASK)
    assert caught.value.status_code == 502


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_hangs_is_a_timeout(client: openai.OpenAI, router: Running, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.3 s") as caught:
        client.chat.completions.create(model="hang", messages=ASK, stream=stream)
    assert caught.value.status_code == 504
    assert router.provider.last.disconnected.wait(5)


@pytest.mark.parametrize("model", ["fails-midway", "drops-midway", "stalls-midway"])
def test_an_error_midway_arrives_in_the_stream(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(model=model, messages=ASK, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Hello"]
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert SECRET not in str(caught.value.body)
    assert "litellm" not in str(caught.value.body).lower()


def test_a_client_that_leaves_a_stream_stops_the_provider(client: openai.OpenAI, router: Running) -> None:
    stream = client.chat.completions.create(model="endless", messages=ASK, stream=True)
    next(iter(stream))
    seen = router.provider.last
    assert not seen.disconnected.is_set()
    stream.close()
    assert seen.disconnected.wait(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_answer_stops_the_provider(router: Running, stream: bool) -> None:
    sdk = openai.OpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=0, timeout=0.3)
    with sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(model="patient", messages=ASK, stream=stream)
    assert router.provider.last.disconnected.wait(5)


def test_async_client(router: Running) -> None:
    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=0) as sdk:
            plain = await sdk.chat.completions.create(model="auto", messages=ASK)
            stream = await sdk.chat.completions.create(model="auto", messages=ASK, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return plain.choices[0].message.content, text

    assert asyncio.run(both()) == ("Hello there!", "Hello there!")


def test_requests_at_once_do_not_mix(router: Running) -> None:
    async def ask(sdk: openai.AsyncOpenAI, n: int) -> bool:
        raw = await sdk.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": "hard" if n % 2 else "easy"}]
        )
        return raw.headers["x-router-target"] == ("frontier" if n % 2 else "cheap")

    async def many() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=0) as sdk:
            return await asyncio.gather(*(ask(sdk, n) for n in range(40)))

    assert all(asyncio.run(many()))


def test_a_translated_provider_gets_its_own_dialect(client: openai.OpenAI, router: Running) -> None:
    answer = client.chat.completions.create(
        model="claude", messages=ASK, tools=[TOOL], max_tokens=50, extra_body={"top_k": 4}
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    sent = router.provider.last
    assert sent.path == "/v1/messages"
    assert sent.body["tools"][0]["name"] == "get_weather"
    assert (sent.body["max_tokens"], sent.body["top_k"]) == (50, 4)
    assert "extra_body" not in sent.body


def test_a_field_without_translation_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs") as caught:
        client.chat.completions.create(model="claude", messages=ASK, extra_body={"chat_template_kwargs": {}})
    assert caught.value.param == "chat_template_kwargs"


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:4] == ["auto", "balanced", "cheap", "frontier"]
    assert "gpt-4o" in names
    assert "claude-*" not in names


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="balanced") as caught:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert caught.value.code == "model_not_found"


def test_echo_needs_no_key(client: openai.OpenAI) -> None:
    ask = [{"role": "user", "content": "litellm.RateLimitError"}]  # a word that litellm's mock would raise on
    answer = client.chat.completions.create(model="echo", messages=ask)
    assert answer.choices[0].message.content == "[echo] litellm.RateLimitError"
    chunks = client.chat.completions.create(model="echo", messages=ask, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "[echo] litellm.RateLimitError"


def test_usage_is_counted_in_tokens_and_dollars(client: openai.OpenAI, router: Running) -> None:
    def counted() -> dict[str, float]:
        lines = httpx.get(f"{router.url}/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if 'target="cheap"' in line)
        }

    before = counted()
    client.chat.completions.create(model="cheap", messages=ASK)
    stream = client.chat.completions.create(
        model="cheap", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    list(stream)
    after = counted()
    tokens = 'router_tokens_total{kind="input",target="cheap"}'
    dollars = 'router_cost_usd_total{target="cheap"}'
    assert after[tokens] - before.get(tokens, 0) == 18
    # 9 input and 3 output twice, 4 of the first call's input from the cache.
    cost = (5 * 1 + 4 * 0.5 + 3 * 4 + 9 * 1 + 3 * 4) / 1e6
    assert after[dollars] - before.get(dollars, 0) == pytest.approx(cost)
