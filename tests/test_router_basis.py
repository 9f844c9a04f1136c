from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from router.basis import Basis, prompt_of, state_of
from router.content import Content
from router.conversation import prompt_from_messages
from router.decision import RequestFacts, decide
from router.policy import Policy
from router.predictor import Prediction

POLICY = Policy.model_validate(
    {
        "version": 1,
        "targets": {
            name: {"model": f"openai/{name}", "prices": {"input": price, "output": price}, **more}
            for name, price, more in (
                ("low", 1, {"context_window": 5_000}),
                ("mid", 2, {"supports": ["tools"]}),
                ("high", 3, {}),
            )
        },
        "tiers": {
            "auto": {
                "predict": {"targets": {"a": "low", "b": "mid", "c": "high"}, "threshold": 0.1},
                "steps": [{"tool": "BASH*", "failed_test": True, "to": "high"}, {"error": True, "to": "mid"}],
            }
        },
        "default_tier": "auto",
        "aliases": {"gpt-*": "auto"},
    }
).bound_to(["a", "b", "c"], 0.1)
PREDICTION = Prediction(
    ("a", "b", "c"), np.array([[0.5, 0.62, 0.7]]), np.array([[0.0, 0.123456789, 0.2]]), np.array([1.5])
)


def body(tool: str, result: str, **more: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": tool, "arguments": "{}"}}
    return {
        "messages": [
            {"role": "user", "content": "please"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": result},
        ],
        "tools": [{"type": "function", "function": {"name": tool}}],
        **more,
    }


@pytest.mark.parametrize(
    ("asked", "target", "reason"),
    [
        (body("bash", "3 failed"), "high", "step"),
        (body("read_file", "Traceback (most recent call last)"), "mid", "step"),
        (body("read_file", "all is well"), "high", "unknown"),
        ({"prompt": "word " * 8_000}, "high", "unknown"),
        ({"prompt": "an image", "response_format": {"type": "json_schema"}}, "high", "unknown"),
    ],
)
def test_what_is_kept_is_decided_as_the_request_was(asked: dict[str, Any], target: str, reason: str) -> None:
    facts = RequestFacts("gpt-9", content=Content(asked))
    decision = decide(facts, POLICY, PREDICTION)
    assert (decision.target, decision.reason) == (target, reason)
    basis = Basis.of(facts, decision)
    again = Basis.read(json.loads(basis.as_json()))
    assert again == basis
    assert (again.asked, again.threshold, again.decided) == ("gpt-9", None, None)
    known = RequestFacts(again.asked, content=again.content)
    prediction = again.prediction(POLICY.tiers["auto"].predict.targets.keys(), 0.2)  # type: ignore[union-attr]
    if reason == "step":
        assert prediction is None
    found = decide(known, POLICY, prediction or PREDICTION)
    assert (found.target, found.reason, found.score) == (target, reason, decision.score)


@pytest.mark.parametrize(("window", "target"), [(2_990, "mid"), (2_991, "low")])
def test_the_needs_are_kept(window: int, target: str) -> None:
    facts = RequestFacts("auto", content=Content({"prompt": "hi", "max_tokens": 2_990}))
    small = POLICY.targets["low"].model_copy(update={"context_window": window})
    tier = POLICY.tiers["auto"].model_copy(update={"default": "low"})
    policy = POLICY.model_copy(update={"targets": {**POLICY.targets, "low": small}, "tiers": {"auto": tier}})
    basis = Basis.read(json.loads(Basis.of(facts, decide(facts, policy)).as_json()))
    needs = basis.content.needs
    assert (needs.answer, needs.tokens, needs.room) == (2_990, 1, 2_990)
    assert decide(facts, policy).target == target
    assert decide(RequestFacts("auto", content=basis.content), policy).target == target


def test_the_prediction_comes_back_of_a_pair_by_its_score() -> None:
    basis = Basis.read({"quality": [0.4, 0.6]})
    found = basis.prediction(("weak", "strong"), 0.123456789)
    assert found is not None
    assert found.score[0] == 0.123456789
    assert found.gain.tolist() == [[0.0, 0.123456789]]
    assert found.quality.tolist() == [[0.4, 0.6]]
    assert basis.prediction(("a", "b", "c"), 0.1) is None


def test_little_is_written_of_a_request_that_says_little() -> None:
    assert Basis().as_json() == '{"asked":"auto"}'
    assert "tokens" not in Basis.of(RequestFacts("low"), decide_pinned(), counted=False).as_json()
    assert Basis(threshold=0.0).as_json() == '{"asked":"auto","threshold":0.0}'
    long = body("x" * 500, "y" * 9_000)
    long["messages"] += [{**long["messages"][2], "tool_call_id": str(n)} for n in range(40)]
    assert len(Basis.of(RequestFacts("m" * 9_999, content=Content(long)), decide_pinned()).as_json()) < 1_500


def decide_pinned() -> Any:
    return decide(RequestFacts("low"), POLICY)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"asked": 7}, "asked: must be the name"),
        ({"decided": []}, "decided: must be"),
        ({"threshold": "high"}, "threshold: must be a number"),
        ({"novelty": float("nan")}, "novelty: must be a number"),
        ({"tokens": -1}, "tokens: must be a whole number"),
        ({"answer": True}, "answer: must be a whole number"),
        ({"needs": ["magic"]}, "needs: 'magic' is none of audio, files"),
        ({"needs": "tools"}, "needs: must be a list"),
        ({"results": [["bash"]]}, "results: each must be"),
        ({"gain": ["x"]}, "gain: must be a list of numbers"),
        ({"quality": 1}, "quality: must be a list"),
    ],
)
def test_what_cannot_be_read_is_told_by_field(kept: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Basis.read(kept)


def test_a_prompt_comes_back_with_its_conversation() -> None:
    prompt = prompt_from_messages(body("bash", "1 failed")["messages"], [{}, {}])
    assert prompt_of(prompt.text, state_of(prompt)) == prompt
    assert prompt_of("only text", None).characters == 9
    with pytest.raises(ValueError, match=r"^state: cannot be read"):
        prompt_of("x", "[1]")
