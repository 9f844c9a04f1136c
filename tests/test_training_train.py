from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl

from router.bundle import load_bundle, read_manifest, write_manifest
from router.encoder import OnnxEncoder
from router.errors import BundleError, DatasetError, UsageError
from router.features import FEATURES_VERSION, Features
from router.predictor import Predictor, load_predictor
from training.dataset import Dataset, load_dataset
from training.estimator import INNER_FOLDS, STACKED
from training.metrics import apply_threshold
from training.train import (
    MINIMUM_ROWS,
    Fit,
    as_threshold,
    default_threshold,
    features_of,
    fit,
    tune,
    write_threshold,
)

TARGETS = ("weak", "strong")


@pytest.fixture(scope="module")
def tiny(tiny_file: Path) -> Dataset:
    return load_dataset([tiny_file], targets=TARGETS)


@pytest.fixture(scope="module")
def fresh(fresh_file: Path) -> Dataset:
    rows = load_dataset([fresh_file], targets=TARGETS)
    return replace(rows, cost=np.tile([0.001, 0.02], (len(rows), 1)))


@pytest.fixture(scope="module")
def fresh_features(fresh: Dataset, encoder: OnnxEncoder) -> Features:
    return features_of(fresh, encoder)


@pytest.fixture(scope="module")
def few(tiny: Dataset, tiny_features: Features) -> tuple[Dataset, Features]:
    """As few rows as can be trained on; quick."""
    return tiny.select(np.arange(60)), tiny_features.take(np.arange(60))


@pytest.fixture(scope="module")
def trained(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Fit, Path]:
    path = tmp_path_factory.mktemp("trained") / "small"
    return fit(*few, encoder, path, seed=7, command="router-train fit few.jsonl"), path


# --- Fit -----------------------------------------------------------------------------------------------------------


def test_the_manifest_tells_what_the_bundle_was_made_of(
    trained: tuple[Fit, Path], encoder: OnnxEncoder, tiny_file: Path
) -> None:
    result, path = trained
    manifest = read_manifest(path)
    assert manifest == result.bundle.manifest
    assert manifest.name == "small"
    assert manifest.targets == TARGETS
    assert (manifest.encoder.name, manifest.encoder.hash) == (encoder.name, encoder.hash)
    assert manifest.features_version == FEATURES_VERSION
    assert manifest.seed == 7
    assert manifest.parts == STACKED
    assert {"router", "numpy", "scikit-learn", "onnxruntime", "tokenizers"} <= manifest.versions.keys()
    (dataset,) = manifest.datasets
    assert dataset.name == tiny_file.name
    assert len(dataset.sha256) == 64
    assert set(manifest.files) == {"estimator.safetensors", "seen.bin", "probes.jsonl"}
    held_out = manifest.metrics["out_of_fold"]
    assert held_out["n"] == 60
    assert held_out["methods"].keys() >= {"learned", "random", "prompt_length", "oracle"}
    json.dumps(manifest.model_dump(mode="json"), allow_nan=False)


def test_the_default_threshold_has_95_percent_of_strongs_quality_on_held_out_rows(
    trained: tuple[Fit, Path], few: tuple[Dataset, Features]
) -> None:
    result, path = trained
    threshold = read_manifest(path).thresholds["default"]
    assert threshold.rows == 60
    assert "out-of-fold" in threshold.how
    assert threshold.quality_ratio is not None
    assert threshold.quality_ratio >= 0.95 - 1e-9
    assert 0 < (threshold.strong_share or 0) < 1
    assert load_predictor(path).threshold == threshold.value
    assert result.report is not None
    assert result.report.methods["learned"].strong_share_at_95 == pytest.approx(threshold.strong_share)


def test_the_curve_passes_through_the_point_in_force(trained: tuple[Fit, Path]) -> None:
    manifest = read_manifest(trained[1])
    curve, threshold = manifest.curve, manifest.thresholds["default"]
    assert curve is not None
    assert threshold.strong_share is not None
    spend, quality = curve.at(threshold.value)
    assert spend == pytest.approx(threshold.strong_share, abs=0.011)
    strong = curve.alone[manifest.targets[1]][1]
    assert threshold.quality_ratio is not None
    assert quality == pytest.approx(threshold.quality_ratio * strong, abs=0.011)


def test_the_bundle_has_seen_its_rows_and_no_others(
    trained: tuple[Fit, Path], few: tuple[Dataset, Features], tiny: Dataset
) -> None:
    bundle = load_bundle(trained[1])
    assert bundle.has_seen(tiny.prompts).tolist() == [True] * 60 + [False] * 90


def test_the_card_tells_what_a_user_must_know(trained: tuple[Fit, Path]) -> None:
    card = load_bundle(trained[1]).card
    for words in (
        "# small",
        "`weak`, `strong`",
        "tiny.jsonl",
        "router-train fit few.jsonl",
        "Embeddings can be inverted",
        "| learned |",
        "| random |",
        "mean gain",
        "## Calibration",
        "| quality of weak |",
        "| gain |",
    ):
        assert words in card


def test_the_same_seed_gives_the_same_bundle(
    trained: tuple[Fit, Path], few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    again = fit(*few, encoder, tmp_path / "small", seed=7)
    assert again.bundle.manifest.files == trained[0].bundle.manifest.files
    assert again.bundle.manifest.id == trained[0].bundle.manifest.id


def test_without_neighbours_the_card_does_not_speak_of_embeddings(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    parts, steps = [part for part in STACKED if part != "kernel"], []
    fit(*few, encoder, tmp_path / "none", parts=parts, progress=lambda: steps.append(1))
    assert len(steps) == INNER_FOLDS + 1
    bundle = load_bundle(tmp_path / "none")
    assert not [name for name in bundle.arrays if name.startswith("kernel")]
    assert not [name for name, array in bundle.arrays.items() if array.ndim == 2 and array.shape[0] == 60]
    assert "inverted" not in bundle.card
    assert load_predictor(tmp_path / "none").predict_features(few[1]).score.std() > 0


def test_three_targets(
    sample_rows: list[dict[str, Any]], tiny_features: Features, encoder: OnnxEncoder, tmp_path: Path
) -> None:
    rows = [
        {**row, "quality": {**row["quality"], "mid": sum(row["quality"].values()) / 2}}
        for row in sample_rows[:60]
    ]
    write_jsonl(tmp_path / "ladder.jsonl", rows)
    data = load_dataset([tmp_path / "ladder.jsonl"], targets=["weak", "mid", "strong"])
    result = fit(data, tiny_features.take(np.arange(60)), encoder, tmp_path / "ladder")
    assert (result.report, result.gain) == (None, None)
    predictor = load_predictor(tmp_path / "ladder")
    assert predictor.targets == ("weak", "mid", "strong")
    threshold = predictor.manifest.thresholds["default"]
    assert "0.95 × the best single target's" in threshold.how
    assert threshold.rows == 60
    assert threshold.quality_ratio is not None
    assert threshold.quality_ratio >= 0.95
    prediction = predictor.predict_features(tiny_features)
    assert prediction.gain.shape == (150, 3)
    assert (prediction.gain[:, 2] > prediction.gain[:, 1]).mean() > 0.9
    assert len(set(prediction.choose(0.1))) > 1


def test_three_targets_that_few_rows_have_in_common_stay_untuned(
    sample_rows: list[dict[str, Any]], tiny_features: Features, encoder: OnnxEncoder, tmp_path: Path
) -> None:
    rows = [
        {**row, "quality": {**row["quality"], "mid": (i % 3) / 2}} for i, row in enumerate(sample_rows[:110])
    ]
    for row in rows[:55]:
        del row["quality"]["mid"]
    for row in rows[100:]:
        del row["quality"]["strong"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_dataset([tmp_path / "rows.jsonl"], targets=["weak", "mid", "strong"])
    result = fit(data, tiny_features.take(np.arange(110)), encoder, tmp_path / "b", parts=("linear",))
    threshold = result.bundle.manifest.thresholds["default"]
    assert (threshold.value, threshold.rows) == (0.0, 110)
    assert threshold.how.startswith("untuned")


# --- What fit says and refuses ---------------------------------------------------------------------------------------


def with_quality(data: Dataset, weak: Any, strong: Any) -> Dataset:
    n = len(data)
    return replace(data, quality=np.stack([np.resize(weak, n), np.resize(strong, n)], axis=1).astype(float))


def test_a_gain_whose_interval_holds_zero_is_said(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    data, features = few
    result = fit(with_quality(data, [0, 1, 1, 0], [1, 0, 1, 0]), features, encoder, tmp_path / "even")
    (warning,) = [text for text in result.warnings if "do not show that strong is better than weak" in text]
    assert result.gain is not None
    assert result.gain.low < 0 < result.gain.high
    assert read_manifest(tmp_path / "even").notes == result.warnings
    assert warning in load_bundle(tmp_path / "even").card


def test_a_strong_target_that_is_worse_is_said(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    data, features = few
    result = fit(with_quality(data, [1, 1, 1, 0], [0, 0, 1, 0]), features, encoder, tmp_path / "worse")
    assert any("strong is worse than weak" in text and "swap" in text for text in result.warnings)


def test_a_clear_gain_is_not_warned_about(trained: tuple[Fit, Path]) -> None:
    assert not [text for text in trained[0].warnings if "do not show" in text or "worse" in text]
    assert trained[0].gain is not None
    assert trained[0].gain.low > 0


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_with_a_single_class_is_refused(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path, constant: float, target: str
) -> None:
    data, features = few
    column = TARGETS.index(target)
    quality = data.quality.copy()
    quality[:, column] = constant
    with pytest.raises(DatasetError, match=f"every quality of {target} is {constant:g}"):
        fit(replace(data, quality=quality), features, encoder, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_too_few_prompts_are_refused(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    data, features = few
    rows = np.arange(MINIMUM_ROWS - 1)
    with pytest.raises(DatasetError, match=f"49 distinct prompts are too few .* {MINIMUM_ROWS}"):
        fit(data.select(rows), features.take(rows), encoder, tmp_path / "b")
    # The same prompt many times is one prompt.
    with pytest.raises(DatasetError, match="1 distinct prompts"):
        fit(replace(data, groups=np.full(60, "g")), features, encoder, tmp_path / "b")


def test_labels_that_do_not_overlap_are_refused(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    data, features = few
    quality = data.quality.copy()
    quality[:30, 0] = np.nan
    with pytest.raises(DatasetError, match="30 rows have a quality for weak"):
        fit(replace(data, quality=quality), features, encoder, tmp_path / "b")
    quality = data.quality.copy()
    quality[10:21, 1] = np.nan
    with pytest.raises(DatasetError, match="49 rows have a quality for both weak and strong"):
        fit(replace(data, quality=quality), features, encoder, tmp_path / "b")


def test_some_missing_labels_are_no_obstacle(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    data, features = few
    quality = data.quality.copy()
    quality[50:, 1] = np.nan
    result = fit(replace(data, quality=quality), features, encoder, tmp_path / "b")
    assert result.report is not None
    assert result.report.n == 50
    assert result.bundle.manifest.thresholds["default"].rows == 50
    assert np.isfinite(load_predictor(tmp_path / "b").predict_features(features).gain).all()


def test_one_target_is_a_wrong_call(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="at least two targets"):
        fit(few[0].for_targets(["weak"]), few[1], encoder, tmp_path / "b")


def test_a_bundle_that_cannot_reproduce_itself_replaces_nothing(
    few: tuple[Dataset, Features], encoder: OnnxEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(*few, encoder, tmp_path / "b")
    before = load_bundle(tmp_path / "b").manifest
    monkeypatch.setattr("router.predictor.PROBE_SCORE_TOLERANCE", -1.0)
    with pytest.raises(BundleError, match="a probe scored"):
        fit(*few, encoder, tmp_path / "b", seed=1)
    assert load_bundle(tmp_path / "b").manifest == before


# --- Tune ----------------------------------------------------------------------------------------------------------


def test_each_goal_is_reached_on_rows_not_trained_on(
    tiny_predictor: Predictor, fresh: Dataset, fresh_features: Features
) -> None:
    score = tiny_predictor.predict_features(fresh_features).score
    weak, strong = fresh.quality.T

    def served(threshold: float) -> Any:
        return apply_threshold(score, threshold, weak, strong, *fresh.cost.T)

    by_quality = tune(tiny_predictor, fresh, fresh_features, quality=0.9)
    assert served(by_quality.chosen.threshold).quality >= 0.9 * strong.mean() - 1e-9
    by_share = tune(tiny_predictor, fresh, fresh_features, strong_share=0.3)
    assert served(by_share.chosen.threshold).strong_share == pytest.approx(0.3, abs=0.01)
    by_cost = tune(tiny_predictor, fresh, fresh_features, max_cost=8.0)
    assert 1000 * served(by_cost.chosen.threshold).cost <= 8.0
    assert by_cost.chosen.cost == pytest.approx(served(by_cost.chosen.threshold).cost)
    for result in (by_quality, by_share, by_cost):
        assert result.seen == 0
        assert result.chosen.n == 100
        assert result.strong_quality == pytest.approx(strong.mean())
        assert 0 < result.random_share < 1


def test_seen_rows_do_not_take_part(
    tiny_predictor: Predictor,
    tiny: Dataset,
    tiny_features: Features,
    fresh: Dataset,
    fresh_features: Features,
    tiny_file: Path,
    fresh_file: Path,
    encoder: OnnxEncoder,
) -> None:
    both = load_dataset([tiny_file, fresh_file], targets=TARGETS)
    mixed = tune(tiny_predictor, both, features_of(both, encoder), quality=0.9)
    alone = tune(tiny_predictor, fresh, fresh_features, quality=0.9)
    assert mixed.seen == 150
    # The same prompts in another batch: products of matrices differ in the last bits.
    assert mixed.chosen.threshold == pytest.approx(alone.chosen.threshold, abs=1e-6)
    assert mixed.chosen.n == 100
    with pytest.raises(DatasetError, match="all 150 rows were trained on"):
        tune(tiny_predictor, tiny, tiny_features, quality=0.9)


def test_a_goal_is_needed_and_must_be_reachable(
    tiny_predictor: Predictor, fresh: Dataset, fresh_features: Features
) -> None:
    with pytest.raises(UsageError, match="a goal is needed"):
        tune(tiny_predictor, fresh, fresh_features)
    with pytest.raises(UsageError, match="cannot be reached"):
        tune(tiny_predictor, fresh, fresh_features, quality=1.5)
    with pytest.raises(UsageError, match="the least is"):
        tune(tiny_predictor, fresh, fresh_features, max_cost=0.1)
    no_costs = replace(fresh, cost=np.full((100, 2), np.nan))
    with pytest.raises(UsageError, match="give prices"):
        tune(tiny_predictor, no_costs, fresh_features, max_cost=5.0)


def test_a_written_threshold_is_in_force_and_the_one_before_is_kept(
    trained: tuple[Fit, Path], fresh: Dataset, fresh_features: Features, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(trained[1], tmp_path / "small"))
    before = read_manifest(path)
    result = tune(load_predictor(path), fresh, fresh_features, strong_share=0.25)
    threshold = as_threshold(result.chosen, result.strong_quality, "rows not trained on")
    write_threshold(path, threshold)
    after = load_predictor(path)
    assert after.threshold == threshold.value != before.thresholds["default"].value
    assert after.manifest.thresholds["previous"] == before.thresholds["default"]
    assert (
        after.manifest.thresholds["default"].how
        == "strong share nearest to 0.25, on 100 rows (rows not trained on)"
    )
    assert after.manifest.id == before.id
    assert after.manifest.model_copy(update={"thresholds": before.thresholds}) == before


def test_a_threshold_records_its_share_of_strongs_quality() -> None:
    score = np.linspace(-0.2, 0.6, 100)
    pair = type("Pair", (), {"quality": np.stack([np.zeros(100), np.ones(100)], axis=1)})
    threshold = default_threshold(score, pair)  # type: ignore[arg-type]
    assert threshold.quality_ratio == pytest.approx(0.95)
    assert threshold.strong_share == pytest.approx(0.95)
    assert threshold.value == pytest.approx(score[4:6].mean())


def test_thresholds_for_a_quality_are_kept_beside_the_default(
    trained: tuple[Fit, Path], fresh: Dataset, fresh_features: Features, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(trained[1], tmp_path / "small"))
    before = read_manifest(path)
    # What fitting finds is for 95 %, and can be asked for by that, whatever the default is later.
    assert before.bars == {0.95: before.thresholds["default"].value}
    threshold = before.thresholds["default"].model_copy(update={"value": 0.07})
    write_threshold(path, threshold, quality=0.9, default=False)
    after = load_predictor(path)
    assert after.bars == {0.95: before.bars[0.95], 0.9: 0.07}
    assert after.threshold == before.thresholds["default"].value
    assert "previous" not in after.manifest.thresholds
    write_threshold(path, threshold, quality=0.95)
    assert load_predictor(path).bars == {0.95: 0.07, 0.9: 0.07}
    assert load_predictor(path).threshold == 0.07


def test_a_bundle_says_how_many_rows_ended_in_a_tool_s_result(
    sample_rows: list[dict[str, Any]], encoder: OnnxEncoder, tmp_path: Path
) -> None:
    ends = [
        {"role": "user", "content": "Fix it."},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "bash", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
    ]
    rows = [
        {**row, "messages": [{"role": "user", "content": f"{i} {row.get('prompt', '')}"}, *ends[1:]]}
        if i < 20
        else row
        for i, row in enumerate(row for row in sample_rows[:300] if "prompt" in row)
    ][:150]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = load_dataset([tmp_path / "rows.jsonl"], targets=TARGETS)
    result = fit(dataset, features_of(dataset, encoder), encoder, tmp_path / "steps", parts=("linear",))
    assert result.bundle.manifest.tool_result_rows == 20
    assert not load_predictor(tmp_path / "steps").knows_steps
    manifest = result.bundle.manifest.model_copy(update={"tool_result_rows": 500})
    write_manifest(manifest, tmp_path / "steps")
    assert load_predictor(tmp_path / "steps").knows_steps
