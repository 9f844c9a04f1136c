"""The dashboard in headless Chromium: a login, figures, keys, hostile names, both themes, and the width of a phone.

``make test-dashboard`` runs it, with Playwright in an environment of its own and the Chromium of the machine, and leaves pictures
in ``build/dashboard`` for people to look at. It needs no network: every request of the page is held against its own server.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledgers import entry
from playwright.sync_api import Browser, Page, expect, sync_playwright
from provider import serve
from running import WordPredictor, policy
from spending import fill, sessions

from router.app import create_app
from router.budget_store import Totals, open_store
from router.budgets import Count, periods
from router.bundle import CostQualityCurve
from router.clients import Client, ClientKeys
from router.entry import NANO, now
from router.gateway import Gateway
from router.ledger import Ledger
from router.purse import Purse

PICTURES = Path(__file__).parent.parent / "build" / "dashboard"
CHROMIUM = os.environ.get("ROUTER_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
KEY = "rk_admin-0123456789"
HOSTILE = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
PARTS = ("#over-time svg", "#groups table", "#saving svg", "#reasons table", "#scores svg", "#curve svg")

# A curve as fit writes it: quality over the share of strong calls, above the line of chance.
_SHARES = [index / 100 for index in range(101)]
CURVE = CostQualityCurve(
    axis="strong_share",
    rows=16_086,
    thresholds=tuple(0.8 - 0.85 * share**0.45 for share in _SHARES),
    spend=tuple(_SHARES),
    quality=tuple(0.676 + 0.141 * (1.35 * share - 0.35 * share**3) for share in _SHARES),
    alone={"weak": (0.0, 0.676), "strong": (1.0, 0.817)},
)


class Predictor(WordPredictor):
    """What the dashboard reads of a bundle."""

    threshold = 0.2367

    def __init__(self, curve: CostQualityCurve | None = CURVE) -> None:
        self.manifest = SimpleNamespace(curve=curve)


@contextmanager
def server(
    ledger: Path | None,
    clients: ClientKeys | None = None,
    curve: CostQualityCurve | None = CURVE,
    budgets: Any = None,
    purse: Purse | None = None,
) -> Iterator[str]:
    predictor = Predictor(curve)
    book = None if ledger is None else Ledger(str(ledger)).open()
    echo = {name: {"echo": True} for name in ("cheap", "frontier")}
    tiers = {"auto": {"predict": {"weak": "cheap", "strong": "frontier"}}}
    mine = policy("http://127.0.0.1:9/v1", targets=echo, aliases={}, tiers=tiers, budgets=budgets)
    with serve(create_app(gateway=Gateway(mine, predictor, {}, clients, book, purse=purse))) as url:
        yield url


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A month of a team of agents."""
    path = tmp_path_factory.mktemp("browser") / "ledger.db"
    predictor = Predictor()
    fill(str(path), sessions(time.time_ns() // 1000, 30, 8, predictor.name, predictor.threshold))
    return path


@pytest.fixture(scope="module")
def url(ledger: Path) -> Iterator[str]:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with server(ledger, ClientKeys([Client(id="root", key_sha256=digest, admin=True)])) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium is installed; ROUTER_TEST_CHROMIUM names one")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))


@contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    width: int = 1280,
    height: int = 900,
    scheme: Any = "light",
    enter: bool = True,
) -> Iterator[Page]:
    """A page at the dashboard, which must not complain, nor ask anybody else for anything."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(30_000)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on(
        "console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/dashboard")
    if enter and page.url.endswith("/login"):
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
    yield page
    assert [one for one in asked if not one.startswith(f"{url}/dashboard")] == []
    assert complaints == []
    context.close()


def settled(page: Page) -> None:
    for part in (*PARTS, "#requests tbody tr"):
        page.wait_for_selector(part)
    page.wait_for_selector("main:not([aria-busy])")


def fits(page: Page) -> bool:
    """Nothing makes the page wider than its window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 360, "light"), ("phone-dark", 360, "dark")],
)
def test_a_person_finds_out_where_the_money_goes(
    browser: Browser, url: str, name: str, width: int, scheme: str
) -> None:
    with opened(browser, url, width=width, scheme=scheme) as page:
        settled(page)
        started = time.monotonic()
        # The answer is on the first screen, without scrolling.
        box = page.locator("#answer").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 300
        assert "of the dollars" in page.inner_text("#answer")
        assert page.locator(".tile").count() == 4
        assert fits(page)
        bright = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        assert (max(bright) < 60) == (scheme == "dark")
        page.screenshot(path=PICTURES / f"{name}.png")
        page.screenshot(path=PICTURES / f"{name}-whole.png", full_page=True)
        assert time.monotonic() - started < 30
        # What hangs over the edge of a card is cut off: the tables fit into theirs.
        for part in ("#groups", "#reasons", "#requests"):
            wide = page.locator(part).evaluate("node => [node.scrollWidth, node.clientWidth]")
            assert wide[0] <= wide[1], part


def test_logging_in_and_out(browser: Browser, url: str) -> None:
    with opened(browser, url, enter=False) as page:
        expect(page.locator("#key")).to_be_focused()
        page.screenshot(path=PICTURES / "login.png")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        settled(page)
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/dashboard/login")
        page.goto(f"{url}/dashboard")
        assert page.url.endswith("/dashboard/login")


def test_a_wrong_key_is_told(browser: Browser, url: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{url}/dashboard/login")
    page.fill("#key", "rk_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("This key is not one of this server's.")
    context.close()


def test_a_session_that_ended_leads_back_to_the_form(browser: Browser, url: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{url}/dashboard")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    settled(page)
    context.clear_cookies()
    page.click("#refresh")
    page.wait_for_url("**/dashboard/login")
    context.close()


def test_another_time_and_another_group(browser: Browser, url: str) -> None:
    with opened(browser, url) as page:
        settled(page)
        week = page.inner_text("#sizes")
        page.get_by_role("radio", name="30 d").check(force=True)
        page.wait_for_function("before => document.getElementById('sizes').textContent !== before", arg=week)
        page.get_by_role("radio", name="Target").check(force=True)
        page.wait_for_function("() => document.querySelector('#groups th').textContent === 'target'")
        names = page.locator("#groups tbody th").all_inner_texts()
        assert {name.strip() for name in names} == {"small", "medium", "frontier"}
        shares = [
            float(text.split()[0].strip("<>"))
            for text in page.locator("#groups tbody td:nth-child(2)").all_inner_texts()
        ]
        assert shares == sorted(shares, reverse=True)
        assert "range=30d" in page.url
        assert "by=target" in page.url
        page.reload()  # the address says it all
        settled(page)
        assert page.locator("#groups th").first.inner_text() == "target"
        with page.expect_download() as download:
            page.get_by_role("link", name="Download CSV").click()
        assert download.value.suggested_filename == "spend-by-target-30d.csv"
        page.get_by_role("radio", name="24 h").check(force=True)
        page.wait_for_function("() => document.querySelectorAll('#over-time tbody tr').length === 24")
        assert page.locator("#over-time .numbers tbody tr").count() == 24


def test_by_keyboard_alone(browser: Browser, url: str) -> None:
    with opened(browser, url) as page:
        settled(page)

        def focused() -> Any:
            return page.evaluate(
                "() => { const at = document.activeElement; return at.id || at.className || at.value; }"
            )

        page.keyboard.press("Tab")
        assert focused() == "skip"
        box = page.locator(".skip").bounding_box()
        assert box is not None
        assert box["y"] >= 0
        page.keyboard.press("Enter")
        assert focused() == "main"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.name") == "by"
        page.keyboard.press("ArrowRight")
        page.wait_for_function("() => document.querySelector('#groups th').textContent === 'feature'")
        outline = page.evaluate(
            "getComputedStyle(document.querySelector('#by input:checked + span')).outlineStyle"
        )
        assert outline == "solid"
        page.keyboard.press("Tab")  # the chart: arrows read it
        page.keyboard.press("End")
        last = page.inner_text("#over-time figcaption")
        page.keyboard.press("ArrowLeft")
        before = page.inner_text("#over-time figcaption")
        assert last != before
        assert "$" in before
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # its numbers as a table
        expect(page.locator("#over-time details")).to_have_attribute("open", "")
        details = page.locator("#requests button").first
        details.focus()
        page.keyboard.press("Enter")
        expect(details).to_have_attribute("aria-expanded", "true")
        expect(page.locator("#requests .details").first).to_contain_text("Session")
        page.keyboard.press("Enter")
        expect(page.locator("#requests .details").first).to_be_hidden()


def test_older_requests_are_added(browser: Browser, url: str) -> None:
    with opened(browser, url) as page:
        settled(page)
        rows = page.locator("#requests tbody tr:not(.details)")
        first = rows.count()
        page.get_by_role("button", name="Show older").click()
        expect(rows).to_have_count(2 * first)
        times = page.locator("#requests .when").all_inner_texts()
        assert len(set(times)) > first


def test_a_theme_of_ones_own_stays(browser: Browser, url: str) -> None:
    with opened(browser, url, scheme="light") as page:
        settled(page)
        page.click("#theme")
        page.click("#theme")
        assert page.get_attribute("html", "data-theme") == "dark"
        page.reload()
        assert page.get_attribute("html", "data-theme") == "dark"
        settled(page)


def test_everything_has_a_name_for_those_who_do_not_see_it(browser: Browser, url: str) -> None:
    with opened(browser, url) as page:
        settled(page)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('button, a, input, svg[role=img], table, section')].filter((node) =>
                 !(node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length
                   || node.querySelector('caption, img[alt]'))).map((node) => node.outerHTML)"""
        )
        assert nameless == []
        assert page.evaluate("[...document.querySelectorAll('th')].every((head) => head.scope)")
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
        assert len(ids) == len(set(ids))
        assert page.locator("figure svg").count() == page.locator("figure details table").count() == 4


def test_what_hostile_clients_call_things_stays_text(browser: Browser, tmp_path: Path) -> None:
    now = time.time_ns() // 1000
    rows = [
        entry(
            time=now - number * 1_000_000,
            request=HOSTILE,
            session=HOSTILE,
            client=HOSTILE,
            tier=HOSTILE,
            mode=HOSTILE if number % 2 else f"{number}{HOSTILE}",
            feature=HOSTILE,
            dialect=HOSTILE,
            reason=HOSTILE,
            target=HOSTILE,
            model=HOSTILE,
            bundle="words@0",
            score=0.1,
            threshold=0.2,
            error=HOSTILE,
            status=500,
            strongest=HOSTILE,
        )
        for number in range(6)
    ]
    fill(str(tmp_path / "ledger.db"), rows)
    with server(tmp_path / "ledger.db") as url, opened(browser, url, width=360) as page:
        settled(page)
        for index in range(7):
            page.locator("#by input").nth(index).check(force=True)
            page.wait_for_selector("main:not([aria-busy])")
        for button in page.locator("#requests button").all():
            button.click()
        page.locator("#over-time svg").hover()
        assert page.title() == "Where the money goes · Router"
        assert page.locator("main img, main script").count() == 0
        assert "<script>" in page.inner_text("#requests .details >> nth=0")
        page.screenshot(path=PICTURES / "hostile.png", full_page=True)
        assert fits(page)


@pytest.mark.parametrize("width", [1280, 360])
def test_budgets_are_bars(browser: Browser, ledger: Path, tmp_path: Path, width: int) -> None:
    limits = {
        "workload": {"month": 200, "day": 2},
        "keys": {"ci": {"month": 50}},
        "features": {HOSTILE[:64]: {"day": 5}},
    }
    store = open_store(str(tmp_path / "budgets"))
    purse = Purse(store).open()
    month, day = periods(now())
    spent = {Count("workload", "", month): 120, Count("workload", "", day): 2, Count("key", "ci", month): 1}
    store.begin({count: Totals(dollars * NANO) for count, dollars in spent.items()})
    with server(ledger, budgets=limits, purse=purse) as url, opened(browser, url, width=width) as page:
        settled(page)
        rows = page.locator("#budgets tbody tr")
        expect(rows).to_have_count(4)
        expect(rows.nth(0)).to_contain_text("60")
        expect(rows.nth(1)).to_contain_text("used up: everything goes to the cheapest target")
        assert page.locator("#budgets img").count() == 0
        wide = page.locator("#budgets").evaluate("node => [node.scrollWidth, node.clientWidth]")
        assert wide[0] <= wide[1]
        page.locator("#budgets-card").screenshot(path=PICTURES / f"budgets-{width}.png")
    purse.close()


def test_an_empty_ledger(browser: Browser, tmp_path: Path) -> None:
    with server(tmp_path / "ledger.db") as url, opened(browser, url) as page:
        page.wait_for_selector("#curve svg")
        page.wait_for_selector("main:not([aria-busy])")
        assert page.inner_text("#answer").startswith("No requests")
        assert page.locator(".empty").count() == 5
        assert page.locator("#logout").is_hidden()
        page.screenshot(path=PICTURES / "empty.png", full_page=True)


def test_without_a_ledger(browser: Browser) -> None:
    with server(None) as url:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.goto(f"{url}/dashboard")
        page.wait_for_selector("#curve svg")
        expect(page.locator("#notice")).to_contain_text("--ledger default")
        expect(page.locator("[data-ledger]").first).to_be_hidden()
        page.screenshot(path=PICTURES / "no-ledger.png", full_page=True)
        context.close()


def test_a_bundle_without_a_curve_says_so(browser: Browser, ledger: Path) -> None:
    with server(ledger, curve=None) as url, opened(browser, url) as page:
        expect(page.locator("#curve")).to_contain_text("carries no curve")
