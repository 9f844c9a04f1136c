"""Who can reach a server that asks for no key: this machine alone, unless told otherwise in so many words."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from router.errors import RequestError, UsageError
from router.policy import printable

if TYPE_CHECKING:
    from router.settings import Settings


def is_loopback(host: str) -> bool:
    """Whether a host as it is written, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def for_this_machine(settings: Settings) -> bool:
    """Whether whoever is on this machine may use the server, and nobody else: no client keys, and not open to anyone."""
    return settings.clients is None and not settings.open_to_anyone


def check_exposure(settings: Settings) -> None:
    """Without client keys a server listens on the loopback interface only, unless told otherwise in so many words.

    Raises
    ------
    UsageError
        Anybody who reaches the address could use the server's provider keys.
    """
    if for_this_machine(settings) and not is_loopback(settings.host):
        raise UsageError(
            f"anybody who reaches {settings.host} could spend your providers' keys: start with --clients FILE, "
            "which `router keys new NAME --clients FILE` writes, or say --open-to-anyone"
        )


class ThisMachineOnly:
    """ASGI middleware that refuses what a page of another site makes a browser on this machine send.

    Any page's requests reach the loopback interface: under a name of its own that was made to point there (DNS rebinding),
    which ``Host`` tells; or across origins, with a body that a browser sends without asking first, which ``Origin`` tells.
    ``refuse`` makes the answer from the path and the error.
    """

    def __init__(self, app: ASGIApp, refuse: Callable[[str, RequestError], Response]) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond = self._app
        if scope["type"] == "http" and (error := _foreign(Headers(scope=scope))) is not None:
            respond = self._refuse(scope["path"], error)
        await respond(scope, receive, send)


def _foreign(headers: Headers) -> RequestError | None:
    """What tells that a request was meant for, or comes from, another place than this machine."""
    host, origin = headers.get("host", ""), headers.get("origin", "")
    # A browser always names a host; what names none is no browser.
    if host and not _names_this_machine(f"http://{host}"):
        what = f"for the host {printable(host)!r}"
    # Programs with a window have schemes of their own; a page without an origin, in a sandbox, is a page all the same.
    elif origin == "null" or (origin.startswith(("http:", "https:")) and not _names_this_machine(origin)):
        what = f"from a page of {printable(origin)!r}"
    else:
        return None
    return RequestError(
        f"This server asks for no key and so answers this machine alone; the request is {what}. "
        "Start it with --clients FILE, or with --open-to-anyone.",
        status=403,
        code="not_allowed",
    )


def _names_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:  # no URL
        return False
