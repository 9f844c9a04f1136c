"""The page at ``/dashboard``: who may see it, and what it reads.

All of it comes from this process: the files in ``page/``, and JSON. Where the server has clients' keys, an admin logs in
with one (:mod:`router.login`), or a program sends it as for the API. Nothing here changes anything but the login.
"""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from router.clients import KEY_HEADERS
from router.entry import now
from router.errors import BudgetError, LedgerError, RequestError, UsageError
from router.login import SESSION_SECONDS, Logins
from router.schemas import to_json

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from router.bundle import Manifest
    from router.gateway import Gateway
    from router.panels import Period

logger = logging.getLogger("router")

T = TypeVar("T")

PATH = "/dashboard"
COOKIE = "router_dashboard"

_FOLDER = Path(__file__).parent / "page"
_TYPES = MappingProxyType(
    {
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
        ".html": "text/html; charset=utf-8",
    }
)
# Nothing but this server's own files and answers, no markup made of text, and in nobody's frame.
_SAFE: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        # A form's Origin must be there to be checked, which "no-referrer" would take away.
        "referrer-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }
)
_LONGEST_FORM = 4096  # bytes
_READERS = 2  # at a time, so that looking never takes all threads

_NO_LEDGER = "This server keeps no ledger: start it with --ledger default, or set ROUTER_LEDGER."


class Dashboard:
    """The page of one server.

    Parameters
    ----------
    gateway : Gateway
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._logins = Logins(gateway.clients, gateway.login_secret) if gateway.clients is not None else None
        self._files = {file.name: file.read_bytes() for file in _FOLDER.iterdir() if file.suffix in _TYPES}
        self._reading = asyncio.Semaphore(_READERS)
        self.app = Starlette(
            routes=[
                Route("/login", self._login_page),
                Route("/login", self._login, methods=["POST"]),
                Route("/logout", self._logout, methods=["POST"]),
                Route("/spend", self._guarded(self._spend)),
                Route("/spend.csv", self._guarded(self._spend_csv)),
                Route("/routing", self._guarded(self._routing)),
                Route("/requests", self._guarded(self._requests)),
                Route("/budgets", self._guarded(self._budgets)),
                Route("/{file}", self._file),
            ],
            exception_handlers={HTTPException: self._http_error},
        )

    async def page(self, request: Request) -> Response:
        """The page itself, or where to log in."""
        if not self._may_see(request):
            return _to(f"{PATH}/login")
        return self._sent("dashboard.html")

    def _may_see(self, request: Request) -> bool:
        """Whether a request comes from an admin: by the cookie, or by a key in its headers."""
        clients = self._gateway.clients
        if self._logins is None or clients is None:
            return True
        if self._logins.client(request.cookies.get(COOKIE, "")) is not None:
            return True
        if not any(name in request.headers for name in KEY_HEADERS):
            return False
        try:
            return clients.identify(request.headers).admin
        except RequestError:
            return False

    def _guarded(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            if not self._may_see(request):
                return _error(401, "Log in first, or send a key with the admin scope.")
            try:
                return await handle(request)
            except RequestError as error:
                return _error(error.status, str(error))
            except UsageError as error:
                return _error(400, str(error).replace("--", ""))
            except LedgerError as error:
                logger.error("%s", error)
                return _error(503, "The ledger cannot be read; the log says why.")
            except BudgetError as error:
                logger.error("%s", error)
                return _error(503, "The budgets cannot be read; the log says why.")

        return guarded

    async def _login_page(self, request: Request) -> Response:
        return _to(PATH) if self._may_see(request) else self._form()

    async def _login(self, request: Request) -> Response:
        if self._logins is None:
            return _to(PATH)
        if not _is_own(request):
            return self._form("This form was sent by another site.", 403)
        try:
            token = self._logins.open(await _key(request), request.client.host if request.client else "")
        except RequestError as error:
            return self._form(str(error), error.status, error.headers)
        answer = _to(PATH)
        answer.set_cookie(COOKIE, token, max_age=SESSION_SECONDS, **_cookie(request))
        return answer

    async def _logout(self, request: Request) -> Response:
        if not _is_own(request):
            return _error(403, "This form was sent by another site.")
        answer = _to(f"{PATH}/login")
        answer.delete_cookie(COOKIE, **_cookie(request))
        return answer

    async def _spend(self, request: Request) -> Response:
        from router.panels import spend

        by, period = request.query_params.get("by", "mode"), _period(request)
        return _json(await self._read(lambda connection: spend(connection, by, period)))

    async def _spend_csv(self, request: Request) -> Response:
        from router.panels import spend_csv

        by, period = request.query_params.get("by", "mode"), _period(request)
        found = await self._read(lambda connection: spend_csv(connection, by, period))
        name = f"spend-by-{by}-{period.name}.csv"  # both are among the few that there are
        headers = {**_SAFE, "content-disposition": f'attachment; filename="{name}"'}
        return Response(found, headers=headers, media_type="text/csv")

    async def _routing(self, request: Request) -> Response:
        """Reasons and scores of a period, where there is a ledger, and what is in force."""
        from router.panels import in_force, reasons, scores

        period, now = _period(request), self._gateway.in_force
        manifest: Manifest | None = getattr(now.predictor, "manifest", None)
        shown = in_force(now.policy, manifest) | {"bundle": now.bundle, "login": self._logins is not None}
        threshold = next((one["threshold"] for one in shown["thresholds"]), None)

        def read(connection: Connection) -> dict[str, Any]:
            return {
                "reasons": reasons(connection, period),
                "scores": scores(connection, period, now.bundle, threshold),
            }

        if self._gateway.ledger is not None:
            shown |= await self._read(read)
        return _json(shown)

    async def _requests(self, request: Request) -> Response:
        from router.panels import requests

        period, before = _period(request), _before(request)
        return _json(await self._read(lambda connection: requests(connection, period, before)))

    async def _budgets(self, _: Request) -> Response:
        """How the budgets stand, as `/v1/budgets` tells it; none where the policy has none."""
        budgets, purse = self._gateway.in_force.policy.budgets, self._gateway.purse
        if budgets is None or purse is None:
            return _json({"budgets": []})
        from router.budget_report import as_json, read_standings

        async with self._reading:
            found = await asyncio.to_thread(read_standings, budgets, purse.store, now())
        return _json(as_json(budgets, found))

    async def _read(self, query: Callable[[Connection], T]) -> T:
        """What a query of the ledger gives; off the event loop."""
        ledger = self._gateway.ledger
        if ledger is None:
            raise RequestError(_NO_LEDGER, status=404)
        from router.panels import reading

        def read() -> T:
            with reading(ledger.url) as connection:
                return query(connection)

        async with self._reading:
            return await asyncio.to_thread(read)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["file"]
        if name not in self._files or name.endswith(".html"):
            raise HTTPException(404)
        return self._sent(name)

    def _form(
        self, problem: str = "", status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Response:
        page = self._files["login.html"].replace(b"{problem}", html.escape(problem).encode())
        return Response(page, status, {**_SAFE, **(headers or {})}, media_type=_TYPES[".html"])

    def _sent(self, name: str) -> Response:
        return Response(self._files[name], headers=dict(_SAFE), media_type=_TYPES[Path(name).suffix])

    async def _http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, f"{error.detail}.")


def _period(request: Request) -> Period:
    from router.panels import Period

    return Period.of(request.query_params.get("range", "7d"), datetime.now(UTC))


def _before(request: Request) -> tuple[int, str] | None:
    """The row that a page of requests begins behind."""
    given = request.query_params.get("before")
    if given is None:
        return None
    micros, _, name = given.partition(".")
    if not (micros.isascii() and micros.isdecimal() and len(micros) <= 18 and 0 < len(name) <= 64):
        raise RequestError("'before' must be the 'next' of an answer.")
    return int(micros), name


async def _key(request: Request) -> str:
    """The key in a form; :class:`RequestError` where there is none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_FORM:
            raise RequestError("This is no key: it is too long.", status=413)
    key = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
    if not key:
        raise RequestError("Give a client's key that has the admin scope.")
    return key


def _is_own(request: Request) -> bool:
    """Whether a form was sent by this page: browsers say from where, and leave other sites no way to say otherwise."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _cookie(request: Request) -> dict[str, Any]:
    return {
        "path": PATH,
        "httponly": True,
        "samesite": "strict",
        "secure": request.url.scheme == "https",
    }


def _to(path: str) -> Response:
    return RedirectResponse(path, status_code=303, headers=dict(_SAFE))


def _json(data: Any) -> Response:
    return Response(to_json(data), headers=dict(_SAFE), media_type="application/json")


def _error(status: int, message: str) -> Response:
    body = to_json({"error": {"message": message}})
    return Response(body, status, dict(_SAFE), media_type="application/json")
