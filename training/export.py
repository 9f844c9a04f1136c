"""A sentence-transformers model → int8 ONNX encoder directory, with its agreement measured.

Needs the ``encoders`` extra. Weights are quantised dynamically to int8 per channel: per tensor, the embeddings of
MiniLM-sized models drift too far from the original to be used.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router.errors import EncoderError
from router.features import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, EncoderConfig, OnnxEncoder
from training.probes import TEXTS

# The lowest mean cosine with the original at which an export is accepted.
MINIMUM_AGREEMENT = 0.99


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosine between the original's embeddings and the exported ones, over ``n`` texts."""

    n: int
    mean: float
    worst: float


def export_encoder(
    model: str, out: Path, *, layers: int | None = None, name: str | None = None, source: str | None = None
) -> Agreement:
    """Export a sentence-transformers model (a path or a hub's name) into the directory ``out``.

    The directory appears complete or not at all. ``name`` and ``source`` go into its description; by default they are
    the last part of ``model``, and ``model`` itself. ``layers`` keeps the first transformer layers only: what tells
    hard prompts from easy ones is read as well, or better, from the middle of a sentence encoder (training/EXPERIMENTS.md),
    in a fraction of the time.

    Raises
    ------
    EncoderError
        The model cannot be loaded, has fewer layers, pools in a way that is not supported, or its int8 form agrees with the
        original at a mean cosine below ``MINIMUM_AGREEMENT``.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise EncoderError(
            "export-encoder needs the extra 'encoders' (sentence-transformers, torch, onnx)"
        ) from None
    if out.exists():
        raise EncoderError(f"{out} exists; remove it or choose another directory")
    try:
        original = SentenceTransformer(model, device="cpu")
    except Exception as error:  # the library raises whatever its loaders raise
        raise EncoderError(f"{model}: cannot be loaded ({type(error).__name__}: {error})") from None
    if layers is not None:
        _truncate(original, layers)
    config = EncoderConfig(
        name=name or Path(model).name,
        dimension=int(original.get_embedding_dimension() or 0),
        window=int(original.max_seq_length or 512),
        pooling=_pooling(original),
        normalize=any(type(module).__name__ == "Normalize" for module in original),
        source=source or model,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        full, built = Path(scratch, "full.onnx"), Path(scratch, "built")
        built.mkdir()
        _to_onnx(original, config, full)
        _quantise(full, built / MODEL_FILE)
        (built / TOKENIZER_FILE).write_text(_tokenizer_json(original), encoding="utf-8")
        (built / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        agreement = measure_agreement(original, OnnxEncoder(built), TEXTS)
        if agreement.mean < MINIMUM_AGREEMENT:
            raise EncoderError(
                f"{model}: int8 embeddings agree with the original at mean cosine {agreement.mean:.4f}, "
                f"below {MINIMUM_AGREEMENT}; not written"
            )
        shutil.move(built, out)
    return agreement


def measure_agreement(original: Any, encoder: OnnxEncoder, texts: Sequence[str]) -> Agreement:
    """Compare a SentenceTransformer with an exported encoder, one text a call on both sides."""
    cosines = []
    for text in texts:
        a = np.asarray(
            original.encode(text, normalize_embeddings=True, show_progress_bar=False), dtype=np.float64
        )
        b = encoder.encode(text).astype(np.float64)
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return Agreement(n=len(cosines), mean=float(np.mean(cosines)), worst=float(np.min(cosines)))


def _truncate(original: Any, layers: int) -> None:
    transformer = original[0].auto_model
    stack = getattr(getattr(transformer, "encoder", None), "layer", None)
    if stack is None:
        raise EncoderError(
            "--layers: this model keeps its layers where they are not looked for (encoder.layer)"
        )
    if not 1 <= layers <= len(stack):
        raise EncoderError(f"--layers {layers}: the model has {len(stack)} layers")
    transformer.encoder.layer = stack[:layers]
    transformer.config.num_hidden_layers = layers


def _pooling(original: Any) -> str:
    for module in original:
        if type(module).__name__ == "Pooling":
            mode = str(getattr(module, "pooling_mode", None) or module.get_pooling_mode_str())
            if mode in ("mean", "cls"):
                return mode
            raise EncoderError(f"pooling {mode!r} is not supported; only mean and cls are")
    raise EncoderError("the model has no pooling layer")


def _to_onnx(original: Any, config: EncoderConfig, path: Path) -> None:
    """One text a call and no padding: without a batch and a mask to carry along, a tenth of the operations are gone."""
    import torch

    transformer = original[0].auto_model.eval()
    # Eager attention: the fused kernels have no ONNX form that every runtime reads.
    transformer.set_attn_implementation("eager")

    class Embedding(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: Any) -> Any:
            if hasattr(transformer, "embeddings") and hasattr(transformer, "encoder"):
                # Past the model's own entrance, which makes a mask where it is given none.
                states = transformer.encoder(transformer.embeddings(input_ids), None).last_hidden_state
            else:
                states = transformer(input_ids=input_ids).last_hidden_state
            pooled = states.mean(dim=1) if config.pooling == "mean" else states[:, 0]
            return torch.nn.functional.normalize(pooled, dim=1) if config.normalize else pooled

    with torch.no_grad(), warnings.catch_warnings():
        # Tracing warns of every Python branch on a shape; the agreement is measured afterwards.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Embedding(),
            (torch.ones(1, 16, dtype=torch.long),),
            str(path),
            input_names=["input_ids"],
            output_names=["embedding"],
            dynamic_axes={"input_ids": {1: "sequence"}},
            opset_version=17,
            dynamo=False,
        )


def _quantise(full: Path, out: Path) -> None:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as router/encoder.py does
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = full.with_suffix(".prepared.onnx")
    quant_pre_process(str(full), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(out), weight_type=QuantType.QInt8, per_channel=True)


def _tokenizer_json(original: Any) -> str:
    tokenizer = original.tokenizer.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return str(tokenizer.to_str())
