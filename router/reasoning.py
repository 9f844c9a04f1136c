"""Whose reasoning a conversation holds, and what of it may go to the model that answers next.

A model's reasoning is of use to its own family alone: other providers refuse its signatures and encrypted items, or
read its text as if it were part of the answer. So before a request is sent, the reasoning of every other family is
taken out of it, and nothing else is changed.

Whose a piece is, its shape tells where it has one: a signed ``thinking`` block is Anthropic's, a thought signature
Google's, an item whose ``encrypted_content`` is a Fernet token OpenAI's, an entry of ``reasoning_details`` names its
``format``; and what the router itself put into another dialect carries the family with it (:func:`seal`). Plain
text (``reasoning_content``, ``reasoning``) has no shape. Then a shaped piece in the same message decides, else the
families that answered in this session; where nobody knows those, plain text is kept for families that read it and
dropped for those that refuse or ignore it.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.policy import Target

ANTHROPIC = "anthropic"
OPENAI = "openai"
GOOGLE = "google"

# litellm carries Gemini's thought signatures in the id of a tool call, behind this.
THOUGHT = "__thought__"

# The families whose reasoning always has a shape. Plain text is not theirs, and they have no use for it.
_SHAPED = frozenset((ANTHROPIC, OPENAI, GOOGLE))
# What a model's name says of its family; the first that fits.
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (family, re.compile(pattern, re.IGNORECASE))
    for family, pattern in (
        ("gpt-oss", r"gpt-oss"),  # OpenAI's, but open: its reasoning is plain text
        (ANTHROPIC, r"claude"),
        (OPENAI, r"(?:^|/)(?:gpt|chatgpt|codex|o\d)(?:\b|[-_])"),
        (GOOGLE, r"gemini"),
        ("deepseek", r"deepseek"),
        ("qwen", r"qwen|qwq"),
        ("moonshot", r"kimi|moonshot"),
        ("zai", r"(?:^|/)(?:z-)?glm|zai"),
        ("xai", r"grok"),
        ("mistral", r"mistral|ministral|magistral|devstral|codestral"),
        ("minimax", r"minimax"),
        ("meta", r"llama"),
    )
)
# What else people call a family.
_ALIASES = {
    "claude": ANTHROPIC,
    "gpt": OPENAI,
    "chatgpt": OPENAI,
    "codex": OPENAI,
    "gemini": GOOGLE,
    "kimi": "moonshot",
    "glm": "zai",
    "grok": "xai",
    "llama": "meta",
}
_FORMATS = ((ANTHROPIC, "anthropic"), (OPENAI, "openai"), (GOOGLE, "google"), ("xai", "xai"))
# A Fernet token: OpenAI's encrypted reasoning.
_FERNET = "gAAAA"
# Anthropic's signatures and redacted thinking are one long protocol buffer, whose first byte makes base64's E. Others
# that speak its dialect sign with something short.
_SIGNATURE = re.compile(r"E[A-Za-z0-9+/_=-]{31,}")

_SEAL = "router:1:"
_PLAIN_FIELDS = ("reasoning_content", "reasoning")
_THINKING = ("thinking", "redacted_thinking")
_HOLDERS = frozenset(("extra_content", "provider_specific_fields"))
_FIELDS = frozenset(
    (*_PLAIN_FIELDS, "thinking_blocks", "reasoning_details", "reasoning_items", "provider_specific_fields")
)


def family_of(target: Target) -> str:
    """The target's family: as the policy names it, else by the model's name, else the name itself."""
    if target.family is None:
        return _named_family(target.model)
    family = target.family.lower()
    return _ALIASES.get(family, family)


@functools.lru_cache(maxsize=256)
def _named_family(model: str) -> str:
    return next((family for family, name in _NAMES if name.search(model)), model.lower())


def seal(family: str, content: Mapping[str, Any] | None = None) -> str:
    """A family's reasoning as one word that fits where a signature or encrypted content stands."""
    payload = b"" if content is None else json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return f"{_SEAL}{family}:{base64.urlsafe_b64encode(payload).decode()}"


def unseal(text: Any) -> tuple[str, dict[str, Any]] | None:
    """What :func:`seal` sealed: the family and the content; None where the text is something else."""
    if not isinstance(text, str) or not text.startswith(_SEAL):
        return None
    family, _, payload = text.removeprefix(_SEAL).rpartition(":")
    try:
        content = json.loads(base64.urlsafe_b64decode(payload)) if payload else {}
    except ValueError:
        return None
    return (family, content) if isinstance(content, dict) else None


def keep_own(
    dialect: str, body: dict[str, Any], family: str, seen: frozenset[str] | None = None
) -> dict[str, Any]:
    """The body without the reasoning of other families than ``family``; the same object where it holds none.

    Parameters
    ----------
    dialect : str
        ``chat``, ``messages`` or ``responses``: that of the body.
    body : dict
        As the client sent it; not changed.
    family : str
        Of the target that it goes to.
    seen : frozenset of str, optional
        The families that have answered in this session, where somebody knows.

    Returns
    -------
    dict
        Messages, blocks and items that hold other reasoning are left out whole; a message of which nothing is left too.
    """
    field, keep = _KEEPERS[dialect]
    entries = body.get(field)
    if not isinstance(entries, list):
        return body
    context = _Context(family, seen)
    kept = []
    changed = False
    for entry in entries:
        left = keep(entry, context)
        changed = changed or left is not entry
        if left is not None:
            kept.append(left)
    return {**body, field: kept} if changed else body


def without_stranded_thinking(body: dict[str, Any]) -> dict[str, Any]:
    """A body of ``/v1/messages`` without ``thinking`` where the turn that goes on began without it.

    With a thinking budget, Anthropic refuses a turn whose tool calls do not follow a thinking block, which is so
    where another family made the calls. The same object where nothing needs to go.
    """
    thinking = body.get("thinking")
    if not isinstance(thinking, Mapping) or thinking.get("type") != "enabled":
        return body
    turns = [message for message in body.get("messages", ()) if isinstance(message, Mapping)]
    last = next((message for message in reversed(turns) if message.get("role") == "assistant"), None)
    if last is None or turns[-1] is last or not _answers_tools(turns[-1]):
        return body
    blocks = last.get("content")
    if not isinstance(blocks, list) or not blocks or _type(blocks[0]) in _THINKING:
        return body
    left = {field: value for field, value in body.items() if field != "thinking"}
    management = left.get("context_management")
    if isinstance(management, Mapping) and isinstance(management.get("edits"), list):
        # Clearing old thinking is refused where there is no thinking.
        edits = [edit for edit in management["edits"] if not str(_type(edit)).startswith("clear_thinking")]
        left["context_management"] = {**management, "edits": edits} if edits else None
    return left


@dataclass(frozen=True, slots=True)
class _Context:
    """Where a body goes, and who has answered so far."""

    family: str
    seen: frozenset[str] | None

    def keeps(self, shape: str | None) -> bool:
        """Whether a piece of reasoning goes along, given the family that its shape names."""
        if shape is not None:
            return shape == self.family
        if self.seen:
            # Families with shapes leave no plain text, unless they are all that was seen.
            writers = self.seen - _SHAPED or self.seen
            return writers <= {self.family}
        return self.family not in _SHAPED


def _family_of_block(block: Mapping[str, Any], context: _Context) -> str | None:
    """The family of a ``thinking`` or ``redacted_thinking`` block."""
    signature = block.get("signature") or block.get("data")
    if not isinstance(signature, str) or not signature:
        return None
    sealed = unseal(signature)
    if sealed:
        return sealed[0]
    if _SIGNATURE.fullmatch(signature):
        return ANTHROPIC
    if context.seen:
        if ANTHROPIC in context.seen:
            return ANTHROPIC
        return next(iter(context.seen)) if len(context.seen) == 1 else None
    # Rather a form of signature that is not known here than a turn that Anthropic refuses without its thinking.
    return ANTHROPIC if context.family == ANTHROPIC else None


def _family_of_item(item: Mapping[str, Any]) -> str | None:
    """The family of a ``reasoning`` item of Responses."""
    encrypted = item.get("encrypted_content")
    sealed = unseal(encrypted)
    if sealed:
        return sealed[0]
    if isinstance(encrypted, str) and encrypted.startswith(_FERNET):
        return OPENAI
    return None


def _family_of_detail(detail: Any) -> str | None:
    """The family of an entry of ``reasoning_details``."""
    form = str(detail.get("format") or "") if isinstance(detail, Mapping) else ""
    return next((family for family, word in _FORMATS if word in form), None)


def _keep_in_chat(message: Any, context: _Context) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    if role == "tool":
        return _plain_id(message, "tool_call_id", context)
    # Most messages hold none, and a long conversation has many.
    if role != "assistant" or not _may_reason(message):
        return message
    left = dict(message)
    shapes = list(_shapes(message, context))
    for field, of in (
        ("thinking_blocks", lambda block: _family_of_block(block, context)),
        ("reasoning_details", _family_of_detail),
        ("reasoning_items", _family_of_item),
    ):
        entries = message.get(field)
        if isinstance(entries, list):
            mine = [
                entry
                for entry in entries
                if context.keeps(_decided(of(entry) if isinstance(entry, Mapping) else None, shapes))
            ]
            if len(mine) != len(entries):
                left[field] = mine
                if not mine:
                    del left[field]
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part
            for part in content
            if _type(part) not in _THINKING
            or context.keeps(_decided(_family_of_block(part, context), shapes))
        ]
        if len(parts) != len(content):
            left["content"] = parts or None
    for field in _PLAIN_FIELDS:
        if message.get(field) and not context.keeps(_decided(None, shapes)):
            del left[field]
    if isinstance(message.get("provider_specific_fields"), Mapping) and not context.keeps(GOOGLE):
        left["provider_specific_fields"] = _without_signatures(message["provider_specific_fields"])
    calls = message.get("tool_calls")
    if isinstance(calls, list) and not context.keeps(GOOGLE):
        left["tool_calls"] = [_without_signature(call) for call in calls]
    if left == message:
        return message
    if not left.get("content") and not any(
        left.get(field) for field in ("tool_calls", "function_call", "refusal", "audio")
    ):
        return message if not message.get("content") and not _had_reasoning(message) else None
    return left


def _may_reason(message: dict[str, Any]) -> bool:
    """Whether an assistant's message has any place where reasoning may stand."""
    if isinstance(message.get("content"), list) or not _FIELDS.isdisjoint(message):
        return True
    calls = message.get("tool_calls")
    return isinstance(calls, list) and any(map(_is_signed, calls))


def _is_signed(call: Any) -> bool:
    """Whether a tool call may carry a thought signature."""
    if not isinstance(call, dict):
        return False
    function = call.get("function")
    return (
        THOUGHT in str(call.get("id"))
        or not _HOLDERS.isdisjoint(call)
        or (isinstance(function, dict) and not _HOLDERS.isdisjoint(function))
    )


def _had_reasoning(message: Mapping[str, Any]) -> bool:
    return any(
        message.get(field)
        for field in (*_PLAIN_FIELDS, "thinking_blocks", "reasoning_details", "reasoning_items")
    )


def _decided(shape: str | None, shapes: Sequence[str]) -> str | None:
    """A piece's family: by its own shape, else by the others of its message where those agree."""
    return shape or (shapes[0] if len(set(shapes)) == 1 else None)


def _shapes(message: Mapping[str, Any], context: _Context) -> Iterator[str]:
    """The families that the shapes in a chat message name."""
    content = message.get("content")
    blocks = [*(message.get("thinking_blocks") or ()), *(content if isinstance(content, list) else ())]
    found = [_family_of_block(block, context) for block in blocks if _type(block) in _THINKING]
    found += [_family_of_detail(detail) for detail in message.get("reasoning_details") or ()]
    found += [
        _family_of_item(item) for item in message.get("reasoning_items") or () if isinstance(item, Mapping)
    ]
    if any(_without_signature(call) is not call for call in message.get("tool_calls") or ()):
        found.append(GOOGLE)
    yield from (family for family in found if family is not None)


def _without_signature(call: Any) -> Any:
    """A tool call without Google's thought signature."""
    if not _is_signed(call):
        return call
    left = dict(call)
    if isinstance(call.get("id"), str):
        left["id"] = call["id"].split(THOUGHT, 1)[0]
    holders = [left]
    if isinstance(call.get("function"), Mapping):
        left["function"] = dict(call["function"])
        holders.append(left["function"])
    for holder in holders:
        extra = holder.get("extra_content")
        if isinstance(extra, Mapping) and GOOGLE in extra:
            holder["extra_content"] = {key: value for key, value in extra.items() if key != GOOGLE}
            if not holder["extra_content"]:
                del holder["extra_content"]
        fields = holder.get("provider_specific_fields")
        if isinstance(fields, Mapping):
            holder["provider_specific_fields"] = _without_signatures(fields)
            if not holder["provider_specific_fields"]:
                del holder["provider_specific_fields"]
    return call if left == call else left


def _without_signatures(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if not key.startswith("thought_signature")}


def _plain_id(entry: Mapping[str, Any], field: str, context: _Context) -> Mapping[str, Any]:
    """An entry whose tool call's id carries no signature, unless it may."""
    given = entry.get(field)
    if not isinstance(given, str) or THOUGHT not in given or context.keeps(GOOGLE):
        return entry
    return {**entry, field: given.split(THOUGHT, 1)[0]}


def _keep_in_messages(message: Any, context: _Context) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = message["content"]
    left = []
    for block in content:
        if _type(block) in _THINKING and not context.keeps(_family_of_block(block, context)):
            continue
        if _type(block) == "tool_use":
            block = _plain_id(block, "id", context)
        elif _type(block) == "tool_result":
            block = _plain_id(block, "tool_use_id", context)
        left.append(block)
    if len(left) == len(content) and all(new is old for new, old in zip(left, content, strict=True)):
        return message
    return {**message, "content": left} if left else None


def _keep_in_responses(item: Any, context: _Context) -> Any:
    if not isinstance(item, dict):
        return item
    if item.get("type") == "reasoning":
        return item if context.keeps(_family_of_item(item)) else None
    return _plain_id(item, "call_id", context)


def _type(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _answers_tools(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(_type(block) == "tool_result" for block in content)


_KEEPERS: dict[str, tuple[str, Callable[[Any, _Context], Any]]] = {
    "chat": ("messages", _keep_in_chat),
    "messages": ("messages", _keep_in_messages),
    "responses": ("input", _keep_in_responses),
}
