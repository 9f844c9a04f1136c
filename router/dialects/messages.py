"""Anthropic's messages: ``/v1/messages`` and its ``count_tokens``.

Shapes are those of Anthropic's API reference (messages, streaming, tool use, extended thinking, errors).
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from router.conversation import text_of
from router.dialects.inbound import Inbound, View, ended_by, event
from router.dialects.parts import Part, Parts, Step
from router.errors import RequestError, UpstreamError
from router.reasoning import seal, unseal
from router.schemas import check_messages, read_object, read_stream, wrong
from router.upstream import Usage, usage_of_messages

COUNT_PATH = "/v1/messages/count_tokens"

# The client's headers that a provider of this dialect needs to see.
_HEADERS = ("anthropic-version", "anthropic-beta")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_KINDS = frozenset((*_TYPES.values(), "api_error"))

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = ("enabled", "adaptive", "between_tools")
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
# Fields that have a place in a chat completion, or whose loss changes nothing in what is answered.
_KNOWN = frozenset(
    (
        "cache_control",
        "context_management",
        "inference_geo",
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "output_config",
        "output_format",
        "service_tier",
        "speed",
        "stop_sequences",
        "stream",
        "system",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
    )
)
# Claude Code's first system block differs with every request, and would keep every prompt cache cold.
_BILLING = "x-anthropic-billing-header"


class Messages:
    """``/v1/messages``."""

    name = "messages"
    path = "/v1/messages"

    def read(self, content: bytes, headers: Mapping[str, str]) -> Inbound:
        inbound = self.read_count(content, headers)
        limit = inbound.body.get("max_tokens")
        if limit is None:
            wrong("max_tokens", "is missing")
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            wrong("max_tokens", "must be a whole number of at least 0")
        return inbound

    def read_count(self, content: bytes, headers: Mapping[str, str]) -> Inbound:
        """Read the body of ``count_tokens``: that of a message, which needs no ``max_tokens``."""
        body = read_object(content)
        check_messages(body)
        system = body.get("system")
        if system is not None and not isinstance(system, str) and not _all_objects(system):
            wrong("system", "must be a string or a list of blocks")
        for field in ("thinking", "tool_choice", "output_config"):
            if body.get(field) is not None and not isinstance(body[field], dict):
                wrong(field, "must be an object")
        stops = body.get("stop_sequences")
        if stops is not None and not (
            isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
        ):
            wrong("stop_sequences", "must be a list of strings")
        passed = {name: headers[name] for name in _HEADERS if name in headers}
        return Inbound(self, body, read_stream(body), len(content), passed)

    def to_chat(self, body: Mapping[str, Any], *, marks: bool = False) -> View:
        lost = [field for field, value in body.items() if field not in _KNOWN and value is not None]
        chat: dict[str, Any] = {"messages": list(_messages(body, marks))}
        for field in ("temperature", "top_p", "max_tokens"):
            if body.get(field) is not None:
                chat[field] = body[field]
        if body.get("stop_sequences"):
            chat["stop"] = body["stop_sequences"]
        tools, hosted = _tools(body.get("tools"), marks)
        lost += hosted
        if tools:
            chat["tools"] = tools
            chat |= _tool_choice(body.get("tool_choice"))
        output = body.get("output_config")
        output = output if isinstance(output, Mapping) else {}
        form = output.get("format") or body.get("output_format")
        if isinstance(form, Mapping):
            schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        effort = _effort(body.get("thinking"), output.get("effort"))
        if effort is not None:
            chat["reasoning_effort"] = effort
        return View(chat, tuple(lost))

    def answer(self, completion: Mapping[str, Any], inbound: Inbound, family: str) -> dict[str, Any]:
        parts = Parts()
        content = [_block(part, family) for part in parts.read(completion)]
        reason, sequence = _stop(parts, inbound)
        return _message(parts) | {
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(parts.usage),
        }

    def writer(self, inbound: Inbound, family: str) -> MessagesWriter:
        return MessagesWriter(inbound, family)

    def usage(self, data: Mapping[str, Any]) -> Usage | None:
        return usage_of_messages(data)

    def error_body(self, error: Exception, request_id: str | None = None) -> dict[str, Any]:
        if isinstance(error, RequestError):
            kind, message = _TYPES.get(error.status, "invalid_request_error"), str(error)
        elif isinstance(error, UpstreamError):
            other = "api_error" if error.status >= 500 else "invalid_request_error"
            # A provider of this dialect has said it itself; what other dialects say has other words.
            kind = error.type if error.type in _KINDS else _TYPES.get(error.status, other)
            message = str(error)
        else:
            kind, message = "api_error", "The server had an error while processing the request."
        named = {} if request_id is None else {"request_id": request_id}
        return {"type": "error", "error": {"type": kind, "message": message}, **named}

    def ends(self, events: bytes) -> bool:
        return ended_by(events, "message_stop")

    def error_event(self, error: Exception, first: bytes, last: bytes) -> bytes:
        return event(self.error_body(error))


class MessagesWriter:
    """Anthropic's order: message_start, the blocks one after another, message_delta, message_stop."""

    def __init__(self, inbound: Inbound, family: str) -> None:
        self._inbound = inbound
        self._family = family
        self._parts = Parts()
        self._started = False

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        steps = list(self._parts.feed(chunk))
        return self._start() + b"".join(self._worded(steps))

    def end(self) -> bytes:
        steps = list(self._parts.finish())
        reason, sequence = _stop(self._parts, self._inbound)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return (
            self._start()
            + b"".join(self._worded(steps))
            + event({"type": "message_delta", "delta": delta, "usage": _usage(self._parts.usage)})
            + event({"type": "message_stop"})
        )

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message = _message(self._parts) | {"content": [], "stop_reason": None, "stop_sequence": None}
        # What the prompt took is known at the end alone; message_delta names it.
        message["usage"] = _usage(self._parts.usage) | {"output_tokens": 0}
        return event({"type": "message_start", "message": message})

    def _worded(self, steps: Sequence[tuple[Step, Part, str]]) -> Iterator[bytes]:
        for step, part, text in steps:
            if step == "start":
                block = _empty_block(part)
                yield event({"type": "content_block_start", "index": part.index, "content_block": block})
            elif step == "delta":
                delta = _delta(part, text)
                if delta is not None:
                    yield event({"type": "content_block_delta", "index": part.index, "delta": delta})
            else:
                if part.kind == "reasoning":
                    delta = {"type": "signature_delta", "signature": part.signature or seal(self._family)}
                    yield event({"type": "content_block_delta", "index": part.index, "delta": delta})
                yield event({"type": "content_block_stop", "index": part.index})


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Input tokens of a request, estimated: a token for four characters, 1,500 for an image or document.

    Four characters is what English prose and code come to with the tokenizers in use; it is no count.
    """
    chat = MESSAGES.to_chat(body).body
    characters, pictures = 0, 0
    for message in chat["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else ()
        pictures += sum(part.get("type") not in ("text",) for part in parts)
        characters += len(text_of(content)) + len(str(message.get("tool_calls") or ""))
        characters += len(str(message.get("reasoning_content") or "")) + 12  # what marks a message's bounds
    characters += len(json.dumps(chat["tools"], ensure_ascii=False)) if "tools" in chat else 0
    return max(1, math.ceil(characters / 4) + 1_500 * pictures)


def _messages(body: Mapping[str, Any], marks: bool) -> Iterator[dict[str, Any]]:
    system = body.get("system")
    if isinstance(system, list):
        system = [block for block in system if not _is_billing(block)]
    words = _content([_part(block, marks) for block in _blocks(system)])
    if words:
        yield {"role": "system", "content": words}
    for message in body.get("messages", ()):
        blocks = _blocks(message.get("content"))
        if message.get("role") == "assistant":
            yield from _assistant(blocks)
        elif message.get("role") == "user":
            yield from _user(blocks, marks)
        else:
            yield {"role": "system", "content": _content([_part(block, marks) for block in blocks]) or ""}


def _user(blocks: Sequence[Mapping[str, Any]], marks: bool) -> Iterator[dict[str, Any]]:
    """Tool results first, each a message: chat wants them right behind the calls. Their images cannot stand in them."""
    rest: list[dict[str, Any] | None] = []
    for block in blocks:
        if block.get("type") != "tool_result":
            rest.append(_part(block, marks))
            continue
        inner = [_part(entry, False) for entry in _blocks(block.get("content"))]
        text = text_of([part for part in inner if part])
        if block.get("is_error") is True and "error" not in text[:200].lower():
            text = f"Error: {text}"
        yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": text}
        pictures = [part for part in inner if part and part["type"] != "text"]
        if pictures:
            rest += [{"type": "text", "text": "What the tool returned beside text:"}, *pictures]
    content = _content(rest)
    if content or not blocks:
        yield {"role": "user", "content": content or ""}


def _assistant(blocks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    texts, thoughts, signed, calls = [], [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": str(block.get("name") or ""), "arguments": arguments}
            calls.append({"id": str(block.get("id") or ""), "type": "function", "function": function})
        elif kind in ("thinking", "redacted_thinking"):
            ours = unseal(block.get("signature")) or not (block.get("signature") or block.get("data"))
            if not ours:
                signed.append(dict(block))
            elif isinstance(block.get("thinking"), str):
                thoughts.append(block["thinking"])
    if texts:
        message["content"] = "\n".join(texts)
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if signed:
        message["thinking_blocks"] = signed
    if len(message) > 2 or message["content"] is not None:
        yield message


def _part(block: Mapping[str, Any], marks: bool) -> dict[str, Any] | None:
    """A block of a user's as a part of a chat message; None for what has no such form."""
    kind, source = block.get("type"), block.get("source")
    source = source if isinstance(source, Mapping) else {}
    part: dict[str, Any] | None = None
    if kind == "text":
        part = {"type": "text", "text": str(block.get("text") or "")}
    elif kind in ("image", "document"):
        part = _attached(str(kind), source, block.get("title"))
    elif kind == "search_result":
        found = "\n".join(str(entry.get("text") or "") for entry in _blocks(block.get("content")))
        part = {"type": "text", "text": f"{block.get('title') or ''}\n{block.get('source') or ''}\n{found}"}
    if part is not None and marks and block.get("cache_control"):
        part["cache_control"] = block["cache_control"]
    return part


def _attached(kind: str, source: Mapping[str, Any], title: Any) -> dict[str, Any] | None:
    """An image or document."""
    form, data = source.get("type"), source.get("data")
    if form == "text":
        return {"type": "text", "text": str(data or "")}
    if form == "content":
        return {"type": "text", "text": text_of([dict(block) for block in _blocks(source.get("content"))])}
    if form == "base64":
        url = f"data:{source.get('media_type') or 'image/png'};base64,{data}"
        if kind == "document":
            return {"type": "file", "file": {"filename": str(title or "document.pdf"), "file_data": url}}
        return {"type": "image_url", "image_url": {"url": url}}
    if form == "url" and kind == "image":
        return {"type": "image_url", "image_url": {"url": str(source.get("url") or "")}}
    return None


def _content(parts: Sequence[dict[str, Any] | None]) -> str | list[dict[str, Any]]:
    """One string where there is nothing but text: not every server takes a list."""
    given = [part for part in parts if part is not None]
    if all(part.keys() == {"type", "text"} for part in given):
        return "\n".join(part["text"] for part in given)
    return given


def _tools(tools: Any, marks: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools in chat's form, and the places of those that only run at Anthropic."""
    translated, hosted = [], []
    for index, tool in enumerate(_blocks(tools)):
        if tool.get("type") not in (None, "custom"):
            hosted.append(f"tools[{index}]")
            continue
        function = {
            "name": str(tool.get("name") or ""),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
            "strict": tool.get("strict"),
        }
        given = {field: value for field, value in function.items() if value is not None}
        entry: dict[str, Any] = {"type": "function", "function": given}
        if marks and tool.get("cache_control"):
            entry["cache_control"] = tool["cache_control"]
        translated.append(entry)
    return translated, hosted


def _tool_choice(choice: Any) -> dict[str, Any]:
    if not isinstance(choice, Mapping):
        return {}
    kind = choice.get("type")
    chosen: dict[str, Any] = {}
    if kind == "tool":
        chosen["tool_choice"] = {"type": "function", "function": {"name": str(choice.get("name") or "")}}
    elif kind in _CHOICES:
        chosen["tool_choice"] = _CHOICES[str(kind)]
    if choice.get("disable_parallel_tool_use") is True:
        chosen["parallel_tool_calls"] = False
    return chosen


def _effort(thinking: Any, effort: Any) -> str | None:
    """OpenAI's word for how much is to be thought. Budgets are cut where litellm cuts them."""
    if not isinstance(thinking, Mapping) or thinking.get("type") not in _THINKING:
        return None
    if isinstance(effort, str) and effort in _EFFORTS:
        return _EFFORTS[effort]
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int):
        return "medium"
    return "low" if budget < 2_048 else "medium" if budget < 8_192 else "high"


def _message(parts: Parts) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": parts.model,
    }


def _block(part: Part, family: str) -> dict[str, Any]:
    block = _empty_block(part)
    if part.kind == "reasoning":
        return block | {"thinking": part.text, "signature": part.signature or seal(family)}
    if part.kind == "call":
        return block | {"input": part.arguments()}
    return block if part.kind == "redacted" else block | {"text": part.text}


def _empty_block(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if part.kind == "redacted":
        return {"type": "redacted_thinking", "data": part.text}
    if part.kind == "call":
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    return {"type": "text", "text": ""}


def _delta(part: Part, text: str) -> dict[str, Any] | None:
    if part.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    if part.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    return None if part.kind == "redacted" else {"type": "text_delta", "text": text}


def _stop(parts: Parts, inbound: Inbound) -> tuple[str, str | None]:
    """Why the answer ended, and the stop sequence where the provider told which."""
    if any(part.kind == "refusal" for part in parts.done):
        return "refusal", None
    if parts.matched is not None and parts.matched in (inbound.body.get("stop_sequences") or ()):
        return "stop_sequence", parts.matched
    reason = _STOP_REASONS.get(parts.finish_reason or "stop", "end_turn")
    # Some servers end a call with "stop".
    return ("tool_use" if parts.called and reason == "end_turn" else reason), None


def _usage(usage: Usage | None) -> dict[str, Any]:
    usage = usage or Usage(0, 0)
    return {
        "input_tokens": max(usage.input - usage.cached - usage.cache_write, 0),
        "output_tokens": usage.output,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": usage.cache_write,
    }


def _blocks(content: Any) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []


def _all_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _is_billing(block: Any) -> bool:
    return isinstance(block, Mapping) and str(block.get("text") or "").startswith(_BILLING)


MESSAGES = Messages()
