"""A stand-in provider: rehearse labelling with known qualities, without a key, a network or a cent.

Its answers are not answers and its labels say nothing about any model. They are there to try the steps, and to see how well a
noisy judge recovers qualities that are known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from router.dispatch import Completion
from router.errors import UsageError
from training.dataset import estimated_tokens
from training.labels import Job

# What an answer says of itself: the judge reads it, as a judge reads how good an answer is.
_CLAIM = "Stand-in answer of quality {quality:.3f}."
_CLAIMED = re.compile(r"Stand-in answer of quality ([01]\.\d{3})\.")


class StandIn:
    """Calls of two models and a judge, for :func:`training.labels.label`.

    Parameters
    ----------
    job : Job
        The names it answers to.
    quality : mapping of str to (float, float)
        What is true: by prompt (the text of the last message), the qualities of weak's and of strong's answer, 0 to 1.
    noise : float
        Standard deviation of the judge's error on each answer, in units of quality.
    answer_tokens : tuple of int
        What an answer of weak and of strong is counted as.
    seed : int
        Of the judge's errors, which depend on what it is asked and not on when.
    """

    def __init__(
        self,
        job: Job,
        quality: Mapping[str, tuple[float, float]],
        *,
        noise: float = 0.1,
        answer_tokens: tuple[int, int] = (450, 650),
        seed: int = 0,
    ) -> None:
        self._job = job
        self._quality = quality
        self._noise = noise
        self._answer_tokens = answer_tokens
        self._seed = seed

    async def __call__(
        self, model: str, messages: Sequence[Mapping[str, Any]], /, *, max_tokens: int
    ) -> Completion:
        """Answer one call; its cost is left to the caller's prices.

        Raises
        ------
        UsageError
            The model is not of the job, or the prompt is not known.
        """
        read = estimated_tokens(json.dumps(list(messages), ensure_ascii=False))
        asked = str(messages[-1]["content"])
        # A judge is asked in a form of its own, so that it may be one of the two models as well.
        if model == self._job.judge and (claims := _CLAIMED.findall(asked)):
            verdict = self._verdict([float(claim) for claim in claims], asked)
            return Completion(verdict, read, estimated_tokens(verdict), None)
        if model not in (self._job.weak, self._job.strong):
            raise UsageError(f"the stand-in was asked for {model}, which is not of its job")
        if asked not in self._quality:
            raise UsageError("the stand-in was asked a prompt whose qualities it was not told")
        t = int(model == self._job.strong)
        answer = _CLAIM.format(quality=self._quality[asked][t])
        return Completion(answer, read, min(self._answer_tokens[t], max_tokens), None)

    def _verdict(self, claims: Sequence[float], asked: str) -> str:
        digest = hashlib.sha256(f"{self._seed}\0{asked}".encode(errors="replace")).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8]))
        seen = np.array(claims) + random.normal(0.0, self._noise, len(claims))
        if len(claims) == 1:
            return json.dumps({"score": int(np.clip(round(10 * seen[0]), 0, 10))})
        first, second = seen
        if abs(first - second) < self._noise / 2:
            return json.dumps({"winner": "tie"})
        return json.dumps({"winner": "A" if first > second else "B"})
