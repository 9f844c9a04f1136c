from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from provider import Provider, provider

from router.capability import estimate_tokens
from router.dialects import CHAT, MESSAGES, RESPONSES, Inbound
from router.dispatch import Dispatcher, close_connections, complete, destination, scrubber
from router.errors import UpstreamError
from router.policy import Prices, Target
from router.upstream import Scrubber, Usage

ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Provider]:
    with provider() as started:
        yield started


def send(target: Target, body: dict[str, Any], **environment: str) -> Any:
    async def once() -> Any:
        dispatcher = Dispatcher()
        to = destination("t", target, environment, scrubber([target], environment))
        try:
            return await dispatcher.complete(to, Inbound(CHAT, {"messages": ASK, **body}))
        finally:
            await dispatcher.close()

    return asyncio.run(once())


def test_the_targets_params_are_defaults(upstream: Provider) -> None:
    target = Target(model="openai/small", api_base=upstream.url, params={"temperature": 0.1, "top_p": 0.5})
    send(target, {"temperature": 0.9})
    sent = upstream.last.body
    assert (sent["temperature"], sent["top_p"]) == (0.9, 0.5)


def test_openais_own_models_get_litellms_mapping(upstream: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)  # stands for api.openai.com
    target = Target(model="openai/o3", api_key_env="KEY")
    body = {"max_tokens": 5, "user": "u", "metadata": {"a": "b"}, "unheard_of": 1, "tools": None}
    send(target, body, KEY="sk-test-key")
    sent = upstream.last.body
    assert sent["max_completion_tokens"] == 5
    assert "max_tokens" not in sent
    assert (sent["user"], sent["metadata"], sent["unheard_of"]) == ("u", {"a": "b"}, 1)
    assert upstream.last.headers["authorization"] == "Bearer sk-test-key"


def test_what_a_model_does_not_take_is_refused_or_dropped(
    upstream: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    with pytest.raises(UpstreamError, match="presence_penalty") as caught:
        send(Target(model="openai/o3", api_key_env="KEY"), {"presence_penalty": 1.0}, KEY="k")
    assert caught.value.status == 400
    send(Target(model="openai/o3", api_key_env="KEY", drop_params=True), {"presence_penalty": 1.0}, KEY="k")
    assert "presence_penalty" not in upstream.last.body


def test_the_families_of_the_session_decide_on_what_goes_along(upstream: Provider) -> None:
    turn = {"role": "assistant", "content": "4", "reasoning_content": "Hm."}
    target = Target(model="openai/qwen3-8b", api_base=upstream.url)

    def sent(*families: str) -> Any:
        asked = Inbound(CHAT, {"messages": [*ASK, turn, *ASK]}, families=frozenset(families) or None)

        async def once() -> None:
            dispatcher = Dispatcher()
            try:
                await dispatcher.complete(destination("t", target, {}, scrubber([], {})), asked)
            finally:
                await dispatcher.close()

        asyncio.run(once())
        return upstream.last.body["messages"][1]

    assert sent() == sent("qwen") == turn
    assert sent("deepseek") == sent("qwen", "deepseek") == {"role": "assistant", "content": "4"}


def test_a_limit_that_another_model_could_fill_is_the_targets(upstream: Provider) -> None:
    target = Target(model="openai/small", api_base=upstream.url, max_output_tokens=100)
    for given, limit in ((32_000, 100), (50, 50)):
        body = {"messages": ASK, "max_tokens": given, "thinking": {"type": "adaptive"}}

        async def once(asked: Inbound) -> None:
            dispatcher = Dispatcher()
            try:
                await dispatcher.complete(destination("t", target, {}, scrubber([], {})), asked)
            finally:
                await dispatcher.close()

        asyncio.run(once(Inbound(MESSAGES, body)))
        # It is not said to reason, so it is not asked to.
        assert upstream.last.body == {"model": "small", "messages": ASK, "max_tokens": limit}


def test_a_targets_params_are_defaults_in_the_dialect_that_passes(upstream: Provider) -> None:
    params = {
        "temperature": 0.2,
        "max_completion_tokens": 5,
        "extra_body": {"a": 1},
        "extra_headers": {"x-team": "b"},
    }
    base = upstream.url.removesuffix("/v1")
    target = Target(model="anthropic/claude-sonnet-4-5", api_base=base, api_key_env="KEY", params=params)

    def sent(**headers: str) -> dict[str, Any]:
        async def once() -> None:
            dispatcher = Dispatcher()
            to = destination("t", target, {"KEY": "k"}, scrubber([], {}))
            try:
                await dispatcher.complete(
                    to, Inbound(MESSAGES, {"messages": ASK, "max_tokens": 9}, headers=headers)
                )
            finally:
                await dispatcher.close()

        asyncio.run(once())
        return upstream.last.body

    assert sent() == {
        "model": "claude-sonnet-4-5",
        "messages": ASK,
        "max_tokens": 9,
        "temperature": 0.2,
        "a": 1,
    }
    assert upstream.last.headers["x-team"] == "b"
    assert upstream.last.headers["anthropic-version"] == "2023-06-01"
    assert "temperature" not in sent(**{"anthropic-version": "2026-10-21"})


def test_drop_params_drops_what_has_no_translation(upstream: Provider) -> None:
    base = upstream.url.removesuffix("/v1")
    target = Target(model="anthropic/claude-sonnet-4-5", api_base=base, api_key_env="KEY", drop_params=True)
    send(target, {"chat_template_kwargs": {}, "metadata": {"a": "b"}}, KEY="k")
    assert not upstream.last.body.keys() & {"chat_template_kwargs", "metadata", "extra_body"}


def test_tools_need_no_further_package(upstream: Provider) -> None:
    # litellm looks for tools of type mcp with a package that is not among its dependencies.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    base = upstream.url.removesuffix("/v1")
    target = Target(model="anthropic/claude-sonnet-4-5", api_base=base, api_key_env="KEY")
    assert b'"tool_calls"' in send(target, {"tools": tools, "max_tokens": 9}, KEY="k").body


def test_only_the_mode_in_the_metadata_leaves_none(upstream: Provider) -> None:
    send(Target(model="openai/small", api_base=upstream.url), {"metadata": {"mode": "plan"}})
    assert "metadata" not in upstream.last.body


def test_an_unknown_provider_is_an_error_with_words() -> None:
    with pytest.raises(UpstreamError, match="LLM Provider NOT provided") as caught:
        send(Target(model="nonsense/model"), {})
    assert caught.value.status == 400
    assert "litellm.BadRequestError" not in str(caught.value)


@pytest.mark.parametrize("closes", [1, 2])
def test_a_connection_that_went_stale_is_opened_anew_once(closes: int) -> None:
    answer = (
        b'{"id":"1","object":"chat.completion","created":1,"model":"m","choices":'
        b'[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}]}'
    )
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head.lower())
        assert found
        await reader.readexactly(int(found[1]))
        requests += 1
        if requests > closes:
            length = str(len(answer)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: " + length + b"\r\n\r\n" + answer)
        writer.close()

    async def once() -> Any:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = Target(model="openai/small", api_base=f"http://127.0.0.1:{port}/v1")
        dispatcher = Dispatcher()
        try:
            return await dispatcher.complete(
                destination("t", target, {}, scrubber([], {})), Inbound(CHAT, {"messages": ASK})
            )
        finally:
            await dispatcher.close()
            server.close()

    if closes == 1:
        assert b'"hi"' in asyncio.run(once()).body
    else:
        with pytest.raises(UpstreamError) as caught:
            asyncio.run(once())
        assert caught.value.status == 502
    assert requests == 2


def test_complete(upstream: Provider) -> None:
    prices = Prices(input=1, output=4, cached_read=0.5)

    async def once() -> Any:
        try:
            return await complete("openai/small", ASK, api_base=upstream.url, prices=prices, max_tokens=7)
        finally:
            await close_connections()

    answer = asyncio.run(once())
    assert (answer.text, answer.input_tokens, answer.output_tokens) == ("Hello there!", 9, 3)
    assert answer.cost == pytest.approx((5 * 1 + 4 * 0.5 + 3 * 4) / 1e6)
    assert upstream.last.body["max_tokens"] == 7


@pytest.mark.parametrize(("model", "priced"), [("openai/gpt-4o-mini", True), ("openai/unheard-of", False)])
def test_complete_without_prices_takes_litellms_or_none(upstream: Provider, model: str, priced: bool) -> None:
    async def once() -> Any:
        try:
            return await complete(model, ASK, api_base=upstream.url)
        finally:
            await close_connections()

    assert (asyncio.run(once()).cost is not None) == priced


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning")
@pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields' attribute:DeprecationWarning")
def test_nothing_of_a_client_s_own_key_is_kept(
    upstream: Provider, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """litellm caches the SDK's clients, and with them the keys, for an hour."""
    import litellm

    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)  # stands for api.openai.com
    cache = litellm.in_memory_llm_clients_cache
    evicted: list[Any] = []
    monkeypatch.setattr(cache.evicted_client_closer, "schedule", evicted.append)
    target = Target(model="openai/small", api_key_env="OURS", api_key_header="x-own-key")

    async def kept(headers: dict[str, str]) -> list[str]:
        dispatcher = Dispatcher()
        to = destination("own", target, {"OURS": "sk-ours"}, scrubber([], {}), headers)
        try:
            if stream:
                async for _ in await dispatcher.stream(to, Inbound(CHAT, {"messages": ASK})):
                    pass
            else:
                await dispatcher.complete(to, Inbound(CHAT, {"messages": ASK}))
            return [client.api_key for client in cache.cache_dict.values() if hasattr(client, "api_key")]
        finally:
            for client in evicted:
                await client.close()
            await dispatcher.close()

    assert asyncio.run(kept({})) == ["sk-ours"]
    evicted.clear()
    assert asyncio.run(kept({"x-own-key": "sk-theirs"})) == []
    assert [client.api_key for client in evicted] == ["sk-theirs"]
    assert upstream.last.headers["authorization"] == "Bearer sk-theirs"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Incorrect API key provided: sk-proj-abc***xyz.", "Incorrect API key provided: [key]"),
        ("Authorization: Bearer eyJhbGciOi.x-y", "Authorization: [key]"),
        ("GET https://x/models?key=AIzaSyD-123456789012&alt=sse", "GET https://x/models?[key]&alt=sse"),
        ('{"api_key": "0123456789"}', '{"[key]"}'),
        ("the key is hunter2-hunter2", "the key is [key]"),
        ("Unsupported key 'foo' in a token of 5 tokens", "Unsupported key 'foo' in a token of 5 tokens"),
        ("max_tokens: 4096 is over the limit", "max_tokens: 4096 is over the limit"),
    ],
)
def test_scrubber(text: str, scrubbed: str) -> None:
    assert Scrubber(["hunter2-hunter2", ""])(text) == scrubbed


def test_importing_the_server_does_not_import_litellm() -> None:
    code = (
        "import sys, router, router.cli, router.app, router.dispatch; "
        "print([m for m in ('litellm', 'torch', 'sklearn', 'openai', 'training') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout == "[]\n"


def test_litellm_is_loaded_without_a_word_and_without_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("FROM_DOTENV=1\n")
    code = "import os, router.dispatch; router.dispatch._litellm(); assert 'FROM_DOTENV' not in os.environ"
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("LITELLM_MODE", None)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (CHAT, {"messages": ASK, "stream_options": {"include_usage": True}}),
        (MESSAGES, {"messages": ASK, "max_tokens": 9}),
        (RESPONSES, {"input": "hello"}),
    ],
)
def test_an_echo_tells_its_usage_streamed_as_whole(dialect: Any, body: dict[str, Any]) -> None:
    to = destination("t", Target(echo=True), {}, scrubber([], {}))

    async def both() -> tuple[Any, list[bytes], Any]:
        dispatcher = Dispatcher()
        try:
            whole = await dispatcher.complete(to, dialect.read(json.dumps(body).encode(), {}))
            asked = json.dumps({**body, "stream": True}).encode()
            stream = await dispatcher.stream(to, dialect.read(asked, {}))
            return whole.usage, [event async for event in stream], stream.usage
        finally:
            await dispatcher.close()

    whole, events, streamed = asyncio.run(both())
    assert whole == streamed == Usage(estimate_tokens("hello"), estimate_tokens("[t] hello"))
    text = b"".join(events).decode()
    if dialect is CHAT:
        chunk = json.loads(text.split("data: ")[-2])
        assert (chunk["choices"], chunk["usage"]["completion_tokens"]) == ([], whole.output)
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert f'"output_tokens":{whole.output}' in text


def test_an_echo_that_is_not_asked_for_usage_sends_none_and_counts_it() -> None:
    to = destination("t", Target(echo=True), {}, scrubber([], {}))

    async def streamed() -> tuple[str, Usage | None]:
        dispatcher = Dispatcher()
        try:
            stream = await dispatcher.stream(to, Inbound(CHAT, {"messages": ASK, "stream": True}))
            return b"".join([event async for event in stream]).decode(), stream.usage
        finally:
            await dispatcher.close()

    text, usage = asyncio.run(streamed())
    assert '"usage"' not in text
    assert usage == Usage(estimate_tokens("hello"), estimate_tokens("[t] hello"))
