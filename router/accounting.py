"""What the ledger keeps of a request that has ended: its row, made of the decision and of the calls that were paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from router.basis import Basis
from router.content import Content, KnownContent
from router.decision import Decision, RequestFacts
from router.entry import Entry, NanoPrices
from router.failover import Attempt
from router.pacing import Sample
from router.policy import Policy, Prices, Problem, Target, policy_error, printable
from router.upstream import Usage

FEATURE_HEADER = "x-router-feature"
_LONGEST_FEATURE = 64
_FREE = Prices(input=0, output=0)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended.

    Attributes
    ----------
    status : int
        Of its answer.
    error : str or None
        A short word for what went wrong.
    seconds, decision_seconds : float
        From its arrival to the end of its answer; of these the decision.
    first_seconds : float or None
        To the first event of a streamed answer.
    streamed, cancelled : bool
    """

    status: int
    error: str | None
    seconds: float
    decision_seconds: float
    first_seconds: float | None
    streamed: bool
    cancelled: bool


def entry_of(
    decision: Decision,
    attempts: Sequence[Attempt],
    facts: RequestFacts,
    ended: Ended,
    *,
    policy: Policy,
    time: int,
    request: str,
    dialect: str,
    versions: tuple[str, str | None],
    session: str | None,
    client: str | None,
    headers: Mapping[str, str],
    decided: str | None = None,
) -> Entry:
    """The row of a request.

    Parameters
    ----------
    decision : Decision
        As it came out: after a fallback, that of the target which answered.
    attempts : sequence of Attempt
        The calls of targets, in their order.
    facts : RequestFacts
        That it was decided on, with a content; its tokens are estimated where the provider did not count.
    ended : Ended
    policy : Policy
        That it was decided by, whose prices count.
    time : int
        When it arrived, microseconds since 1970.
    request, dialect, session, client
        As in :class:`router.entry.Entry`.
    versions : (str, str or None)
        The policy's and the bundle's.
    headers : mapping
        The request's, for the feature that it is tagged with.
    decided : str or None
        The target that was decided on, where another one answered.
    """
    content = facts.content
    assert content is not None
    paid = [attempt for attempt in attempts if _is_billed(attempt)]
    last = paid[-1] if paid else None
    usage, estimated = _usage(last, content)
    target = policy.targets[decision.target]
    prices = prices_of(target)
    earlier = [_cost(attempt, content, policy) for attempt in paid[:-1]]
    earlier_cost = sum(cost for _, cost in earlier)
    strongest, strongest_cost = _strongest(policy, usage)
    cost = 0 if last is None else None if prices is None else prices.cost(usage)
    return Entry(
        time=time,
        request=request,
        session=session,
        client=client,
        tier=decision.tier,
        mode=decision.mode,
        feature=feature_of(headers),
        dialect=dialect,
        reason=decision.reason,
        score=decision.score,
        threshold=decision.threshold,
        policy=versions[0],
        bundle=versions[1],
        target=decision.target,
        model=decision.model,
        provider=_provider(target),
        input_tokens=usage.input,
        cached_read_tokens=usage.cached,
        cache_write_tokens=usage.cache_write,
        output_tokens=usage.output,
        reasoning_tokens=usage.reasoning,
        usage_estimated=estimated,
        prices=prices,
        cost=None if cost is None else cost + earlier_cost,
        earlier_tokens=sum(tokens for tokens, _ in earlier),
        earlier_cost=earlier_cost,
        strongest=strongest,
        strongest_cost=strongest_cost,
        latency_us=_microseconds(ended.seconds),
        first_token_us=None if ended.first_seconds is None else _microseconds(ended.first_seconds),
        decision_us=_microseconds(ended.decision_seconds),
        status=ended.status,
        error=ended.error,
        streamed=ended.streamed,
        cancelled=ended.cancelled,
        basis=Basis.of(facts, decision, decided, counted=policy.sessions.enabled).as_json(),
        fallbacks=len({attempt.target for attempt in attempts} - {decision.target}),
    )


def check_priced(policy: Policy) -> None:
    """Raise :class:`PolicyError` where a target has no prices: in the ledger its requests would seem to cost nothing."""
    problems = [
        Problem(("targets", name, "prices"), "missing; the ledger counts what requests cost")
        for name, target in policy.targets.items()
        if prices_of(target) is None
    ]
    if problems:
        raise policy_error(problems)


def worst_case(target: Target, content: Content | KnownContent) -> int:
    """The most that a request should cost at a target, in nano-dollars: so much is held for it until it has ended.

    The estimated input at the dearest of the target's prices for input; and each answer as long as the client allows, or
    the target, where the client does not say :data:`router.capability.ANSWER_TOKENS` tokens.
    """
    prices = prices_of(target)
    if prices is None:
        return 0
    needs = content.needs
    room = needs.room if target.max_output_tokens is None else min(needs.room, target.max_output_tokens)
    tokens = needs.tokens
    written = tokens if prices.cache_write > prices.input else 0
    return prices.cost(Usage(input=tokens, output=room * needs.answers, cache_write=written))


def sample_of(entry: Entry, options: Sequence[tuple[str, float]], policy: Policy) -> Sample:
    """What a request that has ended would have cost at each of its decision's options, had it used the same tokens."""
    cost = entry.cost or 0
    names = [name for name, _ in options]
    if entry.target not in names or entry.fallbacks or entry.reason not in ("predicted", "budget"):
        return Sample(cost)
    usage = Usage(entry.input_tokens, entry.output_tokens, entry.cached_read_tokens, entry.cache_write_tokens)
    prices = [prices_of(policy.targets[name]) for name in names]
    costs = [0 if one is None else one.cost(usage) + entry.earlier_cost for one in prices]
    return Sample.of([loss for _, loss in options], costs)


def billed(attempts: Sequence[Attempt], content: Content | KnownContent, policy: Policy) -> int:
    """Nano-dollars that the calls which have ended were billed."""
    return sum(_cost(attempt, content, policy)[1] for attempt in attempts if _is_billed(attempt))


def _is_billed(attempt: Attempt) -> bool:
    # What began to answer, or was working on it when nobody waited any longer, is paid for.
    return attempt.outcome in ("ok", "gone", "late") or attempt.usage is not None or attempt.size > 0


def _usage(attempt: Attempt | None, content: Content | KnownContent) -> tuple[Usage, bool]:
    """What a call used, and whether that is an estimate."""
    if attempt is None:
        return Usage(0, 0), False
    if attempt.usage is not None:
        return attempt.usage, attempt.estimated
    return Usage(input=content.needs.tokens, output=math.ceil(attempt.size)), True


def _cost(attempt: Attempt, content: Content | KnownContent, policy: Policy) -> tuple[int, int]:
    """Tokens and nano-dollars of a call."""
    usage, _ = _usage(attempt, content)
    prices = prices_of(policy.targets[attempt.target])
    return usage.input + usage.output, 0 if prices is None else prices.cost(usage)


def _strongest(policy: Policy, usage: Usage) -> tuple[str | None, int | None]:
    """The dearest target for these tokens, and what they cost there."""
    costs = {
        name: prices.cost(usage)
        for name, target in policy.targets.items()
        if (prices := prices_of(target)) is not None and not target.echo
    }
    if not costs or not (usage.input or usage.output):
        return None, None
    name = max(costs, key=lambda one: costs[one])
    return name, costs[name]


def prices_of(target: Target) -> NanoPrices | None:
    prices = _FREE if target.echo else target.prices
    return None if prices is None else _nano_prices(prices)


# Asked of every target for every request; decimal arithmetic on prices that change with the policy only.
_nano_prices = lru_cache(maxsize=1024)(NanoPrices.of)


def _provider(target: Target) -> str:
    return "echo" if target.echo else target.model.partition("/")[0]


def feature_of(headers: Mapping[str, str]) -> str | None:
    """What a request is tagged with."""
    return printable(headers.get(FEATURE_HEADER, "").strip(), _LONGEST_FEATURE) or None


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
