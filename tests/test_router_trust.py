"""What a hostile policy tries, and what it gets."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from provider import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import router.dispatch
from router.dialects import CHAT, Inbound
from router.dispatch import Dispatcher
from router.errors import PolicyError, UpstreamError, UsageError
from router.gateway import InForce
from router.policy import Policy, Target
from router.trust import PLAIN_FIELDS, PROVIDERS, Trust

OWN = "OPENAI_API_KEY, TEAM_KEY@models.example:8443/team, @models.internal:8000, LOCAL_KEY@127.0.0.1:9"


def policy(**target: Any) -> Policy:
    return Policy.model_validate(
        {
            "version": 1,
            "targets": {"a": target},
            "tiers": {"auto": {"default": "a"}},
            "default_tier": "auto",
        }
    )


@pytest.mark.parametrize(
    "target",
    [
        {"echo": True},
        {"model": "openai/gpt-5", "api_key_env": "OPENAI_API_KEY"},
        {"model": "openai/gpt-5", "api_key_env": "OPENAI_API_KEY", "api_base": "https://api.openai.com/v1"},
        {
            "model": "openai/gpt-5",
            "api_key_env": "OPENAI_API_KEY",
            "api_base": "https://api.openai.com:443/v1",
        },
        {"model": "openai/m", "api_key_env": "TEAM_KEY", "api_base": "https://models.example:8443/team"},
        {"model": "openai/m", "api_key_env": "TEAM_KEY", "api_base": "https://models.example:8443/team/v1/"},
        {"model": "anthropic/m", "api_key_env": "TEAM_KEY", "api_base": "https://models.example:8443/team"},
        {"model": "openai/qwen", "api_base": "http://models.internal:8000/v1"},
        {"model": "openai/qwen", "api_key_env": "LOCAL_KEY", "api_base": "http://127.0.0.1:9/v1"},
        {
            "model": "openai/gpt-5",
            "api_key_env": "OPENAI_API_KEY",
            "params": {"temperature": 0, "reasoning_effort": "low", "max_tokens": 10},
            "prices": {"input": 1, "output": 2},
            "context_window": 1000,
            "supports": ["tools"],
            "timeout": 30,
            "drop_params": True,
        },
    ],
)
def test_what_the_settings_say_is_taken(target: dict[str, Any]) -> None:
    Trust(OWN).check(policy(**target), "here")


KEYED = {"model": "openai/gpt-5", "api_key_env": "OPENAI_API_KEY"}
ATTACKS = {
    "the key to a host of its own": KEYED | {"api_base": "https://evil.example/v1"},
    "the host as a part of another": KEYED | {"api_base": "https://api.openai.com.evil.example/v1"},
    "the host as a user name": KEYED | {"api_base": "https://api.openai.com@evil.example/v1"},
    "the host before a backslash": KEYED | {"api_base": "https://api.openai.com\\@evil.example/v1"},
    "the host as a fragment": KEYED | {"api_base": "https://evil.example#@api.openai.com/v1"},
    "the host with another port": KEYED | {"api_base": "https://api.openai.com:8443/v1"},
    "the host with a dot": KEYED | {"api_base": "https://api.openai.com./v1"},
    "the host without TLS": KEYED | {"api_base": "http://api.openai.com/v1"},
    "the host in other letters": KEYED | {"api_base": "https://API.OPENAI.COM/v1"},
    "another account of a shared host": {
        "model": "openai/m",
        "api_key_env": "TEAM_KEY",
        "api_base": "https://models.example:8443/evil",
    },
    "an account that begins alike": {
        "model": "openai/m",
        "api_key_env": "TEAM_KEY",
        "api_base": "https://models.example:8443/team-evil",
    },
    "out of the account by dots": {
        "model": "openai/m",
        "api_key_env": "TEAM_KEY",
        "api_base": "https://models.example:8443/team/../evil",
    },
    "out of the account by escaped dots": {
        "model": "openai/m",
        "api_key_env": "TEAM_KEY",
        "api_base": "https://models.example:8443/team/%2e%2e/evil",
    },
    "another variable": KEYED | {"api_key_env": "DATABASE_PASSWORD"},
    "another variable to its usual host": {"model": "groq/m", "api_key_env": "GROQ_API_KEY"},
    "the key by the model's provider": {"model": "groq/m", "api_key_env": "OPENAI_API_KEY"},
    "a provider that takes its address from the model": {
        "model": "huggingface/https://evil.example",
        "api_key_env": "OPENAI_API_KEY",
    },
    "a provider that is not known": {"model": "evil/m", "api_key_env": "OPENAI_API_KEY"},
    "a model without a provider": {"model": "gpt-5", "api_key_env": "OPENAI_API_KEY"},
    "a key that litellm finds itself": {"model": "anthropic/claude-opus-4-6"},
    "that, to a host of its own": {"model": "anthropic/m", "api_base": "https://evil.example"},
    "that, to a host without a key": {"model": "anthropic/m", "api_base": "http://models.internal:8000"},
    "OpenAI's key that litellm finds itself": {"model": "openai/gpt-5"},
    "credentials of a cloud": {"model": "bedrock/m"},
    "credentials of a machine": {"model": "vertex_ai/m"},
    "Azure's token": {"model": "azure/m", "api_base": "https://evil.example"},
    "prompts without a key": {"model": "openai/m", "api_base": "https://evil.example/v1"},
    "the metadata service": {"model": "openai/m", "api_base": "http://169.254.169.254/latest"},
    "a keyless host with a key": {
        "model": "openai/m",
        "api_key_env": "OPENAI_API_KEY",
        "api_base": "http://models.internal:8000/v1",
    },
    **{
        f"an address or a credential by params.{name}": KEYED | {"params": {name: "https://evil.example"}}
        for name in (
            "aws_bedrock_runtime_endpoint",
            "azure_ad_token",
            "custom_llm_provider",
            "endpoint_url",
            "extra_body",
            "fallbacks",
            "litellm_params",
            "mock_response",
            "organization",
            "proxy",
            "ssl_verify",
            "tools",
            "vertex_credentials",
            "vertex_location",
            "web_search_options",
        )
    },
    "another host's site behind a shared front": KEYED
    | {"params": {"extra_headers": {"Host": "evil.example"}}},
}


@pytest.mark.parametrize("target", ATTACKS.values(), ids=ATTACKS)
def test_what_they_do_not_say_is_refused(target: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"^here: targets\.a\."):
        Trust(OWN).check(policy(**target), "here")


def test_a_refusal_says_what_would_allow_it() -> None:
    with pytest.raises(PolicyError) as caught:
        Trust().check(policy(**KEYED), "https://example.com/p.yaml")
    assert str(caught.value) == (
        "https://example.com/p.yaml: targets.a.api_key_env: the key OPENAI_API_KEY may not be sent to "
        "api.openai.com; --allow-key (ROUTER_ALLOWED_KEYS) OPENAI_API_KEY@api.openai.com allows it"
    )
    with pytest.raises(PolicyError, match=r"nothing may be sent to h:8; .* @h:8 allows it"):
        Trust("OPENAI_API_KEY").check(policy(model="openai/m", api_base="http://h:8"), "here")


@pytest.mark.parametrize(
    "allowed",
    ["MY_KEY", "MY-KEY@host", "KEY@", "KEY@https://host", "KEY@host:x", "KEY@ho st", "KEY@h/../x", "*"],
)
def test_a_setting_that_cannot_be_read_is_told(allowed: str) -> None:
    with pytest.raises(UsageError, match="--allow-key"):
        Trust(allowed)


def test_every_field_of_a_target_is_known_to_be_plain_or_is_refused() -> None:
    """A new field that says something of addresses or credentials must not come in unseen."""
    assert set(Target.model_fields) <= PLAIN_FIELDS


@pytest.mark.skipif("api_key_header" not in Target.model_fields, reason="targets know no clients' keys")
def test_a_client_s_key_goes_where_the_settings_say() -> None:
    target = {"model": "openai/m", "api_key_header": "x-team-key", "api_base": "https://models.example/v1"}
    Trust("x-team-key@models.example").check(policy(**target), "here")
    for allowed in ("", "@models.example", "TEAM_KEY@models.example", "x-team-key@other.example"):
        with pytest.raises(PolicyError, match="the key x-team-key may not be sent to models"):
            Trust(allowed).check(policy(**target), "here")
    both = target | {"api_key_env": "TEAM_KEY"}
    with pytest.raises(PolicyError, match="the key TEAM_KEY may not be sent to models"):
        Trust("x-team-key@models.example").check(policy(**both), "here")


class Listener:
    """A server that notes all of what arrives, and answers none of it."""

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self.url = ""
        self.app = Starlette(routes=[Route("/{path:path}", self.note, methods=["GET", "POST"])])

    async def note(self, request: Request) -> JSONResponse:
        body = (await request.body()).decode()
        self.arrived.append(f"{request.url} {dict(request.headers)} {body}")
        return JSONResponse({"error": {"message": "no"}}, status_code=400)


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    listener = Listener()
    with serve(listener.app) as url:
        listener.url = url
        yield listener


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_gets_the_key_it_is_given_where_it_is_given_and_no_other(
    name: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ground on which these providers may be named: tried with each, all other keys being set."""
    for host, key in PROVIDERS.values():
        monkeypatch.setenv(key, f"canary-of-{host}")
    for variable in ("AZURE_AD_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(variable, "canary")
    target = {"model": f"{name}/small", "api_base": f"{listener.url}/v1", "api_key_env": "GIVEN_KEY"}
    checked = policy(**target)
    Trust(f"GIVEN_KEY@{listener.url.removeprefix('http://')}").check(checked, "here")
    to = InForce(checked, None, {"GIVEN_KEY": "the-key-that-is-given"}).destination("a")
    listener.arrived.clear()

    async def send() -> None:
        dispatcher = Dispatcher()
        with pytest.raises(UpstreamError):
            await dispatcher.complete(to, Inbound(CHAT, {"messages": [{"role": "user", "content": "hello"}]}))
        await dispatcher.close()

    asyncio.run(send())
    assert "the-key-that-is-given" in listener.arrived[0]
    assert "canary" not in str(listener.arrived)


def test_providers_send_to_the_hosts_that_are_written_here() -> None:
    litellm = router.dispatch._litellm()
    told = {
        name: litellm.get_llm_provider(f"{name}/some-model")[3]
        for name in PROVIDERS
        if litellm.get_llm_provider(f"{name}/some-model")[3]
    }
    assert len(told) >= 7
    for name, base in told.items():
        assert urlsplit(base).hostname == PROVIDERS[name][0]
    anthropic = importlib.import_module("litellm.llms.anthropic.common_utils")
    assert urlsplit(anthropic.AnthropicModelInfo.get_api_base()).hostname == PROVIDERS["anthropic"][0]
