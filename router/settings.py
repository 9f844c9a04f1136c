"""Where the server finds its policy, its bundle and its address.

One order for all of them, the first that is there counts:

1. the flag of the command,
2. the environment variable (``ROUTER_POLICY``, ``ROUTER_BUNDLE``, ``ROUTER_HOST``, ``ROUTER_PORT``,
   ``ROUTER_WORKERS``, ``ROUTER_LOG_LEVEL``, ``ROUTER_LOG_FORMAT``, ``ROUTER_RELOAD_SECONDS``),
3. ``./router.yaml``,
4. ``router.yaml`` in the user's configuration directory,
5. what the package carries.

The section ``server`` of the policy that was found so speaks for the settings that 1 and 2 left open. What a policy
may do (``ROUTER_ALLOWED_KEYS``, ``ROUTER_POLICY_ALLOW_REDIRECTS``, ``ROUTER_POLICY_ALLOW_PRIVATE``), and where the last
good one from a URL is kept (``ROUTER_STATE_DIR``), is said by flag or variable alone. So is who
may use the server (``ROUTER_CLIENTS``, ``ROUTER_OPEN_TO_ANYONE``); ``ROUTER_DASHBOARD_SECRET`` has no flag, which could be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from router.errors import UsageError
from router.fetch import Fetcher, Rules, check_url
from router.policy import Policy, default_policy_path
from router.sources import FileSource, Source, UrlSource
from router.trust import Trust

APPLICATION = "llm-difficulty-router"
POLICY_FILE = "router.yaml"
_PREFIX = "ROUTER_"

# Seconds between two looks, where the settings say nothing: a file is at hand, a URL is somebody's server.
_FILE_SECONDS = 1.0
_URL_SECONDS = 30.0


def _place(value: Any) -> Any:
    """A policy's place as it was written: a URL stays one, all else is a path."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


Place = Annotated[str | Path, BeforeValidator(_place)]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Flags and environment variables, checked.

    Attributes
    ----------
    policy : Path or str
        A file, or a URL.
    ledger : str or None
        The database that every request is recorded in; none is where it is None. ``default`` is a file in the user's data
        directory.
    ledger_durability : {"batched", "strict"}
        See :class:`router.ledger.Ledger`.
    session_store : str or None
        ``redis://…`` or ``postgresql://…``, where servers share sessions; each process has its own where it is None.
    tracing : {"off", "on", "propagate"}
        Whether requests are traced, and whether providers are told of the trace: see :mod:`router.tracing`.
    budget_store : str or None
        Where budgets are counted, as :func:`router.budget_store.open_store` reads it; by default with the ledger.
    reload_seconds : float or None
        How often policy and bundle are looked at again; 0 is never. Every second otherwise, a URL every 30.
    allowed_keys : str or None
        See :mod:`router.trust`. Where it is None, a policy from a file may name any key, one from a URL none.
    policy_allow_redirects, policy_allow_private : bool
        See :class:`router.fetch.Rules`.
    state_dir : Path or None
        Where policies from URLs are kept; in the user's state directory otherwise.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True)

    policy: Place | None = None
    bundle: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    tracing: Literal["off", "on", "propagate"] = "off"
    clients: Path | None = None
    open_to_anyone: bool = False
    ledger: str | None = None
    ledger_durability: Literal["batched", "strict"] = "batched"
    session_store: str | None = None
    budget_store: str | None = None
    reload_seconds: Annotated[float, Field(ge=0, le=86_400)] | None = None
    allowed_keys: str | None = None
    policy_allow_redirects: bool = False
    policy_allow_private: bool = False
    state_dir: Path | None = None

    @property
    def bundle_seconds(self) -> float:
        """How often the bundle is looked at."""
        return _FILE_SECONDS if self.reload_seconds is None else self.reload_seconds

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
    place = find_policy(settings)
    policy = policy_source(settings).load()
    section = policy.server.model_dump(exclude_none=True)
    if "bundle" in section and isinstance(place, Path):
        section["bundle"] = place.parent / section["bundle"]
    left_open = {name: value for name, value in section.items() if name not in settings.model_fields_set}
    return _checked({**left_open, **given, "policy": place}), policy


def policy_source(settings: Settings) -> Source:
    """Where the policy comes from by these settings; raises :class:`UsageError` where they are wrong."""
    place = find_policy(settings)
    allowed = settings.allowed_keys
    seconds = settings.reload_seconds
    if isinstance(place, Path):
        trust = Trust(allowed) if allowed is not None else None
        return FileSource(place, trust, _FILE_SECONDS if seconds is None else seconds)
    rules = Rules(settings.policy_allow_redirects, settings.policy_allow_private)
    state = settings.state_dir or platformdirs.user_state_path(APPLICATION)
    check_url(place)
    return UrlSource(
        place, Trust(allowed or ""), Fetcher(rules), state, _URL_SECONDS if seconds is None else seconds
    )


def find_policy(settings: Settings) -> Path | str:
    """The first policy in the documented order: a file, or the URL that a flag or a variable gives."""
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
