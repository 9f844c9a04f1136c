"""Waiting before trying again: longer each time, never too long, and not all at once."""

from __future__ import annotations

import pytest

from router.backoff import backoff


def test_waits_double_up_to_the_longest() -> None:
    longest = [backoff(failures, 0.1, 5.0, lambda low, high: high) for failures in range(1, 9)]
    assert longest == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert backoff(10_000, 0.1, 5.0, lambda low, high: high) == 5.0


def test_half_of_it_is_chance() -> None:
    waits = {backoff(3, 1.0, 60.0) for _ in range(200)}
    assert len(waits) > 100
    assert 2.0 <= min(waits) < 2.2
    assert 3.8 < max(waits) <= 4.0
