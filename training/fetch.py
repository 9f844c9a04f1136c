"""Download the public originals: by URL and SHA-256, resumable, each file complete or not there.

``originals.json`` names the files of each source, where they are (pinned to a commit) and their hash. Where
that is null nobody has recorded one, and the report says that the file is unverified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from router.errors import DatasetError, UsageError

# A broken connection is taken up again where it broke, this often, as long as each try brings something.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Original:
    """A public file: where it is, where it goes (relative to the folder), and its SHA-256 where known."""

    url: str
    path: str
    sha256: str | None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch is; ``total`` is None while a size is not known."""

    file: str
    position: int
    files: int
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file that is now in place.

    ``verified``: its hash is the recorded one. ``downloaded``: it was not there before.
    """

    path: Path
    sha256: str
    bytes: int
    verified: bool
    downloaded: bool


@dataclass(frozen=True, slots=True)
class FetchReport:
    """The files of a source, and the licence they are under."""

    name: str
    licence: str
    files: tuple[Fetched, ...]

    @property
    def unverified(self) -> tuple[Path, ...]:
        """Files that no hash is recorded for."""
        return tuple(file.path for file in self.files if not file.verified)


ProgressCallback = Callable[[Progress], None]


def known_originals() -> tuple[str, ...]:
    """The sources that ``fetch`` knows."""
    return tuple(_registry())


def originals_of(name: str) -> tuple[Original, ...]:
    """The files of a source; raises :class:`UsageError` for one that is not known."""
    registry = _registry()
    if name not in registry:
        raise UsageError(f"unknown original {name!r}; known are {', '.join(registry)}")
    entry = registry[name]
    return tuple(
        Original(
            url=entry["base"] + file.get("remote", path),
            path=path,
            sha256=file["sha256"],
            bytes=file["bytes"],
        )
        for path, file in entry["files"].items()
    )


def fetch(name: str, out: Path, progress: ProgressCallback | None = None) -> FetchReport:
    """Bring the files of a source into the folder ``out``; those that are there and right stay.

    Raises
    ------
    UsageError
        The source is not known, or ``out`` cannot be written.
    DatasetError
        A file cannot be had (the message says what to put where by hand), or is not the recorded one.
    """
    originals = originals_of(name)
    return FetchReport(name, _registry()[name]["licence"], fetch_files(originals, out, progress))


def fetch_files(
    originals: Sequence[Original], out: Path, progress: ProgressCallback | None = None
) -> tuple[Fetched, ...]:
    """Bring files into the folder ``out``; as :func:`fetch`."""
    fetched = []
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(30.0)) as client:
        for position, original in enumerate(originals, start=1):
            path = out / original.path

            def report(done: int, total: int | None, file: str = original.path, at: int = position) -> None:
                if progress:
                    progress(Progress(file, at, len(originals), done, total))

            try:
                if path.is_file():
                    report(path.stat().st_size, path.stat().st_size)
                    fetched.append(_check(original, path, downloaded=False))
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                _download(client, original, part, report)
                file = _check(original, part, downloaded=True)
                part.replace(path)
                fetched.append(replace(file, path=path))
            except httpx.HTTPError as error:
                missing = [other for other in originals[position:] if not (out / other.path).exists()]
                raise DatasetError(_by_hand(original, path, error, len(missing))) from None
            except OSError as error:
                raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    return tuple(fetched)


def _download(
    client: httpx.Client, original: Original, part: Path, report: Callable[[int, int | None], None]
) -> None:
    """Complete ``part``, from where it ends."""
    for _ in range(_TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _continue(client, original, part, before, report)
        except httpx.TransportError:
            if not part.exists() or part.stat().st_size <= before:
                raise
    raise httpx.ReadError(f"the connection broke {_TRIES} times")


def _continue(
    client: httpx.Client,
    original: Original,
    part: Path,
    start: int,
    report: Callable[[int, int | None], None],
) -> None:
    # Compressed in transit, ranges and lengths would count other bytes than the file's.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with client.stream("GET", original.url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            # Nothing follows what is there: it was complete already, or it is of another file.
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return
            part.unlink()
            return _continue(client, original, part, 0, report)
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise httpx.ReadError("a web page came instead of the file")
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise httpx.ReadError("the server sent another range than was asked for")
        done = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else original.bytes
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                done += len(chunk)
                report(done, total)


def _check(original: Original, path: Path, *, downloaded: bool) -> Fetched:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if original.sha256 is not None and sha256 != original.sha256:
        wrong = f"is not the recorded original (SHA-256 {sha256[:12]}…, expected {original.sha256[:12]}…)"
        if not downloaded:
            raise DatasetError(f"{path}: {wrong}; remove the file to fetch it anew")
        path.unlink()
        raise DatasetError(f"{original.url}: {wrong}; nothing of it was kept")
    return Fetched(path, sha256, path.stat().st_size, original.sha256 is not None, downloaded)


def _by_hand(original: Original, path: Path, error: httpx.HTTPError, missing: int) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        why = f"the server answered {error.response.status_code}"
    else:
        why = str(error) or type(error).__name__
    more = f", and {missing} more files of the source beside it" if missing else ""
    return (
        f"cannot download {original.url} ({why}); without a network put the file at {path}{more}; "
        "run again to check what is there and to fetch the rest"
    )


def _registry() -> dict[str, dict[str, Any]]:
    registry: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("originals.json").read_text(encoding="utf-8")
    )
    return registry
