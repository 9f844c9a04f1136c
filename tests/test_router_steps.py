from __future__ import annotations

from typing import Any

import pytest

from router.policy import StepRule
from router.steps import Result, last_results, matching_rule

ASK = {"role": "user", "content": "Fix the failing test."}


def called(*names: str) -> dict[str, Any]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def answered(i: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{i}", "content": text}


OPENAI = [
    ASK,
    called("old"),
    answered(0, "x"),
    called("read_file", "run_tests"),
    answered(0, "abc"),
    answered(1, "1 failed"),
]
ANTHROPIC = [
    ASK,
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t0", "name": "Read", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t0", "content": "old"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "read_file", "input": {}},
            {"type": "tool_use", "id": "t2", "name": "run_tests", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "abc"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "1 failed"},
            {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
        ],
    },
]
RESPONSES = [
    {"role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
    {"type": "function_call", "call_id": "f0", "name": "old", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "f0", "output": "x"},
    {"type": "reasoning", "summary": []},
    {"type": "function_call", "call_id": "f1", "name": "read_file", "arguments": "{}"},
    {"type": "function_call", "call_id": "f2", "name": "run_tests", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "f1", "output": "abc"},
    {"type": "function_call_output", "call_id": "f2", "output": "1 failed"},
]


@pytest.mark.parametrize(
    "body",
    [{"messages": OPENAI}, {"messages": ANTHROPIC}, {"input": RESPONSES}],
    ids=["chat", "messages", "responses"],
)
def test_the_results_that_a_request_ends_in_are_those_of_the_last_step(body: dict[str, Any]) -> None:
    found = last_results(body)
    assert [(result.tool, result.text) for result in found] == [
        ("read_file", "abc"),
        ("run_tests", "1 failed"),
    ]
    assert [(result.kind, result.failed_test) for result in found] == [("read", False), ("run", True)]


@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [*OPENAI, {"role": "user", "content": "No, the other one."}],
        [*OPENAI, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [*OPENAI, {"role": "assistant", "content": "Done."}],
        [
            *ANTHROPIC[:-1],
            {"role": "user", "content": [*ANTHROPIC[-1]["content"], {"type": "text", "text": "Wait, stop."}]},
        ],
        [*OPENAI, {"role": "user", "content": "<environment_details>cwd</environment_details> Go on."}],
        [*OPENAI, {"role": "user", "content": "<b>No</b>"}],
        [],
        ["x"],
    ],
)
def test_a_human_s_words_end_a_step(messages: list[Any]) -> None:
    assert last_results({"messages": messages}) == ()


def test_what_a_client_adds_after_the_results_is_not_a_human() -> None:
    added = {"role": "user", "content": "<environment_details>cwd: /src</environment_details>"}
    assert [result.tool for result in last_results({"messages": [*OPENAI, added]})] == [
        "read_file",
        "run_tests",
    ]


def test_a_result_that_is_marked_as_an_error_is_one() -> None:
    part = {"type": "tool_result", "tool_use_id": "t2", "content": "hm", "is_error": True}
    messages = [*ANTHROPIC[:-1], {"role": "user", "content": [part]}]
    assert last_results({"messages": messages})[0].error


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x"}, {"input": "x"}, {"input": [7]}, {"messages": [{"role": "user"}]}]
)
def test_no_step(body: dict[str, Any]) -> None:
    assert last_results(body) == ()


def rule(**conditions: Any) -> StepRule:
    return StepRule.model_validate({"to": "x", **conditions})


@pytest.mark.parametrize(
    ("conditions", "meets"),
    [
        ({}, True),
        ({"kind": "run"}, True),
        ({"kind": ["read", "edit"]}, False),
        ({"tool": "RUN_*"}, True),
        ({"tool": ["read*", "*command"]}, True),
        ({"tool": "read*"}, False),
        ({"larger_than": 9}, True),
        ({"larger_than": 10}, False),
        ({"smaller_than": 11}, True),
        ({"smaller_than": 10}, False),
        ({"failed_test": True}, True),
        ({"failed_test": False}, False),
        ({"error": False}, True),
        ({"error": True}, False),
        ({"kind": "run", "failed_test": True, "smaller_than": 5}, False),
    ],
)
def test_a_rule_asks_for_all_its_conditions(conditions: dict[str, Any], meets: bool) -> None:
    result = Result("Run_Command", "2 failed, ")
    assert len(result.text) == 10
    assert (matching_rule([rule(**conditions)], [result]) is not None) == meets


def test_the_first_rule_that_any_result_meets_alone() -> None:
    results = [Result("read_file", "1 failed"), Result("bash", "ok")]
    both = rule(kind="run", failed_test=True)  # met by no single one
    first, second = rule(kind="run"), rule(kind="read")
    assert matching_rule([both, first, second], results) is first
    assert matching_rule([both], results) is None


def test_a_long_result_is_not_searched_where_no_rule_asks() -> None:
    result = Result("read_file", "x" * 1000)
    matching_rule([rule(kind="run", failed_test=True, error=True)], [result])
    assert vars(result).keys() & {"error", "failed_test"} == set()
