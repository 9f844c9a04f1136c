from __future__ import annotations

import asyncio
import gzip
import ipaddress
import shutil
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from router.errors import UsageError
from router.fetch import Document, Fetcher, FetchError, Rules, check_url, is_public, shown_url

PUBLIC = "93.184.215.14"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def names(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolver(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolver


def fetched(
    url: str,
    answer: Callable[[httpx.Request], httpx.Response],
    *addresses: str,
    rules: Rules = Rules(),
    known: Document | None = None,
) -> Document:
    fetcher = Fetcher(rules, names(*addresses), httpx.MockTransport(answer))
    return asyncio.run(fetcher.fetch(url, known))


def ok(content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """An answer that is still to be read, as from a network."""
    return httpx.Response(200, stream=httpx.ByteStream(content), headers=headers)


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"asked {request.url}")


async def from_loopback(serve: Serve, rules: Rules = Rules(), path: str = "/p.yaml") -> Document:
    """What a fetcher gets from a server of the test's own."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await Fetcher(rules).fetch(f"http://127.0.0.1:{port}{path}")


def says(head: str, body: bytes = b"", pause: float = 0.0) -> Serve:
    """A server that sends a head, and a body byte by byte where there is a pause."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for piece in (
                [head.encode() + body] if not pause else [bytes([one]) for one in head.encode() + body]
            ):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    return serve


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:21f:cb07::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        (f"::ffff:{PUBLIC}", True),
        ("64:ff9b::a9fe:a9fe", False),  # 169.254.169.254 through NAT64
        (f"64:ff9b::{PUBLIC}", True),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/p.yaml",
        "http://10.0.0.1/p.yaml",
        "http://127.0.0.1.evil.example/p.yaml",
        "http://localhost.evil.example/p.yaml",
        "ftp://example.com/p.yaml",
        "file:///etc/passwd",
        "https:///p.yaml",
        "https://user:secret@example.com/p.yaml",
        "https://user@example.com/p.yaml",
        "https://example.com:port/p.yaml",
        "https://exa mple.com/p.yaml",
        "https://exämple.com/p.yaml",
        "https://example.com\\@evil.example/p.yaml",
        "https://example.com/p.yaml\r\nx-evil: 1",
    ],
)
def test_urls_that_no_policy_comes_from(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_urls_that_a_policy_may_come_from() -> None:
    assert check_url("https://Example.com/p.yaml") == ("https", "example.com", 443)
    assert check_url("https://example.com:8443/p?sig=x") == ("https", "example.com", 8443)
    assert check_url("http://127.0.0.1:9/p") == ("http", "127.0.0.1", 9)
    assert check_url("http://localhost/p") == ("http", "localhost", 80)
    assert check_url("http://[::1]:9/p") == ("http", "::1", 9)


def test_what_is_shown_of_a_url_holds_no_secret() -> None:
    assert shown_url("https://u:p@host:8/a/b.yaml?sig=s#f") == "https://host:8/a/b.yaml"
    assert shown_url("https://host?sig=s") == "https://host"


@pytest.mark.parametrize("addresses", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::ffff:169.254.169.254"]])
def test_a_name_with_an_address_that_is_not_public_is_not_asked(addresses: list[str]) -> None:
    with pytest.raises(FetchError, match="not a public address"):
        fetched("https://example.com/p.yaml", never, *addresses)


def test_a_private_address_is_asked_where_that_is_allowed() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "10.0.0.1"
        return ok(b"x")

    assert (
        fetched("https://example.com/p.yaml", answer, "10.0.0.1", rules=Rules(allow_private=True)).content
        == b"x"
    )


def test_the_connection_goes_to_the_address_that_was_checked_under_the_name() -> None:
    asked = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    def answer(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == f"https://{PUBLIC}:8443/p.yaml?sig=a%2Fb"
        assert request.headers["host"] == "example.com:8443"
        assert request.extensions["sni_hostname"] == "example.com"
        assert request.headers["accept-encoding"] == "identity"
        return ok(b"x", headers={"etag": '"1"'})

    fetcher = Fetcher(Rules(), rebinding, httpx.MockTransport(answer))
    document = asyncio.run(fetcher.fetch("https://example.com:8443/p.yaml?sig=a%2Fb"))
    assert document == Document(b"x", '"1"', None)
    assert asked == [("example.com", 8443)]
    with pytest.raises(FetchError, match=r"127\.0\.0\.1, which is not a public"):
        asyncio.run(fetcher.fetch("https://example.com:8443/p.yaml"))


def test_the_next_address_is_asked_where_one_cannot_be_reached() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == PUBLIC:
            raise httpx.ConnectError("refused")
        return ok(request.url.host.encode())

    assert fetched("https://example.com/", answer, PUBLIC, "93.184.215.15").content == b"93.184.215.15"
    with pytest.raises(FetchError, match="cannot be reached"):
        fetched("https://example.com/", answer, PUBLIC, PUBLIC)
    with pytest.raises(FetchError, match="no address"):
        fetched("https://example.com/", never)


def test_what_has_not_changed_is_not_sent_again() -> None:
    known = Document(b"old", '"1"', "Sat, 21 Nov 2026 00:00:00 GMT")

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["if-none-match"] == known.etag
        assert request.headers["if-modified-since"] == known.last_modified
        return httpx.Response(304)

    assert fetched("https://example.com/p.yaml", answer, PUBLIC, known=known) is known
    with pytest.raises(FetchError, match="status 304"):
        fetched("https://example.com/p.yaml", lambda _: httpx.Response(304), PUBLIC)


@pytest.mark.parametrize("etag", [b'"caf\xe9"', b'"' + b"x" * 2000 + b'"'])
def test_a_validator_that_cannot_be_sent_back_is_left_out(etag: bytes) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(b"x"), headers=[(b"etag", etag)])

    document = fetched("https://example.com/p.yaml", answer, PUBLIC)
    assert document.etag is None
    assert document.conditions() == {}


def redirecting(to: str, status: int = 302) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/p.yaml":
            return httpx.Response(status, headers={"location": to})
        return ok(str(request.headers["host"]).encode())

    return answer


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_only_where_that_is_allowed(status: int) -> None:
    answer = redirecting("https://other.example/x", status)
    with pytest.raises(FetchError, match="redirect"):
        fetched("https://example.com/p.yaml", answer, PUBLIC)
    document = fetched("https://example.com/p.yaml", answer, PUBLIC, rules=Rules(allow_redirects=True))
    assert document.content == b"other.example"
    assert fetched("https://example.com/p.yaml", redirecting("/x"), PUBLIC, rules=Rules(allow_redirects=True))


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("http://other.example/x", "use https"),
        ("http://127.0.0.1:9/x", "loopback"),
        ("https://127.0.0.1/x", "not a public address"),
        ("https://localhost/x", "not a public address"),
        ("https://[::1]/x", "not a public address"),
        ("https://169.254.169.254/latest/meta-data", "not a public address"),
        ("https://user:pw@other.example/x", "no password"),
        ("file:///etc/passwd", "redirects to"),
        ("/p.yaml", "over 5 redirects"),
    ],
)
def test_a_redirect_leads_nowhere_that_a_policy_may_not_come_from(to: str, message: str) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "localhost" else [PUBLIC]

    fetcher = Fetcher(Rules(allow_redirects=True), resolver, httpx.MockTransport(redirecting(to)))
    with pytest.raises(FetchError, match=message):
        asyncio.run(fetcher.fetch("https://example.com/p.yaml"))


def test_loopback_names_have_to_be_loopback_addresses() -> None:
    with pytest.raises(FetchError, match="not a public address"):
        fetched("http://localhost/p.yaml", never, "10.0.0.1")
    document = fetched("http://localhost/p.yaml", lambda _: ok(b"x"), "127.0.0.1")
    assert document.content == b"x"


@pytest.mark.parametrize("status", [204, 206, 401, 404, 500])
def test_a_status_other_than_200_is_no_policy(status: int) -> None:
    with pytest.raises(FetchError, match=f"status {status}"):
        fetched("https://example.com/", lambda _: httpx.Response(status, content=b"secret"), PUBLIC)


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (says("HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n"), "over the limit of 1,000"),
        (says("HTTP/1.1 200 OK\r\n\r\n", b"x" * 100_000), "over the limit of 1,000"),
        (
            says("HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n", gzip.compress(b"x" * 10**7)),
            "packed content",
        ),
        (says("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n", b"x"), "broke off"),
        (says("nonsense\r\n\r\n"), "broke off"),
        # Each byte comes in time, the whole does not.
        (says("HTTP/1.1 200 OK\r\nx-slow: yes, very slow indeed\r\n\r\n", pause=0.02), "within 0.3 s"),
        (says("HTTP/1.1 200 OK\r\n\r\n", b"x" * 900, pause=0.005), "within 0.3 s"),
    ],
)
def test_a_document_is_capped_in_size_and_time(serve: Serve, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match=message):
        asyncio.run(from_loopback(serve, Rules(max_bytes=1000, seconds=0.3)))
    assert time.monotonic() - started < 5


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    document = asyncio.run(
        from_loopback(says("HTTP/1.1 200 OK\r\nlast-modified: Sat, 21 Nov 2026 00:00:00 GMT\r\n\r\n", b"x"))
    )
    assert document == Document(b"x", None, "Sat, 21 Nov 2026 00:00:00 GMT")


@contextmanager
def certified(folder: Path, name: str) -> Iterator[Path]:
    """A certificate for a name; :func:`httpx.create_ssl_context` trusts it by ``SSL_CERT_FILE``."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    call = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    call += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-days", "2"]
    call += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(call, check=True, capture_output=True)
    yield folder / "cert.pem"


def test_the_certificate_has_to_be_that_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(certificate: Path) -> tuple[bytes, str]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, certificate.with_name("key.pem"))
        serve = says("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", b"x")
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        fetcher = Fetcher(Rules(allow_private=True), names("127.0.0.1"))
        async with server:
            port = server.sockets[0].getsockname()[1]
            document = await fetcher.fetch(f"https://policy.test:{port}/p.yaml")
            with pytest.raises(FetchError, match="cannot be reached") as caught:
                await fetcher.fetch(f"https://other.test:{port}/p.yaml")
        return document.content, str(caught.value)

    with certified(tmp_path, "policy.test") as certificate:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        content, error = asyncio.run(both(certificate))
    assert content == b"x"
    assert "other.test" in error  # the certificate's name, and not the address, is what does not fit
