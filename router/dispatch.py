"""The only module that imports litellm, and not before it is needed: the import takes seconds and 160 MB.

A request goes out in one of four forms:

- a target that speaks the client's dialect gets the body as it came, through litellm's HTTP client
  (:mod:`router.passthrough`): chat at ``openai/…`` with an ``api_base``, messages at ``anthropic/…``, responses at
  OpenAI, and whatever else the policy says that a target ``speaks``;
- else it becomes a chat completion (:mod:`router.dialects`), and where the target speaks that, it goes the same way;
- for other providers of OpenAI's dialect litellm maps and checks the parameters that it knows by model, and the
  rest of the body goes out as it came;
- for all others litellm translates; what it has no translation for is refused, or left out where the target
  says ``drop_params``.

The answer comes back in the client's dialect.

What a client sends never reaches litellm's own parameters (``api_base``, ``api_key``, ``mock_response``, …):
they would let it send our key to a server of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import logging
import os
import re
import threading
import time
import traceback
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import httpx

from router import passthrough
from router.capability import estimate_tokens as estimate_text_tokens
from router.conversation import text_of
from router.dialects import CHAT, Inbound, Writer
from router.dialects.chat import DONE
from router.dialects.messages import estimate_tokens
from router.errors import RequestError, UpstreamError
from router.passthrough import Endpoint, Event
from router.policy import Prices, Target
from router.reasoning import ANTHROPIC, GOOGLE, THOUGHT, family_of, keep_own, without_stranded_thinking
from router.schemas import to_json
from router.upstream import Scrubber, Usage, answered_error, late, usage_of

logger = logging.getLogger("router")

# Two threads that import litellm at once leave each other with half of it: its modules import in circles.
_IMPORT = threading.Lock()

Events = AsyncGenerator[Event]

State = Literal["idle", "loading", "ready", "failed"]

# OpenAI's parameters that litellm takes by name, maps by model, and translates for other dialects.
_PARAMETERS = frozenset(
    (
        "audio",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "verbosity",
        "web_search_options",
    )
)
# Of a body, what is passed by name whatever the dialect.
_OWN = frozenset(("model", "messages", "stream", "stream_options"))
# Providers outside OpenAI's dialect that take these beside OpenAI's parameters, under the same name.
_TRANSLATED = _PARAMETERS | {"top_k", "user"}
# Tags for OpenAI's store of completions: they say nothing of the answer, and mean another thing to litellm.
_TAGS = frozenset(("metadata",))

# aiohttp's and httpx's words for it; a stale connection shows at once, a provider that breaks down takes longer.
_STALE = frozenset(("ServerDisconnectedError", "RemoteProtocolError"))
_STALE_SECONDS = 1.0

_ECHO_CHARACTERS = 2_000

# A client's own key, as it may stand in a header.
_KEY = re.compile(r"[\x21-\x7e]{1,4096}")

# litellm names its own classes before the provider's words, and puts tracebacks and the request behind them.
_PREFIX = re.compile(r"^(?:litellm\.\w+: )?(?:\w+(?:Error|Timeout): )*(?:\w+Exception - )?")
# Where litellm reads a request, before anything is sent. What it trips over there, it reports as a broken connection.
_TRANSLATING = frozenset(
    ("completion", "get_optional_params", "transform_request", "async_transform_request")
)
_SUFFIX = re.compile(
    r"Traceback \(most recent call last\)|Received Messages=| Original exception: |\n\nNote: "
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the body for the client, and what it took."""

    body: bytes
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one call of :func:`complete`. ``cost`` is in US dollars, None where no price is known."""

    text: str
    input_tokens: int
    output_tokens: int
    cost: float | None


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The body of an answer of ``count_tokens``, and whether it is an estimate of the router's."""

    body: bytes
    estimated: bool


class Stream:
    """An answer that has begun: iterate over its server-sent events, then close it.

    The events are of the client's dialect; an error of the provider is the last. ``usage`` and ``error`` are known
    when the stream has ended.
    """

    def __init__(self, events: Events, first: Event | None, to: Destination, inbound: Inbound) -> None:
        self._events = events
        self._first = first
        self._to = to
        self._dialect = inbound.dialect
        self.usage: Usage | None = None
        self.error: UpstreamError | None = None

    @property
    def first(self) -> bytes:
        """The first event."""
        return self._first[0] if self._first is not None else b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        event = self._first
        first = last = b""
        try:
            while event is not None:
                data, usage = event
                self.usage = usage or self.usage
                if data:
                    first, last = first or data, data
                    yield data
                event = await _next(self._events, self._to.target.timeout)
        except Exception as error:
            self.error = upstream_error(error, self._to.target, self._to.scrub)
            yield self._dialect.error_event(self.error, first, last)

    async def aclose(self) -> None:
        """Close the connection to the provider, wherever the stream stands."""
        await self._events.aclose()


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one request goes: a target, the key it is called with, and what keeps keys out of messages.

    ``clients_key`` says that the key is the client's own: for this request, and nothing of it is kept.
    """

    name: str
    target: Target
    key: str | None
    scrub: Scrubber
    clients_key: bool = False


class Dispatcher:
    """Sends requests to destinations. One serves the whole process, whatever policy is in force."""

    def __init__(self) -> None:
        self._loading: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Whether litellm is loaded: ``idle`` before anybody asked."""
        if self._loading is None:
            return "idle"
        if not self._loading.done():
            return "loading"
        return "failed" if self._loading.cancelled() or self._loading.exception() else "ready"

    def warm_up(self) -> None:
        """Load litellm behind the running event loop, and make the first call: it costs .4 s."""
        if self._loading is None or self.state == "failed":
            self._loading = asyncio.create_task(_warm_up())
            self._loading.add_done_callback(_report)

    async def close(self) -> None:
        """Stop loading, or close the connections to the providers."""
        if self.state == "loading" and self._loading is not None:
            self._loading.cancel()
        if self.state == "ready":
            await close_connections()

    async def complete(self, to: Destination, inbound: Inbound) -> Answer:
        """Send a request and wait for all of its answer, which is of the request's dialect.

        Raises
        ------
        UpstreamError
            The provider's error with its status; 504 where no answer came in time, 502 where none came.
        RequestError
            The target cannot take a field of the body.
        """
        await self.loaded()
        return await _whole(to, inbound)

    async def stream(self, to: Destination, inbound: Inbound) -> Stream:
        """Send a request and wait for the first event of its answer, so that an error still has its status.

        Raises as :meth:`complete` does; what goes wrong later is the stream's last event.
        """
        await self.loaded()
        events = await _events(to, inbound)
        try:
            first = await _next(events, to.target.timeout)
        except Exception as error:
            await events.aclose()
            raise upstream_error(error, to.target, to.scrub) from None
        except BaseException:  # cancelled: the client went away
            await events.aclose()
            raise
        if first is None or first[0] == DONE:
            raise UpstreamError(
                f"The provider of {to.target.model} answered with an empty stream.", status=502
            )
        return Stream(events, first, to, inbound)

    async def count_tokens(self, to: Destination, inbound: Inbound) -> TokenCount:
        """The input tokens of a body of ``/v1/messages``: Anthropic's own count at its targets, else an estimate.

        Raises as :meth:`complete` does.
        """
        await self.loaded()
        return await _counted(to, inbound)

    async def loaded(self) -> None:
        """Wait until litellm is there."""
        self.warm_up()
        assert self._loading is not None
        # Shielded: the client that waits for the import may go away, the import goes on.
        await asyncio.shield(self._loading)


async def complete(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    api_base: str | None = None,
    api_key_env: str | None = None,
    prices: Prices | None = None,
    timeout: float = 120,
    **params: Any,
) -> Completion:
    """Call a model once, outside any policy. Whoever is done calling awaits :func:`close_connections`.

    Parameters
    ----------
    model : str
        litellm's model id.
    messages : sequence of mapping
        OpenAI chat messages.
    api_base, api_key_env, timeout
        As in :class:`router.policy.Target`.
    prices : Prices, optional
        For the cost; litellm's own price list otherwise.
    **params
        OpenAI's parameters (``temperature``, ``max_tokens``, …).

    Raises
    ------
    UpstreamError
        The provider's error with its status.
    """
    target = Target(model=model, api_base=api_base, api_key_env=api_key_env, prices=prices, timeout=timeout)
    await asyncio.to_thread(_litellm)
    answer = await _whole(
        destination(model, target, os.environ, scrubber([target], os.environ)),
        Inbound(CHAT, {"messages": list(messages), **params}),
    )
    usage = answer.usage or Usage(0, 0)
    data = json.loads(answer.body)
    try:
        text = data["choices"][0]["message"]["content"] or ""
    except (LookupError, TypeError):
        raise UpstreamError(f"The provider of {model} answered without a message.", status=502) from None
    cost = usage.cost(prices) if prices else _listed_cost(model, usage)
    return Completion(text, usage.input, usage.output, cost)


async def close_connections() -> None:
    """Close litellm's connections to the providers: it has one set of them for the whole process."""
    litellm = _litellm()
    await litellm.close_litellm_async_clients()
    litellm.in_memory_llm_clients_cache.flush_cache()  # it would hand out closed ones


def scrubber(targets: Iterable[Target], environment: Mapping[str, str]) -> Scrubber:
    """What keeps the keys of these targets out of messages."""
    return Scrubber([_key(target, environment) or "" for target in targets])


def destination(
    name: str,
    target: Target,
    environment: Mapping[str, str],
    scrub: Scrubber,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Destination:
    """A target with its key: the client's own from ``headers``, where the target takes one, else from the environment.

    Raises
    ------
    RequestError
        Status 401: the target takes only a client's own key, and the request holds none; 400: that is none.
    UpstreamError
        Status 401: the target needs a key, and none is set.
    """
    if target.api_key_header is not None:
        own = headers.get(target.api_key_header, "").strip()
        if own and not _KEY.fullmatch(own):
            raise RequestError(
                f"The header {target.api_key_header} holds no key.", param=target.api_key_header
            )
        if own:
            return Destination(name, target, own, scrub.and_also(own), clients_key=True)
        if target.api_key_env is None:
            raise RequestError(
                f"The target {name} needs your own key for its provider, in the header {target.api_key_header}.",
                status=401,
                param=target.api_key_header,
                code="provider_key_missing",
            )
    key = _key(target, environment)
    if target.api_key_env is not None and not key:
        raise UpstreamError(
            f"The target {name} needs a key: {target.api_key_env} is not set where the server runs.",
            status=401,
            type="authentication_error",
            code="provider_key_missing",
        )
    return Destination(name, target, key, scrub)


@dataclass(frozen=True, slots=True)
class _Outbound:
    """What is sent for a request: a body of the endpoint's dialect; of chat, through litellm, where there is none."""

    endpoint: Endpoint | None
    body: Mapping[str, Any]
    hides_usage: bool = False  # the client did not ask for it


async def _whole(to: Destination, inbound: Inbound) -> Answer:
    """One request and all of its answer; errors as :class:`UpstreamError`."""
    out = _outbound(to, inbound, stream=False)
    dialect, send = inbound.dialect, _sender(to, out)
    try:
        async with asyncio.timeout(to.target.timeout):
            response = await _unless_stale(send)
            if isinstance(response, httpx.Response):
                assert out.endpoint is not None
                if out.endpoint.dialect == dialect.name:
                    content, _, usage = await passthrough.whole(response, to.target, to.scrub, dialect.name)
                    return Answer(content, usage)
                _, data, _ = await passthrough.whole(response, to.target, to.scrub)
            else:
                data = _completion(response)
                if to.target.echo:
                    data["usage"] = _echo_usage(to, out)
            return Answer(to_json(dialect.answer(data, inbound, family_of(to.target))), usage_of(data))
    except Exception as error:
        raise upstream_error(error, to.target, to.scrub) from None


async def _events(to: Destination, inbound: Inbound) -> Events:
    """One request and the events of its answer; errors before the first as :class:`UpstreamError`."""
    out = _outbound(to, inbound, stream=True)
    events = await _begun(to, inbound, out)
    return _without_usage(events) if out.hides_usage else events


async def _begun(to: Destination, inbound: Inbound, out: _Outbound) -> Events:
    """The events as the provider sends them; errors before the first as :class:`UpstreamError`."""
    dialect, send = inbound.dialect, _sender(to, out)
    try:
        async with asyncio.timeout(to.target.timeout):
            response = await _unless_stale(send)
            if not isinstance(response, httpx.Response):
                chunks = _translated(response)
                if to.target.echo and (out.body.get("stream_options") or {}).get("include_usage"):
                    chunks = _then_usage(chunks, _echo_usage(to, out))
                return _worded(chunks, dialect.writer(inbound, family_of(to.target)))
            assert out.endpoint is not None
            if out.endpoint.dialect != dialect.name:
                chunks = passthrough.chunks(response, to.target, to.scrub)
                return _worded(chunks, dialect.writer(inbound, family_of(to.target)))
            if dialect is CHAT:
                return passthrough.events(response, to.target, to.scrub)
            return passthrough.named_events(response, to.target, to.scrub, dialect.name)
    except Exception as error:
        raise upstream_error(error, to.target, to.scrub) from None


async def _counted(to: Destination, inbound: Inbound) -> TokenCount:
    endpoint = None if to.target.echo else _endpoint(to, inbound)
    if endpoint is None or _dialect(to.target.model, to.target.api_base)[0] != "anthropic":
        return TokenCount(to_json({"input_tokens": estimate_tokens(inbound.body)}), estimated=True)
    out = _outbound(to, inbound, stream=False)
    # Its params are for an answer: here some of them are refused.
    asked = to.target.model_copy(update={"params": {"extra_headers": to.target.params.get("extra_headers")}})
    at = dataclasses.replace(endpoint, url=f"{endpoint.url}/count_tokens")
    body = {field: value for field, value in out.body.items() if field != "max_tokens"}
    try:
        async with asyncio.timeout(to.target.timeout):
            response = await _unless_stale(lambda: passthrough.send(_client(), at, asked, body, to.scrub))
            content, _, _ = await passthrough.whole(response, to.target, to.scrub, "count")
            return TokenCount(content, estimated=False)
    except Exception as error:
        raise upstream_error(error, to.target, to.scrub) from None


def _outbound(to: Destination, inbound: Inbound, stream: bool) -> _Outbound:
    """The request as the destination takes it, without the mode and without other families' reasoning."""
    dialect, family = inbound.dialect, family_of(to.target)
    body = _without_mode(keep_own(dialect.name, inbound.body, family, inbound.families))
    if dialect.name == "messages":
        body = without_stranded_thinking(body)
    endpoint = None if to.target.echo else _endpoint(to, inbound)
    translated = endpoint is None or endpoint.dialect != dialect.name
    if translated and dialect is not CHAT:
        body = _as_chat(to, inbound, body, family, endpoint)
        if stream:
            body["stream_options"] = {"include_usage": True}  # other dialects always tell it
    elif dialect.name == "responses":
        body = {**body, "store": False}
    if stream:
        hides = dialect is CHAT and _asks_unasked(to.target, body)
        if hides:
            body = {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}
        return _Outbound(endpoint, {**body, "stream": True}, hides)
    return _Outbound(
        endpoint, {field: value for field, value in body.items() if field not in ("stream", "stream_options")}
    )


def _as_chat(
    to: Destination, inbound: Inbound, body: Mapping[str, Any], family: str, endpoint: Endpoint | None
) -> dict[str, Any]:
    """A body of another dialect as a chat completion that this destination takes."""
    # What marks prompt caching, other families' providers refuse.
    view = inbound.dialect.to_chat(body, marks=family == ANTHROPIC)
    if view.lost and not to.target.drop_params:
        raise RequestError(
            f"'{view.lost[0]}' has no translation for the target {to.name}, which speaks another dialect; "
            "leave it out, or set drop_params on the target in the policy.",
            param=view.lost[0],
            code="unsupported_parameter",
        )
    chat = dict(view.body)
    limit = to.target.max_output_tokens
    if limit is not None and chat.get("max_tokens", 0) > limit:
        chat["max_tokens"] = limit  # clients ask for what their own model can do
    if "reasoning_effort" in chat and not _reasons(to.target, endpoint):
        del chat["reasoning_effort"]
    if family == ANTHROPIC and _calls_without_thinking(chat["messages"]):
        chat.pop("reasoning_effort", None)
    elif family == ANTHROPIC and "reasoning_effort" in chat and endpoint is None:
        thinking = body.get("thinking")
        if isinstance(thinking, Mapping) and thinking.get("type") == "enabled":
            del chat["reasoning_effort"]
            chat["thinking"] = thinking  # litellm knows it by name
    if family == GOOGLE and endpoint is not None:
        chat["messages"] = [_signed(message) for message in chat["messages"]]
    return chat


def _calls_without_thinking(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the turn that goes on called tools without a thinking block, after which Anthropic allows no thinking."""
    if not messages or messages[-1].get("role") != "tool":
        return False
    calls = [message for message in messages if message.get("tool_calls")]
    return not (calls and calls[-1].get("thinking_blocks"))


def _signed(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls carry Google's signatures where its OpenAI dialect wants them."""
    calls = message.get("tool_calls")
    if not calls or not any(THOUGHT in call["id"] for call in calls):
        return message
    signed = []
    for call in calls:
        _, _, signature = call["id"].partition(THOUGHT)
        extra = {"extra_content": {GOOGLE: {"thought_signature": signature}}} if signature else {}
        signed.append({**call, **extra})
    return {**message, "tool_calls": signed}


def _reasons(target: Target, endpoint: Endpoint | None) -> bool:
    """Whether a target takes an effort of reasoning: as the policy says, else as litellm knows."""
    if target.supports is not None or endpoint is not None or target.echo:
        return "reasoning" in (target.supports or ())
    return bool(_litellm().supports_reasoning(model=target.model))


def _sender(to: Destination, out: _Outbound) -> Callable[[], Awaitable[Any]]:
    """What sends a request: awaited, it gives an httpx.Response where there is an endpoint, litellm's answer otherwise."""
    endpoint = out.endpoint
    if endpoint is not None:
        return lambda: passthrough.send(_client(), endpoint, to.target, out.body, to.scrub)
    arguments = _arguments(to.name, to.target, out.body, to.key)
    return lambda: _call(to, arguments)


async def _call(to: Destination, arguments: Mapping[str, Any]) -> Any:
    try:
        return await _litellm().acompletion(**arguments)
    finally:
        if to.clients_key and to.key is not None:
            _forget(to.key)


def _forget(key: str) -> None:
    """Take the SDK's clients that hold this key out of litellm's cache, which would keep them for an hour.

    They stand there under the key's SHA-256, so that no other request can get one; it is not ours to keep all the same.
    litellm closes what it takes out once no connection of it is in use.
    """
    mark = f"hashed_api_key={hashlib.sha256(key.encode()).hexdigest()},"
    cache = _litellm().in_memory_llm_clients_cache
    for name in [name for name in cache.cache_dict if name.startswith(mark)]:
        cache.delete_cache(name)


def _client() -> httpx.AsyncClient:
    from litellm.llms.custom_httpx.http_handler import get_async_httpx_client

    client: httpx.AsyncClient = get_async_httpx_client("openai").client
    return client


def _endpoint(to: Destination, inbound: Inbound) -> Endpoint | None:
    """Where the request goes as it came; else the target's chat completions; None where litellm has to send it."""
    provider, model, form = _dialect(to.target.model, to.target.api_base)
    speaks = to.target.speaks or _SPEAKS.get((provider, to.target.api_base is not None), frozenset())
    name = inbound.dialect.name
    if name in speaks and name == "messages":
        return passthrough.messages(to.target, provider, model, to.key, inbound.headers)
    if name in speaks and name == "responses":
        return passthrough.responses(to.target, model, to.key)
    return passthrough.chat(to.target, model, to.key) if form == "verbatim" else None


# What a target speaks where the policy does not say, by litellm's provider and whether it has an api_base.
_SPEAKS = {
    ("anthropic", True): frozenset(("messages",)),
    ("anthropic", False): frozenset(("messages",)),
    ("openai", False): frozenset(("responses",)),
}


def _asks_unasked(target: Target, body: Mapping[str, Any]) -> bool:
    """Whether a stream's usage is asked for though the client does not; a target's own ``stream_options`` stand."""
    asked = (body.get("stream_options") or {}).get("include_usage")
    return target.ask_usage and not asked and "stream_options" not in target.params


async def _without_usage(events: Events) -> Events:
    """The events without the chunk that tells the usage alone; what it tells is kept."""
    async with contextlib.aclosing(events):
        async for data, usage in events:
            alone = usage is not None and not json.loads(data.removeprefix(b"data: ")).get("choices")
            yield b"" if alone else data, usage


async def _worded(chunks: AsyncGenerator[dict[str, Any]], writer: Writer) -> Events:
    """The events of a client's dialect for a stream of chat chunks."""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            yield writer.chunk(chunk), usage_of(chunk)
    yield writer.end(), None


async def _translated(chunks: Any) -> AsyncGenerator[dict[str, Any]]:
    """litellm's chunks, as a provider of OpenAI's dialect sends them."""
    try:
        async for chunk in chunks:
            data = _chunk(chunk)
            if data is not None:
                yield data
    finally:
        await chunks.aclose()


async def _then_usage(
    chunks: AsyncGenerator[dict[str, Any]], usage: Mapping[str, int]
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks, and behind them the one that tells the usage."""
    last: dict[str, Any] = {}
    async with contextlib.aclosing(chunks):
        async for last in chunks:
            yield last
    yield {**last, "choices": [], "usage": usage}


def _listed_cost(model: str, usage: Usage) -> float | None:
    """US dollars by litellm's price list; None for a model that is not on it."""
    try:
        parts = _litellm().cost_per_token(
            model=model,
            prompt_tokens=usage.input,
            completion_tokens=usage.output,
            cache_read_input_tokens=usage.cached,
            cache_creation_input_tokens=usage.cache_write,
        )
    except Exception:  # litellm has no class of its own for it
        return None
    return sum(parts) or None


def _key(target: Target, environment: Mapping[str, str]) -> str | None:
    # A variable that was read from a file ends in a newline, which no header may hold.
    return environment.get(target.api_key_env, "").strip() or None if target.api_key_env else None


def _report(loading: asyncio.Task[None]) -> None:
    error = None if loading.cancelled() else loading.exception()
    if error is not None:
        logger.error("litellm cannot be loaded: %s: %s", type(error).__name__, error)


@functools.cache
def _litellm() -> Any:
    # Without these its import fetches a price list and a header list from the network.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS", "True")
    # And without this it reads ./.env into the environment, behind the policy's back.
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")
    with _IMPORT:
        litellm: Any = importlib.import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    # Where a provider reports no usage it would count tokens itself: slowly, with 40 MB, and as if measured.
    litellm.disable_token_counter = True
    litellm.disable_hf_tokenizer_download = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "openai"):
        # Their debug and error lines hold prompts.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Its types make pydantic warn at the first stream; nobody who serves can do anything about that.
    warnings.filterwarnings("ignore", message=".*using the `ReadOnly` qualifier", category=UserWarning)
    return litellm


async def _warm_up() -> None:
    litellm = await asyncio.to_thread(_litellm)
    # The SDK imports this at the first call, which would hold up the event loop for half a second.
    await asyncio.to_thread(importlib.import_module, "openai.resources")
    echo = Target(echo=True)
    await litellm.acompletion(**_arguments("echo", echo, {"messages": []}, None))
    async for _ in await litellm.acompletion(
        **_arguments("echo", echo, {"messages": [], "stream": True}, None)
    ):
        pass
    # Some 400,000 objects that stay: a full collection that walks them holds up every request by .2 s.
    gc.freeze()


def _arguments(name: str, target: Target, body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    """What ``litellm.acompletion`` is called with."""
    messages = body["messages"]
    arguments: dict[str, Any] = {
        "model": target.model,
        "messages": messages,
        "stream": body.get("stream", False),
        "timeout": target.timeout,
        "num_retries": 0,
        # Or tools of type mcp would make litellm call servers, with a package that is not installed.
        "_skip_mcp_handler": True,
    }
    if body.get("stream") and body.get("stream_options"):
        arguments["stream_options"] = body["stream_options"]
    if target.echo:
        # Nobody reads the messages, but litellm would check them.
        mock = {"custom_llm_provider": "openai", "mock_response": _echo(name, messages)}
        return arguments | mock | {"messages": []}
    provider, _, dialect = _dialect(target.model, target.api_base)
    if key is None and target.api_base is not None and dialect != "other":
        key = "none"  # or litellm would send OPENAI_API_KEY to a server that is not OpenAI's
    arguments |= {"api_key": key, "api_base": target.api_base, "drop_params": target.drop_params}
    rest = {field: value for field, value in body.items() if field not in _OWN and value is not None}
    known = _PARAMETERS if dialect == "openai" else _TRANSLATED
    arguments |= {field: value for field, value in rest.items() if field in known}
    extra = {field: value for field, value in rest.items() if field not in known}
    if dialect == "openai":
        arguments["extra_body"] = extra
    else:
        unknown = sorted(extra.keys() - _TAGS)
        if unknown and not target.drop_params:
            raise RequestError(
                f"'{unknown[0]}' has no translation for {provider} (target {name}); "
                "leave it out, or set drop_params on the target in the policy.",
                param=unknown[0],
                code="unsupported_parameter",
            )
    merged = {**target.params, **arguments}
    if not merged["stream"]:
        merged.pop("stream_options", None)  # of the target's defaults: refused on a whole answer
    return merged


def _without_mode(body: dict[str, Any]) -> dict[str, Any]:
    """The body without the mode: that is for the router. OpenAI refuses metadata on what is not stored, so none is left empty."""
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or "mode" not in metadata:
        return body
    kept = {key: value for key, value in metadata.items() if key != "mode"}
    return {**body, "metadata": kept or None}


def provider_of(target: Target) -> tuple[str, str]:
    """litellm's name of a target's provider, and the model's name there; asked once litellm is loaded."""
    return ("echo", "echo") if target.echo else _dialect(target.model, target.api_base)[:2]


Form = Literal["verbatim", "openai", "other"]


@functools.lru_cache(maxsize=256)
def _dialect(model: str, api_base: str | None) -> tuple[str, str, Form]:
    """litellm's provider for a model, the model's name there, and in which form a body goes to it."""
    litellm = _litellm()
    try:
        name, provider, _, _ = litellm.get_llm_provider(model=model, api_base=api_base)
    except Exception:
        # litellm's call says what is wrong with the model.
        return "the provider", model, "other"
    if provider == "openai" and api_base is not None:
        return provider, name, "verbatim"
    compatible = ("openai", "azure", *litellm.openai_compatible_providers)
    return provider, name, "openai" if provider in compatible else "other"


async def _unless_stale(send: Callable[[], Awaitable[Any]]) -> Any:
    started = time.monotonic()
    try:
        return await send()
    except Exception as error:
        if time.monotonic() - started > _STALE_SECONDS or not _is_stale(error):
            raise
    # The provider closed an idle connection at the moment when it was taken from the pool, and so has not read the
    # request: the one case in which sending it again can do no harm.
    return await send()


def _is_stale(error: BaseException | None) -> bool:
    """Whether a connection was closed without a byte of an answer."""
    while error is not None:
        if isinstance(error, ConnectionResetError) or type(error).__name__ in _STALE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    asks = [text_of(message.get("content")) for message in messages if message.get("role") == "user"]
    # The brackets also keep an ask from being one of the words on which litellm's mock raises an error.
    return f"[{name}] {asks[-1][:_ECHO_CHARACTERS] if asks else ''}"


def _echo_usage(to: Destination, out: _Outbound) -> dict[str, int]:
    """What an echo took, estimated: no provider counts it, and litellm's mock always says 30 tokens."""
    messages = out.body["messages"]
    asked = sum(estimate_text_tokens(text_of(message.get("content"))) for message in messages)
    answered = estimate_text_tokens(_echo(to.name, messages))
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


async def _next(events: Events, timeout: float) -> Event | None:
    try:
        async with asyncio.timeout(timeout):
            return await anext(events)
    except StopAsyncIteration:
        return None


def _completion(response: Any) -> dict[str, Any]:
    """A whole answer as OpenAI words it, without litellm's own fields."""
    data = _dumped(response)
    for choice in data.get("choices", ()):
        message = choice.get("message", {})
        message.setdefault("content", None)
        _restore(message)
        _restore(choice)
    return data


def _chunk(chunk: Any) -> dict[str, Any] | None:
    """A chunk as OpenAI words it, or None where it says nothing.

    litellm's usage chunk holds an empty choice where OpenAI's holds none.
    """
    data = _dumped(chunk)
    choices = data.get("choices", [])
    for choice in choices:
        _restore(choice.get("delta", {}))
        choice.setdefault("finish_reason", None)
    if any(choice.get("delta") or choice["finish_reason"] for choice in choices):
        return data
    return {**data, "choices": []} if "usage" in data else None


def _dumped(response: Any) -> dict[str, Any]:
    data: dict[str, Any] = response.model_dump(exclude_none=True)
    data.pop("provider_specific_fields", None)
    usage = data.get("usage")
    if usage is not None:
        usage.pop("cost", None)  # by litellm's price list; ours is the policy's
        if not usage.get("prompt_tokens") and not usage.get("completion_tokens"):
            del data["usage"]  # litellm's filling for a provider that reports none
    return data


def _restore(part: dict[str, Any]) -> None:
    """litellm moves what it has no field for into ``provider_specific_fields``; put it where it came from."""
    fields = part.pop("provider_specific_fields", None)
    if isinstance(fields, dict):
        for field, value in fields.items():
            if value is not None:
                part.setdefault(field, value)


def upstream_error(error: Exception, target: Target, scrub: Scrubber) -> UpstreamError:
    """What went wrong at the provider: its status and words, without secrets or litellm's wrapping."""
    if isinstance(error, UpstreamError):
        return error
    original = getattr(error, "original_exception", None)
    if isinstance(original, Exception):
        error = original  # what broke a stream
    if isinstance(error, httpx.HTTPError):
        if isinstance(error, httpx.TimeoutException):
            return late(target)
        message = f"The provider of {target.model} cannot be reached, or broke off ({type(error).__name__})."
        return UpstreamError(message, status=502)
    headers = getattr(error, "litellm_response_headers", None) or {}
    status = getattr(error, "status_code", None)
    if isinstance(error, TimeoutError) or (isinstance(error, _litellm().Timeout) and not headers):
        return late(target)
    untranslatable = False
    if not isinstance(status, int) or (status >= 500 and not headers):
        untranslatable = _is_untranslatable(error)
        status = 400 if untranslatable else 502
    body = getattr(error, "body", None)
    words = _SUFFIX.split(_PREFIX.sub("", str(error), count=1), maxsplit=1)[0].strip()
    if untranslatable:
        words = f"The request cannot be translated for {target.model}: {words}"
    return answered_error(
        target,
        scrub,
        status=status,
        body=body if isinstance(body, dict) else {},
        retry_after=headers.get("retry-after"),
        otherwise=words,
    )


def _is_untranslatable(error: BaseException | None) -> bool:
    """Whether litellm failed over the request itself."""
    while error is not None:
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if (
            isinstance(error, ValueError | TypeError | LookupError | AttributeError)
            or type(error) is Exception
        ):
            return bool(frames & _TRANSLATING) or _is_untranslatable(error.__cause__ or error.__context__)
        error = error.__cause__ or error.__context__
    return False
