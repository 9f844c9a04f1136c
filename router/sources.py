"""Where a policy comes from: a file, or a URL whose last good policy is kept on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from router.errors import PolicyError, RouterError, SourceError, UsageError
from router.fetch import Document, Fetcher, FetchError, check_url, shown_url
from router.policy import Policy, parse_policy
from router.trust import Trust

logger = logging.getLogger("router")

MAXIMUM_BYTES = 2**20
# Whoever writes a file in place is at it for a moment: what is read has to stay the same for so long.
_SETTLE_SECONDS = 0.02
_SETTLE_READS = 10
_LONGEST_PAUSE = 600.0
_JITTER = 0.1


class Source(Protocol):
    """Gives the policy as it is now, as often as it is asked."""

    @property
    def shown(self) -> str:
        """Where it comes from, as it may stand in logs and answers."""
        ...

    @property
    def can_change(self) -> bool: ...

    @property
    def pause(self) -> float:
        """Seconds until it should be asked again; 0 where it should not be."""
        ...

    def load(self) -> Policy:
        """The policy to start with; raises :class:`RouterError` where there is none."""
        ...

    async def poll(self) -> Policy:
        """The policy as it is now: the same object as long as it does not change.

        Raises
        ------
        SourceError
            It cannot be read or reached.
        PolicyError
            It is not valid, or wants more than it may: the same object as long as it does not change.
        """
        ...

    def keep(self, policy: Policy) -> None:
        """Told of a policy that :meth:`poll` gave, once it is in force."""
        ...

    def kept(self) -> Policy | None:
        """The last one that was in force, where it is still known, and may be used."""
        ...


class _Reading:
    """Content to policy, once for each content."""

    def __init__(self, shown: str, check: Callable[[Policy], None]) -> None:
        self._shown = shown
        self._check = check
        self.content: bytes | None = None
        self._result: Policy | PolicyError | None = None

    def policy(self, content: bytes) -> Policy:
        if content != self.content or self._result is None:
            self._result = self._read(content)
            self.content = content
        return self.again()

    def again(self) -> Policy:
        """What the last content gave."""
        if isinstance(self._result, PolicyError):
            raise self._result.with_traceback(None)
        assert self._result is not None
        return self._result

    def _read(self, content: bytes) -> Policy | PolicyError:
        try:
            if len(content) > MAXIMUM_BYTES:
                raise PolicyError(f"{self._shown}: over the limit of {MAXIMUM_BYTES:,} bytes")
            policy = parse_policy(content, self._shown)
            self._check(policy)
        except PolicyError as error:
            return error
        return policy


class FileSource:
    """A policy file, read whenever it is asked: whatever way it is replaced, by a symbolic link too.

    Parameters
    ----------
    path : Path
    trust : Trust or None
        What the policy may do with keys; None lets it name any.
    seconds : float
        How often it should be asked.
    settle : float
        For how many seconds new content has to stay as it is before it counts.
    """

    def __init__(
        self, path: Path, trust: Trust | None = None, seconds: float = 1.0, settle: float = _SETTLE_SECONDS
    ) -> None:
        self.path = path
        self.shown = str(path)
        self.pause = seconds
        # A pipe can be read once.
        self.can_change = not path.exists() or path.is_file()
        self._settle = settle
        self._reading = _Reading(
            self.shown, lambda policy: trust.check(policy, self.shown) if trust else None
        )

    def load(self) -> Policy:
        try:
            return self._reading.policy(self._read())
        except SourceError as error:
            raise UsageError(str(error)) from None

    async def poll(self) -> Policy:
        return await asyncio.to_thread(self._poll)

    def _poll(self) -> Policy:
        content = self._read()
        for _ in range(_SETTLE_READS):
            if content == self._reading.content:
                return self._reading.again()
            time.sleep(self._settle)
            before, content = content, self._read()
            if content == before:
                return self._reading.policy(content)
        raise SourceError(f"{self.shown}: is being written all the time")

    def keep(self, policy: Policy) -> None:
        """The file is there anyway."""

    def kept(self) -> None:
        return None

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                return file.read(MAXIMUM_BYTES + 1)
        except OSError as error:
            raise SourceError(f"{self.path}: no policy can be read there ({error.strerror})") from None


class UrlSource:
    """A policy from a URL, fetched only where it has changed; the last one that was in force is kept on disk.

    Parameters
    ----------
    url : str
    trust : Trust
    fetcher : Fetcher
    state_dir : Path
        Where policies are kept.
    seconds : float
        How often it should be asked; less often while it fails.

    Raises
    ------
    UsageError
        The URL is none that a policy may come from.
    """

    can_change = True

    def __init__(
        self, url: str, trust: Trust, fetcher: Fetcher, state_dir: Path, seconds: float = 30.0
    ) -> None:
        check_url(url)
        self.url = url
        self.shown = shown_url(url)
        self._trust = trust
        self._fetcher = fetcher
        self._seconds = seconds
        self._failures = 0
        self._document: Document | None = None
        self._reading = _Reading(self.shown, self._check)
        self._file = state_dir / "policies" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
        self._on_disk: bytes | None = None

    @property
    def pause(self) -> float:
        longest = max(self._seconds, _LONGEST_PAUSE)
        seconds = min(self._seconds * 2.0 ** min(self._failures, 16), longest)
        # So that many servers do not ask at once.
        return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)

    def load(self) -> Policy:
        try:
            # A loop of its own: this may be called where one runs already.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(lambda: asyncio.run(self.poll())).result()
        except RouterError as error:
            policy = self.kept()
            if policy is None:
                raise type(error)(f"{error}; and no earlier policy from there is kept here") from None
            logger.warning("%s; the policy that was last in force is taken instead", error)
            return policy

    async def poll(self) -> Policy:
        try:
            self._document = await self._fetcher.fetch(self.url, self._document)
        except FetchError as error:
            self._failures += 1
            raise SourceError(f"{self.shown}: {error}") from None
        self._failures = 0
        return await asyncio.to_thread(self._reading.policy, self._document.content)

    def keep(self, policy: Policy) -> None:
        document = self._document
        if document is None or document.content == self._on_disk:
            return
        try:
            _write(self._file, _Kept(document).to_json())
            self._on_disk = document.content
        except OSError as error:
            logger.warning("%s: the policy cannot be kept there (%s)", self._file, error.strerror)
            self._on_disk = document.content  # or every poll would say so

    def kept(self) -> Policy | None:
        try:
            document = _Kept.from_json(_read_own(self._file)).document
            policy = self._reading.policy(document.content)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: not used: %s", self._file, error.strerror or error)
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: not used: damaged", self._file)
            return None
        except PolicyError as error:
            logger.warning("%s: not used: %s", self._file, error)
            return None
        self._document, self._on_disk = document, document.content
        return policy

    def _check(self, policy: Policy) -> None:
        if policy.server.model_fields_set:
            raise PolicyError(f"{self.shown}: server: a policy from a URL has no such section")
        self._trust.check(policy, self.shown)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A document as it stands on disk."""

    document: Document

    def to_json(self) -> bytes:
        document = self.document
        fields = {
            "etag": document.etag,
            "last_modified": document.last_modified,
            "content": document.content.decode("utf-8"),
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, text: bytes) -> _Kept:
        fields = json.loads(text)
        content, etag, modified = fields["content"], fields["etag"], fields["last_modified"]
        if not all(value is None or isinstance(value, str) for value in (etag, modified)):
            raise TypeError
        return cls(Document(content.encode(), etag, modified))


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, for the owner's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # with mode 600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_own(path: Path) -> bytes:
    """A file that nobody but this user can have written; :class:`OSError` where others could."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or (
            os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o022)
        ):
            raise PermissionError(0, "others than this user could have written it")
        return file.read(8 * MAXIMUM_BYTES)
