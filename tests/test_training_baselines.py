from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from router.features import prompt_from_text
from training.baselines import BASELINES, NEIGHBOURS, standardised_mean
from training.dataset import Dataset
from training.metrics import apgr, cost_quality_curve

Floats = NDArray[np.float64]


def dataset(texts: list[str], weak: Floats, strong: Floats) -> Dataset:
    n = len(texts)
    names = np.array([f"r{i}" for i in range(n)])
    unknown = np.full((n, 2), np.nan)
    return Dataset(
        ids=names,
        sources=np.full(n, "test"),
        domains=np.full(n, ""),
        groups=names,
        prompts=tuple(prompt_from_text(text) for text in texts),
        targets=("weak", "strong"),
        quality=np.stack([weak, strong], axis=1),
        cost=unknown,
        output_tokens=unknown,
    )


def two_kinds(n: int, seed: int) -> tuple[Dataset, Floats]:
    """Sums, which only strong gets right, and greetings, where weak is better; embeddings tell the kind."""
    random = np.random.default_rng(seed)
    sums = random.random(n) < 0.5
    words = random.integers(1000, size=n)
    texts = [
        f"add {w} to {w + 3}" if is_sum else f"greet user {w}" for is_sum, w in zip(sums, words, strict=True)
    ]
    weak = np.where(sums, 0.1, 0.9)
    strong = np.where(sums, 0.9, 0.7)
    embeddings = np.where(sums[:, None], [1.0, 0.0], [0.0, 1.0]) * random.uniform(1, 5, (n, 1))
    return dataset(texts, weak, strong), embeddings + random.normal(0, 0.05, (n, 2))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_scores_each_test_row_and_repeats_itself(name: str) -> None:
    train, train_embeddings = two_kinds(60, 1)
    test, test_embeddings = two_kinds(23, 2)
    first, again = (BASELINES[name](train, test, train_embeddings, test_embeddings, 5) for _ in range(2))
    assert first.shape == (23,)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "name", ["tfidf_logistic", "minilm_knn", "average", "clusters", "matrix_factorisation"]
)
def test_trained_baselines_learn_the_gain(name: str) -> None:
    train, train_embeddings = two_kinds(400, 1)
    test, test_embeddings = two_kinds(100, 2)
    score = BASELINES[name](train, test, train_embeddings, test_embeddings, 0)
    gain = test.quality[:, 1] - test.quality[:, 0]
    assert score[gain > 0].min() > score[gain < 0].max()


def test_probabilities_follow_fractional_qualities() -> None:
    """Qualities of .1/.9 against .9/.7 are gains of .8 and −.2, not the 1 and 0 of rounded labels."""
    train, embeddings = two_kinds(2000, 1)
    score = BASELINES["tfidf_logistic"](train, train, embeddings, embeddings, 0)
    gain = train.quality[:, 1] - train.quality[:, 0]
    assert score[gain > 0].mean() == pytest.approx(0.8, abs=0.1)
    assert score[gain < 0].mean() == pytest.approx(-0.2, abs=0.1)


def test_knn_is_the_mean_gain_of_the_nearest_by_cosine() -> None:
    random = np.random.default_rng(0)
    n, m = 700, 1100  # more test rows than one chunk holds
    train = dataset(["x"] * n, random.random(n), random.random(n))
    test = dataset(["x"] * m, np.zeros(m), np.zeros(m))
    seen, asked = random.normal(size=(n, 8)), random.normal(size=(m, 8))
    score = BASELINES["minilm_knn"](train, test, seen, 100 * asked, 0)
    gain = train.quality[:, 1] - train.quality[:, 0]
    for i in (0, 511, 512, 1099):
        cosine = seen @ asked[i] / np.linalg.norm(seen, axis=1)
        assert score[i] == pytest.approx(gain[np.argsort(-cosine)[:NEIGHBOURS]].mean(), abs=1e-6)


def test_few_rows_and_one_class_are_no_error() -> None:
    train = dataset(["add one", "add two", "greet"], np.zeros(3), np.array([1.0, 0.5, 0.0]))
    test = dataset(["greet", ""], np.zeros(2), np.ones(2))
    zeros = np.zeros((3, 4))  # a row without direction has no nearest neighbours: all of them, then
    for name in BASELINES:
        assert np.isfinite(BASELINES[name](train, test, zeros, zeros[:2], 0)).all()
    assert BASELINES["minilm_knn"](train, test, zeros, zeros[:2], 0) == pytest.approx([0.5, 0.5])


def test_prompt_length_is_that_of_the_whole_ask() -> None:
    test = dataset(["short", "x" * 20_000], np.zeros(2), np.ones(2))
    nothing = np.zeros((2, 1))
    np.testing.assert_array_equal(BASELINES["prompt_length"](test, test, nothing, nothing, 0), [5, 20_000])


def test_oracle_reads_the_test_rows() -> None:
    train, test = (dataset(["a", "b"], np.array([w, 0.0]), np.array([1.0, 0.25])) for w in (1.0, 0.5))
    nothing = np.zeros((2, 1))
    np.testing.assert_allclose(BASELINES["oracle"](train, test, nothing, nothing, 0), [0.5, 0.25])


def test_average_weighs_both_alike() -> None:
    mean = standardised_mean(np.array([0.0, 1.0, 2.0]), np.array([300.0, 200.0, 100.0]))
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)
    alone = standardised_mean(np.array([1.0, 2.0]), np.array([7.0, 7.0]))
    np.testing.assert_allclose(alone, [-0.5, 0.5])


def test_only_labelled_pairs_are_taken() -> None:
    unlabelled = dataset(["a", "b"], np.array([np.nan, 0.0]), np.ones(2))
    labelled = dataset(["a", "b"], np.zeros(2), np.ones(2))
    nothing = np.zeros((2, 1))
    with pytest.raises(ValueError, match="labelled"):
        BASELINES["minilm_knn"](unlabelled, labelled, nothing, nothing, 0)
    with pytest.raises(ValueError, match="pair"):
        BASELINES["oracle"](labelled, labelled.for_targets(["weak"]), nothing, nothing, 0)


def test_tfidf_ranks_gsm8k_better_than_length(bench_data: Path) -> None:
    """Out of fold: about .61 where prompt length has .597 and random .500."""
    folder = bench_data / "routellm" / "gsm8k"
    table = pd.read_csv(folder / "gsm8k_responses.csv")
    left_out = set(pd.read_json(folder / "contaminated_prompts.jsonl", lines=True)["eval_prompt"])
    table = table[~table["prompt"].isin(left_out)]
    rows = dataset(
        table["prompt"].tolist(),
        table["mistralai/Mixtral-8x7B-Instruct-v0.1"].to_numpy(np.float64),
        table["gpt-4-1106-preview"].to_numpy(np.float64),
    )
    n = len(rows)
    figures = []
    for seed in range(3):
        fold = np.random.default_rng(seed).integers(5, size=n)
        score = np.empty(n)
        for i in range(5):
            nothing = np.zeros((n, 1))
            score[fold == i] = BASELINES["tfidf_logistic"](
                rows.select(fold != i), rows.select(fold == i), nothing, nothing, seed
            )
        figures.append(apgr(cost_quality_curve(score, rows.quality[:, 0], rows.quality[:, 1])))
    assert 0.58 < np.mean(figures) < 0.65
