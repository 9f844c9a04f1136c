"""Where the keys of this server may be sent, and so what a policy may do: what the server's own settings say.

Whoever can write a policy decides where prompts and keys go: a target with an ``api_base`` of the writer's own and
the name of a key is enough to carry that key away. So the settings bind each key to the hosts that it may be sent to,
and a policy from a URL can name nothing else (nor can one from a file, where the settings say anything at all):

- ``OPENAI_API_KEY@api.openai.com``: that key may go to that host. With a port where it is not the scheme's own, with
  a path where the host is shared (``KEY@gateway.example/our-account``).
- ``OPENAI_API_KEY``: to the host of the provider whose key has that name.
- ``@models.internal:8000``: requests without a key may go there.
- ``x-openai-key@api.openai.com``: the keys that clients send in that header may.

A target of such a policy echoes, or is one of a provider that is known here to send the key that it is given, and none
that it finds in the environment, to the address that it is given, and nowhere else. Its ``params`` can be those that
shape an answer: not those that litellm reads as an address or a credential, and no tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from router.errors import PolicyError, UsageError
from router.exposure import is_loopback
from router.policy import Policy, Problem, Target, printable

SETTING = "--allow-key (ROUTER_ALLOWED_KEYS)"
_WHERE = "where keys are bound to hosts"
_NOT_HERE = f"may not be set {_WHERE}"

# litellm's providers that take key and address as they are given: where they send requests of targets without an
# api_base, and the variable that usually holds their key.
PROVIDERS = {
    "anthropic": ("api.anthropic.com", "ANTHROPIC_API_KEY"),
    "cerebras": ("api.cerebras.ai", "CEREBRAS_API_KEY"),
    "deepseek": ("api.deepseek.com", "DEEPSEEK_API_KEY"),
    "fireworks_ai": ("api.fireworks.ai", "FIREWORKS_API_KEY"),
    "gemini": ("generativelanguage.googleapis.com", "GEMINI_API_KEY"),
    "groq": ("api.groq.com", "GROQ_API_KEY"),
    "mistral": ("api.mistral.ai", "MISTRAL_API_KEY"),
    "openai": ("api.openai.com", "OPENAI_API_KEY"),
    "openrouter": ("openrouter.ai", "OPENROUTER_API_KEY"),
    "together_ai": ("api.together.ai", "TOGETHERAI_API_KEY"),
    "xai": ("api.x.ai", "XAI_API_KEY"),
}

# The fields of a target that say nothing of addresses and credentials. One that is not here is refused.
PLAIN_FIELDS = frozenset(
    (
        "model",
        "echo",
        "api_key_env",
        "api_key_header",
        "api_base",
        "family",
        "context_window",
        "max_output_tokens",
        "supports",
        "prices",
        "params",
        "drop_params",
        "ask_usage",
        "speaks",
        "timeout",
        "retries",
        "fallbacks",
        "cooldown",
        "max_concurrency",
        "queue_seconds",
    )
)
# Parameters that shape the answer. Tools and searches are none: they lead the provider, or the client, elsewhere.
PLAIN_PARAMS = frozenset(
    (
        "frequency_penalty",
        "logit_bias",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "service_tier",
        "stop",
        "temperature",
        "thinking",
        "top_k",
        "top_p",
        "verbosity",
    )
)

# The fields that name one: an environment variable's, or a header's that clients send.
_CREDENTIALS = ("api_key_env", "api_key_header")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|x-[a-z0-9-]+")
_PLACE = re.compile(
    r"(?P<host>[a-z0-9]([a-z0-9.-]*[a-z0-9])?)(:(?P<port>\d{1,5}))?(?P<path>(/[A-Za-z0-9._~-]+)*)/?"
)
# An address that all parsers of URLs read alike.
_API_BASE = re.compile(r"(https?)://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?(/[A-Za-z0-9._~-]+)*/?")


@dataclass(frozen=True, slots=True)
class Binding:
    """A key by its variable or header, and where it may be sent; ``key`` is empty for requests without one."""

    key: str
    host: str
    port: int | None
    path: str

    def covers(self, key: str, host: str, port: int | None, path: str) -> bool:
        """Whether it lets that key go there."""
        if (self.key, self.host, self.port) != (key, host, port):
            return False
        return path == self.path or path.startswith(self.path + "/")


class Trust:
    """Where the keys of this server may be sent.

    Parameters
    ----------
    allowed : str
        Bindings with commas between them, as at the head of this module.

    Raises
    ------
    UsageError
        One of them cannot be read.
    """

    def __init__(self, allowed: str = "") -> None:
        entries = [entry.strip() for entry in allowed.split(",")]
        self._bindings = [_binding(entry) for entry in entries if entry]

    def check(self, policy: Policy, source: str) -> None:
        """Raise :class:`PolicyError` where a policy wants more than it may; ``source`` names it in the message."""
        problems = list(self.refusals(policy))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise PolicyError(f"{source}: {problems[0]}{more}", tuple(problems))

    def refusals(self, policy: Policy) -> Iterator[Problem]:
        """What a policy wants and may not have."""
        for name, target in policy.targets.items():
            for refusal in self._target(target):
                field, _, why = refusal.partition(": ")
                yield Problem(("targets", name, *field.split(".", 1)), why)

    def _target(self, target: Target) -> Iterator[str]:
        for field in sorted(target.model_fields_set - PLAIN_FIELDS):
            yield f"{field}: {_NOT_HERE}"
        for param in sorted(target.params.keys() - PLAIN_PARAMS):
            yield f"params.{printable(str(param))}: {_NOT_HERE}"
        if target.echo:
            return
        provider, slash, model = target.model.partition("/")
        if not slash or provider not in PROVIDERS or "://" in model or ".." in model:
            known = ", ".join(PROVIDERS)
            yield (
                f"model: {_WHERE} it starts with one of {known}, each with a slash; "
                "any other server is openai/… with an api_base"
            )
            return
        keys = [key for field in _CREDENTIALS if (key := getattr(target, field, None))]
        if not keys and (target.api_base is None or provider != "openai"):
            # litellm would look for a key in the environment by itself.
            yield f"api_key_env: {_WHERE} only openai/… with an api_base can do without"
            return
        base = f"https://{PROVIDERS[provider][0]}" if target.api_base is None else target.api_base
        if not _API_BASE.fullmatch(base) or "/." in base:
            yield f"api_base: {_WHERE} it is https://host, with a port and a plain path at most"
            return
        parts = urlsplit(base)
        host = parts.hostname or ""
        if parts.scheme == "http" and keys and not is_loopback(host):
            yield "api_base: a key is sent over https"
            return
        port = None if parts.port == (443 if parts.scheme == "https" else 80) else parts.port
        place = host + (f":{port}" if port else "")
        field = "api_base" if target.api_base is not None else "api_key_env"
        for key in keys or [""]:
            if not any(binding.covers(key, host, port, parts.path.rstrip("/")) for binding in self._bindings):
                what = (
                    f"the key {key} may not be sent to {place}" if key else f"nothing may be sent to {place}"
                )
                yield f"{field}: {what}; {SETTING} {key}@{place} allows it"


def _binding(entry: str) -> Binding:
    key, at, place = entry.partition("@")
    if key and not _NAME.fullmatch(key):
        raise UsageError(
            f"{SETTING}: {printable(entry)}: give NAME@HOST, with the name of an environment variable"
        )
    if not at:
        hosts = [host for host, usual in PROVIDERS.values() if usual == key]
        if not hosts:
            raise UsageError(f"{SETTING}: {printable(entry)}: say where that key may be sent, as {key}@HOST")
        return Binding(key, hosts[0], None, "")
    found = _PLACE.fullmatch(place.lower() if "/" not in place else place)
    if found is None or "/." in place:
        raise UsageError(
            f"{SETTING}: {printable(entry)}: give NAME@HOST, with a port or a path where there is one"
        )
    port = int(found["port"]) if found["port"] else None
    return Binding(key, found["host"], None if port == 443 else port, found["path"])
