"""A month under a budget, simulated over labelled rows: pacing beside a hard stop, and beside no budget.

``make study-month`` runs it on the public originals in ROUTER_BENCH_DATA and writes the tables and the picture of
``tests/STUDY_MONTH.md``. A month of requests comes by the hour, more by day and on weekdays, each a labelled row drawn at random
with what it cost and how good it was at each target. Scores are out of fold: no row was seen by what scored it. Without a budget
every request goes to the strong target. The month is driven through what the server runs, :mod:`router.pacing` and
:func:`router.budget_store.granted`; only time, the providers and the predictor's model are made up of rows.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router.budget_store import Totals, Wanted, granted
from router.budgets import SECOND, Count, Limit, Pacing
from router.bundle import default_encoder_dir
from router.capability import estimate_tokens
from router.encoder import OnnxEncoder
from router.entry import NANO, NanoPrices
from router.pacing import HOUR, Sample, Samples, Traffic, paced
from router.policy import Prices
from router.upstream import Usage
from training.dataset import Dataset, load_dataset
from training.estimator import QualityEstimator
from training.sources import convert
from training.train import features_of

MONTH = Count("workload", "", "2026-11")
# Of the always-strong month.
SHARES = (0.4, 0.6, 0.8)
# How often the threshold is looked at. A server does so every five seconds.
LOOK = 1800 * SECOND
# The most that a request may cost, which is held before it is sent, beside what it did cost.
HELD = 3
# Of rows without dollars: prices of a million tokens, and tokens of an answer.
PRICES = (Prices(input=0.6, output=0.6), Prices(input=10, output=30))
ANSWER = 200


@dataclass(frozen=True)
class Rows:
    """Labelled rows of a pair: scores out of fold, shape (n,); quality and nano-dollars, shape (n, 2), weak and strong."""

    name: str
    score: NDArray[np.float64]
    quality: NDArray[np.float64]
    cost: NDArray[np.int64]


@dataclass(frozen=True)
class Month:
    """Requests of a month in their order: when each comes, microseconds since 1970, and which row it is."""

    times: NDArray[np.int64]
    rows: NDArray[np.int64]
    before: dict[int, int]  # requests by the hour of the two weeks before


@dataclass(frozen=True)
class Result:
    """What a month came to.

    Attributes
    ----------
    dollars : float
    quality : float
        The mean over all requests; one that was refused has none.
    refused, strong : float
        Shares of the requests.
    ran_out : float or None
        The day on which the first request found no room.
    spent, threshold : ndarray
        Dollars spent so far, and the threshold in force, at each look.
    """

    dollars: float
    quality: float
    refused: float
    strong: float
    ran_out: float | None
    spent: NDArray[np.float64]
    threshold: NDArray[np.float64]


def usual(hour: int) -> float:
    """Requests of an hour of the week beside the mean: busy by day, quiet at night and at weekends."""
    day = math.exp(-(((hour % 24) - 13.5) ** 2) / 18) + 0.08
    return day * (0.25 if hour // 24 % 7 in (3, 4) else 1.0)  # 1970 began on a Thursday


def month(n: int, rows: int, seed: int, growth: float = 0.0, history: bool = True) -> Month:
    """About n requests; ``growth`` is by how much more there are at the end than at the beginning."""
    random = np.random.default_rng(seed)
    first, last = MONTH.start // HOUR, MONTH.end // HOUR
    shape = np.array([usual(hour) for hour in range(first, last)])
    shape *= 1 + growth * np.linspace(0, 1, len(shape))
    mean = n * shape / shape.sum()
    counts = random.poisson(mean * random.gamma(20, 1 / 20, len(mean)))  # some hours are busier than usual
    times = np.concatenate(
        [
            np.sort(random.integers(hour * HOUR, (hour + 1) * HOUR, count))
            for hour, count in zip(range(first, last), counts, strict=True)
        ]
    )
    scale = float(mean[0] / shape[0])
    before = {hour: int(random.poisson(scale * usual(hour))) for hour in range(first - 336, first)}
    return Month(times, random.integers(0, rows, len(times)), before if history else {})


def run(rows: Rows, of: Month, amount: int | None, way: str, rule: Pacing) -> Result:
    """A month of requests.

    ``way`` is ``strong`` (no budget), ``refuse`` or ``cheapest`` (a hard stop), ``paced`` (and the cheapest at the limit), or
    ``paced, refuse``.
    """
    samples, traffic = Samples(), Traffic(of.before)
    totals = {MONTH: Totals()}
    threshold: float | None = None
    quality = refused = strong = 0.0
    ran_out: float | None = None
    looks: list[tuple[float, float]] = []
    look, seen = MONTH.start, 0
    for time, row in zip(of.times, of.rows, strict=True):
        while time >= look:
            if way.startswith("paced") and amount is not None:
                traffic.saw(look, seen)
                seen = 0
                threshold = paced(
                    threshold,
                    samples,
                    traffic,
                    now=look,
                    end=MONTH.end,
                    amount=amount,
                    spent=totals[MONTH].spent,
                    reserved=0,
                    rule=rule,
                )
            looks.append((totals[MONTH].spent / NANO, math.nan if threshold is None else threshold))
            look += LOOK
        seen += 1
        weak_cost, strong_cost = (int(cost) for cost in rows.cost[row])
        score = float(rows.score[row])
        choice = 0 if threshold is not None and score <= threshold else 1
        cost = (weak_cost, strong_cost)[choice]
        if amount is not None:
            limit = (Limit(MONTH, amount),)
            if granted(totals, [Wanted(limit, HELD * cost)]).refused[0]:
                ran_out = ran_out if ran_out is not None else (time - MONTH.start) / (24 * HOUR)
                if way.endswith("refuse"):
                    refused += 1
                    continue
                choice, cost = 0, weak_cost
        samples.rows.append(Sample.of([score, 0.0], [weak_cost, strong_cost]))
        totals[MONTH] = Totals(totals[MONTH].spent + cost)
        quality += rows.quality[row, choice]
        strong += choice
    n = len(of.times)
    spent, thresholds = np.array(looks).T
    return Result(
        totals[MONTH].spent / NANO, quality / n, refused / n, strong / n, ran_out, spent, thresholds
    )


def foreseen(rows: Rows, of: Month, amount: int) -> tuple[float, float]:
    """Dollars and quality of the one threshold that, known beforehand, would have spent the budget."""
    score, cost, quality = rows.score[of.rows], rows.cost[of.rows], rows.quality[of.rows]
    order = np.argsort(score, kind="stable")
    saved = np.cumsum((cost[:, 1] - cost[:, 0])[order])
    k = int(np.searchsorted(saved, cost[:, 1].sum() - amount)) + 1
    weak = np.zeros(len(order), dtype=bool)
    weak[order[:k]] = True
    return float(np.where(weak, *cost.T).sum()) / NANO, float(np.where(weak, *quality.T).mean())


def tables(rows: Rows, n: int, seeds: int, rule: Pacing) -> Iterator[str]:
    """The tables of one pair: means over seeds, and of the spend the extremes."""
    months = [month(n, len(rows.score), seed) for seed in range(seeds)]
    free = [run(rows, one, None, "strong", rule) for one in months]
    dollars = float(np.mean([one.dollars for one in free]))
    best = float(np.mean([one.quality for one in free]))
    weak = float(np.mean([rows.quality[one.rows, 0].mean() for one in months]))
    yield (
        f"\n**{rows.name}**: {len(rows.score):,} rows, {len(months[0].times):,} requests a month. Always strong: "
        f"${dollars:,.2f}, quality {best:.4f}; always weak: quality {weak:.4f}.\n"
    )
    yield "| budget | way | spent of it | quality | of always strong | to strong | refused | no room from day |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for share in SHARES:
        amounts = [round(share * one.dollars * NANO) for one in free]
        for way in ("refuse", "cheapest", "paced", "paced, refuse"):
            found = [run(rows, one, amount, way, rule) for one, amount in zip(months, amounts, strict=True)]
            yield _row(share, _WAYS[way], found, amounts, best)
        known = [foreseen(rows, one, amount) for one, amount in zip(months, amounts, strict=True)]
        used = [spent * NANO / amount for (spent, _), amount in zip(known, amounts, strict=True)]
        quality = float(np.mean([quality for _, quality in known]))
        yield (
            f"| {share:.0%} | one threshold, known beforehand | {np.mean(used):.1%} | {quality:.4f} | "
            f"{quality / best:.1%} | | | |"
        )


_WAYS = {
    "refuse": "hard stop: refuse",
    "cheapest": "hard stop: cheapest",
    "paced": "**paced**, then cheapest",
    "paced, refuse": "**paced**, then refuse",
}


def _row(share: float, way: str, found: Sequence[Result], amounts: Sequence[int], best: float) -> str:
    used = [one.dollars * NANO / amount for one, amount in zip(found, amounts, strict=True)]
    quality = float(np.mean([one.quality for one in found]))
    days = [one.ran_out for one in found if one.ran_out is not None]
    return (
        f"| {share:.0%} | {way} | {np.mean(used):.1%} ({min(used):.1%} to {max(used):.1%}) | {quality:.4f} | "
        f"{quality / best:.1%} | {np.mean([one.strong for one in found]):.1%} | "
        f"{np.mean([one.refused for one in found]):.1%} | {f'{min(days):.1f}' if days else '–'} |"
    )


def harder(rows: Rows, n: int, seeds: int) -> Iterator[str]:
    """What pacing does not know: traffic that grows, no history, another share to start from."""
    yield "\n| paced, then cheapest; 60 % | spent of it | quality | to strong |"
    yield "| --- | --- | --- | --- |"
    cases = {
        "as above": (0.0, True, Pacing()),
        "traffic doubles in the month": (1.0, True, Pacing()),
        "traffic halves in the month": (-0.5, True, Pacing()),
        "without a ledger: no traffic of before": (0.0, False, Pacing()),
        "from the first dollar (`start: 0`)": (0.0, True, Pacing(start=0)),
        "from half of the amount (`start: 0.5`)": (0.0, True, Pacing(start=0.5)),
        "`highest_threshold: 0.2`": (0.0, True, Pacing(highest_threshold=0.2)),
    }
    for name, (growth, history, rule) in cases.items():
        used, found = [], []
        for seed in range(seeds):
            one = month(n, len(rows.score), seed, growth, history)
            amount = round(0.6 * float(rows.cost[one.rows, 1].sum()))
            found.append(run(rows, one, amount, "paced", rule))
            used.append(found[-1].dollars * NANO / amount)
        yield (
            f"| {name} | {np.mean(used):.1%} ({min(used):.1%} to {max(used):.1%}) | "
            f"{np.mean([one.quality for one in found]):.4f} | {np.mean([one.strong for one in found]):.1%} |"
        )


def draw(rows: Rows, n: int, rule: Pacing, path: Path) -> None:
    """Spend through the month by each way, and the threshold of the paced one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    one = month(n, len(rows.score), 0)
    free = run(rows, one, None, "strong", rule)
    amount = round(0.6 * free.dollars * NANO)
    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    ways = {
        "no budget": free,
        "hard stop: refuse": run(rows, one, amount, "refuse", rule),
        "hard stop: cheapest": run(rows, one, amount, "cheapest", rule),
        "paced": run(rows, one, amount, "paced", rule),
    }
    for (name, result), style in zip(ways.items(), (":", "--", "-.", "-"), strict=True):
        days = np.arange(len(result.spent)) * LOOK / (24 * HOUR)
        upper.plot(days, result.spent, style, label=f"{name}: quality {result.quality:.3f}")
        if name == "paced":
            lower.plot(days, result.threshold, "-", color="C3")
    upper.axhline(amount / NANO, color="grey", linewidth=0.8)
    upper.annotate("the budget", (0.2, amount / NANO), va="bottom", color="grey")
    upper.set_ylabel("US dollars spent")
    upper.legend(loc="lower right")
    upper.set_title("A month at 60 % of what always strong would cost (RouterBench)")
    lower.set_ylabel("threshold, paced")
    lower.set_xlabel("day of the month")
    figure.savefig(path, dpi=100)


def pair_of(dataset: Dataset, name: str, prices: bool) -> Rows:
    """Scores out of fold, and what is known of each row."""
    encoder = OnnxEncoder(default_encoder_dir())
    estimator = QualityEstimator(dataset.targets, seed=0)
    estimator.fit(features_of(dataset, encoder), dataset.quality, dataset.groups)
    if prices:
        tokens = [estimate_tokens(prompt.text) for prompt in dataset.prompts]
        nano = [NanoPrices.of(one) for one in PRICES]
        cost = np.array([[one.cost(Usage(input=count, output=ANSWER)) for one in nano] for count in tokens])
    else:
        cost = np.rint(dataset.cost * NANO).astype(np.int64)
    return Rows(name, estimator.out_of_fold_.score, dataset.quality, cost)


def datasets(folder: Path, made: Path) -> Iterator[Rows]:
    """RouterBench with its dollars, and RouteLLM's MMLU at stated prices."""
    convert("routerbench", folder / "routerbench", made / "routerbench.jsonl")
    pair = ("mistralai/mixtral-8x7b-chat", "gpt-4-1106-preview")
    routerbench = load_dataset([made / "routerbench.jsonl"], targets=pair)
    yield pair_of(routerbench, "RouterBench, Mixtral-8x7B and GPT-4, its own dollars", prices=False)
    convert("routellm-mmlu", folder / "routellm" / "mmlu", made / "mmlu.jsonl")
    pair = ("mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview")
    mmlu = load_dataset([made / "mmlu.jsonl"], targets=pair)
    some = np.random.default_rng(0).permutation(len(mmlu))[:4000]
    told = f"RouteLLM's MMLU (4,000 rows), Mixtral-8x7B and GPT-4, ${PRICES[0].input:g} and ${PRICES[1].input:g} in"
    yield pair_of(mmlu.select(some), told, prices=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="a month")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "study_month.png")
    arguments = parser.parse_args()
    folder = os.environ.get("ROUTER_BENCH_DATA")
    if not folder:
        parser.error("ROUTER_BENCH_DATA is not set: the public labelled data is needed")
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        for index, rows in enumerate(datasets(Path(folder), Path(made))):
            for line in tables(rows, arguments.requests, arguments.seeds, Pacing()):
                print(line, flush=True)
            if index == 0:
                for line in harder(rows, arguments.requests, arguments.seeds):
                    print(line, flush=True)
                draw(rows, arguments.requests, Pacing(), arguments.plot)


if __name__ == "__main__":
    main()
