"""What the benchmark's JSON holds is what the pictures are drawn from; and the pictures themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import NoEncoder, labelled

from router.errors import DatasetError, UsageError
from training.benchmark import Benchmark, benchmark_rows
from training.comparison import FITTED
from training.dataset import Dataset
from training.plot import few_rows_figure, guarantee_figure, ladder_figure, methods_figure, reliability_figure
from training.results import Results, read_results, results_of
from training.tables import benchmark_markdown, benchmark_tables

ROWS = 240
NAMES = (*FITTED, "average")


@pytest.fixture(scope="module")
def measured() -> Benchmark:
    """Seconds: a dozen fits of the estimator on few rows."""
    rows = labelled(ROWS, word_signal=2.5, embedding_signal=2.5, seed=3)
    dataset = Dataset(
        ids=rows.groups,
        sources=np.full(ROWS, "synthetic"),
        domains=np.full(ROWS, ""),
        groups=rows.groups,
        prompts=rows.prompts,
        targets=("weak", "strong"),
        quality=rows.quality,
        cost=np.tile([0.001, 0.01], (ROWS, 1)),
        output_tokens=np.full((ROWS, 2), np.nan),
        digest="0" * 64,
    )
    return benchmark_rows(
        dataset, rows.features, NoEncoder(), title="Synthetic", few=(80,), splits=10, resamples=50, jobs=1
    )


@pytest.fixture(scope="module")
def plain(measured: Benchmark) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(measured.as_dict(), allow_nan=False))
    return found


@pytest.fixture(scope="module")
def results(plain: dict[str, Any]) -> Results:
    return results_of(plain)


def points(line: Any) -> NDArray[np.float64]:
    return np.asarray(line.get_xydata())


def test_what_was_measured_is_read_back(measured: Benchmark, results: Results) -> None:
    whole, few = measured.tables
    assert list(results.curves) == ["Synthetic"]
    for line in whole.lines:
        assert line.curve is not None
        np.testing.assert_array_equal(results.curves["Synthetic"][line.method], line.curve)
    assert results.calibration["Synthetic"] == whole.calibration
    assert results.calibration["Synthetic"].gain.n == ROWS
    promises, ladder = (study.found for study in measured.studies)
    assert results.guarantees == {"Promises on Synthetic": promises}
    again = results.ladders["Ladder on Synthetic"].as_dict()
    assert json.dumps(again) == json.dumps(ladder.as_dict())
    learned = results.few_rows["Synthetic"]["learned"]
    apgrs = [
        line.figures.apgr
        for table in (whole, few)
        for line in table.lines
        if line.method == "learned" and line.figures
    ]
    assert learned == [(192, apgrs[0], 0.0), (80, apgrs[1], 0.0)]
    assert set(results.few_rows["Synthetic"]) == set(NAMES)


def test_a_file_is_read_and_another_is_refused_in_one_line(plain: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "benchmark.json"
    file.write_text(json.dumps(plain), encoding="utf-8")
    assert list(read_results(file).curves) == ["Synthetic"]
    for text in ("{", "[]", '{"tables": [1]}', "{}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DatasetError, match=r"benchmark\.json: is not the JSON of router-train benchmark"):
            read_results(file)
    with pytest.raises(DatasetError, match=r"nowhere\.json"):
        read_results(tmp_path / "nowhere.json")


def test_curves_and_few_rows_are_drawn_for_every_method(results: Results) -> None:
    (axes,) = methods_figure(list(results.curves.items())).axes
    drawn = {str(line.get_label()): points(line) for line in axes.get_lines()}
    learned = results.curves["Synthetic"]["learned"]
    np.testing.assert_allclose(
        drawn["learned"], np.stack([np.linspace(0, 100, learned.shape[1]), learned[0]], axis=1)
    )
    assert set(results.curves["Synthetic"]) <= set(drawn)
    (axes,) = few_rows_figure(results.few_rows["Synthetic"]).axes
    rows = [points(line)[:, 0].tolist() for line in axes.get_lines()[: len(NAMES)]]
    assert rows == [[80.0, 192.0]] * len(NAMES)
    assert len(reliability_figure(results.calibration["Synthetic"]).axes) == 3
    with pytest.raises(UsageError, match="no curve"):
        methods_figure([])


def test_promises_are_drawn_beside_thresholds_without_one_and_random(results: Results) -> None:
    figure = guarantee_figure(results.guarantees)
    top, bottom = figure.axes
    (study,) = results.guarantees.values()
    promised, tuned, random = (points(line) for line in top.get_lines())
    assert promised[:, 0] == pytest.approx([1, 2, 5, 10])
    assert promised[:, 1] == pytest.approx([100 * at.promised.saving for at in study.losses])
    assert tuned[:, 1] == pytest.approx([100 * at.tuned.saving for at in study.losses])
    assert random[:, 1] == pytest.approx([100 * at.random_saving for at in study.losses])
    assert points(bottom.get_lines()[1])[:, 1] == pytest.approx(
        [100 * at.tuned.broken_population for at in study.losses]
    )
    assert points(bottom.get_lines()[2])[:, 1] == pytest.approx([5.0, 5.0])
    with pytest.raises(UsageError, match="no study"):
        guarantee_figure({})


def test_the_hulls_of_a_ladder_lie_between_its_targets(results: Results) -> None:
    (report,) = results.ladders.values()
    (axes,) = ladder_figure(report).axes
    assert report.mean_cost == pytest.approx((0.001, 0.01))
    zero = report.methods["zero"].hull
    assert zero is not None
    assert np.array(zero) == pytest.approx(np.array([report.mean_cost, report.mean_quality]).T)
    # The oracle's line is the last one before the targets: above random's at every cost, both straight in dollars.
    drawn = [points(line) for line in axes.get_lines()]
    oracle, targets = drawn[-3], drawn[-2]
    assert targets == pytest.approx(np.array([[1.0, report.mean_quality[0]], [10.0, report.mean_quality[1]]]))
    chance = np.interp(oracle[:, 0], *targets.T)
    assert (oracle[:, 1] >= chance - 1e-9).all()
    assert {text.get_text() for text in axes.texts} == {"weak", "strong"}
    with pytest.raises(UsageError, match="costs"):
        ladder_figure(replace(report, mean_cost=None))


def test_a_random_mix_saves_by_a_straight_line(results: Results) -> None:
    (report,) = results.ladders.values()
    weak, strong = report.mean_quality
    share = (0.95 * strong - weak) / (strong - weak)
    assert report.methods["zero"].cost_saving_at_95 == pytest.approx(1 - (0.1 + 0.9 * share))
    assert report.random_saving(strong) == pytest.approx(0.0)
    assert report.random_saving(weak) == pytest.approx(0.9)
    assert replace(report, mean_cost=None).random_saving(strong) is None


def test_the_report_says_in_words_what_its_tables_hold(measured: Benchmark) -> None:
    text = benchmark_markdown(measured, "router-train …")
    ours = next(line.figures for line in measured.tables[0].lines if line.method == "learned")
    assert ours is not None
    said = f"The learned router recovers {ours.apgr:.3f} of the gap (chance: .5)"
    assert text.startswith(f"# Benchmark\n\n- **Synthetic**: {said}")
    assert text.count(said) == 2  # at the head of the report and of the table
    assert "- **Promises on Synthetic**: With 5 % of quality to lose, a promised threshold saves" in text
    assert "- **Ladder on Synthetic**: Of the dollars of the best single model (strong)" in text
    assert "| allowed loss | promised: saved |" not in text.split("## ")[0]
    assert "|  ---" not in text
    assert len(benchmark_tables(measured)) == 4
