from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from router.errors import DatasetError
from training.metrics import (
    aiq,
    apgr,
    apply_threshold,
    auc,
    cost_quality_curve,
    cost_save,
    cpt,
    draw_resamples,
    evaluate_random,
    evaluate_scores,
    expected_calibration_error,
    full_curve,
    gain_calibration,
    gain_interval,
    mean_figures,
    oracle_scores,
    outcome_of,
    percentile_interval,
    perf_gain,
    pgr,
    quality_calibration,
    random_router_scores,
    random_strong_share_at,
    resampled_apgr,
    strong_share_at,
)

Floats = NDArray[np.float64]
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"


def rows(n: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Scores that know something, and fractional qualities of which strong's are better on average."""
    random = np.random.default_rng(seed)
    weak = random.random(n)
    strong = np.clip(weak + random.normal(0.15, 0.3, n), 0.0, 1.0)
    return strong - weak + random.normal(0.0, 0.3, n), weak, strong


def routellm(score: Floats, weak: Floats, strong: Floats) -> tuple[float, float, float]:
    """APGR, CPT50 and CPT80 step by step as RouteLLM's evaluation computes them."""
    _, edges = pd.qcut(score, 10, retbins=True)
    shares, qualities = [], []
    for i, edge in enumerate(edges):
        to_strong = score >= edge if i < len(edges) - 1 else score > edge
        shares.append(to_strong.mean())
        qualities.append(np.where(to_strong, strong, weak).mean())
    by_share = np.argsort(shares)
    x, y = np.array(shares)[by_share], np.array(qualities)[by_share]
    low, high = weak.mean(), strong.mean()
    flat_low, flat_high = np.trapezoid(np.full(len(x), low), x), np.trapezoid(np.full(len(x), high), x)
    recovered = (np.trapezoid(y, x) - flat_low) / (flat_high - flat_low)
    cpt50, cpt80 = (100 * np.interp(p * (high - low) + low, y, x) for p in (0.5, 0.8))
    return float(recovered), float(cpt50), float(cpt80)


@pytest.mark.parametrize("n", [2, 5, 10, 12, 20, 72, 100, 500, 1307])
def test_figures_are_those_of_routellms_evaluation(n: int) -> None:
    score, weak, strong = rows(n, seed=n)
    strong = strong + 0.5  # so that small samples have a gap too
    curve = cost_quality_curve(score, weak, strong)
    assert (apgr(curve), cpt(curve, 0.5), cpt(curve, 0.8)) == pytest.approx(routellm(score, weak, strong))
    assert len(curve.share) == 11
    assert (curve.share[0], curve.share[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("n", [11, 21, 101])
def test_an_edge_that_is_a_row_takes_it_whatever_the_rounding(n: int) -> None:
    """Where n − 1 is a multiple of 10 edges are rows, and pandas loses some to rounding: one call each."""
    score, weak, strong = rows(n, seed=n)
    calls = cost_quality_curve(score, weak, strong).share * n
    np.testing.assert_allclose(calls, [0, *(1 + np.arange(1, 11) * (n - 1) / 10)])
    _, edges = pd.qcut(score, 10, retbins=True)
    theirs = np.sort([np.sum(score >= edge) for edge in edges[:-1]])
    assert np.abs(theirs - calls[1:]).max() < 1.5


def test_curves_thresholds_cut_off_their_shares() -> None:
    score, weak, strong = rows(137)
    curve = cost_quality_curve(score, weak, strong)
    taken = [np.mean(score >= edge) for edge in curve.thresholds[1:]]
    np.testing.assert_allclose(taken, curve.share[1:])
    full = full_curve(score, weak, strong)
    np.testing.assert_allclose([np.mean(score >= edge) for edge in full.thresholds], full.share)


def test_full_curve_counts_quality_and_cost_by_hand() -> None:
    curve = full_curve(
        [0.1, 0.9, 0.5],
        [0.0, 0.0, 1.0],
        [1.0, 0.5, 0.0],
        cost_weak=[1.0, 2.0, np.nan],
        cost_strong=[10.0, 20.0, 30.0],
    )
    np.testing.assert_allclose(curve.share, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.quality, [1 / 3, 0.5, 0.5 / 3, 0.5])
    assert curve.cost is not None
    np.testing.assert_allclose(curve.cost, [1.5, 10.5, 10.5, 15.0])  # the row without costs counts for none


def test_equal_scores_are_a_random_router_and_the_seed_decides() -> None:
    _, weak, strong = rows(4000)
    tied = np.zeros(4000)
    first, again, other = (apgr(cost_quality_curve(tied, weak, strong, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first == pytest.approx(0.5, abs=0.05)


def test_order_of_the_rows_does_not_matter_without_ties() -> None:
    score, weak, strong = rows(300)
    shuffled = np.random.default_rng(3).permutation(300)
    assert apgr(cost_quality_curve(score, weak, strong)) == pytest.approx(
        apgr(cost_quality_curve(score[shuffled], weak[shuffled], strong[shuffled]))
    )


def test_figures_do_not_depend_on_the_scale_of_quality() -> None:
    score, weak, strong = rows(300)
    a = evaluate_scores(score, weak, strong, resamples=50)
    b = evaluate_scores(score, 10 * weak, 10 * strong, resamples=50)
    assert (b.apgr, *b.apgr_ci, b.cpt50) == pytest.approx((a.apgr, *a.apgr_ci, a.cpt50))
    assert b.strong_share_at_95 == a.strong_share_at_95


@pytest.mark.parametrize("worse_by", [0.0, 0.2])
def test_no_gap_is_told_and_not_divided_by(worse_by: float) -> None:
    score, weak, _ = rows(200)
    figures = evaluate_scores(score, weak, weak - worse_by * weak, resamples=50)
    assert not figures.defined
    assert all(map(math.isnan, (figures.apgr, *figures.apgr_ci, figures.cpt50, figures.cpt80)))
    assert figures.strong_share_at_95 == 0.0
    assert json.loads(json.dumps(figures.as_dict(), allow_nan=False))["apgr_ci"] == [None, None]
    assert np.isnan(pgr([0.1, 0.2], 0.5, 0.5)).all()


def test_interval_is_unknown_where_the_gap_may_be_zero() -> None:
    random = np.random.default_rng(0)
    weak = random.random(40)
    strong = weak + random.normal(0.0, 1.0, 40)
    strong += 0.05 - (strong - weak).mean()  # a gap far below its own standard error
    figures = evaluate_scores(random.random(40), weak, strong, resamples=200)
    assert figures.defined
    assert math.isfinite(figures.apgr)
    assert all(map(math.isnan, figures.apgr_ci))
    interval = gain_interval(weak, strong)
    assert interval.low < 0.0 < interval.value < interval.high


@pytest.mark.parametrize("n", [1, 3])
def test_few_rows_give_figures(n: int) -> None:
    figures = evaluate_scores(np.arange(n), np.zeros(n), np.ones(n), resamples=20)
    assert figures.apgr == pytest.approx(0.5)
    assert figures.n == n
    assert figures.strong_share_at_95 == 1.0


def test_no_rows_and_broken_rows_are_refused() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        evaluate_scores([], [], [])
    with pytest.raises(ValueError, match="one length"):
        evaluate_scores([1.0, 2.0], [0.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        cost_quality_curve([1.0, np.nan], [0.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="groups"):
        evaluate_scores([1.0, 2.0], [0.0, 0.0], [1.0, 1.0], groups=["a"])


def test_interval_covers_the_figure_as_a_plain_bootstrap_does() -> None:
    score, weak, strong = rows(400)
    figures = evaluate_scores(score, weak, strong, resamples=4000)
    random = np.random.default_rng(9)
    plain = []
    for _ in range(3000):
        i = random.integers(400, size=400)
        plain.append(apgr(cost_quality_curve(score[i], weak[i], strong[i])))
    assert figures.apgr_ci == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=0.015)


def test_groups_widen_the_interval() -> None:
    """Rows that come in tens of the same are a tenth of the evidence."""
    score, weak, strong = (np.repeat(values, 10) for values in rows(60))
    groups = np.repeat([f"g{i}" for i in range(60)], 10)
    low, high = evaluate_scores(score, weak, strong, resamples=300).apgr_ci
    group_low, group_high = evaluate_scores(score, weak, strong, groups=groups, resamples=300).apgr_ci
    assert group_high - group_low > 2 * (high - low)
    alone = gain_interval(weak, strong, resamples=300)
    grouped = gain_interval(weak, strong, groups=groups, resamples=300)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_saving_is_the_least_share_at_the_bar() -> None:
    weak = np.array([0.0, 0.0, 0.0, 1.0, 1.0])
    strong = np.ones(5)
    figures = evaluate_scores(
        [5.0, 4.0, 3.0, 2.0, 1.0], weak, strong, np.full(5, 1.0), np.full(5, 9.0), resamples=0
    )
    assert figures.strong_share_at_95 == 0.6
    assert figures.call_saving_at_95 == pytest.approx(0.4)
    assert figures.cost_saving_at_95 == pytest.approx(1 - (2 * 1.0 + 3 * 9.0) / 45.0)
    assert evaluate_scores([1, 2, 3, 4, 5], weak, strong, resamples=0).strong_share_at_95 == 1.0
    assert evaluate_scores([1, 2, 3, 4, 5], weak, strong, resamples=0).cost_saving_at_95 is None


def test_random_routers_saving_is_a_straight_line() -> None:
    weak, strong = np.full(10, 0.6), np.full(10, 0.8)
    assert random_strong_share_at(weak, strong) == pytest.approx((0.76 - 0.6) / 0.2)
    assert random_strong_share_at(weak, strong, 0.5) == 0.0
    assert random_strong_share_at(strong, weak) == 0.0
    assert math.isnan(random_strong_share_at(weak, strong, 1.1))


def test_random_is_averaged_and_not_credited_with_luck() -> None:
    _, weak, strong = rows(400)
    cost_weak, cost_strong = np.full(400, 1.0), np.full(400, 5.0)
    figures = evaluate_random(weak, strong, cost_weak, cost_strong)
    share = random_strong_share_at(weak, strong)
    runs = random_router_scores(400)
    assert figures.apgr == pytest.approx(
        np.mean([apgr(cost_quality_curve(run, weak, strong)) for run in runs])
    )
    assert figures.apgr_sd is not None
    assert figures.apgr_sd > 0.0
    assert figures.strong_share_at_95 == share
    assert figures.cost_saving_at_95 == pytest.approx(1 - (1.0 + 4.0 * share) / 5.0)
    lucky = [strong_share_at(full_curve(run, weak, strong)) for run in random_router_scores(400, runs=500)]
    assert np.mean(lucky) < share


def test_mean_figures_average_what_every_run_has() -> None:
    score, weak, strong = rows(100)
    a, b = (evaluate_scores(s, weak, strong, resamples=20) for s in (score, -score))
    nested = a.with_nested(apply_threshold(score, 0.0, weak, strong))
    mean = mean_figures([nested, b])
    assert mean.apgr == pytest.approx((a.apgr + b.apgr) / 2)
    assert mean.apgr_ci[0] == pytest.approx((a.apgr_ci[0] + b.apgr_ci[0]) / 2)
    assert mean.apgr_sd == pytest.approx(abs(a.apgr - b.apgr) / math.sqrt(2))
    assert mean.nested_quality is None
    assert nested.nested_quality == pytest.approx(np.where(score > 0, strong, weak).mean())


def test_a_threshold_applied_sends_what_is_above_it() -> None:
    outcome = apply_threshold([0.2, 0.5, 0.7], 0.5, [0, 0, 0], [1, 1, 0.5], [1, 1, np.nan], [3, 3, 3])
    assert outcome.strong_share == pytest.approx(1 / 3)
    assert outcome.quality == pytest.approx(0.5 / 3)
    assert outcome.cost == 1.0
    assert outcome.cost_saving == pytest.approx(2 / 3)
    free = outcome_of(np.array([True]), [0.0], [1.0], [0.0], [0.0])
    assert (free.cost, free.cost_saving) == (0.0, None)


def test_calibration_error() -> None:
    predicted = np.repeat([0.2, 0.8], 50)
    actual = np.concatenate([np.repeat([1.0, 0.0], [10, 40]), np.repeat([1.0, 0.0], [40, 10])])
    assert expected_calibration_error(predicted, actual, bins=2) == pytest.approx(0.0)
    assert expected_calibration_error(predicted + 0.1, actual, bins=2) == pytest.approx(0.1)
    assert expected_calibration_error(1 - predicted, actual, bins=2) == pytest.approx(0.6)
    assert expected_calibration_error([0.3], [1.0]) == pytest.approx(0.7)


def test_quality_calibration_by_hand() -> None:
    predicted = np.repeat(np.linspace(0.05, 0.95, 10), 100)
    quality = (np.tile(np.arange(100), 10) < np.repeat(np.arange(10), 100) * 10 + 5).astype(np.float64)
    figures = quality_calibration(predicted, quality)
    assert figures.n == 1_000
    assert figures.ece == pytest.approx(0.0, abs=1e-12)
    assert figures.base_brier == pytest.approx(0.25)
    assert figures.brier == pytest.approx(np.mean(predicted * (1 - predicted)))
    assert [part.n for part in figures.bins] == [100] * 10
    assert [part.observed for part in figures.bins] == pytest.approx(np.linspace(0.05, 0.95, 10))
    # Wilson's interval for 5 of 100, as in Brown, Cai and DasGupta (2001).
    assert (figures.bins[0].low, figures.bins[0].high) == pytest.approx((0.0215, 0.1118), abs=1e-4)
    # Fractions vary less than shares of the same mean, and their intervals are narrower.
    tenths = quality_calibration(predicted, np.tile([0.4, 0.6], 500)).bins[0]
    assert (tenths.low, tenths.high) == pytest.approx((0.5 - 1.96 * 0.01, 0.5 + 1.96 * 0.01), abs=1e-4)
    shifted = quality_calibration(predicted + 0.05, quality)
    assert shifted.ece == pytest.approx(0.05)
    assert shifted.brier == pytest.approx(figures.brier + 0.05**2)
    assert shifted.ece_by_chance == figures.ece_by_chance
    assert shifted.auc == figures.auc


def test_calibration_error_by_chance_is_what_perfect_predictions_have() -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(200):
        chance = random.random(500)
        found.append(quality_calibration(chance, (random.random(500) < chance).astype(np.float64)))
    assert np.mean([f.ece for f in found]) == pytest.approx(
        np.mean([f.ece_by_chance for f in found]), rel=0.05
    )


def test_calibration_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(1)
    inside = []
    for _ in range(100):
        chance = random.random((2, 400))
        weak, strong = (random.random((2, 400)) < chance).astype(np.float64)
        for figures, truth in (
            (quality_calibration(chance[0], weak), chance[0]),
            (gain_calibration(chance[1] - chance[0], weak, strong), chance[1] - chance[0]),
        ):
            parts = np.array_split(np.sort(truth), 10)
            inside += [b.low <= part.mean() <= b.high for b, part in zip(figures.bins, parts, strict=True)]
    assert 0.93 < np.mean(inside) < 0.99


def test_the_event_of_the_gain_is_that_only_strong_is_right() -> None:
    weak, strong = np.array([0, 0, 1, 1, 0.0]), np.array([1, 0, 1, 0, 1.0])
    # Both rows with the event are above the three others but one.
    assert gain_calibration([0.9, 0.2, 0.3, 0.5, 0.4], weak, strong).auc == pytest.approx(5 / 6)
    figures = gain_calibration(strong - weak, weak, strong)
    assert (figures.ece, figures.brier, figures.auc) == (0.0, 0.0, 1.0)
    assert figures.base_brier == pytest.approx((strong - weak).var())


def test_auc_counts_ties_half_and_takes_fractions() -> None:
    assert auc([1, 1, 1, 1], [1, 0, 1, 0]) == 0.5
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(0.75)
    # A row of .25 is a quarter of a row with the event and three quarters of one without.
    one = auc([0.2, 0.7, 0.7], [0.25, 1.0, 0.0])
    four = auc([0.2] * 4 + [0.7] * 8, [1, 0, 0, 0] + [1] * 4 + [0] * 4)
    assert one == pytest.approx(four)
    assert math.isnan(auc([0.1, 0.2], [1, 1]))
    assert gain_calibration([0.1, 0.2], [1, 1], [1, 1]).as_dict()["auc"] is None


def test_aiq_is_the_area_under_the_non_decreasing_hull() -> None:
    assert aiq([0.0, 1.0], [0.2, 0.8]) == pytest.approx(0.5)
    # A point below the hull changes nothing, one above raises it.
    assert aiq([0.0, 0.5, 1.0], [0.2, 0.3, 0.8]) == pytest.approx(0.5)
    assert aiq([0.0, 0.5, 1.0], [0.2, 0.8, 0.8]) == pytest.approx(0.65)
    # Dearer and worse: the hull stays level.
    assert aiq([2.0, 0.0, 1.0], [0.1, 0.2, 0.8]) == pytest.approx((0.5 + 0.8) / 2)
    assert aiq([0.0, 0.0, 1.0], [0.1, 0.4, 0.6]) == pytest.approx(0.5)
    assert math.isnan(aiq([1.0, 1.0], [0.1, 0.2]))


def test_perf_gain_and_cost_save_by_hand() -> None:
    cost, quality = [1.0, 2.0, 3.0, 5.0], [0.5, 0.8, 0.84, 0.82]
    # The best single target has .8 for 4 dollars.
    assert perf_gain(quality, 0.8) == pytest.approx(0.05)
    assert perf_gain([0.6, 0.72], 0.8) == pytest.approx(-0.1)
    assert cost_save(cost, quality, 4.0, 0.8) == pytest.approx(0.5)
    assert cost_save(cost, quality, 4.0, 0.83) == pytest.approx(0.25)
    # Only for more dollars than it: the saving is negative. Not at all: there is none.
    assert cost_save([5.0], [0.8], 4.0, 0.8) == pytest.approx(-0.25)
    assert math.isnan(cost_save(cost, quality, 4.0, 0.9))
    assert math.isnan(cost_save(cost, quality, 0.0, 0.8))
    assert math.isnan(perf_gain(quality, 0.0))


@dataclass(frozen=True)
class Benchmark:
    weak: Floats
    strong: Floats
    characters: Floats
    prompts: NDArray[np.str_]


def contaminated(folder: Path) -> set[str]:
    return set(pd.read_json(folder / "contaminated_prompts.jsonl", lines=True)["eval_prompt"])


def answers(table: pd.DataFrame, folder: Path) -> Benchmark:
    table = table[~table["prompt"].isin(contaminated(folder))]
    return Benchmark(
        weak=table[WEAK].to_numpy(np.float64),
        strong=table[STRONG].to_numpy(np.float64),
        characters=table["prompt"].str.len().to_numpy(np.float64),
        prompts=table["prompt"].to_numpy(),
    )


@pytest.fixture(scope="module")
def mmlu(bench_data: Path) -> Benchmark:
    folder = bench_data / "routellm" / "mmlu"
    return answers(pd.concat(pd.read_csv(file) for file in sorted(folder.glob("*.csv"))), folder)


@pytest.fixture(scope="module")
def gsm8k(bench_data: Path) -> Benchmark:
    folder = bench_data / "routellm" / "gsm8k"
    return answers(pd.read_csv(folder / "gsm8k_responses.csv"), folder)


@pytest.fixture(scope="module")
def mt_bench(bench_data: Path) -> Benchmark:
    """Routed on the first turn; the quality is the mean score of both turns."""
    folder = bench_data / "routellm" / "mt_bench"
    questions = pd.read_json(folder / "question.jsonl", lines=True).set_index("question_id")
    left_out = contaminated(folder)
    questions = questions[[not left_out.intersection(turns) for turns in questions["turns"]]]
    judged = pd.read_json(folder / "judgements.jsonl", lines=True)
    score = judged.groupby(["question_id", "model"])["score"].mean().unstack().loc[questions.index]
    first = questions["turns"].str[0]
    return Benchmark(
        weak=score[WEAK].to_numpy(np.float64),
        strong=score[STRONG].to_numpy(np.float64),
        characters=first.str.len().to_numpy(np.float64),
        prompts=first.to_numpy(),
    )


# Rows, strong and weak quality, only strong and only weak right, APGR and CPT50 of the oracle, APGR of prompt
# length; the digits that are given must come out.
PINNED = {
    "mmlu": (14037, "0.80587", "0.68091", "0.178", "0.053", "1.268", "6.25", "0.583"),
    "gsm8k": (1307, "0.85769", "0.63734", "0.292", "0.072", "1.115", "11.0", "0.597"),
    "mt_bench": (72, "9.212", "8.281", None, None, "0.953", "9.1", None),
}


@pytest.mark.parametrize("name", PINNED)
def test_published_numbers_come_out_exactly(name: str, request: pytest.FixtureRequest) -> None:
    rows: Benchmark = request.getfixturevalue(name)
    weak, strong = rows.weak, rows.strong
    n, strong_quality, weak_quality, only_strong, only_weak, oracle_apgr, oracle_cpt50, length = PINNED[name]
    oracle = evaluate_scores(oracle_scores(weak, strong), weak, strong, resamples=0)
    found = {
        strong_quality: strong.mean(),
        weak_quality: weak.mean(),
        only_strong: (strong > weak).mean(),
        only_weak: (weak > strong).mean(),
        oracle_apgr: oracle.apgr,
        oracle_cpt50: oracle.cpt50,
        length: apgr(cost_quality_curve(rows.characters, weak, strong)),
    }
    assert len(weak) == n
    for expected, value in found.items():
        if expected is not None:
            digits = len(expected.partition(".")[2])
            assert f"{value:.{digits}f}" == expected


@pytest.mark.parametrize(("name", "sd"), [("mmlu", 0.008), ("gsm8k", 0.020), ("mt_bench", 0.072)])
def test_random_lies_within_its_spread(name: str, sd: float, request: pytest.FixtureRequest) -> None:
    rows: Benchmark = request.getfixturevalue(name)
    runs = [
        apgr(cost_quality_curve(score, rows.weak, rows.strong))
        for score in random_router_scores(len(rows.weak), runs=100, seed=1)
    ]
    assert np.std(runs) == pytest.approx(sd, rel=0.2)
    ten = evaluate_random(rows.weak, rows.strong, resamples=0)
    assert ten.apgr == pytest.approx(0.5, abs=3 * sd / math.sqrt(10))


def test_duplicated_prompts_of_mmlu_are_105(mmlu: Benchmark) -> None:
    assert len(mmlu.prompts) - len(set(mmlu.prompts)) == 105


def test_resampled_apgr_is_that_of_the_drawn_rows_and_averages_over_runs() -> None:
    random = np.random.default_rng(0)
    n = 300
    weak, strong = random.random(n), random.random(n) + 0.2
    scores = random.random((2, n))
    scores[1, :50] = np.nan  # a run that did not test these
    drawn = draw_resamples(n, resamples=4, seed=7)
    assert (drawn.sum(axis=1) == n).all()
    found = resampled_apgr(scores, weak, strong, drawn)
    for counts, value in zip(drawn, found, strict=True):
        by_hand = []
        for score in scores:
            rows = np.repeat(np.arange(n), counts)
            rows = rows[~np.isnan(score[rows])]
            by_hand.append(apgr(cost_quality_curve(score[rows], weak[rows], strong[rows])))
        assert value == pytest.approx(np.mean(by_hand), abs=1e-9)


def test_paired_resamples_know_a_small_difference_that_single_intervals_hide() -> None:
    random = np.random.default_rng(1)
    n = 3000
    gain = random.normal(0.2, 1.0, n)
    weak, strong = np.zeros(n), gain
    noise = random.normal(0.0, 2.0, n)
    better, worse = gain + noise, gain + 1.15 * noise
    drawn = draw_resamples(n, resamples=200)
    a, b = (resampled_apgr(score, weak, strong, drawn) for score in (better, worse))
    one, other = percentile_interval(a), percentile_interval(b)
    assert other.high > one.low  # they overlap
    assert percentile_interval(a - b).low > 0
    nothing = percentile_interval(resampled_apgr(better, weak, weak, drawn))
    assert np.isnan(nothing.low)
    assert np.isnan(nothing.high)


def test_groups_are_drawn_whole() -> None:
    groups = np.array(["a", "b", "a", "c", "b"])
    drawn = draw_resamples(5, groups=groups, resamples=20)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
    np.testing.assert_array_equal(drawn[:, 1], drawn[:, 4])
    assert len({tuple(row) for row in drawn}) > 5
