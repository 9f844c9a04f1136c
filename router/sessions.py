"""What staying with a warm model is worth: sessions, and the rule that keeps a session's target or lets it go.

A provider that has a conversation's prefix in its cache reads it at a fraction of the price; another target has to read it all
anew. A decision for one request does not see that. Here it is weighed against what the candidate saves, or gains in
quality, over the requests that the session is expected to send still.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from router.conversation import text_of

if TYPE_CHECKING:  # a policy holds a SessionRule
    from router.policy import Prices

# The first of these that a request carries names its session.
SESSION_HEADERS = (
    "x-router-session",
    "x-session-id",
    "x-session-affinity",
    "x-claude-code-session-id",
    "x-kilocode-taskid",
)
_LONGEST_HEADER = 256
# Of each text that tells conversations apart, so much of its beginning and of its end is read.
_IDENTITY_CHARACTERS = 2_048

# A context below this share of the session's last one is another conversation: a title, a summary, a subagent.
_CONTINUES = 0.8
# So many of those in a row, and the conversation itself was cut short.
_ASIDES_IN_A_ROW = 3
_CACHES = 4  # targets a session remembers
FORGET_SECONDS = 3_600.0  # after so long without a request a session is forgotten

Why = Literal["first", "same", "unpriced", "other_context", "cold", "weighed"]
Seconds = Annotated[float, Field(gt=0, le=604_800)]
Count = Annotated[float, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0, le=1)]


class SessionRule(BaseModel):
    """When a session keeps its target although the decision for the request alone is another one.

    Attributes
    ----------
    enabled : bool
        False: each request is decided alone.
    idle_seconds : float
        How long a provider keeps a prefix that nobody reads.
    quality_dollars : float
        US dollars that a good answer in the place of a bad one is worth. What a failed step costs to do again.
    usual_gain : float
        The mean predicted gain over all requests of this deployment, to which one session's requests are compared.
    memory : float
        Over how many of its requests a session's share of hard ones is taken.
    trust : float
        How many requests that usual share is worth, in a session that begins.
    worth_staying : float
        The gain, judged with the session's other requests in mind, up to which a loss is allowed: a request below it
        may leave a dearer target as soon as that saves money.
    fewest_remaining, most_remaining : float
        Bounds of the requests that a session is expected to send still; between them, as many as it has sent.
    new_tokens, output_tokens : float
        What a request adds to the context and what its answer is long, in a session too young to tell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    idle_seconds: Seconds = 300
    quality_dollars: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    usual_gain: Annotated[float, Field(gt=0, lt=1)] = 0.25
    memory: Count = 10
    trust: Count = 6
    worth_staying: Share = 0.45
    fewest_remaining: Count = 6
    most_remaining: Count = 30
    new_tokens: Count = 1_500
    output_tokens: Count = 400


@dataclass(frozen=True, slots=True)
class Cache:
    """What a target's provider holds of a conversation: the tokens of the longest prefix sent, and when it was used."""

    target: str
    tokens: int
    at: float


@dataclass(frozen=True, slots=True)
class Session:
    """What is known of a session. No text of it is kept.

    Attributes
    ----------
    incumbent : str
        The target of its last request.
    at : float
        When that was, in monotonic seconds.
    mode : str or None
        The mode signal that it last had.
    first_context, context : int
        Tokens of its first request and of its last.
    output : int
        Tokens of its answers so far.
    requests, switches : int
        Requests so far, and how often the target was another one than before.
    hard_share, weight : float
        The share of its requests that want the dearer target, and how many requests that estimate rests on.
    asides : int
        Requests in a row that did not continue the conversation; they count nowhere else.
    caches : tuple of Cache
        The targets it used, latest last.
    """

    incumbent: str
    at: float
    mode: str | None = None
    first_context: int = 0
    context: int = 0
    output: int = 0
    requests: int = 0
    switches: int = 0
    hard_share: float = 0.0
    weight: float = 0.0
    asides: int = 0
    caches: tuple[Cache, ...] = ()

    @property
    def targets(self) -> frozenset[str]:
        """The targets that have answered in it, of the latest few."""
        return frozenset(cache.target for cache in self.caches)

    def continued_by(self, context: int) -> bool:
        """Whether a request of so many tokens goes on with the conversation, so that its prefix can be cached."""
        return context >= _CONTINUES * self.context

    def cached(self, target: str, now: float, rule: SessionRule) -> int:
        """Tokens of the prefix that the target's provider still holds."""
        for cache in self.caches:
            if cache.target == target and now - cache.at <= rule.idle_seconds:
                return cache.tokens
        return 0

    def answered(self, output: int) -> Session:
        """The session with an answer of so many tokens, once it is known."""
        return replace(self, output=self.output + max(output, 0))


@dataclass(frozen=True, slots=True)
class Weighing:
    """Whether to leave the incumbent, and what that rests on; amounts in US dollars.

    Attributes
    ----------
    leave : bool
    why : str
        ``first``: the session begins. ``same``: the candidate is the incumbent. ``unpriced``: there is no price to weigh
        by. ``other_context``: the request does not continue the conversation. ``cold``: the incumbent's cache is gone,
        nothing is lost by leaving. ``weighed``: by what follows, which is 0 elsewhere.
    leaving : float
        What this request costs more with the candidate than with the incumbent; below 0, less.
    saving : float
        What is saved on the expected remaining requests, because the candidate has the prefix then.
    gained : float
        What the candidate's quality on this request is worth more; below 0, less.
    remaining : float
        How many more requests are expected.
    """

    leave: bool
    why: Why
    leaving: float = 0.0
    saving: float = 0.0
    gained: float = 0.0
    remaining: float = 0.0

    def explained(self) -> str:
        """One line for people."""
        if self.why != "weighed":
            return _REASONS[self.why]
        verdict = "leaves its target" if self.leave else "keeps its target"
        return (
            f"the session {verdict}: leaving costs ${self.leaving:.4f} now, saves ${self.saving:.4f} over the "
            f"{self.remaining:.0f} requests still expected, gains quality worth ${self.gained:.4f}"
        )


_REASONS: Mapping[Why, str] = {
    "first": "the session begins: nothing is cached",
    "same": "the candidate is the session's target",
    "unpriced": "a target has no prices: each request is decided alone",
    "other_context": "the request does not continue the session's conversation: nothing of it is cached",
    "cold": "the cache of the session's target has expired: nothing is lost by leaving",
}


class SessionStore:
    """The latest sessions, in memory; for one event loop. An entry takes about 1 kB.

    Servers that share them have a :class:`router.shared_sessions.SharedSessions`.

    Parameters
    ----------
    most : int
        Sessions kept; beyond that the one that is longest unused goes.
    forget_seconds : float
        After so long without a request a session is forgotten.
    """

    def __init__(self, most: int = 10_000, forget_seconds: float = FORGET_SECONDS) -> None:
        if most < 1 or forget_seconds <= 0:
            raise ValueError("a session store needs room for one session and some time to keep it")
        self._most = most
        self._forget_seconds = forget_seconds
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def get(self, key: str, now: float) -> Session | None:
        """The session, or None where there is none or it was idle for too long; ``now`` in monotonic seconds."""
        session = self._sessions.get(key)
        if session is not None and now - session.at > self._forget_seconds:
            del self._sessions[key]
            return None
        return session

    def put(self, key: str, session: Session) -> None:
        self._sessions[key] = session
        self._sessions.move_to_end(key)
        if len(self._sessions) > self._most:
            self._sessions.popitem(last=False)

    def __len__(self) -> int:
        return len(self._sessions)


def session_key(headers: Mapping[str, str], body_identity: str, salt: str) -> str:
    """Which session a request belongs to.

    Parameters
    ----------
    headers : mapping
        The request's, by lower-case name (or a mapping that ignores case).
    body_identity : str
        :func:`conversation_identity` of its messages; counts where no header names a session.
    salt : str
        The id of the client's key: what one client sends can never name another's session.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    named: list[str] = ["conversation", body_identity]
    for header in SESSION_HEADERS:
        value = headers.get(header, "").strip()
        if value and len(value) <= _LONGEST_HEADER and value.isprintable():
            named = ["named", value]
            break
    return _hash([salt, *named])


def conversation_identity(messages: Iterable[Mapping[str, Any]]) -> str:
    """A hash of the system prompt and the first user message: the same for all requests of a conversation.

    Nothing after the first user message is looked at, and of long texts the two ends and the length.
    """
    parts: list[str] = []
    for message in messages:
        role = message.get("role")
        if role in ("system", "developer", "user"):
            text = text_of(message.get("content"))
            ends = text if len(text) <= 2 * _IDENTITY_CHARACTERS else ""
            ends = ends or text[:_IDENTITY_CHARACTERS] + text[-_IDENTITY_CHARACTERS:]
            parts += [str(role), str(len(text)), ends]
        if role == "user":
            break
    return _hash(parts)


def _hash(parts: Sequence[str]) -> str:
    # JSON keeps the parts apart, and escapes what cannot be encoded.
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def requested(
    session: Session | None,
    target: str,
    *,
    context: int,
    now: float,
    rule: SessionRule,
    gain: float | None = None,
    mode: str | None = None,
) -> Session:
    """The session after a request that went to ``target``.

    Parameters
    ----------
    session : Session or None
        Before it; None for the first.
    target : str
        Where it really went, after budget, capability and fallback.
    context : int
        Its tokens.
    now : float
        Monotonic seconds.
    gain : float or None
        The predicted gain of the dearest target over the cheapest, where there was a prediction.
    mode : str or None
        Its mode signal.
    """
    cache = Cache(target, context, now)
    if session is None:
        share, weight = _share(rule.usual_gain, rule.trust, gain, rule)
        return Session(target, now, mode, context, context, 0, 1, 0, share, weight, 0, (cache,))
    if not session.continued_by(context):
        if session.asides + 1 < _ASIDES_IN_A_ROW:
            return replace(session, asides=session.asides + 1)
        # A summary took the place of the conversation: what was cached of it is of no use.
        return replace(
            session, incumbent=target, at=now, mode=mode, first_context=context, context=context, output=0,
            requests=1, switches=session.switches + (target != session.incumbent), asides=0, caches=(cache,),
        )  # fmt: skip
    share, weight = _share(session.hard_share, session.weight, gain, rule)
    others = tuple(one for one in session.caches if one.target != target)
    return replace(
        session, incumbent=target, at=now, mode=mode, context=context, requests=session.requests + 1,
        switches=session.switches + (target != session.incumbent), hard_share=share, weight=weight, asides=0,
        caches=(*others, cache)[-_CACHES:],
    )  # fmt: skip


def keep_or_switch(
    session: Session | None,
    candidate: str,
    *,
    incumbent_prices: Prices | None,
    candidate_prices: Prices | None,
    context: int,
    gain: float | None,
    rule: SessionRule,
    now: float,
) -> Weighing:
    """Whether a session's next request goes to the candidate, or stays with the incumbent.

    Parameters
    ----------
    session : Session or None
    candidate : str
        The target that the decision for this request alone gives.
    incumbent_prices, candidate_prices : Prices or None
    context : int
        Tokens of the request.
    gain : float or None
        Expected quality of the candidate less that of the incumbent, on this request. None: only dollars are weighed, so
        that a dearer candidate never wins. A client's explicit wish is no matter for this function.
    rule : SessionRule
    now : float
        Monotonic seconds.

    Notes
    -----
    Two targets with prefixes in their caches, between which each move costs what must be written anew, are a metrical task system
    (Borodin, Linial and Saks 1992). Their competitive rules, and ski rental's, wait until the regret has grown to the cost of a
    move. That guards against any future, and pays for the wait in each phase of a session. Here the future is estimated, from the
    session's own past alone, and the cheaper of two plans taken: this request to either target, and then the cheapest of
    staying with one, staying with the other, and deciding each request with both kept warm.

    The expected number of remaining requests is that of those sent (Gott 1993), within bounds. The share of hard ones, and
    this request's own gain, are the predictions corrected for the session: a calibrated prediction is so over all
    requests, and in an easy session too high. The correction is by the odds of the two shares, and the
    share the running mean of corrected gains, one step of expectation maximisation for each request
    (Saerens, Latinne and Decaestecker 2002).
    """
    if session is None:
        return Weighing(True, "first")
    if candidate == session.incumbent:
        return Weighing(False, "same")
    if incumbent_prices is None or candidate_prices is None:
        return Weighing(True, "unpriced")
    if not session.continued_by(context):
        return Weighing(True, "other_context")
    # A context may be shorter than what was cached by a little.
    incumbent_warm = min(session.cached(session.incumbent, now, rule), context)
    candidate_warm = min(session.cached(candidate, now, rule), context)

    sent = session.requests
    new = (session.context - session.first_context) / (sent - 1) if sent > 1 else rule.new_tokens
    output = session.output / sent if session.output else rule.output_tokens
    remaining = min(max(float(sent), rule.fewest_remaining), rule.most_remaining)
    incumbent, other = _Rates.of(incumbent_prices), _Rates.of(candidate_prices)
    leaving = other.request(context, candidate_warm, output) - incumbent.request(
        context, incumbent_warm, output
    )

    dearer = other.request(context, context, output) > incumbent.request(context, context, output)
    share, gained = 0.0, 0.0
    if gain is not None:
        of_dearer = gain if dearer else -gain
        share, _ = _share(session.hard_share, session.weight, of_dearer, rule)
        gained = rule.quality_dollars * _gained(gain, dearer, share, rule)
    # A dearer candidate whose quality nobody pays for is not for free with a cold cache either.
    if not incumbent_warm and (gained > 0 or not dearer):
        return Weighing(True, "cold")

    ahead = _Ahead(remaining, context + new * (remaining + 1) / 2, new, output, share * rule.quality_dollars)
    if dearer:
        stayed = ahead.cost(other, context - candidate_warm, incumbent, 0, share)
        left = ahead.cost(other, 0, incumbent, context - incumbent_warm, share)
    else:
        stayed = ahead.cost(incumbent, 0, other, context - candidate_warm, share)
        left = ahead.cost(incumbent, context - incumbent_warm, other, 0, share)
    saving = stayed - left
    return Weighing(saving + gained > leaving, "weighed", leaving, saving, gained, remaining)


@dataclass(frozen=True, slots=True)
class _Rates:
    """Dollars a token."""

    read: float
    write: float
    output: float

    @classmethod
    def of(cls, prices: Prices) -> _Rates:
        return cls(prices.read / 1e6, max(prices.read, prices.write) / 1e6, prices.output / 1e6)

    def request(self, context: float, warm: float, output: float) -> float:
        return self.read * warm + self.write * (context - warm) + self.output * output

    @property
    def premium(self) -> float:
        """What a token costs more once, to have it in the cache."""
        return self.write - self.read


@dataclass(frozen=True, slots=True)
class _Ahead:
    """The requests expected: how many, their mean context, what each adds and answers, what each loses at the cheaper target."""

    requests: float
    context: float
    new: float
    output: float
    loss: float

    def cost(
        self, dearer: _Rates, dearer_missing: float, cheaper: _Rates, cheaper_missing: float, share: float
    ) -> float:
        """Dollars of the cheapest plan, where so many tokens of the prefix are missing from the two caches.

        ``share`` of the requests go to the dearer target where each is decided by itself.
        """
        dear = dearer.request(self.context, self.context, self.output)
        cheap = cheaper.request(self.context, self.context, self.output)
        only_dearer = dearer.premium * dearer_missing + self.requests * (dear + dearer.premium * self.new)
        only_cheaper = cheaper.premium * cheaper_missing
        only_cheaper += self.requests * (cheap + cheaper.premium * self.new + self.loss)
        # Each token is written to both.
        both = dearer.premium * dearer_missing + cheaper.premium * cheaper_missing
        both += self.requests * (share * dear + (1 - share) * cheap)
        both += self.requests * (dearer.premium + cheaper.premium) * self.new
        return min(only_dearer, only_cheaper, both)


def _gained(gain: float, dearer: bool, share: float, rule: SessionRule) -> float:
    """Quality that the candidate gains on this request, judged with the session in mind; what may be lost counts for nothing."""
    if dearer:
        # Never below the prediction: a long easy past must not hide a hard step.
        return _corrected(gain, max(share, rule.usual_gain), rule)
    if gain > 0:
        return gain
    lost = _corrected(-gain, share, rule)
    return -lost if lost > rule.worth_staying else 0.0


def _share(share: float, weight: float, gain: float | None, rule: SessionRule) -> tuple[float, float]:
    """The running share of hard requests with one more, and its weight."""
    if gain is None:
        return share, weight
    weight = min(weight, rule.memory)
    share = (share * weight + _corrected(gain, share, rule)) / (weight + 1)
    return share, min(weight + 1, rule.memory)


def _corrected(gain: float, share: float, rule: SessionRule) -> float:
    """A gain as it would be predicted where this share of requests is hard, not the usual one."""
    odds = _odds(gain) * _odds(share) / _odds(rule.usual_gain)
    return odds / (1 + odds)


def _odds(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return share / (1 - share)
