"""Messages → prompt → features: one definition, used by training and serving alike.

A prompt becomes three things: an embedding, hashed word n-grams, and dense features of its surface and of the
conversation's state. ``FEATURES_VERSION`` is raised whenever the same prompt would yield other numbers; a bundle
trained on another version is refused.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.conversation import (
    TEXT_BUDGET,
    ConversationState,
    Prompt,
    prompt_from_messages,
    prompt_from_text,
)
from router.encoder import (
    CONFIG_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    Encoder,
    EncoderConfig,
    OnnxEncoder,
    encoder_hash,
    load_encoder,
)

__all__ = [
    "CONFIG_FILE",
    "DENSE_FEATURES",
    "FEATURES_VERSION",
    "MODEL_FILE",
    "NGRAM_BUCKETS",
    "TEXT_BUDGET",
    "TOKENIZER_FILE",
    "ConversationState",
    "Encoder",
    "EncoderConfig",
    "Features",
    "Ngrams",
    "OnnxEncoder",
    "Prompt",
    "encoder_hash",
    "extract",
    "load_encoder",
    "prompt_from_messages",
    "prompt_from_text",
]

FEATURES_VERSION = 1

# 2^18 buckets lose nothing against a vocabulary on 14,000 prompts; 2^14 do.
NGRAM_BUCKETS = 1 << 18

# A punctuation mark is a word of its own: operators, quotes and list marks say what kind of text it is.
_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")

_SURFACE = (
    "characters",
    "words",
    "lines",
    "digits",
    "capitals",
    "punctuation",
    "non_ascii",
    "numbers",
    "distinct_words",
    "word_length",
    "questions",
    "formulas",
    "underscores",
    "code_block",
    "parentheses",
    "commas",
)
_STATE = (
    "turns",
    "depth",
    "context",
    "tools_offered",
    "tool_results",
    "last_result_read",
    "last_result_edit",
    "last_result_run",
    "last_result_web",
    "last_result_other",
    "last_result_characters",
    "last_result_error",
    "last_result_failed_test",
)
DENSE_FEATURES = (*_SURFACE, *_STATE)


@dataclass(frozen=True, slots=True)
class Ngrams:
    """Hashed word 1- and 2-grams of n prompts in compressed sparse rows.

    Row i has the buckets ``bucket[start[i]:start[i + 1]]``, each once, with their counts.

    Attributes
    ----------
    start : ndarray of int64, shape (n + 1,)
    bucket : ndarray of int64, values below ``NGRAM_BUCKETS``
    count : ndarray of float32
    """

    start: NDArray[np.int64]
    bucket: NDArray[np.int64]
    count: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Features:
    """Features of n prompts.

    Attributes
    ----------
    embedding : ndarray of float32, shape (n, d)
    ngrams : Ngrams
    dense : ndarray of float32, shape (n, len(DENSE_FEATURES))
    """

    embedding: NDArray[np.float32]
    ngrams: Ngrams
    dense: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.dense)

    def take(self, rows: NDArray[np.intp]) -> Features:
        """The features of some of the prompts, by their indices."""
        start, bucket, count = self.ngrams.start, self.ngrams.bucket, self.ngrams.count
        lengths = start[rows + 1] - start[rows]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        # Position of every kept entry: its row's start, plus its offset within the row.
        positions = np.repeat(start[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return Features(
            embedding=self.embedding[rows],
            ngrams=Ngrams(start=starts, bucket=bucket[positions], count=count[positions]),
            dense=self.dense[rows],
        )


def extract(
    prompts: Sequence[Prompt], encoder: Encoder, embeddings: NDArray[np.float32] | None = None
) -> Features:
    """Features of some prompts.

    Parameters
    ----------
    prompts : sequence of Prompt, length n
    encoder : Encoder
        Called once a prompt.
    embeddings : ndarray of float32, shape (n, d), optional
        What the encoder gave for these prompts before; the encoder is then not called.
    """
    if embeddings is None:
        rows = [encoder.encode(prompt.text) for prompt in prompts]
        embeddings = np.stack(rows) if rows else np.zeros((0, encoder.dimension), np.float32)
    return Features(
        embedding=embeddings,
        ngrams=_ngrams(prompt.text for prompt in prompts),
        dense=np.array([_dense(prompt) for prompt in prompts], dtype=np.float32).reshape(
            len(prompts), len(DENSE_FEATURES)
        ),
    )


def _ngrams(texts: Iterable[str]) -> Ngrams:
    start, buckets, counts = [0], [], []
    for text in texts:
        words = _WORD.findall(text.lower())
        grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        hashes = np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams], dtype=np.int64)
        bucket, count = np.unique(hashes & (NGRAM_BUCKETS - 1), return_counts=True)
        start.append(start[-1] + len(bucket))
        buckets.append(bucket)
        counts.append(count)
    return Ngrams(
        start=np.array(start, dtype=np.int64),
        bucket=np.concatenate(buckets) if buckets else np.zeros(0, np.int64),
        count=(np.concatenate(counts) if counts else np.zeros(0)).astype(np.float32),
    )


def _dense(prompt: Prompt) -> list[float]:
    """Counts as logarithms, shares as shares; the order is that of ``DENSE_FEATURES``."""
    text, state, log = prompt.text, prompt.state, math.log1p
    length = max(len(text), 1)
    words = text.split()
    letters = sum(map(str.isalnum, text))
    spaces = sum(map(str.isspace, text))
    return [
        log(prompt.characters),
        log(len(words)),
        log(text.count("\n")),
        sum(map(str.isdigit, text)) / length,
        sum(map(str.isupper, text)) / length,
        (len(text) - letters - spaces) / length,
        (len(text) - len(text.encode("ascii", "ignore"))) / length,
        log(len(_NUMBER.findall(text))),
        len(set(map(str.lower, words))) / max(len(words), 1),
        sum(map(len, words)) / max(len(words), 1),
        log(text.count("?")),
        log(text.count("$") + text.count("\\")),
        log(text.count("_")),
        float("```" in text),
        log(text.count("(")),
        log(text.count(",")),
        log(state.turns),
        log(state.depth),
        log(state.characters),
        log(state.tools_offered),
        log(state.tool_results),
        float(state.last_result == "read"),
        float(state.last_result == "edit"),
        float(state.last_result == "run"),
        float(state.last_result == "web"),
        float(state.last_result == "other"),
        log(state.last_result_characters),
        float(state.last_result_error),
        float(state.last_result_failed_test),
    ]
