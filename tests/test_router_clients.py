from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from running import policy

from router.clients import Allowance, Client, ClientKeys, load_clients, new_client
from router.errors import RequestError, RouterError, UsageError

KEY = "rk_the-key-of-alice"


def client(name: str = "alice", key: str = KEY, **fields: Any) -> Client:
    return Client(id=name, key_sha256=hashlib.sha256(key.encode()).hexdigest(), **fields)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_made_once_and_stands_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    fields = {
        "tiers": ["auto"],
        "targets": [],
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "admin": False,
    }
    key = new_client(path, "alice", **fields)
    other = new_client(path, "bob.b@example", admin=True)
    text = path.read_text()
    assert key.startswith("rk_")
    assert len(key) >= 46  # 256 bits
    assert key != other
    assert key not in text
    assert path.stat().st_mode & 0o777 == 0o600
    alice, bob = load_clients(path)
    assert alice == client("alice", key, tiers={"auto"}, targets=frozenset(), requests_per_minute=60)
    assert bob == client("bob.b@example", other, admin=True)
    assert ClientKeys.of(path).identify({"authorization": f"Bearer {key}"}) == alice


def test_what_people_wrote_in_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    text = f"# ours\nversion: 1\nclients:\n  - id: alice  # on the third floor\n    key_sha256: {'a' * 64}\n"
    path.write_text(text)
    path.chmod(0o640)
    new_client(path, "bob")
    assert path.read_text().startswith(text)
    assert [one.id for one in load_clients(path)] == ["alice", "bob"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_key_that_cannot_be_added_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    for text, name, message in [
        ("version: 1\nclients: []\n", "bob", "only at the end of a list"),
        (
            f"version: 1\nclients: [{{id: bob, key_sha256: {'a' * 64}}}]\n",
            "bob",
            "a client named bob already",
        ),
        ("version: 1\nclients:\n", "a b", "clients.0.id: string should match"),
        ("version: 2\nclients:\n", "bob", "version: input should be 1"),
    ]:
        path.write_text(text)
        with pytest.raises(RouterError, match=message):
            new_client(path, name)
        assert path.read_text() == text
        assert os.listdir(tmp_path) == ["clients.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is a mapping that starts with"),
        ("- a", "is a mapping that starts with"),
        ("version: 1\nclients: [{id: a}]", r"clients\.0\.key_sha256: field required"),
        (
            "version: 1\nclients: [{id: a, key_sha256: SECRET}]",
            r"clients\.0\.key_sha256: string should match",
        ),
        (
            f"version: 1\nclients: [{{id: a, key_sha256: {'a' * 64}, teirs: []}}]",
            r"clients\.0\.teirs: unknown key",
        ),
        (f"version: 1\nclients: [{{id: a, key_sha256: {'a' * 64}, requests_per_minute: 0}}]", "greater than"),
        ("version: 1\nclients: [", r"clients\.yaml:2: not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        (
            f"version: 1\nclients: [{{id: a, key_sha256: {'a' * 64}}}, {{id: a, key_sha256: {'b' * 64}}}]",
            "the id a stands there twice",
        ),
        (
            f"version: 1\nclients: [{{id: a, key_sha256: {'a' * 64}}}, {{id: b, key_sha256: {'a' * 64}}}]",
            "key_sha256 a+ stands there twice",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(text)
    with pytest.raises(RouterError, match=message) as caught:
        load_clients(path)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`router keys new NAME --clients .* makes a key and the file"):
        load_clients(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"x-api-key": KEY},
        {"api-key": KEY},
        {"authorization": "Bearer sk-of-someone-else", "x-api-key": KEY},
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str]) -> None:
    assert ClientKeys([client("bob", "rk_b"), client()]).identify(headers).id == "alice"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "wants a key of its own"),
        ({"authorization": "Bearer"}, "wants a key of its own"),
        ({"authorization": f"Basic {KEY}"}, "wants a key of its own"),
        ({"authorization": KEY}, "wants a key of its own"),
        ({"authorization": f"Bearer {KEY}x"}, "not one of this server's"),
        ({"x-api-key": client().key_sha256}, "not one of this server's"),
        ({"x-api-key": "\udcff"}, "not one of this server's"),
    ],
)
def test_a_wrong_key_is_401(headers: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ClientKeys([client()]).identify(headers)
    assert caught.value.status == 401
    assert caught.value.headers["www-authenticate"].startswith("Bearer")
    assert KEY not in str(caught.value)


def test_an_allowance_fills_at_an_even_rate_and_may_be_overdrawn() -> None:
    allowance = Allowance(60, now=0)
    for _ in range(60):
        assert allowance.wait(1, 0) == 0
        allowance.take(1, 0)
    assert allowance.wait(1, 0) == 1
    assert allowance.wait(1, 0.75) == 0.25
    assert allowance.wait(1, 1) == 0
    allowance.take(91, 1)
    assert allowance.wait(1, 1) == 91
    assert allowance.wait(60, 1000) == 0  # it holds no more than a minute's worth
    assert allowance.wait(61, 1000) > 0


def test_requests_a_minute() -> None:
    clock = Clock()
    alice = client(requests_per_minute=2)
    keys = ClientKeys([alice], clock=clock)
    keys.admit(alice)
    keys.admit(alice)
    with pytest.raises(RequestError, match="2 requests a minute, and has; come back in 30 s") as caught:
        keys.admit(alice)
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "30"})
    keys.admit(client("bob", "rk_b", requests_per_minute=2))
    clock.now += 30
    keys.admit(alice)
    with pytest.raises(RequestError):
        keys.admit(alice)


def test_tokens_a_minute_are_counted_after_the_answer_and_checked_before() -> None:
    clock = Clock()
    alice = client(tokens_per_minute=600)
    keys = ClientKeys([alice], clock=clock)
    for _ in range(100):
        keys.admit(alice)
    keys.used(alice, 1000)
    with pytest.raises(RequestError, match="600 tokens a minute") as caught:
        keys.admit(alice)
    assert caught.value.headers["retry-after"] == "41"  # 401 tokens at 10 a second
    clock.now += 41
    keys.admit(alice)
    free = client()
    keys.used(free, 10**9)
    keys.admit(free)


def test_tiers_and_targets() -> None:
    own = policy("http://127.0.0.1:9/v1")

    def asks(model: str, **fields: Any) -> int:
        try:
            client(**fields).check(own, model)
        except RequestError as error:
            return error.status
        return 200

    assert [asks(model) for model in ("auto", "balanced:plan", "cheap", "gpt-4o", "none")] == [
        200,
        200,
        200,
        200,
        404,
    ]
    some = {"tiers": {"balanced"}, "targets": {"cheap"}}
    models = ("balanced", "balanced:plan", "cheap", "auto", "auto:plan", "gpt-4o", "frontier")
    assert [asks(model, **some) for model in models] == [200, 200, 200, 403, 403, 403, 403]
    assert asks("frontier", targets=set()) == 403
    assert asks("auto", tiers={"auto"}, targets=set()) == 200
    with pytest.raises(
        RequestError,
        match=r"may not use the tier 'auto'; it may ask for: balanced, cheap, balanced:plan, balanced:commit\.$",
    ):
        client(**some).check(own, "auto")
    with pytest.raises(
        RequestError, match=r"may not use the target 'cheap'; there is nothing that it may ask for\.$"
    ):
        client(tiers=set(), targets=set()).check(own, "cheap")
    with pytest.raises(RequestError) as caught:  # 404 tells no names either that the key is not for
        client(**some).check(own, "none")
    assert "frontier" not in str(caught.value)


def test_auto_among_the_tiers_is_the_default_tier() -> None:
    own = policy(
        "http://127.0.0.1:9/v1",
        tiers={"top": {"default": "cheap"}, "free": {"default": "echo"}},
        default_tier="top",
        aliases={},
    )
    assert set(client(tiers={"auto"}, targets=set()).names(own)) == {"auto", "top"}
    with pytest.raises(RequestError, match="may not use the tier 'free'"):
        client(tiers={"auto"}).check(own, "free")


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "clients.yaml"
    key = new_client(path, "alice", requests_per_minute=1)
    clock = Clock()
    keys = ClientKeys.of(path)
    keys._clock = clock
    alice = keys.identify({"x-api-key": key})
    keys.admit(alice)
    second = new_client(path, "bob")
    with pytest.raises(RequestError):
        keys.identify({"x-api-key": second})
    keys.reload()
    assert keys.identify({"x-api-key": second}).id == "bob"
    with pytest.raises(RequestError):  # what was used outlives the change
        keys.admit(keys.identify({"x-api-key": key}))

    good = path.read_text()
    with caplog.at_level(logging.ERROR):
        for bad in ("version: 1\nclients: [", "version: 1\nclients: [{id: 7}]\n"):
            path.write_text(bad)
            caplog.clear()
            keys.reload()
            keys.reload()  # told once
            assert len(caplog.records) == 1
            assert str(path) in (keys.error or "")
            assert len(keys) == 2
        path.unlink()
        keys.reload()
        assert len(keys) == 2
    path.write_text(good.replace("bob", "robert"))
    keys.reload()
    assert keys.error is None
    assert keys.identify({"x-api-key": second}).id == "robert"


def test_watching_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    new_client(path, "alice")
    keys = ClientKeys.of(path)

    async def work() -> None:
        watching = asyncio.create_task(keys.watch(0.005))
        new_client(path, "bob")
        async with asyncio.timeout(5):
            while len(keys) < 2:
                await asyncio.sleep(0.005)
        watching.cancel()

    asyncio.run(work())
