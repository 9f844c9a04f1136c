"""Labels made with the stand-in are the qualities it was told, seen by a judge with an error of known size."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from router.errors import UsageError
from training.dataset import load_dataset
from training.labels import Job, LabelReport, label
from training.prices import Price
from training.standin import StandIn

JOB = Job("small", "large", "judge", pairwise=False)
PAIRS = Job("small", "large", "judge")
PROMPTS = [{"id": f"p{i}", "prompt": f"Question {i}", "source": "mine"} for i in range(200)]
TRUTH = {
    str(row["prompt"]): (float(weak), float(strong))
    for row, (weak, strong) in zip(PROMPTS, np.random.default_rng(0).random((200, 2)).round(2), strict=True)
}


def run(job: Job, out: Path, noise: float, seed: int = 0) -> LabelReport:
    prices = {name: Price(1.0, 2.0) for name in job.models}
    return asyncio.run(label(PROMPTS, StandIn(job, TRUTH, noise=noise, seed=seed), job, out, prices=prices))


def test_without_noise_grades_are_the_truth_to_a_tenth(tmp_path: Path) -> None:
    report = run(JOB, tmp_path / "labels.jsonl", noise=0.0)
    assert (report.labelled, report.failed, report.calls) == (
        200,
        (),
        {"small": 200, "large": 200, "judge": 400},
    )
    rows = load_dataset([tmp_path / "labels.jsonl"], targets=["small", "large"])
    assert np.abs(rows.quality - np.array(list(TRUTH.values()))).max() <= 0.05 + 1e-9
    assert rows.output_tokens.tolist() == [[450, 650]] * 200
    # 1 and 2 dollars per million tokens: the answers alone cost more than this, the prompts are short.
    assert 200 * (450 + 650) * 2e-6 < report.spent < 200 * (450 + 650) * 2e-6 + 0.5


def test_the_judges_error_is_as_large_as_asked_and_repeatable(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(JOB, tmp_path / f"{name}.jsonl", noise=0.1, seed=seed)
    a, b, c = (load_dataset([tmp_path / f"{name}.jsonl"]).quality for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    truth = np.array(list(TRUTH.values()))
    inside = (truth > 0.3) & (truth < 0.7)  # at the ends grades are cut off
    # Rounding to tenths adds a variance of .1² / 12.
    assert (a - truth)[inside].std() == pytest.approx(np.sqrt(0.01 + 0.01 / 12), rel=0.15)


def test_comparisons_follow_the_truth(tmp_path: Path) -> None:
    run(PAIRS, tmp_path / "pairs.jsonl", noise=0.05)
    share = load_dataset([tmp_path / "pairs.jsonl"], targets=["small", "large"]).quality[:, 1]
    gain = np.array([strong - weak for weak, strong in TRUTH.values()])
    assert set(np.unique(share)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    clear = np.abs(gain) > 0.25
    assert (share[clear] == (gain[clear] > 0)).all()
    assert len(np.unique(share)) > 2


def test_a_judge_may_be_one_of_the_models(tmp_path: Path) -> None:
    report = run(Job("small", "large", "large"), tmp_path / "labels.jsonl", noise=0.0)
    assert report.calls == {"small": 200, "large": 600}


def test_what_it_was_not_told_it_does_not_answer() -> None:
    stand_in = StandIn(JOB, TRUTH)
    with pytest.raises(UsageError, match="not of its job"):
        asyncio.run(stand_in("other", [{"role": "user", "content": "Question 1"}], max_tokens=9))
    with pytest.raises(UsageError, match="was not told") as error:
        asyncio.run(stand_in("small", [{"role": "user", "content": "private words"}], max_tokens=9))
    assert "private" not in str(error.value)
