"""Judging a complete answer: is it one? Where it is not, a tier may ask a stronger target once more.

Answers are read in each of the three dialects that clients speak, whole or as the events of a stream.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.dispatch import Stream
from router.errors import UpstreamError
from router.policy import Fault
from router.upstream import Usage

# How long an answer is held against a schema. Both are a stranger's, and a small schema can take for ever.
_VALIDATION_SECONDS = 0.25

_LONGEST_REFUSAL = 400
# Only where the answer begins so: "I can't find the file, but …" goes on to be useful.
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am) (?:very |really |so )?sorry|sorry|i apologi[sz]e|my apologies|unfortunately)?[\s,.;:!—–-]*(?:but )?"
    r"(?:i (?:can(?:['’]?t|not| not)|won['’]?t|will not|must decline to|have to decline to)"
    r"|(?:i['’]?m|i am) (?:not able|unable|not going|not comfortable) ?(?:to)?)"
    r" (?:be able to )?(?:help|assist|comply|fulfill?|provide|support|engage|participate|discuss|answer|create|produce|do that)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Gist:
    """What an answer comes to.

    Attributes
    ----------
    text : str
        Without reasoning.
    calls : tuple of str
        The arguments of the tools that it calls, as JSON.
    refused : bool
        The provider says that the model refused, or that its filter did.
    cut : bool
        It ended at the limit of tokens that the client set: another target's would too.
    """

    text: str = ""
    calls: tuple[str, ...] = ()
    refused: bool = False
    cut: bool = False


class Held:
    """A stream that is read to its end before a byte of it goes out; iterates as a :class:`Stream` does."""

    error: UpstreamError | None = None

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.events: list[bytes] = []

    @property
    def usage(self) -> Usage | None:
        return self._stream.usage

    async def fill(self) -> None:
        """Read the stream to its end.

        Raises
        ------
        UpstreamError
            It broke off: still before the first byte went out, so another target may be asked.
        """
        try:
            async for event in self._stream:
                self.events.append(event)
        finally:
            await self._stream.aclose()
        if self._stream.error is not None:
            raise self._stream.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self.events:
            yield event

    async def aclose(self) -> None:
        """Nothing is open."""


def fault_of(gist: Gist, asked: Mapping[str, Any], faults: Collection[Fault]) -> Fault | None:
    """What makes an answer none; None for one that is.

    Parameters
    ----------
    gist : Gist
    asked : mapping
        The body of the request: it says whether JSON was asked for, and by which schema.
    faults : collection of str
        What counts, as a tier's ``escalate.when`` lists it.
    """
    if gist.refused:
        return "refusal" if "refusal" in faults else None
    if gist.cut:
        return None
    if not gist.text.strip() and not gist.calls:
        return "empty" if "empty" in faults else None
    if "invalid_json" in faults and not _is_json_as_asked(gist, asked):
        return "invalid_json"
    if "refusal_text" in faults and not gist.calls and _reads_as_refusal(gist.text):
        return "refusal_text"
    return None


def gist_of_answer(data: Mapping[str, Any]) -> Gist:
    """Of a whole answer: a chat completion, an Anthropic message or an OpenAI response."""
    if "choices" in data:
        choice = _first(data["choices"])
        return _of_message(_mapping(choice.get("message")), choice.get("finish_reason"))
    if isinstance(data.get("output"), list):
        return _of_response(data)
    return _of_blocks(_mappings(data.get("content")), data.get("stop_reason"))


def gist_of_events(events: Sequence[bytes]) -> Gist:
    """Of a complete stream: the server-sent events of any of the three dialects."""
    text: list[str] = []
    refusal: list[str] = []
    calls: dict[Any, list[str]] = {}
    reason: Any = None
    for data in _payloads(events):
        kind = data.get("type")
        if kind in ("response.completed", "response.incomplete"):
            return _of_response(_mapping(data.get("response")))
        if kind == "content_block_start":
            block = _mapping(data.get("content_block"))
            if block.get("type") == "tool_use":
                calls[data.get("index")] = []
        elif kind == "content_block_delta":
            delta = _mapping(data.get("delta"))
            if delta.get("type") == "input_json_delta":
                calls.setdefault(data.get("index"), []).append(str(delta.get("partial_json") or ""))
            elif delta.get("type") == "text_delta":
                text.append(str(delta.get("text") or ""))
        elif kind == "message_delta":
            reason = _mapping(data.get("delta")).get("stop_reason") or reason
        elif "choices" in data:
            choice = _first(data["choices"])
            delta = _mapping(choice.get("delta"))
            text.append(str(delta.get("content") or ""))
            refusal.append(str(delta.get("refusal") or ""))
            for call in _mappings(delta.get("tool_calls")):
                arguments = str(_mapping(call.get("function")).get("arguments") or "")
                calls.setdefault(call.get("index"), []).append(arguments)
            reason = choice.get("finish_reason") or reason
    return Gist(
        "".join(text),
        tuple("".join(parts) for parts in calls.values()),
        refused="".join(refusal).strip() != "" or reason in _REFUSED,
        cut=reason in _CUT,
    )


# How the dialects say it.
_REFUSED = ("content_filter", "refusal")
_CUT = ("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded")


def _of_message(message: Mapping[str, Any], reason: Any) -> Gist:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [_text(part) for part in _mappings(content)]
    calls = [_mapping(call.get("function")).get("arguments") for call in _mappings(message.get("tool_calls"))]
    refused = bool(message.get("refusal")) or reason in _REFUSED
    return Gist("".join(parts), tuple(str(call or "") for call in calls), refused, reason in _CUT)


def _of_blocks(blocks: Sequence[Mapping[str, Any]], reason: Any) -> Gist:
    text = "".join(_text(block) for block in blocks if block.get("type") == "text")
    calls = tuple(json.dumps(block.get("input")) for block in blocks if block.get("type") == "tool_use")
    return Gist(text, calls, reason in _REFUSED, reason in _CUT)


def _of_response(data: Mapping[str, Any]) -> Gist:
    items = _mappings(data.get("output"))
    parts = [part for item in items for part in _mappings(item.get("content"))]
    reason = _mapping(data.get("incomplete_details")).get("reason")
    return Gist(
        "".join(_text(part) for part in parts if part.get("type") == "output_text"),
        tuple(str(item.get("arguments") or "") for item in items if item.get("type") == "function_call"),
        any(part.get("type") == "refusal" for part in parts) or reason in _REFUSED,
        reason in _CUT,
    )


def _payloads(events: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    # What is sent at once may be several events.
    for event in b"".join(events).split(b"\n\n"):
        lines = event.decode("utf-8", "replace").split("\n")
        text = "\n".join(line[5:].lstrip() for line in lines if line.startswith("data:"))
        try:
            data = json.loads(text)
        except ValueError:  # [DONE], and comments
            continue
        if isinstance(data, dict):
            yield data


def _is_json_as_asked(gist: Gist, asked: Mapping[str, Any]) -> bool:
    for call in gist.calls:
        # Some providers write nothing where a tool takes no argument.
        if call.strip() and not isinstance(_parsed(call), dict):
            return False
    wanted, schema = _wanted(asked)
    if not wanted or gist.calls:
        return True
    value = _parsed(gist.text)
    if value is _NOT_JSON:
        return False
    return isinstance(value, dict) if schema is None else _is_valid(value, schema)


_NOT_JSON = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _wanted(asked: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether JSON was asked for, and its schema, None where any object will do."""
    wanted = (
        asked.get("response_format"),  # chat completions
        _mapping(asked.get("text")).get("format"),  # responses
        asked.get("output_format"),  # messages, in either place
        _mapping(asked.get("output_config")).get("format"),
    )
    for form in map(_mapping, wanted):
        if form.get("type") == "json_object":
            return True, None
        if form.get("type") == "json_schema":
            nested = form.get("json_schema")
            return True, (nested if isinstance(nested, dict) else form).get("schema")
    return False, None


class _TooLong(Exception):
    """Validation took too long."""


def _is_valid(value: Any, schema: Any) -> bool:
    """Whether a value is as a schema says; true where that cannot be told."""
    # Their import takes longer than a request: only those who escalate on it pay.
    import jsonschema
    import referencing

    if not isinstance(schema, dict | bool):
        return True
    deadline = time.monotonic() + _VALIDATION_SECONDS

    def timed(rule: Callable[..., Any]) -> Callable[..., Any]:
        def check(*arguments: Any) -> Any:
            if time.monotonic() > deadline:
                raise _TooLong
            return rule(*arguments) or ()

        return check

    base = jsonschema.Draft202012Validator
    rules = {name: timed(_RULES.get(name, rule)) for name, rule in base.VALIDATORS.items()}
    rules["additionalProperties"] = timed(_unless_patterns(base.VALIDATORS["additionalProperties"]))
    validator = jsonschema.validators.extend(base, rules)
    try:
        # With a registry of its own it fetches no schema from anywhere.
        validity: bool = validator(_undated(schema), registry=referencing.Registry()).is_valid(value)
    except (
        Exception
    ):  # too long, or no schema: then jsonschema raises what Python does, by what is wrong with it
        return True
    return validity


def _undated(schema: Any) -> Any:
    """A schema without its ``$schema``, at which jsonschema would take its own rules in place of these."""
    if isinstance(schema, list):
        return [_undated(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _undated(value)
        for key, value in schema.items()
        if key != "$schema" or not isinstance(value, str)
    }


def _nothing(*arguments: Any) -> None:
    """A rule that finds nothing wrong."""


# Regular expressions of a stranger are not run: one of them can hold a thread for ever.
_RULES = {"pattern": _nothing, "patternProperties": _nothing, "unevaluatedProperties": _nothing}


def _unless_patterns(rule: Callable[..., Any]) -> Callable[..., Any]:
    def check(validator: Any, value: Any, instance: Any, schema: Mapping[str, Any]) -> Any:
        return None if "patternProperties" in schema else rule(validator, value, instance, schema)

    return check


def _reads_as_refusal(text: str) -> bool:
    text = text.strip()
    return len(text) <= _LONGEST_REFUSAL and _REFUSAL.search(text) is not None


def _text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else ""


def _first(value: Any) -> Mapping[str, Any]:
    return next(iter(_mappings(value)), {})


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
