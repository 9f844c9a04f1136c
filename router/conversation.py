"""A request's messages → the text the classifier reads and the state of the conversation.

Agents wrap a short ask in a long system prompt, harness blocks and tool results. None of that says how hard
the ask is, and it drowns what does, so it is removed here, once, for training and serving alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# The rule for long prompts: the classifier reads at most this many characters. Of a longer text it reads the
# head and the tail, where the ask stands; `Prompt.characters` keeps the full length, which is a feature too.
TEXT_BUDGET = 8_000
# Of that, what the human turns before the latest may fill. They are cut first.
HISTORY_BUDGET = 2_000

ToolResult = Literal["none", "read", "edit", "run", "web", "other"]

# Blocks that agent clients put around the human's ask. Their content is dropped.
_HARNESS_BLOCKS = (
    "system-reminder",
    "system_reminder",
    "environment_details",
    "environment_context",
    "additional_data",
    "attached_files",
    "attached-files",
    "open_and_recently_viewed_files",
    "project_layout",
    "git_status",
    "gitStatus",
    "user_info",
    "user_rules",
    "available_skills",
    "slash_commands",
    "local-command-stdout",
    "local-command-caveat",
    "command-name",
    "command-message",
    "custom_instructions",
    "user_instructions",
    "workspace_info",
    "editorContext",
    "reminderInstructions",
    "ide_opened_file",
    "ide_selection",
)
# Blocks that hold the ask itself: the tags go, the content stays.
_ASK_BLOCKS = (
    "task",
    "user_query",
    "user_message",
    "userRequest",
    "user_request",
    "feedback",
    "command-args",
    "query",
    "user-prompt",
)
# The name must end where the tag does or at white space: <rules> is not <rules-of-chess>.
_OPENING = {
    name: re.compile(rf"<{re.escape(name)}(?:\s[^<>]*)?/?>", re.IGNORECASE) for name in _HARNESS_BLOCKS
}
_CLOSING = {name: re.compile(rf"</{re.escape(name)}>", re.IGNORECASE) for name in _HARNESS_BLOCKS}
_ASK_TAG = re.compile(rf"</?(?:{'|'.join(map(re.escape, _ASK_BLOCKS))})(?:\s[^<>]*)?>", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n{3,}")

_READ_TOOL = re.compile(r"read|cat|view|open|list|ls|glob|grep|search|find|fetch_file|get_", re.IGNORECASE)
_EDIT_TOOL = re.compile(r"edit|write|replace|patch|create|insert|delete|apply", re.IGNORECASE)
_RUN_TOOL = re.compile(r"bash|shell|exec|run|command|terminal|test|python|code", re.IGNORECASE)
_WEB_TOOL = re.compile(r"web|browse|http|url|fetch", re.IGNORECASE)
_ERROR = re.compile(
    r"traceback \(most recent call last\)|(?:^|\W)(?:error|exception|fatal|panic)\b[:\s]|command not found|"
    r"no such file|permission denied|exit (?:code|status) [1-9]|returned non-zero",
    re.IGNORECASE | re.MULTILINE,
)
_FAILED_TEST = re.compile(
    r"\b[1-9]\d* (?:failed|failures?|failing)\b|^(?:FAILED|FAIL|not ok)\b|--- FAIL:|AssertionError|✗|✕",
    re.MULTILINE,
)
# One of these stands in whatever these expressions find; to look for them first takes a twentieth of the time.
_ERROR_WORDS = (
    "traceback",
    "error",
    "exception",
    "fatal",
    "panic",
    "command not found",
    "no such file",
    "permission denied",
    "exit code",
    "exit status",
    "non-zero",
)
_FAILED_TEST_WORDS = ("fail", "FAIL", "not ok", "AssertionError", "✗", "✕")
# A tool result can be megabytes; errors and summaries stand at its ends.
_RESULT_WINDOW = 4_000


@dataclass(frozen=True, slots=True)
class ConversationState:
    """Where in a conversation a request stands; what an agent's step looks like without its text.

    Attributes
    ----------
    turns : int
        Human messages, the latest included. 1 for a single prompt.
    depth : int
        All messages, system messages left out.
    characters : int
        Characters of all messages: the size of the context.
    tools_offered : int
        Tools that the request offers.
    tool_results : int
        Tool results so far.
    last_result : str
        What kind of tool the last message reports on; ``"none"`` where it is not a tool result.
    last_result_characters : int
        Its size.
    last_result_error, last_result_failed_test : bool
        Whether it reads like an error, or like a failed test.
    """

    turns: int = 1
    depth: int = 1
    characters: int = 0
    tools_offered: int = 0
    tool_results: int = 0
    last_result: ToolResult = "none"
    last_result_characters: int = 0
    last_result_error: bool = False
    last_result_failed_test: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks: the text within the budget, and the conversation's state.

    Attributes
    ----------
    text : str
        At most ``TEXT_BUDGET`` characters (and the mark of a cut).
    characters : int
        Length of the ask before it was cut.
    state : ConversationState
    """

    text: str
    characters: int
    state: ConversationState = field(default_factory=ConversationState)

    @property
    def truncated(self) -> bool:
        """Whether the classifier reads less than the whole ask."""
        return self.characters > len(self.text)


def prompt_from_text(text: str) -> Prompt:
    """A single human message as a prompt; harness blocks in it are stripped, unless nothing else is there."""
    ask = strip_harness(text) or text.strip()
    return Prompt(
        text=cut(ask, TEXT_BUDGET),
        characters=len(ask),
        state=ConversationState(characters=len(text)),
    )


def prompt_from_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> Prompt:
    """The latest human ask with the human turns before it, and the state of the conversation.

    Parameters
    ----------
    messages : sequence of mapping
        OpenAI chat messages. Content may be a string, a list of parts, or null. ``tool_result`` parts inside
        user messages (Anthropic's form) count as tool results.
    tools : sequence of mapping, optional
        The tools that the request offers.

    Notes
    -----
    The ask comes first in the text, the turns before it follow, latest first: an encoder with a short window
    reads what matters most. A conversation without any human text (a bare system prompt, say) yields the text
    of its last message, so that something is read.
    """
    human: list[str] = []
    state = _State()
    for message in messages:
        state.see(message)
        if message.get("role") == "user":
            ask = strip_harness(text_of(message.get("content")))
            if ask:
                human.append(ask)
    if not human and messages:
        last = strip_harness(text_of(messages[-1].get("content")))
        human = [last] if last else []
    ask = human[-1] if human else ""
    text = cut(ask, TEXT_BUDGET)
    room = min(HISTORY_BUDGET, TEXT_BUDGET - len(text) - 2)  # 2: the blank line between turns
    for earlier in reversed(human[:-1]):
        if room < 40:  # less than a short sentence adds nothing
            break
        piece = cut(earlier, room)
        text += "\n\n" + piece
        room -= len(piece) + 2
    return Prompt(text=text, characters=max(len(ask), len(text)), state=state.finish(len(human), tools))


def strip_harness(text: str) -> str:
    """Remove the blocks that agent clients put around an ask; linear in the length of the text.

    A harness block that is never closed is left in place: it may be what the human is asking about.
    """
    if "<" not in text:
        return text.strip()
    lowered = text.lower()
    for name, opening in _OPENING.items():
        if f"<{name.lower()}" in lowered:
            text = _without_block(text, opening, _CLOSING[name])
    text = _ASK_TAG.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _without_block(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    # Positions in text.lower() would not be those in text: some capitals lower to two characters.
    kept: list[str] = []
    position = 0
    while (start := opening.search(text, position)) is not None:
        # A self-closing tag is a block of its own.
        end = start if start.group().endswith("/>") else closing.search(text, start.end())
        if end is None:
            break
        kept.append(text[position : start.start()])
        position = end.end()
    kept.append(text[position:])
    return "".join(kept)


def cut(text: str, budget: int) -> str:
    """At most ``budget`` characters: the whole text, or its head and its tail around a mark."""
    if len(text) <= budget:
        return text
    mark = "\n…\n"
    head = (budget - len(mark) + 1) // 2
    return text[:head] + mark + text[len(text) - (budget - len(mark) - head) :]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list (images and results left out)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = (
        part.get("text")
        for part in content
        if isinstance(part, Mapping) and part.get("type") in ("text", "input_text")
    )
    return "\n".join(part for part in parts if isinstance(part, str))


class _State:
    """Collects a :class:`ConversationState` in one pass over the messages."""

    def __init__(self) -> None:
        self.depth = 0
        self.characters = 0
        self.tool_results = 0
        self.names: dict[str, str] = {}  # tool call id → tool name
        self.last: tuple[str, str] | None = (
            None  # (tool name, result text) where the last message is a result
        )

    def see(self, message: Mapping[str, Any]) -> None:
        content = message.get("content")
        self.characters += len(text_of(content))
        if message.get("role") in ("system", "developer"):
            return
        self.depth += 1
        self.last = None
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                self.names[str(call.get("id"))] = str(function.get("name") or "")
                self.characters += len(str(function.get("arguments") or ""))
        if message.get("role") in ("tool", "function"):
            name = message.get("name") or self.names.get(str(message.get("tool_call_id")), "")
            self._result(str(name), text_of(content))
        elif isinstance(content, Sequence) and not isinstance(content, str):
            for part in content:
                if not isinstance(part, Mapping):
                    continue
                if part.get("type") == "tool_use":
                    self.names[str(part.get("id"))] = str(part.get("name") or "")
                elif part.get("type") == "tool_result":
                    result = text_of(part.get("content"))
                    self.characters += len(result)
                    self._result(self.names.get(str(part.get("tool_use_id")), ""), result)

    def _result(self, name: str, text: str) -> None:
        self.tool_results += 1
        self.last = (name, text)

    def finish(self, turns: int, tools: Sequence[Mapping[str, Any]] | None) -> ConversationState:
        name, result = self.last or ("", "")
        return ConversationState(
            turns=turns,
            depth=self.depth,
            characters=self.characters,
            tools_offered=len(tools or ()),
            tool_results=self.tool_results,
            last_result=kind_of_tool(name) if self.last else "none",
            last_result_characters=len(result),
            last_result_error=reads_like_error(result),
            last_result_failed_test=reads_like_failed_test(result),
        )


def reads_like_error(result: str) -> bool:
    """Whether a tool's result reads like an error; of a long one its ends are read."""
    ends = cut(result, _RESULT_WINDOW)
    lowered = ends.lower()
    return any(word in lowered for word in _ERROR_WORDS) and bool(_ERROR.search(ends))


def reads_like_failed_test(result: str) -> bool:
    """Whether a tool's result reads like a failed test; of a long one its ends are read."""
    ends = cut(result, _RESULT_WINDOW)
    return any(word in ends for word in _FAILED_TEST_WORDS) and bool(_FAILED_TEST.search(ends))


def kind_of_tool(name: str) -> ToolResult:
    """What kind of tool has this name."""
    # Order matters: "fetch_url" is web before it is read, "edit_file" edits though it names a file.
    if _WEB_TOOL.search(name):
        return "web"
    if _EDIT_TOOL.search(name):
        return "edit"
    if _RUN_TOOL.search(name):
        return "run"
    if _READ_TOOL.search(name):
        return "read"
    return "other"
