from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from router.conversation import ConversationState, Prompt, prompt_from_messages, prompt_from_text
from router.encoder import OnnxEncoder
from router.features import DENSE_FEATURES, NGRAM_BUCKETS, Features, extract


class Lengths:
    """An encoder that says how long a text is, and counts its calls."""

    name, hash, dimension = "lengths", "0", 3

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> NDArray[np.float32]:
        self.texts.append(text)
        return np.array([len(text), 1, 0], dtype=np.float32)


def features(*texts: str) -> Features:
    return extract([prompt_from_text(text) for text in texts], Lengths())


def dense(prompt: Prompt) -> dict[str, float]:
    (row,) = extract([prompt], Lengths()).dense
    return dict(zip(DENSE_FEATURES, row.tolist(), strict=True))


def counts(found: Features, row: int) -> dict[int, float]:
    here = slice(found.ngrams.start[row], found.ngrams.start[row + 1])
    return dict(zip(found.ngrams.bucket[here].tolist(), found.ngrams.count[here].tolist(), strict=True))


# --- n-grams -------------------------------------------------------------------------------------------------------


def test_ngrams_are_words_marks_and_pairs_hashed_by_crc32() -> None:
    grams = ["if", "x", "=", "=", "5", "if x", "x =", "= =", "= 5"]
    expected = Counter(zlib.crc32(gram.encode()) % 2**18 for gram in grams)
    assert counts(features("IF x==5"), 0) == expected
    assert NGRAM_BUCKETS == 2**18
    # The check value of CRC-32 as its catalogues give it, so that the hash itself cannot change unnoticed.
    assert counts(features("123456789"), 0) == {0xCBF43926 & 0x3FFFF: 1.0}


def test_rows_of_ngrams_do_not_run_into_each_other() -> None:
    found = features("a b", "", "c")
    assert found.ngrams.start.tolist() == [0, 3, 3, 4]
    assert set(counts(found, 2)) == {zlib.crc32(b"c") % NGRAM_BUCKETS}
    assert counts(found, 1) == {}


def test_no_words_at_all() -> None:
    found = extract([], Lengths())
    assert len(found) == 0
    assert found.embedding.shape == (0, 3)
    assert found.dense.shape == (0, len(DENSE_FEATURES))
    assert found.ngrams.start.tolist() == [0]


# --- Rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[2, 0], [1], [3, 3, 1], [], [0, 1, 2, 3]])
def test_taking_rows_is_extracting_fewer(rows: list[int]) -> None:
    texts = ["What is 2 + 2?", "", "def f(x):\n    return x", "naïve café ☕"]
    taken = features(*texts).take(np.array(rows, dtype=np.intp))
    expected = features(*(texts[row] for row in rows))
    assert np.array_equal(taken.embedding, expected.embedding)
    assert np.array_equal(taken.dense, expected.dense)
    for name in ("start", "bucket", "count"):
        assert np.array_equal(getattr(taken.ngrams, name), getattr(expected.ngrams, name))
        assert getattr(taken.ngrams, name).dtype == getattr(expected.ngrams, name).dtype


def test_the_encoder_is_called_once_a_prompt_and_not_where_embeddings_are_known() -> None:
    encoder = Lengths()
    prompts = [prompt_from_text(text) for text in ("a", "bb", "a")]
    found = extract(prompts, encoder)
    assert encoder.texts == ["a", "bb", "a"]
    assert extract(prompts, encoder, found.embedding).embedding is found.embedding
    assert len(encoder.texts) == 3


# --- Dense features ------------------------------------------------------------------------------------------------


def test_each_dense_feature_stands_under_its_name() -> None:
    text = "Is f_1(x) = 2, or\nf_2(X) = $30$? Café \\alpha ```py``` is it"
    found = dense(prompt_from_text(text))
    n, words = len(text), text.split()
    assert found["characters"] == pytest.approx(math.log1p(n))
    assert found["words"] == pytest.approx(math.log1p(len(words)))
    assert found["lines"] == pytest.approx(math.log1p(1))
    assert found["digits"] == pytest.approx(5 / n)
    assert found["capitals"] == pytest.approx(3 / n)
    assert found["non_ascii"] == pytest.approx(1 / n)
    assert found["numbers"] == pytest.approx(math.log1p(4))
    assert found["distinct_words"] == pytest.approx(len({word.lower() for word in words}) / len(words))
    assert found["word_length"] == pytest.approx(sum(map(len, words)) / len(words))
    assert found["questions"] == pytest.approx(math.log1p(1))
    assert found["formulas"] == pytest.approx(math.log1p(3))
    assert found["underscores"] == pytest.approx(math.log1p(2))
    assert found["code_block"] == 1.0
    assert found["parentheses"] == pytest.approx(math.log1p(2))
    assert found["commas"] == pytest.approx(math.log1p(1))
    marks = sum(not (c.isalnum() or c.isspace()) for c in text)
    assert found["punctuation"] == pytest.approx(marks / n)


def test_the_state_of_the_conversation_stands_under_its_names() -> None:
    state = ConversationState(
        turns=2,
        depth=7,
        characters=999,
        tools_offered=4,
        tool_results=3,
        last_result="run",
        last_result_characters=50,
        last_result_error=True,
        last_result_failed_test=False,
    )
    found = dense(Prompt("Go on", 5, state))
    assert [found[name] for name in DENSE_FEATURES[16:]] == pytest.approx(
        [*map(math.log1p, (2, 7, 999, 4, 3)), 0.0, 0.0, 1.0, 0.0, 0.0, math.log1p(50), 1.0, 0.0]
    )
    assert DENSE_FEATURES[16:18] == ("turns", "depth")


def test_the_full_length_of_a_cut_prompt_is_a_feature() -> None:
    assert dense(prompt_from_text("a " * 50_000))["characters"] == pytest.approx(math.log1p(99_999))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "😀",
        "👩‍👩‍👧‍👦" * 500,
        "\ud800",
        "a\udfffb " * 40,
        "\x00\x01",
        "É" * 9_000,
        "x" * 200_000,
        "٣ ½ Ⅷ",
    ],
)
def test_features_of_odd_text_are_finite(encoder: OnnxEncoder, text: str) -> None:
    found = extract([prompt_from_text(text)], encoder)
    assert found.dense.shape == (1, len(DENSE_FEATURES))
    assert np.isfinite(found.dense).all()
    assert np.isfinite(found.embedding).all()
    assert (found.ngrams.bucket >= 0).all()
    assert (found.ngrams.bucket < NGRAM_BUCKETS).all()
    assert (found.ngrams.count >= 1).all()
    shares = ("digits", "capitals", "punctuation", "non_ascii", "distinct_words")
    named = dict(zip(DENSE_FEATURES, found.dense[0].tolist(), strict=True))
    assert all(0.0 <= named[name] <= 1.0 for name in shares)


def test_a_prompt_has_the_same_features_alone_and_among_others(encoder: OnnxEncoder) -> None:
    texts = ["hi", "Prove that there are infinitely many primes. " * 30, "SELECT 1;"]
    together = extract([prompt_from_text(text) for text in texts], encoder)
    for row, text in enumerate(texts):
        alone = extract([prompt_from_messages([{"role": "user", "content": text}])], encoder)
        same = together.take(np.array([row]))
        assert np.array_equal(alone.embedding, same.embedding)
        assert np.array_equal(alone.dense, same.dense)
        assert np.array_equal(alone.ngrams.bucket, same.ngrams.bucket)
