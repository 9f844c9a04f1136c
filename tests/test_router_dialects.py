"""Translations between the dialects, without a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect, Inbound
from router.dialects.messages import estimate_tokens
from router.dialects.parts import Parts
from router.errors import RequestError, UpstreamError
from router.reasoning import seal, unseal

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PNG = "iVBORw0KGgo="
DIALECTS = (CHAT, MESSAGES, RESPONSES)


def inbound(dialect: Dialect, body: Mapping[str, Any]) -> Inbound:
    return dialect.read(json.dumps(body).encode(), {})


def conversation() -> dict[str, dict[str, Any]]:
    """One conversation with a system prompt, a picture, two tool calls at once and their results, in each dialect."""
    url = f"data:image/png;base64,{PNG}"
    arguments = [json.dumps({"city": city}) for city in ("Oslo", "Rome")]
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>x</system-reminder>"},
                    {"type": "text", "text": "Where is it warmer?"},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            },
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "id": f"c{n}",
                        "type": "function",
                        "function": {"name": "read_file", "arguments": arguments[n]},
                    }
                    for n in (0, 1)
                ],
            },
            {"role": "tool", "tool_call_id": "c0", "content": "4 °C"},
            {"role": "tool", "tool_call_id": "c1", "content": "Error: no such file"},
        ],
        "tools": [{"type": "function", "function": {"name": "read_file", "parameters": SCHEMA}}],
        "max_tokens": 50,
    }
    messages = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>x</system-reminder>"},
                    {"type": "text", "text": "Where is it warmer?"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    *(
                        {"type": "tool_use", "id": f"c{n}", "name": "read_file", "input": {"city": city}}
                        for n, city in enumerate(("Oslo", "Rome"))
                    ),
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c0", "content": "4 °C"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "c1",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no such file"}],
                    },
                ],
            },
        ],
        "tools": [{"name": "read_file", "input_schema": SCHEMA}],
        "max_tokens": 50,
    }
    responses = {
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "<system-reminder>x</system-reminder>"},
                    {"type": "input_text", "text": "Where is it warmer?"},
                    {"type": "input_image", "image_url": url},
                ],
            },
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            *(
                {"type": "function_call", "call_id": f"c{n}", "name": "read_file", "arguments": arguments[n]}
                for n in (0, 1)
            ),
            {"type": "function_call_output", "call_id": "c0", "output": "4 °C"},
            {
                "type": "function_call_output",
                "call_id": "c1",
                "output": [{"type": "input_text", "text": "Error: no such file"}],
            },
        ],
        "tools": [{"type": "function", "name": "read_file", "parameters": SCHEMA}],
        "max_output_tokens": 50,
    }
    return {"chat": chat, "messages": messages, "responses": responses}


def test_one_conversation_is_the_same_chat_in_every_dialect() -> None:
    bodies = conversation()
    for dialect in (MESSAGES, RESPONSES):
        view = dialect.to_chat(bodies[dialect.name])
        assert view.body == bodies["chat"]
        assert view.lost == ()


def test_the_classifier_reads_the_same_in_every_dialect() -> None:
    bodies = conversation()
    prompts = [inbound(dialect, bodies[dialect.name]).prompt() for dialect in DIALECTS]
    assert prompts[0] == prompts[1] == prompts[2]
    prompt = prompts[0]
    assert prompt.text == "Where is it warmer?"
    assert (prompt.state.turns, prompt.state.depth, prompt.state.tool_results) == (1, 4, 2)
    assert (prompt.state.tools_offered, prompt.state.last_result) == (1, "read")
    assert prompt.state.last_result_error


def test_a_harness_that_speaks_after_a_tool_does_not_hide_its_result() -> None:
    body = conversation()["messages"]
    reminder = {"type": "text", "text": "<system-reminder>Mind the list.</system-reminder>"}
    body["messages"][-1]["content"].append(reminder)
    request = inbound(MESSAGES, body)
    assert request.prompt().state.last_result == "read"
    # It still goes out, behind the results.
    assert request.chat["messages"][-1] == {"role": "user", "content": reminder["text"]}


def test_chat_is_its_own_view() -> None:
    body = conversation()["chat"]
    request = inbound(CHAT, body)
    assert request.chat is request.body
    assert request.body == body


# Requests


def test_messages_parameters() -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "stop_sequences": ["END"],
        "temperature": 0,
        "top_p": 0.5,
        "thinking": {"type": "enabled", "budget_tokens": 4096},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "tools": [{"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "metadata": {"user_id": "u"},
    }
    assert MESSAGES.to_chat(body).body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "stop": ["END"],
        "temperature": 0,
        "top_p": 0.5,
        "reasoning_effort": "medium",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, "low"),
        ({"type": "enabled", "budget_tokens": 2048}, "medium"),
        ({"type": "enabled", "budget_tokens": 32_000}, "high"),
        ({"type": "adaptive"}, "medium"),
        ({"type": "disabled"}, None),
        (None, None),
    ],
)
def test_thinking_is_an_effort(thinking: Any, effort: str | None) -> None:
    body = {"messages": [], "thinking": thinking}
    assert MESSAGES.to_chat(body).body.get("reasoning_effort") == effort


def test_the_effort_of_adaptive_thinking() -> None:
    body = {"messages": [], "thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}
    assert MESSAGES.to_chat(body).body["reasoning_effort"] == "high"


def test_marks_of_prompt_caching_stay_where_they_are_understood() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
            {"type": "text", "text": "Be brief.", **mark},
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]}],
        "tools": [{"name": "f", "input_schema": SCHEMA, **mark}],
    }
    plain = MESSAGES.to_chat(body).body
    assert "cache_control" not in json.dumps(plain)
    assert plain["messages"][0] == {"role": "system", "content": "Be brief."}
    marked = MESSAGES.to_chat(body, marks=True).body
    assert marked["messages"][0]["content"] == [{"type": "text", "text": "Be brief.", **mark}]
    assert marked["messages"][1]["content"] == [{"type": "text", "text": "Hi", **mark}]
    assert marked["tools"][0]["cache_control"] == mark["cache_control"]


def test_what_tools_return_beside_text_stands_in_a_message_of_its_own() -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "text", "text": "Seen"}, picture],
    }
    body = {"messages": [{"role": "user", "content": [result, {"type": "text", "text": "Go on"}]}]}
    note = {"type": "text", "text": "What the tool returned beside text:"}
    shown = {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}
    assert MESSAGES.to_chat(body).body["messages"] == [
        {"role": "tool", "tool_call_id": "t", "content": "Seen"},
        {"role": "user", "content": [note, shown, {"type": "text", "text": "Go on"}]},
    ]
    output = [
        {"type": "input_text", "text": "Seen"},
        {"type": "input_image", "image_url": "https://x.test/a.png"},
    ]
    items = [
        {"type": "function_call_output", "call_id": "t", "output": output},
        {"role": "user", "content": "Go on"},
    ]
    assert RESPONSES.to_chat({"input": items}).body["messages"] == [
        {"role": "tool", "tool_call_id": "t", "content": "Seen"},
        {"role": "user", "content": [note, shown]},
        {"role": "user", "content": "Go on"},
    ]


def test_documents() -> None:
    def part(source: dict[str, Any]) -> Any:
        block = {"type": "document", "source": source, "title": "a.pdf"}
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": "R0"}}
        content = MESSAGES.to_chat({"messages": [{"role": "user", "content": [block, picture]}]}).body
        return content["messages"][0]["content"][0]

    pdf = part({"type": "base64", "media_type": "application/pdf", "data": "JVBE"})
    assert pdf["file"] == {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}
    assert part({"type": "text", "media_type": "text/plain", "data": "words"}) == {
        "type": "text",
        "text": "words",
    }
    assert part({"type": "content", "content": "words"}) == {"type": "text", "text": "words"}
    assert part({"type": "file", "file_id": "f"})["type"] == "image_url"  # the document is left out


@pytest.mark.parametrize(
    ("dialect", "body", "lost"),
    [
        (
            MESSAGES,
            {"mcp_servers": [{}], "tools": [{"type": "bash_20250124", "name": "bash"}]},
            "mcp_servers tools[0]",
        ),
        (MESSAGES, {"container": "c", "top_k": 3, "service_tier": "auto"}, "container"),
        (RESPONSES, {"tools": [{"type": "function", "name": "f"}, {"type": "web_search"}]}, "tools[1]"),
        (
            RESPONSES,
            {"moderation": {}, "include": ["reasoning.encrypted_content"], "truncation": "auto"},
            "moderation",
        ),
    ],
)
def test_what_has_no_translation_is_named(dialect: Dialect, body: dict[str, Any], lost: str) -> None:
    assert " ".join(dialect.to_chat({"messages": [], "input": "Hi", **body}).lost) == (
        "messages " * (dialect is RESPONSES) + "input " * (dialect is MESSAGES) + lost
    )


def test_responses_parameters() -> None:
    body = {
        "input": "Hi",
        "temperature": 0,
        "top_p": 0.5,
        "max_output_tokens": 9,
        "parallel_tool_calls": False,
        "tools": [
            {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True, "description": None}
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
        "reasoning": {"effort": "minimal", "summary": "auto"},
    }
    assert RESPONSES.to_chat(body).body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 9,
        "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
        },
        "reasoning_effort": "minimal",
    }


def test_allowed_tools_are_those_that_are_offered() -> None:
    tools = [{"type": "function", "name": name} for name in ("a", "b")]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]}
    chat = RESPONSES.to_chat({"input": "Hi", "tools": tools, "tool_choice": choice}).body
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["b"]
    assert chat["tool_choice"] == "required"


def test_the_assistants_items_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
        call,
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ]
    messages = RESPONSES.to_chat({"input": items}).body["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[2] == {"role": "assistant", "content": "One.", "reasoning_content": "Hm."}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "assistant", "tool"]
    assert messages[3]["tool_calls"][0]["id"] == "c"


# Answers


def completion(message: Mapping[str, Any], finish: str = "stop", **more: Any) -> dict[str, Any]:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_creation_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}
    return {"id": "c", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": usage}


def chunks(*deltas: Mapping[str, Any], finish: str | None = "stop") -> list[dict[str, Any]]:
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    ended = [{"index": 0, "delta": {}, "finish_reason": finish}] if finish else []
    return [{"id": "c", "model": "m-1", "choices": [choice]} for choice in (*choices, *ended)] + [
        {"model": "m-1", "choices": [], "usage": completion({})["usage"]}
    ]


def call(index: int, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    named = {"id": f"call_{name}", "type": "function"} if name else {}
    return {
        "tool_calls": [
            {"index": index, **named, "function": {k: v for k, v in function.items() if v is not None}}
        ]
    }


def asked(dialect: Dialect, **more: Any) -> Inbound:
    body = (
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
        if dialect is MESSAGES
        else {"input": "Hi"}
    )
    return inbound(dialect, {**body, **more})


def answered(dialect: Dialect, message: Mapping[str, Any], finish: str = "stop", **more: Any) -> Any:
    return dialect.answer(completion(message, finish), asked(dialect, **more), "deepseek")


def streamed(dialect: Dialect, parts: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    writer = dialect.writer(asked(dialect, **more), "deepseek")
    raw = b"".join([*(writer.chunk(part) for part in parts), writer.end()]).decode()
    events = []
    for event in raw.split("\n\n")[:-1]:
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream of Anthropic's tells; its blocks have to come one after another."""
    assert events[0]["type"] == "message_start"
    message = events[0]["message"]
    open_: int | None = None
    for event in events[1:]:
        kind = event["type"]
        if kind == "content_block_start":
            assert (open_, event["index"]) == (None, len(message["content"]))
            open_ = event["index"]
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert open_ == event["index"]
            block, delta = message["content"][open_], event["delta"]
            field = {
                "input_json_delta": "partial_json",
                "text_delta": "text",
                "thinking_delta": "thinking",
            }.get(delta["type"], "signature")
            block[field] = block.get(field, "") + delta[field]
        elif kind == "content_block_stop":
            assert open_ == event["index"]
            open_ = None
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    assert open_ is None
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    for block in message["content"]:
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    return message


REASONED = {"reasoning_content": "Hm.", "content": "Yes."}


def test_a_message_with_all_kinds_of_blocks_whole_and_streamed() -> None:
    calls = [
        {
            "id": f"call_{name}",
            "type": "function",
            "function": {"name": name, "arguments": f'{{"city":"{name}"}}'},
        }
        for name in ("a", "b")
    ]
    whole = answered(MESSAGES, {**REASONED, "tool_calls": calls}, "tool_calls")
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": seal("deepseek")},
        {"type": "text", "text": "Yes."},
        {"type": "tool_use", "id": "call_a", "name": "a", "input": {"city": "a"}},
        {"type": "tool_use", "id": "call_b", "name": "b", "input": {"city": "b"}},
    ]
    assert (whole["stop_reason"], whole["stop_sequence"], whole["model"]) == ("tool_use", None, "m-1")
    assert whole["usage"] == {
        "input_tokens": 3,
        "output_tokens": 3,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 2,
    }
    events = streamed(
        MESSAGES,
        chunks(
            {"role": "assistant", "content": ""},
            {"reasoning_content": "H"},
            {"reasoning_content": "m."},
            {"content": "Yes"},
            {"content": "."},
            call(0, "a", ""),
            call(0, None, '{"city":'),
            call(0, None, '"a"}'),
            call(1, "b", '{"city":"b"}'),
            finish="tool_calls",
        ),
    )
    message = accumulated(events)
    assert {**message, "id": 0} == {**whole, "id": 0}


def test_calls_that_come_interleaved_are_told_one_after_another() -> None:
    parts = chunks(
        call(0, "a", '{"city":'),
        call(1, "b", '{"city":'),
        call(0, None, '"a"}'),
        call(1, None, '"b"}'),
        finish="tool_calls",
    )
    blocks = accumulated(streamed(MESSAGES, parts))["content"]
    assert [(block["name"], block["input"]) for block in blocks] == [
        ("a", {"city": "a"}),
        ("b", {"city": "b"}),
    ]
    items = streamed(RESPONSES, parts)[-1]["response"]["output"]
    assert [(item["name"], item["arguments"]) for item in items] == [
        ("a", '{"city":"a"}'),
        ("b", '{"city":"b"}'),
    ]


def test_calls_whose_arguments_are_no_json_are_not_lost() -> None:
    broken = [{"id": "c", "function": {"name": "f", "arguments": '{"city": "Os'}}]
    blocks = answered(MESSAGES, {"tool_calls": broken}, "length")["content"]
    assert blocks[0]["input"] == {"raw_arguments": '{"city": "Os'}
    assert answered(RESPONSES, {"tool_calls": broken}, "length")["output"][0]["arguments"] == '{"city": "Os'


@pytest.mark.parametrize(
    ("message", "finish", "reason", "status"),
    [
        ({"content": "Yes."}, "stop", "end_turn", "completed"),
        ({"content": "Ye"}, "length", "max_tokens", "incomplete"),
        ({"content": ""}, "content_filter", "refusal", "incomplete"),
        ({"refusal": "No."}, "stop", "refusal", "completed"),
        ({"tool_calls": [{"id": "c", "function": {"name": "f"}}]}, "stop", "tool_use", "completed"),
    ],
)
def test_why_an_answer_ended(message: dict[str, Any], finish: str, reason: str, status: str) -> None:
    assert answered(MESSAGES, message, finish)["stop_reason"] == reason
    response = answered(RESPONSES, message, finish)
    assert response["status"] == status
    delta = {**message, "tool_calls": [{"index": 0, **call} for call in message.get("tool_calls", ())]}
    assert accumulated(streamed(MESSAGES, chunks(delta, finish=finish)))["stop_reason"] == reason
    assert streamed(RESPONSES, chunks(delta, finish=finish))[-1]["type"] == f"response.{status}"


def test_the_stop_sequence_is_told_where_the_provider_tells_it() -> None:
    told = completion({"content": "Yes."}, stop_reason="END")
    message = MESSAGES.answer(told, asked(MESSAGES, stop_sequences=["END"]), "qwen")
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_anthropics_thinking_comes_back_as_it_was_signed() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "EqQB"},
        {"type": "redacted_thinking", "data": "EmwK"},
    ]
    message = {"reasoning_content": "Hm.", "thinking_blocks": blocks, "content": "Yes."}
    inbound = asked(MESSAGES)
    assert MESSAGES.answer(completion(message), inbound, "anthropic")["content"][:2] == blocks
    deltas = [
        {
            "reasoning_content": "H",
            "thinking_blocks": [{"type": "thinking", "thinking": "H", "signature": None}],
        },
        {"reasoning_content": "m.", "thinking_blocks": [{"type": "thinking", "thinking": "m."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "EqQB"}]},
        {"thinking_blocks": [blocks[1]]},
        {"content": "Yes."},
    ]
    assert accumulated(streamed(MESSAGES, chunks(*deltas)))["content"][:2] == blocks
    # In responses it is sealed, and comes back from there.
    output = RESPONSES.answer(completion(message), asked(RESPONSES), "anthropic")["output"]
    assert [unseal(item["encrypted_content"]) for item in output[:2]] == [
        ("anthropic", {"thinking_blocks": [block]}) for block in blocks
    ]
    again = RESPONSES.to_chat({"input": [*output, {"role": "user", "content": "And?"}]}).body["messages"]
    assert again[0] == {"role": "assistant", "content": "Yes.", "thinking_blocks": blocks}


def test_plain_reasoning_makes_the_round_through_every_dialect() -> None:
    content = answered(MESSAGES, REASONED)["content"]
    turn = {"role": "assistant", "content": content}
    expected = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert MESSAGES.to_chat({"messages": [turn]}).body["messages"] == [expected]
    output = answered(RESPONSES, REASONED)["output"]
    assert RESPONSES.to_chat({"input": output}).body["messages"] == [expected]


def test_googles_signatures_make_the_round_in_the_calls_id() -> None:
    signed = {
        "id": "call_1",
        "function": {"name": "f", "arguments": "{}"},
        "extra_content": {"google": {"thought_signature": "CiQB/w=="}},
    }
    for block in (
        answered(MESSAGES, {"tool_calls": [signed]})["content"][0]["id"],
        answered(RESPONSES, {"tool_calls": [signed]})["output"][0]["call_id"],
    ):
        assert block == "call_1__thought__CiQB/w=="


def test_a_response_whole_and_streamed() -> None:
    parts = chunks(
        {"reasoning_content": "Hm."}, {"content": "Yes"}, {"content": "."}, call(0, "a", '{"b":1}')
    )
    events = streamed(RESPONSES, parts, instructions="Be brief.", metadata={"a": "b"})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    whole = answered(
        RESPONSES,
        {**REASONED, "tool_calls": [{"id": "call_a", "function": {"name": "a", "arguments": '{"b":1}'}}]},
        instructions="Be brief.",
        metadata={"a": "b"},
    )
    last = events[-1]["response"]
    for response in (last, whole):
        del response["id"], response["created_at"]
        for item in response["output"]:
            del item["id"]
    assert last == whole
    assert whole["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 12,
    }
    assert (whole["instructions"], whole["metadata"], whole["store"]) == ("Be brief.", {"a": "b"}, False)


def test_tools_that_take_text_are_functions_on_the_way() -> None:
    patch = {
        "type": "custom",
        "name": "apply_patch",
        "description": "Patches.",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
    }
    function = RESPONSES.to_chat({"input": "Hi", "tools": [patch]}).body["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert "start: x" in function["description"]
    text = "*** Begin Patch\n"
    arguments = json.dumps({"input": text})
    calls = [{"id": "c", "function": {"name": "apply_patch", "arguments": arguments}}]
    item = answered(RESPONSES, {"tool_calls": calls}, tools=[patch])["output"][0]
    assert (item["type"], item["input"], item["call_id"]) == ("custom_tool_call", text, "c")
    kinds = [
        event["type"]
        for event in streamed(RESPONSES, chunks(call(0, "apply_patch", arguments)), tools=[patch])
        if "custom" in event["type"]
    ]
    assert kinds == ["response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"]
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"}
    messages = RESPONSES.to_chat({"input": [item, output]}).body["messages"]
    assert json.loads(messages[0]["tool_calls"][0]["function"]["arguments"]) == {"input": text}
    assert messages[1] == {"role": "tool", "tool_call_id": "c", "content": "Done"}


@pytest.mark.parametrize("dialect", [MESSAGES, RESPONSES])
def test_a_stream_that_breaks_off_is_not_an_answer(dialect: Dialect) -> None:
    with pytest.raises(UpstreamError, match="broke off"):
        streamed(dialect, chunks({"content": "Ye"}, finish=None))


@pytest.mark.parametrize("dialect", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("data", [{}, {"choices": []}, {"choices": [4]}, {"choices": [{"message": None}]}])
def test_an_answer_without_a_message_is_an_error(dialect: Dialect, data: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError, match="without a message"):
        dialect.answer(data, asked(dialect), "qwen")


def test_chunks_that_mean_nothing_are_passed_over() -> None:
    parts = Parts()
    for chunk in (
        {},
        {"choices": None},
        {"choices": [{"delta": None}]},
        {"choices": [{"index": 1, "delta": {"content": "x"}}]},
    ):
        assert list(parts.feed(chunk)) == []


def test_an_empty_stream_still_starts_and_ends() -> None:
    assert [event["type"] for event in streamed(MESSAGES, chunks())] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_errors_in_a_stream_of_responses_go_on_counting() -> None:
    writer = RESPONSES.writer(asked(RESPONSES), "qwen")
    first = writer.chunk(chunks({"content": "x"})[0])
    raw = RESPONSES.error_event(UpstreamError("too much", status=429), first, first).decode()
    failed = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in failed] == ["error", "response.failed"]
    assert [event["sequence_number"] for event in failed] == [5, 6]
    assert failed[1]["response"]["error"] == {"code": "rate_limit_exceeded", "message": "too much"}
    # Before anything was told, there is no response to fail.
    assert b'"sequence_number":0' in RESPONSES.error_event(UpstreamError("x", status=502), b"", b"")


def test_the_estimate_of_tokens() -> None:
    def count(content: Any, **more: Any) -> int:
        return estimate_tokens({"messages": [{"role": "user", "content": content}], **more})

    assert count("x" * 4_000) == pytest.approx(1_000, abs=10)
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "A" * 100_000},
    }
    assert 1_500 <= count([picture]) < 1_600
    assert count("x", tools=[{"name": "f", "input_schema": {"description": "d" * 4_000}}]) > 1_000


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("m", status=400), 400, "invalid_request_error"),
        (RequestError("m", status=403), 403, "permission_error"),
        (RequestError("m", status=405), 405, "invalid_request_error"),
        (UpstreamError("m", status=503, type="server_error"), 503, "api_error"),
        (UpstreamError("m", status=529), 529, "overloaded_error"),
        (UpstreamError("m", status=429, type="insufficient_quota"), 429, "rate_limit_error"),
        (UpstreamError("m", status=422, type="x"), 422, "invalid_request_error"),
        (UpstreamError("m", status=400, type="billing_error"), 400, "billing_error"),
        (ValueError("a prompt"), 500, "api_error"),
    ],
)
def test_errors_in_anthropics_words(error: Exception, status: int, kind: str) -> None:
    body = MESSAGES.error_body(error, "req_1")
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "req_1")
    assert "a prompt" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("overloaded_error", 529, "upstream_error"),
        ("api_error", 500, "upstream_error"),
        (None, 400, "invalid_request_error"),
    ],
)
def test_anthropics_words_for_errors_are_not_openais(kind: str | None, status: int, told: str) -> None:
    assert CHAT.error_body(UpstreamError("m", status=status, type=kind))["error"]["type"] == told
