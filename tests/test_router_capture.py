"""Prompts that a policy has kept: from a request over HTTP to what is trained on, and until they are deleted."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from provider import provider, serve
from running import ENVIRONMENT, WordPredictor, policy

from router.app import create_app
from router.basis import prompt_of
from router.clients import Client, ClientKeys
from router.gateway import Gateway
from router.ledger import Ledger
from router.policy import Policy

CHAT = "/v1/chat/completions"
SECRET = "sk-proj-0123456789abcdefghij"
CLIENTS = [
    Client(id=name, key_sha256=hashlib.sha256(f"rk_{name}".encode()).hexdigest()) for name in ("ann", "bob")
]


def keeping(base: str, **capture: Any) -> Policy:
    own = policy(base)
    priced = {
        name: target.model_copy(update={"prices": own.targets["cheap"].prices})
        for name, target in own.targets.items()
    }
    document = own.model_dump(exclude_unset=True) | ({"capture": capture} if capture else {})
    return Policy.model_validate(document).model_copy(update={"targets": priced})


class Kept:
    """A server whose policy has prompts kept, and what is in its ledger."""

    def __init__(self, http: httpx.Client, gateway: Gateway, base: str, file: Path) -> None:
        self.http, self.gateway, self.base, self.file = http, gateway, base, file

    def ask(self, text: str, client: str = "ann", session: str = "s", **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer rk_{client}", "x-router-session": session}
        body = {"messages": [{"role": "user", "content": text}], **more}
        answer = self.http.post(CHAT, json=body, headers=headers)
        answer.read()
        answer.raise_for_status()
        return answer

    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows("captures")]

    def rows(self, table: str) -> list[dict[str, Any]]:
        with sqlite3.connect(f"file:{self.file}?mode=ro", uri=True) as connection:
            connection.row_factory = sqlite3.Row
            found = [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY time, id")]
        connection.close()
        return found


@contextmanager
def kept(folder: Path, **capture: Any) -> Iterator[Kept]:
    file = folder / "ledger.db"
    with provider() as upstream:
        ledger = Ledger(str(file), durability="strict").open()
        gateway = Gateway(
            keeping(upstream.url, **capture), WordPredictor(), ENVIRONMENT, ClientKeys(CLIENTS), ledger
        )
        with (
            serve(create_app(gateway=gateway)) as url,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield Kept(http, gateway, upstream.url, file)


Run = Callable[..., str]


@pytest.fixture
def run(router_command: Callable[..., tuple[int, str, str]]) -> Run:
    def call(*arguments: str) -> str:
        status, out, err = router_command(*arguments)
        assert not status, err
        return out

    return call


def test_what_the_classifier_reads_is_kept_and_nothing_else(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "bash", "parameters": {}}}]
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    with kept(tmp_path, share=1) as server:
        server.ask(f"an easy question of jane.doe@example.org, key {SECRET}")
        # Looked up, not predicted: it is kept all the same.
        server.ask(
            "",
            model="balanced:plan",
            tools=tools,
            messages=[
                {"role": "system", "content": "you are an agent"},
                {"role": "user", "content": "run it <system-reminder>be brief</system-reminder>"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "2 failed, 1 passed"},
            ],
        )
        with server.http.stream(
            "POST",
            CHAT,
            json={"stream": True, "messages": [{"role": "user", "content": "a streamed one"}]},
            headers={"authorization": "Bearer rk_bob"},
        ) as answer:
            answer.read()
        first, second, third = server.rows("captures")
        rows = server.rows("entries")
    assert first["prompt"] == "an easy question of [email], key [key]"
    assert (second["prompt"], third["prompt"]) == ("run it", "a streamed one")
    assert [one["id"] for one in (first, second, third)] == [row["id"] for row in rows]
    assert (first["client"], third["client"]) == ("ann", "bob")
    assert 29 < (first["expires"] - first["time"]) / 86_400e6 < 31
    state = prompt_of(second["prompt"], second["state"]).state
    assert (state.last_result, state.last_result_failed_test, state.tools_offered) == ("run", True, 1)
    assert prompt_of(first["prompt"], first["state"]).characters > len(first["prompt"])  # as it was predicted
    everything = str(server.file.read_bytes())
    assert SECRET not in everything
    assert "you are an agent" not in everything
    assert "2 failed, 1 passed" not in everything


def test_without_the_policy_none_is_kept_and_a_change_counts_at_once(tmp_path: Path) -> None:
    with kept(tmp_path) as server:
        server.ask("before")
        for capture, text in (({"share": 1}, "during"), ({"share": 0}, "none of them"), ({}, "after")):
            own = keeping(server.base, **capture)
            server.gateway.put_in_force(server.gateway.bind(own, WordPredictor()))
            server.ask(text)
        assert len(server.rows("entries")) == 4
        assert server.prompts() == ["during"]


def test_a_policy_that_wants_prompts_is_served_without_a_ledger(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway(keeping("http://127.0.0.1:9/v1", share=1), WordPredictor(), {})
    assert gateway.in_force.policy.capture is not None
    assert "no ledger is kept (--ledger): none is" in caplog.text


def test_prompts_are_deleted_by_session_and_by_key(tmp_path: Path, run: Run) -> None:
    with kept(tmp_path, share=1, keep_days=7) as server:
        for client in ("ann", "bob"):
            for session in ("one", "two"):
                server.ask(f"{client} in {session}", client, session)
        where = ("--ledger", str(server.file))
        groups = json.loads(run("spend", *where, "--by", "session", "--json"))["groups"]
        assert len(groups) == 4  # one client's session is never another's
        mine = next(row["session"] for row in server.rows("captures") if row["prompt"] == "ann in one")
        # While the server runs.
        assert run("ledger", "delete", *where, "--session", mine) == "1 prompts deleted\n"
        assert server.prompts() == ["ann in two", "bob in one", "bob in two"]
        said = run("ledger", "delete", *where, "--client", "bob", "--rows")
        assert said == "2 prompts deleted, 2 rows made anonymous\n"
        assert server.prompts() == ["ann in two"]
        server.ask("bob again", "bob", "one")
        assert server.prompts() == ["ann in two", "bob again"]
        keys = json.loads(run("spend", *where, "--by", "key", "--json"))["groups"]
        assert {group["key"]: group["requests"] for group in keys} == {"ann": 2, None: 2, "bob": 1}
        assert run("ledger", "purge", *where, "--before", "now") == "2 prompts deleted\n"
        assert run("ledger", "check", *where).startswith("5 rows, ")
        assert "bob in one" not in str(server.file.read_bytes())


def test_an_export_is_what_label_takes(tmp_path: Path, run: Run) -> None:
    from training.dataset import load_prompts

    with kept(tmp_path, share=1) as server:
        server.ask("the same ask", session="a")
        server.ask("the same ask", session="a")
        server.ask("another ask", session="b", model="balanced:plan")
        exported = run("ledger", "export", "--ledger", str(server.file))
        assert run("ledger", "export", "--ledger", str(server.file), "--until", "2026-01-01") == ""
        with_rows = run("ledger", "captures", "--ledger", str(server.file))
    file = tmp_path / "prompts.jsonl"
    file.write_text(exported, encoding="utf-8")
    rows = load_prompts(file)
    assert [row["prompt"] for row in rows] == ["the same ask", "another ask"]
    assert [row.get("domain") for row in rows] == [None, "plan"]
    assert len({row["group"] for row in rows}) == 2
    assert "ann" not in exported
    assert [json.loads(line)["target"] for line in with_rows.splitlines()] == ["cheap", "cheap", "frontier"]


def test_what_a_row_is_decided_on_is_in_it(tmp_path: Path) -> None:
    with kept(tmp_path) as server:
        server.ask("an easy question", model="gpt-4o", max_tokens=77)
        row = server.rows("entries")[0]
    basis = json.loads(row["basis"])
    assert basis.pop("tokens") > 0
    assert basis == {"asked": "gpt-4o", "answer": 77, "quality": [0.5, 0.525], "novelty": 0.25}
