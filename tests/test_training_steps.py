from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from router.encoder import OnnxEncoder
from router.predictor import Prediction
from training.benchmark import Benchmark, benchmark
from training.steps import step_figures, sufficient_threshold
from training.tables import benchmark_markdown, benchmark_tables

TIERS = ("low", "mid", "mid_high", "high")


def test_steps_are_counted_alone_by_run_and_in_dollars() -> None:
    needed = np.array([0, 2, 3, 1, 0])
    chosen = np.array([0, 3, 2, 1, 1])  # exact, too high, too low, exact, too high
    runs = np.array(["a", "a", "b", "b", "c"])
    cost = np.tile([1.0, 2.0, 4.0, 8.0], (5, 1))
    found = step_figures(chosen, needed, runs, cost)
    assert found.exact == pytest.approx(2 / 5)
    assert found.sufficient == pytest.approx(4 / 5)
    assert found.runs_sufficient == pytest.approx(2 / 3)
    assert found.cost == pytest.approx((1 + 8 + 4 + 2 + 2) / 3)
    assert found.cost_saving == pytest.approx(1 - 17 / 40)


def test_the_threshold_is_the_highest_that_is_enough_often_enough() -> None:
    random = np.random.default_rng(0)
    needed = random.integers(4, size=400)
    steps = np.arange(4)
    gain = (steps >= needed[:, None]) * 1.0 + random.normal(0, 0.3, (400, 4))
    gain -= gain[:, :1]
    prediction = Prediction(TIERS, np.clip(gain, 0, 1), gain)
    threshold = sufficient_threshold(prediction, needed, 0.8)
    assert (prediction.choose(threshold) >= needed).mean() >= 0.8
    assert (prediction.choose(threshold + 0.1) >= needed).mean() < 0.8
    always_wrong = Prediction(TIERS, np.zeros((4, 4)), np.zeros((4, 4)))
    assert sufficient_threshold(always_wrong, np.full(4, 3), 1.0) < 0


def twin_rows() -> list[dict[str, Any]]:
    """Forty runs of three steps: reading needs the lowest tier, a failed test the highest."""
    rows = []
    for run in range(40):
        for step in range(3):
            hard = (run + step) % 2 == 0
            call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
            result = f"{run + 2} failed, 3 passed: AssertionError" if hard else f"listed file {run} of {step}"
            rows.append(
                {
                    "id": f"run-{run}-{step}",
                    "benchmark": "swebench",
                    "instance_id": f"run-{run}",
                    "step_index": step,
                    "messages": [
                        {"role": "user", "content": f"Fix bug {run} in the parser of module {run * 7}."},
                        {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": "c", "content": result},
                    ],
                    "target_tier": "high" if hard else "low",
                    "target_tier_id": 3 if hard else 0,
                }
            )
    return rows


@pytest.fixture(scope="module")
def measured(encoder: OnnxEncoder, tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """Seconds: the estimator is fitted on four targets, five times."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "twinrouterbench").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in twin_rows())
    (folder / "twinrouterbench" / "question_bank.jsonl").write_text(rows, encoding="utf-8")
    return benchmark(
        folder, encoder, only=["twinrouterbench", "coderouterbench"], repeats=1, resamples=10, jobs=1
    )


def test_agent_steps_have_a_table_where_the_file_is_there(measured: Benchmark) -> None:
    (table,) = measured.steps
    lines = {name: figures for name, _, figures in table.lines}
    assert (table.n, table.runs) == (120, 40)
    assert set(lines) == {"learned", "logistic", "random", *(f"always {tier}" for tier in TIERS)}
    assert lines["always high"].sufficient == lines["always high"].runs_sufficient == 1.0
    assert lines["always high"].cost_saving == 0.0
    assert lines["always low"].exact == pytest.approx(0.5)
    assert lines["always low"].runs_sufficient == 0.0  # every run has a hard step
    # What the tool said tells the tier: both that are trained learn it.
    for name in ("learned", "logistic"):
        assert lines[name].exact > 0.9
        assert lines[name].sufficient > 0.9
        assert lines[name].cost_saving > 0.3


def test_what_is_absent_is_said(measured: Benchmark) -> None:
    assert "coderouterbench" in measured.skipped
    text = benchmark_markdown(measured, "router-train …")
    assert "| learned | 96 of these steps |" in text
    assert "Skipped: coderouterbench: coderouterbench: not there." in text
    assert len(benchmark_tables(measured)) == 1
    json.dumps(measured.as_dict(), allow_nan=False)
