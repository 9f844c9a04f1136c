"""Why a request goes where it goes, and what a policy says, in words for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from router.capability import Needs
from router.decision import Decision, decide, needs_prediction
from router.gateway import InForce
from router.policy import (
    PREDICT,
    STRONG,
    Cooldown,
    ModeChoice,
    ModePrediction,
    Policy,
    Prices,
    StepRule,
    Target,
    Tier,
)
from router.schemas import RouteRequest, read_facts


@dataclass(frozen=True)
class Explanation:
    """A decision, with what of the request it was made from."""

    decision: Decision
    needs: Needs
    in_force: InForce

    def lines(self) -> Iterator[str]:
        """For a person: what is in force, what the request needs, the stages one a line, and what came of them."""
        decision, needs = self.decision, self.needs
        yield f"policy   {self.in_force.version}"
        yield f"bundle   {self.in_force.bundle or 'none: the policy predicts nothing'}"
        needed = ", ".join(sorted(needs.features)) or "nothing special"
        yield f"request  about {needs.tokens:,} tokens, room for {needs.room:,} more; needs {needed}"
        yield ""
        width = max(len(stage) for stage, _ in decision.trail)
        for number, (stage, outcome) in enumerate(decision.trail, 1):
            yield f"{number}. {stage:{width}}  {outcome}"
        yield ""
        yield f"→ {decision.target} ({decision.model}), reason {decision.reason}"


def explain(request: RouteRequest, headers: Mapping[str, str], in_force: InForce) -> Explanation:
    """Decide on a request as the server does, predicting where it does, and keep what it was made from.

    Parameters
    ----------
    request : RouteRequest
        Of one prompt or conversation.
    headers : mapping of str to str
        Names in lower case.
    in_force : InForce

    Raises
    ------
    RequestError
        As the server would answer.
    """
    policy, content = in_force.policy, request.content(0)
    facts = read_facts(request.body, headers, policy.limits, content)
    prediction = None
    if needs_prediction(facts, policy):
        assert in_force.predictor is not None
        prediction = in_force.predictor.predict([request.prompt(0)])
    return Explanation(decide(facts, policy, prediction), content.needs, in_force)


def summary(policy: Policy) -> Iterator[str]:
    """What a policy says, a line each: targets with their prices, tiers with their modes, aliases."""
    for name, target in policy.targets.items():
        limits = f"{target.context_window:,} tokens" if target.context_window else "no window declared"
        yield f"target   {name}: {target.model}, {_price(target.prices)}, {limits}"
        if failing := list(_failing(target)):
            yield f"           {'; '.join(failing)}"
    for name, tier in policy.tiers.items():
        default = " (the default tier)" if name == policy.default_tier else ""
        yield f"tier     {name}{default}: {_choice(tier, tier.default)} without a mode"
        for mode, choice in tier.modes.items():
            yield f"           {mode}: {_choice(tier, choice)}"
        if tier.modes:
            unknown = tier.default if tier.unknown_mode == "default" else tier.unknown_mode
            yield f"           any other mode: {_choice(tier, unknown)}"
        if tier.escalate is not None:
            held = ", streams held back for it" if tier.escalate.buffer_streams else ""
            faults = " or ".join(sorted(tier.escalate.when))
            yield f"           escalates to {tier.escalate.to} on {faults}{held}"
        for rule in tier.steps:
            yield f"           after {_conditions(rule)}: {rule.to}"
    for rule in policy.steps:
        yield f"steps    after {_conditions(rule)}: {rule.to}"
    for alias, meaning in policy.aliases.items():
        yield f"alias    {alias}: {meaning}"


def _failing(target: Target) -> Iterator[str]:
    """What happens where a target does not answer, as far as it is not what every target does."""
    if target.fallbacks:
        yield f"falls back to {', '.join(target.fallbacks)}"
    if target.retries:
        yield f"retried {target.retries} time{'s' if target.retries > 1 else ''}"
    if target.cooldown is None:
        yield "never cools down"
    elif target.cooldown != Cooldown():
        yield f"cools down for {target.cooldown.seconds:g} s after {target.cooldown.failures} failures in a row"
    if target.max_concurrency is not None:
        yield f"{target.max_concurrency} at a time, others wait {target.queue_seconds:g} s"


def shortcomings(policy: Policy, environment: Mapping[str, str]) -> Iterator[str]:
    """What a valid policy leaves to be desired, a line each: keys that are not set, targets without prices."""
    yield from policy.missing_keys(environment)
    unpriced = [name for name, target in policy.targets.items() if target.prices is None and not target.echo]
    if unpriced:
        yield f"no prices for {', '.join(unpriced)}: their requests cost nothing by the metrics"


def _price(prices: Prices | None) -> str:
    return (
        "no prices" if prices is None else f"${prices.input:g} in and ${prices.output:g} out a million tokens"
    )


def _choice(tier: Tier, choice: ModeChoice) -> str:
    own = choice.predict if isinstance(choice, ModePrediction) else None
    if isinstance(choice, str) and choice != PREDICT:
        return choice
    predict = tier.predict
    assert predict is not None
    bar = own or predict
    if bar.quality is not None:
        by = f"quality {bar.quality:g}"
    elif bar.threshold is not None:
        by = f"threshold {bar.threshold:g}"
    elif predict.quality_per_dollar is not None:
        by = f"{predict.quality_per_dollar:g} of quality a dollar"
    else:
        by = "the bundle's threshold"
    unlike = f"; unlike the training data: {predict.unknown}" if predict.unknown != STRONG else ""
    return f"predict {' or '.join(predict.named())} by {by}{unlike}"


def _conditions(rule: StepRule) -> str:
    kinds, tools = " or ".join(rule.kind), " or ".join(rule.tool)
    said = [
        *((f"a result of {kinds}" + (f" by the tool {tools}" if tools else ""),) if kinds else ()),
        *((f"a result of the tool {tools}",) if tools and not kinds else ()),
        *((f"over {rule.larger_than:,} characters",) if rule.larger_than is not None else ()),
        *((f"under {rule.smaller_than:,} characters",) if rule.smaller_than is not None else ()),
        *(("that is an error" if rule.error else "that is no error",) if rule.error is not None else ()),
        *(
            ("that is a failed test" if rule.failed_test else "that is no failed test",)
            if rule.failed_test is not None
            else ()
        ),
    ]
    if said and not (kinds or tools):
        said.insert(0, "a result")
    return ", ".join(said) or "any tool result"
