"""Who may see the dashboard: an admin shows the key of a client once, and the browser keeps a signed token instead.

The token names the client and says until when it counts; it holds no key. It is signed with the server's secret over that and
the hash of the client's key, so any process with the same secret and the same file of clients accepts it, and it ends
when it expires, or at once when the client's entry goes, loses its admin scope or gets another key. The secret is
``ROUTER_DASHBOARD_SECRET``; where that is not set, the process that starts a server makes one for itself and its workers.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from router.clients import Allowance, Client, ClientKeys
from router.errors import RequestError, UsageError
from router.policy import printable

logger = logging.getLogger("router")

SECRET = "ROUTER_DASHBOARD_SECRET"
SESSION_SECONDS = 12 * 3600

_LEAST_SECRET = 32  # characters
_WRONG_PER_MINUTE = 10  # keys, of one address
_MOST_ADDRESSES = 4096
_SEPARATOR = "~"  # in no client's id


class Logins:
    """Logs admins in, and knows them again by their tokens.

    Parameters
    ----------
    clients : ClientKeys
    secret : bytes
        Of :func:`login_secret`.
    clock, ticks : callable, optional
        Seconds since 1970, and of a monotonic clock.
    """

    def __init__(
        self,
        clients: ClientKeys,
        secret: bytes,
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients = clients
        self._secret = secret
        self._clock = clock
        self._ticks = ticks
        self._wrong: OrderedDict[str, Allowance] = OrderedDict()

    def open(self, key: str, address: str) -> str:
        """A token for the holder of an admin's key.

        Parameters
        ----------
        key : str
        address : str
            Where it comes from: each may send so many wrong ones a minute.

        Raises
        ------
        RequestError
            401, the key is not one of this server's; 403, it is no admin's; 429, there were too many wrong ones.
        """
        now = self._ticks()
        allowance = self._allowance(address, now)
        if (wait := allowance.wait(1, now)) > 0:
            raise RequestError(
                f"Too many wrong keys: try again in {math.ceil(wait)} s.",
                status=429,
                headers={"retry-after": str(math.ceil(wait))},
            )
        client = self._clients.holder(key)
        if client is None or not client.admin:
            allowance.take(1, now)
            logger.warning(
                "dashboard: %s from %s", "a wrong key" if client is None else "no admin", printable(address)
            )
            if client is None:
                raise RequestError("This key is not one of this server's.", status=401)
            raise RequestError(
                "This key may not see other clients' traffic: it has no admin scope.", status=403
            )
        expires = int(self._clock()) + SESSION_SECONDS
        return _SEPARATOR.join((str(expires), client.id, self._signature(expires, client)))

    def client(self, token: str) -> Client | None:
        """Whose token it is; None where it does not count, or no longer."""
        expires, _, rest = token.partition(_SEPARATOR)
        name, _, signature = rest.partition(_SEPARATOR)
        if not (expires.isascii() and expires.isdecimal() and len(expires) <= 12 and signature.isascii()):
            return None
        client = self._clients.named(name)
        if client is None or not client.admin or int(expires) <= self._clock():
            return None
        return client if hmac.compare_digest(signature, self._signature(int(expires), client)) else None

    def _signature(self, expires: int, client: Client) -> str:
        said = f"dashboard 1\n{expires}\n{client.id}\n{client.key_sha256}"
        return hmac.new(self._secret, said.encode(), hashlib.sha256).hexdigest()

    def _allowance(self, address: str, now: float) -> Allowance:
        allowance = self._wrong.pop(address, None) or Allowance(_WRONG_PER_MINUTE, now)
        self._wrong[address] = allowance
        if len(self._wrong) > _MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        return allowance


def login_secret() -> bytes:
    """The secret of the environment; one is made and put there, for this process and those that it starts, if it has none.

    Raises
    ------
    UsageError
        It is too short to be one.
    """
    if not os.environ.get(SECRET):
        os.environ[SECRET] = secrets.token_urlsafe(32)
    secret = os.environ[SECRET]
    if len(secret) < _LEAST_SECRET:
        raise UsageError(
            f"{SECRET}: at least {_LEAST_SECRET} characters, such as `openssl rand -hex 32` gives"
        )
    return secret.encode()
