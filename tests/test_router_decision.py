from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router.content import Content
from router.decision import RequestFacts, decide, needs_prediction
from router.errors import RequestError
from router.policy import Policy, printable
from router.predictor import Prediction
from router.sessions import Session

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


# What follows needs a policy with everything: modes with bars of their own, step rules, limits and prices.
def full(**tier: Any) -> Policy:
    def target(price: float | None, **more: Any) -> dict[str, Any]:
        prices = {} if price is None else {"prices": {"input": price, "output": 5 * price}}
        return {"model": "openai/x", **prices, **more}

    document = {
        "version": 1,
        "targets": {
            "tiny": target(0.1, context_window=8_000, supports=["tools"]),
            "cheap": target(1, context_window=20_000, supports=["tools", "images"]),
            "far": target(8, context_window=1_000_000),
            "frontier": target(4, context_window=100_000, supports=["tools", "images"]),
            "unpriced": target(None, supports=["audio"]),
        },
        "tiers": {
            "auto": {
                "predict": {"weak": "cheap", "strong": "frontier", "threshold": 0.1},
                "modes": {
                    "plan": "frontier",
                    "code": "predict",
                    "debug": {"predict": {"threshold": 0.02}},
                    "review": {"predict": {"quality": 0.99}},
                },
                **tier,
            },
            "small": {"default": "tiny", "move_up": "tier", "modes": {"big": "cheap"}},
        },
        "default_tier": "auto",
        "steps": [{"kind": "web", "to": "stay"}, {"kind": "other", "to": "predict"}],
    }
    return Policy.model_validate(document).bound_to(("weak", "strong"), 0.3, bars={0.99: 0.01})


def at(target: str, mode: str | None = None) -> Session:
    """A session whose last request went to a target."""
    return Session(target, 0.0, mode)


def ends_in(tool: str, text: str = "ok", **more: Any) -> Content:
    """A request that ends in a tool's result."""
    call = {"id": "c", "type": "function", "function": {"name": tool, "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Fix it."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": text},
    ]
    return Content({"messages": messages, **more})


def says(text: str, **more: Any) -> Content:
    return Content({"messages": [{"role": "user", "content": text}], **more})


@pytest.mark.parametrize(
    ("mode", "gain", "target", "threshold"),
    [
        ("code", 0.05, "cheap", 0.1),
        ("debug", 0.05, "frontier", 0.02),
        ("debug", 0.015, "cheap", 0.02),
        ("review", 0.015, "frontier", 0.01),
    ],
)
def test_a_mode_may_have_a_bar_of_its_own(mode: str, gain: float, target: str, threshold: float) -> None:
    decision = decide(RequestFacts(mode=mode), full(), prediction(gain))
    assert (decision.target, decision.reason, decision.threshold) == (target, "predicted", threshold)
    # The client's own comes before it.
    assert decide(RequestFacts(mode=mode, threshold=0.5), full(), prediction(gain)).threshold == 0.5


@pytest.mark.parametrize("unknown_mode", ["default", "predict"])
def test_an_unknown_mode_goes_where_the_tier_says(unknown_mode: str) -> None:
    policy = full(default="cheap", unknown_mode=unknown_mode)
    facts = RequestFacts(mode="novel")
    assert needs_prediction(facts, policy) == (unknown_mode == "predict")
    decision = decide(facts, policy, prediction(0.5))
    expected = ("frontier", "predicted") if unknown_mode == "predict" else ("cheap", "default")
    assert (decision.target, decision.reason, decision.unknown_mode) == (*expected, True)
    assert not decide(RequestFacts(), policy).unknown_mode
    assert not decide(RequestFacts(mode="plan"), policy).unknown_mode


STEPS = [
    {"kind": "run", "failed_test": True, "to": "frontier"},
    {"kind": "read", "to": "cheap"},
    {"tool": "mcp__*", "to": "predict"},
]


@pytest.mark.parametrize(
    ("content", "target", "reason"),
    [
        (ends_in("bash", "2 failed, 3 passed"), "frontier", "step"),
        (ends_in("bash", "5 passed"), "tiny", "default"),
        (ends_in("grep", "2 failed"), "cheap", "step"),
        (ends_in("mcp__jira__ask"), "frontier", "predicted"),
        (says("hello"), "tiny", "default"),
        (None, "tiny", "default"),
    ],
)
def test_step_rules_come_after_the_mode_and_before_the_default(
    content: Content | None, target: str, reason: str
) -> None:
    policy = full(steps=STEPS, default="tiny")
    facts = RequestFacts(content=content)
    assert needs_prediction(facts, policy) == (reason == "predicted")
    decision = decide(facts, policy, prediction(0.5))
    assert (decision.target, decision.reason) == (target, reason)
    signal = decide(RequestFacts(mode="plan", content=content), policy)
    assert (signal.target, signal.reason) == ("frontier", "signal")


def test_the_policy_s_rules_come_after_the_tier_s() -> None:
    facts = RequestFacts(content=ends_in("fetch_url"), session=at("frontier"))
    assert decide(facts, full()).reason == "step"  # the policy's: stay
    assert decide(facts, full()).target == "frontier"
    assert decide(facts, full(steps=[{"kind": "web", "to": "cheap"}])).target == "cheap"


def test_stay_without_a_target_to_stay_at_is_as_without_the_rule() -> None:
    for incumbent in (None, "gone", "tiny"):  # tiny is not one of this tier's targets
        facts = RequestFacts(
            content=ends_in("fetch_url"), session=None if incumbent is None else at(incumbent)
        )
        assert decide(facts, full(), prediction(0.5)).reason == "predicted"


def test_in_the_middle_of_a_step_the_session_stays() -> None:
    policy = full()
    facts = RequestFacts(content=ends_in("bash"), session=at("frontier"))
    assert not needs_prediction(facts, policy)
    decision = decide(facts, policy)
    assert (decision.target, decision.reason, decision.score) == ("frontier", "sticky", None)
    for other in (
        replace(facts, content=says("And now?")),  # a human asks
        replace(facts, session=None),
        replace(facts, session=at("tiny")),  # where another tier left the session
        replace(facts, mode="code"),  # the mode has changed …
        replace(facts, session=at("frontier", "code")),
        replace(facts, allowed=frozenset(("cheap",))),  # this client may not go there
        replace(facts, content=ends_in("think")),  # a rule says predict
    ):
        assert needs_prediction(other, policy), other
        assert decide(other, policy, prediction(0.0)).target == "cheap"
    same = replace(facts, mode="code", session=at("frontier", "code"))  # … and here it has not
    assert decide(same, policy).reason == "sticky"


def test_a_bundle_that_knows_steps_predicts_in_the_middle_of_one() -> None:
    facts = RequestFacts(content=ends_in("bash"), session=at("frontier"))
    document = full().model_dump(exclude_unset=True)
    document["tiers"]["auto"]["predict"] = {"weak": "cheap", "strong": "frontier"}
    document["tiers"]["auto"]["modes"] = {}
    unbound = Policy.model_validate(document)

    def wants(knows_steps: bool, **predict: Any) -> bool:
        tier = unbound.tiers["auto"]
        assert tier.predict is not None
        changed = tier.model_copy(update={"predict": tier.predict.model_copy(update=predict)})
        policy = unbound.model_copy(update={"tiers": {"auto": changed}})
        return needs_prediction(facts, policy.bound_to(("weak", "strong"), 0.1, knows_steps=knows_steps))

    assert wants(True)
    assert not wants(False)
    assert wants(False, tool_results="predict")  # the policy's word counts
    assert not wants(True, tool_results="stay")


@pytest.mark.parametrize(
    ("model", "content", "target", "reason"),
    [
        ("small:big", says("x"), "cheap", "signal"),
        ("auto", says("a" * 60_000), "cheap", "predicted"),
        ("auto", says("a" * 100_000), "frontier", "capability"),  # 25,000 tokens are over cheap's 20,000
        ("auto", says("a" * 600_000), "far", "capability"),
        ("auto", says("x", max_tokens=50_000), "frontier", "capability"),
        ("auto", says("x", response_format={"type": "json_schema"}), "far", "capability"),
        ("small", says("a" * 40_000), "cheap", "capability"),
        ("tiny", says("a" * 9_000_000), "tiny", "pinned"),
    ],
)
def test_capability_comes_last_and_moves_to_the_next_dearer(
    model: str, content: Content, target: str, reason: str
) -> None:
    decision = decide(RequestFacts(model, content=content), full(), prediction(0.0))
    assert (decision.target, decision.reason) == (target, reason)
    assert decision.model == "openai/x"
    if reason == "capability" and model == "auto":
        assert decision.score == 0.0  # what was predicted is still told


def test_capability_stays_within_what_the_client_may_use_and_within_the_tier_that_says_so() -> None:
    long = says("a" * 100_000)
    allowed = frozenset(("cheap", "far"))
    assert decide(RequestFacts(content=long, allowed=allowed), full(), prediction(0.0)).target == "far"
    with pytest.raises(
        RequestError, match=r"goes to tiny, which has a context window of 8,000 tokens"
    ) as caught:
        decide(RequestFacts("small", content=long), full())
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert "Able are: far, frontier, unpriced; ask for one by its name." in str(caught.value)


def test_none_is_able() -> None:
    audio = says("x", modalities=["audio"], tools=[{"type": "function"}])
    policy = full()
    targets = {name: target for name, target in policy.targets.items() if name != "far"}
    policy = policy.model_copy(update={"targets": targets})
    with pytest.raises(
        RequestError, match="which does not take audio, and there is no target above"
    ) as caught:
        decide(RequestFacts(content=audio), policy, prediction(0.0))
    assert caught.value.code == "unsupported_content"
    assert "Able are" not in str(caught.value)


def test_it_never_moves_down() -> None:
    policy = full(default="far")
    targets = dict(policy.targets)
    targets["far"] = targets["far"].model_copy(update={"supports": frozenset()})
    targets.pop("unpriced")
    policy = policy.model_copy(update={"targets": targets})
    with pytest.raises(
        RequestError, match=r"far, which does not take tools.*Able are: tiny, cheap, frontier;"
    ):
        decide(RequestFacts(content=says("x", tools=[{}])), policy)


def test_the_trail_tells_the_stages_in_their_order() -> None:
    policy = full(steps=STEPS)
    content = ends_in("bash", "ok " * 40_000)
    decision = decide(
        RequestFacts("auto:novel", content=content, session=at("frontier")), policy, prediction(0.0)
    )
    stages = [stage for stage, _ in decision.trail]
    assert stages == ["model", "mode", "step", "stay", "prediction", "capability"]
    said = dict(decision.trail)
    assert said["mode"] == "novel is unknown to the tier: default"
    assert said["step"] == "ends in 1 tool result (run): no rule matches"
    assert said["stay"] == "no: the mode has changed"
    assert said["prediction"] == "score 0 is not over threshold 0.1: cheap"
    assert said["capability"].endswith("; the next above that can take it: frontier")
    assert (decision.target, decision.reason) == ("frontier", "capability")
    named = decide(RequestFacts(content=ends_in("grep")), policy)
    assert dict(named.trail)["step"] == "ends in 1 tool result (read): tiers.auto.steps.1 says cheap"
    assert decide(RequestFacts("far"), policy).trail == (("model", "far is target far"),)


def test_with_a_signal_nothing_of_the_body_is_read_that_no_limit_asks_for() -> None:
    class Unread(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            raise AssertionError(f"{key} was read")

    content = Content(Unread(), size=100)
    assert decide(RequestFacts("mixed:plan", content=content), POLICY).reason == "signal"
