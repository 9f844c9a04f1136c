"""A server without client keys answers this machine, and no page of another site that a browser here has open."""

from __future__ import annotations

import json

import pytest
from running import WordPredictor, policy
from starlette.testclient import TestClient

from router.app import create_app
from router.clients import ClientKeys
from router.errors import UsageError
from router.exposure import check_exposure, is_loopback
from router.gateway import Gateway
from router.settings import Settings

HERE = "http://127.0.0.1:8080"
ASK = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}


def client_of(keys: ClientKeys | None = None, **settings: object) -> TestClient:
    gateway = Gateway(policy("http://127.0.0.1:9/v1"), WordPredictor(), {}, keys)
    return TestClient(create_app(Settings.model_validate(settings), gateway), HERE)


def test_what_is_this_machine() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.test", ""))


def test_without_keys_a_server_listens_on_loopback_alone() -> None:
    check_exposure(Settings(host="::1"))
    check_exposure(Settings(host="0.0.0.0", open_to_anyone=True))
    with pytest.raises(UsageError, match="anybody who reaches"):
        check_exposure(Settings(host="0.0.0.0"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "127.0.0.2", "localhost:8080", "LocalHost", "[::1]:8080", ""]
)
@pytest.mark.parametrize(
    "origin", [None, "http://localhost:3000", "http://[::1]:5173", "vscode-webview://a1", "app://notes"]
)
def test_this_machine_is_answered(host: str, origin: str | None) -> None:
    headers = {"host": host} if origin is None else {"host": host, "origin": origin}
    assert client_of().post("/v1/route", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.test"},
        {"host": "evil.test:8080"},
        {"host": "127.0.0.1.evil.test"},
        {"host": "10.0.0.1:8080"},
        {"host": "[::1"},
        {"host": "evil.test\t/@localhost"},
        {"origin": "https://evil.test"},
        {"origin": "http://localhost.evil.test:3000"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_another_sites_page_is_refused(headers: dict[str, str]) -> None:
    # As a browser sends it across origins without asking first: as plain text.
    plain = {"content-type": "text/plain", **headers}
    for path in ("/v1/chat/completions", "/v1/route", "/v1/messages", "/dashboard", "/v1/models", "/metrics"):
        answer = client_of().request("POST", path, content=json.dumps(ASK), headers=plain)
        assert answer.status_code == 403, path
        body = answer.json()
        assert body.get("type") == ("error" if path == "/v1/messages" else None)
        assert body["error"]["type"] == "permission_error"
        assert "--clients FILE" in body["error"]["message"]


def test_with_keys_or_open_to_anyone_any_name_will_do() -> None:
    elsewhere = {"host": "router.example", "origin": "https://app.example"}
    assert client_of(open_to_anyone=True).post("/v1/route", json=ASK, headers=elsewhere).status_code == 200
    with_keys = client_of(ClientKeys([]), clients="clients.yaml")
    assert with_keys.post("/v1/route", json=ASK, headers=elsewhere).status_code == 401
