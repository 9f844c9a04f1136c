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


def prediction(gain: float) -> Prediction:
    gains = np.array([[0.0, gain]])
    return Prediction(("weak", "strong"), gains, gains)


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


def test_an_unknown_model_is_404_and_names_what_there_is() -> None:
    with pytest.raises(RequestError, match="'gpt-9' does not exist; there are: auto, mixed, cheap") as caught:
        decide(RequestFacts("gpt-9"), POLICY)
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_printable() -> None:
    assert printable("a\r\nb\x1b\u202ec") == "a\ufffd\ufffdb\ufffd\ufffdc"
    assert printable("é" * 100, limit=3) == "ééé…"
