"""Two servers, each a process, on one PostgreSQL and one session store: whoever is asked, it is as if there were one."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from ledgers import own_schema
from provider import USAGE, provider
from replicas import Replica, policy_file

from router.entry import NanoPrices
from router.ledger_store import check, ledger_url, open_engine
from router.policy import Prices
from router.spend import read_spend
from router.upstream import Usage

RUN = secrets.token_hex(4)  # Redis remembers the sessions of runs before
CHAT = "/v1/chat/completions"
BUDGET = 100_000  # nano-dollars
CHEAP = NanoPrices.of(Prices(input=0.25, output=2, cached_read=0.025))
FRONTIER = NanoPrices.of(Prices(input=5, output=25, cached_read=0.5, cache_write=6.25))


@dataclass
class Pair:
    """Two servers; ``ledger`` is the URL of what they share."""

    here: Replica
    there: Replica
    ledger: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The ledger is in PostgreSQL, sessions are in Redis."""
    redis = os.environ.get("ROUTER_TEST_REDIS_URL")
    if not redis:
        pytest.skip("ROUTER_TEST_REDIS_URL is not set: a Redis server is needed")
    folder = tmp_path_factory.mktemp("replicas")
    with own_schema() as ledger, provider() as upstream:
        budgets = {"features": {"capped": {"month": BUDGET / 1e9}}, "at_limit": "refuse", "pacing": None}
        policy = policy_file(folder / "policy.yaml", upstream.url, budgets=budgets)
        flags = [
            f"--policy={policy}", f"--ledger={ledger}", "--ledger-durability=strict", f"--session-store={redis}",
        ]  # fmt: skip
        both = [Replica(flags, folder / f"{name}.log") for name in ("here", "there")]
        try:
            for one in both:
                one.start()
            for one in both:
                one.ready()
            yield Pair(both[0], both[1], ledger)
        finally:
            for one in both:
                one.close()


def ask(replica: Replica, session: str, *messages: dict[str, Any], **more: Any) -> httpx.Response:
    headers = {"x-router-session": f"{session} of {RUN}", **more.pop("headers", {})}
    body = {"model": "auto", "messages": [{"role": "user", "content": "Fix it."}, *messages], **more}
    return httpx.post(f"{replica.url}{CHAT}", json=body, headers=headers, timeout=30)


USED = Usage(USAGE["prompt_tokens"], USAGE["completion_tokens"], 4)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "def f(): ..."}
PLAN = {"headers": {"x-router-mode": "plan"}}


def test_a_session_stays_at_its_target_whoever_is_asked(pair: Pair) -> None:
    assert httpx.get(f"{pair.there.url}/readyz").json()["session_store"] == "ready"
    planned = ask(pair.here, "a", **PLAN)
    assert planned.headers["x-router-target"] == "frontier"
    for number, replica in enumerate([pair.there, pair.here, pair.there, pair.there], 1):
        step = ask(replica, "a", *[CALL, RESULT] * number)
        assert (step.headers["x-router-target"], step.headers["x-router-reason"]) == ("frontier", "step")
    # Whereas a session that began nowhere else goes where it would with one server.
    assert ask(pair.there, "b", CALL, RESULT).headers["x-router-target"] == "cheap"


def test_a_stream_is_remembered_before_it_ends(pair: Pair) -> None:
    ask(pair.there, "s", stream=True, **PLAN)
    assert ask(pair.here, "s", CALL, RESULT).headers["x-router-target"] == "frontier"


def test_the_spend_of_both_adds_up(pair: Pair) -> None:
    before = {group.value for group in read_spend(pair.ledger, by="session").groups}
    for number in range(6):
        ask((pair.here, pair.there)[number % 2], "sum", **(PLAN if number < 2 else {}))
    found = read_spend(pair.ledger, by="session")
    [group] = [one for one in found.groups if one.value not in before]
    assert group.sums.requests == 6
    assert group.sums.cost == 2 * FRONTIER.cost(USED) + 4 * CHEAP.cost(USED)
    engine = open_engine(ledger_url(pair.ledger))
    assert check(engine).problems == ()
    engine.dispose()


def test_a_budget_holds_for_both_together(pair: Pair) -> None:
    """Forty requests at once to the two of them, where there is money for a dozen."""
    headers = {"x-router-feature": "capped"}

    def one(number: int) -> int:
        replica = (pair.here, pair.there)[number % 2]
        return ask(replica, f"capped-{number}", max_tokens=3, headers=headers).status_code

    with ThreadPoolExecutor(16) as threads:
        statuses = Counter(threads.map(one, range(40)))
    assert statuses.keys() == {200, 402}
    cost = CHEAP.cost(USED)
    spent = next(
        group.sums.cost for group in read_spend(pair.ledger, by="feature").groups if group.value == "capped"
    )
    assert spent == statuses[200] * cost <= BUDGET
    # One more at a time finds room until there is none for what a request may cost, and then at neither.
    while one(0) == 200:
        spent += cost
    assert BUDGET - 3 * cost < spent <= BUDGET
    assert one(1) == 402


def test_a_session_outlives_the_server_that_began_it(pair: Pair) -> None:
    ask(pair.here, "k", **PLAN)
    pair.here.kill()
    assert ask(pair.there, "k", CALL, RESULT).headers["x-router-target"] == "frontier"
