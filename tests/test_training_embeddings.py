from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from router.features import Prompt, prompt_from_text
from training.embeddings import CHUNK, cache_dir, embed, near_duplicate_groups


class Counting:
    """An encoder that counts its calls; an embedding tells its text's length."""

    name, dimension = "counting", 2

    def __init__(self, hash: str = "one") -> None:
        self.hash = hash
        self.calls = 0

    def encode(self, text: str) -> NDArray[np.float32]:
        self.calls += 1
        return np.array([len(text), ord(text[0]) if text else 0], dtype=np.float32)


def prompts(n: int, start: int = 0) -> list[Prompt]:
    return [prompt_from_text(f"{chr(97 + i % 26)}{'x' * i}") for i in range(start, start + n)]


def test_rows_stand_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    asked = prompts(2 * CHUNK + 7)
    done: list[int] = []
    found = embed(asked, Counting(), progress=done.append, cache=tmp_path)
    assert np.array_equal(found, np.stack([Counting().encode(prompt.text) for prompt in asked]))
    assert found.dtype == np.float32
    assert done == [CHUNK, CHUNK, 7]


def test_each_prompt_is_encoded_once_and_never_again(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    asked = prompts(CHUNK + 3)
    expected = embed(asked, first, cache=tmp_path)
    assert first.calls == CHUNK + 3
    assert np.array_equal(embed(asked, again, cache=tmp_path), expected)
    assert again.calls == 0
    # A longer dataset that begins alike encodes what is new, by whole chunks.
    longer = Counting()
    embed(prompts(CHUNK + 20), longer, cache=tmp_path)
    assert longer.calls == 20


def test_another_encoder_has_its_own_entries(tmp_path: Path) -> None:
    embed(prompts(5), Counting("one"), cache=tmp_path)
    other = Counting("two")
    embed(prompts(5), other, cache=tmp_path)
    assert other.calls == 5


def test_texts_that_differ_in_their_seams_have_their_own_entries(tmp_path: Path) -> None:
    one, two = Counting(), Counting()
    embed([prompt_from_text("ab"), prompt_from_text("c")], one, cache=tmp_path)
    found = embed([prompt_from_text("a"), prompt_from_text("bc")], two, cache=tmp_path)
    assert found[:, 0].tolist() == [1.0, 2.0]
    assert two.calls == 2


def test_no_prompts(tmp_path: Path) -> None:
    assert embed([], Counting(), cache=tmp_path).shape == (0, 2)


def test_no_text_of_a_prompt_is_kept_on_disk(tmp_path: Path) -> None:
    secret = "the merger with Umbrella closes on Friday"
    embed([prompt_from_text(secret)], Counting(), cache=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"Umbrella" in path.read_bytes() or "Umbrella" in str(path)]


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_CACHE_DIR", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    embed(prompts(2), Counting())
    assert any((tmp_path / "here").rglob("*.pkl"))
    monkeypatch.setenv("ROUTER_CACHE_DIR", "")
    assert cache_dir().name == "llm-difficulty-router"


def test_near_duplicates_and_all_that_is_near_them_come_into_one_group() -> None:
    def at(degrees: float, length: float = 1.0) -> list[float]:
        return [length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))]

    # Cosine .95 is 18.2 degrees: 0, 15 and 30 are a chain; 60 is alone but shares its group with 120; zeros are near none.
    embedding = np.array([at(0), at(60), at(15, 9.0), at(30), at(120), [0, 0], [0, 0], at(200)])
    groups = np.array(["a", "b", "c", "d", "b", "e", "f", "d"])
    found = near_duplicate_groups(embedding, groups)
    assert list(found) == ["a", "b", "a", "a", "b", "e", "f", "a"]
    assert list(near_duplicate_groups(embedding, groups, cosine=0.999)) == list(groups)


def test_near_duplicates_are_found_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(50, 32))
    embedding = np.concatenate([rows, rows + random.normal(0, 0.01, rows.shape)])
    groups = np.array([f"g{i:03}" for i in range(100)])
    whole = near_duplicate_groups(embedding, groups)
    assert list(whole[50:]) == list(groups[:50])
    monkeypatch.setattr("training.embeddings._ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(near_duplicate_groups(embedding, groups), whole)
