"""A labelled dataset: prompts with the quality of each target, from JSONL, CSV or Parquet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.features import Prompt

Floats = NDArray[np.float64]
Strings = NDArray[np.str_]


@dataclass(frozen=True)
class Dataset:
    """Prompts and what each target made of them.

    Attributes
    ----------
    ids, sources, domains : ndarray of str, shape (n,)
        ``domains`` is empty strings where a row has none.
    groups : ndarray of str, shape (n,)
        Rows of one group stay on one side of a split. Identical prompts share a group.
    prompts : tuple of Prompt, length n
    targets : tuple of str, length T
    quality : ndarray, shape (n, T)
        0 to 1; NaN where a target has no label for a row.
    cost : ndarray, shape (n, T)
        US dollars a request; NaN where unknown.
    output_tokens : ndarray, shape (n, T)
        NaN where unknown.
    digest : str
        SHA-256 over the files it was read from, hexadecimal.
    """

    ids: Strings
    sources: Strings
    domains: Strings
    groups: Strings
    prompts: tuple[Prompt, ...]
    targets: tuple[str, ...]
    quality: Floats
    cost: Floats
    output_tokens: Floats
    digest: str = ""

    def __len__(self) -> int:
        return len(self.prompts)
