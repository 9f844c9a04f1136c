"""Who may use the server: the clients' own keys, what each may ask for, and how much of it.

The file of clients is a setting of the server (``--clients``), never part of a policy, which may come from elsewhere:

    version: 1
    clients:
      - id: alice
        key_sha256: 7d0a8468ed220400c0b8e6f335baa7e070ce880a37e2ac5995b9a97b809026de
        tiers: [auto, balanced]      # all of them where nothing is said
        targets: []                  # that the client may name itself; what a tier chooses is the tier's business
        requests_per_minute: 60
        tokens_per_minute: 200000
        threshold_override: false
        explain: false
        admin: false                 # may see pages that show other clients' traffic

It is read again when it changes; a file that is not valid leaves the last good one in force. Rates are counted by each
process of the server on its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from router.errors import RequestError, RouterError, UsageError
from router.policy import AUTO, Address, Policy, printable

logger = logging.getLogger("router")

# Where a client's key may stand; OpenAI's clients send the first, Anthropic's the second, Azure's the third.
KEY_HEADERS = ("authorization", "x-api-key", "api-key")

_PREFIX = "rk_"
_KEY_BYTES = 32
_WATCH_SECONDS = 1.0
_CHALLENGE = {"www-authenticate": 'Bearer realm="router"'}

ClientId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Rate = Annotated[int, Field(ge=1)]


class Client(BaseModel):
    """One client of the server.

    Attributes
    ----------
    id : str
        Stands in the log; never in an answer.
    key_sha256 : str
        SHA-256 of its key, in hexadecimal digits.
    tiers, targets : list of str or None
        What its requests may name as ``model``; None for all. A target here is one that it names itself: which
        targets a tier chooses among is the tier's business.
    requests_per_minute, tokens_per_minute : int or None
    threshold_override, explain : bool
        Whether it may set ``x-router-threshold``, and ask why a request went where it went.
    admin : bool
        Whether it may see what shows other clients' traffic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: ClientId
    key_sha256: Digest
    tiers: frozenset[str] | None = None
    targets: frozenset[str] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    threshold_override: bool = False
    explain: bool = False
    admin: bool = False

    def may_ask(self, address: Address, policy: Policy) -> bool:
        """Whether it may use what a request names; ``auto`` among its tiers is the policy's default tier."""
        if address.target is not None:
            return self.targets is None or address.target in self.targets
        if self.tiers is None or address.tier in self.tiers:
            return True
        return AUTO in self.tiers and address.tier == policy.default_tier

    def names(self, policy: Policy) -> list[str]:
        """What it can ask for by ``model``."""
        found = ((name, policy.find(name)) for name in policy.names())
        return [name for name, address in found if address is not None and self.may_ask(address, policy)]

    def check(self, policy: Policy, model: str) -> None:
        """Raise :class:`RequestError`, 403 or 404, where it may not ask for this model."""
        address = policy.find(model)
        if address is not None and self.may_ask(address, policy):
            return
        names = self.names(policy)
        allowed = f"it may ask for: {', '.join(names)}" if names else "there is nothing that it may ask for"
        if address is None:
            raise RequestError(
                f"The model '{printable(model)}' does not exist, or not for this key; {allowed}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        what = f"target '{address.target}'" if address.target is not None else f"tier '{address.tier}'"
        raise RequestError(
            f"This key may not use the {what}; {allowed}.", status=403, param="model", code="not_allowed"
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    clients: tuple[Client, ...] = ()


class Allowance:
    """So much a minute, which may be used at once: a bucket that fills at an even rate, and may be overdrawn.

    Parameters
    ----------
    per_minute : int
    now : float
        Seconds of a monotonic clock.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; 0 where it is."""
        self._fill(now)
        return max(0.0, (amount - self._left) * 60 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Use so much, there or not."""
        self._fill(now)
        self._left -= amount

    def _fill(self, now: float) -> None:
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now


@dataclass(slots=True)
class _Rates:
    """What is left to one client."""

    requests: Allowance | None = None
    tokens: Allowance | None = None


class ClientKeys:
    """The clients in force, and what is left of their rates.

    Parameters
    ----------
    clients : iterable of Client
    path : Path, optional
        The file that they came from, which :meth:`watch` reads again.
    clock : callable, optional
        Seconds of a monotonic clock.
    """

    def __init__(
        self,
        clients: Iterable[Client],
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._by_digest = {client.key_sha256: client for client in clients}
        self._path = path
        self._signature: Sequence[int] | None = None
        self._clock = clock
        self._rates: dict[str, _Rates] = {}
        self.error: str | None = None

    @classmethod
    def of(cls, path: Path) -> ClientKeys:
        """Those of a file; raises what :func:`load_clients` does."""
        signature = _signature(path)  # before it is read: what changes in between is read again
        keys = cls(load_clients(path), path)
        keys._signature = signature
        return keys

    def __len__(self) -> int:
        return len(self._by_digest)

    def identify(self, headers: Mapping[str, str]) -> Client:
        """The client whose key a request holds; raises :class:`RequestError`, 401."""
        given = [key for key in (_key(headers, name) for name in KEY_HEADERS) if key]
        for key in given:
            if (client := self.holder(key)) is not None:
                return client
        what = "The key is not one of this server's." if given else "This server wants a key of its own."
        raise RequestError(
            f"{what} Send it as 'Authorization: Bearer …', 'x-api-key: …' or 'api-key: …'.",
            status=401,
            code="invalid_api_key",
            headers=_CHALLENGE,
        )

    def holder(self, key: str) -> Client | None:
        """The client whose key it is."""
        digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        # How long the lookup takes depends on the digest of what was sent, from which nothing can be steered
        # towards the digest of a key of 256 random bits; what is found is compared in constant time all the same.
        client = self._by_digest.get(digest)
        return client if client is not None and hmac.compare_digest(client.key_sha256, digest) else None

    def named(self, name: str) -> Client | None:
        """The client of this id."""
        return next((client for client in self._by_digest.values() if client.id == name), None)

    def admit(self, client: Client) -> None:
        """Count one more request; raises :class:`RequestError`, 429, where the client's rate is used up."""
        now = self._clock()
        rates = self._rates_of(client, now)
        # One token: what a request takes is known when it is answered, and then counted in full.
        for allowance, unit in ((rates.requests, "requests"), (rates.tokens, "tokens")):
            wait = allowance.wait(1, now) if allowance is not None else 0.0
            if allowance is not None and wait > 0:
                raise RequestError(
                    f"This key may use {allowance.per_minute:,} {unit} a minute, and has; come back in {math.ceil(wait)} s.",
                    status=429,
                    code="rate_limit_exceeded",
                    headers={"retry-after": str(math.ceil(wait))},
                )
        if rates.requests is not None:
            rates.requests.take(1, now)

    def used(self, client: Client, tokens: int) -> None:
        """Count the tokens of an answer, those of the request included."""
        now = self._clock()
        rates = self._rates_of(client, now)
        if rates.tokens is not None:
            rates.tokens.take(tokens, now)

    async def watch(self, seconds: float = _WATCH_SECONDS) -> None:
        """Read the file again whenever it changes, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.to_thread(self.reload)

    def reload(self) -> None:
        """Read the file again where it has changed; where that cannot be done, the last good one stays."""
        if self._path is None:
            return
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            clients = load_clients(self._path)
        except RouterError as error:
            self.error = str(error)
            logger.error("%s; the clients that were read before stay", error)
            return
        self.error = None
        self._by_digest = {client.key_sha256: client for client in clients}
        logger.info("%s: %d clients", self._path, len(clients))

    def _rates_of(self, client: Client, now: float) -> _Rates:
        """By the client's id, so that what it used outlives a change of the file."""
        rates = self._rates.setdefault(client.id, _Rates())
        rates.requests = _renewed(rates.requests, client.requests_per_minute, now)
        rates.tokens = _renewed(rates.tokens, client.tokens_per_minute, now)
        return rates


def load_clients(path: Path) -> tuple[Client, ...]:
    """Read and check a file of clients.

    Raises
    ------
    UsageError
        It is not there.
    RouterError
        It is not valid; the message names file and field.
    """
    return _parsed(_read(path), path)


def new_client(path: Path, name: str, **fields: Any) -> str:
    """Add a client to a file, which is made where there is none, and give its key: that is written nowhere.

    Parameters
    ----------
    path : Path
    name : str
        The client's id.
    **fields
        Of :class:`Client`; None where nothing is said.

    Raises
    ------
    RouterError
        The name is taken or not fit, or the file is not valid.
    """
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    entry = {"id": name, "key_sha256": digest} | {
        field: value for field, value in fields.items() if value not in (None, False)
    }
    text = (
        _read(path)
        if path.exists()
        else "# The clients of a router; see `router keys --help`.\nversion: 1\nclients:\n"
    )
    before = _parsed(text, path)
    if name in (client.id for client in before):
        raise UsageError(f"{path}: there is a client named {name} already; take its entry out first")
    # Added as text, so that whatever people wrote stays as they wrote it.
    lines = yaml.safe_dump([entry], sort_keys=False, default_flow_style=None, width=1000).splitlines()
    added = text.rstrip("\n") + "\n" + "".join(f"  {line}\n" for line in lines)
    try:
        complete = _parsed(added, path)[:-1] == before
    except RouterError:
        complete = False
    if not complete:
        _checked(entry, path)
        raise RouterError(
            f"{path}: an entry can be added only at the end of a list 'clients:' whose entries begin with '  - id: …'"
        )
    _write(path, added)
    return key


def _key(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "").strip()
    if name != "authorization":
        return value
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _renewed(allowance: Allowance | None, per_minute: int | None, now: float) -> Allowance | None:
    if per_minute is None:
        return None
    if allowance is not None and allowance.per_minute == per_minute:
        return allowance
    return Allowance(per_minute, now)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RouterError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UsageError(
            f"{path}: no clients can be read there ({error.strerror}); "
            f"`router keys new NAME --clients {path}` makes a key and the file"
        ) from None


def _parsed(text: str, path: Path) -> tuple[Client, ...]:
    try:
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}: " if error.problem_mark else " "
        raise RouterError(f"{path}:{line}not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RouterError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if isinstance(document, dict) and document.get("clients") is None:
        document = {**document, "clients": []}
    clients = _validated(document, path).clients
    for field in ("id", "key_sha256"):
        values = [getattr(client, field) for client in clients]
        twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
        if twice is not None:
            raise RouterError(f"{path}: the {field} {twice} stands there twice")
    return clients


def _validated(document: Any, path: Path) -> _File:
    if not isinstance(document, dict):
        raise RouterError(f"{path}: a file of clients is a mapping that starts with 'version: 1'")
    try:
        return _File.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = printable(".".join(map(str, problem["loc"])), 200)
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        raise RouterError(f"{path}: {where}: {what[0].lower()}{what[1:]}") from None


def _checked(entry: Mapping[str, Any], path: Path) -> None:
    _validated({"version": 1, "clients": [dict(entry)]}, path)


def _write(path: Path, text: str) -> None:
    """In one step, so that a server that watches never reads half of it; for the owner's eyes where it is new."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    path = path.resolve()  # of a link the file, and not the link, is replaced
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _signature(path: Path | None) -> Sequence[int] | None:
    """What changes with a file; None where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None
