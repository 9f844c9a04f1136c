"""Two replicas on one PostgreSQL under load, while one is killed and the database restarted: is a request or a cent lost?

``make study-replicas`` runs it, once for each durability, and writes tests/STUDY_REPLICAS.md. Everything is started by
it and ended with it: a PostgreSQL of its own (so that it can be restarted), a provider that writes down what it was asked
and what it counted, two servers, and a client that shares requests out in turn, as a load balancer does, and asks the other
server where one does not answer. Requests follow made-up agent sessions (``router/traffic.py``), a fiftieth as long.

The provider's record is the truth. What the ledger says is compared with it request by request, each cost worked
out again in fractions from the provider's tokens and the policy's prices.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import itertools
import json
import os
import pwd
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
import uvloop
from replicas import Replica, policy_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router.ledger_store import check, ledger_url, open_engine
from router.spend import read_spend
from router.traffic import FAMILIES, Step, generate

SCALE = 50  # tokens of a made-up session that one of ours stands for
# As in the policy of tests/replicas.py; dollars per million tokens.
PRICES = {
    "small": (Fraction(1, 4), Fraction(1, 40), Fraction(2)),
    "large": (Fraction(5), Fraction(1, 2), Fraction(25)),
}
FEATURE = "capped"  # one session in five has a budget, of about half of what it would spend
BUDGET = Fraction(36, 1_000_000)  # dollars for each request of the run
KILL_AT, STOP_AT = 0.35, 0.65  # of the requests
DATABASE_AWAY = 3.0  # seconds
ATTEMPTS = 6
# Of a batched ledger, and of the transaction under way.
FLUSH_SECONDS, TRANSACTION_SECONDS = 0.2, 1.0


# What the provider is.


@dataclass(frozen=True, slots=True)
class Billed:
    """One call as the provider counted it."""

    id: str
    model: str
    input: int
    cached: int
    output: int
    capped: bool

    @property
    def nano(self) -> int:
        """What it costs, in nano-dollars; rounded once, half to even, as a fraction rounds."""
        new, read, out = PRICES[self.model]
        dollars = (self.input - self.cached) * new + self.cached * read + self.output * out
        return round(dollars * 1_000)  # per million tokens, in billionths


def provider_app() -> Starlette:
    """Answers chat completions, with the usage that the request itself says; ``GET /log`` gives all that it answered."""
    log: list[list[Any]] = []

    async def chat(request: Request) -> Response:
        body = json.loads(await request.body())
        id, *tokens = body["user"].split()
        given, cached, output, capped = map(int, tokens)
        usage = {
            "prompt_tokens": given,
            "completion_tokens": output,
            "total_tokens": given + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        log.append([id, body["model"], given, cached, output, bool(capped)])
        head = {"id": f"chatcmpl-{id}", "created": 1, "model": body["model"]}
        if body.get("stream"):
            return StreamingResponse(events(head, usage), media_type="text/event-stream")
        message = {"role": "assistant", "content": "Done."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    async def events(head: Mapping[str, Any], usage: Mapping[str, Any]) -> AsyncIterator[bytes]:
        for delta, finish in (({"role": "assistant", "content": "Done"}, None), ({"content": "."}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield _event({**head, "object": "chat.completion.chunk", "choices": [choice]})
            await asyncio.sleep(0)
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def answered(_: Request) -> Response:
        return JSONResponse(log)

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/log", answered)])


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


@contextmanager
def provider() -> Iterator[int]:
    """Its port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--provider", str(port)])
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


# A database of our own.


class Postgres:
    """A PostgreSQL in a folder, which can be restarted without hurting anybody else's."""

    def __init__(self, folder: Path) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [os.path.dirname(_which("initdb"))]
        self._bin = Path(found[-1])
        self._data = folder / "data"
        self._port = free_port()
        self._user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        self._run("initdb", "-D", str(self._data), "-U", "router", "--auth=trust", "-E", "UTF8")
        self.url = f"postgresql://router@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -h 127.0.0.1 -k {self._data}"
        log = str(self._data.parent / "log")
        self._run("pg_ctl", "-D", str(self._data), "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        """Sessions are ended, and what they had begun is undone."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "fast", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            user=self._user,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )


def _which(program: str) -> str:
    import shutil

    found = shutil.which(program)
    if found is None:
        raise SystemExit("study-replicas: PostgreSQL's programs (initdb, pg_ctl) are needed")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# The client.


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client got, and when it had all of it (seconds since 1970)."""

    status: int
    target: str
    reason: str
    ended: float
    seconds: float


class Connection:
    """One connection that stays open, speaking just enough HTTP/1.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, head: str, body: bytes) -> tuple[int, dict[str, str]]:
        """Status and headers, once the body is complete; what is not complete is an OSError or EOFError."""
        self.writer.write(head.encode() + body)
        said = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        headers = dict(re.findall(r"^([a-z-]+): (.*)\r$", said, re.M))
        if "content-length" in headers:
            await self._reader.readexactly(int(headers["content-length"]))
        else:
            while size := int((await self._reader.readline()).strip(), 16):
                await self._reader.readexactly(size + 2)
            await self._reader.readline()
        return int(said.split(" ", 2)[1]), headers


@dataclass
class Load:
    """The client's side of a run.

    Attributes
    ----------
    answers : dict
        By the id of the call that got it; each call of a request has an id of its own.
    failed : dict
        Calls without a complete answer, by when they failed.
    requests : int
        Requests that were answered.
    strays : int
        Requests of a session that should have stayed at its target and did not, and how many could be judged.
    """

    ports: Sequence[int]
    total: int
    concurrency: int
    answers: dict[str, Answer] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    strays: list[float] = field(default_factory=list)
    judged: int = 0
    in_flight: int = 0
    by_port: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._turn = itertools.count()
        self._down = dict.fromkeys(self.ports, 0.0)
        families = sorted(FAMILIES)
        self._sessions = (
            (families[number % len(families)], number // len(families)) for number in itertools.count()
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(self._work())

    async def _work(self) -> None:
        connections: dict[int, Connection] = {}
        more = True
        while more:
            family, seed = next(self._sessions)
            incumbent, alone = "", True
            for step in generate(family, seed).steps:
                number = next(self._numbers)
                more = number < self.total
                if not more:
                    break
                answer = await self._ask(connections, number, step, f"{family}-{seed}", seed)
                self.requests += 1
                alone = (
                    alone and step.thread == 0
                )  # a summary, an aside: what the session's target is, is not so plain
                if answer.status == 200 and alone:
                    if step.tool != "none" and incumbent:
                        self.judged += 1
                        if answer.target != incumbent:
                            self.strays.append(answer.ended)
                    incumbent = answer.target
        for connection in connections.values():
            connection.writer.close()

    async def _ask(
        self, connections: dict[int, Connection], number: int, step: Step, session: str, seed: int
    ) -> Answer:
        for attempt in range(ATTEMPTS):
            id, port = f"r{number}.{attempt}", self._next()
            head, body = request(id, step, session, stream=number % 2 == 1, capped=seed % 5 == 0)
            started = time.perf_counter()
            self.in_flight += 1
            fresh = port not in connections
            try:
                if fresh:
                    connections[port] = await Connection.open(port)
                status, headers = await connections[port].post(head, body)
            except (OSError, EOFError, ValueError):
                self.failed[id] = time.time()
                if fresh:  # else it may just have been idle for too long
                    self._down[port] = time.monotonic() + 1
                if (broken := connections.pop(port, None)) is not None:
                    broken.writer.close()
                continue
            finally:
                self.in_flight -= 1
            answer = Answer(
                status,
                headers.get("x-router-target", ""),
                headers.get("x-router-reason", ""),
                time.time(),
                time.perf_counter() - started,
            )
            self.answers[id] = answer
            self.by_port[port] += 1
            if status < 500:
                return answer
        raise SystemExit(
            f"study-replicas: request {number} was never answered; answers so far: {self.statuses()}"
        )

    def statuses(self) -> dict[str, int]:
        return dict(Counter(str(one.status) for one in self.answers.values()))

    def _next(self) -> int:
        """The next server in turn, of those that were not found down within the last second."""
        up = [port for port in self.ports if self._down[port] < time.monotonic()] or self.ports
        return up[next(self._turn) % len(up)]


def request(id: str, step: Step, session: str, *, stream: bool, capped: bool) -> tuple[str, bytes]:
    """Head and body; the body says what the provider is to count."""
    context, output = max(step.context // SCALE, 1), max(step.output // SCALE, 1)
    cached = (step.context - step.new) // SCALE
    messages: list[dict[str, Any]] = [{"role": "user", "content": "word " * context}]
    if step.tool != "none":
        function = {"name": f"{step.tool}_file", "arguments": "{}"}
        messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
        ]
    content = {
        "model": "auto",
        "messages": messages,
        "max_tokens": output,
        "user": f"{id} {context} {cached} {output} {capped:d}",
    }
    body = json.dumps(content | ({"stream": True} if stream else {})).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: {id}",
        f"x-router-session: {session}",
    ]
    if step.tool == "none":
        lines.append(f"x-router-mode: {step.mode}")
    if capped:
        lines.append(f"x-router-feature: {FEATURE}")
    return "\r\n".join(lines) + "\r\n\r\n", body


# One run.


@dataclass
class Events:
    """What was done to the deployment, in seconds since 1970; and how many calls were under way when a server was killed."""

    killed: float = 0.0
    in_flight: int = 0
    back: float = 0.0
    stopped: float = 0.0
    started: float = 0.0


async def disturb(load: Load, servers: Sequence[Replica], database: Postgres, events: Events) -> None:
    while load.requests < KILL_AT * load.total:
        await asyncio.sleep(0.02)
    events.in_flight, events.killed = load.in_flight, time.time()
    servers[0].kill()
    say(f"killed a server after {load.requests} requests, with {events.in_flight} under way")
    await asyncio.sleep(1)
    await asyncio.to_thread(lambda: servers[0].start().ready())
    events.back = time.time()
    say(f"it is back after {events.back - events.killed:.1f} s, at {load.requests} requests")
    while load.requests < STOP_AT * load.total:
        await asyncio.sleep(0.02)
    events.stopped = time.time()
    await asyncio.to_thread(database.stop)
    await asyncio.sleep(DATABASE_AWAY)
    await asyncio.to_thread(database.start)
    events.started = time.time()
    say(f"the database was away for {events.started - events.stopped:.1f} s, at {load.requests} requests")


def study(durability: str, total: int, concurrency: int, folder: Path) -> dict[str, Any]:
    base = folder / durability
    base.mkdir()
    (own := base / "postgres").mkdir()
    folder.chmod(0o755)
    base.chmod(0o755)
    database = Postgres(own)
    database.start()
    try:
        with provider() as upstream:
            budgets = {
                "features": {FEATURE: {"month": float(BUDGET * total)}},
                "at_limit": "refuse",
                "pacing": None,
            }
            policy = policy_file(
                base / "policy.yaml", f"http://127.0.0.1:{upstream}/v1", modes=MODES, budgets=budgets
            )
            flags = [
                f"--policy={policy}", f"--ledger={database.url}", f"--ledger-durability={durability}",
                f"--session-store={database.url}",
            ]  # fmt: skip
            environment = {"XDG_DATA_HOME": str(base / "data"), "ROUTER_LOG_LEVEL": "warning"}
            servers = [Replica(flags, base / f"{number}.log", environment) for number in range(2)]
            try:
                for server in servers:
                    server.start()
                ports = [int(server.ready().url.rpartition(":")[2]) for server in servers]
                load, events = Load(ports, total, concurrency), Events()
                say(f"{durability}: {total} requests at concurrency {concurrency}")
                started = time.monotonic()
                uvloop.run(both(load, servers, database, events))
                seconds = time.monotonic() - started
                settle(servers, base / "data")
                billed = [Billed(*one) for one in httpx_get(f"http://127.0.0.1:{upstream}/log")]
                if {server.stop() for server in servers} - {0, -signal.SIGTERM}:
                    raise SystemExit("study-replicas: a server did not stop as told")
            finally:
                for server in servers:
                    server.close()
        return compare(database.url, load, events, billed, seconds, round(BUDGET * total * 10**9))
    finally:
        database.stop()


MODES = {"plan": "frontier", "architect": "frontier", "debug": "frontier"}


async def both(load: Load, servers: Sequence[Replica], database: Postgres, events: Events) -> None:
    disturbing = asyncio.create_task(disturb(load, servers, database, events))
    await load.run()
    await disturbing


def httpx_get(url: str) -> Any:
    import httpx

    return httpx.get(url, timeout=60).json()


def settle(servers: Sequence[Replica], data: Path) -> None:
    """Wait until no row is on its way, in a server's memory or in a local file."""
    import httpx

    deadline = time.monotonic() + 60
    while True:
        pages = [httpx.get(f"{server.url}/metrics").text for server in servers]
        pending = sum(
            float(re.findall(r"^router_ledger_pending_rows (\S+)", page, re.M)[0]) for page in pages
        )
        files = [path for path in data.rglob("*.jsonl") if path.stat().st_size]
        if not pending and not files:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"study-replicas: rows are still on their way: {pending:g}, {files}")
        time.sleep(0.2)


def compare(
    url: str, load: Load, events: Events, billed: Sequence[Billed], seconds: float, budget: int
) -> dict[str, Any]:
    """The ledger beside the provider's record and the client's; ``budget`` in nano-dollars."""
    by_id = {one.id: one for one in billed}
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT request, cost, usage_estimated FROM entries").fetchall()
    costs = {request: cost for request, cost, _ in rows}
    answered = {id: one for id, one in load.answers.items() if one.status == 200}
    lost = sorted(answered.keys() - costs.keys())
    found = [by_id[id] for id in costs if id in by_id]
    capped = [one for one in billed if one.capped]
    refused = [number for number, one in enumerate(load.answers.values()) if one.status == 402]
    independent = sum(one.nano for one in found)
    engine = open_engine(ledger_url(url))
    checked = check(engine)
    engine.dispose()
    took = sorted(one.seconds for one in answered.values())
    calm = [when for when in load.strays if not events.killed <= when <= events.back + 1]
    calm = [when for when in calm if not events.stopped <= when <= events.started + 2]
    return {
        "requests": load.requests,
        "by_server": [load.by_port[port] for port in load.ports],
        "seconds": round(seconds, 1),
        "per_second": round(load.requests / seconds, 1),
        "p50_ms": round(statistics.median(took) * 1e3, 1),
        "p99_ms": round(took[int(0.99 * len(took))] * 1e3, 1),
        "statuses": load.statuses(),
        "answered": len(answered),
        "calls_without_answer": len(load.failed),
        "in_flight_when_killed": events.in_flight,
        "provider_calls": len(billed),
        "rows": len(rows),
        "rows_twice": len(rows) - len(costs),
        "rows_unknown_to_the_provider": sum(
            id not in by_id for id in costs if load.answers.get(id, NOBODY).status in (0, 200)
        ),
        "rows_estimated": sum(bool(estimated) for *_, estimated in rows),
        "rows_whose_answer_was_cut_off": len(costs.keys() - load.answers.keys()),
        "answered_and_lost": len(lost),
        "lost_ended_before_the_kill_ms": [round((events.killed - answered[id].ended) * 1e3) for id in lost],
        "billed_without_row": len(by_id.keys() - costs.keys()),
        "rows_that_cost_something_else": sum(
            by_id[id].nano != cost for id, cost in costs.items() if id in by_id
        ),
        "dollars": sum(costs.values()) / 1e9,
        "dollars_by_the_provider_s_record": independent / 1e9,
        "nano_dollars_apart": sum(costs.values()) - independent,
        "spend_apart": read_spend(url).total.cost - sum(costs.values()),
        "ledger_check": list(checked.problems),
        "budget_dollars": budget / 1e9,
        "budget_spent_dollars": sum(one.nano for one in capped) / 1e9,
        "budget_overshoot_dollars": max(sum(one.nano for one in capped) - budget, 0) / 1e9,
        "budget_dearest_request_dollars": max(one.nano for one in capped) / 1e9,
        "budget_refused": len(refused),
        "budget_first_refused_at": round(refused[0] / len(load.answers), 2) if refused else None,
        "sessions_judged": load.judged,
        "strays": len(load.strays),
        "strays_in_calm": len(calm),
        "server_back_s": round(events.back - events.killed, 1),
        "database_away_s": round(events.started - events.stopped, 1),
    }


NOBODY = Answer(0, "", "", 0.0, 0.0)


def broken(durability: str, one: Mapping[str, Any], concurrency: int) -> Iterator[str]:
    """What was promised and did not hold."""
    lost = one["lost_ended_before_the_kill_ms"]
    if durability == "strict" and lost:
        yield f"{len(lost)} answered requests have no row"
    if lost and max(lost) > (FLUSH_SECONDS + TRANSACTION_SECONDS) * 1e3:
        yield f"a row is missing whose answer ended {max(lost)} ms before the kill"
    if one["billed_without_row"] - one["answered_and_lost"] > concurrency:
        yield "more calls have no row than were under way"
    for name in ("rows_twice", "rows_unknown_to_the_provider", "rows_that_cost_something_else"):
        if one[name]:
            yield f"{name}: {one[name]}"
    if one["nano_dollars_apart"] or one["spend_apart"] or one["ledger_check"]:
        yield "the dollars do not add up"
    if one["budget_overshoot_dollars"] > concurrency * one["budget_dearest_request_dollars"]:
        yield "the budget was overshot by more than the requests under way"
    if one["strays_in_calm"]:
        yield f"{one['strays_in_calm']} requests left their session's target while all was well"


def told(one: Mapping[str, Any]) -> dict[str, str]:
    """A run's figures, each with what it is."""
    statuses, lost = one["statuses"], one["lost_ended_before_the_kill_ms"]
    other = sum(count for status, count in statuses.items() if status not in ("200", "402"))
    first = one["budget_first_refused_at"]
    return {
        "requests": f"{one['requests']:,}",
        "answers of the one that was killed; of the other": "; ".join(f"{n:,}" for n in one["by_server"]),
        "answers 200; 402; others": f"{statuses.get('200', 0):,}; {statuses.get('402', 0):,}; {other:,}",
        "calls without a complete answer, made again": f"{one['calls_without_answer']:,}",
        "calls under way when a server was killed, at both": f"{one['in_flight_when_killed']}",
        "calls that the provider answered": f"{one['provider_calls']:,}",
        "rows of these": f"{one['provider_calls'] - one['billed_without_row']:,}",
        "**answered to the client, and no row**": f"**{one['answered_and_lost']}**",
        "of these, how long before the kill the earliest ended": f"{max(lost)} ms" if lost else "–",
        "answered to nobody, and no row": f"{one['billed_without_row'] - one['answered_and_lost']}",
        "rows that are there twice": f"{one['rows_twice']}",
        "rows of calls that the provider does not know": f"{one['rows_unknown_to_the_provider']}",
        "rows that cost another amount than theirs": f"{one['rows_that_cost_something_else']}",
        "dollars of the rows": f"{one['dollars']:,.9f}",
        "dollars of the same calls by the provider's record": f"{one['dollars_by_the_provider_s_record']:,.9f}",
        "**difference, in billionths**": f"**{one['nano_dollars_apart']}**",
        "`router spend` apart from the rows, in billionths": f"{one['spend_apart']}",
        "`router ledger check`": "; ".join(one["ledger_check"]) or "adds up",
        "budget, dollars": f"{one['budget_dollars']:.6f}",
        "spent of it, by the provider's record": f"{one['budget_spent_dollars']:.6f}",
        "**overshoot, dollars**": f"**{one['budget_overshoot_dollars']:.6f}**",
        "the dearest single request of it": f"{one['budget_dearest_request_dollars']:.6f}",
        "first refused after this share of the run": "–" if first is None else f"{first:.0%}",
        "requests that should stay at their session's target": f"{one['sessions_judged']:,}",
        "that did not; of these while all was well": f"{one['strays']}; {one['strays_in_calm']}",
        "server back, database back after": f"{one['server_back_s']} s, {one['database_away_s']} s",
        "requests/s": f"{one['per_second']:.0f}",
        "p50, p99": f"{one['p50_ms']:.0f} ms, {one['p99_ms']:.0f} ms",
    }


def page(results: Mapping[str, Mapping[str, Any]], concurrency: int) -> str:
    """The report, for people."""
    columns = {name: told(one) for name, one in results.items()}
    first = next(iter(columns.values()))
    lines = [
        "# Two replicas, one killed, the database restarted",
        "",
        f"`make study-replicas`: {first['requests']} requests of made-up agent sessions, half of them streamed, at",
        f"concurrency {concurrency}, shared out in turn between two servers on one PostgreSQL (ledger, budgets, sessions).",
        f"After {KILL_AT:.0%} of them one server is killed (`kill -9`) and started again; after {STOP_AT:.0%} the database is",
        f"stopped for {DATABASE_AWAY:g} s. The client asks the other server where it gets no complete answer; each call has an",
        "id, which the provider writes down with the tokens that it counts. One session in five has a budget, of about half",
        "of what it would spend; beyond it requests are refused. Load generator, provider, servers and database share two",
        "cores, with other work beside them: the times are no measure of speed.",
        "",
        f"| | {' | '.join(f'`{name}`' for name in columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| {what} | {' | '.join(one[what] for one in columns.values())} |" for what in first),
        "",
        "Calls without a complete answer are those that the kill cut off, those that went to the killed server while it",
        "was down, and those on connections that had been idle for five seconds, which a server closes. Answered to nobody",
        "and without a row: what the killed server had sent and not yet answered; the provider bills it, and nobody who is",
        "alive knows. A budget can be overshot by these, and by what the killed server had not told the store yet. Requests",
        "leave their session's target where the database, which holds the sessions, is away: each server then has its own.",
        "",
    ]
    return "\n".join(lines)


def say(what: str) -> None:
    print(f"study-replicas: {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--only", choices=["strict", "batched"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--provider", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provider is not None:
        uvicorn.run(
            provider_app(),
            host="127.0.0.1",
            port=options.provider,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
        )
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="study-replicas-") as folder:
        for durability in [options.only] if options.only else ["strict", "batched"]:
            results[durability] = study(durability, options.requests, options.concurrency, Path(folder))
            print(json.dumps({durability: results[durability]}, indent=2), flush=True)
    text = page(results, options.concurrency)
    if options.out is None:
        print(text, file=sys.stderr)
    else:
        options.out.write_text(text)
    wrong = [what for name, one in results.items() for what in broken(name, one, options.concurrency)]
    if wrong:
        raise SystemExit(f"study-replicas: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
