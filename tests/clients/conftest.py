"""Fixtures for the real clients, and the table of what they did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import BEFORE, ROOT, Stage, stage

WHAT = ("plain", "streamed", "tools", "mode")
_VERSIONS: dict[str, str] = {}
_NOTES: dict[str, dict[str, str]] = {}
_OUTCOMES: dict[str, dict[str, list[str]]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(what): which column of the table a test fills")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("router")) as started:
        yield started


@pytest.fixture
def router(running: Stage) -> Stage:
    """The router that all clients share, with nothing in its books."""
    running.clear()
    return running


@pytest.fixture(scope="session")
def node() -> Path:
    """Where npm has put its packages."""
    folder = ROOT / ".clients-node"
    if not (folder / "node_modules").is_dir():
        pytest.skip("no .clients-node: npm is needed; see `make test-clients`")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an agent works: one small file that has a mistake."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "hello.py").write_text(BEFORE, encoding="utf-8")
    return tmp_path / "work"


@pytest.fixture(scope="module", autouse=True)
def _version(request: pytest.FixtureRequest) -> None:
    module = request.module
    _VERSIONS[module.CLIENT] = module.version()
    _NOTES[module.CLIENT] = getattr(module, "NOTES", {})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" and report.passed:
        return
    client = item.module.CLIENT  # type: ignore[attr-defined]
    for marker in item.iter_markers("shows"):
        _OUTCOMES.setdefault(client, {}).setdefault(marker.args[0], []).append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [("client", "version", *WHAT), ("---",) * (2 + len(WHAT))]
    for client, outcomes in _OUTCOMES.items():
        notes = _NOTES.get(client, {})
        cells = [_cell(outcomes[what]) if what in outcomes else notes.get(what, "-") for what in WHAT]
        rows.append((client, _VERSIONS.get(client, "-"), *cells))
    terminalreporter.write_line("")
    for row in rows:
        terminalreporter.write_line(f"| {' | '.join(row)} |")


def _cell(outcomes: list[str]) -> str:
    for worst in ("failed", "skipped"):
        if worst in outcomes:
            return worst
    return f"yes ({len(outcomes)})"
