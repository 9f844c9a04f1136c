"""Bundle + prompts → qualities and score; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a bundle expects of each target, for n prompts.

    Attributes
    ----------
    targets : tuple of str, length T
        Cheapest first.
    quality : ndarray, shape (n, T)
        Calibrated expected quality, 0 to 1.
    gain : ndarray, shape (n, T)
        Calibrated expected gain in quality over the cheapest target; column 0 is zero.
    """

    targets: tuple[str, ...]
    quality: NDArray[np.float64]
    gain: NDArray[np.float64]

    @property
    def score(self) -> NDArray[np.float64]:
        """Shape (n,): the gain of the best other target over the cheapest; negative where the cheapest is best."""
        best: NDArray[np.float64] = self.gain[:, 1:].max(axis=1)
        return best

    def choose(self, threshold: float) -> NDArray[np.intp]:
        """Shape (n,): the index of the cheapest target whose gain is within ``threshold`` of the score.

        With two targets this is ``score > threshold`` → 1, else 0. A negative threshold pays for the best other
        target even where it is expected to lose by up to that much.
        """
        within = self.gain >= self.score[:, None] - threshold
        # Rounding must not leave a row without a choice: the best other target always qualifies.
        best = 1 + self.gain[:, 1:].argmax(axis=1)
        first: NDArray[np.intp] = np.where(within.any(axis=1), within.argmax(axis=1), best)
        return first
