"""Labelled prompts whose qualities follow from known signals, without an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.features import Features, Prompt, extract, prompt_from_text

Floats = NDArray[np.float64]

DIMENSION = 16
WORDS = tuple(
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ri", "sa", "to") for b in ("bal", "den", "fir")
)


@dataclass(frozen=True)
class Labelled:
    """n prompts with features and the quality of each target."""

    prompts: tuple[Prompt, ...]
    features: Features
    quality: Floats
    groups: NDArray[np.str_]


class NoEncoder:
    """Stands where embeddings are given."""

    name, hash, dimension = "none", "0", DIMENSION

    def encode(self, text: str) -> NDArray[np.float32]:
        raise AssertionError("not to be called")


def labelled(
    n: int, *, targets: int = 2, word_signal: float = 2.0, embedding_signal: float = 2.0, seed: int = 0
) -> Labelled:
    """Prompts whose dearer targets gain by a word that is in the text and by a direction of the embedding.

    The two signals are independent, and no part of the estimator but the words sees the first one.
    """
    random = np.random.default_rng(seed)
    embedding = random.normal(size=(n, DIMENSION))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    drawn = random.integers(len(WORDS), size=(n, 6))
    prompts = tuple(prompt_from_text(" ".join(WORDS[word] for word in row)) for row in drawn)
    by_word = np.where((drawn < 4).any(axis=1), 1.0, -1.0)
    by_embedding = np.sign(embedding[:, 0]) * np.minimum(np.abs(embedding[:, 0]) * 6, 1.5)
    signal = word_signal * by_word + embedding_signal * by_embedding
    # The cheapest fails where the signal is high; the others hardly depend on it, the dearest least of all.
    columns = [1 / (1 + np.exp(signal))] + [
        1 / (1 + np.exp(0.3 * (targets - 1 - t) * signal - 0.2 * signal - 0.5)) for t in range(1, targets)
    ]
    quality = (random.random((n, targets)) < np.stack(columns, axis=1)).astype(np.float64)
    features = extract(prompts, NoEncoder(), embedding.astype(np.float32))
    return Labelled(prompts, features, quality, np.array([f"g{i}" for i in range(n)]))
