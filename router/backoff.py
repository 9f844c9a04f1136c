"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Callable

_MOST_DOUBLINGS = 16


def backoff(
    failures: int, first: float, longest: float, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Seconds to wait after ``failures`` in a row, 1 or more: ``first``, doubled with each, up to ``longest``.

    Half of them by chance: what failed together does not come back together ("equal jitter"; M. Brooker, Exponential
    Backoff and Jitter, AWS Architecture Blog, 2015).
    """
    most = min(first * 2 ** min(failures - 1, _MOST_DOUBLINGS), longest)
    return uniform(most / 2, most)
