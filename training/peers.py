"""Scores of other projects' routers, each run in a process of its own.

As a script (``python -P peers.py NAME``) it reads a JSON string a line, a prompt, and prints a number a line, after
one line with the version of the package. It imports the standard library alone, so that any environment that has the
peer can run it; :func:`peer_scores` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

Scorer = Callable[[str], float]

# A peer that loads in a minute and scores 14,000 prompts in two is done long before.
_TIMEOUT = 1800.0


class PeerError(Exception):
    """A peer that could not be run; the text says why."""


@dataclass(frozen=True)
class PeerScores:
    """What a peer gave: the package with its version, and a score a prompt; higher goes to strong first."""

    version: str
    scores: list[float]


def peer_scores(name: str, prompts: Sequence[str], python: str = sys.executable) -> PeerScores:
    """Score prompts by a peer, in the environment of the interpreter ``python``.

    Raises
    ------
    PeerError
        The interpreter or the package is not there, or the peer failed.
    """
    # Nothing is fetched, and what a peer writes to the home directory is thrown away with it.
    with tempfile.TemporaryDirectory() as home:
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "SYSTEMROOT", "TMPDIR") if key in os.environ}
        offline = {
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
        }
        try:
            done = subprocess.run(
                [python, "-P", __file__, name],
                input="".join(json.dumps(prompt) + "\n" for prompt in prompts),
                capture_output=True,
                encoding="utf-8",
                timeout=_TIMEOUT,
                check=False,
                env={**kept, **offline, "HOME": home, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"{python}: {error}") from None
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(prompts) + 1:
        last = (done.stderr.strip().splitlines() or ["it ended early"])[-1]
        raise PeerError(f"{python}: {last}")
    return PeerScores(lines[0], [float(line) for line in lines[1:]])


def _litellm_heuristic_v2() -> tuple[str, Scorer]:
    """The learned classifier that LiteLLM ships: 1 − the chance that the lowest tier suffices."""
    from litellm.router_strategy.adaptive_router.classifier import classify_prompt
    from litellm.router_strategy.complexity_router.tier_predictor import (
        TierSuccessPredictor,
        resolve_tier_artifact,
    )

    predictor = TierSuccessPredictor(resolve_tier_artifact("ultrafeedback"))
    return "litellm", lambda text: 1.0 - predictor.predict(text, classify_prompt(text)).probabilities[1]


def _litellm_rules() -> tuple[str, Scorer]:
    """LiteLLM's complexity rules: keywords, length and structure."""
    from litellm.router_strategy.complexity_router.complexity_router import ComplexityRouter

    rules = ComplexityRouter(model_name="auto", litellm_router_instance=None)
    return "litellm", lambda text: rules.classify(text)[1]


def _uncommonroute() -> tuple[str, Scorer]:
    """The local classifier of UncommonRoute; its embedding signal needs a hub and is off."""
    from uncommon_route.router.classifier import classify

    return "uncommon-route", lambda text: classify(text).complexity


PEERS: dict[str, Callable[[], tuple[str, Scorer]]] = {
    "litellm_heuristic_v2": _litellm_heuristic_v2,
    "litellm_rules": _litellm_rules,
    "uncommonroute": _uncommonroute,
}


def _main(name: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # a peer may print; the answers stay clean
    package, score = PEERS[name]()
    print(f"{package} {version(package)}", file=answers)
    for line in sys.stdin:
        print(float(score(json.loads(line))), file=answers)


if __name__ == "__main__":
    _main(sys.argv[1])
