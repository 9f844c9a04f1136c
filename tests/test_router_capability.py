from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from router.capability import ANSWER_TOKENS, FILE_TOKENS, IMAGE_TOKENS, Needs, estimate_tokens, lacks
from router.content import Content
from router.policy import Target

ROOT = Path(__file__).parent.parent

TEXTS = {
    "code": (ROOT / "router" / "predictor.py").read_text(encoding="utf-8"),
    "prose": (ROOT / "README.md").read_text(encoding="utf-8")[:20_000],
    "json": json.dumps(
        json.loads((ROOT / "models" / "default" / "manifest.json").read_text(encoding="utf-8"))
    ),
    "digests": "\n".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(100)),
    "table": "\n".join(f"{i * 7919 % 100003},{i * 104729 % 99991},{i}" for i in range(500)),
    "html": '<div class="row"><a href="/x?y=1">link</a><span>text</span></div>\n' * 100,
    "chinese": "机器学习是人工智能的一个分支，它使用数据和算法来模仿人类的学习方式，逐步提高其准确性。" * 20,
    "japanese": "機械学習とは、コンピュータがデータから学習し、予測や判断を行う技術です。カタカナも含まれます。"
    * 20,
    "russian": "Машинное обучение — это раздел искусственного интеллекта, изучающий методы построения алгоритмов."
    * 20,
    "german": "Maschinelles Lernen ist die künstliche Erzeugung von Wissen aus Erfahrung: Größen, Übungen. "
    * 20,
}


@pytest.fixture(scope="module")
def counters() -> dict[str, Any]:
    """The published tokenizers that come with what the project stands on; no network."""
    import importlib.util

    import tiktoken

    found = importlib.util.find_spec("litellm")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0]) / "litellm_core_utils" / "tokenizers"
    claude = Tokenizer.from_str((folder / "anthropic_tokenizer.json").read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        openai = tiktoken.get_encoding("cl100k_base")
    return {
        "openai": lambda text: len(openai.encode(text, disallowed_special=())),
        "claude": lambda text: len(claude.encode(text).ids),
    }


@pytest.mark.parametrize("kind", TEXTS)
def test_the_estimate_lies_rather_above_than_below_what_tokenizers_say(
    kind: str, counters: dict[str, Any]
) -> None:
    estimate = estimate_tokens(TEXTS[kind])
    for name, count in counters.items():
        assert 0.8 < estimate / count(TEXTS[kind]) < 2.1, name


def test_the_estimate_is_near_on_code_and_prose(counters: dict[str, Any]) -> None:
    for kind in ("code", "prose", "json", "chinese", "japanese"):
        assert 0.95 < estimate_tokens(TEXTS[kind]) / counters["openai"](TEXTS[kind]) < 1.5, kind


def test_no_text_is_no_token_and_half_a_surrogate_pair_is_counted() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("\ud800") > 0


PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}


def test_an_image_counts_as_one_and_not_by_its_characters() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, PNG]}]}
    assert IMAGE_TOKENS < Needs(body).tokens < IMAGE_TOKENS + 50


@pytest.mark.parametrize(
    ("body", "features"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, set()),
        ({"messages": [{"role": "user", "content": [PNG]}]}, {"images"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
            {"images"},
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "image", "source": {}}],
                            }
                        ],
                    }
                ]
            },
            {"images"},
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, {"images"}),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]}, {"files"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            {"audio"},
        ),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, {"files"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            {"files"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text"}}]}]},
            set(),
        ),
        ({"messages": [], "tools": [{"type": "function"}]}, {"tools"}),
        ({"messages": [], "tools": []}, set()),
        ({"messages": [], "response_format": {"type": "json_schema", "json_schema": {}}}, {"json_schema"}),
        ({"messages": [], "response_format": {"type": "json_object"}}, set()),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, {"json_schema"}),
        ({"messages": [], "output_config": {"format": {"type": "json_schema"}}}, {"json_schema"}),
        ({"messages": [], "modalities": ["text", "audio"]}, {"audio"}),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}, 7]}, "x"]}, set()),
        ({"prompt": "x"}, set()),
    ],
)
def test_what_a_request_asks_of_a_model(body: dict[str, Any], features: set[str]) -> None:
    assert Needs(body).features == features


def test_tools_and_what_they_are_called_with_count() -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "word " * 400}}
    bare = [{"role": "user", "content": "x"}]
    plain = Needs({"messages": bare}).tokens
    assert Needs({"messages": bare, "tools": [tool]}).tokens > plain + 300
    assert Needs({"messages": [*bare, {"role": "assistant", "tool_calls": [call]}]}).tokens > plain + 400
    used = {"type": "tool_use", "id": "t", "name": "f", "input": {"text": "word " * 400}}
    assert Needs({"messages": [*bare, {"role": "assistant", "content": [used]}]}).tokens > plain + 400


def target(**fields: Any) -> Target:
    return Target.model_validate({"model": "openai/x", **fields})


def asked(tokens: int, **fields: Any) -> Needs:
    """A request of about so many tokens, letters alone."""
    return Needs({"messages": [{"role": "user", "content": "a" * (tokens * 4)}], **fields})


def test_a_target_that_declares_nothing_can_take_everything() -> None:
    needs = Needs({"messages": [{"role": "user", "content": [PNG]}], "tools": [{}], "max_tokens": 10**9})
    assert lacks(target(), needs) is None
    assert "tokens" not in vars(needs)  # and nothing was counted for it


def test_the_window_has_to_hold_the_answer_too() -> None:
    assert lacks(target(context_window=10_000 + ANSWER_TOKENS + 50), asked(10_000)) is None
    lack = lacks(target(context_window=10_000 + ANSWER_TOKENS - 50), asked(10_000))
    assert lack is not None
    assert lack.code == "context_length_exceeded"
    assert "about 10,00" in lack.words
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        assert lacks(target(context_window=16_000), asked(10_000, **{field: 5_000})) is None
        assert lacks(target(context_window=16_000), asked(10_000, **{field: 7_000})) is not None


def test_an_answer_longer_than_a_target_gives() -> None:
    assert lacks(target(max_output_tokens=8_000), asked(10, max_tokens=8_000)) is None
    lack = lacks(target(max_output_tokens=8_000), asked(10, max_tokens=8_001))
    assert lack is not None
    assert "8,001" in lack.words
    assert lacks(target(max_output_tokens=100), asked(10)) is None  # the client did not ask for more


def test_what_is_declared_and_missing_is_named() -> None:
    needs = Needs({"messages": [{"role": "user", "content": [PNG]}], "tools": [{}]})
    assert lacks(target(supports=["tools", "images"]), needs) is None
    lack = lacks(target(supports=[]), needs)
    assert lack == ("does not take images and tools", "unsupported_content")


def test_a_small_body_is_not_counted_token_by_token() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 4000}, PNG]}]}
    size = len(json.dumps(body))
    small = Needs(body, size)
    assert lacks(target(context_window=size + FILE_TOKENS + ANSWER_TOKENS), small) is None
    assert "tokens" not in vars(small)
    assert small.at_most >= small.tokens
    # An image by its URL is more tokens than bytes.
    urls = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}] * 9}]}
    assert Needs(urls, len(json.dumps(urls))).at_most >= Needs(urls).tokens >= 9 * IMAGE_TOKENS


def test_files_count_by_their_size() -> None:
    def document(characters: int) -> int:
        part = {"type": "document", "source": {"type": "base64", "data": "A" * characters}}
        return Needs({"messages": [{"role": "user", "content": [part]}]}).tokens

    assert document(10) >= FILE_TOKENS
    assert document(4_000_000) > 100_000


def test_nesting_as_deep_as_json_allows_is_no_error() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = {"content": [deep]}
    assert Needs({"messages": [deep], "tools": [deep]}).tokens >= 0


def test_whatever_a_body_holds_reading_it_is_no_error() -> None:
    random = np.random.default_rng(0)
    keys = [
        "messages",
        "input",
        "role",
        "type",
        "content",
        "tool_calls",
        "function",
        "source",
        "output",
        "text",
        "name",
    ]
    words = [
        "user",
        "assistant",
        "tool",
        "tool_result",
        "image",
        "document",
        "function_call_output",
        "system",
        "",
        "é",
    ]

    def value(depth: int) -> Any:
        kind = int(random.integers(6 if depth else 4))
        if kind == 4:
            return [value(depth - 1) for _ in range(random.integers(4))]
        if kind == 5:
            return {str(random.choice(keys)): value(depth - 1) for _ in range(random.integers(5))}
        return (None, 7, True, str(random.choice(words)))[kind]

    for _ in range(3000):
        body = {
            str(random.choice(keys[:2])): [value(4) for _ in range(3)],
            "tools": value(2),
            "max_tokens": value(1),
        }
        content = Content(body)
        assert content.needs.tokens >= 0
        assert content.needs.room > 0
        assert content.needs.features <= {"images", "audio", "files", "tools", "json_schema"}
        for result in content.results:
            assert result.kind in ("read", "edit", "run", "web", "other")
