"""Policy file → :class:`Policy`: the targets, the tiers that map a mode to a target, the threshold in force.

Keys never stand in a policy: a target names the environment variable that holds its key.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from router.errors import PolicyError, UsageError

PREDICT = "predict"
STRONG = "strong"
AUTO = "auto"
MODE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LONGEST_MODEL = 256

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
Mode = Annotated[str, StringConstraints(pattern=rf"^{MODE.pattern}$")]
Alias = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,200}$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[\x21-\x7e]+$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Threshold = Annotated[float, Field(ge=-1, le=1)]
Speech = Literal["chat", "messages", "responses"]
Capability = Literal["tools", "images", "audio", "files", "json_schema", "reasoning"]

# What `params` may not hold: what the dispatcher sets itself, and where a key would end up in the file.
_RESERVED_PARAMS = frozenset(
    ("model", "messages", "stream", "api_key", "api_base", "base_url", "timeout", "num_retries")
)

# Keys never stand in a policy.
_KEY_HEADERS = frozenset(("authorization", "api-key", "x-api-key", "x-goog-api-key"))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prices(_Section):
    """US dollars per million tokens. Cached tokens cost what other input does unless said otherwise."""

    input: Price
    output: Price
    cached_read: Price | None = None
    cache_write: Price | None = None

    def cost(self, *, input: int, output: int, cached_read: int = 0, cache_write: int = 0) -> float:
        """US dollars for a call; ``cached_read`` and ``cache_write`` are parts of ``input``."""
        read_price = self.input if self.cached_read is None else self.cached_read
        write_price = self.input if self.cache_write is None else self.cache_write
        plain = max(input - cached_read - cache_write, 0)
        cached = cached_read * read_price + cache_write * write_price
        return (plain * self.input + cached + output * self.output) / 1e6


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
    api_base : str or None
        The server's URL. An ``openai/…`` target with one gets messages, tools and the like as they came.
    params : mapping
        Sent with every request that does not set them itself; may be litellm's (``api_version``, …), but on an
        ``openai/…`` target with an ``api_base``: there they are fields of the body, ``extra_headers`` alone are headers.
    drop_params : bool
        Leave out what the provider does not take, instead of answering 400; not where bodies pass through.
    timeout : float
        Seconds until the answer, or until a stream's next chunk.
    speaks : set of str
        The dialects that its server takes: bodies of these pass as they came. Where nothing is said, ``anthropic/…``
        takes ``messages``, ``openai/…`` takes ``chat``, and without an ``api_base`` ``responses`` too.
    """

    model: ModelId = ""
    echo: bool = False
    api_key_env: Variable | None = None
    api_base: Url | None = None
    family: Name | None = None
    context_window: Annotated[int, Field(gt=0)] | None = None
    max_output_tokens: Annotated[int, Field(gt=0)] | None = None
    supports: frozenset[Capability] = frozenset()
    prices: Prices | None = None
    params: Mapping[str, Any] = Field(default_factory=dict)
    drop_params: bool = False
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600
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
        return self


class Tokens(_Section):
    """Tokens of a typical request and its answer."""

    input: Annotated[int, Field(ge=0)]
    output: Annotated[int, Field(ge=0)]


class Predict(_Section):
    """Which target stands for which of the bundle's, and by which rule one is taken.

    ``weak`` and ``strong`` name the two of a pair; ``targets`` maps the bundle's names, where there are more.
    Without a threshold, the bundle's own counts.

    With ``quality_per_dollar`` (λ) it is not the threshold that decides: the target of the highest expected quality −
    λ · dollars is taken. The dollars are the targets' ``prices`` for a request of ``tokens``. At 50, a cent must gain half an
    answer.

    ``unknown`` says where a prompt goes that the bundle flags as unlike its training data: ``strong`` (the dearest of
    the bundle's targets, which is what a client without a router would have asked), ``predict`` (the score decides as
    for any other) or a target.
    """

    weak: Name | None = None
    strong: Name | None = None
    targets: Mapping[str, Name] = Field(default_factory=dict)
    threshold: Threshold | None = None
    quality_per_dollar: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tokens: Tokens | None = None
    unknown: Name = STRONG

    @model_validator(mode="after")
    def _one_form(self) -> Predict:
        pair = self.weak is not None and self.strong is not None
        if pair == bool(self.targets) or (self.weak is None) != (self.strong is None):
            raise ValueError("give weak and strong, or targets")
        if (self.quality_per_dollar is None) != (self.tokens is None):
            raise ValueError("quality_per_dollar and tokens go together")
        return self

    @property
    def names_strong(self) -> bool:
        """Whether ``unknown`` says ``strong`` in so many words, which a target of that name would make ambiguous."""
        return self.unknown == STRONG and "unknown" in self.model_fields_set

    def named(self) -> tuple[str, ...]:
        """The policy's targets that it names."""
        pair = tuple(name for name in (self.weak, self.strong) if name is not None)
        return pair or tuple(self.targets.values())


class Tier(_Section):
    """A named map from mode to target. ``default`` is for requests without a known mode."""

    predict: Predict | None = None
    modes: Mapping[Mode, Name] = Field(default_factory=dict)
    default: Name = PREDICT

    def uses_prediction(self) -> bool:
        return PREDICT in (self.default, *self.modes.values())


class Limits(_Section):
    """What a client may do."""

    body_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    prompts: Annotated[int, Field(ge=1)] = 1000
    threshold_override: bool = False


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
    limits: Limits = Limits()
    server: Server = Server()

    @property
    def hash(self) -> str:
        """Which policy this is: 12 hexadecimal digits over what it says, however it is laid out."""
        canonical = json.dumps(self.model_dump(), sort_keys=True, default=sorted)  # sets have no order
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def uses_prediction(self) -> bool:
        """Whether any tier needs a bundle."""
        return any(tier.uses_prediction() for tier in self.tiers.values())

    def bound_to(self, targets: Sequence[str], threshold: float) -> Policy:
        """The same policy with each prediction's targets and threshold spelled out for a bundle.

        Parameters
        ----------
        targets : sequence of str
            The bundle's, cheapest first.
        threshold : float
            The bundle's own, used where the policy gives none.

        Raises
        ------
        PolicyError
            A tier's prediction does not fit the bundle's targets.
        """
        tiers = {
            name: tier.model_copy(update={"predict": _bound(name, tier.predict, targets, threshold)})
            if tier.predict
            else tier
            for name, tier in self.tiers.items()
        }
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

    def costs(self, names: Sequence[str], tokens: Tokens) -> list[float]:
        """US dollars that a request of so many tokens costs at each target; these have prices."""
        prices = [self.targets[name].prices for name in names]
        return [price.cost(input=tokens.input, output=tokens.output) for price in prices if price is not None]

    def names(self) -> list[str]:
        """What a client can ask for by ``model``: tiers, targets, and aliases that are not patterns."""
        auto = [AUTO] if self.default_tier is not None and AUTO not in self.tiers else []
        plain = [alias for alias in self.aliases if not any(sign in alias for sign in "*?[")]
        return [*auto, *self.tiers, *self.targets, *plain]

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


def _bound(tier: str, predict: Predict, targets: Sequence[str], threshold: float) -> Predict:
    if predict.targets:
        missing = [name for name in targets if name not in predict.targets]
        unknown = [name for name in predict.targets if name not in targets]
        if missing or unknown:
            raise PolicyError(
                f"tiers.{tier}.predict.targets: the bundle predicts {', '.join(targets)}; "
                + (f"no target is named for {missing[0]}" if missing else f"{unknown[0]} is not one of them")
            )
        mapping = {name: predict.targets[name] for name in targets}
    elif len(targets) == 2:
        assert predict.weak is not None
        assert predict.strong is not None
        mapping = {targets[0]: predict.weak, targets[1]: predict.strong}
    else:
        raise PolicyError(
            f"tiers.{tier}.predict: the bundle predicts {len(targets)} targets ({', '.join(targets)}); "
            "name one for each under targets"
        )
    in_force = predict.threshold if predict.threshold is not None else threshold
    flagged_to = mapping[targets[-1]] if predict.unknown == STRONG else predict.unknown
    if predict.names_strong and STRONG in mapping.values() and flagged_to != STRONG:
        raise PolicyError(
            f"tiers.{tier}.predict.unknown: {STRONG} is a target of the tier too, but not its dearest, {flagged_to}; rename it"
        )
    return Predict(
        targets=mapping,
        threshold=in_force,
        quality_per_dollar=predict.quality_per_dollar,
        tokens=predict.tokens,
        unknown=flagged_to,
    )


def default_policy_path() -> Path:
    """The policy that the package carries: two echo targets, no key needed."""
    return Path(str(resources.files("router").joinpath("default_policy.yaml")))


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
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: no policy can be read there ({error.strerror})") from None
    document, lines = _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)
    if not isinstance(document, dict):
        raise PolicyError(f"{path}: a policy is a mapping that starts with 'version: 1'")
    try:
        policy = Policy.model_validate(document)
    except ValidationError as error:
        problems = [(tuple(item["loc"]), _words(item)) for item in error.errors(include_url=False)]
    else:
        problems = list(_wrong_references(policy))
    if problems:
        where, what = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PolicyError(f"{_place(path, where, lines)}: {what}{more}")
    return policy


def printable(text: str, limit: int = 64) -> str:
    """Somebody's text as it may stand in a message: short, and without control characters."""
    shown = "".join(sign if sign.isprintable() else "�" for sign in text[:limit])
    return shown + ("…" if len(text) > limit else "")


Loc = tuple[int | str, ...]


def _parse_json(text: str, path: Path) -> tuple[Any, dict[Loc, int]]:
    try:
        return json.loads(text), {}
    except ValueError as error:
        raise PolicyError(f"{path}: not valid JSON ({error})") from None


def _parse_yaml(text: str, path: Path) -> tuple[Any, dict[Loc, int]]:
    try:
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), path))
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}: " if error.problem_mark else " "
        raise PolicyError(f"{path}:{line}not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None


def _lines(node: yaml.Node | None, path: Path, at: Loc = ()) -> Iterator[tuple[Loc, int]]:
    """The line of every key. YAML lets a key stand twice and takes the last: here that is an error."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in seen:
                place = printable(".".join(map(str, (*at, name))), 200)
                raise PolicyError(f"{path}:{line}: {place} is there already, on line {seen[name]}")
            seen[name] = line
            yield (*at, name), line
            yield from _lines(value, path, (*at, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*at, index), item.start_mark.line + 1
            yield from _lines(item, path, (*at, index))


def _place(path: Path, where: Loc, lines: Mapping[Loc, int]) -> str:
    # pydantic marks a wrong key of a mapping with "[key]"; a reader needs the key alone.
    keys = tuple(key for key in where if key != "[key]")
    known = next((keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    line = f":{lines[known]}" if known else ""
    return f"{path}{line}" + (f": {printable('.'.join(map(str, keys)), 200)}" if keys else "")


_KEYS = frozenset(
    field
    for section in (Policy, Target, Prices, Predict, Tokens, Tier, Limits, Server)
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
    if PREDICT in policy.targets:
        yield ("targets", PREDICT), f"{PREDICT} is a word of the tiers; give the target another name"
    if AUTO in policy.targets:
        yield ("targets", AUTO), f"{AUTO} stands for the default tier; give the target another name"
    for name, tier in policy.tiers.items():
        at: Loc = ("tiers", name)
        if name in policy.targets:
            yield at, "is the name of a target too"
        if tier.predict is None and tier.uses_prediction():
            key = "default" if tier.default == PREDICT else "modes"
            yield (*at, key), f"says {PREDICT}, but the tier has no predict section; name a target"
        chosen: list[tuple[Loc, str]] = [(("modes", mode), target) for mode, target in tier.modes.items()]
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
