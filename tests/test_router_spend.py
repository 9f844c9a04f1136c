from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ledgers import entry

from router.entry import NANO
from router.errors import LedgerError, UsageError
from router.ledger import Ledger
from router.ledger_migrations import migrate
from router.ledger_store import GROUPS, HOUR, ledger_url, open_engine, write_batch
from router.policy import Capture
from router.spend import (
    BY,
    Group,
    Spend,
    Sums,
    count,
    dollars,
    moment,
    notes,
    percent,
    query_spend,
    read_spend,
)

NOW = datetime(2026, 3, 18, 14, 30, tzinfo=UTC)  # a Wednesday
START = int(datetime(2026, 1, 30, 22, 10, tzinfo=UTC).timestamp()) * 10**6

Run = Callable[..., tuple[int, str, str]]


def fill(where: str, rows: list[Any]) -> None:
    engine = open_engine(ledger_url(where), "create")
    migrate(engine)
    with engine.begin() as connection:
        write_batch(connection, [row.row() for row in rows])
    engine.dispose()


def some_rows(seed: int, number: int = 250) -> list[Any]:
    """Over some days, with groups of very different size, and with all that makes a row special."""
    numbers = random.Random(seed)
    rows = []
    for _ in range(number):
        rows.append(
            entry(
                time=START + int(numbers.random() * 75 * HOUR),
                mode=numbers.choice(["plan", "code", "code", None]),
                feature=numbers.choice([None, None, "titles"]),
                tier=numbers.choice(["top", "balanced"]),
                client=numbers.choice(["a", "b", None]),
                session=f"s{int(numbers.expovariate(0.1))}",
                target=numbers.choice(["small", "large"]),
                model=numbers.choice(["openai/small", "x/large"]),
                reason=numbers.choice(["predicted", "signal", "pinned"]),
                input_tokens=numbers.randrange(1000, 9000),
                cached_read_tokens=numbers.randrange(1000),
                output_tokens=numbers.randrange(2000),
                earlier_tokens=numbers.choice([0, 0, 500]),
                earlier_cost=numbers.choice([0, 77]),
                usage_estimated=numbers.random() < 0.1,
                status=numbers.choice([200, 200, 502]),
                **({"prices": None} if numbers.random() < 0.1 else {}),
            )
        )
    return rows


def added_up(rows: list[Any], by: str) -> dict[str | None, dict[str, int]]:
    """The same figures, row by row."""
    groups: dict[str | None, dict[str, int]] = {}
    for row in rows:
        if by == "day":
            value: str | None = datetime.fromtimestamp(row.time / 1e6, UTC).date().isoformat()
        else:
            value = getattr(row, GROUPS[by])
        group = groups.setdefault(
            value, dict.fromkeys(("requests", "tokens", "cost", "saved", "unpriced"), 0)
        )
        group["requests"] += 1
        group["tokens"] += row.input_tokens + row.output_tokens + row.earlier_tokens
        group["cost"] += row.cost or 0
        group["saved"] += 0 if row.cost is None else row.strongest_cost - row.cost
        group["unpriced"] += row.cost is None
    return groups


@pytest.mark.parametrize(
    ("since", "until"),
    [
        (None, None),
        (START + 20 * HOUR, None),  # not at a whole hour: it is ten past
        (None, START + 30 * HOUR + 123_456),
        (START + 5 * HOUR + 1, START + 60 * HOUR - 1),
        (START + 10 * HOUR, START + 10 * HOUR + HOUR // 2),  # within an hour
        (START + 10 * HOUR + HOUR // 2, START + 11 * HOUR + HOUR // 3),  # no whole hour
        (START - START % HOUR + 4 * HOUR, START - START % HOUR + 9 * HOUR),
        (START + 999 * HOUR, None),
    ],
)
def test_any_time_by_any_group_is_what_the_rows_add_up_to(
    where: str, since: int | None, until: int | None
) -> None:
    rows = some_rows(1)
    fill(where, rows)
    inside = [row for row in rows if (since or 0) <= row.time < (until or 1 << 62)]
    engine = open_engine(ledger_url(where))
    with engine.connect() as connection:
        for by in BY:
            spend = query_spend(connection, by, since, until, limit=0)
            expected = added_up(inside, by)
            assert {
                group.value: {
                    "requests": group.sums.requests,
                    "tokens": group.sums.tokens,
                    "cost": group.sums.cost,
                    "saved": group.sums.saved,
                    "unpriced": group.sums.unpriced,
                }
                for group in spend.groups
            } == expected, by
            assert spend.groups_total == len(expected)
            assert [group.sums.tokens for group in spend.groups] == sorted(
                (group["tokens"] for group in expected.values()), reverse=True
            )
            assert spend.total == sum((group.sums for group in spend.groups), Sums())
            assert spend.others == Sums()
    engine.dispose()


def test_a_limit_leaves_the_figures_of_the_whole(where: str) -> None:
    rows = [
        *some_rows(2),
        entry(session="dear", input_tokens=1, output_tokens=1, cached_read_tokens=0, cost=10**12),
    ]
    fill(where, rows)
    spend = read_spend(where, by="session", limit=3)
    sizes = {name: group["tokens"] for name, group in added_up(rows, "session").items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])
    assert [group.value for group in spend.groups] == largest[:3]
    assert spend.groups_total == len(sizes) > 5
    assert spend.dearest is not None
    assert spend.dearest.value == "dear"  # though it is not among the three
    assert spend.total.requests == len(rows)
    assert spend.others.tokens == sum(sizes[name] for name in largest[3:])
    assert spend.summary().startswith("Session dear takes 99 % of the dollars, session") is False
    assert "Session dear takes" in spend.summary()


def test_more_groups_than_the_limit_at_a_tie_keep_one_order(where: str) -> None:
    fill(where, [entry(session=f"s{i}") for i in range(9)])
    assert [group.value for group in read_spend(where, by="session", limit=4).groups] == [
        "s0",
        "s1",
        "s2",
        "s3",
    ]


# In words


def spend_of(by: str, *groups: tuple[str | None, int, int], since: int | None = None) -> Spend:
    """Groups of (value, tokens, nano-dollars)."""
    all_of_them = [Group(value, Sums(requests=1, input_tokens=n, cost=cost)) for value, n, cost in groups]
    return Spend(
        by,
        since,
        None,
        sum((group.sums for group in all_of_them), Sums()),
        tuple(all_of_them),
        max(all_of_them, key=lambda group: group.sums.cost, default=None),
        len(all_of_them),
    )


@pytest.mark.parametrize(
    ("spend", "words"),
    [
        (
            spend_of("mode", ("code", 9000, 3 * NANO), ("plan", 1000, NANO)),
            "Mode code takes 75 % of the dollars and 90 % of the tokens: $4.00 for 10 k tokens in 2 requests so far.",
        ),
        (
            spend_of("mode", ("code", 9000, NANO), ("plan", 1000, 3 * NANO)),
            "Mode plan takes 75 % of the dollars, mode code 90 % of the tokens: $4.00 for 10 k tokens in 2 requests so far.",
        ),
        (
            spend_of("feature", (None, 9000, 3 * NANO), ("titles", 1000, NANO)),
            "Requests without a feature take 75 % of the dollars and 90 % of the tokens: "
            "$4.00 for 10 k tokens in 2 requests so far.",
        ),
        (
            spend_of("feature", (None, 500, NANO)),
            "No request names a feature (try another --by): $1.00 for 500 tokens in 1 request so far.",
        ),
        (
            spend_of("target", ("echo", 500, 0), ("other", 1, 0)),
            "Target echo takes >99 % of the tokens: $0.00 for 501 tokens in 2 requests so far.",
        ),
        (spend_of("mode", (None, 0, 0)), "Nothing was used: $0.00 for 0 tokens in 1 request so far."),
        (spend_of("mode"), "No requests so far."),
        (spend_of("mode", since=START), "No requests since 2026-01-30 22:10."),
    ],
)
def test_the_first_line_says_where_the_spend_is(spend: Spend, words: str) -> None:
    assert spend.summary() == words


def test_what_must_be_known_is_said() -> None:
    total = Sums(requests=12_345, estimated=1, unpriced=2, earlier_tokens=30, saved=5)
    assert list(notes(Spend("mode", None, None, total, (), None, 0))) == [
        "saved: an estimate, the same tokens at the strongest target's prices",
        "1 request without usage from the provider: tokens and dollars are estimates",
        "2 requests to targets without prices: not in the dollars",
        "30 tokens went to attempts that did not give the answer: in tokens and dollars",
    ]
    assert list(notes(spend_of("mode", ("code", 1, 1)))) == []


def test_figures_are_short() -> None:
    assert [count(n) for n in (0, 9999, 10_000, 123_456, 999_999, 1_234_567, 45_600_000_000)] == [
        "0", "9,999", "10 k", "123 k", "1,000 k", "1.23 M", "45.6 B",
    ]  # fmt: skip
    assert [dollars(n) for n in (0, 1, 2_500_000, 31 * 10**7, 12_345 * NANO, -2 * NANO, -1)] == [
        "$0.00", "<$0.000001", "$0.002500", "$0.3100", "$12,345.00", "-$2.00", "<-$0.000001",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 0.00001, 0.0123, 0.5, 0.9999, 1)] == [
        "0 %", "<0.1 %", "1.2 %", "50 %", ">99 %", "100 %",
    ]  # fmt: skip


# Times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW),
        ("today", datetime(2026, 3, 18, tzinfo=UTC)),
        ("yesterday", datetime(2026, 3, 17, tzinfo=UTC)),
        ("week", datetime(2026, 3, 16, tzinfo=UTC)),
        ("month", datetime(2026, 3, 1, tzinfo=UTC)),
        ("Year", datetime(2026, 1, 1, tzinfo=UTC)),
        ("7d", NOW - timedelta(days=7)),
        ("24h", NOW - timedelta(hours=24)),
        ("2w", NOW - timedelta(weeks=2)),
        ("90m", NOW - timedelta(minutes=90)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-02", datetime(2026, 2, 1, tzinfo=UTC)),
        (" 2026-01-31T12:00 ", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31t12:00:00.5z", datetime(2026, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-31T12:00+02:00", datetime(2026, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_times(text: str, expected: datetime) -> None:
    assert moment(text, NOW, "--since") == int(expected.timestamp() * 10**6)


@pytest.mark.parametrize("text", ["", "soon", "7", "d", "2026-02-30", "2026-13", "999999d", "9999999999d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--until: .* is no time; give 2026-01-31"):
        moment(text, NOW, "--until")


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, router_command: Run, tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("ROUTER_LEDGER", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return router_command


ROWS = [
    *(entry(mode="code", input_tokens=2000) for _ in range(3)),
    entry(mode="[red]plan", input_tokens=900),
    entry(mode=None, input_tokens=100, cached_read_tokens=0),
    entry(mode="=cmd()", input_tokens=10, cached_read_tokens=0, output_tokens=0, prices=None),
]


def test_the_table(run: Run) -> None:
    fill("l.db", ROWS)
    status, out, err = run("spend", "--ledger", "l.db")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith("Mode code takes ")
    assert lines[2].split() == [
        "mode",
        "requests",
        "tokens",
        "share",
        "in",
        "cached",
        "out",
        "dollars",
        "saved",
        "(est.)",
    ]
    assert lines[3].split()[:2] == ["code", "3"]
    assert lines[4].startswith("[red]plan ")  # and not in red
    assert lines[5].startswith("(none) ")
    assert lines[6].startswith("=cmd() ")
    assert "no price" in lines[6]
    assert lines[7].split()[:2] == ["all", "6"]
    assert "1 request to targets without prices" in err
    assert "estimate" in err
    limited = run("spend", "--ledger", "l.db", "--limit", "1")[1].splitlines()
    assert limited[4].startswith("(3 more) ")


def test_json_is_one_object(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("l.db", ROWS)
    monkeypatch.setenv("ROUTER_LEDGER", "sqlite:///l.db")
    status, out, err = run("spend", "--json", "--since", "1h")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert answer["by"] == "mode"
    assert answer["total"]["requests"] == 6
    assert [group["mode"] for group in answer["groups"]] == ["code", "[red]plan", None, "=cmd()"]
    first = answer["groups"][0]
    assert first["cost_nano_usd"] == sum(row.cost or 0 for row in ROWS[:3])
    assert first["cost_usd"] == first["cost_nano_usd"] / NANO
    assert first["saved_usd_estimate"] == pytest.approx(
        first["strongest_cost_usd_estimate"] - first["cost_usd"]
    )
    assert first["cache_share"] == 0.2
    assert sum(group["tokens_share"] for group in answer["groups"]) == pytest.approx(1, abs=1e-5)
    assert answer["groups"][3]["unpriced_requests"] == 1
    assert answer["others"] is None
    assert json.loads(run("spend", "--json", "--limit", "1")[1])["others"]["requests"] == 3


def test_sessions_are_whole_at_any_width(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sessions = [f"{n:032x}" for n in range(3)]
    fill("l.db", [entry(session=session) for session in sessions])
    lines = run("spend", "--ledger", "l.db", "--by", "session")[1].splitlines()
    assert [line.split()[0] for line in lines[3:6]] == sessions
    assert all(len(line.split()) > 8 for line in lines[3:6])


def test_csv_runs_nothing_in_a_spreadsheet(run: Run) -> None:
    fill("l.db", ROWS)
    status, out, err = run("spend", "--csv", "--ledger", "l.db", "--by", "mode")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (status, err) == (0, "")
    assert [row["mode"] for row in rows] == ["code", "[red]plan", "", "'=cmd()"]
    assert rows[0]["tokens"] == "6150"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["spend", "--by", "colour"],
            2,
            "--by: there is no group 'colour'; there are: mode, feature, tier, target",
        ),
        (["spend", "--since", "soon"], 2, "--since: 'soon' is no time"),
        (
            ["spend", "--since", "2026-02-01", "--until", "2026-01-01", "--ledger", "l.db"],
            2,
            "must be before --until",
        ),
        (["spend", "--json", "--csv"], 2, "one of the two"),
        (["spend", "--limit", "-1"], 2, "--limit"),
        (["spend"], 1, "data/llm-difficulty-router/ledger.sqlite3: there is no ledger"),
        (["spend", "--ledger", "/no/such/ledger.db"], 1, "/no/such/ledger.db: there is no ledger"),
        (["spend", "--ledger", "empty.db"], 1, "there is no ledger in this database"),
        (["spend", "--ledger", "text.db"], 1, "text.db cannot be used: file is not a database"),
        (["spend", "--ledger", "old.db"], 1, "schema version 1, this program reads"),
        (["spend", "--ledger", "redis://h/1"], 1, "cannot be kept in 'redis'"),
        (
            ["spend", "--ledger", "postgresql://u:hunter22@127.0.0.1:1/d"],
            1,
            "cannot be used: connection failed",
        ),
        (["ledger", "delete", "--ledger", "l.db"], 2, "give --session or --client"),
        (
            ["ledger", "delete", "--ledger", "l.db", "--session", "a", "--client", "b"],
            2,
            "give --session or --client",
        ),
        (["ledger", "delete", "--ledger", "none.db", "--session", "a"], 1, "none.db: there is no ledger"),
        (["ledger", "purge", "--ledger", "l.db", "--before", "soon"], 2, "--before: 'soon' is no time"),
        (["ledger", "migrate", "--ledger", "none.db"], 1, "none.db: there is no ledger"),
    ],
)
def test_a_wrong_call_is_one_line(run: Run, arguments: list[str], status: int, message: str) -> None:
    fill("l.db", [])
    Path("empty.db").touch()
    Path("text.db").write_text("my notes, not a database " * 99)
    engine = open_engine(ledger_url("old.db"), "create")
    migrate(engine, to=1)
    engine.dispose()
    code, out, err = run(*arguments)
    assert (code, out) == (status, "")
    assert err.startswith("router: ")
    assert err.count("\n") == 1
    assert message in err
    assert "hunter22" not in err
    assert not Path("none.db").exists()


def test_an_empty_ledger_is_no_error(run: Run) -> None:
    fill("l.db", [])
    assert run("spend", "--ledger", "l.db") == (0, "No requests so far.\n", "")
    assert json.loads(run("spend", "--ledger", "l.db", "--json")[1])["groups"] == []
    assert run("spend", "--ledger", "l.db", "--csv")[1].count("\n") == 1


def test_the_ledgers_commands(run: Run) -> None:
    with Ledger("l.db", capture=Capture(share=1)) as ledger:
        for i in range(4):
            ledger.record(entry(session=f"s{i % 2}", client="c"), f"prompt {i}")
    status, out, _ = run("ledger", "captures", "--ledger", "l.db")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(4)]
    assert rows[0]["target"] == "small"
    assert run("ledger", "delete", "--ledger", "l.db", "--session", "s0") == (0, "2 prompts deleted\n", "")
    assert run("ledger", "delete", "--ledger", "l.db", "--client", "c", "--rows")[1] == (
        "2 prompts deleted, 4 rows made anonymous\n"
    )
    assert run("ledger", "purge", "--ledger", "l.db", "--before", "now")[1] == "0 prompts deleted\n"
    status, out, err = run("ledger", "check", "--ledger", "l.db")
    assert (status, err) == (0, "")
    assert out.startswith(f"4 rows, ${4 * (entry().cost or 0) / NANO:.9f}, 4,200 tokens")
    assert run("spend", "--ledger", "l.db", "--by", "key", "--json")[1].count('"key": null') == 1
    engine = open_engine(ledger_url("old.db"), "create")
    migrate(engine, to=1)
    engine.dispose()
    assert run("ledger", "migrate", "--ledger", "old.db")[1] == "schema version 4, was 1\n"
    assert run("ledger", "migrate", "--ledger", "old.db")[1] == "schema version 4; nothing to do\n"


def test_a_ledger_that_disagrees_with_itself_is_an_error(run: Run) -> None:
    fill("l.db", ROWS)
    with open_engine(ledger_url("l.db"), "write").begin() as connection:
        connection.exec_driver_sql("DELETE FROM day_sums WHERE kind = 'target'")
        connection.engine.dispose()
    code, out, err = run("ledger", "check", "--ledger", "l.db")
    assert (code, out.count("\n")) == (1, 1)
    assert "day_sums by target differ from the rows in 1 groups" in err


def test_reading_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_spend(str(tmp_path / "none.db"))
    assert not list(tmp_path.iterdir())
