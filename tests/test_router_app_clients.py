"""The server with clients' keys, over HTTP and against the loopback provider."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running import Running, running

from router.clients import Client, ClientKeys

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def key(name: str) -> str:
    return f"rk_key-of-{name}-0123456789"


def client(name: str, **fields: Any) -> Client:
    return Client(id=name, key_sha256=hashlib.sha256(key(name).encode()).hexdigest(), **fields)


CLIENTS = [
    client("alice", tiers={"balanced"}, targets={"cheap"}),
    client("tuner", threshold_override=True),
    client("root", admin=True),
    client("hasty", requests_per_minute=2),
    client("thrifty", tokens_per_minute=600),
    client("streamer", tokens_per_minute=600),
    client("prober", requests_per_minute=1),
]


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    with running(clients=ClientKeys(CLIENTS), limits={"threshold_override": True}) as started:
        yield started


@pytest.fixture
def http(router: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=router.url, timeout=20) as opened:
        yield opened


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key(name)}"}


@pytest.mark.parametrize(
    ("method", "path"), [("POST", CHAT), ("POST", "/v1/route"), ("GET", "/v1/models"), ("GET", "/metrics")]
)
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer rk_wrong"}, {"x-api-key": "sk-any"}])
def test_without_a_good_key_it_is_401(
    http: httpx.Client, router: Running, method: str, path: str, headers: dict[str, str]
) -> None:
    before = len(router.provider.seen)
    answer = http.request(method, path, json=ASK if method == "POST" else None, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "rk_wrong" not in answer.text
    assert len(router.provider.seen) == before


def test_a_body_is_not_read_of_who_has_no_key(http: httpx.Client) -> None:
    assert http.post(CHAT, content=b"{").status_code == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_a_good_key_is_let_in_and_goes_no_further(http: httpx.Client, router: Running, header: str) -> None:
    value = f"Bearer {key('alice')}" if header == "authorization" else key("alice")
    answer = http.post(CHAT, json={**ASK, "model": "balanced"}, headers={header: value})
    assert answer.status_code == 200
    sent = router.provider.last
    assert key("alice") not in str(sent.headers) + str(sent.body)
    assert key("alice") not in str(answer.headers) + answer.text


def test_what_a_key_may_ask_for(http: httpx.Client) -> None:
    listed = {model["id"] for model in http.get("/v1/models", headers=as_("alice")).json()["data"]}
    assert {"balanced", "cheap"} <= listed
    assert not listed & {"auto", "frontier", "echo", "gpt-4o"}
    everything = {model["id"] for model in http.get("/v1/models", headers=as_("root")).json()["data"]}
    assert {"auto", "balanced", "cheap", "frontier", "gpt-4o"} <= everything
    for path in (CHAT, "/v1/route"):
        assert http.post(path, json={**ASK, "model": "cheap"}, headers=as_("alice")).status_code == 200
        for model in ("auto", "gpt-4o", "frontier"):
            answer = http.post(path, json={**ASK, "model": model}, headers=as_("alice"))
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["param"]) == (403, "permission_error", "model")
            assert "it may ask for: balanced" in error["message"]
        # No model is `auto`, the default tier.
        assert http.post(path, json=ASK, headers=as_("alice")).status_code == 403
    # What a tier chooses is the tier's business: `frontier` is not on the list, and `plan` goes there.
    planned = http.post("/v1/route", json={**ASK, "model": "balanced:plan"}, headers=as_("alice"))
    assert planned.json()["target"] == "frontier"


def test_leave_to_override_the_threshold_is_the_key_s(http: httpx.Client) -> None:
    override = {"x-router-threshold": "0.01"}
    assert http.post("/v1/route", json=ASK, headers=as_("tuner") | override).json()["threshold"] == 0.01
    # The policy's leave is for servers without keys.
    assert http.post("/v1/route", json=ASK, headers=as_("root") | override).status_code == 403


def test_what_shows_other_clients_traffic_wants_the_admin_scope(http: httpx.Client) -> None:
    assert http.get("/metrics", headers=as_("root")).status_code == 200
    refused = http.get("/metrics", headers=as_("alice"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert http.get("/healthz").json() == {"status": "ok"}
    for headers in ({}, as_("alice"), {"x-api-key": "rk_wrong"}):
        assert http.get("/readyz", headers=headers).json() == {"status": "ready"}
    assert http.get("/readyz", headers=as_("root")).json().keys() >= {"policy", "bundle", "dispatch"}


def test_over_the_rate_of_requests(http: httpx.Client) -> None:
    answers = [http.post("/v1/route", json=ASK, headers=as_("hasty")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


def test_looking_around_does_not_count_in_the_rate(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.get("/v1/models", headers=as_("prober")).status_code == 200
    assert http.post("/v1/route", json=ASK, headers=as_("prober")).status_code == 200


def test_over_the_rate_of_tokens(http: httpx.Client) -> None:
    def ask() -> int:
        body = {**ASK, "model": "balanced"}
        return http.post(CHAT, json=body, headers=as_("thrifty")).status_code

    # 12 tokens a request, and 10 come back every second.
    statuses = [ask() for _ in range(80)]
    assert 50 <= statuses.index(429) <= 75
    assert set(statuses) == {200, 429}


def test_tokens_that_no_provider_counted_are_estimated(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 4000}], "model": "silent", "stream": True}
    first = http.post(CHAT, json=body, headers=as_("streamer"))
    assert "usage" not in first.text
    second = http.post(CHAT, json=body, headers=as_("streamer"))
    assert (first.status_code, second.status_code) == (200, 429)


def test_the_log_names_the_client_and_never_its_key(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        http.post("/v1/route", json=ASK, headers=as_("tuner"))
        http.post("/v1/route", json=ASK, headers={"x-api-key": "rk_wrong-0123456789"})
    lines = [record.getMessage() for record in caplog.records if record.name == "router"]
    assert "client=tuner " in lines[0]
    assert "client=- " in lines[1]
    assert " 401 " in lines[1]
    assert "rk_" not in caplog.text


def test_without_clients_anybody_may_and_any_key_will_do() -> None:
    with running() as started:
        answer = httpx.post(f"{started.url}/v1/route", json=ASK, headers={"authorization": "Bearer anything"})
        assert answer.status_code == 200
        assert httpx.get(f"{started.url}/metrics").status_code == 200
