"""A learned LLM router.

Without HTTP::

    from router import default_bundle_dir, load_predictor, prompt_from_text

    predictor = load_predictor(default_bundle_dir())
    prediction = predictor.predict([prompt_from_text("Prove that there are infinitely many primes.")])
    prediction.score[0], predictor.targets[prediction.choose(predictor.threshold)[0]]

What ``__all__`` lists is stable: it changes only with a new minor version and a word in the changelog.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.app import create_app
    from router.bundle import default_bundle_dir
    from router.decision import Decision, RequestFacts, decide, needs_prediction
    from router.errors import RouterError
    from router.features import Prompt, prompt_from_messages, prompt_from_text
    from router.policy import Policy, load_policy
    from router.predictor import Prediction, Predictor, load_predictor

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "Policy",
    "Prediction",
    "Predictor",
    "Prompt",
    "RequestFacts",
    "RouterError",
    "__version__",
    "create_app",
    "decide",
    "default_bundle_dir",
    "load_policy",
    "load_predictor",
    "needs_prediction",
    "prompt_from_messages",
    "prompt_from_text",
]

_MODULES = {
    "router.app": ("create_app",),
    "router.bundle": ("default_bundle_dir",),
    "router.decision": ("Decision", "RequestFacts", "decide", "needs_prediction"),
    "router.errors": ("RouterError",),
    "router.features": ("Prompt", "prompt_from_messages", "prompt_from_text"),
    "router.policy": ("Policy", "load_policy"),
    "router.predictor": ("Prediction", "Predictor", "load_predictor"),
}


def __getattr__(name: str) -> Any:
    # Lazy: importing the package costs nothing, and whoever only predicts does not import the server.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'router' has no attribute {name!r}")
