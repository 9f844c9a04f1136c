"""How far the threshold has to rise so that a budget lasts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from router.budgets import SECOND, Amounts, Budgets, Count, Limit, Pacing, bounds, iso, periods
from router.pacing import HOUR, Sample, Samples, Traffic, next_threshold, paced
from router.predictor import Prediction

RULE = Pacing(start=0.1, highest_threshold=0.8)
DAY = 24 * HOUR


def at(text: str) -> int:
    """Microseconds since 1970."""
    return int(np.datetime64(text, "us").astype(int))


@pytest.mark.parametrize(
    ("time", "month", "days"),
    [
        ("2026-11-22T09:00", "2026-11", 30),
        ("2026-12-31T23:59:59.999999", "2026-12", 31),
        ("2028-02-29T00:00", "2028-02", 29),
        ("2027-02-28T12:00", "2027-02", 28),
        ("2026-03-29T01:30", "2026-03", 31),  # clocks change in Europe, and UTC does not
        ("1970-01-01T00:00", "1970-01", 31),
    ],
)
def test_periods_are_calendar_months_and_days_of_utc(time: str, month: str, days: int) -> None:
    found, day = periods(at(time))
    assert (found, day) == (month, time[:10])
    start, end = bounds(month)
    assert start == at(f"{month}-01")
    assert (end - start, end - 1 >= at(time) >= start) == (days * DAY, True)
    assert bounds(day) == (at(day), at(day) + DAY)
    assert periods(end - 1)[0] == month
    assert periods(end)[0] != month


def test_limits_of_a_request() -> None:
    budgets = Budgets(
        workload=Amounts(month=10, day=0.1),
        each_key=Amounts(month=2),
        keys={"team": Amounts(day=1), "free": Amounts()},
        each_feature=Amounts(day=3),
    )
    now = at("2026-11-22T10:00")
    all_month = Limit(Count("workload", "", "2026-11"), 10 * 10**9)
    all_day = Limit(Count("workload", "", "2026-11-22"), 10**8)
    assert budgets.limits(None, None, now) == (all_month, all_day)
    assert budgets.limits("free", None, now) == (all_month, all_day)
    assert budgets.limits("team", "a/b", now)[2:] == (
        Limit(Count("key", "team", "2026-11-22"), 10**9),
        Limit(Count("feature", "a/b", "2026-11-22"), 3 * 10**9),
    )
    assert budgets.limits("other", "", now)[2:] == (Limit(Count("key", "other", "2026-11"), 2 * 10**9),)
    for limit in budgets.limits("team", "a/b", now):
        assert Count.of(limit.count.id) == limit.count
        assert budgets.amount(limit.count) == limit.amount
    assert budgets.amount(Count("key", "free", "2026-11")) is None
    assert {limit.count.name for limit in budgets.named(now)} == {"", "team"}
    assert iso(now) == "2026-11-22T10:00:00Z"
    with pytest.raises(ValueError, match="no amount is given"):
        Budgets(keys={"a": Amounts()})


def test_a_sample_costs_what_the_choice_at_each_threshold_costs() -> None:
    """For ladders of up to four targets, against the predictor's own rule."""
    random = np.random.default_rng(0)
    for _ in range(300):
        n = int(random.integers(2, 5))
        gain = np.concatenate([[0.0], random.normal(0.1, 0.2, n - 1).round(2)])
        prediction = Prediction(tuple("abcd"[:n]), gain[None] * 0 + 0.5, gain[None])
        costs = sorted(int(cost) for cost in random.integers(1, 100, n))
        chosen = int(random.integers(0, n))
        losses = [float(loss) for loss in (prediction.score[0] - gain)[: chosen + 1]]
        curve = Samples([Sample.of(losses, costs[: chosen + 1])]).curve()
        assert curve.at(None) == costs[chosen]
        for threshold in (-0.5, -0.05, 0.0, 0.02, 0.1, 0.25, 0.4, 1.0):
            index = min(chosen, int(prediction.choose(threshold)[0]))
            if any(abs(loss - threshold) < 1e-9 for loss in losses[1:]):
                continue  # rounding decides there
            if threshold >= min(losses):
                assert curve.at(threshold) == costs[index], (losses, threshold)


def two(score: float, weak: int = 10, strong: int = 100) -> Sample:
    return Sample.of([score, 0.0], [weak, strong])


def curve_of(scores: list[float]) -> Samples:
    return Samples([two(score) for score in scores])


def test_the_lowest_threshold_is_taken_that_makes_the_budget_last() -> None:
    curve = curve_of([0.1, 0.2, 0.3, 0.4]).curve()
    assert curve.cost == 100
    assert curve.lowest(100) is None
    assert curve.lowest(77.5) == 0.1
    assert curve.lowest(77) == 0.2
    assert curve.lowest(10) == 0.4
    assert curve.lowest(9) == math.inf
    assert [curve.at(threshold) for threshold in (None, 0.05, 0.1, 0.35, 0.9)] == [100, 100, 77.5, 32.5, 10]


def test_the_threshold_moves_in_steps_and_stays_where_it_fits() -> None:
    curve = curve_of([score / 100 for score in range(10, 60)]).curve()

    def go(current: float | None, left: int, requests: float = 100) -> float | None:
        return next_threshold(current, curve, left=left, requests=requests, rule=RULE)

    assert go(None, 10_000) is None
    first = go(None, 3_000)
    assert first == pytest.approx(0.15)
    thresholds = [first]
    for _ in range(30):
        thresholds.append(go(thresholds[-1], 3_000))
    assert all(abs(after - before) <= 0.05 + 1e-9 for before, after in pairwise(thresholds))
    last = thresholds[-1]
    assert thresholds[-5:] == [last] * 5
    assert 0.98 * 30 <= curve.at(last) <= 30
    assert go(last, 3_050) == last  # nearly the same is the same
    assert go(last, 100_000) == pytest.approx(last - 0.05)
    assert go(0.11, 100_000) is None
    assert go(0.78, 0) == RULE.highest_threshold
    assert go(0.4, -5) == pytest.approx(0.45)
    assert go(0.4, 10, requests=0) == pytest.approx(0.35)  # nothing is to come


def test_pacing_begins_at_the_share_that_the_policy_says() -> None:
    samples = curve_of([0.1, 0.2, 0.3] * 20)
    traffic = Traffic()
    for hour in range(48):
        traffic.saw(hour * HOUR, 10)
    common = {"now": 48 * HOUR, "end": 96 * HOUR, "amount": 1000, "reserved": 0, "rule": RULE}
    assert paced(None, samples, traffic, spent=99, **common) is None
    assert paced(None, samples, traffic, spent=100, **common) is not None
    assert paced(0.2, samples, traffic, spent=0, **common) == pytest.approx(
        0.25
    )  # once it has begun it goes on
    assert paced(None, curve_of([0.1] * 29), traffic, spent=100, **common) is None  # too few


def test_traffic_to_come_is_like_that_of_the_week_before() -> None:
    def usual(hour: int) -> int:
        return (100 if 8 <= hour % 24 < 18 else 5) * (1 if hour // 24 % 7 < 5 else 0) + 1

    start = 500 * 168  # a Monday, say
    traffic = Traffic({hour: usual(hour) for hour in range(start, start + 168)})
    now = start + 168
    for hours in (1, 9, 24, 100, 168, 400):
        truth = sum(usual(hour) for hour in range(now, now + hours))
        assert traffic.expected(now * HOUR, (now + hours) * HOUR) == pytest.approx(truth)
    assert traffic.expected(now * HOUR, now * HOUR + 15 * 60 * SECOND) == pytest.approx(usual(now) / 4)
    assert traffic.expected(now * HOUR, now * HOUR) == 0


def test_traffic_of_a_day_stands_for_the_next_and_growth_goes_on() -> None:
    day = Traffic({hour: 10 + hour % 24 for hour in range(240, 264)})
    assert day.expected(264 * HOUR, 288 * HOUR) == pytest.approx(sum(10 + hour for hour in range(24)))
    grown = Traffic({hour: 10 if hour < 408 else 20 for hour in range(240, 432)})
    assert grown.expected(432 * HOUR, 433 * HOUR) == pytest.approx(20)
    minutes = Traffic()
    for minute in range(1, 31):
        minutes.saw(1000 * HOUR + minute * 60 * SECOND, 2)
    half = 1000 * HOUR + 30 * 60 * SECOND
    assert minutes.expected(half, half + HOUR) == pytest.approx(120, rel=0.05)


def test_a_clock_that_goes_back_does_not_disturb_the_traffic() -> None:
    traffic = Traffic()
    traffic.saw(100 * HOUR, 60)
    traffic.saw(50 * HOUR, 1)
    traffic.saw(101 * HOUR, 60)
    assert 0 <= traffic.expected(101 * HOUR, 102 * HOUR) < 1000


def test_a_month_of_requests_meets_its_budget() -> None:
    """A month of made-up requests whose scores drift: by pacing alone the budget is met, and never jumped at."""
    random = np.random.default_rng(1)
    amount, end = 400_000, 30 * 24
    samples, traffic = Samples(), Traffic()
    spent, threshold, seen = 0, None, []
    for hour in range(end):
        if samples.rows:
            threshold = paced(
                threshold,
                samples,
                traffic,
                now=hour * HOUR,
                end=end * HOUR,
                amount=amount,
                spent=spent,
                reserved=0,
                rule=RULE,
            )
            seen.append(threshold or 0)
        count = int(random.poisson(20 if 8 <= hour % 24 < 18 else 4))
        for score in random.normal(0.3 + 0.1 * math.sin(hour / 60), 0.15, count):
            row = two(float(score))
            samples.rows.append(row)
            cost = 10 if threshold is not None and score <= threshold else 100
            if spent + cost <= amount:
                spent += cost
        traffic.saw(hour * HOUR + HOUR // 2, count)
    assert 0.98 * amount <= spent <= amount
    assert max(abs(after - before) for before, after in pairwise(seen)) <= 0.4
