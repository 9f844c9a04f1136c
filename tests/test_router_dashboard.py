"""The dashboard over HTTP: who sees it, what its answers carry, and what it shows."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledgers import entry
from running import WordPredictor, policy
from spending import fill
from starlette.testclient import TestClient

from router.app import create_app
from router.budget_store import Totals, open_store
from router.budgets import Count, periods
from router.clients import Client, ClientKeys
from router.entry import NANO, now
from router.gateway import Gateway
from router.ledger import Ledger
from router.purse import Purse

ADMIN, OTHER = "rk_admin-0123456789", "rk_other-0123456789"
HOSTILE = "<script>alert(1)</script>\"'=1+1"
FILES = ("app.js", "charts.js", "dom.js", "format.js", "theme.js", "page.css", "icon.svg")
DATA = ("spend", "spend.csv", "routing", "requests")
PRICED = {"targets": {name: {"echo": True} for name in ("cheap", "frontier")}, "aliases": {}}
TIERS = {"auto": {"predict": {"weak": "cheap", "strong": "frontier"}}}


def keys() -> ClientKeys:
    return ClientKeys(
        Client(id=name, key_sha256=hashlib.sha256(key.encode()).hexdigest(), admin=key == ADMIN)
        for name, key in (("root", ADMIN), ("other", OTHER))
    )


@contextmanager
def dashboard(
    ledger: Path | None = None, clients: ClientKeys | None = None, secret: bytes | None = None
) -> Iterator[TestClient]:
    """A client of a server that only looks: it does not start what dispatches."""
    with ExitStack() as stack:
        book = None if ledger is None else stack.enter_context(Ledger(str(ledger)))
        mine = policy("http://127.0.0.1:9/v1", tiers=TIERS, **PRICED)
        gateway = Gateway(mine, WordPredictor(), {}, clients, book)
        gateway.login_secret = secret or gateway.login_secret
        yield client_of(create_app(gateway=gateway))


def client_of(app: Any, base_url: str = "http://router.test") -> TestClient:
    return TestClient(app, base_url, follow_redirects=False)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of the last hours, with what hostile clients would call things."""
    path = tmp_path_factory.mktemp("dashboard") / "ledger.db"
    now = time.time_ns() // 1000
    fill(
        str(path),
        [
            entry(
                time=now - 60_000_000 * number,
                mode=HOSTILE if number % 3 else "code",
                feature=HOSTILE,
                session=HOSTILE,
                reason="predicted",
                score=number / 30,
                threshold=0.2,
                bundle="words@0",
            )
            for number in range(25)
        ],
    )
    return path


@pytest.fixture(scope="module")
def open_server(book: Path) -> Iterator[TestClient]:
    """With a ledger, on the loopback interface, without clients' keys."""
    with dashboard(book) as http:
        yield http


@pytest.fixture(scope="module")
def guarded(book: Path) -> Iterator[TestClient]:
    """With clients' keys; each test has its own cookies."""
    with dashboard(book, keys()) as http:
        yield http


@pytest.fixture
def visitor(guarded: TestClient) -> TestClient:
    return fresh(guarded)


def fresh(http: TestClient) -> TestClient:
    """Another browser at the same server."""
    return client_of(http.app)


def log_in(http: TestClient, key: str = ADMIN, **headers: str) -> Any:
    return http.post("/dashboard/login", data={"key": key}, headers=headers)


# --- Who sees it -------------------------------------------------------------------------------------------------


def test_without_clients_keys_nobody_logs_in(open_server: TestClient) -> None:
    page = open_server.get("/dashboard")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<h1" in page.text
    assert open_server.get("/dashboard/spend").status_code == 200
    assert open_server.get("/dashboard/routing").json()["login"] is False
    for answer in (open_server.get("/dashboard/login"), log_in(open_server)):
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")


def test_with_clients_keys_everything_but_the_form_and_its_files_needs_one(visitor: TestClient) -> None:
    page = visitor.get("/dashboard")
    assert (page.status_code, page.headers["location"]) == (303, "/dashboard/login")
    assert page.text == ""
    for name in DATA:
        refused = visitor.get(f"/dashboard/{name}")
        assert (refused.status_code, list(refused.json())) == (401, ["error"]), name
    form = visitor.get("/dashboard/login")
    assert form.status_code == 200
    assert 'type="password"' in form.text
    assert visitor.get("/dashboard/page.css").status_code == 200


def test_an_admin_logs_in_and_out(visitor: TestClient) -> None:
    answer = log_in(visitor)
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
    cookie = answer.headers["set-cookie"]
    flags = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/dashboard", "max-age=43200"} == flags
    assert ADMIN not in cookie
    assert hashlib.sha256(ADMIN.encode()).hexdigest() not in cookie
    assert visitor.get("/dashboard").status_code == 200
    assert [visitor.get(f"/dashboard/{name}").status_code for name in DATA] == [200] * len(DATA)
    assert visitor.get("/dashboard/login").status_code == 303
    assert visitor.get("/dashboard/routing").json()["login"] is True
    out = visitor.post("/dashboard/logout")
    assert (out.status_code, out.headers["location"]) == (303, "/dashboard/login")
    assert visitor.get("/dashboard").status_code == 303
    assert visitor.get("/dashboard/spend").status_code == 401


def test_behind_tls_the_cookie_never_travels_in_the_open(visitor: TestClient) -> None:
    assert "; secure" in log_in(client_of(visitor.app, "https://router.test")).headers["set-cookie"].lower()


@pytest.mark.parametrize(
    ("key", "status", "says"),
    [("rk_wrong", 401, "not one of"), (OTHER, 403, "no admin scope"), ("", 400, "Give")],
)
def test_other_keys_do_not_log_in(visitor: TestClient, key: str, status: int, says: str) -> None:
    refused = log_in(visitor, key)
    assert refused.status_code == status
    assert "set-cookie" not in refused.headers
    assert says in refused.text
    assert "rk_" not in refused.text.replace("rk_…", "")
    assert visitor.get("/dashboard/spend").status_code == 401


def test_a_cookie_of_ones_own_making_does_not_count(visitor: TestClient) -> None:
    for token in ("x", "9999999999~root~" + "0" * 64, ""):
        answer = visitor.get("/dashboard/spend", headers={"cookie": f"router_dashboard={token}"})
        assert answer.status_code == 401


def test_a_program_sends_its_key_as_for_the_api(visitor: TestClient) -> None:
    for key, status in ((ADMIN, 200), (OTHER, 401), ("rk_wrong", 401)):
        answer = visitor.get("/dashboard/spend", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status


def test_the_cookie_is_no_key_of_the_api(visitor: TestClient) -> None:
    log_in(visitor)
    token = visitor.cookies["router_dashboard"]
    assert visitor.get("/v1/spend", headers={"cookie": f"router_dashboard={token}"}).status_code == 401
    assert visitor.get("/v1/spend", headers={"x-api-key": token}).status_code == 401


def test_forms_of_other_sites_do_nothing(visitor: TestClient) -> None:
    elsewhere: list[dict[str, str]] = [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": str(visitor.base_url)},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ]
    for headers in elsewhere:
        refused = log_in(visitor, **headers)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False), headers
    own: list[dict[str, str]] = [{"sec-fetch-site": "same-origin"}, {"origin": str(visitor.base_url)}]
    for headers in own:
        assert log_in(visitor, **headers).status_code == 303
    assert visitor.post("/dashboard/logout", headers=elsewhere[0]).status_code == 403
    assert visitor.get("/dashboard/spend").status_code == 200
    visitor.get("/dashboard/logout")
    assert visitor.get("/dashboard/spend").status_code == 200


def test_wrong_keys_are_slowed_down(book: Path) -> None:
    with dashboard(book, keys()) as http:
        statuses = [log_in(http, f"rk_wrong-{number}").status_code for number in range(11)]
        assert statuses == [401] * 10 + [429]
        assert int(log_in(http).headers["retry-after"]) > 0


def test_a_form_is_no_way_to_fill_memory(visitor: TestClient) -> None:
    refused = visitor.post("/dashboard/login", content=b"key=" + b"x" * 1_000_000)
    assert refused.status_code == 413
    assert visitor.post("/dashboard/login", content=b"\xff\x00%%%").status_code == 400


def test_replicas_with_one_secret_know_each_others_sessions(book: Path) -> None:
    secret = b"one secret of both, 32 characters"
    with dashboard(book, keys(), secret) as first, dashboard(book, keys(), secret) as second:
        log_in(first)
        cookie = {"cookie": f"router_dashboard={first.cookies['router_dashboard']}"}
        assert second.get("/dashboard/spend", headers=cookie).status_code == 200
        with dashboard(book, keys()) as stranger:
            assert stranger.get("/dashboard/spend", headers=cookie).status_code == 401


# --- What its answers carry --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["", "/login", "/spend", "/nothing", "/logout", *(f"/{name}" for name in FILES)]
)
def test_every_answer_keeps_browsers_to_this_server(
    open_server: TestClient, guarded: TestClient, path: str
) -> None:
    for http in (open_server, guarded):
        headers = fresh(http).get(f"/dashboard{path}").headers
        csp = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert csp["default-src"] == "'none'"
        assert csp["script-src"] == csp["style-src"] == csp["connect-src"] == csp["form-action"] == "'self'"
        assert csp["frame-ancestors"] == csp["base-uri"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["", "/login", *(f"/{name}" for name in FILES)])
def test_the_files_name_nobody_else_and_hold_nothing_inline(guarded: TestClient, name: str) -> None:
    http = fresh(guarded)
    if name != "/login":
        log_in(http)
    found = http.get(f"/dashboard{name}")
    assert found.status_code == 200
    text = found.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert not re.search(
        r"\son\w+=|style=|<script>|<style|javascript:|innerHTML|insertAdjacent|document\.write|eval\(", text
    )


def test_the_types_are_what_browsers_want(open_server: TestClient) -> None:
    types = {name: open_server.get(f"/dashboard/{name}").headers["content-type"] for name in FILES}
    assert {kind for name, kind in types.items() if name.endswith(".js")} == {
        "text/javascript; charset=utf-8"
    }
    assert types["page.css"] == "text/css; charset=utf-8"
    assert types["icon.svg"] == "image/svg+xml"


@pytest.mark.parametrize(
    "path", ["nothing", "login.html", "dashboard.html", "..%2Fdashboard.py", "../dashboard.py", "", "a/b"]
)
def test_there_are_no_other_files(open_server: TestClient, path: str) -> None:
    found = open_server.get(f"/dashboard/{path}")
    assert found.status_code == 404
    assert "import" not in found.text


# --- What it shows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24h", "7d", "30d"])
def test_the_data_of_a_period(open_server: TestClient, name: str) -> None:
    spend = open_server.get("/dashboard/spend", params={"range": name, "by": "mode"}).json()
    assert spend["total"]["requests"] == 25
    assert [group["mode"] for group in spend["groups"]] == [HOSTILE, "code"]
    assert spend["summary"].startswith(f"Mode {HOSTILE} takes 64 % of the dollars and 64 % of the tokens: ")
    routing = open_server.get("/dashboard/routing", params={"range": name}).json()
    assert [(one["reason"], one["requests"]) for one in routing["reasons"]] == [("predicted", 25)]
    assert (routing["thresholds"][0]["threshold"], routing["bundle"], routing["curve"]) == (
        0.2,
        "words@0",
        None,
    )
    assert routing["scores"]["scored"] == 25
    over = sum(bin["count"] for bin in routing["scores"]["bins"] if bin["from"] >= 0.2 - 1e-9)
    assert over == sum(number / 30 > 0.2 for number in range(25))
    first = open_server.get("/dashboard/requests", params={"range": name}).json()
    second = open_server.get("/dashboard/requests", params={"range": name, "before": first["next"]}).json()
    assert len(first["requests"]) + len(second["requests"]) == 25
    assert second["next"] is None
    assert first["requests"][0]["feature"] == HOSTILE


def test_what_clients_chose_is_json_and_never_markup(open_server: TestClient) -> None:
    for name in ("spend", "routing", "requests"):
        answer = open_server.get(f"/dashboard/{name}")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert HOSTILE not in open_server.get("/dashboard").text


def test_the_table_to_take_away(open_server: TestClient) -> None:
    answer = open_server.get("/dashboard/spend.csv", params={"range": "7d", "by": "mode"})
    assert answer.headers["content-disposition"] == 'attachment; filename="spend-by-mode-7d.csv"'
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["mode"] for row in rows] == [HOSTILE, "code"]


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("spend", {"by": HOSTILE}),
        ("spend", {"range": HOSTILE}),
        ("spend.csv", {"by": "day"}),
        ("routing", {"range": "1y"}),
        ("requests", {"before": "yesterday"}),
        ("requests", {"before": "²." + "x"}),
        ("requests", {"before": "9" * 30 + ".x"}),
    ],
)
def test_wrong_questions_are_explained(
    open_server: TestClient, path: str, parameters: dict[str, str]
) -> None:
    answer = open_server.get(f"/dashboard/{path}", params=parameters)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["message"]


def test_an_empty_ledger_is_shown_as_one(tmp_path: Path) -> None:
    with dashboard(tmp_path / "empty.db") as http:
        assert http.get("/dashboard/spend").json()["summary"].startswith("No requests")
        assert http.get("/dashboard/requests").json() == {"requests": [], "next": None}
        assert http.get("/dashboard/routing").json()["reasons"] == []


def test_without_a_ledger_it_says_what_to_set_and_still_shows_what_is_in_force() -> None:
    with dashboard() as http:
        assert http.get("/dashboard").status_code == 200
        for name in ("spend", "requests", "spend.csv"):
            answer = http.get(f"/dashboard/{name}")
            assert answer.status_code == 404
            assert "--ledger" in answer.json()["error"]["message"]
        routing = http.get("/dashboard/routing").json()
        assert routing["thresholds"][0]["threshold"] == 0.2
        assert "reasons" not in routing


def test_a_ledger_that_cannot_be_read_is_not_the_readers_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gone.db"
    with dashboard(file) as http:
        file.unlink()
        answer = http.get("/dashboard/spend")
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text
    assert "no ledger" in caplog.text


def test_keys_stand_in_no_log(visitor: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    log_in(visitor, "rk_secret-that-is-wrong")
    assert "a wrong key from testclient" in caplog.text
    assert "rk_secret" not in caplog.text


def test_budgets_are_shown_where_the_policy_has_any(open_server: TestClient, tmp_path: Path) -> None:
    assert open_server.get("/dashboard/budgets").json() == {"budgets": []}
    limits = {"workload": {"month": 10}, "features": {HOSTILE[:64]: {"day": 1}}, "at_limit": "refuse"}
    mine = policy("http://127.0.0.1:9/v1", tiers=TIERS, budgets=limits, **PRICED)
    store = open_store(str(tmp_path / "budgets"))
    purse = Purse(store).open()
    try:
        store.begin({Count("workload", "", periods(now())[0]): Totals(4 * NANO)})
        gateway = Gateway(mine, WordPredictor(), {}, keys(), purse=purse)
        http = client_of(create_app(gateway=gateway))
        assert http.get("/dashboard/budgets").status_code == 401
        log_in(http)
        found = http.get("/dashboard/budgets").json()
    finally:
        purse.close()
    assert found["at_limit"] == "refuse"
    told = [
        (one["scope"], one["name"], one["amount"], one["spent"], one["remaining"]) for one in found["budgets"]
    ]
    assert told == [("workload", None, 10, 4, 6), ("feature", HOSTILE[:64], 1, 0, 1)]


def test_any_policy_is_shown(book: Path) -> None:
    more: dict[str, Any] = {"default_tier": "fixed", "tiers": {"fixed": {"default": "cheap"}}}
    mine = policy("http://127.0.0.1:9/v1", **{**PRICED, **more})
    with Ledger(str(book)) as ledger:
        http = client_of(create_app(gateway=Gateway(mine, None, {}, None, ledger)))
        routing = http.get("/dashboard/routing").json()
    assert (routing["thresholds"], routing["bundle"], routing["scores"]["bins"]) == ([], None, [])
