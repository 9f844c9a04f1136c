from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from running import WordPredictor

import router.cli
from router import __version__
from router.policy import load_policy

ROOT = Path(__file__).parent.parent
# Decides without a bundle, and answers without a provider.
POLICY = """\
version: 1
targets: {cheap: {echo: true}, top: {model: openai/x, api_key_env: TEST_KEY_THAT_IS_NOT_SET}}
tiers: {auto: {modes: {plan: top}, default: cheap}}
default_tier: auto
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, router_command: Run) -> Run:
    """The command in this process, with a predictor whose scores are known: status, stdout, stderr."""
    monkeypatch.setattr("router.predictor.load_predictor", lambda path: WordPredictor())
    return router_command


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"router {__version__}\n", "")


def test_help_names_the_commands(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "serve" in out
    assert "decide" in out


def test_decide(run: Run) -> None:
    assert run("decide", "a hard question") == (0, "strong  score 0.4000 > threshold 0.2000\n", "")
    assert run("decide", "a hard question", "--threshold", "0.5")[1].startswith("weak  score 0.4000 ≤")


def test_decide_marks_a_flagged_prompt_and_decides_by_its_score(run: Run) -> None:
    line = "weak  score 0.0500 ≤ threshold 0.2000; unlike the training data\n"
    assert run("decide", "something strange") == (0, line, "")
    answer = json.loads(run("decide", "something strange", "--json")[1])
    assert (answer["target"], answer["reason"]) == ("weak", "predicted")
    # As the policy does that a server starts with where none is found.
    asked = json.dumps({"prompt": "something strange"})
    by_policy = json.loads(run("explain", "-", "--json", stdin=asked)[1])
    assert (by_policy["target"], by_policy["reason"]) == ("cheap", "predicted")
    assert (answer["novelty"], answer["unfamiliar"]) == (2.5, True)


def test_decide_json_is_one_object(run: Run) -> None:
    status, out, err = run("decide", "easy", "--json", "--threshold", "-0.1")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert answer.pop("decision_ms") >= 0
    assert answer == {
        "target": "strong",
        "score": 0.05,
        "threshold": -0.1,
        "reason": "predicted",
        "novelty": 0.25,
        "unfamiliar": False,
        "quality": {"weak": 0.5, "strong": 0.525},
        "bundle": "words@0",
    }


def test_decide_reads_a_prompt_from_standard_input(run: Run) -> None:
    assert run("decide", "-", stdin="a hard\nquestion in two lines\n")[1].count("\n") == 1
    assert run("decide", stdin="hard")[1].startswith("strong")
    # A prompt that is JSON, over several lines or as an argument; on one line it is a row.
    assert run("decide", "-", stdin='{\n"question": "hard"}')[1].startswith("strong")
    assert run("decide", '{"question": "hard"}')[1].startswith("strong")
    assert run("decide", "-", stdin='["hard"]')[1].startswith("strong")


def test_decide_reads_jsonl(run: Run) -> None:
    rows = [{"prompt": "easy"}, {"messages": [{"role": "user", "content": "hard"}]}, {"prompt": ""}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    status, out, _ = run("decide", "-", "--json", stdin=text)
    assert status == 0
    assert [one["target"] for one in json.loads(out)["decisions"]] == ["weak", "strong", "weak"]
    assert run("decide", "-", stdin=text)[1].count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        (["decide", "-"], "", 2, "there is no prompt"),
        (["decide", "-"], '{"prompt": "x"}\n{"prompt": null}', 1, "line 2: 'prompt' must be a string"),
        (["decide", "-"], '{"prompt": "x"}\nnonsense', 1, "line 2: The body is not valid JSON"),
        (["decide", "-"], '{"prompts": ["x"], "prompt": 1}', 1, "line 1: "),
        (["decide", "-"], '{"promt": "x"}', 1, "line 1: Give one of 'prompt', 'prompts' and 'messages'."),
        (["decide", "x", "--threshold", "2"], "", 2, "--threshold"),
        (["decide", "x", "--threshold", "much"], "", 2, "--threshold"),
        (["decide", "x", "y"], "", 2, "unexpected extra argument"),
        (["decide", "x", "--bundel", "y"], "", 2, "--bundel"),
        (["decied"], "", 2, "decied"),
        (["serve", "--policy", "none.yaml"], "", 2, "none.yaml: no policy can be read there"),
        (["serve", "--policy", "http://example.com/p.yaml"], "", 2, "http is for loopback addresses"),
        (["serve", "--policy", "ftp://example.com/p.yaml"], "", 2, "a policy comes from a file, https"),
        (["serve", "--policy", "http://127.0.0.1:9/p.yaml"], "", 1, "no earlier policy from there is kept"),
        (["serve", "--allow-key", "MY_KEY"], "", 2, "say where that key may be sent, as MY_KEY@HOST"),
        (["serve", "--reload-seconds", "-1"], "", 2, "--reload-seconds: "),
        (["serve", "--port", "99999"], "", 2, "--port: "),
        (["serve", "--port", "x"], "", 2, "--port"),
        (["serve", "--workers", "0"], "", 2, "--workers: "),
        (["serve", "--log-level", "loud"], "", 2, "--log-level: "),
        (["serve", "--session-store", "memory"], "", 2, "--session-store: give redis://"),
        (["serve", "--host", "no.such.host.invalid", "--open-to-anyone"], "", 1, "cannot listen on"),
    ],
)
def test_a_wrong_call_is_one_line(
    run: Run, arguments: list[str], stdin: str, status: int, message: str
) -> None:
    code, out, err = run(*arguments, stdin=stdin)
    assert (code, out) == (status, "")
    assert err.startswith("router: ")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()


def test_a_bundle_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "router", "decide", "x", "--bundle", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_a_wrong_environment_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_PORT", "http")
    assert run("serve")[2].startswith("router: ROUTER_PORT: ")


def test_an_invalid_policy_is_one_line(run: Run) -> None:
    Path("router.yaml").write_text("version: 1\ntargets: {}\nnonsense: 1\n")
    code, _, err = run("serve", "--port", "0")
    assert code == 1
    assert err.startswith("router: router.yaml:")
    assert err.count("\n") == 1


def test_a_port_in_use_is_one_line(run: Run) -> None:
    Path("router.yaml").write_text(POLICY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--port", str(port))
    assert code == 1
    assert err == (
        f"router: cannot listen on 127.0.0.1:{port}: that address is in use; give another with --port\n"
    )


def started(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """A server in a process of its own, found by its first line: process, URL, greeting."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "serve", "--port", "0", *arguments],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background has interrupts ignored, and so would the server.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    lines = [process.stderr.readline().rstrip()]
    found = re.search(r"http://\S+", lines[0])
    assert found, lines
    while "target   top" not in lines[-1]:
        lines.append(process.stderr.readline().rstrip())
    lines.append(process.stderr.readline().rstrip())
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{found[0]}/healthz")
            return process, found[0], lines
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    return errors


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_sighup_reloads_in_every_worker(tmp_path: Path) -> None:
    policy = tmp_path / "router.yaml"
    policy.write_text(POLICY)
    process, url, greeting = started(tmp_path, "--workers", "2", "--reload-seconds", "0")
    assert [line for line in greeting if "each worker has its own sessions" in line]
    try:

        def versions(requests: int) -> set[str]:
            # A connection each, so that both workers get some.
            answers = [httpx.post(f"{url}/v1/route", json={"prompt": "x"}) for _ in range(requests)]
            return {answer.headers["x-router-policy"] for answer in answers}

        before = versions(1)
        policy.write_text(POLICY + "limits: {prompts: 7}\n")
        after = load_policy(policy).hash
        assert after not in before
        deadline = time.monotonic() + 30
        # A worker that is still starting does not hear it.
        while versions(20) != {after}:
            process.send_signal(signal.SIGHUP)
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        errors = ended(process)
    assert f"policy: {after} is in force now" in errors


def test_serve(tmp_path: Path) -> None:
    (tmp_path / "router.yaml").write_text(POLICY)
    process, url, greeting = started(tmp_path)
    try:
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hello"}]},
            timeout=30,
        )
        assert answer.json()["choices"][0]["message"]["content"] == "[cheap] hello"
        assert answer.headers["x-router-reason"] == "default"
        assert "server" not in answer.headers
        # Without keys it is for this machine alone.
        assert httpx.get(f"{url}/v1/models", headers={"host": "evil.test"}).status_code == 403
    finally:
        errors = ended(process)
    assert process.returncode == 130
    assert "router.yaml" in greeting[1]
    assert "warning  TEST_KEY_THAT_IS_NOT_SET is not set: requests to top" in greeting[-1]
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors  # no line for /healthz, and no traceback at the end
    assert "POST /v1/chat/completions 200" in lines[0]


BROKEN = """\
version: 1
targets: {cheap: {echo: true}, top: {model: openai/x, timeout: 0}}
tiers: {auto: {modes: {plan: top}, default: cheap, qqqq: 1}}
default_tier: auto
"""


def test_policy_check_tells_every_error_with_its_line(run: Run) -> None:
    Path("p.yaml").write_text(BROKEN)
    status, out, err = run("policy", "check", "p.yaml")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "p.yaml:2: targets.top.timeout: input should be greater than 0",
        "p.yaml:3: tiers.auto.qqqq: unknown key",
    ]
    Path("p.yaml").write_text("version: 1\ntargets: [")
    status, _, err = run("policy", "check", "p.yaml")
    assert status == 1
    assert err.startswith("p.yaml:2: not valid YAML")


def test_policy_check_says_what_a_policy_means(run: Run) -> None:
    Path("p.yaml").write_text(POLICY)
    status, out, err = run("policy", "check", "p.yaml")
    assert (status, err) == (0, "")
    assert "p.yaml: valid, version " in out
    for line in (
        "  target   top: openai/x, no prices, no window declared",
        "  tier     auto (the default tier): cheap without a mode",
        "             plan: top",
        "             any other mode: cheap",
        "  warning  TEST_KEY_THAT_IS_NOT_SET is not set: requests to top will be answered with 401",
        "  warning  no prices for top: their requests cost nothing by the metrics",
    ):
        assert line in out.splitlines()


FAILING = """\
version: 1
targets:
  small: {model: openai/a, fallbacks: [large], retries: 2, cooldown: {failures: 5, seconds: 60}}
  large: {model: openai/b, cooldown: null, max_concurrency: 8, queue_seconds: 2, api_key_env: SOME_KEY}
  plain: {echo: true}
tiers:
  auto:
    default: small
    escalate: {to: large, when: [refusal, empty], buffer_streams: true}
    steps:
      - {kind: [read, web], tool: "mcp__*", larger_than: 8000, to: large}
      - {tool: [todo, plan], to: small}
      - {error: true, to: large}
      - {to: stay}
default_tier: auto
"""


def test_policy_check_says_what_happens_where_a_target_fails(run: Run) -> None:
    Path("p.yaml").write_text(FAILING)
    status, out, _ = run("policy", "check", "p.yaml")
    assert status == 0
    lines = [line.strip() for line in out.splitlines()]
    small = next(number for number, line in enumerate(lines) if line.startswith("target   small"))
    assert lines[small + 1 : small + 5 : 2] == [
        "falls back to large; retried 2 times; cools down for 60 s after 5 failures in a row",
        "never cools down; 8 at a time, others wait 2 s",
    ]
    assert lines[small + 5].startswith("tier     auto")  # plain has nothing of its own
    tier = lines[small + 6 : small + 11]
    assert tier == [
        "escalates to large on empty or refusal, streams held back for it",
        "after a result of read or web by the tool mcp__*, over 8,000 characters: large",
        "after a result of the tool todo or plan: small",
        "after a result, that is an error: large",
        "after any tool result: stay",
    ]


def test_policy_check_knows_what_the_server_s_settings_refuse(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.yaml").write_text(FAILING)
    bound = ("--allow-key", "SOME_KEY@api.openai.com")
    refused = [
        "p.yaml:3: targets.small.api_key_env: where keys are bound to hosts only openai/… with an api_base can do without"
    ]
    status, out, err = run("policy", "check", "p.yaml", *bound)
    assert (status, out, err.splitlines()) == (1, "", refused)
    refused.append(
        "p.yaml:4: targets.large.api_key_env: the key SOME_KEY may not be sent to api.openai.com; "
        "--allow-key (ROUTER_ALLOWED_KEYS) SOME_KEY@api.openai.com allows it"
    )
    monkeypatch.setenv("ROUTER_ALLOWED_KEYS", "OTHER_KEY@api.openai.com")
    assert run("policy", "check", "p.yaml")[2].splitlines() == refused
    assert run("policy", "check", "p.yaml", *bound)[2].splitlines() == refused[:1]  # the flag counts
    assert run("policy", "check", "p.yaml", "--allow-key", "SOME_KEY")[0] == 2

    monkeypatch.delenv("ROUTER_ALLOWED_KEYS")
    unpriced = [
        f"p.yaml:{line}: targets.{name}.prices: missing; the ledger counts what requests cost"
        for line, name in ((3, "small"), (4, "large"))
    ]
    assert run("policy", "check", "p.yaml", "--ledger")[2].splitlines() == unpriced
    monkeypatch.setenv("ROUTER_LEDGER", "default")
    assert run("policy", "check", "p.yaml")[2].splitlines() == unpriced


def test_explain_binds_keys_as_the_server_does(run: Run) -> None:
    Path("router.yaml").write_text(POLICY)
    asked = '{"prompt": "x", "model": "auto:plan"}'
    assert run("explain", "-", stdin=asked)[0] == 0
    key = "TEST_KEY_THAT_IS_NOT_SET@api.openai.com"
    assert run("explain", "-", "--allow-key", key, stdin=asked)[0] == 0
    status, out, err = run("explain", "-", "--allow-key", "OTHER_KEY@api.openai.com", stdin=asked)
    assert (status, out) == (1, "")
    assert "the key TEST_KEY_THAT_IS_NOT_SET may not be sent to api.openai.com" in err


def test_policy_check_looks_at_the_bundle_too(run: Run, ladder_bundle: Path) -> None:
    text = run("policy", "example")[1].replace("quality: 0.95\n", "quality: 0.5\n")
    Path("p.yaml").write_text(text)
    line = 1 + text.splitlines().index("      quality: 0.5")
    status, out, err = run("policy", "check", "p.yaml")
    assert (status, out) == (1, "")
    assert err.startswith(f"p.yaml:{line}: tiers.top.predict.quality: the bundle holds no threshold for 0.5")
    Path("p.yaml").write_text(text.replace("quality: 0.5\n", "quality: 0.95\n"))
    assert run("policy", "check", "p.yaml")[0] == 0
    status, _, err = run("policy", "check", "p.yaml", "--bundle", str(ladder_bundle))
    assert status == 1
    assert "tiers.top.predict: the bundle predicts 3 targets (low, mid, high)" in err


def test_policy_check_of_nothing_is_a_wrong_call(run: Run) -> None:
    status, _, err = run("policy", "check", "none.yaml")
    assert (status, err) == (
        2,
        "router: none.yaml: no policy can be read there (No such file or directory)\n",
    )


PREDICTS = """\
version: 1
targets: {cheap: {echo: true}, top: {model: openai/x, context_window: 9000}}
tiers: {auto: {predict: {weak: cheap, strong: top}, modes: {plan: top}}}
default_tier: auto
limits: {threshold_override: true}
"""


def test_explain_tells_the_stages(run: Run) -> None:
    Path("router.yaml").write_text(PREDICTS)
    Path("r.json").write_text(json.dumps({"messages": [{"role": "user", "content": "a hard one"}]}))
    status, out, err = run("explain", "r.json")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1] == "bundle   words@0"
    assert lines[-1] == "→ top (openai/x), reason predicted"
    assert "1. model       auto is tier auto" in lines
    assert "3. prediction  score 0.4 is over threshold 0.2: top" in lines
    answer = json.loads(run("explain", "--json", "--header", "X-Router-Mode=plan", "r.json")[1])
    assert (answer["reason"], answer["mode"], answer["score"]) == ("signal", "plan", None)
    assert answer["trail"][1] == {"stage": "mode", "outcome": "plan: top"}
    raised = run("explain", "--header", "x-router-threshold=0.5", "-", stdin='{"prompt": "a hard one"}')[1]
    assert "score 0.4 is not over threshold 0.5: cheap" in raised


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        (["explain", "none.json"], "", 2, "none.json: no request can be read there"),
        (["explain", "-"], "{", 1, "The body is not valid JSON"),
        (["explain", "-"], '{"prompts": ["x"]}', 2, "one prompt at a time"),
        (["explain", "-"], '{"prompt": "x", "model": "y"}', 1, "The model 'y' does not exist"),
        (["explain", "-", "--header", "x"], '{"prompt": "x"}', 2, "--header x: expected NAME=VALUE"),
        (["explain", "-", "--header", "x-router-mode=a b"], '{"prompt": "x"}', 1, "'x-router-mode' must be"),
        (["explain", "-", "--policy", "none.yaml"], '{"prompt": "x"}', 2, "none.yaml: no policy"),
        (["explain", "-"], json.dumps({"prompt": "hard " * 9000}), 1, "has a context window of 9,000 tokens"),
    ],
)
def test_explain_of_what_is_wrong_is_one_line(
    run: Run, arguments: list[str], stdin: str, status: int, message: str
) -> None:
    Path("router.yaml").write_text(PREDICTS)
    code, out, err = run(*arguments, stdin=stdin)
    assert (code, out) == (status, "")
    assert err.count("\n") == 1
    assert message in err


def test_keys_are_made_and_listed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scopes = ("--tiers", "auto, balanced", "--targets", "", "--requests-per-minute", "60", "--admin")
    status, key, said = run("keys", "new", "alice", "--clients", "clients.yaml", *scopes)
    assert status == 0
    assert re.fullmatch(r"rk_[\w-]{43}\n", key)
    assert "alice" in said
    assert key.strip() not in said + (tmp_path / "clients.yaml").read_text()
    monkeypatch.setenv("ROUTER_CLIENTS", "clients.yaml")
    assert run("keys", "new", "bob")[0] == 0
    alice = "alice  tiers=auto,balanced  targets=  requests_per_minute=60  admin"
    assert run("keys", "list") == (0, f"{alice}\nbob\n", "")
    status, out, said = run("keys", "new", "bob")
    assert (status, out) == (2, "")
    assert "there is a client named bob already" in said


def test_keys_want_a_file(run: Run) -> None:
    status, _, said = run("keys", "new", "alice")
    assert (status, said) == (
        2,
        "router: say which file holds the clients: --clients FILE, or ROUTER_CLIENTS\n",
    )
    status, _, said = run("keys", "list", "--clients", "none.yaml")
    assert status == 2
    assert "no clients can be read there" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_without_keys_it_listens_on_loopback_only(run: Run, tmp_path: Path, host: str) -> None:
    (tmp_path / "router.yaml").write_text(POLICY)
    status, _, said = run("serve", "--host", host, "--port", "0")
    assert status == 2
    assert said.count("\n") == 1
    assert "--clients FILE" in said
    assert "--open-to-anyone" in said


def test_the_policy_cannot_open_the_server(run: Run, tmp_path: Path) -> None:
    (tmp_path / "router.yaml").write_text(POLICY + "server: {host: 0.0.0.0}\n")
    status, _, said = run("serve", "--port", "0")
    assert status == 2
    assert "--open-to-anyone" in said
    (tmp_path / "router.yaml").write_text(POLICY + "server: {open_to_anyone: true}\n")
    assert run("serve", "--port", "0")[0] == 1


def test_who_may_use_it_is_said_at_the_start(tmp_path: Path) -> None:
    from router.clients import ClientKeys
    from router.exposure import check_exposure
    from router.gateway import Gateway
    from router.policy import load_policy
    from router.settings import Settings

    (tmp_path / "router.yaml").write_text(POLICY)
    policy = load_policy(tmp_path / "router.yaml")

    def said(keys: ClientKeys | None = None, **settings: object) -> str:
        found = Settings.model_validate({"policy": tmp_path / "router.yaml", **settings})
        check_exposure(found)
        return "\n".join(router.cli._greeting("http://x", found, Gateway(policy, None, {}, keys)))

    assert "nobody else can reach it" in said()
    assert "open to anyone" in said(host="0.0.0.0", open_to_anyone=True)
    assert "open to anyone" in said(host="127.0.0.1", open_to_anyone=True)
    assert "clients.yaml (0)" in said(ClientKeys([]), host="0.0.0.0", clients="clients.yaml")
