"""A chat completion, whole or in chunks, as a sequence of parts: reasoning, text, refusals, tool calls.

Anthropic's messages and OpenAI's responses both tell an answer part by part, each begun, continued and ended before
the next. Chunks of a chat completion promise no such order: calls of several tools may come interleaved.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from router.errors import UpstreamError
from router.reasoning import GOOGLE, THOUGHT
from router.upstream import Usage, usage_of

Kind = Literal["reasoning", "redacted", "text", "refusal", "call"]
Step = Literal["start", "delta", "stop"]


@dataclass(slots=True, eq=False)
class Part:
    """One part of an answer; ``text`` grows while the part is open.

    Attributes
    ----------
    kind : str
    index : int
        Its place in the answer.
    text : str
        The words; of a call its arguments as JSON, of redacted reasoning the encrypted data.
    id, name : str
        Of a call.
    signature : str
        Of signed reasoning.
    """

    kind: Kind
    index: int = -1
    text: str = ""
    id: str = ""
    name: str = ""
    signature: str = ""

    def arguments(self) -> dict[str, Any]:
        """A call's arguments as an object; what is none stands in the field ``raw_arguments``."""
        try:
            arguments = json.loads(self.text or "{}")
        except ValueError:
            arguments = None
        return arguments if isinstance(arguments, dict) else {"raw_arguments": self.text}

    @property
    def complete(self) -> bool:
        """Whether a call's arguments are whole."""
        try:
            json.loads(self.text)
        except ValueError:
            return False
        return True


class Parts:
    """Puts chunks in order. Feed it every chunk, then finish.

    Attributes
    ----------
    done : list of Part
        The parts so far, the open one included.
    finish_reason : str or None
    matched : str or None
        The stop sequence that ended the answer, where the provider tells.
    usage : Usage or None
    reasoning_tokens : int
    model : str
    """

    def __init__(self) -> None:
        self.done: list[Part] = []
        self.finish_reason: str | None = None
        self.matched: str | None = None
        self.usage: Usage | None = None
        self.reasoning_tokens = 0
        self.model = ""
        self._open: Part | None = None
        self._calls: dict[Any, Part] = {}  # by the provider's index; those that wait have no place yet

    def feed(self, chunk: Mapping[str, Any]) -> Iterator[tuple[Step, Part, str]]:
        """The steps that a chunk makes; only the first choice counts."""
        model = chunk.get("model")
        if isinstance(model, str):
            self.model = self.model or model
        self._use(chunk)
        for choice in _objects(chunk.get("choices")):
            if choice.get("index") not in (None, 0):
                continue
            delta = choice.get("delta")
            if isinstance(delta, Mapping):
                yield from self._delta(delta)
            self._finished_by(choice)

    def finish(self) -> Iterator[tuple[Step, Part, str]]:
        """The steps that end the answer."""
        if self.finish_reason is None:
            raise UpstreamError("The provider broke off before the end of its answer.", status=502)
        yield from self._close()
        for call in [call for call in self._calls.values() if call.index < 0]:
            yield from self._begin(call)
            yield from self._close()

    def read(self, completion: Mapping[str, Any]) -> list[Part]:
        """The parts of a whole completion; :class:`router.errors.UpstreamError` where it holds no message."""
        choices = list(_objects(completion.get("choices")))
        message = choices[0].get("message") if choices else None
        if not isinstance(message, Mapping):
            raise UpstreamError("The provider answered without a message.", status=502)
        calls = [{"index": index, **call} for index, call in enumerate(_objects(message.get("tool_calls")))]
        choice = {**choices[0], "index": 0, "delta": {**message, "tool_calls": calls}}
        choice["finish_reason"] = choice.get("finish_reason") or "stop"
        for _ in self.feed({**completion, "choices": [choice]}):
            pass
        for _ in self.finish():
            pass
        return self.done

    @property
    def called(self) -> bool:
        """Whether the answer calls a tool."""
        return bool(self._calls)

    def _use(self, chunk: Mapping[str, Any]) -> None:
        self.usage = usage_of(chunk) or self.usage
        usage = chunk.get("usage")
        details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
        tokens = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
        if isinstance(tokens, int):
            self.reasoning_tokens = tokens

    def _finished_by(self, choice: Mapping[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
        matched = choice.get("stop_reason")  # vLLM's
        if isinstance(matched, str):
            self.matched = matched

    def _delta(self, delta: Mapping[str, Any]) -> Iterator[tuple[Step, Part, str]]:
        blocks = list(_objects(delta.get("thinking_blocks")))
        for block in blocks:
            yield from self._thought(block)
        if not blocks:
            yield from self._text("reasoning", delta.get("reasoning_content") or delta.get("reasoning"))
        yield from self._text("text", _words(delta.get("content")))
        yield from self._text("refusal", delta.get("refusal"))
        for call in _objects(delta.get("tool_calls")):
            yield from self._call(call)

    def _thought(self, block: Mapping[str, Any]) -> Iterator[tuple[Step, Part, str]]:
        """A piece of Anthropic's thinking, as litellm gives it beside the plain text."""
        if block.get("type") == "redacted_thinking":
            yield from self._begin(Part("redacted", text=str(block.get("data") or "")))
            yield from self._close()
            return
        open_ = self._open
        if open_ is None or open_.kind != "reasoning" or (open_.signature and block.get("thinking")):
            yield from self._begin(Part("reasoning"))
            open_ = self._open
        assert open_ is not None
        text = block.get("thinking")
        if isinstance(text, str) and text:
            open_.text += text
            yield "delta", open_, text
        if isinstance(block.get("signature"), str):
            open_.signature += block["signature"]

    def _text(self, kind: Kind, text: Any) -> Iterator[tuple[Step, Part, str]]:
        if not isinstance(text, str) or not text:
            return
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Part(kind))
        assert self._open is not None
        self._open.text += text
        yield "delta", self._open, text

    def _call(self, delta: Mapping[str, Any]) -> Iterator[tuple[Step, Part, str]]:
        # A server that numbers no calls gives each whole.
        key = delta.get("index", delta.get("id") or len(self._calls))
        function = delta.get("function")
        function = function if isinstance(function, Mapping) else {}
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = Part("call", id=_call_id(delta))
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and not call.name:
            call.name = name
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        arguments = arguments if isinstance(arguments, str) else ""
        if call is self._open:
            call.text += arguments
            if arguments:
                yield "delta", call, arguments
            return
        if call.index >= 0:
            if arguments:
                raise UpstreamError("The provider's tool calls cannot be put in order.", status=502)
            return
        call.text += arguments
        # A call that is not whole may still go on: the next one waits until it is.
        if call.name and (self._open is None or self._open.kind != "call" or self._open.complete):
            yield from self._begin(call)

    def _begin(self, part: Part) -> Iterator[tuple[Step, Part, str]]:
        yield from self._close()
        part.index = len(self.done)
        self.done.append(part)
        self._open = part
        yield "start", part, ""
        if part.text:
            yield "delta", part, part.text

    def _close(self) -> Iterator[tuple[Step, Part, str]]:
        if self._open is not None:
            part, self._open = self._open, None
            yield "stop", part, ""


def _call_id(delta: Mapping[str, Any]) -> str:
    given = delta.get("id")
    name = given if isinstance(given, str) and given else f"call_{uuid.uuid4().hex[:24]}"
    # Google's OpenAI dialect signs calls in a field that other dialects do not have; the id carries it, as litellm's does.
    extra = delta.get("extra_content")
    google = extra.get(GOOGLE) if isinstance(extra, Mapping) else None
    fields = delta.get("provider_specific_fields")
    signed = google if isinstance(google, Mapping) else fields if isinstance(fields, Mapping) else {}
    signature = signed.get("thought_signature")
    return f"{name}{THOUGHT}{signature}" if isinstance(signature, str) and THOUGHT not in name else name


def _words(content: Any) -> Any:
    """A delta's text: a string, or the text of a list of parts (Mistral's)."""
    if isinstance(content, list):
        return "".join(part["text"] for part in _objects(content) if isinstance(part.get("text"), str))
    return content


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in value if isinstance(entry, Mapping)) if isinstance(value, list) else iter(())
