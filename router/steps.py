"""The step of an agent that a request stands for: the tool results that it ends in, and the rules that read them.

Most requests of an agent end in tool results, and the human's ask in them is the same one. What such a request has to
work on is what it just read, and that is known without predicting anything.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from router.conversation import (
    ToolResult,
    kind_of_tool,
    reads_like_error,
    reads_like_failed_test,
    strip_harness,
    text_of,
)
from router.policy import StepRule

# What the Responses dialect calls the result of a tool.
_OUTPUTS = frozenset(("function_call_output", "custom_tool_call_output", "local_shell_call_output"))


@dataclass(frozen=True)
class Result:
    """A tool's result; what is read off its text is read when it is asked for, and once.

    Attributes
    ----------
    tool : str
        The tool's name; empty where the conversation does not say it.
    text : str
    failed : bool
        The client marked it as an error.
    """

    tool: str
    text: str
    failed: bool = False

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)

    @cached_property
    def kind(self) -> ToolResult:
        """What kind of tool it is of, by the tool's name."""
        return kind_of_tool(self.tool)

    @cached_property
    def error(self) -> bool:
        """Whether it is marked as an error, or reads like one."""
        return self.failed or reads_like_error(self.text)

    @cached_property
    def failed_test(self) -> bool:
        """Whether it reads like a failed test."""
        return reads_like_failed_test(self.text)


@dataclass(frozen=True)
class KnownResult:
    """What was read of a :class:`Result` whose text is gone."""

    tool: str
    size: int = 0
    error: bool = False
    failed_test: bool = False

    @property
    def kind(self) -> ToolResult:
        return kind_of_tool(self.tool)


def last_results(body: Mapping[str, Any]) -> tuple[Result, ...]:
    """The tool results that a request ends in, in their order; empty where a human's words come last.

    Reads the conversation from its end, and no further than the call of the tools. ``body`` may be of any of the three
    dialects. What an agent client adds after the results (reminders, the state of the editor) does not count as a
    human's words.
    """
    messages = body.get("messages")
    if isinstance(messages, list):
        return _of_messages(messages)
    items = body.get("input")
    return _of_items(items) if isinstance(items, list) else ()


def matching_rule(rules: Iterable[StepRule], results: Sequence[Result | KnownResult]) -> StepRule | None:
    """The first rule that one of the results meets in all its conditions."""
    return next((rule for rule in rules if any(_meets(result, rule) for result in results)), None)


def _meets(result: Result | KnownResult, rule: StepRule) -> bool:
    """Conditions that are cheap to look up come first."""
    size = result.size
    return (
        (not rule.kind or result.kind in rule.kind)
        and (not rule.tool or _named(result.tool, rule.tool))
        and (rule.larger_than is None or size > rule.larger_than)
        and (rule.smaller_than is None or size < rule.smaller_than)
        and (rule.failed_test is None or result.failed_test == rule.failed_test)
        and (rule.error is None or result.error == rule.error)
    )


def _named(tool: str, patterns: Iterable[str]) -> bool:
    name = tool.lower()
    return any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in patterns)


def _of_messages(messages: Sequence[Any]) -> tuple[Result, ...]:
    """OpenAI's ``tool`` messages and Anthropic's ``tool_result`` parts."""
    found: list[tuple[str, str, bool]] = []  # (id of the call, text, failed), latest first
    named: dict[str, str] = {}
    for message in reversed(messages):
        if not isinstance(message, Mapping):
            break
        role, content = message.get("role"), message.get("content")
        if role in ("tool", "function"):
            call = str(message.get("tool_call_id"))
            if message.get("name"):
                named[call] = str(message["name"])
            found.append((call, text_of(content), False))
        elif role == "assistant":
            named = {**_calls(message), **named}
            break
        elif role == "user":
            if _is_human(content):
                return () if not found else _results(found, named)
            for part in reversed(_parts(content)):
                if part.get("type") == "tool_result":
                    text = text_of(part.get("content"))
                    found.append((str(part.get("tool_use_id")), text, bool(part.get("is_error"))))
    return _results(found, named)


def _calls(message: Mapping[str, Any]) -> dict[str, str]:
    """The tools that an assistant's message calls: id → name."""
    calls: dict[str, str] = {}
    for call in _parts(message.get("tool_calls")):
        function = call.get("function") or call.get("custom")
        if isinstance(function, Mapping):
            calls[str(call.get("id"))] = str(function.get("name") or "")
    for part in _parts(message.get("content")):
        if part.get("type") == "tool_use":
            calls[str(part.get("id"))] = str(part.get("name") or "")
    return calls


def _of_items(items: Sequence[Any]) -> tuple[Result, ...]:
    """The input items of OpenAI's Responses dialect."""
    found: list[tuple[str, str, bool]] = []
    named: dict[str, str] = {}
    for item in reversed(items):
        if not isinstance(item, Mapping):
            break
        kind = str(item.get("type") or "message")
        if kind in _OUTPUTS:
            if named:  # the results of an earlier step
                break
            found.append((str(item.get("call_id")), text_of(item.get("output")), False))
        elif kind in ("function_call", "custom_tool_call"):
            named[str(item.get("call_id"))] = str(item.get("name") or "")
        elif kind == "message" and item.get("role") == "user":
            content = item.get("content")
            if _is_human(content):
                break
        elif item.get("role") == "assistant":
            break
    return _results(found, named)


def _results(found: Sequence[tuple[str, str, bool]], named: Mapping[str, str]) -> tuple[Result, ...]:
    return tuple(Result(named.get(call, ""), text, failed) for call, text, failed in reversed(found))


def _is_human(content: Any) -> bool:
    """Whether a user's message holds a human's words, or an image; not only what a client adds, and tool results."""
    told = ("text", "input_text", "tool_result")
    if any(part.get("type") not in told for part in _parts(content)):
        return True
    text = text_of(content).lstrip()
    # What a client adds stands in tags: only a text that begins with one has to be looked through.
    return bool(text) and (text[0] != "<" or bool(strip_harness(text)))


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
