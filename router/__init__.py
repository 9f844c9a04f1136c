"""A learned LLM router: predicts whether a request needs a frontier model.

The public Python API, without HTTP; what is named in ``__all__`` is stable within a major version::

    from router import load_predictor, prompt_from_text

    predictor = load_predictor()                       # the bundle that comes along
    prediction = predictor.predict([prompt_from_text("What is 2 + 2?")])
    prediction.score, prediction.choose(predictor.threshold)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "ConversationState",
    "Prediction",
    "Predictor",
    "Prompt",
    "RouterError",
    "__version__",
    "load_bundle",
    "load_predictor",
    "prompt_from_messages",
    "prompt_from_text",
]

if TYPE_CHECKING:
    from router.bundle import Bundle, load_bundle
    from router.conversation import ConversationState, Prompt, prompt_from_messages, prompt_from_text
    from router.errors import RouterError
    from router.predictor import Prediction, Predictor, load_predictor

_HOME = {
    "Bundle": "bundle",
    "load_bundle": "bundle",
    "ConversationState": "conversation",
    "Prompt": "conversation",
    "prompt_from_messages": "conversation",
    "prompt_from_text": "conversation",
    "RouterError": "errors",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "load_predictor": "predictor",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``router --version`` must not wait for numpy and onnxruntime."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
