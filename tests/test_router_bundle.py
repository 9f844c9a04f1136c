from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import router.bundle
from router.bundle import (
    CARD_FILE,
    ESTIMATOR_FILE,
    MANIFEST_FILE,
    PROBES_FILE,
    SCHEMA_VERSION,
    SEEN_FILE,
    Bundle,
    default_bundle_dir,
    load_bundle,
    prompt_hashes,
    quality_bar,
    read_manifest,
    save_bundle,
    write_manifest,
)
from router.encoder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, OnnxEncoder
from router.errors import BundleError, EncoderError, RouterError
from router.features import prompt_from_text
from router.predictor import Predictor, load_predictor


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "models" / "tiny"))


@pytest.fixture
def encoders_copy(encoder_dir: Path, tmp_path: Path) -> Path:
    """A directory with an encoder that a test may damage."""
    shutil.copytree(encoder_dir, tmp_path / "encoders" / encoder_dir.name)
    return tmp_path / "encoders"


def edit_manifest(path: Path, **changes: Any) -> None:
    raw = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps({**raw, **changes}))


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files, as somebody who tampers would."""
    edit_manifest(
        path,
        files={
            name: hashlib.sha256((path / name).read_bytes()).hexdigest()
            for name in (ESTIMATOR_FILE, SEEN_FILE, PROBES_FILE)
        },
    )


def one_line(error: RouterError) -> str:
    message = str(error)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# --- Round trip ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_what_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    first = load_bundle(tiny_bundle)
    saved = save_bundle(first, tmp_path / "again")
    second = load_bundle(tmp_path / "again")
    assert second.manifest == saved.manifest == first.manifest
    assert second.probes == first.probes
    assert second.card == first.card
    assert np.array_equal(second.seen, first.seen)
    assert second.arrays.keys() == first.arrays.keys()
    for name, array in first.arrays.items():
        assert second.arrays[name].dtype == array.dtype, name
        assert second.arrays[name].shape == array.shape, name
        assert np.array_equal(second.arrays[name], array, equal_nan=True), name


def test_the_shape_of_every_array_survives(tiny_bundle: Path, tmp_path: Path) -> None:
    """A single number stays one: numpy does not turn an array of one number into a number."""
    bundle = load_bundle(tiny_bundle)
    arrays = {"zero": np.array(7), "one": np.array([7]), "turned": np.arange(6.0).reshape(2, 3).T}
    save_bundle(replace(bundle, arrays=arrays), tmp_path / "shapes")
    loaded = load_bundle(tmp_path / "shapes").arrays
    assert {name: array.shape for name, array in loaded.items()} == {
        "zero": (),
        "one": (1,),
        "turned": (3, 2),
    }
    assert np.array_equal(loaded["turned"], arrays["turned"])


def test_a_loaded_bundle_scores_as_the_one_in_memory(tiny_bundle: Path, encoder: OnnxEncoder) -> None:
    predictor = load_predictor(tiny_bundle)
    again = Predictor(predictor.bundle, encoder)
    prompt = prompt_from_text("Design a lock-free queue and prove it linearisable.")
    assert predictor.predict([prompt]).score == again.predict([prompt]).score
    assert predictor.name == predictor.manifest.id
    assert predictor.name.startswith("tiny@")
    assert predictor.targets == ("weak", "strong")


def test_the_bundle_that_comes_along_loads() -> None:
    predictor = load_predictor()
    prediction = predictor.predict([prompt_from_text("hi"), prompt_from_text("Prove Fermat's last theorem.")])
    assert prediction.score[0] < prediction.score[1]
    assert -1 < predictor.threshold < 1
    assert sum(file.stat().st_size for file in default_bundle_dir().iterdir()) < router.bundle.MAXIMUM_BYTES


def test_every_file_can_be_read_by_another_user(tiny_bundle: Path) -> None:
    assert {oct(file.stat().st_mode & 0o044) for file in tiny_bundle.iterdir()} == {"0o44"}


def test_a_line_separator_inside_a_probe_is_no_end_of_line(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    probe = replace(bundle.probes[0], row={"prompt": "one\u2028two\x85three\nfour"})
    save_bundle(replace(bundle, probes=(probe,)), tmp_path / "odd")
    assert load_bundle(tmp_path / "odd").probes == (probe,)


def test_seen_prompts_are_known_whatever_their_case_and_white_space(
    tiny_bundle: Path, sample_rows: list[dict[str, Any]]
) -> None:
    bundle = load_bundle(tiny_bundle)
    text = next(row["prompt"] for row in sample_rows if "prompt" in row)
    prompts = [prompt_from_text(t) for t in (text, f"  {text.upper()}\n", text + " please", "\ud800")]
    assert bundle.has_seen(prompts).tolist() == [True, True, False, False]
    assert len(bundle.seen) == len(np.unique(bundle.seen)) > 100
    assert prompt_hashes([]).shape == (0,)


# --- Privacy and size ----------------------------------------------------------------------------------------------


def test_no_text_of_a_training_prompt_is_in_the_bundle(
    tiny_bundle: Path, tiny_file: Path, tiny_predictor: Predictor
) -> None:
    content = b"".join(file.read_bytes() for file in tiny_bundle.iterdir()).lower()
    rows = [json.loads(line) for line in tiny_file.read_text(encoding="utf-8").split("\n") if line]
    texts = [row.get("prompt") or row["messages"][-1]["content"] or "" for row in rows]
    assert len(texts) == 150
    for text in texts:
        for start in range(0, len(text) - 24, 40):
            # As it stands, and as JSON would write it.
            piece = text[start : start + 24].lower()
            assert piece.encode() not in content
            assert json.dumps(piece)[1:-1].encode() not in content


def test_a_bundle_over_the_limit_is_not_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in tiny_bundle.iterdir())
    bundle = load_bundle(tiny_bundle)
    monkeypatch.setattr(router.bundle, "MAXIMUM_BYTES", size)
    save_bundle(bundle, tmp_path / "just")
    monkeypatch.setattr(router.bundle, "MAXIMUM_BYTES", size - 1)
    with pytest.raises(BundleError, match="--no-neighbours"):
        save_bundle(bundle, tmp_path / "over")
    assert [path.name for path in tmp_path.iterdir()] == ["just"]


def test_the_limit_is_thirty_megabytes() -> None:
    assert router.bundle.MAXIMUM_BYTES == 30 * 1024 * 1024


# --- Saving --------------------------------------------------------------------------------------------------------


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_older_bundle_is_replaced(bundle_copy: Path) -> None:
    bundle = load_bundle(bundle_copy)
    (bundle_copy / "leftover.txt").write_text("of an older release")
    save_bundle(replace(bundle, card="# New\n"), bundle_copy)
    assert load_bundle(bundle_copy).card == "# New\n"
    assert not (bundle_copy / "leftover.txt").exists()
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["tiny"]


def failing(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failing_save_leaves_the_old_bundle(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, before = load_bundle(bundle_copy), snapshot(bundle_copy)
    monkeypatch.setattr(router.bundle, "write_manifest", failing)
    with pytest.raises(BundleError, match=r"tiny: cannot be written \(No space left on device\)"):
        save_bundle(replace(bundle, card="# New\n"), bundle_copy)
    assert snapshot(bundle_copy) == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["tiny"]


def test_where_the_new_bundle_cannot_take_its_place_the_old_one_comes_back(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, before, rename = load_bundle(bundle_copy), snapshot(bundle_copy), Path.rename

    def failing_for_new(self: Path, target: Path) -> Path:
        return rename(self, target) if self.name != "new" else failing()  # type: ignore[func-returns-value,return-value]

    monkeypatch.setattr(Path, "rename", failing_for_new)
    with pytest.raises(BundleError, match="cannot be written"):
        save_bundle(replace(bundle, card="# New\n"), bundle_copy)
    assert snapshot(bundle_copy) == before


def test_a_directory_that_is_no_bundle_is_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "notes.txt").write_text("more work")
    for name in ("thesis", "notes.txt"):
        with pytest.raises(BundleError, match=f"{name} exists and is not a bundle"):
            save_bundle(bundle, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "notes.txt").read_text() == "more work"


def test_a_place_that_cannot_be_written_is_one_clear_error(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written") as caught:
        save_bundle(load_bundle(tiny_bundle), tmp_path / "file" / "bundle")
    one_line(caught.value)


def test_a_manifest_is_replaced_in_one_step(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(bundle_copy)
    changed = manifest.model_copy(update={"seed": 5})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(BundleError, match="cannot be written"):
            write_manifest(changed, bundle_copy)
        assert read_manifest(bundle_copy) == manifest
    write_manifest(changed, bundle_copy)
    assert read_manifest(bundle_copy).seed == 5


# --- Damage --------------------------------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-10])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_manifest(path, **changes)


def without(key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = json.loads((path / MANIFEST_FILE).read_text())
        del raw[key]
        (path / MANIFEST_FILE).write_text(json.dumps(raw))

    return damage


def text_in(name: str, text: str) -> Callable[[Path], None]:
    """Other content, with its hash made to fit."""

    def damage(path: Path) -> None:
        (path / name).write_text(text)
        if name != MANIFEST_FILE:
            rehash(path)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        f"truncated {name}": (truncate(name), f"{name}: truncated or changed")
        for name in (ESTIMATOR_FILE, SEEN_FILE, PROBES_FILE)
    },
    **{
        f"changed {name}": (flip(name), f"{name}: truncated or changed")
        for name in (ESTIMATOR_FILE, SEEN_FILE, PROBES_FILE)
    },
    **{
        f"no {name}": (remove(name), f"{name} is missing")
        for name in (MANIFEST_FILE, ESTIMATOR_FILE, SEEN_FILE, PROBES_FILE)
    },
    "no hashes": (manifest(files={}), "truncated or changed"),
    "truncated manifest": (truncate(MANIFEST_FILE), "not a readable manifest"),
    "empty manifest": (text_in(MANIFEST_FILE, ""), "not a readable manifest"),
    "manifest is a list": (text_in(MANIFEST_FILE, "[]"), "not a readable manifest"),
    "newer schema": (
        manifest(schema_version=SCHEMA_VERSION + 1, surprise=True),
        f"schema version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}",
    ),
    "unknown key": (manifest(surprise=True), "surprise"),
    "missing key": (without("targets"), "targets"),
    "one target": (manifest(targets=["weak"]), "targets"),
    "no default threshold": (manifest(thresholds={}), "thresholds"),
    "other features": (manifest(features_version=99), "features version 99"),
    "unknown part": (manifest(parts=["words", "magic"]), "do not fit its manifest"),
    "parts missing": (manifest(parts=["words", "trees"]), "do not fit its manifest"),
    "one part only": (manifest(parts=["words"]), "a probe scored"),
    "a target more": (manifest(targets=["weak", "mid", "strong"]), "2 targets, its manifest names 3"),
    "not safetensors": (text_in(ESTIMATOR_FILE, "not arrays"), "not readable"),
    "probes are no JSON": (text_in(PROBES_FILE, "{"), "not readable"),
    "probes without scores": (text_in(PROBES_FILE, '{"prompt": "x"}\n'), "not readable"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_bundle_is_one_clear_error(
    bundle_copy: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(bundle_copy)
    with pytest.raises(BundleError) as caught:
        load_predictor(bundle_copy)
    assert named in one_line(caught.value)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle directory"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=f"{MANIFEST_FILE} is missing"):
        load_bundle(tmp_path)


def test_a_card_is_for_people_alone(bundle_copy: Path) -> None:
    (bundle_copy / CARD_FILE).write_bytes(b"\xff\xfe not UTF-8")
    assert "not UTF-8" in load_bundle(bundle_copy).card
    (bundle_copy / CARD_FILE).unlink()
    assert load_bundle(bundle_copy).card == ""


# --- The encoder ---------------------------------------------------------------------------------------------------


def test_an_encoder_beside_the_bundle_is_found(bundle_copy: Path, encoders_copy: Path) -> None:
    beside = bundle_copy.parent / "encoders"
    encoders_copy.rename(beside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.predictor.default_encoders_dir", lambda: bundle_copy / "nowhere")
        assert load_predictor(bundle_copy).encoder.dimension == 384


def test_a_missing_encoder_is_one_clear_error(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError) as caught:
        load_predictor(bundle_copy, encoders=tmp_path / "empty")
    message = one_line(caught.value)
    assert "all-MiniLM-L6-v2" in message
    assert str(tmp_path / "empty") in message


def lower_case_off(path: Path) -> None:
    tokenizer = json.loads((path / TOKENIZER_FILE).read_text(encoding="utf-8"))
    tokenizer["normalizer"]["lowercase"] = False
    (path / TOKENIZER_FILE).write_text(json.dumps(tokenizer), encoding="utf-8")


def pool_cls(path: Path) -> None:
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({**config, "pooling": "cls"}))


CHANGES: dict[str, Callable[[Path], None]] = {
    "tokenizer": lower_case_off,
    "pooling": pool_cls,
    "quantisation": flip(MODEL_FILE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_encoder_is_one_clear_error(
    bundle_copy: Path, encoders_copy: Path, change: Callable[[Path], None]
) -> None:
    load_predictor(bundle_copy, encoders=encoders_copy)
    (encoder,) = encoders_copy.iterdir()
    change(encoder)
    with pytest.raises(
        EncoderError, match="its weights, tokenizer, pooling or quantisation differ"
    ) as caught:
        load_predictor(bundle_copy, encoders=encoders_copy)
    one_line(caught.value)


def test_the_right_encoder_is_found_among_others_by_its_hash(bundle_copy: Path, encoders_copy: Path) -> None:
    (right,) = encoders_copy.iterdir()
    wrong = Path(shutil.copytree(right, encoders_copy / "a-first"))
    pool_cls(wrong)
    torn = encoders_copy / "b-torn"
    torn.mkdir()
    shutil.copy(right / CONFIG_FILE, torn)
    right.rename(encoders_copy / "z-last")
    assert load_predictor(bundle_copy, encoders=encoders_copy).encoder.dimension == 384


# --- Probes: an encoder that behaves differently under the same hash --------------------------------------------------


class Altered:
    """The encoder of the bundle by its hash, another by what it does."""

    def __init__(
        self, encoder: OnnxEncoder, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> None:
        self.encoder, self.change = encoder, change
        self.name, self.hash, self.dimension = encoder.name, encoder.hash, encoder.dimension

    def encode(self, text: str) -> NDArray[np.float32]:
        return self.change(self.encoder.encode(text))


def noise(size: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    random = np.random.default_rng(0)

    def change(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        moved = embedding + random.normal(0, size / np.sqrt(len(embedding)), len(embedding))
        return (moved / np.linalg.norm(moved)).astype(np.float32)

    return change


def test_another_processors_rounding_is_let_through(tiny_bundle: Path, encoder: OnnxEncoder) -> None:
    Predictor(load_bundle(tiny_bundle), Altered(encoder, noise(0.002)))


@pytest.mark.parametrize(
    "change",
    [noise(0.4), np.flip, lambda embedding: np.zeros_like(embedding), lambda embedding: embedding * np.nan],
    ids=["noise", "flipped", "zero", "nan"],
)
def test_an_encoder_that_behaves_differently_is_caught_by_the_probes(
    tiny_bundle: Path, encoder: OnnxEncoder, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    with pytest.raises(BundleError, match="a probe scored") as caught:
        Predictor(load_bundle(tiny_bundle), Altered(encoder, change))
    one_line(caught.value)


@pytest.mark.parametrize("score", [0.5, float("nan")])
def test_a_probe_with_another_score_is_caught(bundle_copy: Path, score: float) -> None:
    lines = (bundle_copy / PROBES_FILE).read_text(encoding="utf-8").splitlines()
    probe = json.loads(lines[3])
    lines[3] = json.dumps({**probe, "score": probe["score"] + score})
    (bundle_copy / PROBES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    rehash(bundle_copy)
    with pytest.raises(BundleError, match="a probe scored"):
        load_predictor(bundle_copy)


@pytest.mark.parametrize("name", ["words.coef", "stack.weight", "gain.y", "factors.intercept"])
def test_arrays_that_give_other_scores_are_caught(tiny_bundle: Path, encoder: OnnxEncoder, name: str) -> None:
    bundle = load_bundle(tiny_bundle)
    for changed in (bundle.arrays[name] * 3 + 0.5, bundle.arrays[name] * np.nan):
        with pytest.raises(BundleError, match="a probe scored"):
            Predictor(replace(bundle, arrays={**bundle.arrays, name: changed}), encoder)


def test_a_bundle_has_probes_of_every_kind(tiny_bundle: Path) -> None:
    bundle: Bundle = load_bundle(tiny_bundle)
    assert len(bundle.probes) >= 15
    assert any(probe.prompt.state.last_result_failed_test for probe in bundle.probes)
    assert any(len(probe.prompt.text) > 2_000 for probe in bundle.probes)
    assert {len(probe.embedding) for probe in bundle.probes} == {32}


def test_a_bundle_of_the_first_schema_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "first"))
    raw = json.loads((path / MANIFEST_FILE).read_text())
    del raw["tool_result_rows"], raw["curve"]
    raw["thresholds"] = {"default": raw["thresholds"]["default"]}
    (path / MANIFEST_FILE).write_text(json.dumps({**raw, "schema_version": 1}))
    predictor = load_predictor(path)
    assert (predictor.knows_steps, predictor.bars) == (False, {})
    assert predictor.manifest.curve is None


def test_a_curve_whose_columns_differ_in_length_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "curve"))
    raw = json.loads((path / MANIFEST_FILE).read_text())
    raw["curve"]["spend"].pop()
    (path / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"curve.*differ in length"):
        read_manifest(path)


def test_names_of_thresholds_that_are_no_quality_are_left_alone(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    one = manifest.thresholds["default"]
    named = {"default": one, "quality-0.9": one, "quality-high": one, "previous": one}
    assert manifest.model_copy(update={"thresholds": named}).bars == {0.9: one.value}
    assert quality_bar(0.9) == "quality-0.9"
