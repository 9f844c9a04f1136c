"""What a budget does to a decision: pacing, quality bars, and the cheapest target at the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from router.budgets import Pace
from router.content import Content
from router.decision import Decision, RequestFacts, decide, needs_prediction
from router.policy import Policy
from router.predictor import Prediction
from router.sessions import Cache, Session

BARS = {0.95: 0.1, 0.9: 0.2}
PACE = Pace(0.3, "the budget for 2026-11 has to last: threshold 0.3")
CONTENT = Content({"messages": [{"role": "user", "content": "hi"}]})


def policy(pacing: Any = "default", bundle: tuple[str, ...] = ("weak", "strong"), **changes: Any) -> Policy:
    prices = {"a": 1, "b": 2, "c": 5}
    budgets: dict[str, Any] = {"workload": {"month": 10}}
    if pacing != "default":
        budgets["pacing"] = pacing
    document = {
        "version": 1,
        "targets": {
            name: {"model": f"openai/{name}", "prices": {"input": price, "output": price}}
            for name, price in prices.items()
        },
        "tiers": {
            "auto": {
                "predict": {"weak": "a", "strong": "c", "threshold": 0.1},
                "modes": {"review": {"predict": {"quality": 0.9}}, "plan": "c"},
            },
            "good": {"predict": {"weak": "a", "strong": "c", "quality": 0.95}},
            "worth": {
                "predict": {
                    "weak": "a",
                    "strong": "c",
                    "quality_per_dollar": 1,
                    "tokens": {"input": 10, "output": 10},
                }
            },
        },
        "default_tier": "auto",
        "budgets": budgets,
        **changes,
    }
    return Policy.model_validate(document).bound_to(bundle, 0.1, bars=BARS)


def gains(*gain: float, novelty: float | None = None) -> Prediction:
    values: NDArray[np.float64] = np.array([[0.0, *gain]])
    names = ("weak", "strong") if len(gain) == 1 else ("low", "mid", "high")
    return Prediction(names, 0.5 + values / 2, values, None if novelty is None else np.array([novelty]))


def decided(
    facts: RequestFacts, score: float, of: Policy | None = None, novelty: float | None = None
) -> Decision:
    return decide(replace(facts, content=CONTENT), of or policy(), gains(score, novelty=novelty))


def said(decision: Decision) -> str:
    return dict(decision.trail).get("budget", "")


def test_pacing_takes_a_cheaper_target_and_says_why() -> None:
    decision = decided(RequestFacts(pace=PACE), 0.25)
    assert (decision.target, decision.reason, decision.threshold, decision.budget) == (
        "a",
        "budget",
        0.3,
        "paced",
    )
    assert decision.options == (("a", 0.25), ("c", 0.0))
    assert said(decision) == f"{PACE.why}: a"
    stages = [stage for stage, _ in decision.trail]
    assert stages[-3:] == ["prediction", "budget", "capability"]


def test_where_pacing_changes_nothing_the_reason_stays() -> None:
    worth_it = decided(RequestFacts(pace=PACE), 0.31)
    assert (worth_it.target, worth_it.reason, worth_it.threshold, worth_it.budget) == (
        "c",
        "predicted",
        0.3,
        None,
    )
    cheap = decided(RequestFacts(pace=PACE), 0.05)
    assert (cheap.target, cheap.reason, cheap.options) == ("a", "predicted", (("a", 0.05),))
    below = decided(RequestFacts(pace=Pace(0.05, "")), 0.25)
    assert (below.target, below.reason, below.threshold, said(below)) == ("c", "predicted", 0.1, "")
    unpaced = decided(RequestFacts(), 0.25)
    assert (unpaced.target, unpaced.options) == ("c", (("a", 0.25), ("c", 0.0)))


@pytest.mark.parametrize("model", ["good", "auto:review"])
@pytest.mark.parametrize("bar", ["hold", "cross"])
def test_a_quality_is_never_crossed_in_silence(model: str, bar: str) -> None:
    own = policy({"bar": bar})
    quality = "0.95" if model == "good" else "0.9"
    decision = decided(RequestFacts(model, pace=PACE), 0.25, own)
    if bar == "hold":
        assert (decision.target, decision.reason, decision.budget) == ("c", "predicted", "held")
        assert decision.threshold == BARS[float(quality)]
        assert said(decision).endswith(f"a would do, but quality {quality} of the policy is held")
        assert decision.options == ()  # no threshold moves it
    else:
        assert (decision.target, decision.reason, decision.budget) == ("a", "budget", "crossed")
        assert said(decision).endswith(f"a, across quality {quality} of the policy")
    above = decided(RequestFacts(model, pace=PACE), 0.4, own)
    assert (above.target, above.budget) == ("c", None)


def test_what_is_not_predicted_or_wished_for_is_not_paced() -> None:
    for facts, novelty, reason in (
        (RequestFacts("c", pace=PACE), None, "pinned"),
        (RequestFacts("auto:plan", pace=PACE), None, "signal"),
        (RequestFacts(pace=PACE, threshold=0.2), None, "predicted"),
        (RequestFacts(pace=PACE), 2.0, "unknown"),
    ):
        decision = decided(facts, 0.25, novelty=novelty)
        assert (decision.target, decision.reason, decision.options) == ("c", reason, ())
    assert decided(RequestFacts(pace=PACE), 0.25, policy(None)).target == "c"
    assert decided(RequestFacts(pace=PACE), 0.25, policy(budgets=None)).target == "c"


def test_pacing_moves_what_weighs_quality_against_dollars() -> None:
    assert decided(RequestFacts("worth"), 0.25).target == "c"
    decision = decided(RequestFacts("worth", pace=PACE), 0.25)
    assert (decision.target, decision.reason, decision.threshold) == ("a", "budget", 0.3)


def test_pacing_on_a_ladder_never_goes_up() -> None:
    tiers = {"auto": {"predict": {"targets": {"low": "a", "mid": "b", "high": "c"}, "threshold": 0.1}}}
    ladder = policy(bundle=("low", "mid", "high"), tiers=tiers)
    for pace, expected in ((None, "c"), (Pace(0.2, ""), "b"), (Pace(0.5, ""), "a")):
        decision = decide(RequestFacts(pace=pace, content=CONTENT), ladder, gains(0.25, 0.4))
        assert decision.target == expected
        assert [name for name, _ in decision.options] == ["a", "b", "c"]


def test_a_session_is_weighed_after_the_budget() -> None:
    session = Session(
        incumbent="c",
        at=0.0,
        mode=None,
        first_context=90_000,
        context=100_000,
        caches=(Cache("c", 100_000, 0.0),),
    )
    targets = {
        name: {"model": f"openai/{name}", "prices": {"input": price, "output": price, "cached_read": 0.05}}
        for name, price in {"a": 1, "c": 5}.items()
    }
    large = Content({"messages": [{"role": "user", "content": "word " * 80_000}]})
    facts = RequestFacts(pace=PACE, content=large, session=session, now=1.0)
    decision = decide(facts, policy(targets=targets), gains(0.25))
    stages = [stage for stage, _ in decision.trail]
    assert stages.index("budget") < stages.index("session")
    assert (decision.target, decision.reason, decision.options) == ("c", "sticky", ())


def test_at_the_limit_nothing_is_predicted() -> None:
    facts = RequestFacts(at_limit="it is used up", content=CONTENT)
    assert not needs_prediction(facts, policy())
    decision = decide(facts, policy())
    assert (decision.target, decision.reason, decision.score) == ("a", "budget", None)
    assert said(decision) == "it is used up: a, the cheapest that can take it"
    for model, target, reason in (("auto:plan", "a", "budget"), ("c", "a", "budget"), ("a", "a", "pinned")):
        decision = decide(replace(facts, model=model), policy())
        assert (decision.target, decision.reason) == (target, reason)


def test_at_the_limit_a_client_gets_what_it_may_ask_for() -> None:
    facts = RequestFacts("c", at_limit="it is used up", content=CONTENT, names=frozenset({"b", "c"}))
    assert decide(facts, policy()).target == "b"
    assert decide(replace(facts, names=frozenset({"c"})), policy()).target == "c"
    assert decide(replace(facts, allowed=frozenset({"c"})), policy()).target == "c"
