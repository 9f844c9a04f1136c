"""Where the server finds its policy, its bundle and its address.

One order for all of them, the first that is there counts:

1. the flag of the command,
2. the environment variable (``ROUTER_POLICY``, ``ROUTER_BUNDLE``, ``ROUTER_HOST``, ``ROUTER_PORT``,
   ``ROUTER_WORKERS``, ``ROUTER_LOG_LEVEL``, ``ROUTER_CLIENTS``, ``ROUTER_OPEN_TO_ANYONE``),
3. ``./router.yaml``,
4. ``router.yaml`` in the user's configuration directory,
5. what the package carries.

The section ``server`` of the policy that was found so speaks for the settings that 1 and 2 left open; but never for who
may use the server: those two are the server's own.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from router.errors import UsageError
from router.policy import Policy, default_policy_path, load_policy

APPLICATION = "llm-difficulty-router"
POLICY_FILE = "router.yaml"
_PREFIX = "ROUTER_"

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Flags and environment variables, checked."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True)

    policy: Path | None = None
    bundle: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    log_level: LogLevel = "info"
    clients: Path | None = None
    open_to_anyone: bool = False

    def environment(self) -> dict[str, str]:
        """The same settings as environment variables, for worker processes."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {f"{_PREFIX}{name.upper()}": str(value) for name, value in values.items() if value is not None}


def load_settings(**flags: Any) -> tuple[Settings, Policy]:
    """Settle the settings and the policy that is in force.

    Parameters
    ----------
    **flags
        Fields of :class:`Settings`; None where the flag was not given.

    Returns
    -------
    settings : Settings
        With ``policy`` always set.
    policy : Policy

    Raises
    ------
    UsageError
        A flag or an environment variable is wrong, or names a file that is not there.
    PolicyError
        The policy is not valid.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    settings = _checked(given)
    path = find_policy(settings)
    policy = load_policy(path)
    section = policy.server.model_dump(exclude_none=True)
    if "bundle" in section:
        section["bundle"] = path.parent / section["bundle"]
    left_open = {name: value for name, value in section.items() if name not in settings.model_fields_set}
    return _checked({**left_open, **given, "policy": path}), policy


def check_exposure(settings: Settings) -> None:
    """Without client keys a server listens on the loopback interface only, unless told otherwise in so many words.

    Raises
    ------
    UsageError
        Anybody who reaches the address could use the server's provider keys.
    """
    if settings.clients is None and not settings.open_to_anyone and not is_loopback(settings.host):
        raise UsageError(
            f"anybody who reaches {settings.host} could spend your providers' keys: start with --clients FILE, "
            "which `router keys new NAME --clients FILE` writes, or say --open-to-anyone"
        )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_policy(settings: Settings) -> Path:
    """The first policy file in the documented order."""
    if settings.policy is not None:
        return settings.policy
    user = platformdirs.user_config_path(APPLICATION) / POLICY_FILE
    for path in (Path(POLICY_FILE), user):
        if path.is_file():
            return path
    return default_policy_path()


def _checked(given: dict[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        where = f"--{name.replace('_', '-')}" if name in given else f"{_PREFIX}{name.upper()}"
        raise UsageError(f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
