"""Embeddings of a dataset, computed once: joblib keeps them on disk under the encoder's hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Memory, Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from platformdirs import user_cache_dir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from router.features import Encoder, Prompt
from router.predictor import unit_rows

# Prompts a cache entry: small enough that progress shows and that a longer dataset reuses most of a shorter one's.
CHUNK = 256
# Rows whose cosines to all others are held at once: 1,024 × 14,000 float32 are 57 MB.
_ROWS_AT_ONCE = 1024


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


def near_duplicate_groups(
    embedding: NDArray[np.floating[Any]], groups: ArrayLike, cosine: float = 0.95
) -> NDArray[np.str_]:
    """Groups with near-duplicates merged, directly or through others, shape (n,).

    A prompt that differs from a training prompt by a name or a number is no new prompt: rows whose embeddings have
    at least this cosine come into one group, and with them the rest of their groups.

    Parameters
    ----------
    embedding : ndarray, shape (n, d)
        Of any length; a row of zeros is near to none.
    groups : array_like of str, shape (n,)
    cosine : float
        Above 0.

    Returns
    -------
    ndarray of str, shape (n,)
        A merged group bears the name of the group of its first row.
    """
    _, first, member = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    unit = unit_rows(embedding)
    pairs = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        # Against this chunk and the rows after it: the others have met it already.
        a, b = np.nonzero(unit[start : start + _ROWS_AT_ONCE] @ unit[start:].T >= cosine)
        pairs.append(np.stack([member[start + a], member[start + b]]))
    left, right = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.intp)
    near = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(len(first), len(first)))
    merged = connected_components(near, directed=False)[1][member]
    _, named_by, row = np.unique(merged, return_index=True, return_inverse=True)
    names: NDArray[np.str_] = np.asarray(groups, dtype=np.str_)[named_by][row]
    return names


def _encode_chunk(
    encoder_hash: str, texts_digest: str, texts: tuple[str, ...], encoder: Encoder
) -> NDArray[np.float32]:
    """``encoder_hash`` and ``texts_digest`` are the cache's key; the encoder and the texts are left out of it."""
    return np.stack([encoder.encode(text) for text in texts])


def _digest(texts: tuple[str, ...]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()
