"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """The public labelled originals; tests that need them skip where they are not."""
    folder = os.environ.get("ROUTER_BENCH_DATA")
    if not folder:
        pytest.skip("ROUTER_BENCH_DATA is not set: the public labelled data is needed")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"ROUTER_BENCH_DATA={folder} is not a directory")
    return path
