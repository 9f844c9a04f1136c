from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic import Labelled, NoEncoder, labelled

from router.features import Features, extract, prompt_from_text
from training.dataset import Dataset
from training.estimator import QualityEstimator
from training.novelty_study import NoveltyStudy, novelty_study

ROWS = 400


def dataset_of(rows: Labelled) -> Dataset:
    n = len(rows.prompts)
    return Dataset(
        ids=rows.groups,
        sources=np.array(["one" if i < 300 else "two" for i in range(n)]),
        domains=np.array([f"d{i % 8}" for i in range(n)]),
        groups=rows.groups,
        prompts=rows.prompts,
        targets=("weak", "strong"),
        quality=rows.quality,
        cost=np.full((n, 2), np.nan),
        output_tokens=np.full((n, 2), np.nan),
    )


def foreign(rows: Labelled) -> Features:
    """The same prompts in words that no training prompt has, embedded elsewhere."""
    prompts = [
        prompt_from_text("¿" + prompt.text.translate({ord("a"): "ж", ord("i"): "щ"}) + "?")
        for prompt in rows.prompts
    ]
    return extract(prompts, NoEncoder(), (rows.features.embedding[:, ::-1] + 1.0).astype(np.float32))


@pytest.fixture(scope="module")
def study() -> NoveltyStudy:
    """Seconds: an estimator, and eleven fits of what novelty is measured by."""
    rows, more = labelled(ROWS), labelled(200, seed=1)
    dataset = dataset_of(rows)
    estimator = QualityEstimator(dataset.targets, seed=0)
    estimator.fit(rows.features, dataset.quality, dataset.groups)
    away = foreign(more)
    calls: list[tuple[int, int]] = []
    found = novelty_study(
        dataset,
        rows.features,
        dataset.groups,
        estimator.arrays_,
        0.6,
        others={"alike": more.features, "foreign": away},
        parts={"first hundred": np.arange(ROWS) < 100},
        by_domain=True,
        routed={
            "alike": (dataset_of(more), more.features),
            "foreign": (replace(dataset_of(more), prompts=more.prompts), away),
        },
        jobs=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 10) for done in range(11)]
    return found


def test_rows_of_the_same_kind_are_seldom_flagged_and_foreign_ones_are(study: NoveltyStudy) -> None:
    lines = {line.rows: line for line in study.lines}
    assert lines["all, held out"].n == ROWS
    assert lines["first hundred, held out"].n == 100
    assert lines["one, held out"].n + lines["two, held out"].n == ROWS
    assert 0.0 < lines["all, held out"].flagged < 0.12
    assert lines["foreign"].flagged == 1.0
    assert lines["foreign"].auc == pytest.approx(1.0)
    assert lines["alike"].flagged < 0.12
    assert lines["alike"].auc == pytest.approx(0.5, abs=0.08)
    # Domains mean nothing in these rows.
    assert lines["whole subjects held out"].auc == pytest.approx(0.5, abs=0.08)
    assert {line.rows for line in study.lines if line.familiar} == {
        f"{name}, held out" for name in ("all", "one", "two", "first hundred")
    }


def test_sending_flagged_rows_to_strong_pays_for_the_foreign_alone(study: NoveltyStudy) -> None:
    alike, away = study.routed
    assert alike.plain.quality > alike.weak_quality
    assert 0.0 < alike.plain.strong_share < 1.0
    # What a router without knowledge needs for the same quality is a point of a straight line.
    gap = alike.strong_quality - alike.weak_quality
    assert alike.plain.random_share == pytest.approx((alike.plain.quality - alike.weak_quality) / gap)
    assert away.flagged_to_strong.strong_share == 1.0
    assert away.flagged_to_strong.quality == pytest.approx(away.strong_quality)
    assert alike.flagged_to_strong.strong_share == pytest.approx(alike.plain.strong_share, abs=0.12)
    json.dumps(study.as_dict(), allow_nan=False)
