from __future__ import annotations

from typing import Any

import pytest

from router.upstream import MOST_TOKENS, Usage, usage_of, usage_of_messages, usage_of_responses


@pytest.mark.parametrize(
    "usage", [{}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "many"}]
)
def test_a_usage_of_nothing_is_none(usage: dict[str, Any]) -> None:
    assert usage_of({"usage": usage}) is None
    assert usage_of_messages({"usage": usage}) is None
    assert usage_of_responses({"response": {"usage": usage}}) is None


def test_counts_are_taken_as_far_as_they_can_be_believed() -> None:
    assert usage_of({"usage": {"prompt_tokens": 12.0, "completion_tokens": True}}) == Usage(12, 1)
    assert usage_of({"usage": {"prompt_tokens": 10**400, "completion_tokens": -3}}) == Usage(MOST_TOKENS, 0)


def test_reasoning_is_part_of_the_output() -> None:
    chat = {"prompt_tokens": 1, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}
    assert usage_of({"usage": chat}) == Usage(1, 9, reasoning=7)
    responses = {"input_tokens": 1, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 7}}
    assert usage_of_responses({"usage": responses}) == Usage(1, 9, reasoning=7)
