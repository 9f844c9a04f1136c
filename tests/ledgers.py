"""Entries as the ledger's tests write them, and a process that writes them until it is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from router.entry import Entry, NanoPrices
from router.ledger import Ledger
from router.policy import Prices
from router.upstream import Usage

SMALL = NanoPrices.of(Prices(input=0.25, output=2, cached_read=0.025))
LARGE = NanoPrices.of(Prices(input=5, output=25, cached_read=0.5, cache_write=6.25))


def entry(**changes: Any) -> Entry:
    """A request answered by the small target: 1000 tokens in, 400 of them cached, 50 out."""
    usage = Usage(
        changes.pop("input_tokens", 1000),
        changes.pop("output_tokens", 50),
        changes.pop("cached_read_tokens", 400),
        changes.pop("cache_write_tokens", 0),
    )
    prices = changes.pop("prices", SMALL)
    values: dict[str, Any] = {
        "request": "req_1",
        "session": "session-1",
        "client": "team",
        "tier": "balanced",
        "mode": "code",
        "dialect": "openai",
        "reason": "signal",
        "bundle": "default@1",
        "policy": "abc",
        "target": "small",
        "model": "openai/small",
        "provider": "openai",
        "input_tokens": usage.input,
        "cached_read_tokens": usage.cached,
        "cache_write_tokens": usage.cache_write,
        "output_tokens": usage.output,
        "prices": prices,
        "cost": None if prices is None else prices.cost(usage) + changes.get("earlier_cost", 0),
        "strongest": "large",
        "strongest_cost": LARGE.cost(usage),
    }
    return Entry(**(values | changes))


@contextmanager
def own_schema() -> Iterator[str]:
    """A PostgreSQL URL with a schema of its own; the test is skipped where there is no server."""
    server = os.environ.get("ROUTER_TEST_POSTGRES_URL")
    if not server:
        pytest.skip("ROUTER_TEST_POSTGRES_URL is not set: a PostgreSQL server is needed")
    import psycopg

    schema = f"router_test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
        try:
            yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{schema}"
        finally:
            connection.execute(f"DROP SCHEMA {schema} CASCADE")


def write_until_killed(where: str, durability: str, writers: int, rows: int) -> None:
    """Print each row's id once it is recorded (batched) or on the disk (strict), with the clock's time."""
    with Ledger(where, durability="strict" if durability == "strict" else "batched") as ledger:
        numbers = itertools.count()
        out = threading.Lock()

        async def write() -> None:
            while next(numbers) < rows:
                one = entry()
                await ledger.write(one)
                with out:
                    print(one.id, time.monotonic(), flush=True)
                await asyncio.sleep(0.001)

        async def run() -> None:
            await asyncio.gather(*(write() for _ in range(writers)))

        asyncio.run(run())


if __name__ == "__main__":
    write_until_killed(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
