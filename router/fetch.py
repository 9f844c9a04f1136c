"""GET one small document from a URL that is not trusted: how far it may lead, how large it may be, how long it may take.

A server that fetches what a URL says can be led to where only it can go: to the metadata service of a cloud, to an
administrator's page of its network. So a name is resolved here, every address that it has is checked, and the
connection goes to an address that was checked, not to what the name stands for a moment later.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from router import __version__
from router.errors import RouterError, UsageError
from router.exposure import is_loopback

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_MOST_REDIRECTS = 5
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
# IPv6 addresses that a network may translate to the IPv4 address in their last 32 bits.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(RouterError):
    """A document cannot be fetched. The message says why; it holds nothing of the document."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a fetch may do.

    Attributes
    ----------
    allow_redirects : bool
        Follow up to five; each address is checked as the first.
    allow_private : bool
        Also addresses that are not public: loopback, private, link-local.
    max_bytes : int
    seconds : float
        For all of it: resolving, connecting, redirects, reading.
    """

    allow_redirects: bool = False
    allow_private: bool = False
    max_bytes: int = 2**20
    seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Document:
    """What was fetched, with what the server wants to be asked by the next time."""

    content: bytes
    etag: str | None = None
    last_modified: str | None = None

    def conditions(self) -> dict[str, str]:
        """Headers of a request that wants the document only where it has changed."""
        given = {"if-none-match": self.etag, "if-modified-since": self.last_modified}
        return {name: value for name, value in given.items() if value}


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system's resolver gives them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


@dataclass
class Fetcher:
    """Fetches documents under rules.

    Parameters
    ----------
    rules : Rules
    resolver : callable, optional
        Name and port to addresses.
    transport : httpx.AsyncBaseTransport, optional
        In place of the network.
    """

    rules: Rules = field(default_factory=Rules)
    resolver: Resolver = resolve
    transport: httpx.AsyncBaseTransport | None = None
    _tls: ssl.SSLContext | None = field(default=None, init=False, repr=False)

    async def fetch(self, url: str, known: Document | None = None) -> Document:
        """The document at ``url``; ``known`` itself where the server says that it has not changed.

        Raises
        ------
        FetchError
        """
        try:
            async with asyncio.timeout(self.rules.seconds):
                return await self._fetch(url, known)
        except TimeoutError:
            raise FetchError(f"no whole answer within {self.rules.seconds:g} s") from None
        except httpx.HTTPError as error:
            raise FetchError(_words(error)) from None

    async def _fetch(self, url: str, known: Document | None) -> Document:
        if self._tls is None and self.transport is None:
            # Reading the certificate authorities takes 20 ms and more.
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        # Environment variables may name a proxy: that would resolve names itself, and undo the check of addresses.
        async with httpx.AsyncClient(
            verify=self._tls or True,
            trust_env=False,
            transport=self.transport,
            timeout=httpx.Timeout(self.rules.seconds, connect=self.rules.seconds / 2),
            follow_redirects=False,
        ) as client:
            written = True  # by whoever runs the server, and not by another server
            for _ in range(_MOST_REDIRECTS + 1):
                response = await self._send(client, url, known, written)
                try:
                    if response.status_code not in _REDIRECTS:
                        return await self._document(response, known)
                finally:
                    await response.aclose()
                if not self.rules.allow_redirects:
                    raise FetchError(
                        "answers with a redirect, which is not followed: give the address it leads to, or "
                        "--policy-allow-redirects"
                    )
                url, written = _joined(url, response.headers.get("location", "")), False
        raise FetchError(f"over {_MOST_REDIRECTS} redirects")

    async def _send(
        self, client: httpx.AsyncClient, url: str, known: Document | None, written: bool
    ) -> httpx.Response:
        """Ask a checked address, under the name that the URL gives; where it cannot be reached, the next one."""
        scheme, host, port = check_url(url) if written else _redirected(url, self.rules)
        parsed = httpx.URL(url)
        headers = {
            "host": parsed.netloc.decode("ascii"),
            "user-agent": f"llm-difficulty-router/{__version__}",
            "accept": "application/yaml, application/json, text/plain, */*;q=0.5",
            # What is packed can be a thousand times as large as it looks.
            "accept-encoding": "identity",
            **(known.conditions() if known else {}),
        }
        addresses = await self._addresses(host, port, loopback=written and is_loopback(host))
        for last, address in enumerate(addresses, 1 - len(addresses)):
            request = client.build_request(
                "GET",
                parsed.copy_with(host=str(address)),
                headers=headers,
                # The certificate has to be the name's.
                extensions={"sni_hostname": host} if scheme == "https" else {},
            )
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if last == 0:
                    raise
        raise FetchError(f"the name {host} has no address")

    async def _addresses(self, host: str, port: int, *, loopback: bool) -> list[Address]:
        """Where a host is: all of it allowed, or :class:`FetchError`."""
        try:
            found = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                names = await self.resolver(host, port)
            except OSError as error:
                raise FetchError(f"the name {host} cannot be resolved ({error.strerror})") from None
            found = [ipaddress.ip_address(name.partition("%")[0]) for name in names]
        for address in found:
            if loopback and address.is_loopback:
                continue
            if not (self.rules.allow_private or is_public(address)):
                raise FetchError(
                    f"{host} is at {address}, which is not a public address; --policy-allow-private allows it"
                )
        return found

    async def _document(self, response: httpx.Response, known: Document | None) -> Document:
        if response.status_code == 304 and known is not None:
            return known
        if response.status_code != 200:
            raise FetchError(f"answers with status {response.status_code}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError("answers with packed content, which was not asked for")
        limit = self.rules.max_bytes
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise FetchError(f"over the limit of {limit:,} bytes")
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > limit:
                raise FetchError(f"over the limit of {limit:,} bytes")
            chunks.append(chunk)
        return Document(
            b"".join(chunks),
            _validator(response.headers.get("etag")),
            _validator(response.headers.get("last-modified")),
        )


def check_url(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL that a document may be fetched from.

    Raises
    ------
    UsageError
        It is none: not https (http is for loopback addresses), or with a password in it.
    """
    shown = shown_url(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        # httpx sends the request; what it takes for the host has to be the same.
        same = httpx.URL(url).host == host
    except (ValueError, httpx.InvalidURL):
        raise UsageError(f"{shown}: not a URL") from None
    if parts.scheme not in ("https", "http"):
        raise UsageError(f"{shown}: a policy comes from a file, https, or http on a loopback address")
    if not host or not same or not host.isascii() or any(ord(sign) <= 32 for sign in url):
        raise UsageError(f"{shown}: not a URL with a host that can be asked")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{shown}: a policy's URL holds no user name and no password")
    if parts.scheme == "http" and not is_loopback(host):
        raise UsageError(f"{shown}: http is for loopback addresses alone; use https")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def shown_url(url: str) -> str:
    """A URL as it may stand in logs and answers: the query, where secrets are put, and passwords left out."""
    head, _, rest = url.partition("://")
    place = rest.split("?")[0].split("#")[0]
    authority, slash, path = place.partition("/")
    return f"{head}://{authority.rpartition('@')[2]}{slash}{path}"


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also by the IPv4 address that it may stand for."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None:
            return False  # tunnels of the past, which end wherever the address says
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _redirected(url: str, rules: Rules) -> tuple[str, str, int]:
    try:
        scheme, host, port = check_url(url)
    except UsageError as error:
        raise FetchError(f"redirects to {error}") from None
    if scheme == "http" and not rules.allow_private:
        raise FetchError(f"redirects to {shown_url(url)}, a loopback address")
    return scheme, host, port


def _joined(url: str, location: str) -> str:
    try:
        return str(httpx.URL(url).join(location))
    except (httpx.InvalidURL, ValueError):
        raise FetchError("answers with a redirect to something that is not a URL") from None


def _validator(value: Any) -> str | None:
    # It is sent back as it came: nothing that could be more than one header's value.
    return (
        value
        if isinstance(value, str) and value.isascii() and value.isprintable() and len(value) <= 1024
        else None
    )


def _words(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectError):
        return f"cannot be reached ({error or type(error).__name__})"
    return f"broke off ({type(error).__name__})"
