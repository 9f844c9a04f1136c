from __future__ import annotations

import json
import time
from typing import Any

import pytest

from router.escalation import Gist, fault_of, gist_of_answer, gist_of_events

EVERY = ("refusal", "refusal_text", "invalid_json", "empty")


def chat(content: Any = None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"content": content, **message}, "finish_reason": finish}]}


def messages(*blocks: dict[str, Any], stop: str = "end_turn") -> dict[str, Any]:
    return {"type": "message", "content": list(blocks), "stop_reason": stop}


def responses(*items: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {
        "object": "response",
        "output": list(items),
        "incomplete_details": {"reason": reason} if reason else None,
    }


def item(kind: str, text: str) -> dict[str, Any]:
    field = "refusal" if kind == "refusal" else "text"
    return {"type": "message", "content": [{"type": kind, field: text}]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
REASONING = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("answer", "gist"),
    [
        (chat("Hello"), Gist("Hello")),
        (chat([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]), Gist("Hello")),
        (chat(None, tool_calls=[CALL]), Gist("", ('{"a":1}',))),
        (chat(None, refusal="I can't."), Gist(refused=True)),
        (chat("", "content_filter"), Gist(refused=True)),
        (chat('{"a', "length"), Gist('{"a', cut=True)),
        (chat("", reasoning_content="hm"), Gist()),
        ({"choices": []}, Gist()),
        (messages({"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}), Gist("Hello")),
        (messages({"type": "tool_use", "input": {"a": 1}}, stop="tool_use"), Gist("", ('{"a": 1}',))),
        (messages(stop="refusal"), Gist(refused=True)),
        (messages({"type": "text", "text": "He"}, stop="max_tokens"), Gist("He", cut=True)),
        (responses(REASONING, item("output_text", "Hello")), Gist("Hello")),
        (responses({"type": "function_call", "arguments": '{"a":1}'}), Gist("", ('{"a":1}',))),
        (responses(item("refusal", "No.")), Gist(refused=True)),
        (responses(reason="content_filter"), Gist(refused=True)),
        (responses(item("output_text", "He"), reason="max_output_tokens"), Gist("He", cut=True)),
    ],
)
def test_the_gist_of_an_answer_in_each_dialect(answer: dict[str, Any], gist: Gist) -> None:
    assert gist_of_answer(answer) == gist


def data(*payloads: Any) -> list[bytes]:
    return [b"event: x\ndata: " + json.dumps(payload).encode() + b"\n\n" for payload in payloads]


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def block(index: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": fields}


TOOL_START = {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "input": {}}}
DONE = b"data: [DONE]\n\n"


def calls(index: int, arguments: str) -> dict[str, Any]:
    return delta(tool_calls=[{"index": index, "function": {"arguments": arguments}}])


@pytest.mark.parametrize(
    ("events", "gist"),
    [
        (
            [*data(delta(role="assistant"), delta(content="Hel"), delta(content="lo"), delta("stop")), DONE],
            Gist("Hello"),
        ),
        (
            [*data(calls(0, '{"a"'), calls(1, "{}"), calls(0, ":1}"), delta("tool_calls"))],
            Gist("", ('{"a":1}', "{}")),
        ),
        (data(delta(refusal="I can't"), delta("stop")), Gist(refused=True)),
        (data(delta("content_filter"), {"choices": [], "usage": {}}), Gist(refused=True)),
        (data(delta(content="He"), delta("length")), Gist("He", cut=True)),
        ([DONE], Gist()),
        (
            data(
                {"type": "message_start", "message": {"content": []}},
                block(0, type="text_delta", text="Hello"),
                block(0, type="thinking_delta", thinking="hm"),
                TOOL_START,
                block(1, type="input_json_delta", partial_json='{"a":'),
                block(1, type="input_json_delta", partial_json="1}"),
                {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
            ),
            Gist("Hello", ('{"a":1}',)),
        ),
        (data({"type": "message_delta", "delta": {"stop_reason": "refusal"}}), Gist(refused=True)),
        (
            data(
                {"type": "response.output_text.delta", "delta": "Hel"},
                {"type": "response.completed", "response": responses(item("output_text", "Hello"))},
            ),
            Gist("Hello"),
        ),
    ],
)
def test_the_gist_of_a_stream_in_each_dialect(events: list[bytes], gist: Gist) -> None:
    assert gist_of_events(events) == gist
    assert gist_of_events([b"".join(events)]) == gist  # several may be sent at once


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"$ref": "#/$defs/count"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


def asking_for(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


OBJECT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("text", "asked", "fault"),
    [
        ("Hello", {}, None),
        (" \n", {}, "empty"),
        ("{}", OBJECT, None),
        ("[]", OBJECT, "invalid_json"),
        ("```json\n{}\n```", OBJECT, "invalid_json"),
        ('{"city": "Oslo"', OBJECT, "invalid_json"),
        ('{"city": "Oslo", "population": 7}', asking_for(SCHEMA), None),
        ('{"city": "Oslo", "population": -7}', asking_for(SCHEMA), "invalid_json"),
        ('{"population": 7}', asking_for(SCHEMA), "invalid_json"),
        ('{"city": "Oslo", "x": 1}', asking_for(SCHEMA), "invalid_json"),
        ('{"city": 1}', {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "invalid_json"),
        ('{"city": 1}', {"output_format": {"type": "json_schema", "schema": SCHEMA}}, "invalid_json"),
        (
            '{"city": 1}',
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            "invalid_json",
        ),
        ('{"city": 1}', {"response_format": {"type": "text"}}, None),
        # What is no schema condemns no answer.
        ("{}", asking_for({"type": "nonsense"}), None),
        ("{}", asking_for({"properties": 7}), None),
        ("{}", asking_for(None), None),
        ("[]", asking_for("x"), None),
        ("{}", asking_for({"$ref": "http://127.0.0.1:9/schema.json"}), None),
        ("{}", asking_for({"$ref": "#/$defs/none"}), None),
    ],
)
def test_json_that_was_asked_for(text: str, asked: dict[str, Any], fault: str | None) -> None:
    assert fault_of(Gist(text), asked, EVERY) == fault


@pytest.mark.parametrize("dated", [{}, {"$schema": "http://json-schema.org/draft-07/schema#"}])
def test_a_hostile_schema_holds_up_nobody(dated: dict[str, Any]) -> None:
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    catastrophic = {**dated, "pattern": "^(a+)+$", "type": "string"}
    schemas = [
        {**dated, "$ref": "#/$defs/d0", "$defs": {**doubling, "d40": {"type": "object"}}},
        {**dated, "$ref": "#"},
        {"properties": {"x": catastrophic}},
        {"properties": {"x": {**dated, "type": "string"}}, "patternProperties": {"^(a+)+$": False}},
        {**dated, "patternProperties": {"^(a+)+$": True}, "additionalProperties": False},
        {**dated, "allOf": [{"patternProperties": {"^(a+)+$": True}}], "unevaluatedProperties": False},
    ]
    text = json.dumps({"x": "a" * 40 + "!", "a" * 40 + "!": 1})
    for schema in schemas:
        started = time.monotonic()
        assert fault_of(Gist(text), asking_for(schema), EVERY) is None
        assert time.monotonic() - started < 2


def test_a_call_with_arguments_that_are_no_json_is_a_fault() -> None:
    assert fault_of(Gist("", ('{"a":',)), {}, EVERY) == "invalid_json"
    assert fault_of(Gist("", ("7",)), {}, EVERY) == "invalid_json"
    assert fault_of(Gist("", ("", '{"a":1}')), asking_for(SCHEMA), EVERY) is None


def test_what_ended_at_the_client_s_limit_of_tokens_is_no_fault() -> None:
    assert fault_of(Gist('{"a', cut=True), OBJECT, EVERY) is None
    assert fault_of(Gist("", cut=True), {}, EVERY) is None


def test_only_what_the_policy_lists_is_a_fault() -> None:
    for gist, fault in [(Gist(refused=True), "refusal"), (Gist(), "empty"), (Gist("x"), "invalid_json")]:
        assert fault_of(gist, OBJECT, [fault]) == fault
        assert (
            fault_of(gist, OBJECT, [other for other in EVERY if other != fault and other != "invalid_json"])
            is None
        )
    assert fault_of(Gist("I'm sorry, but I can't help with that."), {}, ["refusal", "empty"]) is None


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't assist with that request.", True),
        ("I’m sorry, I cannot help with that.", True),
        ("Sorry, I can't provide that.", True),
        ("I am unable to comply with this request.", True),
        ("I won't be able to help you with that.", True),
        ("Unfortunately, I cannot discuss this topic.", True),
        ("I'm not able to answer that.", True),
        ("I can't find the file; here is what I would do instead: create it.", False),
        ("I cannot reproduce the bug, but the test passes now.", False),
        ("The function can't help with that because it returns None.", False),
        ("Sorry about the confusion. The answer is 4.", False),
        ("I'm sorry, but I can't help with that. " + "However, here is a long answer. " * 20, False),
    ],
)
def test_a_refusal_in_words(text: str, refuses: bool) -> None:
    assert (fault_of(Gist(text), {}, ["refusal_text"]) == "refusal_text") == refuses
