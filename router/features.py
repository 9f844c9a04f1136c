"""Messages → prompt → features: one definition, used by training and serving alike."""

from __future__ import annotations

from router.conversation import (
    TEXT_BUDGET,
    ConversationState,
    Prompt,
    prompt_from_messages,
    prompt_from_text,
)
from router.encoder import (
    CONFIG_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    Encoder,
    EncoderConfig,
    OnnxEncoder,
    encoder_hash,
    load_encoder,
)

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "TEXT_BUDGET",
    "TOKENIZER_FILE",
    "ConversationState",
    "Encoder",
    "EncoderConfig",
    "OnnxEncoder",
    "Prompt",
    "encoder_hash",
    "load_encoder",
    "prompt_from_messages",
    "prompt_from_text",
]
