"""Pure: (what is known of a request, the policy, a prediction) → which target, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from router.errors import RequestError
from router.policy import PREDICT, Address, Policy, Tier, printable
from router.predictor import Prediction

Reason = Literal["pinned", "signal", "predicted", "unknown", "default", "fallback", "escalated"]


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a decision needs to know of a request, beside its text.

    Attributes
    ----------
    model : str
        As the client wrote it.
    mode : str or None
        As a header or the body's metadata gave it; the suffix of ``model`` counts where this is None.
    threshold : float or None
        The client's own, where it may set one.
    """

    model: str = "auto"
    mode: str | None = None
    threshold: float | None = None


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
        ``pinned``: the client named the target. ``signal``: its mode is mapped to one. ``predicted``: by the
        bundle. ``unknown``: the bundle flagged the prompt as unlike its training data, and the policy says where
        such prompts go. ``default``: what the tier gives a request without a known mode. Of what happened after the
        decision: ``fallback``: the target that was decided on did not answer, this one did. ``escalated``: its answer was
        none, and this one was asked once more.
    tier, mode : str or None
        The tier that decided (none where pinned), and the mode that the client gave, even an unknown one.
    score, threshold : float or None
        Where predicted: the gain of the best target over the cheapest, and the loss of quality allowed; no threshold
        where the tier weighs quality against dollars.
    novelty : float or None
        Where predicted by a bundle that measures it: how unlike its training data the prompt is; over 1 is flagged.
    unfamiliar : bool or None
        Whether it is flagged; None where nothing was predicted.
    """

    target: str
    model: str
    reason: Reason
    tier: str | None = None
    mode: str | None = None
    score: float | None = None
    threshold: float | None = None
    novelty: float | None = None
    unfamiliar: bool | None = None


def needs_prediction(facts: RequestFacts, policy: Policy) -> bool:
    """Whether :func:`decide` wants a prediction for this request."""
    address = _address(facts, policy)
    if address.tier is None:
        return False
    choice, _ = _choice(policy.tiers[address.tier], facts.mode or address.mode)
    return choice == PREDICT


def decide(facts: RequestFacts, policy: Policy, prediction: Prediction | None = None) -> Decision:
    """Choose the target. The order is the body of this function.

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
        Status 404: ``model`` names nothing that the policy has.
    """
    address = _address(facts, policy)
    if address.target is not None:
        return Decision(address.target, policy.targets[address.target].model, "pinned")
    assert address.tier is not None
    mode = facts.mode or address.mode
    tier = policy.tiers[address.tier]
    target, reason = _choice(tier, mode)
    if target != PREDICT:
        return Decision(target, policy.targets[target].model, reason, address.tier, mode)
    if prediction is None:
        raise ValueError("this request needs a prediction")
    target, reason, threshold = _predicted(tier, policy, prediction, facts.threshold)
    return Decision(
        target,
        policy.targets[target].model,
        reason,
        address.tier,
        mode,
        score=float(prediction.score[0]),
        threshold=threshold,
        novelty=None if prediction.novelty is None else float(prediction.novelty[0]),
        unfamiliar=bool(prediction.unfamiliar[0]),
    )


def _address(facts: RequestFacts, policy: Policy) -> Address:
    address = policy.find(facts.model)
    if address is None:
        raise RequestError(
            f"The model '{printable(facts.model)}' does not exist; there are: {_listed(policy.names())}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return address


def _choice(tier: Tier, mode: str | None) -> tuple[str, Reason]:
    """A target or ``predict``: by the mode where the tier knows it, else the tier's default."""
    if mode is not None and mode in tier.modes:
        return tier.modes[mode], "signal"
    return tier.default, "default"


def _predicted(
    tier: Tier, policy: Policy, prediction: Prediction, override: float | None
) -> tuple[str, Reason, float | None]:
    """The target, why, and the threshold where that decided.

    A score says nothing of a prompt unlike any it was fitted on; a client's own threshold decides by threshold.
    """
    predict = tier.predict
    assert predict is not None
    names = [predict.targets[name] for name in prediction.targets]
    threshold = predict.threshold if override is None else override
    by_value = predict.quality_per_dollar is not None and override is None
    if prediction.unfamiliar[0] and predict.unknown != PREDICT:
        return predict.unknown, "unknown", None if by_value else threshold
    if by_value:
        assert predict.quality_per_dollar is not None
        assert predict.tokens is not None
        costs = policy.costs(names, predict.tokens)
        return names[int(prediction.choose_by_value(costs, predict.quality_per_dollar)[0])], "predicted", None
    assert threshold is not None
    return names[int(prediction.choose(threshold)[0])], "predicted", threshold


def _listed(names: Sequence[str], limit: int = 30) -> str:
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
