from __future__ import annotations

import time
from typing import Any

import pytest

from router.conversation import (
    HISTORY_BUDGET,
    TEXT_BUDGET,
    cut,
    prompt_from_messages,
    prompt_from_text,
    strip_harness,
)
from router.predictor import Predictor

ASK = "Rename the helper in src/parse.py to read_rows, update its callers and run the tests, please."


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = None, *calls: tuple[str, str]) -> dict[str, Any]:
    """An OpenAI message that calls tools, given as (id, name)."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}
            for id, name in calls
        ],
    }


def result(content: Any, id: str = "1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


# --- The text ------------------------------------------------------------------------------------------------------


def test_an_agents_request_is_read_as_the_ask_alone() -> None:
    """What a real client sends: 13,000 characters of system prompt and three harness parts around a short ask."""
    parts = [
        {
            "type": "text",
            "text": "<system-reminder>\nContents of AGENTS.md\n" + "Be terse. " * 300 + "</system-reminder>",
        },
        {"type": "text", "text": "<system-reminder>You have 3 todos.</system-reminder>\n" + ASK},
        {"type": "text", "text": "<environment_details>\n# Time\n12:03\n</environment_details>"},
    ]
    messages = [{"role": "system", "content": "You are an agent. " * 725}, user(parts)]
    assert len(messages[0]["content"]) > 13_000
    prompt = prompt_from_messages(messages)
    assert prompt.text == ASK
    assert prompt.characters == len(ASK)
    assert not prompt.truncated


def test_the_latest_ask_comes_first_and_earlier_turns_follow_latest_first() -> None:
    messages = [
        {"role": "developer", "content": "Never mention this."},
        user("Write a parser for the log format of our gateway."),
        {"role": "assistant", "content": "Here is one."},
        user("Now make it accept tabs as well as spaces."),
        {"role": "assistant", "content": "Done."},
        user("And test it."),
    ]
    assert prompt_from_messages(messages).text == (
        "And test it.\n\nNow make it accept tabs as well as spaces.\n\nWrite a parser for the log format of our gateway."
    )


def test_earlier_turns_stay_within_their_budget_and_are_cut_first() -> None:
    earlier = "a" * 5_000
    prompt = prompt_from_messages([user("oldest " * 50), user(earlier), user("latest")])
    assert prompt.text.startswith("latest\n\naaa")
    assert len(prompt.text) <= len("latest\n\n") + HISTORY_BUDGET
    assert "oldest" not in prompt.text
    assert not prompt.truncated  # the ask itself was read whole


@pytest.mark.parametrize("length", [5_990, 6_500, 7_900, 7_990, 8_000, 8_001])
def test_ask_and_earlier_turns_together_stay_within_the_budget(length: int) -> None:
    prompt = prompt_from_messages([user("b" * 9_000), user("c" * 9_000), user("a" * length)])
    assert len(prompt.text) <= TEXT_BUDGET
    assert prompt.text.count("a") >= min(length, TEXT_BUDGET - 3)
    assert prompt.truncated == (length > TEXT_BUDGET)


def test_neither_tool_results_nor_system_prompts_nor_answers_reach_the_text() -> None:
    secret = "zebra"
    messages = [
        {"role": "system", "content": secret},
        user(ASK),
        assistant(secret, ("1", "read_file")),
        result(secret),
        {"role": "function", "name": "run", "content": secret},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": secret}, {"type": "tool_use", "id": "2", "name": "ls"}],
        },
        user(
            [
                {
                    "type": "tool_result",
                    "tool_use_id": "2",
                    "content": [{"type": "text", "text": secret}],
                },
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{secret}"}},
            ]
        ),
    ]
    prompt = prompt_from_messages(messages, [{"type": "function", "function": {"name": secret}}])
    assert prompt.text == ASK


def test_a_conversation_without_a_human_turn_yields_its_last_message() -> None:
    assert prompt_from_messages([{"role": "system", "content": "Say hello."}]).text == "Say hello."
    assert prompt_from_messages([]).text == ""


def test_every_harness_block_is_stripped_whatever_its_case_and_attributes() -> None:
    text = (
        "<SYSTEM-REMINDER>x</System-Reminder>Fix it"
        '<environment_details cwd="/srv">\n<files>a, b</files>\n</environment_details>'
        "<gitStatus>dirty</gitstatus>.\n\n\n\nThanks"
    )
    assert strip_harness(text) == "Fix it.\n\nThanks"


def test_a_block_of_another_name_that_begins_alike_is_the_humans_own() -> None:
    text = "Why does <user_infos>Ada</user_infos> not validate against <git_status2/>?"
    assert strip_harness(text) == text


def test_a_block_that_is_never_closed_is_left_in_place() -> None:
    text = "What does <system-reminder> mean in this log?"
    assert strip_harness(text) == text
    assert strip_harness("<git_status>x</git_status>Go on <git_status>") == "Go on <git_status>"


def test_a_self_closing_tag_is_a_block_of_its_own() -> None:
    text = 'Go <git_status/>on<ide_selection path="a.py" />. <system-reminder>x</system-reminder>'
    assert strip_harness(text) == "Go on."


def test_blocks_are_found_where_lower_case_is_longer() -> None:
    """The lower case of İ is two characters: positions found in lowered text would be off by one for each."""
    assert strip_harness("İİİİ <system-reminder>x</system-reminder> kaydet") == "İİİİ  kaydet"


@pytest.mark.parametrize("tag", ["task", "user_query", "TASK", "feedback"])
def test_tags_around_the_ask_go_and_the_ask_stays(tag: str) -> None:
    wrapped = f"<{tag}>\n{ASK}\n</{tag}>\n<environment_details>VS Code</environment_details>"
    assert prompt_from_messages([user(wrapped)]).text == ASK


def test_text_that_is_only_harness() -> None:
    block = "<system-reminder>The todo list is empty.</system-reminder>"
    # A single prompt of nothing else is what the person asked about; in a conversation it is no turn.
    assert prompt_from_text(block).text == block
    prompt = prompt_from_messages([user(ASK), {"role": "assistant", "content": "Ok."}, user(block)])
    assert prompt.text == ASK
    assert prompt.state.turns == 1


def test_a_single_prompt_and_a_conversation_of_one_message_are_the_same() -> None:
    assert prompt_from_messages([user(ASK)]) == prompt_from_text(ASK)


# --- Long and pathological input -----------------------------------------------------------------------------------


def test_of_a_long_prompt_head_and_tail_are_read() -> None:
    text = "START " + "filler " * 28_600 + " END"
    assert len(text) > 200_000
    for prompt in (prompt_from_text(text), prompt_from_messages([user(text)])):
        assert len(prompt.text) <= TEXT_BUDGET
        assert prompt.text.startswith("START ")
        assert prompt.text.endswith(" END")
        assert "\n…\n" in prompt.text
        assert prompt.truncated
        assert prompt.characters == len(text)


@pytest.mark.parametrize("budget", [3, 4, 5, 40, 101])
def test_cut_keeps_to_its_budget_to_the_character(budget: int) -> None:
    text = "".join(map(chr, range(1_000, 1_200)))
    short = cut(text, budget)
    assert len(short) == budget
    head, tail = short.split("\n…\n")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert 0 <= len(head) - len(tail) <= 1
    assert cut(text, 200) == text


PATHOLOGICAL = {
    "angles": "<" * 100_000,
    "nested": "<system-reminder>" * 12_000 + "x" + "</system-reminder>" * 12_000,
    "unclosed": "<system-reminder " * 12_000,
    "spaces in a tag": "<environment_details" + " " * 200_000,
    "ask tags": "<task" * 40_000,
    "ask tags with spaces": "<task " + "\t" * 200_000,
    "newlines": "x" + "\n" * 200_000 + "x",
    "pairs of newlines": "\n\nx" * 70_000,
    "closing only": "</git_status>" * 15_000,
    "unknown tags": "<a><b>" * 30_000,
}


@pytest.mark.parametrize("text", PATHOLOGICAL.values(), ids=PATHOLOGICAL.keys())
def test_stripping_is_linear(text: str) -> None:
    # Linear: a tenth of a second. Quadratic over 200,000 characters: minutes.
    start = time.perf_counter()
    prompt = prompt_from_messages([user(text), result(text)])
    assert time.perf_counter() - start < 2.0
    assert len(prompt.text) <= TEXT_BUDGET


@pytest.mark.parametrize("text", ["word " * 40_000, "\n" * 200_000, "<" * 100_000, "語" * 200_000])
def test_a_prediction_for_a_huge_prompt_is_quick(tiny_predictor: Predictor, text: str) -> None:
    start = time.perf_counter()
    prediction = tiny_predictor.predict([prompt_from_text(text)])
    assert time.perf_counter() - start < 1.0
    assert 0.0 <= prediction.quality.min() <= prediction.quality.max() <= 1.0


# --- The state -----------------------------------------------------------------------------------------------------


def test_the_state_of_a_single_prompt() -> None:
    state = prompt_from_text(ASK).state
    assert (state.turns, state.depth, state.characters) == (1, 1, len(ASK))
    assert (state.tools_offered, state.tool_results, state.last_result) == (0, 0, "none")


def test_sizes_and_counts() -> None:
    messages = [
        {"role": "system", "content": "s" * 10},
        user("a" * 20),
        assistant("b" * 5, ("1", "read_file")),  # and 2 characters of arguments
        result("c" * 30),
    ]
    state = prompt_from_messages(messages, [{"type": "function"}, {"type": "function"}]).state
    assert (state.turns, state.depth, state.characters) == (1, 3, 10 + 20 + 5 + 2 + 30)
    assert (state.tools_offered, state.tool_results, state.last_result_characters) == (2, 1, 30)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("read_file", "read"),
        ("Grep", "read"),
        ("list_dir", "read"),
        ("str_replace_editor", "edit"),
        ("Write", "edit"),
        ("apply_patch", "edit"),
        ("bash", "run"),
        ("run_tests", "run"),
        ("execute_command", "run"),
        ("WebFetch", "web"),
        ("browser_action", "web"),
        ("think", "other"),
        ("", "other"),
    ],
)
def test_the_kind_of_the_last_tool(name: str, kind: str) -> None:
    openai = [user(ASK), assistant(None, ("0", "other_tool"), ("1", name)), result("ok", "1")]
    named = [user(ASK), {"role": "function", "name": name, "content": "ok"}]
    anthropic = [
        user(ASK),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": name, "input": {}}]},
        user([{"type": "tool_result", "tool_use_id": "1", "content": "ok"}]),
    ]
    for messages in (openai, named, anthropic):
        state = prompt_from_messages(messages).state
        assert (state.last_result, state.tool_results, state.last_result_characters) == (kind, 1, 2)


def test_a_result_that_is_not_last_counts_but_is_not_the_last_result() -> None:
    state = prompt_from_messages(
        [user(ASK), assistant(None, ("1", "bash")), result("Error: no"), user("Try again.")]
    ).state
    assert (state.tool_results, state.last_result, state.last_result_characters) == (1, "none", 0)
    assert not state.last_result_error


@pytest.mark.parametrize(
    ("text", "error", "failed"),
    [
        ("31 passed in 0.2s", False, False),
        ("2 failed, 31 passed", False, True),
        ("0 failed, 31 passed", False, False),
        ("FAILED tests/test_a.py::test_b", False, True),
        ("--- FAIL: TestParse (0.00s)", False, True),
        ("Traceback (most recent call last):\n  File", True, False),
        ("E   AssertionError: assert 1 == 2", False, True),
        ("bash: jq: command not found", True, False),
        ("src/main.c:3:1: error: expected ';'", True, False),
        ("process ended with exit code 2", True, False),
        ("process ended with exit code 0", False, False),
        ("def handle_errors(self): ...", False, False),
        ("x" * 500_000 + "\nTraceback (most recent call last):", True, False),
        ("Traceback (most recent call last):\n" + "x" * 500_000, True, False),
    ],
)
def test_errors_and_failed_tests_are_told_apart(text: str, error: bool, failed: bool) -> None:
    state = prompt_from_messages([user(ASK), assistant(None, ("1", "bash")), result(text)]).state
    assert (state.last_result_error, state.last_result_failed_test) == (error, failed)


# --- What clients send that the specification does not foresee ------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "",
        [None, 3, "a bare string"],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [{"type": ["text"], "text": "x"}],
        [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
        {"type": "text", "text": "an object"},
        7,
    ],
)
def test_content_without_text_is_no_turn(content: Any) -> None:
    prompt = prompt_from_messages([user(ASK), user(content), assistant(content), result(content)])
    assert prompt.text == ASK
    assert prompt.state.turns == 1
    assert prompt.state.depth == 4


def test_text_parts_around_an_image_are_joined() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    parts = [{"type": "text", "text": "What is"}, image, {"type": "input_text", "text": "wrong here?"}]
    assert prompt_from_messages([user(parts)]).text == "What is\nwrong here?"


def test_a_message_without_a_role_is_no_human_turn() -> None:
    prompt = prompt_from_messages([user(ASK), {"content": "who am I"}])
    assert (prompt.text, prompt.state.depth) == (ASK, 2)


def test_tool_calls_of_a_strange_form_do_no_harm() -> None:
    calls = [None, "x", {}, {"id": 1}, {"id": None, "function": None}, {"function": {"name": None}}]
    state = prompt_from_messages(
        [user(ASK), {"role": "assistant", "tool_calls": calls}, result("ok", id="missing")]
    ).state
    assert (state.last_result, state.tool_results) == ("other", 1)
