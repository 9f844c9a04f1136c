"""Pure: (what is known of a request, the policy, a prediction) → which target, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from router.budgets import Pace
from router.capability import lacks
from router.content import Content, KnownContent
from router.errors import RequestError
from router.policy import PREDICT, STAY, Address, ModePrediction, Policy, Tier, Tokens, printable
from router.predictor import Prediction
from router.sessions import Session, keep_or_switch
from router.steps import matching_rule

Reason = Literal[
    "pinned",
    "signal",
    "step",
    "default",
    "sticky",
    "predicted",
    "unknown",
    "budget",
    "capability",
    "fallback",
    "escalated",
]
Trail = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a decision needs to know of a request.

    Attributes
    ----------
    model : str
        As the client wrote it.
    mode : str or None
        As a header or the body's metadata gave it; the suffix of ``model`` counts where this is None.
    threshold : float or None
        The client's own, where it may set one.
    content : Content, KnownContent or None
        The body, read where the policy asks for it; or what was read of it. Without it no step is seen, and every target is able.
    session : Session or None
        What is known of the session before this request.
    now : float
        Monotonic seconds.
    allowed : frozenset of str or None
        The targets that this client may use; None where it may use all.
    names : frozenset of str or None
        What this client may ask for by name; None where that is all.
    pace : Pace or None
        The threshold below which a request's must not be, so that a budget lasts.
    at_limit : str or None
        Why only the cheapest target is left: a budget has no room for another.
    """

    model: str = "auto"
    mode: str | None = None
    threshold: float | None = None
    content: Content | KnownContent | None = None
    session: Session | None = None
    now: float = 0.0
    allowed: frozenset[str] | None = None
    names: frozenset[str] | None = None
    pace: Pace | None = None
    at_limit: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Which target, and why.

    Attributes
    ----------
    target : str
        The policy's name of the target.
    model : str
        Its litellm id.
    reason : str
        ``pinned``: the client named the target. ``signal``: its mode is mapped to one. ``step``: by a rule for the tool
        result that the request ends in. ``default``: what the tier gives a request without a known mode. ``sticky``: the
        session stays where it is, in the middle of a step or because leaving a warm cache does not pay. ``predicted``: by
        the bundle. ``unknown``: the bundle flagged the prompt as unlike its training data, and the policy says where such
        prompts go. ``budget``: a cheaper target, since a budget has no room for another or has to last. ``capability``: the
        target that was chosen cannot take the request, this one above it can. Of what happened after the decision:
        ``fallback``: the target that was decided on did not answer, this one did. ``escalated``: its answer was none, and
        this one was asked once more.
    tier, mode : str or None
        The tier that decided (none where pinned), and the mode that the client gave, even an unknown one.
    score, threshold : float or None
        Where predicted: the gain of the best target over the cheapest, and the loss of quality allowed; no threshold
        where the tier weighs quality against dollars.
    novelty : float or None
        Where predicted by a bundle that measures it: how unlike its training data the prompt is; over 1 is flagged.
    unfamiliar : bool or None
        Whether it is flagged; None where nothing was predicted.
    unknown_mode : bool
        The client gave a mode that the tier does not list.
    trail : tuple of (str, str)
        Each stage that had a say, in order, and what came of it.
    prediction : Prediction or None
        Where predicted, what by.
    """

    target: str
    model: str
    reason: str
    tier: str | None = None
    mode: str | None = None
    score: float | None = None
    threshold: float | None = None
    novelty: float | None = None
    unfamiliar: bool | None = None
    unknown_mode: bool = False
    budget: Literal["paced", "crossed", "held"] | None = None
    options: tuple[tuple[str, float], ...] = ()
    trail: Trail = ()
    prediction: Prediction | None = field(default=None, compare=False, repr=False)


def needs_prediction(facts: RequestFacts, policy: Policy) -> bool:
    """Whether :func:`decide` wants a prediction for this request."""
    return _looked_up(_Case(facts, policy)) is None


def decide(facts: RequestFacts, policy: Policy, prediction: Prediction | None = None) -> Decision:
    """Choose the target. The order is the body of this function and of :func:`_looked_up`.

    Parameters
    ----------
    facts : RequestFacts
    policy : Policy
        Bound to the bundle that predicted.
    prediction : Prediction or None
        Of one prompt; needed where :func:`needs_prediction` says so.

    Raises
    ------
    RequestError
        Status 404: ``model`` names nothing that the policy has. Status 400: no target that the request may go to can
        take it.
    """
    case = _Case(facts, policy)
    decision = _looked_up(case) or case.by_prediction(prediction)
    return case.able(case.affordable(decision))


def _looked_up(case: _Case) -> Decision | None:
    """What is decided without a prediction, by the first stage that knows; None where one is needed."""
    return (
        case.pinned()
        or case.by_mode()
        or case.by_step()
        or case.by_default()
        or case.stays()
        or case.out_of_budget()
    )


class _Case:
    """One request on its way through the stages. Each of them decides, or says nothing and leaves a note in the trail."""

    def __init__(self, facts: RequestFacts, policy: Policy) -> None:
        self.facts = facts
        self.policy = policy
        self.trail: list[tuple[str, str]] = []
        address = _address(facts, policy)
        self.target = address.target
        self.tier_name = address.tier or ""
        self.tier = policy.tiers[address.tier] if address.tier is not None else Tier()
        self.mode = facts.mode or address.mode
        self.unknown_mode = False
        self.asked = False  # by the mode or by a step rule: to predict, whatever the default is
        self.bar: float | None = None  # the mode's own threshold
        self.quality: float | None = None if self.tier.predict is None else self.tier.predict.quality
        self.by_rule = False  # a step rule wants a prediction, and not the incumbent

    def pinned(self) -> Decision | None:
        asked = printable(self.facts.model)
        if self.target is None:
            self._note("model", f"{asked} is tier {self.tier_name}")
            return None
        self._note("model", f"{asked} is target {self.target}")
        return Decision(
            self.target, self.policy.targets[self.target].model, "pinned", trail=tuple(self.trail)
        )

    def by_mode(self) -> Decision | None:
        mode, tier = self.mode, self.tier
        if mode is None:
            self._note("mode", "none given")
            return None
        choice = tier.modes.get(mode)
        if choice is None:
            self.unknown_mode = True
            self.asked = tier.unknown_mode == PREDICT
            self._note("mode", f"{mode} is unknown to the tier: {tier.unknown_mode}")
            return None
        if isinstance(choice, ModePrediction):
            self.asked, self.bar = True, choice.predict.threshold
            self.quality = choice.predict.quality
            self._note("mode", f"{mode}: predict, with a threshold of its own")
            return None
        if choice == PREDICT:
            self.asked = True
            self._note("mode", f"{mode}: predict")
            return None
        self._note("mode", f"{mode}: {choice}")
        return self._decision(choice, "signal")

    def by_step(self) -> Decision | None:
        rules = (*self.tier.steps, *self.policy.steps)
        content = self.facts.content
        if not rules or content is None:
            return None
        if not content.results:
            self._note("step", "ends in no tool result")
            return None
        rule = matching_rule(rules, content.results)
        if rule is None:
            self._note("step", f"ends in {self._read()}: no rule matches")
            return None
        index = rules.index(rule)
        own = len(self.tier.steps)
        place = f"tiers.{self.tier_name}.steps.{index}" if index < own else f"steps.{index - own}"
        said = f"ends in {self._read()}: {place} says {rule.to}"
        if rule.to == PREDICT:
            self.by_rule = self.tier.predict is not None
            self.asked = self.asked or self.by_rule
            self._note("step", said if self.by_rule else f"{said}, which this tier does not do")
            return None
        if rule.to == STAY:
            incumbent = self._incumbent()
            self._note("step", said if incumbent else f"{said}, but the session has no target yet")
            return None if incumbent is None else self._decision(incumbent, "step")
        self._note("step", said)
        return self._decision(rule.to, "step")

    def by_default(self) -> Decision | None:
        if self.asked or self.tier.default == PREDICT:
            return None
        self._note("default", self.tier.default)
        return self._decision(self.tier.default, "default")

    def stays(self) -> Decision | None:
        """In the middle of a step the ask is the same one: a bundle that was not trained on steps would only repeat itself."""
        predict, content = self.tier.predict, self.facts.content
        if self.by_rule or content is None or predict is None or predict.tool_results == PREDICT:
            return None
        if self.facts.session is None or not content.results:
            return None
        if self.mode != self.facts.session.mode:
            self._note("stay", "no: the mode has changed")
            return None
        incumbent = self._incumbent()
        if incumbent is None:
            self._note("stay", "no: the session's target is not one of this tier's")
            return None
        self._note("stay", f"ends in {self._read()}: stays at {incumbent}")
        return self._decision(incumbent, "sticky")

    def out_of_budget(self) -> Decision | None:
        """Nothing is predicted where only the cheapest target is left."""
        if self.facts.at_limit is None or self.tier.predict is None:
            return None
        return self._decision(self.tier.predict.named()[0], "budget")

    def by_prediction(self, prediction: Prediction | None) -> Decision:
        return self.weighed(self.paced(self.predicted(prediction), prediction), prediction)

    def predicted(self, prediction: Prediction | None) -> Decision:
        """By the prediction, or where the policy sends what it flags.

        A score says nothing of a prompt unlike any it was fitted on; a client's own threshold decides by threshold.
        """
        predict = self.tier.predict
        if prediction is None or predict is None:
            raise ValueError("this request needs a prediction")
        names = [predict.targets[name] for name in prediction.targets]
        own = self.bar if self.facts.threshold is None else self.facts.threshold
        threshold = predict.threshold if own is None else own
        score = float(prediction.score[0])
        novelty = None if prediction.novelty is None else float(prediction.novelty[0])
        flagged = bool(prediction.unfamiliar[0])
        reason: Reason = "predicted"
        if flagged and predict.unknown != PREDICT:
            target, reason = predict.unknown, "unknown"
            why = f"novelty {novelty:.4g} is over 1: unlike the training data"
            threshold = None if predict.quality_per_dollar is not None and own is None else threshold
        elif predict.quality_per_dollar is not None and own is None:
            assert predict.tokens is not None
            costs = self.policy.costs(names, predict.tokens)
            target = names[int(prediction.choose_by_value(costs, predict.quality_per_dollar)[0])]
            why = f"best quality less {predict.quality_per_dollar:g} times its dollars; score {score:.4g}"
            threshold = None
        else:
            assert threshold is not None
            target = names[int(prediction.choose(threshold)[0])]
            why = f"score {score:.4g} {'is over' if score > threshold else 'is not over'} threshold {threshold:.4g}"
        self._note("prediction", f"{why}: {target}")
        return replace(
            self._decision(target, reason),
            score=score,
            threshold=threshold,
            novelty=novelty,
            unfamiliar=flagged,
            prediction=prediction,
        )

    def paced(self, decision: Decision, prediction: Prediction | None) -> Decision:
        """The decision, or a cheaper target so that a budget lasts.

        A client's own threshold is its explicit wish, and where what is flagged goes the policy says.
        """
        predict, budgets, pace = self.tier.predict, self.policy.budgets, self.facts.pace
        if prediction is None or predict is None or budgets is None or budgets.pacing is None:
            return decision
        if decision.reason != "predicted" or self.facts.threshold is not None:
            return decision
        names = [predict.targets[name] for name in prediction.targets]
        chosen = names.index(decision.target)
        held = self.quality is not None and budgets.pacing.bar == "hold"
        if not held:
            losses = prediction.score[0] - prediction.gain[0, : chosen + 1]
            decision = replace(
                decision, options=tuple(zip(names[: chosen + 1], map(float, losses), strict=True))
            )
        if pace is None or (decision.threshold is not None and pace.threshold <= decision.threshold):
            return decision
        index = min(chosen, int(prediction.choose(pace.threshold)[0]))
        bar = f"quality {self.quality:g} of the policy" if self.quality is not None else ""
        if held:
            if index < chosen:
                self._note("budget", f"{pace.why}: {names[index]} would do, but {bar} is held")
                decision = replace(decision, budget="held")
            return decision
        self._note(
            "budget", f"{pace.why}: {names[index]}{f', across {bar}' if bar and index < chosen else ''}"
        )
        decision = replace(decision, threshold=pace.threshold)
        if index == chosen:
            return decision
        target = names[index]
        return replace(
            decision,
            target=target,
            model=self.policy.targets[target].model,
            reason="budget",
            budget="crossed" if bar else "paced",
        )

    def weighed(self, decision: Decision, prediction: Prediction | None) -> Decision:
        """The decision, or the session's target where leaving its warm cache costs more than it brings."""
        session, content, predict = self.facts.session, self.facts.content, self.tier.predict
        rule = self.policy.sessions
        if session is None or content is None or prediction is None or predict is None or not rule.enabled:
            return decision
        # A client's own threshold is its explicit wish, and what is flagged has no gain to weigh.
        if decision.reason not in ("predicted", "budget") or self.facts.threshold is not None:
            return decision
        incumbent = self._incumbent()
        if incumbent is None or incumbent == decision.target:
            return decision
        if self.mode != session.mode:
            self._note("session", "the mode has changed: its target may be left")
            return decision
        quality = {predict.targets[name]: prediction.gain[0, t] for t, name in enumerate(prediction.targets)}
        if incumbent not in quality:
            self._note("session", f"{incumbent} is none of those predicted")
            return decision
        targets = self.policy.targets
        weighing = keep_or_switch(
            session,
            decision.target,
            incumbent_prices=targets[incumbent].prices,
            candidate_prices=targets[decision.target].prices,
            context=content.needs.tokens,
            gain=float(quality[decision.target] - quality[incumbent]),
            rule=rule,
            now=self.facts.now,
        )
        self._note("session", weighing.explained())
        if weighing.leave:
            return decision
        model = targets[incumbent].model
        return replace(decision, target=incumbent, model=model, reason="sticky", options=())

    def affordable(self, decision: Decision) -> Decision:
        """The decision, or where a budget is at its limit the cheapest target that can take the request.

        Of a tier's request it is the cheapest of those that the tier leads to, of a pinned one of those that the client may
        ask for.
        """
        if self.facts.at_limit is None:
            return decision
        content, policy = self.facts.content, self.policy
        tokens = Tokens(input=0, output=1) if content is None else _tokens(content)
        cost = {
            name: 0.0 if target.prices is None else policy.costs([name], tokens)[0]
            for name, target in policy.targets.items()
            if name == decision.target
            or (
                self._may_use(name)
                and (content is None or lacks(target, content.needs) is None)
                and (
                    self.tier.leads_to(name)
                    if self.target is None
                    else self.facts.names is None or name in self.facts.names
                )
            )
        }
        cheapest = min(cost, key=lambda name: (cost[name], name != decision.target))
        self._note("budget", f"{self.facts.at_limit}: {cheapest}, the cheapest that can take it")
        trail = tuple(self.trail)
        if cheapest == decision.target:
            return replace(decision, trail=trail)
        return replace(
            decision, target=cheapest, model=policy.targets[cheapest].model, reason="budget", trail=trail
        )

    def able(self, decision: Decision) -> Decision:
        """The decision, or the next target up that can take the request. What a client pinned is its own affair."""
        content = self.facts.content
        if content is None or decision.reason == "pinned":
            return decision
        needs = content.needs
        lack = lacks(self.policy.targets[decision.target], needs)
        if lack is None:
            self._note("capability", f"{decision.target} can take it")
            return replace(decision, trail=tuple(self.trail))
        for name in self.policy.dearer(decision.target, _tokens(content)):
            if (
                self._may_use(name)
                and self._may_move_to(name)
                and lacks(self.policy.targets[name], needs) is None
            ):
                self._note(
                    "capability", f"{decision.target} {lack.words}; the next above that can take it: {name}"
                )
                return replace(
                    decision,
                    target=name,
                    model=self.policy.targets[name].model,
                    reason="capability",
                    trail=tuple(self.trail),
                )
        able = [
            name
            for name, target in self.policy.targets.items()
            if self._may_use(name)
            and (self.facts.names is None or name in self.facts.names)
            and lacks(target, needs) is None
        ]
        instead = f" Able are: {_names(able)}; ask for one by its name." if able else ""
        raise RequestError(
            f"This request goes to {decision.target}, which {lack.words}, and there is no target above it that can take it."
            f"{instead}",
            param="messages",
            code=lack.code,
        )

    def _incumbent(self) -> str | None:
        """The session's target, where this tier leads to it and the client may use it."""
        name = None if self.facts.session is None else self.facts.session.incumbent
        if name is None or name not in self.policy.targets:
            return None
        return name if self.tier.leads_to(name) and self._may_use(name) else None

    def _may_use(self, name: str) -> bool:
        return self.facts.allowed is None or name in self.facts.allowed

    def _may_move_to(self, name: str) -> bool:
        return self.tier.move_up == "policy" or self.tier.leads_to(name)

    def _read(self) -> str:
        """The tool results that the request ends in, by kind."""
        assert self.facts.content is not None
        results = self.facts.content.results
        kinds = ", ".join(dict.fromkeys(result.kind for result in results))
        return f"{len(results)} tool result{'s' if len(results) > 1 else ''} ({kinds})"

    def _note(self, stage: str, outcome: str) -> None:
        self.trail.append((stage, outcome))

    def _decision(self, target: str, reason: Reason) -> Decision:
        return Decision(
            target,
            self.policy.targets[target].model,
            reason,
            self.tier_name,
            self.mode,
            unknown_mode=self.unknown_mode,
            trail=tuple(self.trail),
        )


def _tokens(content: Content | KnownContent) -> Tokens:
    return Tokens(input=content.needs.tokens, output=content.needs.room)


def _address(facts: RequestFacts, policy: Policy) -> Address:
    address = policy.find(facts.model)
    if address is None:
        raise RequestError(
            f"The model '{printable(facts.model)}' does not exist; there are: {_names(policy.names())}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return address


def _names(names: Sequence[str], limit: int = 30) -> str:
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
