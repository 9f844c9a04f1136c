"""What a promise costs and how often it is kept, beside a threshold without one.

Two ways of judging, since the rows at hand are finite:

- **test half**: a threshold is chosen on a random half of the rows and judged by the mean of the other half. That mean has
  noise of its own, as large as that of the calibration half: a promise that just holds breaks by this count about
  1 − Φ(1.645 / √2) = 12 % of the time at 95 % confidence, not 5 %.
- **population**: as many rows as a half holds are drawn from all rows with replacement, and judged by the mean of all rows. All
  rows are then the population itself, whose loss is known exactly: this count is the one that the promise is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.errors import DatasetError, UsageError
from training.guarantee import guaranteed_threshold
from training.metrics import ROUNDING, random_strong_share_at
from training.threshold import for_quality

Floats = NDArray[np.float64]

LOSSES = (0.01, 0.02, 0.05, 0.10)


@dataclass(frozen=True)
class RuleFigures:
    """What one way of choosing a threshold does, over the splits.

    Attributes
    ----------
    saving : float
        Mean share of the test half's calls that does not go to strong.
    saving_sd : float
        Its standard deviation over splits.
    broken : float
        Share of splits whose test half has less than the asked quality.
    broken_population : float
        Share of draws from the population after which the population has less.
    """

    saving: float
    saving_sd: float
    broken: float
    broken_population: float


@dataclass(frozen=True)
class LossFigures:
    """The two rules at one allowed loss.

    Attributes
    ----------
    loss : float
        Share of strong's quality that may be lost.
    promised, tuned : RuleFigures
        Of :func:`training.guarantee.guaranteed_threshold` and of :func:`training.threshold.for_quality`.
    nothing_promised : float
        Share of splits whose calibration half could promise nothing but always-strong; they count as a saving of 0.
    random_saving : float
        Mean saving, on the test half, of a router that knows nothing but how many calls it may take from strong.
    """

    loss: float
    promised: RuleFigures
    tuned: RuleFigures
    nothing_promised: float
    random_saving: float


@dataclass(frozen=True)
class GuaranteeStudy:
    """The figures at every allowed loss.

    Attributes
    ----------
    n, groups : int
        Rows, and groups of them that are independent.
    calibration : int
        Groups that a threshold was chosen on.
    splits : int
    confidence : float
    losses : tuple of LossFigures
    """

    n: int
    groups: int
    calibration: int
    splits: int
    confidence: float
    losses: tuple[LossFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def guarantee_study(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    losses: Sequence[float] = LOSSES,
    splits: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> GuaranteeStudy:
    """Choose thresholds on half of the rows, with a promise and without, and judge them on rows that were not used.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Scores of rows that their estimator was not fitted on, and the qualities of the two targets, 0 to 1.
    groups : array_like, shape (n,), optional
        Rows of one group stay on one side and count as one.
    losses : sequence of float
        Shares of strong's quality that may be lost: at loss L the bar is (1 − L) × strong's mean quality.
    splits : int
        Random halves, and as many draws from the population.
    progress : callable
        Called once a split: ``splits`` times.

    Raises
    ------
    UsageError
        A loss is not at least 0 and below 1, or there are no splits.
    DatasetError
        There are fewer than four groups.
    """
    if splits < 1 or not all(0.0 <= loss < 1.0 for loss in losses):
        raise UsageError("a study needs at least one split, and losses of at least 0 and below 1")
    score, weak, strong = (np.asarray(values, dtype=np.float64) for values in (score, weak, strong))
    member = np.arange(len(score)) if groups is None else np.unique(groups, return_inverse=True)[1]
    rows = _Rows(score, weak, strong, member)
    count = int(member.max(initial=-1)) + 1
    if count < 4:
        raise DatasetError(f"{count} groups of rows cannot be split in halves to study a promise on")
    half = count // 2
    everything = rows.of(np.arange(count))
    random = np.random.default_rng(seed)
    shape = (splits, len(losses))
    saving, broken, broken_population = np.zeros((3, 2, *shape))
    nothing, by_chance = np.zeros(shape), np.zeros(shape)
    for i in range(splits):
        order = random.permutation(count)
        test = rows.of(order[half:])
        samples = rows.of(order[:half]), rows.of(random.integers(count, size=half))
        for j, loss in enumerate(losses):
            for sample, judge, breaks in zip(
                samples, (test, everything), (broken, broken_population), strict=True
            ):
                promise = guaranteed_threshold(
                    sample.score,
                    sample.weak,
                    sample.strong,
                    quality=1.0 - loss,
                    confidence=confidence,
                    groups=sample.group,
                    seed=seed + i,
                )
                tuned = for_quality(sample.score, sample.weak, sample.strong, quality=1.0 - loss)
                for rule, threshold in enumerate((promise.chosen.threshold, tuned.threshold)):
                    share, quality = judge.served(threshold)
                    breaks[rule, i, j] = quality < (1.0 - loss) * judge.mean(judge.strong) - ROUNDING
                    if judge is test:
                        saving[rule, i, j] = 1.0 - share
                if judge is test:
                    nothing[i, j] = not promise.possible
            by_chance[i, j] = 1.0 - random_strong_share_at(test.weak, test.strong, 1.0 - loss)
        progress()

    def figures(rule: int, j: int) -> RuleFigures:
        return RuleFigures(
            saving=float(saving[rule, :, j].mean()),
            saving_sd=float(saving[rule, :, j].std()),
            broken=float(broken[rule, :, j].mean()),
            broken_population=float(broken_population[rule, :, j].mean()),
        )

    return GuaranteeStudy(
        n=len(score),
        groups=count,
        calibration=half,
        splits=splits,
        confidence=confidence,
        losses=tuple(
            LossFigures(
                loss=float(loss),
                promised=figures(0, j),
                tuned=figures(1, j),
                nothing_promised=float(nothing[:, j].mean()),
                random_saving=float(by_chance[:, j].mean()),
            )
            for j, loss in enumerate(losses)
        ),
    )


@dataclass(frozen=True)
class _Rows:
    """Rows with their groups numbered from 0; in means every group counts as one."""

    score: Floats
    weak: Floats
    strong: Floats
    group: NDArray[np.intp]

    def of(self, chosen: NDArray[np.intp]) -> _Rows:
        """The rows of these groups; a group that is named twice is two groups."""
        by_group = np.argsort(self.group, kind="stable")
        sizes = np.bincount(self.group)
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        taken = sizes[chosen]
        new = np.repeat(np.arange(len(chosen)), taken)
        within = np.arange(len(new)) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = by_group[starts[chosen][new] + within]
        return _Rows(self.score[rows], self.weak[rows], self.strong[rows], new)

    def served(self, threshold: float) -> tuple[float, float]:
        """Strong share and mean quality at a threshold."""
        to_strong = self.score > threshold
        return self.mean(to_strong.astype(np.float64)), self.mean(np.where(to_strong, self.strong, self.weak))

    def mean(self, values: Floats) -> float:
        return float(np.average(values, weights=1.0 / np.bincount(self.group)[self.group]))
