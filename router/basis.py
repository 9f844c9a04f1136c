"""What a request was decided on, as the ledger keeps it: enough to decide it again by another policy, and no text of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np

from router.capability import KnownNeeds
from router.content import Content, KnownContent
from router.conversation import ConversationState, Prompt
from router.decision import Decision, RequestFacts
from router.policy import Capability
from router.predictor import Prediction
from router.steps import KnownResult
from router.upstream import MOST_TOKENS

_LONGEST_NAME = 256  # of a model: a longer one names nothing
_LONGEST_TOOL = 64
_MOST_RESULTS = 16  # the latest
_CAPABILITIES = frozenset(get_args(Capability))

# Of a request of which nothing is known.
NOTHING = KnownContent(KnownNeeds())


@dataclass(frozen=True, slots=True)
class Basis:
    """What a decision was made from, beside what a ledger's row says of it.

    Attributes
    ----------
    asked : str
        The model that the client asked for.
    threshold : float or None
        The client's own.
    content : KnownContent
        The estimated tokens, what the target must be able to do, the tool results that the request ends in.
    decided : str or None
        The target that was decided on, where another one answered.
    gain, quality : tuple of float
        Where predicted, of each of the bundle's targets, cheapest first. Of a pair the gain is the row's score, and not here.
    novelty : float or None
        Where the bundle measures it.
    """

    asked: str = "auto"
    threshold: float | None = None
    content: KnownContent = NOTHING
    decided: str | None = None
    gain: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    novelty: float | None = None

    @classmethod
    def of(
        cls, facts: RequestFacts, decision: Decision, decided: str | None = None, *, counted: bool = True
    ) -> Basis:
        """What there is to keep of a request that was decided on; its tokens where they are ``counted`` anyway."""
        prediction = decision.prediction
        gain = () if prediction is None else _rounded(prediction.gain[0])
        return cls(
            facts.model[:_LONGEST_NAME],
            facts.threshold,
            _known(facts.content, counted),
            decided if decided != decision.target else None,
            gain if len(gain) > 2 else (),
            () if prediction is None else _rounded(prediction.quality[0]),
            decision.novelty,
        )

    def as_json(self) -> str:
        """One line; what says nothing is left out."""
        needs, results = self.content.needs, self.content.results
        kept: dict[str, Any] = {
            "asked": self.asked,
            "threshold": self.threshold,
            "tokens": needs.tokens,
            "answer": needs.answer,
            "needs": sorted(needs.features),
            "results": [[one.tool, one.size, int(one.error), int(one.failed_test)] for one in results],
            "decided": self.decided,
            "gain": self.gain,
            "quality": self.quality,
            "novelty": self.novelty,
        }
        kept = {
            name: value for name, value in kept.items() if value or (name == "threshold" and value == 0.0)
        }
        return json.dumps(kept, separators=(",", ":"))

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Basis:
        """What :meth:`as_json` wrote, or somebody by hand.

        Raises
        ------
        ValueError
            A field cannot be read; the message begins with its name.
        """
        asked, decided = kept.get("asked", "auto"), kept.get("decided")
        if not isinstance(asked, str):
            raise ValueError("asked: must be the name of a model")
        if not isinstance(decided, str | None):
            raise ValueError("decided: must be the name of a target")
        needs = kept.get("needs", ())
        if not (isinstance(needs, list | tuple) and all(isinstance(one, str) for one in needs)):
            raise ValueError("needs: must be a list of words")
        if unknown := set(needs) - _CAPABILITIES:
            raise ValueError(f"needs: {min(unknown)!r} is none of {', '.join(sorted(_CAPABILITIES))}")
        return cls(
            asked,
            _number(kept, "threshold"),
            KnownContent(
                KnownNeeds(frozenset(needs), _count(kept, "answer"), _count(kept, "tokens")),
                tuple(map(_result, _list(kept, "results"))),
            ),
            decided,
            tuple(map(float, _list(kept, "gain"))),
            tuple(map(float, _list(kept, "quality"))),
            _number(kept, "novelty"),
        )

    def prediction(self, targets: tuple[str, ...], score: float) -> Prediction | None:
        """What the bundle of these targets said of the request; None where too little of it was kept."""
        gain = self.gain or ((0.0, score) if len(targets) == 2 else ())
        if len(gain) != len(targets):
            return None
        # Without the qualities only the gains can be weighed; a policy that reads them is refused before.
        quality = self.quality if len(self.quality) == len(targets) else (math.nan,) * len(targets)
        novelty = None if self.novelty is None else np.array([self.novelty])
        return Prediction(targets, np.array([quality]), np.array([gain]), novelty)


def state_of(prompt: Prompt) -> str:
    """The numbers of a prompt that is kept, so that it can be predicted again, as one line of JSON."""
    return json.dumps({"length": prompt.characters, **asdict(prompt.state)}, separators=(",", ":"))


def prompt_of(text: str, state: str | None) -> Prompt:
    """A prompt that was kept, with what :func:`state_of` wrote of it; one without is a first message."""
    try:
        kept = json.loads(state or "{}")
        names = {one.name for one in fields(ConversationState)}
        length = int(kept.get("length", len(text)))
        known = ConversationState(**{name: value for name, value in kept.items() if name in names})
    except (ValueError, TypeError, AttributeError):
        raise ValueError("state: cannot be read") from None
    return Prompt(text, length, known)


def _known(content: Content | KnownContent | None, counted: bool) -> KnownContent:
    if content is None:
        return NOTHING
    needs = content.needs
    return KnownContent(
        KnownNeeds(needs.features, needs.answer, needs.tokens if counted else 0),
        tuple(
            KnownResult(one.tool[:_LONGEST_TOOL], one.size, one.error, one.failed_test)
            for one in content.results[-_MOST_RESULTS:]
        ),
    )


def _rounded(row: Any) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in row.tolist())


def _number(kept: Mapping[str, Any], name: str) -> float | None:
    value = kept.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: must be a number")
    return float(value)


def _count(kept: Mapping[str, Any], name: str) -> int:
    value = kept.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"{name}: must be a whole number, 0 or more")
    return value


def _list(kept: Mapping[str, Any], name: str) -> list[Any]:
    value = kept.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name}: must be a list")
    if name != "results" and not all(isinstance(one, int | float) for one in value):
        raise ValueError(f"{name}: must be a list of numbers")
    return value


def _result(kept: Any) -> KnownResult:
    match kept:
        case [str(tool), int(size), int(error), int(failed_test)]:
            return KnownResult(tool, size, bool(error), bool(failed_test))
    raise ValueError("results: each must be [tool, characters, error, failed test]")
