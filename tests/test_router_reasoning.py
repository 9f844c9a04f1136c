from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from provider import SIGNATURE

from router.policy import Target
from router.reasoning import family_of, keep_own, seal, unseal, without_stranded_thinking

FERNET = "gAAAAABpIKwq3Yh0cXlTj7vFqN2rWmUeZ1oSbDxKtPzAyVgLJf8sQ4nHk6iR9wBuMdOaCpE5x7GvI"
THOUGHT = "CiQBVKhc7sX3nQ9pZr1TfWd0uYbLo5aEg2HmKj8vRiNtMzAxSlUyD4BqJkVeP6wFhC=="
ASK = {"role": "user", "content": "Is it warm in Oslo?"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "4 °C"}
SIGNED = {"type": "thinking", "thinking": "They want the weather.", "signature": SIGNATURE}
REDACTED = {
    "type": "redacted_thinking",
    "data": "EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIwxtE3rAFBa8cr3qpP",
}

# What a turn that calls a tool looks like in a chat after each family, as their APIs (and litellm) give it.
CHAT: dict[str, dict[str, Any]] = {
    "anthropic": {"thinking_blocks": [SIGNED, REDACTED], "reasoning_content": "They want the weather."},
    "openai": {
        "reasoning_items": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": FERNET}]
    },
    "google": {
        "tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": THOUGHT}}}],
    },
    "deepseek": {"reasoning_content": "They want the weather."},
    "qwen": {"reasoning": "They want the weather."},
    "xai": {
        "reasoning": "They want the weather.",
        "reasoning_details": [
            {"type": "reasoning.encrypted", "data": "b3BhcXVl", "format": "xai-responses-v1", "index": 0}
        ],
    },
}
MESSAGES: dict[str, list[dict[str, Any]]] = {
    "anthropic": [SIGNED, REDACTED],
    "deepseek": [{"type": "thinking", "thinking": "They want it.", "signature": seal("deepseek")}],
    "google": [{"type": "thinking", "thinking": "They want it.", "signature": seal("google")}],
}
RESPONSES: dict[str, list[dict[str, Any]]] = {
    "openai": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": FERNET}],
    "anthropic": [
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "They want the weather."}],
            "encrypted_content": seal("anthropic", {"thinking_blocks": [SIGNED]}),
        }
    ],
    "deepseek": [
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "They want the weather."}],
            "encrypted_content": seal("deepseek", {"text": "They want the weather."}),
        }
    ],
}


def chat(family: str) -> dict[str, Any]:
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL], **CHAT[family]}
    return {"messages": [ASK, turn, RESULT], "tools": []}


def messages(family: str) -> dict[str, Any]:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "4 °C"}
    turns = [
        {"role": "assistant", "content": [*MESSAGES[family], use]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": list(MESSAGES[family])},  # cut off while it thought
        ASK,
    ]
    return {"messages": [ASK, *turns], "max_tokens": 9}


def responses(family: str) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "4 °C"}
    return {"input": [ASK, *RESPONSES[family], call, output]}


DIALECTS = {"chat": (chat, CHAT), "messages": (messages, MESSAGES), "responses": (responses, RESPONSES)}
PAIRS = [
    (dialect, left, to)
    for dialect, (_, shapes) in DIALECTS.items()
    for left in shapes
    for to in ("anthropic", "openai", "google", "deepseek", "qwen", "xai", "unheard-of")
]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("dialect", "left", "to"), PAIRS)
def test_reasoning_goes_to_its_own_family_alone(dialect: str, left: str, to: str, told: bool) -> None:
    build, _ = DIALECTS[dialect]
    body = build(left)
    before = copy.deepcopy(body)
    kept = keep_own(dialect, body, to, frozenset((left,)) if told else None)
    assert body == before
    plain = dialect == "chat" and left in ("deepseek", "qwen")
    if left == to or (plain and not told and to not in ("anthropic", "openai", "google")):
        assert kept is body
        return
    text = json.dumps(kept, ensure_ascii=False)
    for trace in (SIGNATURE, REDACTED["data"], FERNET, THOUGHT, "They want", "router:1:", "b3BhcXVl"):
        assert trace not in text
    # All that is not reasoning is still there, and nothing that is empty.
    assert "4 °C" in text
    assert "get_weather" in text
    field = "input" if dialect == "responses" else "messages"
    assert len(kept[field]) == {"chat": 3, "messages": 4, "responses": 3}[dialect]
    assert all(entry.get("content") != [] for entry in kept[field])
    if dialect == "chat":
        assert kept["messages"] == [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]


def test_bodies_without_reasoning_are_not_touched() -> None:
    turn = {"role": "assistant", "content": [{"type": "text", "text": "Cold."}], "refusal": None}
    for dialect, body in (
        ("chat", {"messages": [ASK, turn, {"role": "assistant", "content": None}, ASK]}),
        ("messages", {"messages": [ASK, turn, ASK]}),
        ("responses", {"input": [ASK, {"type": "message", **turn}]}),
        ("responses", {"input": "Hi"}),
        ("chat", {"messages": ["nonsense"]}),
    ):
        assert keep_own(dialect, body, "openai", frozenset(("anthropic",))) is body


def test_a_chat_message_that_was_reasoning_alone_goes() -> None:
    body = {"messages": [ASK, {"role": "assistant", "content": None, "reasoning_content": "Hm."}, ASK]}
    assert keep_own("chat", body, "openai")["messages"] == [ASK, ASK]


def test_the_families_of_the_session_decide_on_plain_text() -> None:
    def kept(to: str, *seen: str) -> bool:
        body = chat("deepseek")
        return keep_own("chat", body, to, frozenset(seen)) is body

    assert kept("deepseek", "deepseek")
    # OpenAI leaves no plain text, so it is DeepSeek's; of two that do, nobody knows whose it is.
    assert kept("deepseek", "deepseek", "openai")
    assert not kept("deepseek", "deepseek", "qwen")
    assert not kept("qwen", "deepseek")
    # Anthropic's, through a provider that gives text alone.
    assert kept("anthropic", "anthropic")


def test_a_shape_in_the_message_decides_on_its_plain_text() -> None:
    body = chat("anthropic")
    assert keep_own("chat", body, "anthropic", frozenset(("anthropic", "deepseek"))) is body
    assert "reasoning_content" not in keep_own("chat", body, "deepseek")["messages"][1]


def test_signatures_of_others_that_speak_anthropics_dialect() -> None:
    short = {"type": "thinking", "thinking": "Hm.", "signature": "7d1f0c52-6f4e-4c3a-9a35-1f2c"}
    body = {"messages": [ASK, {"role": "assistant", "content": [short, {"type": "text", "text": "4"}]}, ASK]}
    assert keep_own("messages", body, "minimax", frozenset(("minimax",))) is body
    assert keep_own("messages", body, "minimax") is body
    assert keep_own("messages", body, "anthropic", frozenset(("minimax",))) is not body
    # Where nobody knows better, an unheard-of signature is Anthropic's at Anthropic.
    assert keep_own("messages", body, "anthropic") is body
    assert keep_own("messages", body, "openai") is not body


def test_thought_signatures_in_ids_go_on_both_sides() -> None:
    name = f"call_1__thought__{THOUGHT}"
    calls = [{**CALL, "id": name}]
    body = {"messages": [ASK, {"role": "assistant", "tool_calls": calls}, {**RESULT, "tool_call_id": name}]}
    assert keep_own("chat", body, "google") is body
    kept = keep_own("chat", body, "openai")["messages"]
    assert (kept[1]["tool_calls"][0]["id"], kept[2]["tool_call_id"]) == ("call_1", "call_1")
    turns = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": name, "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": name, "content": "4"}]},
    ]
    kept = keep_own("messages", {"messages": turns}, "anthropic")["messages"]
    assert (kept[0]["content"][0]["id"], kept[1]["content"][0]["tool_use_id"]) == ("call_1", "call_1")
    items = [{"type": "function_call", "call_id": name}, {"type": "function_call_output", "call_id": name}]
    assert [item["call_id"] for item in keep_own("responses", {"input": items}, "openai")["input"]] == [
        "call_1"
    ] * 2


def test_litellms_fields_for_thought_signatures() -> None:
    function = {**CALL["function"], "provider_specific_fields": {"thought_signature": THOUGHT}}
    turn = {
        "role": "assistant",
        "content": "4",
        "provider_specific_fields": {"thought_signatures": [THOUGHT], "other": 1},
        "tool_calls": [
            {**CALL, "function": function, "provider_specific_fields": {"thought_signature": THOUGHT}}
        ],
    }
    kept = keep_own("chat", {"messages": [turn]}, "anthropic")["messages"][0]
    assert kept == {
        "role": "assistant",
        "content": "4",
        "provider_specific_fields": {"other": 1},
        "tool_calls": [CALL],
    }


def test_thinking_ends_where_the_turn_began_without_it() -> None:
    body: dict[str, Any] = {
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "context_management": {
            "edits": [{"type": "clear_thinking_20251015"}, {"type": "clear_tool_uses_20250919"}]
        },
        **messages("deepseek"),
    }
    body["messages"] = body["messages"][:3]
    stranded = keep_own("messages", body, "anthropic")
    left = without_stranded_thinking(stranded)
    assert "thinking" not in left
    assert left["context_management"] == {"edits": [{"type": "clear_tool_uses_20250919"}]}
    own = {**body, "messages": messages("anthropic")["messages"][:3]}
    assert without_stranded_thinking(own) is own
    adaptive = {**stranded, "thinking": {"type": "adaptive"}}
    assert without_stranded_thinking(adaptive) is adaptive
    answered = {**stranded, "messages": [*stranded["messages"], {"role": "assistant", "content": "4"}, ASK]}
    assert without_stranded_thinking(answered) is answered


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("anthropic/claude-opus-5-5", "anthropic"),
        ("bedrock/us.anthropic.claude-sonnet-4-5-v1:0", "anthropic"),
        ("openai/gpt-5-mini", "openai"),
        ("openai/o3", "openai"),
        ("openrouter/openai/gpt-oss-120b", "gpt-oss"),
        ("gemini/gemini-3-pro", "google"),
        ("deepseek/deepseek-chat", "deepseek"),
        ("openai/qwen3-8b", "qwen"),
        ("openrouter/z-ai/glm-5", "zai"),
        ("moonshot/kimi-k2", "moonshot"),
        ("openai/deepseek-r1-distill-llama-70b", "deepseek"),
        ("openai/Something-Else", "openai/something-else"),
    ],
)
def test_families_by_name(model: str, family: str) -> None:
    assert family_of(Target(model=model)) == family
    assert family_of(Target(model=model, family="Mine")) == "mine"
    assert family_of(Target(model=model, family="Claude")) == "anthropic"


def test_seals() -> None:
    assert unseal(seal("openai/something-else", {"text": "é"})) == ("openai/something-else", {"text": "é"})
    assert unseal(seal("deepseek")) == ("deepseek", {})
    for other in (SIGNATURE, None, 4, "router:1:x:!!!!", "router:1:x:WzFd"):
        assert unseal(other) is None
