"""OpenAI's responses, without their memory: every request carries its whole conversation.

Shapes are those of OpenAI's API reference (responses, streaming events).
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from router.conversation import text_of
from router.dialects.inbound import Inbound, View, ended_by, event
from router.dialects.parts import Part, Parts, Step
from router.errors import RequestError, UpstreamError
from router.reasoning import seal, unseal
from router.schemas import error_body, read_object, read_stream, wrong
from router.upstream import Usage, usage_of_responses

# Fields that need what OpenAI keeps of earlier requests, and what to do instead.
_STATEFUL = {
    "store": "this server keeps no responses: leave it out, or set it to false",
    "background": "this server keeps no responses: leave it out, or set it to false",
    "previous_response_id": "this server keeps no responses: send the whole conversation as 'input'",
    "conversation": "this server keeps no conversations: send the whole conversation as 'input'",
    "prompt": "this server keeps no prompts: send its text as 'instructions' and 'input'",
}
# Fields that have a place in a chat completion, or whose loss changes nothing in what is answered.
_KNOWN = frozenset(
    (
        "client_metadata",
        "include",
        "input",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "model",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "stream",
        "stream_options",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
        *_STATEFUL,
    )
)
_NUMBER = re.compile(rb'"sequence_number":\s*(\d+)')
_FINISHED = {"length": "max_output_tokens", "content_filter": "content_filter"}
# The field of a call that holds the text for a tool which takes text instead of JSON.
_FREE_TEXT = "input"


class Responses:
    """``/v1/responses``."""

    name = "responses"
    path = "/v1/responses"

    def read(self, content: bytes, headers: Mapping[str, str]) -> Inbound:
        body = read_object(content)
        for field, advice in _STATEFUL.items():
            if body.get(field):
                raise RequestError(f"'{field}': {advice}.", param=field, code="unsupported_parameter")
        _check_input(body.get("input"))
        if body.get("instructions") is not None and not isinstance(body["instructions"], str):
            wrong("instructions", "must be a string")
        tools = body.get("tools")
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        ):
            wrong("tools", "must be a list of objects")
        for field in ("reasoning", "text"):
            if body.get(field) is not None and not isinstance(body[field], dict):
                wrong(field, "must be an object")
        limit = body.get("max_output_tokens")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            wrong("max_output_tokens", "must be a whole number of at least 1")
        return Inbound(self, body, read_stream(body), len(content))

    def to_chat(self, body: Mapping[str, Any], *, marks: bool = False) -> View:
        lost = [field for field, value in body.items() if field not in _KNOWN and value is not None]
        chat: dict[str, Any] = {"messages": _messages(body)}
        for field, chats in (
            ("temperature", "temperature"),
            ("top_p", "top_p"),
            ("max_output_tokens", "max_tokens"),
        ):
            if body.get(field) is not None:
                chat[chats] = body[field]
        tools, hosted = _tools(body.get("tools"))
        lost += hosted
        if tools:
            chat["tools"] = tools
            chat |= _tool_choice(body.get("tool_choice"), tools)
            if body.get("parallel_tool_calls") is not None:
                chat["parallel_tool_calls"] = body["parallel_tool_calls"]
        text = body.get("text")
        form = text.get("format") if isinstance(text, Mapping) else None
        if isinstance(form, Mapping) and form.get("type") == "json_schema":
            schema = {
                key: form[key]
                for key in ("name", "description", "schema", "strict")
                if form.get(key) is not None
            }
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif isinstance(form, Mapping) and form.get("type") == "json_object":
            chat["response_format"] = {"type": "json_object"}
        reasoning = body.get("reasoning")
        if isinstance(reasoning, Mapping) and isinstance(reasoning.get("effort"), str):
            chat["reasoning_effort"] = reasoning["effort"]
        return View(chat, tuple(lost))

    def answer(self, completion: Mapping[str, Any], inbound: Inbound, family: str) -> dict[str, Any]:
        parts = Parts()
        free = _free_text_tools(inbound.body)
        output = [_item(part, _item_id(part, free), family, free) for part in parts.read(completion)]
        return _response(inbound.body, parts, uuid.uuid4().hex, int(time.time())) | _ending(parts, output)

    def writer(self, inbound: Inbound, family: str) -> ResponsesWriter:
        return ResponsesWriter(inbound, family)

    def usage(self, data: Mapping[str, Any]) -> Usage | None:
        return usage_of_responses(data)

    def error_body(self, error: Exception, request_id: str | None = None) -> dict[str, Any]:
        return error_body(error)

    def ends(self, events: bytes) -> bool:
        return ended_by(events, "response.completed", "response.incomplete")

    def error_event(self, error: Exception, first: bytes, last: bytes) -> bytes:
        told = error_body(error)["error"]
        limited = isinstance(error, UpstreamError) and error.status == 429
        code = "rate_limit_exceeded" if limited else "server_error"
        words = {"code": told["code"] or code, "message": told["message"], "param": told["param"]}
        numbers = _NUMBER.findall(last)
        number = int(numbers[-1]) + 1 if numbers else 0
        ended = _told_response(first) | {
            "status": "failed",
            "error": {"code": code, "message": told["message"]},
        }
        return event({"type": "error", **words, "sequence_number": number}) + event(
            {"type": "response.failed", "sequence_number": number + 1, "response": ended}
        )


class ResponsesWriter:
    """OpenAI's order: created, in_progress, each item from added to done, and how it ended; all numbered."""

    def __init__(self, inbound: Inbound, family: str) -> None:
        self._body = inbound.body
        self._family = family
        self._free = _free_text_tools(inbound.body)
        self._parts = Parts()
        self._id = uuid.uuid4().hex
        self._created = int(time.time())
        self._number = 0
        self._ids: list[str] = []
        self._output: list[dict[str, Any]] = []

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        steps = list(self._parts.feed(chunk))
        return self._start() + b"".join(self._worded(steps))

    def end(self) -> bytes:
        steps = list(self._parts.finish())
        worded = self._start() + b"".join(self._worded(steps))
        response = self._response(_ending(self._parts, self._output))
        return worded + self._event(f"response.{response['status']}", response=response)

    def _start(self) -> bytes:
        if self._number:
            return b""
        response = self._response({"status": "in_progress", "output": []})
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _response(self, changes: dict[str, Any]) -> dict[str, Any]:
        return (
            _response(self._body, self._parts, self._id, self._created) | {"output": self._output} | changes
        )

    def _worded(self, steps: Sequence[tuple[Step, Part, str]]) -> Iterator[bytes]:
        for step, part, text in steps:
            if step == "start":
                self._ids.append(_item_id(part, self._free))
            at = {"item_id": self._ids[part.index], "output_index": part.index}
            if step == "start":
                yield from self._added(part, at)
            elif step == "delta":
                yield from self._continued(part, at, text)
            else:
                yield from self._ended(part, at)

    def _added(self, part: Part, at: Mapping[str, Any]) -> Iterator[bytes]:
        item = _open_item(part, at["item_id"], self._free)
        yield self._event("response.output_item.added", output_index=part.index, item=item)
        if part.kind in ("text", "refusal"):
            yield self._event("response.content_part.added", **at, content_index=0, part=_content(part, ""))
        elif part.kind == "reasoning":
            empty = {"type": "summary_text", "text": ""}
            yield self._event("response.reasoning_summary_part.added", **at, summary_index=0, part=empty)

    def _continued(self, part: Part, at: Mapping[str, Any], text: str) -> Iterator[bytes]:
        if part.kind == "text":
            yield self._event("response.output_text.delta", **at, content_index=0, delta=text, logprobs=[])
        elif part.kind == "refusal":
            yield self._event("response.refusal.delta", **at, content_index=0, delta=text)
        elif part.kind == "reasoning":
            yield self._event("response.reasoning_summary_text.delta", **at, summary_index=0, delta=text)
        elif part.kind == "call" and part.name not in self._free:
            yield self._event("response.function_call_arguments.delta", **at, delta=text)

    def _ended(self, part: Part, at: Mapping[str, Any]) -> Iterator[bytes]:
        item = _item(part, at["item_id"], self._family, self._free)
        if part.kind == "text":
            yield self._event("response.output_text.done", **at, content_index=0, text=part.text, logprobs=[])
        elif part.kind == "refusal":
            yield self._event("response.refusal.done", **at, content_index=0, refusal=part.text)
        elif part.kind == "reasoning":
            whole = {"type": "summary_text", "text": part.text}
            yield self._event("response.reasoning_summary_text.done", **at, summary_index=0, text=part.text)
            yield self._event("response.reasoning_summary_part.done", **at, summary_index=0, part=whole)
        elif part.kind == "call" and part.name in self._free:
            # Its text is known when the JSON around it is whole.
            yield self._event("response.custom_tool_call_input.delta", **at, delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", **at, input=item["input"])
        elif part.kind == "call":
            yield self._event(
                "response.function_call_arguments.done", **at, name=part.name, arguments=item["arguments"]
            )
        if part.kind in ("text", "refusal"):
            whole = _content(part, part.text)
            yield self._event("response.content_part.done", **at, content_index=0, part=whole)
        self._output.append(item)
        yield self._event("response.output_item.done", output_index=part.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = event({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return data


def _told_response(first: bytes) -> dict[str, Any]:
    """The response as the first event of its stream told it."""
    data = first.partition(b"data: ")[2].partition(b"\n")[0]
    try:
        response = json.loads(data)["response"]
    except (ValueError, LookupError, TypeError):
        return {}
    return response if isinstance(response, dict) else {}


def _check_input(given: Any) -> None:
    if isinstance(given, str):
        return
    if not isinstance(given, list) or not given:
        wrong("input", "must be a string, or a list with at least one item")
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            wrong(f"input[{index}]", "must be an object")
        kind = item.get("type", "message")
        if kind == "item_reference":
            raise RequestError(
                f"'input[{index}]' refers to an item of an earlier response: this server keeps none; "
                "send the item itself.",
                param=f"input[{index}]",
                code="unsupported_parameter",
            )
        if not isinstance(kind, str):
            wrong(f"input[{index}].type", "must be a string")
        if kind != "message":
            continue
        if not isinstance(item.get("role"), str):
            wrong(f"input[{index}].role", "must be a string")
        content = item.get("content")
        listed = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not listed and not isinstance(content, str):
            wrong(f"input[{index}].content", "must be a string or a list of objects")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turn: dict[str, Any] | None = None  # the assistant's, while its items go on
    pictures: list[dict[str, Any]] = []  # that tools returned: they stand behind the last result
    for item in given or ():
        kind = item.get("type", "message")
        own = kind in ("reasoning", "function_call", "custom_tool_call") or item.get("role") == "assistant"
        if own:
            if turn is None or (kind == "message" and turn["content"] and "tool_calls" not in turn):
                messages += _pictured(pictures)
                turn = {"role": "assistant", "content": None}
                messages.append(turn)
            _continue(turn, item)
            continue
        if kind in ("function_call_output", "custom_tool_call_output"):
            turn = None
            output = item.get("output")
            parts = (
                [_part(part) for part in output if isinstance(part, Mapping)]
                if isinstance(output, list)
                else []
            )
            text = output if isinstance(output, str) else text_of([part for part in parts if part])
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": text})
            pictures += [part for part in parts if part and part["type"] != "text"]
        elif kind == "message":
            turn = None
            messages += _pictured(pictures)
            role = "user" if item.get("role") == "user" else "system"
            messages.append({"role": role, "content": _words(item.get("content"))})
        # What OpenAI's own tools did (searches, pictures, …) has no place in a chat.
    messages += _pictured(pictures)
    return [message for message in messages if len(message) > 2 or message["content"] is not None]


def _continue(turn: dict[str, Any], item: Mapping[str, Any]) -> None:
    """Add an item of the assistant's to its message."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        sealed = unseal(item.get("encrypted_content"))
        blocks = sealed[1].get("thinking_blocks") if sealed else None
        if isinstance(blocks, list):
            turn["thinking_blocks"] = [*turn.get("thinking_blocks", ()), *blocks]
            return
        text = sealed[1].get("text") if sealed else _reasoning_text(item)
        if isinstance(text, str) and text:
            turn["reasoning_content"] = (
                f"{turn['reasoning_content']}\n{text}" if "reasoning_content" in turn else text
            )
        return
    if kind == "message":
        words = text_of(_words(item.get("content")))
        turn["content"] = f"{turn['content']}\n{words}" if turn["content"] else words
        return
    arguments = item.get("arguments")
    if kind == "custom_tool_call":
        arguments = json.dumps({_FREE_TEXT: str(item.get("input") or "")}, ensure_ascii=False)
    function = {
        "name": str(item.get("name") or ""),
        "arguments": arguments if isinstance(arguments, str) else "{}",
    }
    call = {"id": str(item.get("call_id") or ""), "type": "function", "function": function}
    turn["tool_calls"] = [*turn.get("tool_calls", ()), call]


def _reasoning_text(item: Mapping[str, Any]) -> str:
    """What open models leave in the clear; a summary alone is not what the model thought."""
    content = item.get("content")
    if item.get("encrypted_content") or not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _pictured(pictures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The message with what tools returned beside text; takes the pictures."""
    if not pictures:
        return []
    note = {"type": "text", "text": "What the tool returned beside text:"}
    message = {"role": "user", "content": [note, *pictures]}
    pictures.clear()
    return [message]


def _words(content: Any) -> str | list[dict[str, Any]]:
    """One string where there is nothing but text: not every server takes a list."""
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in content or () if isinstance(part, Mapping)]
    given = [part for part in parts if part is not None]
    if all(part["type"] == "text" for part in given):
        return "\n".join(part["text"] for part in given)
    return given


def _part(part: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": str(part.get("text") or "")}
    if kind == "refusal":
        return {"type": "text", "text": str(part.get("refusal") or "")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        image = {"url": part["image_url"]}
        if part.get("detail") in ("low", "high", "auto"):
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image}
    if kind == "input_file" and isinstance(part.get("file_data"), str):
        file = {"filename": str(part.get("filename") or "file"), "file_data": part["file_data"]}
        return {"type": "file", "file": file}
    if kind == "input_audio" and isinstance(part.get("input_audio"), Mapping):
        return {"type": "input_audio", "input_audio": dict(part["input_audio"])}
    return None


def _tools(tools: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools in chat's form, and the places of those that only run at OpenAI."""
    translated, hosted = [], []
    for index, tool in enumerate(tools or ()):
        fields: tuple[str, ...] = ("name", "description", "parameters", "strict")
        if tool.get("type") == "custom":
            fields = ("name", "description")
        elif tool.get("type") != "function":
            hosted.append(f"tools[{index}]")
            continue
        function = {field: tool[field] for field in fields if tool.get(field) is not None}
        if tool.get("type") == "custom":
            function["parameters"] = {
                "type": "object",
                "properties": {_FREE_TEXT: {"type": "string"}},
                "required": [_FREE_TEXT],
            }
            grammar = tool.get("format")
            if isinstance(grammar, Mapping) and isinstance(grammar.get("definition"), str):
                told = (
                    f"'{_FREE_TEXT}' follows this grammar ({grammar.get('syntax')}):\n{grammar['definition']}"
                )
                function["description"] = f"{function.get('description', '')}\n\n{told}".strip()
        translated.append({"type": "function", "function": function})
    return translated, hosted


def _free_text_tools(body: Mapping[str, Any]) -> frozenset[str]:
    """The names of the tools that take text instead of JSON."""
    return frozenset(
        str(tool.get("name")) for tool in body.get("tools") or () if tool.get("type") == "custom"
    )


def _tool_choice(choice: Any, tools: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(choice, str):
        return {"tool_choice": choice}
    if not isinstance(choice, Mapping):
        return {}
    if choice.get("type") in ("function", "custom"):
        return {"tool_choice": {"type": "function", "function": {"name": str(choice.get("name") or "")}}}
    if choice.get("type") == "allowed_tools":
        allowed = {tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, Mapping)}
        kept = [tool for tool in tools if tool["function"].get("name") in allowed]
        return {"tools": kept or tools, "tool_choice": choice.get("mode") or "auto"}
    return {}


def _response(body: Mapping[str, Any], parts: Parts, name: str, created: int) -> dict[str, Any]:
    """A response's own fields; what the client asked for comes back in it."""
    asked = {field: body[field] for field in ("instructions", "max_output_tokens", "user") if field in body}
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "model": parts.model or str(body.get("model") or ""),
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": body.get("truncation") or "disabled",
        "usage": None,
        "user": None,
        "metadata": body.get("metadata") or {},
        **asked,
    }


def _ending(parts: Parts, output: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a response when it has ended."""
    why = _FINISHED.get(parts.finish_reason or "")
    usage = parts.usage or Usage(0, 0)
    return {
        "status": "incomplete" if why else "completed",
        "incomplete_details": {"reason": why} if why else None,
        "output": output,
        "model": parts.model,
        "usage": {
            "input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write},
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": parts.reasoning_tokens},
            "total_tokens": usage.input + usage.output,
        },
    }


def _item_id(part: Part, free: frozenset[str]) -> str:
    kind = {"reasoning": "rs", "redacted": "rs", "call": "ctc" if part.name in free else "fc"}.get(
        part.kind, "msg"
    )
    return f"{kind}_{uuid.uuid4().hex}"


def _open_item(part: Part, name: str, free: frozenset[str]) -> dict[str, Any]:
    """An item as it is when it is added."""
    if part.kind in ("text", "refusal"):
        return {"id": name, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    if part.kind in ("reasoning", "redacted"):
        return {"id": name, "type": "reasoning", "summary": [], "encrypted_content": None}
    call = {"id": name, "call_id": part.id, "name": part.name, "status": "in_progress"}
    if part.name in free:
        return call | {"type": "custom_tool_call", "input": ""}
    return call | {"type": "function_call", "arguments": ""}


def _item(part: Part, name: str, family: str, free: frozenset[str]) -> dict[str, Any]:
    """A whole item. The reasoning of any family comes back sealed, as OpenAI's does encrypted."""
    item = _open_item(part, name, free)
    if part.kind in ("text", "refusal"):
        return item | {"status": "completed", "content": [_content(part, part.text)]}
    if part.kind == "redacted":
        block = {"type": "redacted_thinking", "data": part.text}
        return item | {"encrypted_content": seal(family, {"thinking_blocks": [block]})}
    if part.kind == "reasoning":
        block = {"type": "thinking", "thinking": part.text, "signature": part.signature}
        sealed = seal(family, {"thinking_blocks": [block]} if part.signature else {"text": part.text})
        summary = [{"type": "summary_text", "text": part.text}]
        return item | {"summary": summary, "encrypted_content": sealed}
    if part.name in free:
        arguments = part.arguments()
        text = arguments.get(_FREE_TEXT)
        return item | {"status": "completed", "input": text if isinstance(text, str) else part.text}
    return item | {"status": "completed", "arguments": part.text or "{}"}


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


RESPONSES = Responses()
