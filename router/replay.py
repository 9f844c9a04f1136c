"""The same traffic under other policies: what it would have cost, and which requests would have gone elsewhere.

Each request is decided again by :func:`router.decision.decide`, from what its row says it was decided on; where that takes a
prediction, it is the recorded one, if it is of the bundle in question, else that of the captured prompt, else the
request stays where it was. Nothing is sent. What a target would have answered is not known: tokens are those that were used.

Cached tokens. A request that goes where it went, after a request of its session that did so too, keeps what its provider counted.
Any other reads from a cache what its new target was last sent in the session, if that is no longer ago than the policy's
``sessions.idle_seconds``, and no more of it than could be read where it was: what was read there, or where the
session had just come there, the context that it had before. The rest of what was read or written is written anew.

Failures and second chances. A request that is decided as it was keeps all that happened to it, fallbacks and
escalations with what these cost; one that goes elsewhere is taken to be answered there at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from router.accounting import check_priced, prices_of
from router.bundle import Manifest, read_manifest
from router.capability import KnownNeeds
from router.content import KnownContent
from router.decision import Decision, RequestFacts, decide, needs_prediction
from router.entry import NANO
from router.errors import PolicyError, RequestError, UsageError
from router.gateway import bound
from router.history import Past
from router.policy import Policy, parse_policy, placed
from router.predictor import Prediction, Predictor
from router.sessions import Session, SessionRule, SessionStore, requested
from router.upstream import Usage

# How the report groups, and the field that each group is; of the last three, a policy has its own.
GROUPS: Mapping[str, str] = {
    "mode": "mode",
    "feature": "feature",
    "key": "client",
    "session": "session",
    "tier": "tier",
    "target": "target",
    "model": "model",
    "reason": "reason",
}
DAY = "day"
BY = (*GROUPS, DAY)
_OWN = ("target", "model", "reason")
AS_IT_WAS = "as it was"


@dataclass(slots=True)
class Totals:
    """What some requests come to.

    Attributes
    ----------
    requests, tokens : int
        ``tokens``: input and output, as they were used.
    cached : int
        Of them, what is read from a cache.
    cost : int
        Nano-dollars.
    unpriced : int
        Requests whose cost is not known: they were at a target without prices, and stay.
    moved : int
        Requests that would have gone to another target.
    refused : int
        Requests that this policy cannot answer: it has no such model, or none that can take them. They cost nothing.
    """

    requests: int = 0
    tokens: int = 0
    cached: int = 0
    cost: int = 0
    unpriced: int = 0
    moved: int = 0
    refused: int = 0

    def add(self, past: Past, outcome: Outcome, *, moved: bool) -> None:
        self.requests += 1
        if outcome.refused:
            self.refused += 1
            return
        self.tokens += past.tokens
        self.cached += outcome.usage.cached
        self.moved += moved
        if outcome.cost is None:
            self.unpriced += 1
        else:
            self.cost += outcome.cost

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "cached_read_tokens": self.cached,
            "cost_nano_usd": self.cost,
            "cost_usd": self.cost / NANO,
            "unpriced_requests": self.unpriced,
            "moved_requests": self.moved,
            "refused_requests": self.refused,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a request went, or would go, and what it cost there; ``target`` is None where it cannot be answered."""

    target: str | None
    model: str | None
    tier: str | None
    reason: str | None
    usage: Usage
    cost: int | None
    refused: bool = False

    def group(self, by: str, past: Past) -> str:
        if by == DAY:
            return datetime.fromtimestamp(past.time / 1e6, UTC).date().isoformat()
        name = GROUPS[by]
        return getattr(self if by in _OWN else past, name) or ""


@dataclass(slots=True)
class Moves:
    """Requests that would have gone from one target to another; costs in nano-dollars."""

    requests: int = 0
    before: int = 0
    after: int = 0


@dataclass(slots=True)
class Predictions:
    """Of the requests that a policy predicts: how many by what was recorded, by the captured prompt, and not at all."""

    recorded: int = 0
    again: int = 0
    left: int = 0


@dataclass(slots=True)
class Column:
    """One policy's figures, or those of what happened.

    Attributes
    ----------
    name : str
    version : str or None
        The policy's.
    bundle : str or None
        That it predicts with.
    total : Totals
    groups : dict of str to Totals
        The empty string is for requests without a value.
    moves : dict of (str, str) to Moves
        By the targets from which and to which.
    predictions : Predictions
    """

    name: str
    version: str | None = None
    bundle: str | None = None
    tier: str | None = None
    total: Totals = field(default_factory=Totals)
    groups: dict[str, Totals] = field(default_factory=dict)
    moves: dict[tuple[str, str], Moves] = field(default_factory=dict)
    predictions: Predictions = field(default_factory=Predictions)


class Bundle:
    """The bundle that policies are bound to: what it says of itself, and once it is asked for, its predictions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._predictor: Predictor | None = None

    def predict(self, past: Past) -> Prediction:
        """By the captured prompt, of which only the redacted text was kept."""
        from router.basis import prompt_of
        from router.predictor import load_predictor

        if self._predictor is None:
            self._predictor = load_predictor(self.folder)
        assert past.prompt is not None
        return self._predictor.predict([prompt_of(past.prompt, past.state)])


def read_policy(file: Path, bundle: Bundle | None, threshold: float | None = None) -> Policy:
    """A policy to replay traffic by, bound to its bundle.

    Parameters
    ----------
    file : Path
    bundle : Bundle or None
        None where the policy predicts nothing.
    threshold : float or None
        In the place of those that its tiers predict by; a mode's own bar stays.

    Raises
    ------
    UsageError, PolicyError
        It is not there or not valid, does not fit the bundle, or has a target without prices.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: no policy can be read there ({error.strerror})") from None
    policy = parse_policy(content, file)
    try:
        check_priced(policy)
    except PolicyError as error:
        raise PolicyError(placed(error.problems, content, file)[0]) from None
    if threshold is not None:
        tiers = {
            name: tier
            if tier.predict is None
            else tier.model_copy(
                update={"predict": tier.predict.model_copy(update={"threshold": threshold, "quality": None})}
            )
            for name, tier in policy.tiers.items()
        }
        policy = policy.model_copy(update={"tiers": tiers})
    if bundle is None:
        return policy
    try:
        return bound(policy, bundle.manifest)
    except PolicyError as error:
        raise PolicyError(placed(error.problems, content, file)[0]) from None


class Scenario:
    """One policy, and the sessions as it would have left them.

    Parameters
    ----------
    name : str
        For people: the file, or the tier.
    policy : Policy
        Of :func:`read_policy`.
    version : str
    bundle : Bundle or None
    tier : str or None
        What every request asks for in the place of what it did, but those that name a target.
    """

    def __init__(
        self, name: str, policy: Policy, version: str, bundle: Bundle | None, tier: str | None = None
    ) -> None:
        if tier is not None:
            address = policy.find(tier)
            if address is None or address.tier is None:
                raise UsageError(
                    f"--tier: there is no tier {tier[:64]!r}; there are: {', '.join(policy.tiers)}"
                )
        self.column = Column(name, version, bundle.manifest.id if bundle else None, tier)
        self.policy = policy
        self._bundle = bundle
        self._tier = tier
        self._sessions = SessionStore()
        self._prices = {
            name: prices for name, one in policy.targets.items() if (prices := prices_of(one)) is not None
        }
        self._by_model = {target.model: name for name, target in reversed(list(policy.targets.items()))}
        self._by_value = any(
            tier.predict is not None and tier.predict.quality_per_dollar is not None
            for tier in policy.tiers.values()
        )

    def outcome(self, past: Past, was: Session | None) -> Outcome:
        """Where a request goes by this policy, and what it costs there; ``was`` is the session as it was before it."""
        now = past.time / 1e6
        before = None if past.session is None else self._sessions.get(past.session, now)
        real = self._name(past.target, past.model)
        score = past.score
        try:
            decision = self._decide(past, before, now)
        except RequestError:
            return Outcome(None, None, None, None, past.usage, 0, refused=True)
        if decision is None:
            target, tier, reason = real, past.tier, past.reason
        else:
            target, tier, reason, score = decision.target, decision.tier, decision.reason, decision.score
        decided = past.basis.decided
        as_decided = decision is None or target == (real if decided is None else self._name(decided, None))
        if as_decided and past.target is not None:
            target, reason = real, past.reason
        if target is None:  # left where it was, and this policy has no such target
            return Outcome(past.target, past.model, tier, reason, past.usage, past.cost)
        usage = self._usage(past, target, target == real, before, was)
        cost = self._prices[target].cost(usage) + (past.earlier_cost if as_decided else 0)
        if past.session is not None and (past.status is None or past.status < 400):
            mode = past.mode if decision is None else decision.mode
            after = session_after(before, target, past, now, self.policy.sessions, score, mode)
            self._sessions.put(past.session, after)
        shown = past.target if target == real and past.target is not None else target
        return Outcome(shown, self.policy.targets[target].model, tier, reason, usage, cost)

    def _decide(self, past: Past, before: Session | None, now: float) -> Decision | None:
        """The decision; None where it takes a prediction, and there is none."""
        basis, predictions = past.basis, self.column.predictions
        asked = basis.asked
        if self._tier is not None and ((address := self.policy.find(asked)) is None or address.tier):
            asked = self._tier
        content = basis.content
        if not content.needs.tokens:
            needs = KnownNeeds(content.needs.features, content.needs.answer, past.usage.input)
            content = KnownContent(needs, content.results)
        facts = RequestFacts(asked, past.mode, basis.threshold, content, before, now)
        if (prediction := self._recorded(past)) is not None:
            decision = decide(facts, self.policy, prediction)
            predictions.recorded += decision.prediction is not None
            return decision
        if not needs_prediction(facts, self.policy):
            return decide(facts, self.policy)
        if past.prompt is None or self._bundle is None:
            predictions.left += 1
            return None
        predictions.again += 1
        return decide(facts, self.policy, self._bundle.predict(past))

    def _recorded(self, past: Past) -> Prediction | None:
        """What this scenario's bundle said of the request when it came."""
        if past.score is None or self._bundle is None:
            return None
        manifest = self._bundle.manifest
        if past.bundle not in (None, manifest.id):
            return None
        prediction = past.basis.prediction(manifest.targets, past.score)
        if prediction is not None and self._by_value and math.isnan(prediction.quality[0, 0]):
            return None
        return prediction

    def _usage(
        self, past: Past, target: str, stays: bool, before: Session | None, was: Session | None
    ) -> Usage:
        """The tokens of the request, with what of them its target has in its cache; the module says by which rule."""
        usage = past.usage
        if past.session is None and past.target is None:
            return usage
        at = None if before is None else before.incumbent
        really_at = None if was is None else was.incumbent
        if stays and (really_at is None or at == self._name(really_at, None)):
            return usage
        touched = min(usage.cached + usage.cache_write, usage.input)
        readable = usage.cached
        if was is not None and past.target is not None and really_at != past.target:
            readable = min(was.context, usage.input) if was.continued_by(_context(past)) else 0
        now = past.time / 1e6
        held = 0 if before is None else before.cached(target, now, self.policy.sessions)
        read = min(readable, held)
        return Usage(usage.input, usage.output, read, max(touched - read, 0))

    def _name(self, target: str | None, model: str | None) -> str | None:
        """The policy's target that a recorded one is: by its name, else by its model."""
        if target is None or target in self.policy.targets:
            return target
        return self._by_model.get(model or "")


def session_after(
    before: Session | None,
    target: str,
    past: Past,
    now: float,
    rule: SessionRule,
    score: float | None,
    mode: str | None,
) -> Session:
    """A session after one of its requests, as a server remembers it."""
    after = requested(
        before,
        target,
        context=_context(past),
        now=now,
        rule=rule,
        gain=score,
        mode=mode,
    )
    if before is None or after.requests != before.requests:
        after = after.answered(past.usage.output)
    return after


def _context(past: Past) -> int:
    return past.basis.content.needs.tokens or past.usage.input


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay.

    Attributes
    ----------
    by : str
    before : Column
        What happened; of traffic that was never sent, the first of the policies.
    columns : tuple of Column
        The policies, in their order.
    sent : bool
        Whether the traffic was.
    unused : int
        Requests that no target answered, and that used no tokens: they are left out.
    """

    by: str
    before: Column
    columns: tuple[Column, ...]
    sent: bool
    unused: int

    @property
    def compared(self) -> tuple[Column, ...]:
        """Those that are held against ``before``."""
        return self.columns if self.sent else self.columns[1:]

    def lines(self) -> Iterator[str]:
        """What each policy would have changed, in words."""
        if not self.before.total.requests:
            yield "No requests to replay."
            return
        if not self.sent:
            from router.spend import count, dollars

            total = self.before.total
            yield f"{self.before.name}: {dollars(total.cost)} for {count(total.requests)} requests."
        for column in self.compared:
            yield _sentence(self.before.total, column)

    def ranked(self) -> list[str]:
        """The groups, dearest first."""
        names = {name for column in (self.before, *self.columns) for name in column.groups}

        def dearest(name: str) -> tuple[int, str]:
            costs = [
                column.groups[name].cost for column in (self.before, *self.columns) if name in column.groups
            ]
            return -max(costs), name

        return sorted(names, key=dearest)

    def as_json(self) -> dict[str, Any]:
        """For a program: integers in nano-dollars, beside them dollars."""
        cost = self.before.total.cost
        return {
            "by": self.by,
            "summary": list(self.lines()),
            "sent": self.sent,
            "unused_requests": self.unused,
            "before": self._column(self.before, cost),
            "policies": [self._column(column, cost) for column in self.columns],
        }

    def _column(self, column: Column, cost: int) -> dict[str, Any]:
        moves = sorted(column.moves.items(), key=lambda move: (-move[1].requests, move[0]))
        return {
            "name": column.name,
            "version": column.version,
            "bundle": column.bundle,
            "tier": column.tier,
            "difference_nano_usd": column.total.cost - cost,
            "difference_usd": (column.total.cost - cost) / NANO,
            "ratio": column.total.cost / cost if cost else None,
            "predictions": {
                "recorded": column.predictions.recorded,
                "again": column.predictions.again,
                "left": column.predictions.left,
            },
            "total": column.total.as_json(),
            "groups": [
                {self.by: name or None, **column.groups[name].as_json()}
                for name in self.ranked()
                if name in column.groups
            ],
            "moves": [
                {
                    "from": start,
                    "to": end,
                    "requests": move.requests,
                    "cost_before_usd": move.before / NANO,
                    "cost_after_usd": move.after / NANO,
                }
                for (start, end), move in moves
            ],
        }


def replay(
    history: Iterable[Past], scenarios: Sequence[Scenario], by: str = "mode", moved: IO[str] | None = None
) -> Replay:
    """Decide each request again by each scenario, and add up; keeps no request.

    Parameters
    ----------
    history : iterable of Past
        In the order of their time.
    scenarios : sequence of Scenario
        At least one.
    by : str
        One of :data:`BY`.
    moved : text file or None
        A line of JSON is written to it for each request and scenario that would have gone elsewhere.

    Raises
    ------
    UsageError
        There is no such group.
    """
    check_group(by)
    real = Column(AS_IT_WAS)
    sessions, rule = SessionStore(), SessionRule()
    sent = True
    unused = 0
    for past in history:
        if not past.tokens:
            unused += 1
            continue
        sent = past.target is not None
        now = past.time / 1e6
        was = None if past.session is None or not sent else sessions.get(past.session, now)
        happened = Outcome(past.target, past.model, past.tier, past.reason, past.usage, past.cost)
        outcomes = [scenario.outcome(past, was) for scenario in scenarios]
        if sent:
            _add(real, by, past, happened, moved=False)
            if past.session is not None and (past.status is None or past.status < 400):
                assert past.target is not None
                after = session_after(was, past.target, past, now, rule, past.score, past.mode)
                sessions.put(past.session, after)
        before = happened if sent else outcomes[0]
        for scenario, outcome in zip(scenarios, outcomes, strict=True):
            moves = not outcome.refused and not before.refused and outcome.target != before.target
            _add(scenario.column, by, past, outcome, moved=moves)
            if moves:
                _count(scenario.column, before, outcome)
                if moved is not None:
                    moved.write(_line(scenario.column.name, past, before, outcome))
    columns = tuple(scenario.column for scenario in scenarios)
    return Replay(by, real if sent else columns[0], columns, sent, unused)


def check_group(by: str) -> None:
    """Raise :class:`UsageError` where there is no such group."""
    if by not in BY:
        raise UsageError(f"--by: there is no group {by[:64]!r}; there are: {', '.join(BY)}")


def _add(column: Column, by: str, past: Past, outcome: Outcome, *, moved: bool) -> None:
    name = outcome.group(by, past)
    group = column.groups.get(name)
    if group is None:
        group = column.groups[name] = Totals()
    group.add(past, outcome, moved=moved)
    column.total.add(past, outcome, moved=moved)


def _count(column: Column, before: Outcome, outcome: Outcome) -> None:
    key = (before.target or "", outcome.target or "")
    move = column.moves.get(key)
    if move is None:
        move = column.moves[key] = Moves()
    move.requests += 1
    move.before += before.cost or 0
    move.after += outcome.cost or 0


def _line(name: str, past: Past, before: Outcome, outcome: Outcome) -> str:
    row = {
        "policy": name,
        "id": past.id,
        "request": past.request,
        "time": datetime.fromtimestamp(past.time / 1e6, UTC).isoformat(),
        "session": past.session,
        "mode": past.mode,
        "feature": past.feature,
        "from": before.target,
        "to": outcome.target,
        "reason_before": before.reason,
        "reason": outcome.reason,
        "cost_before_nano_usd": before.cost,
        "cost_nano_usd": outcome.cost,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sentence(before: Totals, column: Column) -> str:
    from router.spend import count, dollars, percent

    total, cost = column.total, column.total.cost
    difference = cost - before.cost
    forced = f"Forcing this traffic onto {column.name} would have cost"
    said = f"With {column.name} this traffic would have cost" if column.tier is None else forced
    if not difference:
        said += f" the same: {dollars(cost)}"
    elif difference > 0:
        ratio = f" ({cost / before.cost:.3g} times as much)" if before.cost else ""
        said += f" {dollars(difference)} more: {dollars(cost)} instead of {dollars(before.cost)}{ratio}"
    else:
        share = f" ({percent(-difference / before.cost)} less)"
        said += f" {dollars(-difference)} less: {dollars(cost)} instead of {dollars(before.cost)}{share}"
    said += f"; {count(total.moved)} of {count(total.requests)} requests would have gone elsewhere"
    if total.refused:
        said += f", and {count(total.refused)} would have been refused (they cost nothing)"
    return said + "."


def table(found: Replay, limit: int = 20) -> Any:
    """Dollars by group as a rich table: what happened beside each policy."""
    from rich.table import Table
    from rich.text import Text

    from router.spend import count, dollars

    columns = (found.before, *found.columns) if found.sent else found.columns
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column(found.by, overflow="fold")
    view.add_column("requests", justify="right", no_wrap=True)
    for column in columns:
        view.add_column(column.name, justify="right")
    names = found.ranked()
    shown = names[:limit] if limit else names

    def add(title: Text, group: list[Totals], style: str = "") -> None:
        cells = [dollars(one.cost) for one in group]
        view.add_row(title, count(max(one.requests for one in group)), *cells, style=style)

    for name in shown:
        group = [column.groups.get(name) or Totals() for column in columns]
        add(Text(name) if name else Text("(none)", "italic"), group)
    if len(names) > len(shown):
        view.add_row(Text(f"({len(names) - len(shown):,} more)", "italic"))
    add(Text("all"), [column.total for column in columns], "bold")
    first = columns[0].total.cost
    if first and len(columns) > 1:
        view.add_row(Text("times as much"), "", *(f"{column.total.cost / first:.2f}" for column in columns))
    return view


def moves_table(found: Replay, limit: int = 10) -> Any:
    """From where to where requests would have moved, as a rich table; None where none would."""
    from rich.table import Table

    from router.spend import count, dollars

    moves = [
        (column.name, start, end, move)
        for column in found.compared
        for (start, end), move in sorted(column.moves.items(), key=lambda one: (-one[1].requests, one[0]))
    ]
    if not moves:
        return None
    view = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("by", "from", "to"):
        view.add_column(title, overflow="fold")
    for title in ("requests", "cost", "would cost"):
        view.add_column(title, justify="right", no_wrap=True)
    for name, start, end, move in moves[:limit]:
        view.add_row(name, start, end, count(move.requests), dollars(move.before), dollars(move.after))
    if len(moves) > limit:
        view.add_row(f"({len(moves) - limit:,} more)")
    return view


def notes(found: Replay) -> Iterator[str]:
    """What must be known to read the figures."""
    from router.spend import count

    yield "tokens are those that were used: another model would have answered with others"
    for column in found.columns:
        said = column.predictions
        if said.recorded or said.again or said.left:
            yield (
                f"{column.name}: predicted by what was recorded {count(said.recorded)}, by the captured prompt "
                f"{count(said.again)}, and not at all (left where they were) {count(said.left)}"
            )
        if column.total.unpriced:
            yield f"{column.name}: {count(column.total.unpriced)} requests without a price: not in the dollars"
    if found.unused:
        yield f"{count(found.unused)} requests that no target answered are left out"
