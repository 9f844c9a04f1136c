"""What the dashboard reads: against the rows themselves, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ledgers import entry, own_schema
from spending import fill
from sqlalchemy import Connection, text

from router import panels
from router.bundle import CostQualityCurve, default_bundle_dir, read_manifest
from router.entry import NANO, Entry
from router.errors import LedgerError, UsageError
from router.ledger_store import HOUR, ledger_url
from router.panels import RANGES, Period, in_force, reading
from router.policy import Policy

NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)
MICROS = int(NOW.timestamp()) * 1_000_000
HOSTILE = "<script>alert(1)</script>"


def ago(hours: float) -> int:
    return MICROS - int(hours * HOUR)


@pytest.fixture(scope="module")
def rows() -> list[Entry]:
    """A request every hour of forty days, the oldest first."""
    modes = ("code", "plan", None, HOSTILE)
    made = []
    for hours in range(960, -1, -1):
        made.append(
            entry(
                id=f"{ago(hours):014x}{hours:018x}",
                time=ago(hours),
                mode=modes[hours % 4],
                session=f"s{hours % 7}",
                reason="predicted" if hours % 3 else "signal",
                score=((hours % 50) / 50 - 0.2) if hours % 3 else None,
                threshold=0.2 if hours % 3 else None,
                bundle="old@1" if hours > 100 else "new@2",
                input_tokens=1000 + hours,
                status=500 if hours % 11 == 0 else 200,
            )
        )
    return made


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(
    request: pytest.FixtureRequest, rows: list[Entry], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A ledger with these rows, of each kind; not to be written to."""
    with ExitStack() as stack:
        where = (
            str(tmp_path_factory.mktemp("panels") / "ledger.db")
            if request.param == "sqlite"
            else stack.enter_context(own_schema())
        )
        fill(where, rows)
        yield where


@pytest.fixture
def ledger(filled: str) -> Iterator[Connection]:
    with reading(ledger_url(filled)) as connection:
        yield connection


def inside(rows: list[Entry], period: Period) -> list[Entry]:
    return [row for row in rows if period.since <= row.time < period.until]


@pytest.mark.parametrize(
    ("name", "first", "slots"),
    [
        ("24h", datetime(2026, 3, 13, 16, tzinfo=UTC), 24),
        ("7d", datetime(2026, 3, 8, tzinfo=UTC), 7),
        ("30d", datetime(2026, 2, 13, tzinfo=UTC), 30),
        ("month", datetime(2026, 3, 1, tzinfo=UTC), 14),
    ],
)
def test_a_period_is_whole_hours_or_days_up_to_now(name: str, first: datetime, slots: int) -> None:
    for now in (NOW, NOW.astimezone(tz=None)):
        period = Period.of(name, now)
        assert period.since == int(first.timestamp()) * 1_000_000
        assert period.since < MICROS < period.until
        told = period.as_json()
        assert len(told["slots"]) == slots
        assert datetime.fromisoformat(told["slots"][0]) == first
    with pytest.raises(UsageError, match="24h, 7d, 30d, month"):
        Period.of("1y", NOW)


def test_the_first_of_a_month_has_one_day() -> None:
    period = Period.of("month", datetime(2026, 3, 1, 0, 0, tzinfo=UTC))
    assert period.until - period.since == 24 * HOUR
    assert Period.of("7d", NOW + timedelta(hours=9)).last == Period.of("7d", NOW).last + 1


@pytest.mark.parametrize("name", RANGES)
def test_spend_and_its_series_are_the_sums_of_the_rows(
    ledger: Connection, rows: list[Entry], name: str
) -> None:
    period = Period.of(name, NOW)
    mine = inside(rows, period)
    found = panels.spend(ledger, "mode", period)
    assert found["total"]["requests"] == len(mine)
    assert found["total"]["cost_nano_usd"] == sum(row.cost or 0 for row in mine)
    assert sum(found["series"]["requests"]) == len(mine)
    assert "before" not in found["summary"]
    assert {group["value"] for group in found["drawn"]} == {row.mode for row in mine}
    for index, slot in enumerate(found["period"]["slots"]):
        start = int(datetime.fromisoformat(slot).timestamp()) * 1_000_000
        here = [row for row in mine if start <= row.time < start + period.slot]
        assert found["series"]["usd"][index] == pytest.approx(sum(row.cost or 0 for row in here) / NANO)
        saved = sum((row.strongest_cost or 0) - (row.cost or 0) for row in here) / NANO
        assert found["series"]["saved_usd"][index] == pytest.approx(saved)
        for group in found["drawn"]:
            tokens = sum(row.input_tokens + row.output_tokens for row in here if row.mode == group["value"])
            assert group["tokens"][index] == tokens


def test_the_series_of_many_groups_are_those_of_the_first(ledger: Connection) -> None:
    found = panels.spend(ledger, "session", Period.of("30d", NOW))
    assert found["groups_total"] == 7
    assert [group["value"] for group in found["drawn"]] == [
        group["session"] for group in found["groups"][: panels.GROUPS_DRAWN]
    ]


def test_unknown_groups_are_refused(ledger: Connection) -> None:
    for by in ("weather", "day", "all"):
        with pytest.raises(UsageError):
            panels.spend(ledger, by, Period.of("7d", NOW))


def test_reasons_are_counted(ledger: Connection, rows: list[Entry]) -> None:
    period = Period.of("7d", NOW)
    found = panels.reasons(ledger, period)
    mine = inside(rows, period)
    assert [one["reason"] for one in found] == ["predicted", "signal"]
    for one in found:
        theirs = [row for row in mine if row.reason == one["reason"]]
        assert one["requests"] == len(theirs)
        assert one["usd"] == pytest.approx(sum(row.cost or 0 for row in theirs) / NANO)
    assert sum(one["share"] for one in found) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0.2, 0.237, -0.2, 0.9, None])
def test_scores_lie_on_the_side_of_the_threshold_that_decided(
    ledger: Connection, rows: list[Entry], threshold: float | None
) -> None:
    period = Period.of("7d", NOW)
    found = panels.scores(ledger, period, "new@2", threshold)
    mine = inside(rows, period)
    scored = [row.score for row in mine if row.score is not None and row.bundle == "new@2"]
    assert (found["requests"], found["scored"], found["complete"]) == (len(mine), len(scored), True)
    assert sum(bin["count"] for bin in found["bins"]) == len(scored)
    assert len(found["bins"]) <= 60
    limit = threshold or 0.0
    over = sum(bin["count"] for bin in found["bins"] if bin["from"] >= limit - 1e-9)
    assert over == sum(score > limit for score in scored)


def test_scores_of_another_bundle_are_left_out(ledger: Connection) -> None:
    found = panels.scores(ledger, Period.of("7d", NOW), "third@3", 0.1)
    assert (found["scored"], found["bins"]) == (0, [])


def test_scores_are_read_of_the_newest_alone(ledger: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "SCORES_READ", 40)
    found = panels.scores(ledger, Period.of("30d", NOW), "new@2", 0.1)
    assert (found["requests"], found["complete"]) == (40, False)


def test_requests_come_newest_first_and_page_by_page(ledger: Connection, rows: list[Entry]) -> None:
    period = Period.of("7d", NOW)
    seen: list[dict[str, Any]] = []
    before: tuple[int, str] | None = None
    while True:
        page = panels.requests(ledger, period, before)
        assert len(page["requests"]) <= panels.ROWS_SHOWN
        seen += page["requests"]
        if page["next"] is None:
            break
        time, _, row = page["next"].partition(".")
        before = int(time), row
    mine = sorted(inside(rows, period), key=lambda row: -row.time)
    assert [one["input_tokens"] for one in seen] == [row.input_tokens for row in mine]
    first, newest = seen[0], mine[0]
    assert first["time"] == "2026-03-14T15:09:26Z"
    assert first["cost_usd"] == pytest.approx((newest.cost or 0) / NANO)
    assert (first["latency_ms"], first["usage_estimated"]) == (None, False)
    assert (first["mode"], first["reason"], first["target"]) == (newest.mode, newest.reason, "small")


def test_rows_of_one_moment_are_not_lost_between_pages(where: str) -> None:
    fill(where, [entry(id=f"{number:032x}", time=MICROS) for number in range(panels.ROWS_SHOWN + 5)])
    with reading(ledger_url(where)) as connection:
        period = Period.of("24h", NOW)
        first = panels.requests(connection, period)
        time, _, row = first["next"].partition(".")
        second = panels.requests(connection, period, (int(time), row))
    assert len(second["requests"]) == 5
    assert second["next"] is None


def test_an_empty_ledger_has_nothing_to_show(where: str) -> None:
    fill(where, [])
    with reading(ledger_url(where)) as connection:
        period = Period.of("24h", NOW)
        found = panels.spend(connection, "mode", period)
        assert found["summary"].startswith("No requests")
        assert found["series"]["usd"] == [0] * 24
        assert found["drawn"] == []
        assert panels.reasons(connection, period) == []
        assert panels.scores(connection, period, None, None)["bins"] == []
        assert panels.requests(connection, period) == {"requests": [], "next": None}


def test_a_csv_has_all_groups_and_runs_nothing(ledger: Connection) -> None:
    lines = panels.spend_csv(ledger, "mode", Period.of("7d", NOW)).splitlines()
    assert lines[0].startswith("mode,requests,")
    assert len(lines) == 5


def test_a_query_that_takes_too_long_ends(where: str) -> None:
    fill(where, [])
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) SELECT max(i) FROM n"
    with pytest.raises(LedgerError, match="cannot be used"), reading(ledger_url(where), 0.2) as connection:
        connection.execute(text(slow))


def test_a_ledger_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"), reading(ledger_url(str(tmp_path / "none.db"))):
        pass


def policy(**tiers: Any) -> Policy:
    prices = {"input": 1, "output": 2}
    targets = {name: {"model": f"openai/{name}", "prices": prices} for name in ("small", "large")}
    return Policy.model_validate(
        {"version": 1, "targets": targets, "tiers": tiers, "default_tier": next(iter(tiers))}
    )


def test_what_is_in_force_is_told_with_its_point_on_the_curve() -> None:
    curve = CostQualityCurve(
        axis="strong_share",
        rows=100,
        thresholds=(1.0, 0.2, 0.0, -1.0),
        spend=(0.0, 0.3, 0.6, 1.0),
        quality=(0.5, 0.7, 0.8, 0.9),
        alone={"weak": (0.0, 0.5), "strong": (1.0, 0.9)},
    )
    manifest = read_manifest(default_bundle_dir()).model_copy(update={"curve": curve})
    pair = {"weak": "small", "strong": "large"}
    mine = policy(
        balanced={"predict": {**pair, "threshold": 0.1}},
        careful={"predict": {**pair, "threshold": 0.02}},
        paid={"predict": {**pair, "quality_per_dollar": 50, "tokens": {"input": 100, "output": 10}}},
        table={"default": "small"},
    )
    found = in_force(mine, manifest)
    assert [(one["tier"], one["threshold"]) for one in found["thresholds"]] == [
        ("balanced", 0.1),
        ("careful", 0.02),
        ("paid", None),
    ]
    assert found["thresholds"][0]["point"] == {"spend": pytest.approx(0.45), "quality": pytest.approx(0.75)}
    assert found["thresholds"][2]["point"] is None
    assert found["curve"]["spend"] == curve.spend
    older = in_force(mine, manifest.model_copy(update={"curve": None}))
    assert older["curve"] is None
    assert older["thresholds"][0]["point"] is None
    assert in_force(mine, None)["curve"] is None
