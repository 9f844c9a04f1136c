"""The study is held to rows whose qualities are known, and to what it must be able to tell apart."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from router.errors import DatasetError, UsageError
from training.guarantee_study import guarantee_study
from training.metrics import random_strong_share_at
from training.tables import guarantee_table

Floats = NDArray[np.float64]


def rows(n: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    random = np.random.default_rng(seed)
    gain = random.random(n) * 0.6 - 0.1
    strong = random.random(n) < 0.85
    weak = random.random(n) < 0.85 - gain
    return gain + random.normal(0, 0.1, n), weak.astype(np.float64), strong.astype(np.float64)


def test_promises_are_kept_where_tuned_thresholds_break_every_second_time() -> None:
    score, weak, strong = rows(1_200)
    study = guarantee_study(score, weak, strong, losses=(0.02, 0.10), splits=60, confidence=0.9)
    assert (study.n, study.groups, study.calibration) == (1_200, 1_200, 600)
    for at in study.losses:
        # Against the population a promise breaks at its nominal rate at most; three standard deviations are chance.
        assert at.promised.broken_population <= 0.1 + 3 * np.sqrt(0.09 / 60)
        assert at.tuned.broken_population > 0.3
        assert at.promised.broken < at.tuned.broken
        assert at.promised.saving < at.tuned.saving
    small, large = study.losses
    assert small.promised.saving < large.promised.saving
    assert large.random_saving < large.tuned.saving
    chance = 1 - random_strong_share_at(weak, strong, 0.9)
    assert large.random_saving == pytest.approx(chance, abs=0.02)


def test_where_nothing_can_be_promised_nothing_is_saved() -> None:
    study = guarantee_study(*rows(60), losses=(0.01,), splits=5)
    (at,) = study.losses
    assert at.nothing_promised == 1.0
    assert at.promised.saving == at.promised.broken == at.promised.broken_population == 0.0
    assert at.tuned.saving > 0.0


def test_a_group_stays_on_one_side_and_counts_as_one_row() -> None:
    """Three copies of each row, as groups, give the figures of the rows."""
    score, weak, strong = rows(300)
    once = guarantee_study(score, weak, strong, losses=(0.05,), splits=8)
    copies = [np.tile(values, 3) for values in (score, weak, strong)]
    grouped = guarantee_study(*copies, np.tile(np.arange(300), 3), losses=(0.05,), splits=8)
    assert grouped.groups == 300
    assert grouped.losses == once.losses
    assert guarantee_study(*copies, losses=(0.05,), splits=8).losses != once.losses


def test_a_seed_gives_the_same_study_and_splits_are_counted() -> None:
    counted: list[None] = []
    one = guarantee_study(*rows(100), splits=3, seed=1, progress=lambda: counted.append(None))
    assert len(counted) == 3
    assert one == guarantee_study(*rows(100), splits=3, seed=1)
    assert one != guarantee_study(*rows(100), splits=3, seed=2)


def test_the_table_and_json_hold_every_loss() -> None:
    study = guarantee_study(*rows(400), losses=(0.02, 0.1), splits=4)
    text = StringIO()
    Console(file=text, width=150).print(guarantee_table(study, "made-up rows"))
    assert "made-up rows: 400 rows, 4 splits, 200 to choose on, 95% confidence" in text.getvalue()
    for at in study.losses:
        assert f"{at.tuned.saving:.1%}" in text.getvalue()
    assert json.loads(json.dumps(study.as_dict()))["losses"][1]["loss"] == 0.1


def test_what_cannot_be_studied_is_said() -> None:
    with pytest.raises(DatasetError, match="3 groups"):
        guarantee_study(*rows(3))
    with pytest.raises(UsageError, match="split"):
        guarantee_study(*rows(30), splits=0)
    with pytest.raises(UsageError, match="losses"):
        guarantee_study(*rows(30), losses=(1.0,))
