from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from router.bundle import default_bundle_dir, read_manifest
from router.errors import PolicyError, UsageError
from router.gateway import bound
from router.policy import (
    Address,
    Limits,
    ModePrediction,
    Policy,
    Prices,
    Target,
    Tokens,
    default_policy_path,
    example_policy_path,
    load_policy,
    placed,
)

WHOLE = """\
version: 1
targets:
  cheap:
    model: openai/gpt-4o-mini
    api_key_env: OPENAI_API_KEY
    api_base: null
    family: openai
    context_window: 128000
    max_output_tokens: 16384
    supports: [tools, images, json_schema]
    prices: {input: 0.15, output: 0.60, cached_read: 0.075, cache_write: 0}
    params: {temperature: 0}
    timeout: 600
  frontier: {model: anthropic/claude-opus-4-6, api_key_env: ANTHROPIC_API_KEY}
  local: {echo: true}
tiers:
  auto: {predict: {weak: cheap, strong: frontier, threshold: 0.12}}
  balanced: {modes: {plan: frontier, commit: cheap, code: predict}, default: cheap,
             predict: {targets: {a: cheap, b: frontier}}}
default_tier: auto
aliases: {gpt-4o: auto, "claude-*": "balanced:plan", mini: cheap, "llama*": balanced}
limits: {body_bytes: 1048576, threshold_override: false}
server: {port: 9000}
"""


def written(folder: Path, text: str, name: str = "router.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Policy:
    return load_policy(written(tmp_path, WHOLE))


def test_whole(whole: Policy) -> None:
    cheap = whole.targets["cheap"]
    assert cheap.model == "openai/gpt-4o-mini"
    assert cheap.supports == {"tools", "images", "json_schema"}
    assert cheap.timeout == 600
    assert whole.tiers["balanced"].modes["code"] == "predict"
    assert whole.limits.body_bytes == 2**20
    assert whole.limits.prompts == 1000
    assert whole.targets["local"].model == "echo"


def test_the_policy_that_the_package_carries_needs_no_key() -> None:
    policy = load_policy(default_policy_path())
    assert policy.missing_keys({}) == []
    assert policy.find("gpt-4o") == policy.find("auto") == Address(tier="auto")


def test_hash_is_of_what_it_says_and_not_of_its_layout(tmp_path: Path, whole: Policy) -> None:
    document = whole.model_dump(mode="json", exclude_unset=True)
    as_json = load_policy(written(tmp_path, json.dumps(document, indent=8), "p.json"))
    other = load_policy(written(tmp_path, WHOLE.replace("0.12", "0.13"), "other.yaml"))
    assert as_json.hash == whole.hash
    assert other.hash != whole.hash
    assert len(whole.hash) == 12


@pytest.mark.parametrize(
    ("model", "address"),
    [
        ("auto", Address(tier="auto")),
        ("balanced", Address(tier="balanced")),
        ("auto:plan", Address(tier="auto", mode="plan")),
        ("balanced:Plan", Address(tier="balanced", mode="plan")),
        ("cheap", Address(target="cheap")),
        ("mini", Address(target="cheap")),
        ("gpt-4o", Address(tier="auto")),
        ("gpt-4o:debug", Address(tier="auto", mode="debug")),
        ("claude-opus-4", Address(tier="balanced", mode="plan")),
        ("llama3:8b", Address(tier="balanced", mode="8b")),
        ("llama3:8b:x y", Address(tier="balanced")),
        ("cheap:plan", None),
        ("mini:plan", None),
        ("auto:", None),
        (":plan", None),
        ("auto:a b", None),
        ("auto:plan\n", None),
        ("", None),
        ("gpt-5", None),
        ("claude-" + "x" * 300, None),
    ],
)
def test_find(whole: Policy, model: str, address: Address | None) -> None:
    assert whole.find(model) == address


def test_auto_is_the_default_tier_whatever_its_name(tmp_path: Path) -> None:
    text = "version: 1\ntargets: {a: {echo: true}}\ntiers: {top: {default: a}}\ndefault_tier: top\n"
    policy = load_policy(written(tmp_path, text))
    assert policy.find("auto") == Address(tier="top")
    assert policy.find("auto:plan") == Address(tier="top", mode="plan")
    assert policy.names() == ["auto", "top", "a"]
    assert not policy.uses_prediction()


def test_names_leave_out_patterns(whole: Policy) -> None:
    with_mode = ["balanced:plan", "balanced:commit", "balanced:code"]
    assert whole.names() == ["auto", "balanced", "cheap", "frontier", "local", *with_mode, "gpt-4o", "mini"]


def test_bound_to_a_bundle(whole: Policy) -> None:
    bound = whole.bound_to(("a", "b"), 0.3)
    auto, balanced = bound.tiers["auto"].predict, bound.tiers["balanced"].predict
    assert auto is not None
    assert balanced is not None
    assert dict(auto.targets) == {"a": "cheap", "b": "frontier"}
    assert auto.threshold == 0.12  # the policy's counts
    assert balanced.threshold == 0.3  # and the bundle's where it has none


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("a", "c"), "no target is named for c"),
        (("a",), "predict"),
        (("a", "b", "c"), "the bundle predicts 3 targets"),
    ],
)
def test_a_bundle_that_does_not_fit(whole: Policy, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        whole.bound_to(targets, 0.3)


BY_VALUE = ", quality_per_dollar: 50, tokens: {input: 800, output: 300}}"


def test_quality_against_dollars(tmp_path: Path, whole: Policy) -> None:
    frontier = "prices: {input: 5, output: 25}, api_key_env: ANTHROPIC"
    text = WHOLE.replace(", threshold: 0.12}", BY_VALUE).replace("api_key_env: ANTHROPIC", frontier)
    policy = load_policy(written(tmp_path, text)).bound_to(("a", "b"), 0.3)
    predict = policy.tiers["auto"].predict
    assert predict is not None
    assert predict.tokens is not None
    assert (predict.quality_per_dollar, predict.threshold) == (50, 0.3)
    assert policy.costs(["cheap", "frontier"], predict.tokens) == pytest.approx([3e-4, 1.15e-2])
    with pytest.raises(
        PolicyError, match=r":17: tiers\.auto\.predict.quality_per_dollar: target frontier has no"
    ):
        load_policy(written(tmp_path, WHOLE.replace(", threshold: 0.12}", BY_VALUE)))
    alone = WHOLE.replace("threshold: 0.12", "quality_per_dollar: 50")
    with pytest.raises(
        PolicyError, match=r":17: tiers\.auto\.predict: quality_per_dollar and tokens go together"
    ):
        load_policy(written(tmp_path, alone))


def test_missing_keys_are_one_line_each(whole: Policy) -> None:
    lines = whole.missing_keys({"OPENAI_API_KEY": "sk-x", "ANTHROPIC_API_KEY": ""})
    assert lines == ["ANTHROPIC_API_KEY is not set: requests to frontier will be answered with 401"]


def test_cost_counts_cached_tokens_at_their_own_prices() -> None:
    prices = Prices(input=1, output=10, cached_read=0.1, cache_write=1.25)
    assert prices.cost(input=1000, output=100, cached_read=600, cache_write=200) == pytest.approx(
        (200 * 1 + 600 * 0.1 + 200 * 1.25 + 100 * 10) / 1e6
    )
    assert Prices(input=1, output=10).cost(input=1000, output=0, cached_read=600) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prices:", "pricess:", r":11: targets\.cheap\.pricess: unknown key; did you mean prices\?$"),
        ("version: 1", "version: 2", r":1: version: input should be 1$"),
        ("version: 1\n", "", r"router\.yaml: version: is missing$"),
        ("model: openai/gpt-4o-mini", "model: null", r":4: targets\.cheap\.model: must be text$"),
        ("    model: openai/gpt-4o-mini\n", "", r":3: targets\.cheap: model is missing: a litellm model id"),
        ("input: 0.15", "input: -1", r":11: targets\.cheap\.prices\.input: .*greater than or equal to 0$"),
        ("input: 0.15", "input: .nan", r":11: targets\.cheap\.prices\.input: "),
        ("input: 0.15, ", "", r":11: targets\.cheap\.prices\.input: is missing$"),
        (
            "api_key_env: OPENAI_API_KEY",
            "api_key_env: sk-123",
            r":5: targets\.cheap\.api_key_env: may not be",
        ),
        ("api_base: null", "api_base: localhost", r":6: targets\.cheap\.api_base: may not be"),
        ("{temperature: 0}", "{api_key: sk-1}", r":3: targets\.cheap: params may not set api_key$"),
        ("[tools, images", "[tool, images", r":10: targets\.cheap\.supports"),
        ("timeout: 600", "timeout: 0", r":13: targets\.cheap\.timeout"),
        ("threshold: 0.12", "threshold: 12", r":17: tiers\.auto\.predict\.threshold"),
        ("weak: cheap, ", "", r":17: tiers\.auto\.predict: give weak and strong, or targets$"),
        ("strong: frontier", "strong: fronteer", r"tiers\.auto\.predict: no target is named fronteer"),
        (
            "threshold: 0.12",
            "unknown: weak",
            r":17: tiers\.auto\.predict\.unknown: weak is none of strong, predict",
        ),
        ("plan: frontier", "plan: top", r":18: tiers\.balanced\.modes\.plan: no target is named top"),
        ("plan: frontier", "Plan: frontier", r":18: tiers\.balanced\.modes\.Plan: may not be written so"),
        ("plan: frontier", "no: frontier", r"tiers\.balanced\.modes\."),
        ("default: cheap", "default: chap", r"tiers\.balanced\.default: no target is named chap"),
        ("default_tier: auto", "default_tier: balanced", r"tiers\.auto: auto always means the default tier"),
        ("default_tier: auto", "default_tier: none", r":20: default_tier: no tier is named none"),
        ("default_tier: auto\n", "", r"default_tier: is missing; the tiers are auto, balanced"),
        ("mini: cheap", "mini: chap", r":21: aliases\.mini: chap is no target, tier or tier:mode$"),
        ("mini: cheap", "local: cheap", r":21: aliases\.local: is the name of a target or a tier already$"),
        ("  local:", "  predict:", r":15: targets\.predict: predict is a word of the tiers"),
        ("  local:", "  balanced:", r"tiers\.balanced: is the name of a target too$"),
        ("  local:", "  cheap:", r":15: targets\.cheap: is there already, on line 3$"),
        ("  local:", '  "a b":', r":15: targets\.a b: may not be written so"),
        ("  local:", '  "x\\r\\ny":', r"may not be written so"),
        ("port: 9000", "port: 99999", r":23: server\.port: "),
        ("server: {port: 9000}", "server: 7", r":23: server: must be a mapping$"),
        ("server: {port: 9000}", "server: {port: 9000", r"router\.yaml:\d+: not valid YAML \("),
        ("server: {port: 9000}", "server: \t{}", r"router\.yaml"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_line_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in WHOLE
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy(written(tmp_path, WHOLE.replace(old, new, 1)))
    assert "\n" not in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_more_than_one_problem_is_counted(tmp_path: Path) -> None:
    text = WHOLE.replace("timeout: 600", "timeout: 0").replace("port: 9000", "port: -1")
    with pytest.raises(PolicyError, match=r"timeout.* \(and 1 more\)$"):
        load_policy(written(tmp_path, text))


def test_predict_without_a_predict_section(tmp_path: Path) -> None:
    text = "version: 1\ntargets: {a: {echo: true}}\ntiers: {t: {modes: {x: a}}}\ndefault_tier: t\n"
    with pytest.raises(PolicyError, match=r":3: tiers\.t\.default: says predict, but"):
        load_policy(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- a\n", "hello", "42"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError, match="a policy is a mapping"):
        load_policy(written(tmp_path, text))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "a: !!python/name:os.system"])
def test_yaml_cannot_run_code(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError, match="not valid YAML"):
        load_policy(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no policy can be read there"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no policy can be read there"):
        load_policy(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # caf\xe9")
    with pytest.raises(PolicyError, match="UTF-8"):
        load_policy(tmp_path / "latin.yaml")
    with pytest.raises(PolicyError, match="not valid JSON"):
        load_policy(written(tmp_path, "{", "p.json"))


def test_flagged_prompts_go_to_strong_unless_said_otherwise(whole: Policy, tmp_path: Path) -> None:
    def bound(text: str) -> str:
        policy = load_policy(written(tmp_path, text)).bound_to(("a", "b"), 0.1)
        assert policy.tiers["auto"].predict is not None
        return policy.tiers["auto"].predict.unknown

    assert bound(WHOLE) == "frontier"
    for unknown, meant in [("strong", "frontier"), ("predict", "predict"), ("local", "local")]:
        assert bound(WHOLE.replace("threshold: 0.12", f"unknown: {unknown}")) == meant


def test_strong_may_not_mean_two_targets(tmp_path: Path) -> None:
    text = WHOLE.replace("threshold: 0.12", "unknown: strong").replace("  local:", "  strong:")
    with pytest.raises(PolicyError, match=r"tiers\.auto\.predict\.unknown: strong is a target too"):
        load_policy(written(tmp_path, text))
    assert load_policy(
        written(tmp_path, text.replace("strong: frontier, unknown", "strong: strong, unknown"))
    )


@pytest.mark.parametrize(("hi", "lo", "raises"), [("strong", "small", False), ("small", "strong", True)])
def test_the_bundle_knows_which_target_is_the_dearest(hi: str, lo: str, raises: bool) -> None:
    document = {
        "version": 1,
        "targets": {"small": {"echo": True}, "strong": {"echo": True}},
        "tiers": {"auto": {"predict": {"targets": {"hi": hi, "lo": lo}, "unknown": "strong"}}},
        "default_tier": "auto",
    }
    policy = Policy.model_validate(document)
    if raises:
        with pytest.raises(PolicyError, match="not its dearest, small"):
            policy.bound_to(("lo", "hi"), 0.1)
    else:
        bound = policy.bound_to(("lo", "hi"), 0.1).tiers["auto"].predict
        assert bound is not None
        assert bound.unknown == "strong"


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer x"}, {"X-API-Key": "x"}, ["a"]])
def test_keys_do_not_stand_in_the_policy(headers: object) -> None:
    with pytest.raises(ValueError, match="extra_headers"):
        Target.model_validate({"model": "openai/x", "params": {"extra_headers": headers}})


TIERED = """\
version: 1
targets:
  a: {model: p/a, prices: {input: 1, output: 1}}
  b: {model: p/b}
  c: {model: p/c, prices: {input: 0.5, output: 9}}
  d: {model: p/d, prices: {input: 3, output: 3}}
  e: {model: p/e}
tiers:
  t:
    predict: {weak: a, strong: d, quality: 0.95}
    modes: {x: a, y: predict, z: {predict: {quality: 0.9}}, v: {predict: {threshold: 0.2}}}
    default: a
    steps:
      - {kind: read, to: a}
      - {tool: "x*", kind: [run, web], larger_than: 5, error: true, to: stay}
  u: {modes: {x: b}, default: b}
default_tier: t
steps:
  - {failed_test: true, to: predict}
"""


def test_modes_with_a_bar_of_their_own(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, TIERED))
    bound = policy.bound_to(("weak", "strong"), 0.3, bars={0.95: 0.1, 0.9: 0.15}).tiers["t"]
    assert bound.predict is not None
    assert bound.predict.threshold == 0.1
    own = {mode: c.predict.threshold for mode, c in bound.modes.items() if isinstance(c, ModePrediction)}
    assert own == {"z": 0.15, "v": 0.2}
    assert bound.modes["x"] == "a"
    rules = policy.tiers["t"].steps
    assert (rules[0].kind, rules[1].tool, rules[1].kind) == (("read",), ("x*",), ("run", "web"))
    assert policy.uses_prediction()


def test_a_bar_that_the_bundle_does_not_hold_is_one_line_with_the_command(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, TIERED))
    with pytest.raises(PolicyError) as caught:
        policy.bound_to(("weak", "strong"), 0.3, bars={0.95: 0.1})
    assert str(caught.value) == (
        "tiers.t.modes.z.predict.quality: the bundle holds no threshold for 0.9 (it holds 0.95); make one: "
        "router-train tune BUNDLE DATASET --quality 0.9 --write-bar"
    )
    lines = placed(caught.value.problems, TIERED.encode(), "p.yaml")
    assert lines[0].startswith("p.yaml:11: tiers.t.modes.z.predict.quality: the bundle")


def test_policies_of_every_tier_that_does_not_fit_are_told(tmp_path: Path) -> None:
    text = TIERED.replace("u: {modes", "u: {predict: {targets: {weak: a}}, modes")
    with pytest.raises(PolicyError, match=r"\(and 1 more\)$") as caught:
        load_policy(written(tmp_path, text)).bound_to(("weak", "strong"), 0.3)
    assert [problem.key for problem in caught.value.problems] == [
        "tiers.t.modes.z.predict.quality",
        "tiers.u.predict.targets",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "quality: 0.95}",
            "quality: 0.95, threshold: 0}",
            r":10: tiers\.t\.predict: quality and threshold are two",
        ),
        ("quality: 0.95}", "quality: 95}", r":10: tiers\.t\.predict\.quality: "),
        ("{quality: 0.9}", "{}", r":11: tiers\.t\.modes\.z\.predict: give one of threshold and quality$"),
        ("{quality: 0.9}", "{qualty: 0.9}", r":11: tiers\.t\.modes\.z\.predict.*(unknown key|give one)"),
        ("y: predict", "y: [a]", r":11: tiers\.t\.modes\.y: must be text$"),
        ("kind: read", "kind: reed", r":14: tiers\.t\.steps\.0\.kind\.0: input should be 'read', 'edit'"),
        ("kind: read, to: a", "kind: read", r":14: tiers\.t\.steps\.0\.to: is missing$"),
        (
            "kind: read, to: a",
            "kind: read, to: aa",
            r":14: tiers\.t\.steps\.0\.to: aa is none of predict, stay and",
        ),
        ("to: predict", "to: f", r":19: steps\.0\.to: f is none of"),
        (
            "default: b}",
            "default: b, unknown_mode: predict}",
            r":16: tiers\.u\.unknown_mode: says predict, but the",
        ),
        (
            "default: b}",
            "default: b, steps: [{to: predict}]}",
            r":16: tiers\.u\.steps\.0\.to: says predict, but the",
        ),
        (
            "modes: {x: b}",
            "modes: {x: {predict: {threshold: 0}}}",
            r":16: tiers\.u\.modes\.x: says predict, but the",
        ),
        ("  e:", "  stay:", r":7: targets\.stay: stay is a word of the steps"),
    ],
)
def test_what_is_wrong_with_modes_and_steps(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TIERED
    with pytest.raises(PolicyError, match=message):
        load_policy(written(tmp_path, TIERED.replace(old, new, 1)))


def test_a_rule_of_the_policy_needs_a_bundle_where_a_tier_can_predict(tmp_path: Path) -> None:
    text = TIERED.replace("y: predict, z: {predict: {quality: 0.9}}, v: {predict: {threshold: 0.2}}", "y: a")
    policy = load_policy(written(tmp_path, text))
    assert not policy.tiers["t"].uses_prediction()
    assert policy.uses_prediction()  # by steps.0
    assert not load_policy(written(tmp_path, text.replace("to: predict", "to: a"))).uses_prediction()


@pytest.mark.parametrize(
    ("name", "tokens", "above"),
    [
        ("a", (1000, 0), ["d", "b", "e"]),  # c costs less for so much input
        ("a", (0, 1000), ["d", "c", "b", "e"]),
        ("d", (1000, 0), ["e"]),
        ("b", (1000, 0), ["c", "d", "e"]),  # without prices: those below it in the policy
        ("e", (1000, 0), []),
    ],
)
def test_what_is_above_a_target(tmp_path: Path, name: str, tokens: tuple[int, int], above: list[str]) -> None:
    policy = load_policy(written(tmp_path, TIERED))
    assert policy.dearer(name, Tokens(input=tokens[0], output=tokens[1])) == above


def test_names_have_every_tier_with_every_mode(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, TIERED))
    with_mode = [f"{tier}:{mode}" for tier in ("auto", "t") for mode in "xyzv"] + ["u:x"]
    assert policy.names() == ["auto", "t", "u", *"abcde", *with_mode]
    for name in policy.names():
        assert policy.find(name) is not None


def test_all_problems_are_told_with_their_lines(tmp_path: Path) -> None:
    text = (
        TIERED.replace("  c:", "  a:")
        .replace("kind: read", "kind: reed")
        .replace("default: b", "default: []")
    )
    with pytest.raises(PolicyError, match=r"\(and 2 more\)$") as caught:
        load_policy(written(tmp_path, text))
    lines = placed(caught.value.problems, text.encode(), "p.yaml")
    assert [line.split(": ")[0] for line in lines] == ["p.yaml:5", "p.yaml:14", "p.yaml:16"]
    assert "targets.a: is there already, on line 3" in lines[0]


def test_problems_of_json_have_lines_too(tmp_path: Path, whole: Policy) -> None:
    document = whole.model_dump(mode="json", exclude_unset=True) | {"surprise": 1}
    text = json.dumps(document, indent=1)
    with pytest.raises(PolicyError, match=r"p\.json:\d+: surprise: unknown key") as caught:
        load_policy(written(tmp_path, text, "p.json"))
    line = placed(caught.value.problems, text.encode(), "p.json")[0].split(":")[1]
    assert '"surprise"' in text.splitlines()[int(line) - 1]


def sections(of: Any = Policy, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every section that a policy can hold, by the name of its class."""
    found = {} if found is None else found
    if isinstance(of, type) and issubclass(of, BaseModel) and of.__name__ not in found:
        found[of.__name__] = of
        for field in of.model_fields.values():
            sections(field.annotation, found)
    for part in get_args(of):
        sections(part, found)
    return found


def test_the_sections_are_found() -> None:
    assert {"Policy", "Target", "Prices", "Tier", "Predict", "Bar", "StepRule", "Tokens", "Limits"} <= set(
        sections()
    )


def test_the_example_and_its_page_explain_every_field() -> None:
    lines = example_policy_path().read_text(encoding="utf-8").splitlines()
    comments = " ".join(line.partition("#")[2] for line in lines)
    page = (Path(__file__).parent.parent / "docs" / "policy.md").read_text(encoding="utf-8")
    fields = {(name, field) for name, section in sections().items() for field in section.model_fields}
    assert len(fields) > 50
    assert {pair for pair in fields if not re.search(rf"\b{pair[1]}\b", comments)} == set()
    assert {pair for pair in fields if f"`{pair[1]}`" not in page} == set()


def test_what_the_page_shows_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "policy.md").read_text(encoding="utf-8")
    shown = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shortest, steps = shown
    policy = load_policy(written(tmp_path, shortest))
    assert policy.find("auto") == Address(tier="auto")
    example = load_policy(example_policy_path())
    document = example.model_dump(exclude_unset=True) | {"aliases": {}, "default_tier": "top"}
    Policy.model_validate(document | yaml.safe_load(steps))


def test_the_example_fits_the_bundle_that_comes_along() -> None:
    policy = bound(load_policy(example_policy_path()), read_manifest(default_bundle_dir()))
    assert set(policy.tiers) == {"top", "balanced", "free", "internal"}
    for model, address in {
        "claude-haiku-5-5": Address(tier="internal"),
        "claude-opus-5-5": Address(tier="top"),
        "gpt-4o": Address(tier="balanced"),
        "gpt-4o-mini": Address(tier="internal"),
        "auto:plan": Address(tier="top", mode="plan"),
        "free": Address(tier="free"),
    }.items():
        assert policy.find(model) == address, model
    assert all(target.prices is not None and target.context_window for target in policy.targets.values())
    costs = [target.prices.output for target in policy.targets.values() if target.prices]
    assert costs == sorted(costs)  # "cheapest first", as it tells its reader
    assert policy.tiers["top"].modes["plan"] == "opus"
    assert policy.limits == Limits(explain=True)  # what it shows is what counts without it, but for this


WAYS_OUT = """\
version: 1
targets:
  a: {echo: true, fallbacks: [b, c], retries: 2, cooldown: {failures: 5, seconds: 60}, max_concurrency: 8, queue_seconds: 0}
  b: {echo: true, fallbacks: [a], cooldown: null}
  c: {echo: true, api_key_header: x-openai-key}
tiers:
  t: {predict: {weak: a, strong: b}, escalate: {to: strong, when: [empty, refusal_text], buffer_streams: true}}
  u: {default: a, escalate: {to: c}}
default_tier: t
"""


def test_ways_out(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, WAYS_OUT))
    assert policy.targets["a"].fallbacks == ("b", "c")
    assert policy.targets["b"].cooldown is None
    # What an empty policy means: nothing is sent twice, and what fails thrice in a row is passed over for a while.
    plain = policy.targets["c"]
    assert (plain.retries, plain.fallbacks, plain.max_concurrency) == (0, (), None)
    assert plain.cooldown is not None
    assert (plain.cooldown.failures, plain.cooldown.seconds) == (3, 30)
    assert (policy.stronger("t"), policy.stronger("u")) == ("b", "c")
    assert policy.bound_to(("x", "y"), 0.1).stronger("t") == "b"
    escalate = policy.tiers["u"].escalate
    assert escalate is not None
    assert escalate.when == {"refusal", "invalid_json", "empty"}
    assert not escalate.buffer_streams


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "fallbacks: [b, c]",
            "fallbacks: [b, a]",
            r":3: targets\.a\.fallbacks\.1: a cannot be its own fallback$",
        ),
        ("fallbacks: [b, c]", "fallbacks: [b, b]", r":3: targets\.a\.fallbacks\.1: b is on the list already"),
        (
            "fallbacks: [a]",
            "fallbacks: [d]",
            r":4: targets\.b\.fallbacks\.0: no target is named d; there are a, b, c$",
        ),
        ("failures: 5", "failures: 0", r":3: targets\.a\.cooldown\.failures: "),
        (
            "failures: 5",
            "failure: 5",
            r":3: targets\.a\.cooldown\.failure: unknown key; did you mean failures\?",
        ),
        ("retries: 2", "retries: 11", r":3: targets\.a\.retries: "),
        ("x-openai-key", "Authorization", r":5: targets\.c\.api_key_header: may not be written so"),
        (
            "x-openai-key",
            "x-api-key",
            r":5: targets\.c: api_key_header may not be x-api-key: the router reads that",
        ),
        ("x-openai-key", "x-router-mode", r":5: targets\.c: api_key_header may not be x-router-mode"),
        (
            "to: strong",
            "to: best",
            r":7: tiers\.t\.escalate\.to: best is neither strong nor one of the targets, a, b, c$",
        ),
        (
            "to: c",
            "to: strong",
            r":8: tiers\.u\.escalate\.to: strong is the dearest of a prediction, which this tier has not",
        ),
        ("when: [empty, refusal_text]", "when: []", r":7: tiers\.t\.escalate\.when: "),
        ("when: [empty, refusal_text]", "when: [slow]", r":7: tiers\.t\.escalate\.when"),
    ],
)
def test_ways_out_that_are_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in WAYS_OUT
    with pytest.raises(PolicyError, match=message):
        load_policy(written(tmp_path, WAYS_OUT.replace(old, new, 1)))
