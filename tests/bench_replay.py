"""``make bench-replay``: how long a replay of a large ledger takes, and how much memory.

The ledger is filled with made-up traffic of :mod:`router.workload`, as if each tier's usual target had answered: a tenth of it
is made, and stands there ten times, fortnight after fortnight.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from router.bundle import default_bundle_dir, read_manifest
from router.entry import NanoPrices
from router.ledger_migrations import migrate
from router.ledger_store import HOUR, entries, ledger_url, open_engine
from router.policy import example_policy_path, load_policy
from router.upstream import Usage
from router.workload import row, traffic

TARGETS = {"top": "sonnet", "balanced": "flash", "free": "glm-free", "internal": "luna"}
COPIES = 10
COLUMNS = [column.name for column in entries.c]


def made(requests: int, days: int) -> Iterator[tuple[Any, ...]]:
    """Rows of the ledger."""
    policy = load_policy(example_policy_path())
    prices = {}
    for name in TARGETS.values():
        listed = policy.targets[name].prices
        assert listed is not None
        prices[name] = NanoPrices.of(listed)
    bundle = read_manifest(default_bundle_dir()).id
    defaults = dict.fromkeys(COLUMNS, 0) | dict.fromkeys(
        ("error", "strongest", "strongest_cost", "first_token_us")
    )
    for one in traffic(requests, days=days):
        line = row(one)
        target = TARGETS[line["tier"]]
        price = prices[target]
        usage = Usage(
            line["input_tokens"],
            line["output_tokens"],
            line["cached_read_tokens"],
            line["cache_write_tokens"],
        )
        fields = defaults | line
        fields |= {
            "request": f"req_{line['id']}",
            "dialect": "chat",
            "reason": "signal" if line["mode"] else "predicted",
            "score": None if line["mode"] else line["score"],
            "threshold": None,
            "bundle": bundle,
            "policy": policy.hash,
            "target": target,
            "model": policy.targets[target].model,
            "provider": "openai",
            "price_input": price.input,
            "price_output": price.output,
            "price_cached_read": price.cached_read,
            "price_cache_write": price.cache_write,
            "cost": price.cost(usage),
            "status": 200,
            "basis": json.dumps(line["basis"], separators=(",", ":")),
        }
        yield tuple(fields[name] for name in COLUMNS)


def again(row: tuple[Any, ...], copy: int) -> tuple[Any, ...]:
    """The same request, fortnights later, of a session of its own."""
    fields = dict(zip(COLUMNS, row, strict=True))
    fields["time"] += copy * 14 * 24 * HOUR
    fields["id"] = f"{copy:04x}{fields['id'][4:]}"
    fields["session"] = f"{copy:04x}{fields['session'][4:]}"
    return tuple(fields.values())


def fill(where: str, requests: int, days: int) -> None:
    engine = open_engine(ledger_url(where), "create")
    migrate(engine)
    names, marks = ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))
    with closing(engine.raw_connection()) as connection:
        driver: Any = connection.driver_connection
        cursor = driver.cursor()
        cursor.execute("BEGIN")
        once = list(made(requests // COPIES, days))
        insert = f"INSERT INTO entries ({names}) VALUES ({marks})"
        for copy in range(COPIES):
            cursor.executemany(insert, (again(row, copy) for row in once))
        driver.commit()
        cursor.close()
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=10, help="working days of one copy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "ledger.sqlite3")
        started = time.perf_counter()
        fill(where, arguments.requests, arguments.days)
        print(f"filled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        command = [sys.executable, "-m", "router.cli", "replay", where, "--json"]
        command += ["--policy", str(example_policy_path())]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(done.stdout)
        figures = {
            "requests": found["before"]["total"]["requests"],
            "summary": found["summary"],
            "predictions": found["policies"][0]["predictions"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_megabytes": round(used.ru_maxrss / 1024),
        }
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
