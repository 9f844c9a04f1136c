"""Logging in to the dashboard: which keys, which tokens, how often."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from router.clients import Client, ClientKeys, new_client
from router.errors import RequestError, UsageError
from router.login import SECRET, SESSION_SECONDS, Logins, login_secret

ADMIN, OTHER = "rk_admin-key-0123456789", "rk_other-key-0123456789"
HERE = "192.0.2.1"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def clients(*, admin: bool = True, key: str = ADMIN) -> ClientKeys:
    digest = hashlib.sha256(key.encode()).hexdigest()
    other = hashlib.sha256(OTHER.encode()).hexdigest()
    return ClientKeys(
        [Client(id="root.1@x", key_sha256=digest, admin=admin), Client(id="other", key_sha256=other)]
    )


def logins(keys: ClientKeys | None = None, secret: bytes = b"s" * 32, clock: Clock | None = None) -> Logins:
    clock = clock or Clock()
    return Logins(clients() if keys is None else keys, secret, clock=clock, ticks=clock)


def test_an_admins_key_opens_a_session_that_names_its_holder() -> None:
    ours = logins()
    token = ours.open(ADMIN, HERE)
    client = ours.client(token)
    assert client is not None
    assert client.id == "root.1@x"
    digest = hashlib.sha256(ADMIN.encode()).hexdigest()
    assert ADMIN not in token
    assert digest not in token


def test_another_process_with_the_same_secret_knows_the_token() -> None:
    token = logins().open(ADMIN, HERE)
    assert logins().client(token) is not None
    assert logins(secret=b"t" * 32).client(token) is None


@pytest.mark.parametrize(
    ("key", "status"), [("rk_wrong", 401), ("", 401), (OTHER, 403), ("é" * 9, 401), ("\udcff", 401)]
)
def test_other_keys_open_none(key: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        logins().open(key, HERE)
    assert caught.value.status == status


def test_a_session_ends() -> None:
    clock = Clock()
    ours = logins(clock=clock)
    token = ours.open(ADMIN, HERE)
    clock.now += SESSION_SECONDS - 1
    assert ours.client(token) is not None
    clock.now += 1
    assert ours.client(token) is None


@pytest.mark.parametrize(
    "later", [ClientKeys([]), clients(admin=False), clients(key="rk_new-key-0123456789")]
)
def test_a_session_ends_with_its_key(later: ClientKeys) -> None:
    assert logins(later).client(logins().open(ADMIN, HERE)) is None


def test_a_changed_token_is_none() -> None:
    ours = logins()
    token = ours.open(ADMIN, HERE)
    expires, name, signature = token.split("~")
    changed = [
        f"{int(expires) + 1}~{name}~{signature}",
        f"{expires}~other~{signature}",
        f"{expires}~{name}~{signature[:-1]}",
        f"{expires}~{name}~{'0' * 64}",
        f"{expires}~{name}~é",
        f"{expires}~{name}",
        f"{'9' * 40}~{name}~{signature}",
        f"x~{name}~{signature}",
        f"²~{name}~{signature}",
        "",
        "~~",
        "~" * 5_000,
    ]
    assert [one for one in changed if ours.client(one) is not None] == []


def test_wrong_keys_are_few_a_minute_from_each_address() -> None:
    clock = Clock()
    ours = logins(clock=clock)
    for _ in range(10):
        with pytest.raises(RequestError, match="not one of"):
            ours.open("rk_wrong", HERE)
    with pytest.raises(RequestError) as caught:
        ours.open(ADMIN, HERE)  # the right one neither, or guessing would go on
    assert caught.value.status == 429
    assert 0 < int(caught.value.headers["retry-after"]) <= 6
    assert ours.open(ADMIN, "192.0.2.2")
    clock.now += 7
    assert ours.open(ADMIN, HERE)


def test_a_good_key_may_come_as_often_as_it_likes() -> None:
    ours = logins()
    assert all(ours.open(ADMIN, HERE) for _ in range(50))


def test_addresses_are_forgotten_rather_than_piled_up() -> None:
    ours = logins()
    for number in range(4_200):
        with pytest.raises(RequestError):
            ours.open("rk_wrong", f"2001:db8::{number:x}")
    assert len(ours._wrong) == 4_096


def test_the_secret_is_the_environments_or_made_for_the_processes_that_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    made = login_secret()
    assert len(made) >= 32
    assert login_secret() == made == os.environ[SECRET].encode()
    monkeypatch.setenv(SECRET, "")  # as a compose file sets what is not given
    assert len(login_secret()) >= 32
    monkeypatch.setenv(SECRET, "f" * 32)
    assert login_secret() == b"f" * 32
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(UsageError, match=SECRET):
        login_secret()


def test_the_file_of_clients_is_where_a_session_is_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "clients.yaml"
    key = new_client(file, "boss", admin=True)
    keys = ClientKeys.of(file)
    ours = logins(keys)
    token = ours.open(key, HERE)
    assert ours.client(token) is not None
    file.write_text("version: 1\nclients: []\n")
    keys.reload()
    assert ours.client(token) is None
