"""A router that runs against the loopback provider, with a predictor whose scores are known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from provider import Provider, provider, serve

from router.app import create_app
from router.clients import ClientKeys
from router.features import Prompt
from router.gateway import Gateway
from router.policy import Policy
from router.predictor import Prediction

KEY = "sk-our-own-key-000000000000"
ENVIRONMENT = {"TEST_PROVIDER_KEY": KEY}


class WordPredictor:
    """Predicts a gain of .4 for prompts that hold the word "hard", of .05 for the others; "strange" ones are flagged."""

    name = "words@0"
    targets = ("weak", "strong")
    threshold = 0.2
    bars: Mapping[float, float] = {}
    knows_steps = False

    def predict(self, prompts: Sequence[Prompt]) -> Prediction:
        gain = np.array([[0.0, 0.4 if "hard" in prompt.text else 0.05] for prompt in prompts])
        novelty = np.array([2.5 if "strange" in prompt.text else 0.25 for prompt in prompts])
        return Prediction(self.targets, 0.5 + gain / 2, gain, novelty)


@dataclass
class Running:
    """A running router; ``url`` without a path."""

    url: str
    provider: Provider
    gateway: Gateway


def policy(
    base: str,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    dialects: bool = False,
    **changes: Any,
) -> Policy:
    """Two targets behind a tier, and one target for each way in which a provider can fail, in any dialect if asked.

    ``more`` are further targets; ``asks`` is the provider's name of the model, and so how it behaves.
    """

    def target(name: str, **more: Any) -> dict[str, Any]:
        return {"model": f"openai/{name}", "api_base": base, "api_key_env": "TEST_PROVIDER_KEY", **more}

    failing = ("rate-limited", "broken", "not-json", "picky", "fails-midway", "drops-midway", "endless")
    root = base.removesuffix("/v1")
    spoken: dict[str, Any] = {
        "thinker": target(
            "",
            model="anthropic/claude-sonnet-4-5",
            api_base=root,
            supports=["reasoning", "tools"],
        ),
        "dropping": target("small", drop_params=True),
        # A server that takes every dialect, and would also fail in each.
        "spoken": target("spoken", speaks=["chat", "messages", "responses"]),
        **{f"spoken-{name}": target(name, speaks=["responses"]) for name in failing},
        **{
            f"claude-{name}": target("", model=f"anthropic/{name}", api_base=root)
            for name in (*failing, "ends-midway")
        },
        "overloaded": target("", model="anthropic/overloaded", api_base=root),
    }
    document: dict[str, Any] = {
        "version": 1,
        "targets": {
            "cheap": target("small", prices={"input": 1, "output": 4, "cached_read": 0.5}),
            "frontier": target("large"),
            "silent": target("small", prices={"input": 1, "output": 4}, ask_usage=False),
            "echo": {"echo": True},
            "hang": target("hang", timeout=0.3),
            "patient": target("hang", timeout=60),
            "stalls-midway": target("stalls-midway", timeout=0.3),
            "claude": target("", model="anthropic/claude-sonnet-4-5", api_base=base.removesuffix("/v1")),
            "keyless": {"model": "openai/small", "api_base": base},
            "no-key": target("small", api_key_env="TEST_KEY_THAT_IS_NOT_SET"),
            "down": target("small", api_base="http://127.0.0.1:9/v1"),
            **{name: target(name) for name in failing},
            **(spoken if dialects else {}),
            **{
                name: target(
                    **{"name": fields["asks"], **{key: fields[key] for key in fields if key != "asks"}}
                )
                for name, fields in (more or {}).items()
            },
        },
        "tiers": {
            "auto": {"predict": {"weak": "cheap", "strong": "frontier"}},
            "balanced": {"modes": {"plan": "frontier", "commit": "cheap"}, "default": "cheap"},
        },
        "default_tier": "auto",
        "aliases": {"gpt-4o": "auto", "claude-*": "auto"},
    }
    return Policy.model_validate({**document, **changes})


@contextmanager
def serve_gateway(gateway: Gateway) -> Iterator[str]:
    """Serve the router on a free port in a thread of its own, and wait until it can dispatch; yields its URL."""
    with serve(create_app(gateway=gateway)) as url:
        # litellm makes pydantic warn while it loads, which no test asked for: it is loaded before they start.
        deadline = time.monotonic() + 60
        while gateway.dispatcher.state in ("idle", "loading") and time.monotonic() < deadline:
            time.sleep(0.01)
        yield url


@contextmanager
def running(
    environment: Mapping[str, str] = ENVIRONMENT, clients: ClientKeys | None = None, **changes: Any
) -> Iterator[Running]:
    """Serve provider and router, each on a free port and in a thread of its own."""
    with provider() as upstream:
        gateway = Gateway(policy(upstream.url, **changes), WordPredictor(), environment, clients)
        with serve_gateway(gateway) as url:
            yield Running(url, upstream, gateway)
