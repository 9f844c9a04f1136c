"""What every way to a provider shares: tokens used, and a provider's error as people should read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.errors import UpstreamError
from router.policy import Prices, Target

# Of one request, as far as anybody believes: counts beyond it break sums.
MOST_TOKENS = 10**11
_MESSAGE_CHARACTERS = 2_000

_SECRETS = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|key)[-_][A-Za-z0-9*_\-.]{6,}"
    r"|\bAIza[A-Za-z0-9_\-]{10,}"
    r"|\bAKIA[A-Z0-9]{12,}"
    r"|(?i:\bbearer\s+)[^\s\"',]+"
    r"|(?i:\b(?:x-)?(?:api[-_]?key|access[-_]?token|token|secret|password|key)\b[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,}]{6,}"
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them.

    ``cached`` and ``cache_write`` are parts of ``input``, ``reasoning`` of ``output``.
    """

    input: int
    output: int
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0

    def cost(self, prices: Prices) -> float:
        """US dollars."""
        return prices.cost(
            input=self.input, output=self.output, cached_read=self.cached, cache_write=self.cache_write
        )


def usage_of(data: Mapping[str, Any]) -> Usage | None:
    """The usage in a completion or chunk of OpenAI's chat completions; None where it holds none."""
    return _openai_usage(data.get("usage"), "prompt", "completion")


def usage_of_messages(data: Mapping[str, Any]) -> Usage | None:
    """The usage in an answer or event of Anthropic's dialect, whose ``input_tokens`` leave out what is cached."""
    usage = data.get("usage")
    if not isinstance(usage, dict):
        message = data.get("message")
        usage = message.get("usage") if isinstance(message, dict) else None
        if not isinstance(usage, dict):
            return None
    cached, written = (
        _count(usage.get("cache_read_input_tokens")),
        _count(usage.get("cache_creation_input_tokens")),
    )
    return _counted(
        Usage(
            input=_count(usage.get("input_tokens")) + cached + written,
            output=_count(usage.get("output_tokens")),
            cached=cached,
            cache_write=written,
        )
    )


def usage_of_responses(data: Mapping[str, Any]) -> Usage | None:
    """The usage in a response or its last event; None where it holds none."""
    response = data.get("response")
    return _openai_usage((response if isinstance(response, dict) else data).get("usage"), "input", "output")


def _openai_usage(usage: Any, read: str, written: str) -> Usage | None:
    """A usage in either of OpenAI's dialects, by what each calls the tokens that are read and written."""
    if not isinstance(usage, dict):
        return None
    details = _details(usage, f"{read}_tokens_details")
    return _counted(
        Usage(
            input=_count(usage.get(f"{read}_tokens")),
            output=_count(usage.get(f"{written}_tokens")),
            cached=_count(details.get("cached_tokens")),
            cache_write=_count(details.get("cache_creation_tokens") or details.get("cache_write_tokens")),
            reasoning=_count(_details(usage, f"{written}_tokens_details").get("reasoning_tokens")),
        )
    )


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    details = usage.get(name)
    return details if isinstance(details, dict) else {}


class Scrubber:
    """Removes secrets from a provider's words: the keys in use, and whatever looks like one."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = sorted((secret for secret in secrets if len(secret) >= 4), key=len, reverse=True)

    def and_also(self, secret: str) -> Scrubber:
        """One that removes this secret too."""
        return Scrubber([*self._secrets, secret])

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return _SECRETS.sub("[key]", text)


def answered_error(
    target: Target,
    scrub: Scrubber,
    *,
    status: int,
    body: Mapping[str, Any],
    retry_after: Any = None,
    otherwise: str = "",
) -> UpstreamError:
    """The error that a provider answered with: its status and words, without secrets.

    ``body`` is the error's JSON, in an ``error`` field or bare; ``otherwise`` the words where it holds none.
    """
    nested = body.get("error")
    body = nested if isinstance(nested, dict) else body
    message = body.get("message")
    if not isinstance(message, str):
        message = nested if isinstance(nested, str) else otherwise
    if not message or message.lstrip().startswith("<"):
        message = f"The provider of {target.model} answered with an error and no words for it."
    return UpstreamError(
        scrub(message)[:_MESSAGE_CHARACTERS],
        status=status if 400 <= status <= 599 else 502,
        retry_after=_header(retry_after),
        type=_word(body.get("type"), scrub),
        code=_word(body.get("code"), scrub),
        param=_word(body.get("param"), scrub),
    )


def late(target: Target) -> UpstreamError:
    """The error for a provider that did not answer in time."""
    message = f"The provider of {target.model} gave no answer within {target.timeout:g} s."
    return UpstreamError(message, status=504, type="timeout_error", code="upstream_timeout")


def _count(value: Any) -> int:
    """A count of tokens; what is none, or absurd, is 0 or the most that is taken."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return min(value, MOST_TOKENS) if isinstance(value, int) and value > 0 else 0


def _counted(usage: Usage) -> Usage | None:
    """None for a usage of nothing: providers that do not count send one too."""
    return usage if usage.input or usage.output else None


def _word(value: Any, scrub: Scrubber) -> str | None:
    return scrub(str(value))[:128] if isinstance(value, str | int) else None


def _header(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\x20-\x7e]{1,64}", value) else None
