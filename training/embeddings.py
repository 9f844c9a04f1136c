"""Embeddings of a dataset, computed once: joblib keeps them on disk under the encoder's hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from joblib import Memory, Parallel, delayed
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from router.features import Encoder, Prompt

# Prompts a cache entry: small enough that progress shows and that a longer dataset reuses most of a shorter one's.
CHUNK = 256


def cache_dir() -> Path:
    """``ROUTER_CACHE_DIR``, or the user's cache directory."""
    return Path(os.environ.get("ROUTER_CACHE_DIR") or user_cache_dir("llm-difficulty-router"))


def embed(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    *,
    progress: Callable[[int], None] = lambda n: None,
    cache: Path | None = None,
) -> NDArray[np.float32]:
    """Embeddings of n prompts, shape (n, d).

    Parameters
    ----------
    prompts : sequence of Prompt
    encoder : Encoder
    progress : callable
        Called with the number of prompts that were just finished.
    cache : Path, optional
        Where embeddings are kept; :func:`cache_dir` by default.
    """
    # joblib writes a call's arguments beside its result, in plain text: the prompts are known by their digest alone.
    remembered = Memory(cache or cache_dir(), verbose=0).cache(_encode_chunk, ignore=["texts", "encoder"])
    texts = [prompt.text for prompt in prompts]
    chunks = [tuple(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    # Threads: the encoder lets go of the interpreter while it computes.
    results = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
        delayed(remembered)(encoder.hash, _digest(chunk), chunk, encoder) for chunk in chunks
    )
    found = []
    for chunk, rows in zip(chunks, results, strict=True):
        found.append(rows)
        progress(len(chunk))
    return np.concatenate(found) if found else np.zeros((0, encoder.dimension), np.float32)


def _encode_chunk(
    encoder_hash: str, texts_digest: str, texts: tuple[str, ...], encoder: Encoder
) -> NDArray[np.float32]:
    """``encoder_hash`` and ``texts_digest`` are the cache's key; the encoder and the texts are left out of it."""
    return np.stack([encoder.encode(text) for text in texts])


def _digest(texts: tuple[str, ...]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()
