from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from router.encoder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, OnnxEncoder, encoder_hash, load_encoder
from router.errors import EncoderError

LONG = " ".join(f"word{number}" for number in range(2_000))


class Recorder:
    """Stands for the model: keeps what it is fed, and gives token states that tell the tokens apart."""

    def __init__(self) -> None:
        self.fed: list[dict[str, NDArray[np.int64]]] = []

    def run(self, outputs: None, feed: dict[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        self.fed.append(feed)
        ids = feed["input_ids"]
        return [np.stack([ids, ids**2, np.ones_like(ids)], axis=-1).astype(np.float32)]


@pytest.fixture
def recorded(encoder_dir: Path) -> tuple[OnnxEncoder, Recorder]:
    encoder, recorder = OnnxEncoder(encoder_dir), Recorder()
    encoder._session = recorder
    return encoder, recorder


def all_ids(encoder: OnnxEncoder, text: str) -> list[int]:
    return list(encoder._tokenizer.encode(text).ids)


@pytest.mark.parametrize(("window", "head", "tail"), [(256, 127, 127), (9, 4, 3), (8, 3, 3)])
def test_of_a_long_text_the_first_and_last_half_window_are_read(
    recorded: tuple[OnnxEncoder, Recorder], window: int, head: int, tail: int
) -> None:
    encoder, recorder = recorded
    encoder.config = replace(encoder.config, window=window)
    encoder.encode(LONG)
    first, *inner, last = all_ids(encoder, LONG)
    assert len(inner) > 4_000
    assert recorder.fed[0]["input_ids"].tolist() == [[first, *inner[:head], *inner[-tail:], last]]


def test_a_model_that_wants_a_mask_is_given_one(recorded: tuple[OnnxEncoder, Recorder]) -> None:
    encoder, recorder = recorded
    encoder._inputs = {"input_ids", "attention_mask", "token_type_ids"}
    encoder.encode("one two three")
    (feed,) = recorder.fed
    assert feed["attention_mask"].tolist() == [[1] * len(feed["input_ids"][0])]
    assert feed["token_type_ids"].tolist() == [[0] * len(feed["input_ids"][0])]


def test_a_model_that_pools_itself_is_left_alone(recorded: tuple[OnnxEncoder, Recorder]) -> None:
    encoder, recorder = recorded
    given = np.array([[3.0, 4.0]], dtype=np.float32)
    recorder.run = lambda outputs, feed: [given]  # type: ignore[method-assign]
    assert np.array_equal(encoder.encode("one two three"), given[0])


def test_a_text_that_fills_the_window_is_read_whole(recorded: tuple[OnnxEncoder, Recorder]) -> None:
    encoder, recorder = recorded
    ids = all_ids(encoder, "one two three four five six")
    for window in (len(ids), len(ids) + 1):
        encoder.config = replace(encoder.config, window=window)
        encoder.encode("one two three four five six")
        assert recorder.fed[-1]["input_ids"].tolist() == [ids]


def test_one_text_a_call(recorded: tuple[OnnxEncoder, Recorder]) -> None:
    encoder, recorder = recorded
    for text in ("a", "b c", LONG):
        encoder.encode(text)
    assert [len(feed["input_ids"]) for feed in recorder.fed] == [1, 1, 1]


def test_pooling_and_normalisation_are_those_of_the_description(
    recorded: tuple[OnnxEncoder, Recorder],
) -> None:
    encoder, _ = recorded
    ids = np.array(all_ids(encoder, "one two"), dtype=np.float64)
    states = np.stack([ids, ids**2, np.ones_like(ids)], axis=-1)
    for pooling, expected in (("mean", states.mean(axis=0)), ("cls", states[0])):
        encoder.config = replace(encoder.config, pooling=pooling, normalize=False)
        assert encoder.encode("one two") == pytest.approx(expected, rel=1e-6)
        encoder.config = replace(encoder.config, normalize=True)
        assert encoder.encode("one two") == pytest.approx(expected / np.linalg.norm(expected), rel=1e-6)


def test_a_text_has_one_embedding_whatever_was_encoded_before(encoder: OnnxEncoder) -> None:
    first = encoder.encode("Why is the sky blue?")
    encoder.encode(LONG)
    assert np.array_equal(encoder.encode("Why is the sky blue?"), first)
    assert first.dtype == np.float32
    assert first.shape == (encoder.dimension,) == (384,)


@pytest.mark.parametrize("text", ["", " ", "hi", LONG, "語" * 3_000, "😀", "\x00", "a\u2028b"])
def test_embeddings_are_finite_and_of_unit_length(encoder: OnnxEncoder, text: str) -> None:
    assert np.linalg.norm(encoder.encode(text)) == pytest.approx(1.0, abs=1e-5)


def test_half_a_surrogate_pair_is_read_as_a_question_mark(encoder: OnnxEncoder) -> None:
    assert np.array_equal(encoder.encode("why \ud800"), encoder.encode("why ?"))


def test_like_texts_are_near(encoder: OnnxEncoder) -> None:
    """A wrong pooling or tokenizer would still give unit vectors."""
    ask, near, far = map(
        encoder.encode,
        (
            "How do I reverse a list in Python?",
            "Python: reverse the order of a list",
            "Best time to plant tulips?",
        ),
    )
    assert ask @ near > 0.75
    assert ask @ far < 0.65


# --- The hash ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files that look like an encoder to its hash."""
    for name in (CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE):
        (tmp_path / name).write_text(f"this is {name}")
    return tmp_path


@pytest.mark.parametrize("name", [CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE])
def test_the_hash_covers_every_file(files: Path, name: str) -> None:
    before = encoder_hash(files)
    assert encoder_hash(files) == before
    content = bytearray((files / name).read_bytes())
    content[3] ^= 1
    (files / name).write_bytes(content)
    assert encoder_hash(files) != before


def test_the_hash_tells_which_file_holds_what(files: Path) -> None:
    before = encoder_hash(files)
    model, tokenizer = files / MODEL_FILE, files / TOKENIZER_FILE
    a, b = model.read_bytes(), tokenizer.read_bytes()
    model.write_bytes(b)
    tokenizer.write_bytes(a)
    assert encoder_hash(files) != before


def test_the_hash_does_not_depend_on_where_the_encoder_lies(files: Path) -> None:
    moved = files / "elsewhere"
    moved.mkdir()
    for name in (CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE):
        shutil.copy(files / name, moved)
    (moved / "README.md").write_text("A card is no part of what is computed.")
    assert encoder_hash(moved) == encoder_hash(files)


# --- What can be wrong with a directory -----------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / CONFIG_FILE).read_text())
        (path / CONFIG_FILE).write_text(json.dumps({**config, **changes}))

    return edit


def truncate(name: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model": (lambda path: (path / MODEL_FILE).unlink(), MODEL_FILE),
    "no tokenizer": (lambda path: (path / TOKENIZER_FILE).unlink(), TOKENIZER_FILE),
    "truncated model": (truncate(MODEL_FILE), MODEL_FILE),
    "truncated tokenizer": (truncate(TOKENIZER_FILE), TOKENIZER_FILE),
    "truncated description": (truncate(CONFIG_FILE), CONFIG_FILE),
    "description is a list": (lambda path: void((path / CONFIG_FILE).write_text("[1]")), CONFIG_FILE),
    "unknown key": (edit_config(colour="blue"), "colour"),
    "unknown pooling": (edit_config(pooling="max"), "pooling"),
    "dimension as text": (edit_config(dimension="384"), CONFIG_FILE),
    "no window": (edit_config(window=None), CONFIG_FILE),
    "window too small": (edit_config(window=2), "window"),
}


def void(_: object) -> None:
    """For lambdas that write."""


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_encoder_is_one_clear_error(
    encoder_dir: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(encoder_dir, broken)
    damage(broken)
    with pytest.raises(EncoderError) as caught:
        load_encoder(broken)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_description_is_not_an_onnx_encoder(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=f"{CONFIG_FILE} is missing"):
        OnnxEncoder(tmp_path)


def test_a_model_of_sentence_transformers_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EncoderError, match="extra 'encoders'"):
        load_encoder("some/model")


def test_nothing_is_told_to_the_maker_of_the_runtime(encoder_dir: Path, tmp_path: Path) -> None:
    """Where it reports, it first makes an id of the machine in the user's cache."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    code = f"from pathlib import Path\nfrom router.encoder import OnnxEncoder\nOnnxEncoder(Path({str(encoder_dir)!r}))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=environment | {"HOME": str(tmp_path)},
        check=True,
        timeout=120,
    )
    assert list(tmp_path.rglob("*")) == []
