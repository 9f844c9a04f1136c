from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import timeit
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from provider import provider
from running import ENVIRONMENT, KEY
from serving import serving

from router.decision import Decision
from router.logs import Access, JsonLines, TextLines, configuration

CHAT = "/v1/chat/completions"
SECRET = "SECRET-PROMPT"
ASK = {"messages": [{"role": "user", "content": f"Why? {SECRET}"}]}
POLICY = """\
version: 1
targets:
  cheap: {{model: openai/small, api_base: "{base}", api_key_env: TEST_PROVIDER_KEY, prices: {{input: 1, output: 4}}}}
  broken: {{model: openai/broken, api_base: "{base}", retries: 0, prices: {{input: 1, output: 4}}}}
tiers: {{auto: {{modes: {{plan: broken}}, default: cheap}}}}
default_tier: auto
"""
ACCESS = Access(
    method="POST",
    path=CHAT,
    status=200,
    ms=12.3456,
    id="req_1",
    client=None,
    session="0" * 32,
    decision=Decision("cheap", "openai/small", "predicted", "auto", None, 0.1234567, 0.2),
    stream=True,
    first_ms=3.21,
    attempts=1,
    input_tokens=9,
    output_tokens=3,
    cached_tokens=0,
    cost=2.1e-05,
    policy="5d0c3a1b2f77",
    bundle="words@0",
    decision_ms=1.5,
    error=None,
    trace=None,
    span=None,
)


def record(message: object, *arguments: object, name: str = "router", **more: Any) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, arguments, more.get("exc_info"))


def test_a_request_is_one_object_with_all_that_is_known_of_it() -> None:
    line = json.loads(JsonLines().format(record(ACCESS)))
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert (line["level"], line["logger"], line["event"]) == ("warning", "router", "request")
    assert (line["target"], line["score"], line["mode"], line["ms"]) == ("cheap", 0.1234567, None, 12.346)
    assert line.keys() == {"time", "level", "logger", "event", *ACCESS.fields()}
    undecided = json.loads(JsonLines().format(record(Access(**{**fields(ACCESS), "decision": None}))))
    assert line.keys() == undecided.keys()
    assert undecided["target"] is None


def fields(access: Access) -> dict[str, Any]:
    return {name: getattr(access, name) for name in Access.__slots__}


def test_a_request_as_text() -> None:
    text = TextLines().format(record(ACCESS))
    assert re.fullmatch(
        r"[\d-]+ [\d:,]+ WARNING POST /v1/chat/completions 200 12\.3 ms id=req_1 client=- target=cheap reason=predicted "
        r"tier=auto mode=- score=0\.1235 attempts=1 policy=5d0c3a1b2f77 decision=1\.5 ms",
        text,
    )


NASTY = "a\nb\r\x1b[31mred\x00\u2028c\x85d"


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_no_control_character_breaks_a_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("policy: %s", NASTY))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    if isinstance(formatter, JsonLines):
        assert json.loads(line)["message"] == f"policy: {NASTY}"


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_of_an_exception_the_type_and_the_place_are_told(formatter: logging.Formatter) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError:
        line = formatter.format(record("it failed", exc_info=sys.exc_info()))
    assert SECRET not in line
    assert "KeyError at " in line
    assert "test_router_logs.py" in line


def test_of_others_only_the_first_line_is_told() -> None:
    said = record(f"Task exception was never retrieved\nfuture: {SECRET}", name="asyncio")
    assert json.loads(JsonLines().format(said))["message"] == "Task exception was never retrieved"
    assert SECRET not in TextLines().format(said)


def test_what_is_said_of_a_request_carries_its_id() -> None:
    line = json.loads(JsonLines().format(record("id=%s no answer of %s", "req_7", "cheap")))
    assert (line["id"], line["event"]) == ("req_7", "log")


def test_an_access_line_costs_little() -> None:
    one = record(ACCESS)
    for formatter in (JsonLines(), TextLines()):
        each = min(timeit.repeat(lambda form=formatter: form.format(one), number=200, repeat=9)) / 200
        assert each < 50e-6


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """With a policy whose provider runs."""
    with provider() as upstream:
        (tmp_path / "router.yaml").write_text(POLICY.format(base=upstream.url))
        yield tmp_path


def test_every_line_of_a_server_is_json(folder: Path) -> None:
    policy = folder / "router.yaml"
    arguments = ("--log-format", "json", "--ledger", "default")
    environment = {**ENVIRONMENT, "XDG_DATA_HOME": str(folder)}
    with serving(folder, *arguments, environment=environment) as server:
        named = {"x-request-id": "one-1", "x-router-session": "session-of-theirs"}
        server.post(CHAT, {**ASK, "model": "cheap"}, named).raise_for_status()
        events = {"stream": True, "stream_options": {"include_usage": True}}
        assert server.post(CHAT, {**ASK, **events}).text.endswith("[DONE]\n\n")
        assert server.post(CHAT, {**ASK, "model": "auto:plan"}).status_code == 500
        assert server.post(CHAT, {"messages": SECRET}).status_code == 400
        policy.write_text(policy.read_text() + "nonsense: 1\n")
        server.post("/v1/route", {"prompt": SECRET}, {"authorization": "Bearer sk-client"})
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for("the last good one stays in force")
        server.stop()
        said = [json.loads(line) for line in server.lines]
    text = "\n".join(server.lines)
    for secret in (SECRET, KEY, "sk-client", "session-of-theirs", "sk-upstream-secret"):
        assert secret not in text
    messages = [line.get("message", "") for line in said]
    for start in ("router ", "policy ", "target cheap", "Started server process", "Finished server process"):
        assert any(message.startswith(start) for message in messages), messages
    requests = [line for line in said if line["event"] == "request"]
    answered, streamed, failed, wrong, routed = requests
    assert (answered["id"], answered["status"], answered["reason"]) == ("one-1", 200, "pinned")
    assert re.fullmatch(r"[0-9a-f]{32}", answered["session"])
    tokens = (answered["input_tokens"], answered["output_tokens"], answered["cost"])
    assert tokens == (9, 3, pytest.approx(21e-6))
    assert (answered["stream"], streamed["stream"]) == (False, True)
    assert 0 < streamed["first_ms"] <= streamed["ms"]
    assert (failed["target"], failed["mode"], failed["reason"]) == ("broken", "plan", "signal")
    assert (failed["error"], failed["attempts"], failed["input_tokens"]) == ("server_error", 1, None)
    assert (wrong["status"], wrong["target"], wrong["error"]) == (400, None, "invalid_request")
    assert (routed["path"], routed["attempts"]) == ("/v1/route", 0)
    assert {line["policy"] for line in requests} == {answered["policy"]}


def test_uvicorn_s_own_errors_and_warnings_are_lines_too(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging, logging.config, warnings\n"
        "from router.logs import configuration\n"
        "logging.config.dictConfig(configuration('info', 'json'))\n"
        "warnings.warn('old')\n"
        "try:\n    raise ValueError('SECRET-PROMPT')\n"
        "except ValueError as error:\n"
        "    logging.getLogger('uvicorn.error').error('Exception in ASGI application\\n', exc_info=error)\n"
        "logging.getLogger('another').warning('of a library')\n"
        "logging.getLogger('another').info('not told')\n"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["logger"] for line in said] == ["py.warnings", "uvicorn.error", "another"]
    assert "UserWarning: old" in said[0]["message"]
    assert said[1]["message"] == "Exception in ASGI application"
    assert said[1]["exception"].startswith("ValueError at ")
    assert configuration("debug", "text")["loggers"]["uvicorn"]["level"] == "WARNING"
