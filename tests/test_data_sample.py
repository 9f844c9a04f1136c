"""data/sample.jsonl is what its card says."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import cohen_kappa_score

from training.dataset import Dataset, load_dataset
from training.metrics import apgr, cost_quality_curve, oracle_scores

DATA = Path(__file__).parent.parent / "data"
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def sample() -> Dataset:
    return load_dataset([DATA / "sample.jsonl"], targets=["weak", "strong"])


@pytest.fixture(scope="module")
def ratings() -> dict[str, Floats]:
    """Column → the ratings in the order of the rows."""
    with (DATA / "sample_ratings.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "id": np.array([row["id"] for row in rows]),
        **{name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "id"},
    }


def text_of(row: dict[str, Any]) -> str:
    """All that a row says, as it is written."""
    return row["prompt"] if "prompt" in row else "\n".join(str(m.get("content")) for m in row["messages"])


def test_size_and_kinds(sample_rows: list[dict[str, Any]], sample: Dataset) -> None:
    assert len(sample_rows) == len(sample) >= 600
    kinds = Counter(row["domain"] for row in sample_rows)
    expected = {"plan", "code", "debug", "commit", "extract", "summary", "everyday", "math", "writing"}
    assert set(kinds) == expected
    assert min(kinds.values()) >= 50
    assert not np.isnan(sample.quality).any()
    assert sample.report.extra_fields == {"language": len(sample)}


def test_a_tenth_is_in_other_languages(sample_rows: list[dict[str, Any]]) -> None:
    other = [row for row in sample_rows if not row["language"].startswith("en")]
    assert len(other) >= len(sample_rows) / 10
    assert len({row["language"].partition("-")[0] for row in other}) >= 20


def test_some_are_conversations_and_some_have_harness_text(
    sample_rows: list[dict[str, Any]], sample: Dataset
) -> None:
    assert sum(prompt.state.turns > 1 for prompt in sample.prompts) >= 40
    assert sum(prompt.state.last_result != "none" for prompt in sample.prompts) >= 20
    assert any(prompt.state.last_result_error for prompt in sample.prompts)
    wrapped = [
        (row, prompt)
        for row, prompt in zip(sample_rows, sample.prompts, strict=True)
        if any(
            f"</{tag}>" in text_of(row) for tag in ("system-reminder", "environment_details", "git_status")
        )
    ]
    assert len(wrapped) >= 10
    for row, prompt in wrapped:
        assert "</system-reminder>" not in prompt.text
        assert "</environment_details>" not in prompt.text
        assert len(prompt.text) < len(text_of(row))


def test_the_two_ratings_of_a_row_average_to_its_qualities(
    sample_rows: list[dict[str, Any]], ratings: dict[str, Floats]
) -> None:
    assert ratings["id"].tolist() == [row["id"] for row in sample_rows]
    for target in ("weak", "strong"):
        first, second = ratings[f"{target}_1"], ratings[f"{target}_2"]
        assert set(np.concatenate([first, second])) <= {0.0, 0.25, 0.5, 0.75, 1.0}
        assert ((first + second) / 2).tolist() == [row["quality"][target] for row in sample_rows]


@pytest.mark.parametrize(
    ("target", "same", "kappa", "difference", "correlation"),
    [("weak", 0.751, 0.897, 0.062, 0.911), ("strong", 0.912, 0.728, 0.022, 0.729)],
)
def test_agreement_is_what_the_card_says(
    ratings: dict[str, Floats], target: str, same: float, kappa: float, difference: float, correlation: float
) -> None:
    first, second = ratings[f"{target}_1"], ratings[f"{target}_2"]
    steps = [(4 * rating).astype(int) for rating in (first, second)]
    assert (first == second).mean() == pytest.approx(same, abs=1e-3)
    assert cohen_kappa_score(*steps, weights="quadratic") == pytest.approx(kappa, abs=1e-3)
    assert np.abs(first - second).mean() == pytest.approx(difference, abs=1e-3)
    assert spearmanr(first, second).statistic == pytest.approx(correlation, abs=1e-3)
    card = (DATA / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if line.startswith(f"| {target} |")]
    means = f"{first.mean():.3f} / {second.mean():.3f}".replace("0.", ".")
    for figure in (means, f"{100 * same:.1f} %", *(f"{x:.3f}"[1:] for x in (difference, kappa, correlation))):
        assert figure in row


def test_there_is_something_to_route(sample: Dataset) -> None:
    weak, strong = sample.quality.T
    assert strong.mean() - weak.mean() > 0.2
    oracle = apgr(cost_quality_curve(oracle_scores(weak, strong), weak, strong))
    length = apgr(cost_quality_curve([p.characters for p in sample.prompts], weak, strong))
    assert oracle > 0.65
    assert abs(length - 0.5) < oracle - 0.5


def test_no_two_prompts_are_nearly_the_same(sample: Dataset) -> None:
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
    vectors = grams.fit_transform([prompt.text for prompt in sample.prompts])
    cosine = (vectors @ vectors.T).toarray()
    np.fill_diagonal(cosine, 0.0)
    first, second = np.unravel_index(cosine.argmax(), cosine.shape)
    assert cosine.max() < 0.6, f"{sample.ids[first]} and {sample.ids[second]}"
    assert len(np.unique(sample.groups)) == len(sample)
