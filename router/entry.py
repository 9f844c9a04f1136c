"""What the ledger keeps of a request, and what it cost in whole nano-dollars.

A billionth of a dollar is small enough to count single tokens and, as an integer, adds up to the same sum in any order.
"""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from router.policy import Prices
from router.upstream import MOST_TOKENS, Usage

NANO = 1_000_000_000
_PER_MILLION = 1_000_000

# What providers and clients send is stored, so it is bounded: a count that no request can have, and a name nobody reads.
# Close to a million rows of the highest cost still fit the database's 64-bit sums.
MOST_NANO = 10**13  # $ 10,000
LONGEST_TEXT = 256
_HIGHEST = 1 << 62


@dataclass(frozen=True, slots=True)
class NanoPrices:
    """Prices as whole nano-dollars per million tokens: $ 0.075 per million is 75,000,000."""

    input: int
    output: int
    cached_read: int
    cache_write: int

    @classmethod
    def of(cls, prices: Prices) -> NanoPrices:
        """The policy's prices; below a nano-dollar per million tokens they round half to even."""
        return cls(*(_nano(price) for price in (prices.input, prices.output, prices.read, prices.write)))

    def cost(self, usage: Usage) -> int:
        """Nano-dollars for a call: the exact sum over its tokens, rounded once, half to even."""
        plain = max(usage.input - usage.cached - usage.cache_write, 0)
        millionths = (
            plain * self.input
            + usage.cached * self.cached_read
            + usage.cache_write * self.cache_write
            + usage.output * self.output
        )
        whole, rest = divmod(millionths, _PER_MILLION)
        half = _PER_MILLION // 2
        return whole + (1 if rest > half or (rest == half and whole % 2) else 0)


def nano_dollars(prices: Prices, usage: Usage) -> int:
    """What a call costs, in nano-dollars.

    Each price is taken as the decimal number that the policy says, and all arithmetic is on integers; one call is
    rounded once, to the nearest nano-dollar, half to even.
    """
    return NanoPrices.of(prices).cost(usage)


def new_id() -> str:
    """A row's id: 32 hexadecimal digits that begin with the time, so that an index grows at its end."""
    return f"{time.time_ns() // 1000:014x}{secrets.token_hex(9)}"


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request, as the ledger keeps it; no text of its prompt.

    Attributes
    ----------
    id : str
        The row's own. A row that is written again, after a failure, is known by it and stays one.
    time : int
        When the request arrived: microseconds since 1970, UTC, by the wall clock. Where that clock jumps, rows stand at the
        time it showed; durations come from a monotonic clock and do not jump.
    request : str
        The id that the answer carried. Clients may choose it, so it is not unique.
    session, client : str or None
        The session, and the id of the client's key (never the key).
    tier, mode, feature, dialect, reason, score, threshold, bundle, policy
        The decision and what it was for; ``bundle`` and ``policy`` are the versions in force.
    target, model, provider : str or None
        Who answered; where nobody did, who was decided on.
    input_tokens, output_tokens : int
        As the provider counted them at the target that answered.
    cached_read_tokens, cache_write_tokens : int
        Parts of ``input_tokens``.
    reasoning_tokens : int
        Part of ``output_tokens``.
    usage_estimated : bool
        The provider sent no usage: the tokens, and so the cost, are an estimate.
    prices : NanoPrices or None
        The target's prices as they stood. None: it has none, and ``cost`` is None where tokens were used.
    cost : int or None
        Nano-dollars: ``prices.cost(usage) + earlier_cost``.
    earlier_tokens, earlier_cost : int
        What attempts before the one that answered were billed (an escalation, a fallback): input and output tokens
        together, and nano-dollars at the prices of the targets that were asked.
    strongest : str or None
        The target that would have answered if every request went to the strongest.
    strongest_cost : int or None
        An estimate, nano-dollars: the same tokens at that target's prices. It would have answered with others.
    latency_us, first_token_us, decision_us : int or None
        Durations in microseconds, by a monotonic clock.
    status : int
        The answer's HTTP status.
    error : str or None
        A short word for what went wrong; never a message, which could hold part of a prompt.
    streamed, cancelled : bool
        ``cancelled``: the client went away before its answer ended.
    fallbacks : int
        Targets that were asked before the one that answered.
    basis : str or None
        What it was decided on, as :meth:`router.basis.Basis.as_json` writes it.
    """

    id: str = field(default_factory=new_id)
    time: int = field(default_factory=now)
    request: str = ""
    session: str | None = None
    client: str | None = None
    tier: str | None = None
    mode: str | None = None
    feature: str | None = None
    dialect: str | None = None
    reason: str | None = None
    score: float | None = None
    threshold: float | None = None
    bundle: str | None = None
    policy: str | None = None
    target: str | None = None
    model: str | None = None
    provider: str | None = None
    input_tokens: int = 0
    cached_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    usage_estimated: bool = False
    prices: NanoPrices | None = None
    cost: int | None = 0
    earlier_tokens: int = 0
    earlier_cost: int = 0
    strongest: str | None = None
    strongest_cost: int | None = None
    latency_us: int | None = None
    first_token_us: int | None = None
    decision_us: int | None = None
    status: int = 200
    error: str | None = None
    streamed: bool = False
    cancelled: bool = False
    fallbacks: int = 0
    basis: str | None = None

    def row(self) -> dict[str, Any]:
        """Column → value, each one that any database takes.

        Text loses control characters, lone surrogates and what is beyond 256 characters; numbers are bounded; a score that
        is not finite becomes None. So a row cannot be refused, and one request cannot hold up the others of its batch.
        """
        prices = self.prices
        return {
            "id": self.id,
            "time": _bounded(self.time, _HIGHEST),
            "request": _clean(self.request) or "",
            "session": _clean(self.session),
            "client": _clean(self.client),
            "tier": _clean(self.tier),
            "mode": _clean(self.mode),
            "feature": _clean(self.feature),
            "dialect": _clean(self.dialect),
            "reason": _clean(self.reason),
            "score": _finite(self.score),
            "threshold": _finite(self.threshold),
            "bundle": _clean(self.bundle),
            "policy": _clean(self.policy),
            "target": _clean(self.target),
            "model": _clean(self.model),
            "provider": _clean(self.provider),
            "input_tokens": _bounded(self.input_tokens, MOST_TOKENS),
            "cached_read_tokens": _bounded(self.cached_read_tokens, MOST_TOKENS),
            "cache_write_tokens": _bounded(self.cache_write_tokens, MOST_TOKENS),
            "output_tokens": _bounded(self.output_tokens, MOST_TOKENS),
            "reasoning_tokens": _bounded(self.reasoning_tokens, MOST_TOKENS),
            "usage_estimated": bool(self.usage_estimated),
            "price_input": prices and _bounded(prices.input, _HIGHEST),
            "price_output": prices and _bounded(prices.output, _HIGHEST),
            "price_cached_read": prices and _bounded(prices.cached_read, _HIGHEST),
            "price_cache_write": prices and _bounded(prices.cache_write, _HIGHEST),
            "cost": _optional(self.cost, MOST_NANO),
            "earlier_tokens": _bounded(self.earlier_tokens, MOST_TOKENS),
            "earlier_cost": _bounded(self.earlier_cost, MOST_NANO),
            "strongest": _clean(self.strongest),
            "strongest_cost": _optional(self.strongest_cost, MOST_NANO),
            "latency_us": _optional(self.latency_us, _HIGHEST),
            "first_token_us": _optional(self.first_token_us, _HIGHEST),
            "decision_us": _optional(self.decision_us, _HIGHEST),
            "status": _bounded(self.status, 999),
            "error": _clean(self.error),
            "streamed": bool(self.streamed),
            "cancelled": bool(self.cancelled),
            "fallbacks": _bounded(self.fallbacks, 1000),
            "basis": self.basis,
        }


def _nano(price: float) -> int:
    # repr gives back the decimal that was written: .075 is 75,000,000 and not the nearest binary fraction.
    return int((Decimal(repr(price)) * NANO).to_integral_value(ROUND_HALF_EVEN))


def _clean(text: str | None) -> str | None:
    if text is None or (text.isprintable() and len(text) <= LONGEST_TEXT):
        return text
    return "".join(sign if sign.isprintable() else "�" for sign in text[:LONGEST_TEXT])


def _bounded(value: int, most: int) -> int:
    return min(max(int(value), 0), most)


def _optional(value: int | None, most: int) -> int | None:
    return None if value is None else _bounded(value, most)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
