"""Policy file → :class:`Policy`: the targets, the tiers that map a mode to a target, the threshold in force.

Keys never stand in a policy: a target names the environment variable that holds its key.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from router.budgets import Amounts, Budgets, Pacing
from router.errors import PolicyError, UsageError
from router.sessions import SessionRule

PREDICT = "predict"
STRONG = "strong"
STAY = "stay"
AUTO = "auto"
MODE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LONGEST_MODEL = 256
# Keys and items of a policy with its YAML anchors written out: a few lines of anchors can stand for billions.
_MOST_NODES = 200_000

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
Mode = Annotated[str, StringConstraints(pattern=rf"^{MODE.pattern}$")]
Alias = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,200}$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[\x21-\x7e]+$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Threshold = Annotated[float, Field(ge=-1, le=1)]
Speech = Literal["chat", "messages", "responses"]
KeyHeader = Annotated[str, StringConstraints(pattern=r"^x-[a-z0-9-]{1,62}$")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Fault = Literal["refusal", "refusal_text", "invalid_json", "empty"]
Quality = Annotated[float, Field(gt=0, le=1.5)]
Characters = Annotated[int, Field(ge=0)]
Pattern = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")]
Capability = Literal["tools", "images", "audio", "files", "json_schema", "reasoning"]
ToolKind = Literal["read", "edit", "run", "web", "other"]
# A place in a policy: keys and positions.
Loc = tuple[int | str, ...]

# What `params` may not hold: what the dispatcher sets itself, and where a key would end up in the file.
_RESERVED_PARAMS = frozenset(
    ("model", "messages", "stream", "api_key", "api_base", "base_url", "timeout", "num_retries")
)

# Keys never stand in a policy.
_KEY_HEADERS = frozenset(("authorization", "api-key", "x-api-key", "x-goog-api-key"))

# What a header with a client's own provider key may not be called: what the router reads itself.
_OWN_HEADERS = (
    "x-router-",
    "x-api-key",
    "x-request-id",
    "x-session-",
    "x-kilocode-",
    "x-claude-code-",
    "x-forwarded-",
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prices(_Section):
    """US dollars per million tokens. Cached tokens cost what other input does unless said otherwise."""

    input: Price
    output: Price
    cached_read: Price | None = None
    cache_write: Price | None = None

    @property
    def read(self) -> float:
        """Of a token that is read from the cache."""
        return self.input if self.cached_read is None else self.cached_read

    @property
    def write(self) -> float:
        """Of a token that is written to the cache."""
        return self.input if self.cache_write is None else self.cache_write

    def cost(self, *, input: int, output: int, cached_read: int = 0, cache_write: int = 0) -> float:
        """US dollars for a call; ``cached_read`` and ``cache_write`` are parts of ``input``."""
        plain = max(input - cached_read - cache_write, 0)
        cached = cached_read * self.read + cache_write * self.write
        return (plain * self.input + cached + output * self.output) / 1e6


class Cooldown(_Section):
    """When a target is passed over: after so many failures in a row, for so many seconds; then one request probes it.

    A failure counts to the row where it comes at most ``seconds`` after the one before. An answer of 429 or 503 that
    says when to come back (``Retry-After``) cools the target for that long, at most five minutes.
    """

    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    seconds: Seconds = 30


class Target(_Section):
    """An LLM that requests can go to.

    Attributes
    ----------
    model : str
        litellm's model id (``openai/gpt-4o-mini``).
    echo : bool
        No provider: the ask comes back as the answer.
    api_key_env : str or None
        The environment variable that holds the key. None for a server that wants none, or where litellm finds
        the provider's credentials itself.
    api_key_header : str or None
        The request header in which a client sends a key of its own for this provider (``x-openai-key``). It counts
        before ``api_key_env``; without an ``api_key_env``, requests that do not hold it are answered with 401.
    api_base : str or None
        The server's URL. An ``openai/…`` target with one gets messages, tools and the like as they came.
    params : mapping
        Sent with every request that does not set them itself; may be litellm's (``api_version``, …), but on an
        ``openai/…`` target with an ``api_base``: there they are fields of the body, ``extra_headers`` alone are headers.
    drop_params : bool
        Leave out what the provider does not take, instead of answering 400; not where bodies pass through.
    ask_usage : bool
        Ask for the usage of a streamed chat completion also where the client does not, who then does not see it.
    timeout : float
        Seconds until the answer, retries and what was waited between them included, or until a stream's next chunk. The
        wait for a place does not count.
    retries : int
        How often a request is sent again, where the provider cannot be reached, breaks off or answers 429 or 5xx; never
        after the first byte of an answer, nor where it wants to be left alone for longer than two seconds. None by
        default: most clients try again themselves.
    fallbacks : list of str
        The targets that are tried next, in this order. Only the list of the target that was decided on counts.
    cooldown : Cooldown or None
        None: it is never passed over.
    max_concurrency : int or None
        Requests at a time, in one process; others wait ``queue_seconds`` for a place, then take a fallback.
    queue_seconds : float
    speaks : set of str
        The dialects that its server takes: bodies of these pass as they came. Where nothing is said, ``anthropic/…``
        takes ``messages``, ``openai/…`` takes ``chat``, and without an ``api_base`` ``responses`` too.
    context_window, max_output_tokens : int or None
        Tokens of a request with its answer, and of an answer alone; None where not declared, and then not looked at.
    supports : set of str or None
        What it can do; None where not declared: then it is taken to do everything.
    """

    model: ModelId = ""
    echo: bool = False
    api_key_env: Variable | None = None
    api_key_header: KeyHeader | None = None
    api_base: Url | None = None
    family: Name | None = None
    context_window: Annotated[int, Field(gt=0)] | None = None
    max_output_tokens: Annotated[int, Field(gt=0)] | None = None
    supports: frozenset[Capability] | None = None
    prices: Prices | None = None
    params: Mapping[str, Any] = Field(default_factory=dict)
    drop_params: bool = False
    ask_usage: bool = True
    timeout: Seconds = 600
    retries: Annotated[int, Field(ge=0, le=10)] = 0
    fallbacks: tuple[Name, ...] = ()
    cooldown: Cooldown | None = Cooldown()
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    queue_seconds: Annotated[float, Field(ge=0, le=3600)] = 5
    speaks: frozenset[Speech] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _echo_has_a_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("echo") is True:
            return {"model": "echo"} | data
        return data

    @model_validator(mode="after")
    def _can_be_called(self) -> Target:
        if not self.model:
            raise ValueError("model is missing: a litellm model id, or echo: true")
        reserved = sorted(_RESERVED_PARAMS & self.params.keys())
        if reserved:
            raise ValueError(f"params may not set {reserved[0]}")
        if self.speaks and self.api_base is None:
            raise ValueError("speaks is for a server that api_base names")
        headers = self.params.get("extra_headers") or {}
        if not isinstance(headers, Mapping):
            raise ValueError("params.extra_headers must be a mapping of header to value")
        keys = [name for name in headers if str(name).lower() in _KEY_HEADERS]
        if keys:
            raise ValueError(f"params.extra_headers may not set {keys[0]}: name a variable in api_key_env")
        if self.api_key_header is not None and self.api_key_header.startswith(_OWN_HEADERS):
            raise ValueError(f"api_key_header may not be {self.api_key_header}: the router reads that itself")
        return self


class Tokens(_Section):
    """Tokens of a typical request and its answer."""

    input: Annotated[int, Field(ge=0)]
    output: Annotated[int, Field(ge=0)]


class Predict(_Section):
    """Which target stands for which of the bundle's, and by which rule one is taken.

    ``weak`` and ``strong`` name the two of a pair; ``targets`` maps the bundle's names, where there are more.
    ``quality`` asks for a share of the best target's quality, as .95, and takes the threshold that the bundle holds for
    it (``router-train tune --quality``); ``threshold`` gives one. Without either, the bundle's own counts.

    With ``quality_per_dollar`` (λ) it is not the threshold that decides: the target of the highest expected quality −
    λ · dollars is taken. The dollars are the targets' ``prices`` for a request of ``tokens``. At 50, a cent must gain half an
    answer.

    ``unknown`` says where a prompt goes that the bundle flags as unlike its training data: ``strong`` (the dearest of
    the bundle's targets, which is what a client without a router would have asked), ``predict`` (the score decides as
    for any other) or a target.

    ``tool_results`` says what happens to a request that ends in a tool's result: ``predict``, or ``stay`` at the target
    that the session is at. Without it, a bundle that was trained on such requests predicts, and with any other the
    session stays.
    """

    weak: Name | None = None
    strong: Name | None = None
    targets: Mapping[str, Name] = Field(default_factory=dict)
    threshold: Threshold | None = None
    quality: Quality | None = None
    quality_per_dollar: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tokens: Tokens | None = None
    unknown: Name = STRONG
    tool_results: Literal["predict", "stay"] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Predict:
        pair = self.weak is not None and self.strong is not None
        if pair == bool(self.targets) or (self.weak is None) != (self.strong is None):
            raise ValueError("give weak and strong, or targets")
        if (self.quality_per_dollar is None) != (self.tokens is None):
            raise ValueError("quality_per_dollar and tokens go together")
        if self.quality is not None and not (self.threshold is None and self.quality_per_dollar is None):
            other = "threshold" if self.threshold is not None else "quality_per_dollar"
            raise ValueError(f"quality and {other} are two rules: give one")
        return self

    @property
    def names_strong(self) -> bool:
        """Whether ``unknown`` says ``strong`` in so many words, which a target of that name would make ambiguous."""
        return self.unknown == STRONG and "unknown" in self.model_fields_set

    def named(self) -> tuple[str, ...]:
        """The policy's targets that it names."""
        pair = tuple(name for name in (self.weak, self.strong) if name is not None)
        return pair or tuple(self.targets.values())


class Escalate(_Section):
    """A second chance: an answer that is none is asked for once more, of a stronger target. Both calls are paid for.

    Attributes
    ----------
    to : str
        A target; or ``strong``, the dearest of the tier's prediction.
    when : set of str
        What makes an answer none. ``refusal``: the provider says that the model refused. ``invalid_json``: JSON was asked
        for, and it is not valid, or not by the schema asked for; or a tool's arguments are no JSON. ``empty``: neither text
        nor a call of a tool. ``refusal_text``: a short answer in English that begins as refusals do.
    buffer_streams : bool
        Whether streams are held back until they are complete, so that they can be judged too; others are sent on as they
        come, and nothing takes back what a client has read.
    """

    to: Name = STRONG
    when: Annotated[frozenset[Fault], Field(min_length=1)] = frozenset(("refusal", "invalid_json", "empty"))
    buffer_streams: bool = False


class Bar(_Section):
    """How good the predicted target must be: a ``threshold``, or a ``quality`` as in :class:`Predict`."""

    threshold: Threshold | None = None
    quality: Quality | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Bar:
        if (self.threshold is None) == (self.quality is None):
            raise ValueError("give one of threshold and quality")
        return self


class ModePrediction(_Section):
    """A mode that is predicted by a bar of its own, with the targets of the tier's ``predict``."""

    predict: Bar


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StepRule(_Section):
    """Where a request goes that ends in a tool's result which meets all of the rule's conditions.

    Attributes
    ----------
    to : str
        A target; ``predict``, where the tier predicts; or ``stay``, at the target that the session is at.
    tool : tuple of str
        Patterns of the tool's name (``*``, ``?``, ``[…]``), whatever its case; one of them must match.
    kind : tuple of str
        Kinds of tools by their names: ``read`` (lists and searches too), ``edit``, ``run``, ``web``, ``other``.
    larger_than, smaller_than : int or None
        Characters of the result.
    error, failed_test : bool or None
        Whether it is, or reads like, an error, or a failed test.
    """

    to: Name
    tool: Annotated[tuple[Pattern, ...], BeforeValidator(_listed)] = ()
    kind: Annotated[tuple[ToolKind, ...], BeforeValidator(_listed)] = ()
    larger_than: Characters | None = None
    smaller_than: Characters | None = None
    error: bool | None = None
    failed_test: bool | None = None


# Tags stand in the place of an error, which leaves out what is in brackets.
_BY_NAME, _OWN_BAR = "[target]", "[predict]"
ModeChoice = Annotated[
    Annotated[Name, Tag(_BY_NAME)] | Annotated[ModePrediction, Tag(_OWN_BAR)],
    Discriminator(lambda value: _OWN_BAR if isinstance(value, dict | ModePrediction) else _BY_NAME),
]


class Tier(_Section):
    """A named map from mode to target.

    Attributes
    ----------
    modes : mapping
        Of each mode a target, ``predict``, or a prediction by a bar of its own.
    default : str
        For requests without a mode: a target or ``predict``.
    unknown_mode : {"default", "predict"}
        For requests with a mode that is not among ``modes``.
    steps : tuple of StepRule
        For requests that end in a tool's result, before the policy's own rules.
    move_up : {"policy", "tier"}
        Among which targets a dearer one is looked for where the chosen one cannot take a request.
    escalate : Escalate or None
        A second chance for answers that are none.
    """

    predict: Predict | None = None
    modes: Mapping[Mode, ModeChoice] = Field(default_factory=dict)
    default: Name = PREDICT
    escalate: Escalate | None = None
    unknown_mode: Literal["default", "predict"] = "default"
    steps: tuple[StepRule, ...] = ()
    move_up: Literal["policy", "tier"] = "policy"

    def uses_prediction(self) -> bool:
        """Whether some request may need a bundle."""
        return next(self.predicts(), None) is not None

    def predicts(self) -> Iterator[Loc]:
        """Where in it a prediction is asked for."""
        if self.default == PREDICT:
            yield ("default",)
        for mode, choice in self.modes.items():
            if choice == PREDICT or isinstance(choice, ModePrediction):
                yield ("modes", mode)
        if self.unknown_mode == PREDICT:
            yield ("unknown_mode",)
        for index, rule in enumerate(self.steps):
            if rule.to == PREDICT:
                yield ("steps", index, "to")

    def leads_to(self, target: str) -> bool:
        """Whether it names the target; asked of a tier that is bound to a bundle."""
        return (
            target == self.default
            or target in self.modes.values()
            or any(target == rule.to for rule in self.steps)
            or (self.predict is not None and target in (self.predict.unknown, *self.predict.named()))
        )


class Limits(_Section):
    """What a client may do.

    Attributes
    ----------
    body_bytes : int
        The largest body of a request.
    prompts : int
        The most prompts of one ``/v1/route``.
    threshold_override : bool
        Whether ``x-router-threshold`` counts.
    explain : bool
        Whether ``x-router-explain: 1`` is answered with ``x-router-trail``, which tells names of targets.
    """

    body_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    prompts: Annotated[int, Field(ge=1)] = 1000
    threshold_override: bool = False
    explain: bool = False


class Capture(_Section):
    """Keep prompts in the ledger, with keys and e-mail addresses taken out (:mod:`router.redaction`): what retraining needs.

    Attributes
    ----------
    share : float
        Of the requests, chosen at random, whatever they ask.
    keep_days : float
        After which a prompt is deleted; it goes by what was in force when it was captured.
    """

    share: Annotated[float, Field(ge=0, le=1)]
    keep_days: Annotated[float, Field(gt=0, le=3_650)] = 30


class Server(_Section):
    """Where and how to serve, kept beside the policy. Flags and environment variables win."""

    host: str | None = None
    port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    log_level: Literal["debug", "info", "warning", "error"] | None = None
    bundle: str | None = None


class Address(_Section):
    """What the ``model`` of a request means: a target (pinned), or a tier, maybe with a mode."""

    target: str | None = None
    tier: str | None = None
    mode: str | None = None


class Policy(_Section):
    """The policy in force. Load it with :func:`load_policy`; before deciding, bind it to a bundle."""

    version: Literal[1]
    targets: Annotated[Mapping[Name, Target], Field(min_length=1)]
    tiers: Mapping[Name, Tier] = Field(default_factory=dict)
    default_tier: Name | None = None
    aliases: Mapping[Alias, str] = Field(default_factory=dict)
    steps: tuple[StepRule, ...] = ()
    limits: Limits = Limits()
    sessions: SessionRule = SessionRule()
    capture: Capture | None = None
    budgets: Budgets | None = None
    server: Server = Server()

    @property
    def hash(self) -> str:
        """Which policy this is: 12 hexadecimal digits over what it says, however it is laid out."""
        canonical = json.dumps(self.model_dump(), sort_keys=True, default=sorted)  # sets have no order
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def uses_prediction(self) -> bool:
        """Whether any tier needs a bundle."""
        by_step = any(rule.to == PREDICT for rule in self.steps)
        return any(
            tier.uses_prediction() or (by_step and tier.predict is not None) for tier in self.tiers.values()
        )

    def bound_to(
        self,
        targets: Sequence[str],
        threshold: float,
        *,
        bars: Mapping[float, float] = MappingProxyType({}),
        knows_steps: bool = False,
    ) -> Policy:
        """The same policy with each prediction's targets, thresholds and tool results spelled out for a bundle.

        Parameters
        ----------
        targets : sequence of str
            The bundle's, cheapest first.
        threshold : float
            The bundle's own, used where the policy gives none.
        bars : mapping of float to float
            The thresholds that the bundle holds for a share of the best target's quality.
        knows_steps : bool
            Whether the bundle was trained on requests that end in a tool's result.

        Raises
        ------
        PolicyError
            A tier's prediction does not fit the bundle.
        """
        problems: list[Problem] = []
        tiers = {}
        for name, tier in self.tiers.items():
            try:
                tiers[name] = _bound_tier(("tiers", name), tier, targets, threshold, bars, knows_steps)
            except _Misfit as misfit:
                problems.append(misfit.problem)
        if problems:
            raise policy_error(problems)
        return self.model_copy(update={"tiers": tiers})

    def find(self, model: str) -> Address | None:
        """What the ``model`` of a request names: a target, a tier, ``tier:mode``, an alias, or nothing."""
        if len(model) > _LONGEST_MODEL:
            return None
        found = self._address(model) or self._address(self.aliases.get(model, ""))
        if found is not None:
            return found
        base, _, mode = model.rpartition(":")
        if MODE.fullmatch(mode.lower()):
            tier = self._alias(base)
            if tier is not None and tier.tier is not None and tier.mode is None:
                return Address(tier=tier.tier, mode=mode.lower())
        return self._alias(model)

    def _address(self, name: str) -> Address | None:
        if name in self.targets:
            return Address(target=name)
        tier, _, mode = name.partition(":")
        if tier == AUTO:
            tier = self.default_tier or ""
        if tier in self.tiers and (MODE.fullmatch(mode.lower()) if ":" in name else True):
            return Address(tier=tier, mode=mode.lower() or None)
        return None

    def _alias(self, model: str) -> Address | None:
        if model in self.aliases:
            return self._address(self.aliases[model])
        for pattern, name in self.aliases.items():
            if fnmatch.fnmatchcase(model, pattern):
                return self._address(name)
        return None

    def thresholds(self) -> dict[str, float]:
        """Of each tier that predicts by a threshold, that threshold; asked of a policy that is bound to a bundle."""
        predicts = ((name, tier.predict) for name, tier in self.tiers.items())
        return {name: by.threshold for name, by in predicts if by is not None and by.threshold is not None}

    def costs(self, names: Sequence[str], tokens: Tokens) -> list[float]:
        """US dollars that a request of so many tokens costs at each target; these have prices."""
        prices = [self.targets[name].prices for name in names]
        return [price.cost(input=tokens.input, output=tokens.output) for price in prices if price is not None]

    def names(self) -> list[str]:
        """What a client can ask for by ``model``: tiers, targets, tiers with a mode, and aliases that are not patterns."""
        auto = [AUTO] if self.default_tier is not None and AUTO not in self.tiers else []
        tiers = {
            **({AUTO: self.tiers[self.default_tier]} if auto and self.default_tier else {}),
            **self.tiers,
        }
        with_mode = [f"{name}:{mode}" for name, tier in tiers.items() for mode in tier.modes]
        plain = [alias for alias in self.aliases if not any(sign in alias for sign in "*?[")]
        return [*tiers, *self.targets, *with_mode, *plain]

    def dearer(self, name: str, tokens: Tokens) -> list[str]:
        """The targets above one, from the next up: those that cost as much or more for so many tokens, by their cost.

        Where prices are missing the order of the policy stands for them: targets without prices come last, and only those
        below the target in the policy; above a target without prices are all below it in the policy.
        """
        order = list(self.targets)
        below = order[order.index(name) + 1 :]
        own = self.targets[name].prices
        if own is None:
            return below
        cost = {
            other: prices.cost(input=tokens.input, output=tokens.output)
            for other in order
            if other != name and (prices := self.targets[other].prices) is not None
        }
        floor = own.cost(input=tokens.input, output=tokens.output)
        priced = sorted((other for other in cost if cost[other] >= floor), key=cost.__getitem__)
        return [*priced, *(other for other in below if other not in cost)]

    def stronger(self, tier: str) -> str:
        """The target that this tier escalates to."""
        section = self.tiers[tier]
        assert section.escalate is not None
        if section.escalate.to in self.targets:
            return section.escalate.to
        assert section.predict is not None
        return section.predict.named()[-1]  # cheapest first, once bound

    def missing_keys(self, environment: Mapping[str, str]) -> list[str]:
        """One line for each environment variable that a target needs and that is not set."""
        users: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            if target.api_key_env is not None and not environment.get(target.api_key_env):
                users.setdefault(target.api_key_env, []).append(name)
        return [
            f"{variable} is not set: requests to {', '.join(names)} will be answered with 401"
            for variable, names in users.items()
        ]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a policy: where in it (keys and positions), and what, in words."""

    where: Loc
    what: str

    @property
    def key(self) -> str:
        """The place as a person writes it: ``tiers.top.default``."""
        # pydantic marks a wrong key of a mapping, and which form of a value it took, in brackets; a reader needs neither.
        keys = [str(key) for key in self.where if key not in _MARKS]
        return printable(".".join(keys), 200)

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" if self.where else self.what


_MARKS = ("[key]", _BY_NAME, _OWN_BAR)


class _Misfit(Exception):
    """A part of a policy does not fit the bundle."""

    def __init__(self, where: Loc, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(where, what)


def policy_error(
    problems: Sequence[Problem], path: Path | str = "", lines: Mapping[Loc, int] | None = None
) -> PolicyError:
    """The error that tells the first of some problems, and holds them all."""
    first = _placed(problems[0], path, lines or {}) if path else str(problems[0])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return PolicyError(f"{first}{more}", tuple(problems))


def _bound_tier(
    at: Loc,
    tier: Tier,
    targets: Sequence[str],
    threshold: float,
    bars: Mapping[float, float],
    knows_steps: bool,
) -> Tier:
    if tier.predict is None:
        return tier
    modes = {
        mode: choice.model_copy(
            update={"predict": _bound_bar((*at, "modes", mode, "predict"), choice.predict, bars)}
        )
        if isinstance(choice, ModePrediction)
        else choice
        for mode, choice in tier.modes.items()
    }
    predict = _bound((*at, "predict"), tier.predict, targets, threshold, bars, knows_steps)
    return tier.model_copy(update={"predict": predict, "modes": modes})


def _bound_bar(at: Loc, bar: Bar, bars: Mapping[float, float]) -> Bar:
    if bar.quality is None:
        return bar
    # With both: a bound one tells its threshold, and that it stands for a quality.
    return bar.model_copy(update={"threshold": _threshold_for(at, bar.quality, bars)})


def _threshold_for(at: Loc, quality: float, bars: Mapping[float, float]) -> float:
    found = next((threshold for held, threshold in bars.items() if abs(held - quality) < 1e-9), None)
    if found is None:
        held = ", ".join(f"{bar:g}" for bar in sorted(bars)) or "none"
        raise _Misfit(
            (*at, "quality"),
            f"the bundle holds no threshold for {quality:g} (it holds {held}); make one: "
            f"router-train tune BUNDLE DATASET --quality {quality:g} --write-bar",
        )
    return found


def _bound(
    at: Loc,
    predict: Predict,
    targets: Sequence[str],
    threshold: float,
    bars: Mapping[float, float],
    knows_steps: bool,
) -> Predict:
    if predict.targets:
        missing = [name for name in targets if name not in predict.targets]
        unknown = [name for name in predict.targets if name not in targets]
        if missing or unknown:
            raise _Misfit(
                (*at, "targets"),
                f"the bundle predicts {', '.join(targets)}; "
                + (f"no target is named for {missing[0]}" if missing else f"{unknown[0]} is not one of them"),
            )
        mapping = {name: predict.targets[name] for name in targets}
    elif len(targets) == 2:
        assert predict.weak is not None
        assert predict.strong is not None
        mapping = {targets[0]: predict.weak, targets[1]: predict.strong}
    else:
        raise _Misfit(
            at,
            f"the bundle predicts {len(targets)} targets ({', '.join(targets)}); name one for each under targets",
        )
    if predict.quality is not None:
        in_force = _threshold_for(at, predict.quality, bars)
    else:
        in_force = predict.threshold if predict.threshold is not None else threshold
    flagged_to = mapping[targets[-1]] if predict.unknown == STRONG else predict.unknown
    if predict.names_strong and STRONG in mapping.values() and flagged_to != STRONG:
        raise _Misfit(
            (*at, "unknown"),
            f"{STRONG} is a target of the tier too, but not its dearest, {flagged_to}; rename it",
        )
    return predict.model_copy(
        update={
            "weak": None,
            "strong": None,
            "targets": mapping,
            "threshold": in_force,
            "unknown": flagged_to,
            "tool_results": predict.tool_results or ("predict" if knows_steps else "stay"),
        }
    )


def default_policy_path() -> Path:
    """The policy that the package carries: two echo targets, no key needed."""
    return Path(str(resources.files("router").joinpath("default_policy.yaml")))


def example_policy_path() -> Path:
    """A policy with public models and their prices to start one's own from: every field, explained."""
    return Path(str(resources.files("router").joinpath("example_policy.yaml")))


def load_policy(path: Path) -> Policy:
    """Read and check a policy file: YAML, or JSON where the name ends in ``.json``.

    Raises
    ------
    UsageError
        The file is not there.
    PolicyError
        It is not valid; the message names file, line and key.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: no policy can be read there ({error.strerror})") from None
    return parse_policy(content, path)


def parse_policy(content: bytes, path: Path | str) -> Policy:
    """Check what stands in a policy file; ``path`` says where it is from, in messages and by its suffix.

    Raises
    ------
    PolicyError
        It is not valid; the message names file, line and key.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: not a text file in UTF-8") from None
    problems: list[Problem] = []
    document, lines = _read(text, path, problems)
    if not isinstance(document, dict):
        raise PolicyError(f"{path}: a policy is a mapping that starts with 'version: 1'")
    try:
        policy = Policy.model_validate(document)
    except ValidationError as error:
        problems += [Problem(tuple(item["loc"]), _words(item)) for item in error.errors(include_url=False)]
        raise policy_error(problems, path, lines) from None
    problems += [Problem(where, what) for where, what in _wrong_references(policy)]
    if problems:
        raise policy_error(problems, path, lines)
    return policy


def placed(problems: Iterable[Problem], content: bytes, path: Path | str) -> list[str]:
    """Problems of a policy as lines for a person: file, line, key, and what is wrong; ``content`` can be read."""
    _, lines = _read(content.decode("utf-8"), path, [])
    return [_placed(problem, path, lines) for problem in problems]


def printable(text: str, limit: int = 64) -> str:
    """Somebody's text as it may stand in a message: short, and without control characters."""
    shown = "".join(sign if sign.isprintable() else "�" for sign in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def _read(text: str, path: Path | str, problems: list[Problem]) -> tuple[Any, dict[Loc, int]]:
    """What a policy's text holds, and the line of every key; a key that stands twice is a problem."""
    if not str(path).endswith(".json"):
        return _parse_yaml(text, path, problems)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise PolicyError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise PolicyError(f"{path}: not valid JSON (nested too deeply)") from None
    try:  # JSON is YAML, nearly always
        return document, _parse_yaml(text, path, problems)[1]
    except PolicyError:
        return document, {}


def _parse_yaml(text: str, path: Path | str, problems: list[Problem]) -> tuple[Any, dict[Loc, int]]:
    # Not libyaml's loader, faster as it is: it holds up all other threads, words errors in its own way, takes what
    # this one refuses, and a few thousand brackets in one another end the process.
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, path, problems))
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}: " if error.problem_mark else " "
        raise PolicyError(f"{path}:{line}not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None


def _lines(node: yaml.Node | None, path: Path | str, problems: list[Problem]) -> Iterator[tuple[Loc, int]]:
    """The line of every key, anchors written out; too many of them are an error."""
    for count, found in enumerate(_lines_at(node, problems, ())):
        if count == _MOST_NODES:
            raise PolicyError(f"{path}: over {_MOST_NODES:,} keys and items; a policy holds fewer")
        yield found


def _lines_at(node: yaml.Node | None, problems: list[Problem], at: Loc) -> Iterator[tuple[Loc, int]]:
    """YAML lets a key stand twice and takes the last: here that is a problem."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in seen:
                problems.append(Problem((*at, name), f"is there already, on line {seen[name]}"))
            seen[name] = line
            yield (*at, name), line
            yield from _lines_at(value, problems, (*at, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*at, index), item.start_mark.line + 1
            yield from _lines_at(item, problems, (*at, index))


def _placed(problem: Problem, path: Path | str, lines: Mapping[Loc, int]) -> str:
    keys = tuple(key for key in problem.where if key not in _MARKS)
    known = next((keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    return f"{path}{f':{lines[known]}' if known else ''}: {problem}"


_KEYS = frozenset(
    field
    for section in (
        Policy,
        Target,
        Cooldown,
        Prices,
        Predict,
        Tokens,
        Tier,
        Escalate,
        Bar,
        ModePrediction,
        StepRule,
        Budgets,
        Amounts,
        Pacing,
        Limits,
        Capture,
        Server,
    )
    for field in section.model_fields
)
_WORDS = {
    "missing": "is missing",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "string_type": "must be text",
}


def _words(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _KEYS, n=1)
        return "unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "string_pattern_mismatch":
        return f"may not be written so (allowed: {problem['ctx']['pattern']})"
    message: str = _WORDS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _wrong_references(policy: Policy) -> Iterator[tuple[Loc, str]]:
    """What names something that is not there, or names one thing twice."""
    targets = ", ".join(policy.targets)
    for word, meaning in ((PREDICT, "a word of the tiers"), (STAY, "a word of the steps")):
        if word in policy.targets:
            yield ("targets", word), f"{word} is {meaning}; give the target another name"
    if AUTO in policy.targets:
        yield ("targets", AUTO), f"{AUTO} stands for the default tier; give the target another name"
    yield from _wrong_steps(policy, ("steps",), policy.steps)
    for name, tier in policy.tiers.items():
        at: Loc = ("tiers", name)
        if name in policy.targets:
            yield at, "is the name of a target too"
        if tier.predict is None:
            what = f"says {PREDICT}, but the tier has no predict section; name a target"
            yield from (((*at, *where), what) for where in tier.predicts())
        yield from _wrong_steps(policy, (*at, "steps"), tier.steps)
        chosen: list[tuple[Loc, str]] = [
            (("modes", mode), choice) for mode, choice in tier.modes.items() if isinstance(choice, str)
        ]
        chosen.append((("default",), tier.default))
        chosen += [(("predict",), target) for target in (tier.predict.named() if tier.predict else ())]
        for where, target in chosen:
            if target != PREDICT and target not in policy.targets:
                yield (*at, *where), f"no target is named {target}; there are {targets}"
        if tier.predict is not None and tier.predict.quality_per_dollar is not None:
            for target in tier.predict.named():
                if target in policy.targets and policy.targets[target].prices is None:
                    yield (*at, "predict", "quality_per_dollar"), f"target {target} has no prices"
        if tier.predict is not None:
            unknown = tier.predict.unknown
            # Which of several targets is the dearest, the bundle knows: then it is checked when that is there.
            meant = STRONG in (tier.predict.targets.values() or (tier.predict.strong,))
            if tier.predict.names_strong and STRONG in policy.targets and not meant:
                yield (
                    (*at, "predict", "unknown"),
                    f"{STRONG} is a target too, but not the one that the tier's prediction ends with; rename it",
                )
            if unknown not in (PREDICT, STRONG, *policy.targets):
                yield (
                    (*at, "predict", "unknown"),
                    f"{unknown} is none of {STRONG}, {PREDICT} and the targets, {targets}",
                )
    if policy.default_tier is None and policy.tiers:
        yield ("default_tier",), f"is missing; the tiers are {', '.join(policy.tiers)}"
    elif policy.default_tier is not None and policy.default_tier not in policy.tiers:
        yield ("default_tier",), f"no tier is named {policy.default_tier}"
    elif AUTO in policy.tiers and policy.default_tier != AUTO:
        yield ("tiers", AUTO), f"{AUTO} always means the default tier, which is {policy.default_tier}"
    for alias, name in policy.aliases.items():
        if alias in policy.targets or alias in policy.tiers:
            yield ("aliases", alias), "is the name of a target or a tier already"
        elif policy._address(name) is None:
            yield ("aliases", alias), f"{name} is no target, tier or tier:mode"
    yield from _wrong_ways_out(policy)
    if policy.budgets is not None:
        unpriced = [name for name, one in policy.targets.items() if one.prices is None and not one.echo]
        yield from (
            (("targets", name), "prices is missing: budgets count what it costs") for name in unpriced
        )


def _wrong_ways_out(policy: Policy) -> Iterator[tuple[Loc, str]]:
    """Fallbacks and escalations that lead nowhere, or back."""
    targets = ", ".join(policy.targets)
    for name, target in policy.targets.items():
        for index, fallback in enumerate(target.fallbacks):
            at: Loc = ("targets", name, "fallbacks", index)
            if fallback == name:
                yield at, f"{name} cannot be its own fallback"
            elif fallback not in policy.targets:
                yield at, f"no target is named {fallback}; there are {targets}"
            elif fallback in target.fallbacks[:index]:
                yield at, f"{fallback} is on the list already: each is tried once"
    for name, tier in policy.tiers.items():
        if tier.escalate is None or tier.escalate.to in policy.targets:
            continue
        at = ("tiers", name, "escalate", "to")
        if tier.escalate.to != STRONG:
            yield at, f"{tier.escalate.to} is neither {STRONG} nor one of the targets, {targets}"
        elif tier.predict is None:
            yield at, f"{STRONG} is the dearest of a prediction, which this tier has not; name a target"


def _wrong_steps(policy: Policy, at: Loc, rules: Sequence[StepRule]) -> Iterator[tuple[Loc, str]]:
    for index, rule in enumerate(rules):
        if rule.to not in (PREDICT, STAY, *policy.targets):
            targets = ", ".join(policy.targets)
            yield (*at, index, "to"), f"{rule.to} is none of {PREDICT}, {STAY} and the targets, {targets}"
