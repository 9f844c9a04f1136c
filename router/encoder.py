"""Text → embedding, by an encoder that is identical in training and in serving.

An encoder is a directory: ``model.onnx``, ``tokenizer.json`` and ``encoder.json`` (name, dimension, window, pooling,
normalisation). Its hash covers all three, and a bundle names the hash it was trained with.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router.errors import EncoderError

Vector = NDArray[np.float32]

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "encoder.json"
# It computes layer normalisation one number at a time: .1 ms a layer and 60 tokens that the two operators apart do not take.
_SLOW_FUSION = "SkipLayerNormFusion"
_FILES = (CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE)


class Encoder(Protocol):
    """What features need of an encoder.

    ``hash`` identifies weights, tokenizer and pooling: equal hashes give equal embeddings.
    """

    name: str
    hash: str
    dimension: int

    def encode(self, text: str) -> Vector:
        """The embedding of one text, shape (dimension,), float32, unit length."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """``encoder.json``.

    Attributes
    ----------
    name : str
        For people and manifests.
    dimension : int
        Length of an embedding.
    window : int
        Tokens the model reads at once, special tokens included.
    pooling : {"mean", "cls"}
        How token states become one vector.
    normalize : bool
        Whether embeddings are scaled to unit length.
    source : str
        What it was exported from.
    """

    name: str
    dimension: int
    window: int
    pooling: str
    normalize: bool
    source: str = ""

    @classmethod
    def read(cls, path: Path) -> EncoderConfig:
        """Read and check ``encoder.json``; raises :class:`EncoderError`."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            config = cls(**raw)
            valid = config.pooling in ("mean", "cls") and config.dimension >= 1 and config.window >= 8
        except (OSError, ValueError, TypeError) as error:
            raise EncoderError(f"{path}: not a readable encoder description ({error})") from None
        if not valid:
            raise EncoderError(f"{path}: pooling must be mean or cls, dimension and window positive")
        return config


class OnnxEncoder:
    """A transformer in ONNX, run by onnxruntime on one thread, one text a call.

    One text a call, everywhere: dynamic int8 quantisation scales activations over the batch, so a text encoded
    among others differs from itself alone, by enough to flip decisions near the threshold.

    A text longer than the window is read as the first and the last half window of its tokens, in one call: cost
    stays bounded and the ask, which stands at an end of a long prompt, is read.

    Parameters
    ----------
    path : Path
        The encoder's directory.

    Raises
    ------
    EncoderError
        A file is missing or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        for file in _FILES:
            if not (path / file).is_file():
                raise EncoderError(f"{path}: {file} is missing; not an encoder directory")
        self.config = EncoderConfig.read(path / CONFIG_FILE)
        self.name = self.config.name
        self.dimension = self.config.dimension
        self.hash = encoder_hash(path)
        self._tokenizer = _load_tokenizer(path / TOKENIZER_FILE)
        self._session = _load_session(path / MODEL_FILE)
        self._inputs = {node.name for node in self._session.get_inputs()}
        # [CLS] … [SEP]: what the tokenizer puts around every text.
        empty = self._tokenizer.encode("").ids
        if len(empty) != 2:
            raise EncoderError(f"{path}: the tokenizer frames a text with {len(empty)} tokens, expected 2")
        self._first, self._last = empty

    def encode(self, text: str) -> Vector:
        """Shape (dimension,), float32."""
        # Half a surrogate pair is no Unicode text, and tokenizers refuses it: it is read as a question mark.
        ids = self._tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
        if len(ids) > self.config.window:
            inner = ids[1:-1]
            room = self.config.window - 2
            head = (room + 1) // 2
            ids = [self._first, *inner[:head], *inner[len(inner) - (room - head) :], self._last]
        tokens = np.array([ids], dtype=np.int64)
        feed = {name: tokens if name == "input_ids" else self._filler(name, tokens) for name in self._inputs}
        found: NDArray[np.float32] = self._session.run(None, feed)[0][0]
        return found if found.ndim == 1 else self._pool(found)

    @staticmethod
    def _filler(name: str, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ones_like(tokens) if name == "attention_mask" else np.zeros_like(tokens)

    def _pool(self, states: NDArray[np.float32]) -> Vector:
        """Of a model that was exported without its pooling."""
        pooled = states.mean(axis=0) if self.config.pooling == "mean" else states[0]
        if self.config.normalize:
            pooled = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
        return np.asarray(pooled, dtype=np.float32)


class SentenceTransformerEncoder:
    """A sentence-transformers model used as it is; needs the ``encoders`` extra (and so torch).

    Parameters
    ----------
    model : str
        A path or a hub's name, as sentence-transformers takes it.
    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise EncoderError(
                f"encoder {model}: sentence-transformers is not installed; "
                "install the extra 'encoders', or export it once with 'router-train export-encoder'"
            ) from None
        try:
            self._model = SentenceTransformer(model, device="cpu")
        except Exception as error:  # the library raises whatever its loaders raise
            raise EncoderError(
                f"encoder {model}: cannot be loaded ({type(error).__name__}: {error})"
            ) from None
        self.name = model
        self.dimension = int(self._model.get_embedding_dimension())
        digest = hashlib.sha256(repr(self._model).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        digest.update(self._model.tokenizer.backend_tokenizer.to_str().encode())
        self.hash = digest.hexdigest()

    def encode(self, text: str) -> Vector:
        """Shape (dimension,), float32."""
        return np.asarray(
            self._model.encode(text, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32
        )


def load_encoder(location: str | Path) -> Encoder:
    """Load an encoder directory, or any sentence-transformers model by path or name.

    Raises
    ------
    EncoderError
        Nothing that can be loaded is there.
    """
    path = Path(location)
    if (path / CONFIG_FILE).is_file():
        return OnnxEncoder(path)
    return SentenceTransformerEncoder(str(location))


def encoder_hash(path: Path) -> str:
    """SHA-256 over the names and contents of the encoder's files, hexadecimal."""
    digest = hashlib.sha256()
    for file in _FILES:
        digest.update(file.encode() + b"\0")
        digest.update(hashlib.sha256((path / file).read_bytes()).digest())
    return digest.hexdigest()


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise EncoderError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_session(path: Path) -> Any:
    # From 1.29 on it reports to its maker over the network otherwise; read when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread: a prompt is too short to share out, and requests run beside one another.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_SLOW_FUSION]
        )
    except Exception as error:  # onnxruntime's errors share no public base
        raise EncoderError(f"{path}: not a readable ONNX model ({type(error).__name__})") from None
