from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import Labelled, labelled

from router.errors import DatasetError, UsageError
from router.features import Features
from router.predictor import Predictor
from training.dataset import Dataset, load_dataset
from training.estimator import STACKED
from training.evaluation import Report, crossval, evaluate, groups_by, pair_rows, report_of
from training.metrics import apgr, cost_quality_curve
from training.sources import convert
from training.train import features_of


def dataset_of(data: Labelled) -> Dataset:
    n = len(data.prompts)
    return Dataset(
        ids=data.groups,
        sources=np.array(["one", "two"])[np.arange(n) % 3 // 2],
        domains=np.full(n, ""),
        groups=data.groups,
        prompts=data.prompts,
        targets=("weak", "strong"),
        quality=data.quality,
        cost=np.tile([0.001, 0.02], (n, 1)),
        output_tokens=np.full((n, 2), np.nan),
    )


def one_source(data: Labelled) -> Dataset:
    """The same rows without figures by source, which take as long as the whole."""
    return replace(dataset_of(data), sources=np.full(len(data.prompts), "one"))


@pytest.fixture(scope="module")
def rows() -> Labelled:
    return labelled(360)


@pytest.fixture(scope="module")
def report(rows: Labelled) -> Report:
    return crossval(dataset_of(rows), rows.features, folds=3, jobs=1)


@pytest.fixture(scope="module")
def fresh(fresh_file: Path) -> Dataset:
    return load_dataset([fresh_file], targets=["weak", "strong"])


@pytest.fixture(scope="module")
def fresh_features(fresh: Dataset, tiny_predictor: Predictor) -> Features:
    return features_of(fresh, tiny_predictor.encoder)


# --- Cross-validation ----------------------------------------------------------------------------------------------


def test_a_report_names_what_the_contract_names(report: Report) -> None:
    fields = report.as_dict()
    assert fields["n"] == 360
    assert {"weak_quality", "strong_quality", "calibration_error", "by_source", "seen"} <= fields.keys()
    baselines = {"average", "tfidf_logistic", "minilm_knn", "prompt_length", "random", "oracle"}
    assert set(fields["methods"]) == {"learned", *STACKED, *baselines}
    for name, figures in fields["methods"].items():
        assert {"apgr", "apgr_ci", "cpt50", "cpt80", "strong_share_at_95"} <= figures.keys(), name
        assert figures["cost_saving_at_95"] is not None
        has_nested = (
            figures["nested_strong_share_at_95"] is not None and figures["nested_quality"] is not None
        )
        assert has_nested == (name not in ("random", "oracle")), name


def test_the_learned_router_stands_between_random_and_the_oracle(report: Report, rows: Labelled) -> None:
    figures = report.methods
    assert 0.45 < figures["random"].apgr < 0.55
    assert figures["learned"].apgr > 0.62
    assert figures["oracle"].apgr > figures["learned"].apgr
    assert figures["learned"].apgr > max(figures[part].apgr for part in STACKED) - 0.02
    assert report.weak_quality == rows.quality[:, 0].mean()
    assert report.calibration_error < 0.15


def test_the_nested_threshold_keeps_about_the_quality_it_was_asked_for(report: Report) -> None:
    learned = report.methods["learned"]
    assert learned.nested_quality is not None
    assert learned.nested_strong_share_at_95 is not None
    # Of 360 rows the standard error is .04.
    assert learned.nested_quality / report.strong_quality == pytest.approx(0.95, abs=0.06)
    assert learned.strong_share_at_95 <= learned.nested_strong_share_at_95 + 0.15


def test_each_large_source_has_its_own_report(report: Report) -> None:
    assert {name: part.n for name, part in report.by_source.items()} == {"one": 240, "two": 120}
    means = sum(part.n * part.weak_quality for part in report.by_source.values()) / 360
    assert means == pytest.approx(report.weak_quality)


def test_calibration_is_told_of_each_head_and_of_the_gain(report: Report, rows: Labelled) -> None:
    calibration = report.calibration
    assert list(calibration.quality) == ["weak", "strong"]
    assert calibration.gain.ece == report.calibration_error
    for t, figures in enumerate(calibration.quality.values()):
        assert figures.n == 360
        assert figures.base_brier == pytest.approx(rows.quality[:, t].var())
    # The weak head has a strong signal: better than its base rate on rows that no part and no curve was fitted on.
    weak = calibration.quality["weak"]
    assert weak.brier < weak.base_brier - 0.02
    assert weak.auc > 0.7
    assert weak.ece < 3 * weak.ece_by_chance
    written = report.as_dict()
    assert written["calibration"]["quality"]["weak"]["ece"] == weak.ece
    assert len(written["calibration"]["gain"]["bins"]) == 10
    assert written["by_source"]["two"]["calibration"]["quality"]["strong"]["n"] == 120


def test_labels_that_are_noise_cannot_be_learned_across_folds(rows: Labelled) -> None:
    order = np.random.default_rng(3).permutation(360)
    noise = replace(one_source(rows), quality=rows.quality[order])
    learned = crossval(noise, rows.features, folds=3, jobs=1).methods["learned"]
    # The standard deviation of one random ranking of these rows is about .05.
    assert abs(learned.apgr - 0.5) < 0.12


Split = tuple[int, frozenset[int], frozenset[int]]


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[Split]:
    """Cross-validation with scores that its seed draws; the list gets (seed, training rows, test rows) of each fold."""
    seen: list[Split] = []

    def fold(
        dataset: Dataset,
        features: Features,
        train: NDArray[np.intp],
        test: NDArray[np.intp],
        parts: tuple[str, ...],
        seed: int,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        seen.append((seed, frozenset(train.tolist()), frozenset(test.tolist())))
        score = np.random.default_rng(seed).random(len(dataset))[test]
        quality = np.stack([score, score], axis=1)
        return score > 0.5, quality, dict.fromkeys(("learned", *parts, "tfidf_logistic", "minilm_knn"), score)

    monkeypatch.setattr("training.evaluation._fold", fold)
    return seen


def test_prompts_of_one_group_are_never_on_both_sides(rows: Labelled, splits: list[Split]) -> None:
    data = one_source(rows)
    groups = np.array([f"pair {i // 2}" for i in range(360)])
    crossval(replace(data, groups=groups), rows.features, folds=4, repeats=2, jobs=1, parts=())
    crossval(data, rows.features, folds=4, repeats=2, jobs=1, parts=(), groups=groups)
    assert len(splits) == 16
    for _, train, test in splits:
        assert train | test == set(range(360))
        assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert set.union(*(set(test) for _, _, test in splits[:4])) == set(range(360))


def test_repeats_are_means_over_fold_seeds(rows: Labelled, splits: list[Split]) -> None:
    data, steps = one_source(rows), []
    runs = [
        crossval(data, rows.features, folds=2, jobs=1, parts=(), seed=seed).methods["learned"]
        for seed in (4, 5)
    ]
    both = crossval(
        data, rows.features, folds=2, repeats=2, jobs=1, parts=(), seed=4, progress=lambda: steps.append(1)
    ).methods["learned"]
    assert runs[0].apgr != runs[1].apgr
    assert runs[0].apgr_sd is None
    assert both.apgr == pytest.approx(np.mean([run.apgr for run in runs]))
    assert both.apgr_sd == pytest.approx(np.std([run.apgr for run in runs], ddof=1))
    assert both.nested_quality == pytest.approx(np.mean([run.nested_quality for run in runs]))
    assert len(steps) == 4
    assert [seed for seed, _, _ in splits] == [4, 4, 5, 5, 4, 4, 5, 5]
    assert splits[:4] == splits[4:]
    assert splits[0][2] != splits[2][2]


def test_too_few_groups_for_the_folds() -> None:
    rows = labelled(60)
    with pytest.raises(UsageError, match="2 groups of prompts cannot make 5 folds"):
        crossval(dataset_of(rows), rows.features, groups=dataset_of(rows).sources, jobs=1)


# --- Which rows, which groups ----------------------------------------------------------------------------------------


def test_a_pairs_rows_are_those_with_both_labels(rows: Labelled) -> None:
    quality = rows.quality.copy()
    quality[::2, 0] = np.nan
    quality[0:60, 1] = np.nan
    pair = pair_rows(replace(dataset_of(rows), quality=quality), "strong", "weak")
    assert pair.targets == ("strong", "weak")
    assert len(pair) == 150
    assert np.isfinite(pair.quality).all()
    assert np.array_equal(pair.quality[:, 0], quality[61::2, 1])


def test_a_pair_that_is_not_there(rows: Labelled) -> None:
    with pytest.raises(UsageError, match="unknown model gpt"):
        pair_rows(dataset_of(rows), "weak", "gpt")
    quality = rows.quality.copy()
    quality[:180, 0] = np.nan
    quality[180:, 1] = np.nan
    with pytest.raises(DatasetError, match="no row has a quality for both weak and strong"):
        pair_rows(replace(dataset_of(rows), quality=quality), "weak", "strong")


def test_groups_by_field(rows: Labelled) -> None:
    data = dataset_of(rows)
    assert groups_by(data, "group") is data.groups
    assert set(groups_by(data, "source")) == {"one", "two"}
    with pytest.raises(UsageError, match="360 of 360 rows have no domain"):
        groups_by(data, "domain")
    with pytest.raises(UsageError, match="expected group, domain or source"):
        groups_by(data, "language")


# --- Evaluation ----------------------------------------------------------------------------------------------------


def test_rows_that_were_trained_on_are_left_out_and_counted(
    tiny_predictor: Predictor, tiny_file: Path, fresh: Dataset, fresh_file: Path, fresh_features: Features
) -> None:
    both = load_dataset([tiny_file, fresh_file], targets=["weak", "strong"])
    mixed = evaluate(tiny_predictor, both, features_of(both, tiny_predictor.encoder))
    alone = evaluate(tiny_predictor, fresh, fresh_features)
    assert (mixed.n, mixed.seen) == (100, 150)
    assert (alone.n, alone.seen) == (100, 0)
    assert mixed.methods["learned"].apgr == pytest.approx(alone.methods["learned"].apgr)
    assert set(alone.methods) == {"learned", "unknown_to_strong", "random", "prompt_length", "oracle"}


def test_a_prompt_that_differs_in_case_alone_counts_as_seen(
    tiny_predictor: Predictor, fresh: Dataset, tiny_file: Path, fresh_features: Features
) -> None:
    seen = load_dataset([tiny_file], targets=["weak", "strong"]).prompts[0]
    prompts = (replace(seen, text=f" {seen.text.swapcase()} "), *fresh.prompts[1:])
    assert evaluate(tiny_predictor, replace(fresh, prompts=prompts), fresh_features).seen == 1


def test_the_figures_are_those_of_the_scores(
    tiny_predictor: Predictor, fresh: Dataset, fresh_features: Features
) -> None:
    score = tiny_predictor.predict_features(fresh_features).score
    weak, strong = fresh.quality.T
    learned = evaluate(tiny_predictor, fresh, fresh_features).methods["learned"]
    assert learned.apgr == pytest.approx(apgr(cost_quality_curve(score, weak, strong)))
    served = np.where(score > tiny_predictor.threshold, strong, weak)
    assert learned.nested_quality == pytest.approx(served.mean())
    assert learned.nested_strong_share_at_95 == pytest.approx((score > tiny_predictor.threshold).mean())
    bare = report_of(fresh, score)
    assert bare.methods["learned"].apgr == learned.apgr
    assert bare.calibration.quality == {}


def test_nothing_is_left_where_all_was_trained_on(
    tiny_predictor: Predictor, tiny_file: Path, tiny_features: Features
) -> None:
    seen = load_dataset([tiny_file], targets=["weak", "strong"])
    with pytest.raises(DatasetError, match="all 150 rows were trained on"):
        evaluate(tiny_predictor, seen, tiny_features)


# --- The public originals --------------------------------------------------------------------------------------------


def test_gsm8k_is_ranked_as_well_as_the_card_says(
    bench_data: Path, tmp_path: Path, tiny_predictor: Predictor
) -> None:
    file = tmp_path / "gsm8k.jsonl"
    convert("routellm-gsm8k", bench_data / "routellm", file, {})
    data = load_dataset([file])
    weak, strong = sorted(
        data.targets, key=lambda name: np.nanmean(data.quality[:, data.targets.index(name)])
    )
    pair = pair_rows(data, weak, strong)
    assert len(pair) == 1_307
    features: Features = features_of(pair, tiny_predictor.encoder)
    learned = crossval(pair, features, folds=5, repeats=1).methods["learned"]
    assert learned.apgr >= 0.61
    low, high = learned.apgr_ci
    assert low < learned.apgr < high
    assert low > 0.5


def test_flagged_rows_go_to_strong_beside_the_plain_router(
    tiny_predictor: Predictor, fresh: Dataset, fresh_features: Features
) -> None:
    dense = fresh_features.dense.copy()
    dense[:30, 0] += 9.0  # prompts longer than any
    changed = replace(fresh_features, dense=dense)
    found = tiny_predictor.predict_features(changed)
    assert found.unfamiliar[:30].all()
    report = evaluate(tiny_predictor, fresh, changed)
    plain, flagged = report.methods["learned"], report.methods["unknown_to_strong"]
    assert report.unfamiliar == report.as_dict()["unfamiliar"] == found.unfamiliar.mean()
    to_strong = found.unfamiliar | (found.score > tiny_predictor.threshold)
    assert flagged.nested_strong_share_at_95 == pytest.approx(to_strong.mean())
    assert flagged.nested_quality == pytest.approx(
        np.where(to_strong, fresh.quality[:, 1], fresh.quality[:, 0]).mean()
    )
    assert plain.nested_strong_share_at_95 == pytest.approx((found.score > tiny_predictor.threshold).mean())
    assert plain.nested_strong_share_at_95 < flagged.nested_strong_share_at_95
