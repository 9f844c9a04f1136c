from __future__ import annotations

import numpy as np
import pytest

from router.decision import RequestFacts, decide, needs_prediction
from router.errors import RequestError
from router.policy import Policy, printable
from router.predictor import Prediction

POLICY = Policy.model_validate(
    {
        "version": 1,
        "targets": {name: {"model": f"openai/{name}"} for name in ("cheap", "mid", "frontier")},
        "tiers": {
            "auto": {"predict": {"weak": "cheap", "strong": "frontier", "threshold": 0.1}},
            "mixed": {
                "predict": {"weak": "mid", "strong": "frontier"},
                "modes": {"plan": "frontier", "code": "predict"},
                "default": "cheap",
            },
        },
        "default_tier": "auto",
        "aliases": {"gpt-4o": "mixed:plan"},
    }
).bound_to(("weak", "strong"), 0.3)


def prediction(gain: float, novelty: float | None = None) -> Prediction:
    gains = np.array([[0.0, gain]])
    return Prediction(("weak", "strong"), gains, gains, None if novelty is None else np.array([novelty]))


def test_pinned_comes_before_all_else() -> None:
    facts = RequestFacts("mid", mode="plan", threshold=0.0)
    assert not needs_prediction(facts, POLICY)
    decision = decide(facts, POLICY)
    assert (decision.target, decision.model, decision.reason) == ("mid", "openai/mid", "pinned")
    assert (decision.tier, decision.score, decision.threshold) == (None, None, None)


@pytest.mark.parametrize(
    ("model", "mode", "target"),
    [("mixed", "plan", "frontier"), ("mixed:plan", None, "frontier"), ("gpt-4o", None, "frontier")],
)
def test_a_mode_that_the_tier_knows_is_looked_up(model: str, mode: str | None, target: str) -> None:
    facts = RequestFacts(model, mode)
    assert not needs_prediction(facts, POLICY)
    decision = decide(facts, POLICY)
    assert (decision.target, decision.reason, decision.mode) == (target, "signal", "plan")


def test_the_mode_of_the_request_comes_before_the_suffix() -> None:
    assert decide(RequestFacts("mixed:plan", mode="other"), POLICY).reason == "default"


def test_an_unknown_mode_gets_the_default_or_is_predicted() -> None:
    decision = decide(RequestFacts("mixed", mode="other"), POLICY)
    assert (decision.target, decision.reason, decision.mode) == ("cheap", "default", "other")
    decision = decide(RequestFacts("auto", mode="other"), POLICY, prediction(0.5))
    assert (decision.target, decision.reason, decision.mode) == ("frontier", "predicted", "other")


def test_a_mode_may_ask_for_a_prediction() -> None:
    facts = RequestFacts("mixed", mode="code")
    assert needs_prediction(facts, POLICY)
    decision = decide(facts, POLICY, prediction(0.31))
    assert (decision.target, decision.reason) == ("frontier", "predicted")
    assert decide(facts, POLICY, prediction(0.29)).target == "mid"


@pytest.mark.parametrize(
    ("gain", "override", "target", "threshold"),
    [
        (0.2, None, "frontier", 0.1),
        (0.1, None, "cheap", 0.1),  # the score must be over the threshold
        (-0.5, None, "cheap", 0.1),
        (0.2, 0.25, "cheap", 0.25),
        (0.05, 0.0, "frontier", 0.0),
        (-0.05, -0.1, "frontier", -0.1),
    ],
)
def test_predicted(gain: float, override: float | None, target: str, threshold: float) -> None:
    facts = RequestFacts(threshold=override)
    assert needs_prediction(facts, POLICY)
    decision = decide(facts, POLICY, prediction(gain))
    assert (decision.target, decision.score, decision.threshold) == (target, gain, threshold)


BY_VALUE = Policy.model_validate(
    {
        "version": 1,
        "targets": {
            "cheap": {"model": "a/a", "prices": {"input": 0, "output": 1}},
            "mid": {"model": "b/b", "prices": {"input": 1, "output": 2}},
            "frontier": {"model": "c/c", "prices": {"input": 5, "output": 20}},
        },
        "tiers": {
            "auto": {
                "predict": {
                    "targets": {"small": "cheap", "medium": "mid", "large": "frontier"},
                    "quality_per_dollar": 20,
                    "tokens": {"input": 1000, "output": 500},
                }
            }
        },
        "default_tier": "auto",
    }
).bound_to(("small", "medium", "large"), 0.3)


@pytest.mark.parametrize(
    ("gains", "target"),
    [
        # A request costs .0005, .002 and .015 dollars: at 20 a dollar .01, .04 and .3 of quality.
        ((0.02, 0.28), "cheap"),
        ((0.04, 0.28), "mid"),
        ((0.04, 0.31), "frontier"),
    ],
)
def test_quality_against_dollars(gains: tuple[float, float], target: str) -> None:
    gain = np.array([[0.0, *gains]])
    three = Prediction(("small", "medium", "large"), 0.3 + gain, gain)
    decision = decide(RequestFacts(), BY_VALUE, three)
    assert (decision.target, decision.reason) == (target, "predicted")
    assert (decision.score, decision.threshold) == (gains[1], None)
    # A client's threshold is the other rule.
    decision = decide(RequestFacts(threshold=0.5), BY_VALUE, three)
    assert (decision.target, decision.threshold) == ("cheap", 0.5)


@pytest.mark.parametrize(
    ("unknown", "novelty", "target", "reason"),
    [
        (None, 1.01, "frontier", "unknown"),
        (None, 1.0, "cheap", "predicted"),  # the cut itself is not over it
        (None, None, "cheap", "predicted"),  # a bundle that measures no novelty
        ("strong", 3.0, "frontier", "unknown"),
        ("mid", 3.0, "mid", "unknown"),
        ("cheap", 3.0, "cheap", "unknown"),
        ("predict", 3.0, "cheap", "predicted"),
    ],
)
def test_a_flagged_prompt_goes_where_the_policy_says(
    unknown: str | None, novelty: float | None, target: str, reason: str
) -> None:
    predict = {"weak": "cheap", "strong": "frontier"} | ({} if unknown is None else {"unknown": unknown})
    document = POLICY.model_dump(exclude_unset=True) | {
        "tiers": {"auto": {"predict": predict}},
        "aliases": {},
    }
    policy = Policy.model_validate(document).bound_to(("weak", "strong"), 0.1)
    decision = decide(RequestFacts(), policy, prediction(0.05, novelty))
    assert (decision.target, decision.reason) == (target, reason)
    assert (decision.score, decision.threshold, decision.novelty) == (0.05, 0.1, novelty)
    assert decision.unfamiliar == (novelty is not None and novelty > 1)


def test_a_flag_comes_after_the_mode_and_before_a_threshold_of_the_client() -> None:
    assert decide(RequestFacts("mixed", mode="plan"), POLICY).reason == "signal"
    flagged = decide(RequestFacts(threshold=1.0), POLICY, prediction(0.05, 2.0))
    assert (flagged.target, flagged.reason, flagged.threshold) == ("frontier", "unknown", 1.0)


def test_of_more_targets_the_dearest_takes_the_flagged() -> None:
    names = {"s": "cheap", "m": "mid", "b": "frontier"}
    document = POLICY.model_dump(exclude_unset=True) | {
        "tiers": {"auto": {"predict": {"targets": dict(reversed(names.items()))}}},
        "aliases": {},
    }
    policy = Policy.model_validate(document).bound_to(("s", "m", "b"), 0.1)
    gain = np.array([[0.0, 0.3, 0.2]])
    found = Prediction(("s", "m", "b"), gain, gain, np.array([1.5]))
    assert decide(RequestFacts(), policy, found).target == "frontier"


def test_an_unknown_model_is_404_and_names_what_there_is() -> None:
    with pytest.raises(RequestError, match="'gpt-9' does not exist; there are: auto, mixed, cheap") as caught:
        decide(RequestFacts("gpt-9"), POLICY)
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_printable() -> None:
    assert printable("a\r\nb\x1b\u202ec") == "a\ufffd\ufffdb\ufffd\ufffdc"
    assert printable("é" * 100, limit=3) == "ééé…"
