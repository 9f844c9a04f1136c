"""What a client sees of retries, fallbacks and escalations, over HTTP and against the loopback provider."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from provider import USAGE
from running import KEY, Running, running
from starlette.responses import JSONResponse, Response

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
CHEAP_PRICE = {"input": 1, "output": 4}
DEAR_PRICE = {"input": 10, "output": 40}
OWN_KEY = "sk-a-key-of-the-client-0123456789"

MORE = {
    "first": {"asks": "broken", "fallbacks": ["limited", "second"]},
    "limited": {"asks": "rate-limited", "cooldown": None},
    "second": {"asks": "second"},
    "twice": {"asks": "twice", "retries": 1},
    "own": {"asks": "own", "api_key_header": "x-own-key", "api_key_env": None},
    "own-or-ours": {"asks": "own", "api_key_header": "x-own-key"},
    "translated": {
        "asks": "own",
        "model": "hosted_vllm/own",
        "api_key_header": "x-own-key",
        "api_key_env": None,
    },
    "single": {"asks": "endless", "max_concurrency": 1, "queue_seconds": 0.01},
    "limps": {"asks": "fails-midway", "fallbacks": ["second"]},
    "weak": {"asks": "weak", "prices": CHEAP_PRICE},
    "best": {"asks": "best", "prices": DEAR_PRICE},
    "best-is-down": {"asks": "broken"},
}
MORE["broken-tier"] = MORE["first"]
ESCALATE = {"to": "best"}
TIERS = {
    "auto": {"predict": {"weak": "cheap", "strong": "frontier"}},
    "plain": {"default": "weak"},
    "safe": {"default": "weak", "escalate": ESCALATE},
    "held": {"default": "weak", "escalate": {**ESCALATE, "buffer_streams": True}},
    "held-limps": {"default": "limps", "escalate": {**ESCALATE, "buffer_streams": True}},
    "vain": {"default": "weak", "escalate": {"to": "best-is-down"}},
    "predicted": {
        "predict": {"weak": "weak", "strong": "best"},
        "default": "weak",
        "escalate": {"when": ["empty"]},
    },
    "top": {"default": "best", "escalate": ESCALATE},
    "tier-of-first": {"default": "first"},
}


@pytest.fixture(scope="module")
def router() -> Iterator[Running]:
    with running(more=MORE, tiers=TIERS, aliases={}) as started:
        yield started


@pytest.fixture
def http(router: Running) -> Iterator[httpx.Client]:
    router.provider.seen.clear()
    with httpx.Client(base_url=router.url, timeout=20) as client:
        yield client


def asked(router: Running) -> list[str]:
    """The models that the provider was asked for."""
    return [seen.body["model"] for seen in router.provider.seen]


def reply(content: str | None, finish: str = "stop", *, usage: Any = USAGE, **message: Any) -> Response:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish,
    }
    return JSONResponse(
        {"id": "1", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage}
    )


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_and_says_so(http: httpx.Client, router: Running, stream: bool) -> None:
    answer = http.post(CHAT, json={**ASK, "model": "tier-of-first", "stream": stream})
    assert answer.status_code == 200
    assert "Hello" in answer.text
    assert asked(router) == ["broken", "rate-limited", "second"]
    headers = answer.headers
    assert (headers["x-router-target"], headers["x-router-model"]) == ("second", "openai/second")
    assert (headers["x-router-reason"], headers["x-router-decided-target"]) == ("fallback", "first")
    assert (headers["x-router-attempts"], headers["x-router-tier"]) == ("3", "tier-of-first")


def test_an_answer_of_the_target_that_was_decided_on_counts_one_attempt(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={**ASK, "model": "second"})
    assert answer.headers["x-router-attempts"] == "1"
    assert answer.headers["x-router-reason"] == "pinned"
    assert "x-router-decided-target" not in answer.headers
    assert "x-router-attempts" not in http.post("/v1/route", json={**ASK, "model": "first"}).headers


def test_where_no_fallback_answers_the_first_error_is_told(http: httpx.Client, router: Running) -> None:
    router.provider.reply("second", JSONResponse({"error": {"message": "no"}}, 503))
    answer = http.post(CHAT, json={**ASK, "model": "first"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == (
        "The server had an error with key [key] (Its fallbacks gave no answer either; limited: 429, second: 503.)"
    )
    assert answer.headers["x-router-attempts"] == "3"
    assert answer.headers["x-router-target"] == "first"


def test_a_retry_is_not_seen(http: httpx.Client, router: Running) -> None:
    router.provider.reply(
        "twice", JSONResponse({"error": {"message": "try again"}}, 429, {"retry-after": "0"})
    )
    answer = http.post(CHAT, json={**ASK, "model": "twice"})
    assert (answer.status_code, answer.headers["x-router-attempts"]) == (200, "2")
    assert asked(router) == ["twice", "twice"]


def test_a_cooling_target_is_named_by_readyz_and_metrics(http: httpx.Client, router: Running) -> None:
    busy = JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after": "40"})
    router.provider.reply("second", busy)
    assert http.post(CHAT, json={**ASK, "model": "second"}).status_code == 429
    ready = http.get("/readyz")
    assert ready.status_code == 200
    assert 30 < ready.json()["cooling"]["second"] <= 40
    until = metric(http, 'router_cooling_until_timestamp_seconds{target="second"}')
    assert 30 < until - time.time() <= 40
    # It is tried all the same where nobody else can, and so found to be well.
    assert http.post(CHAT, json={**ASK, "model": "second"}).status_code == 200
    assert "second" not in http.get("/readyz").json().get("cooling", {})


def test_what_breaks_after_the_first_byte_is_told_in_the_stream(http: httpx.Client, router: Running) -> None:
    answer = http.post(CHAT, json={**ASK, "model": "limps", "stream": True})
    assert (answer.status_code, answer.headers["x-router-target"]) == (200, "limps")
    assert '"overloaded' in answer.text
    assert asked(router) == ["fails-midway"]
    assert metric(http, 'router_attempts_total{outcome="broke_off",target="limps"}') == 1


def test_a_stream_that_is_held_back_may_still_fall_back(http: httpx.Client, router: Running) -> None:
    answer = http.post(CHAT, json={**ASK, "model": "held-limps", "stream": True})
    assert answer.headers["x-router-target"] == "second"
    assert "overloaded" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_place_is_free_again_when_its_stream_is_left(http: httpx.Client, router: Running) -> None:
    body = {**ASK, "model": "single", "stream": True}
    started = 'router_attempts_total{outcome="gone",target="single"}'
    for count in (1, 2):
        with http.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()  # which leaves, where nobody holds it
            next(lines)
            full = httpx.post(router.url + CHAT, json=body)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "target_busy")
            assert full.headers["retry-after"] == "1"
            assert "x-router-attempts" not in full.headers
        deadline = time.monotonic() + 5
        while metric(http, started) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert metric(http, started) == count


@pytest.mark.parametrize(
    ("bad", "body", "fault"),
    [
        (reply(None, refusal="I can't."), {}, "refusal"),
        (reply("", "content_filter"), {}, "refusal"),
        (reply(""), {}, "empty"),
        (reply('{"a": '), {"response_format": {"type": "json_object"}}, "invalid_json"),
    ],
)
def test_an_answer_that_is_none_is_asked_of_the_stronger_target(
    http: httpx.Client, router: Running, bad: Response, body: dict[str, Any], fault: str
) -> None:
    names = [
        f'router_faulty_answers_total{{fault="{fault}",target="weak"}}',
        'router_tokens_total{kind="input",target="weak"}',
        'router_tokens_total{kind="input",target="best"}',
        'router_cost_usd_total{target="weak"}',
        'router_cost_usd_total{target="best"}',
        'router_rerouted_total{reason="escalated",target="best"}',
    ]
    before = [metric(http, name) for name in names]
    router.provider.reply("weak", bad)
    router.provider.reply("best", reply('{"a": 1}'))
    answer = http.post(CHAT, json={**ASK, **body, "model": "safe"})
    assert answer.json()["choices"][0]["message"]["content"] == '{"a": 1}'
    headers = answer.headers
    assert (headers["x-router-target"], headers["x-router-reason"]) == ("best", "escalated")
    assert (headers["x-router-decided-target"], headers["x-router-attempts"]) == ("weak", "2")
    # Both calls are paid for, and counted.
    rise = [metric(http, name) - value for name, value in zip(names, before, strict=True)]
    assert rise == pytest.approx([1, 9, 9, (9 * 1 + 3 * 4) / 1e6, (9 * 10 + 3 * 40) / 1e6, 1])


def test_good_answers_and_other_tiers_are_asked_once(http: httpx.Client, router: Running) -> None:
    router.provider.reply("weak", reply("fine"), reply(""), reply(""))
    assert http.post(CHAT, json={**ASK, "model": "safe"}).headers["x-router-attempts"] == "1"
    assert http.post(CHAT, json={**ASK, "model": "plain"}).headers["x-router-attempts"] == "1"
    assert http.post(CHAT, json={**ASK, "model": "weak"}).headers["x-router-reason"] == "pinned"
    router.provider.reply("best", reply(""))
    assert http.post(CHAT, json={**ASK, "model": "top"}).headers["x-router-attempts"] == "1"
    assert asked(router) == ["weak", "weak", "weak", "best"]


def test_strong_is_the_dearest_of_the_prediction(http: httpx.Client, router: Running) -> None:
    router.provider.reply("weak", reply(""))
    assert http.post(CHAT, json={**ASK, "model": "predicted"}).headers["x-router-target"] == "best"


def test_where_the_stronger_target_does_not_answer_the_first_answer_is_given(
    http: httpx.Client, router: Running
) -> None:
    router.provider.reply("weak", reply(""))
    answer = http.post(CHAT, json={**ASK, "model": "vain"})
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "")
    headers = answer.headers
    assert (headers["x-router-target"], headers["x-router-reason"]) == ("weak", "default")
    assert headers["x-router-attempts"] == "2"


def stream_of(*deltas: dict[str, Any]) -> Response:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": USAGE},
    ]
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return Response(text + "data: [DONE]\n\n", media_type="text/event-stream")


def test_a_stream_is_judged_only_where_the_policy_lets_it_be_held_back(
    http: httpx.Client, router: Running
) -> None:
    refusal = [{"role": "assistant", "content": ""}, {"refusal": "I can't."}]
    used = 'router_tokens_total{kind="output",target="weak"}'
    before = metric(http, used)
    router.provider.reply("weak", stream_of(*refusal), stream_of(*refusal))
    as_it_comes = http.post(CHAT, json={**ASK, "model": "safe", "stream": True})
    assert "I can't." in as_it_comes.text
    assert as_it_comes.headers["x-router-target"] == "weak"
    held = http.post(CHAT, json={**ASK, "model": "held", "stream": True})
    assert "I can't." not in held.text
    assert held.text.count("data: ") == 6
    assert held.text.endswith("data: [DONE]\n\n")
    assert (held.headers["x-router-target"], held.headers["x-router-reason"]) == ("best", "escalated")
    assert metric(http, used) - before == 6


@pytest.mark.parametrize("model", ["own", "own-or-ours", "translated"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_s_own_provider_key(
    http: httpx.Client, router: Running, model: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = {**ASK, "model": model, "stream": stream}
    with caplog.at_level("DEBUG"):
        answer = http.post(CHAT, json=body, headers={"x-own-key": OWN_KEY})
    assert answer.status_code == 200, answer.text
    seen = router.provider.last
    assert seen.headers["authorization"] == f"Bearer {OWN_KEY}"
    assert "x-own-key" not in seen.headers
    assert OWN_KEY not in answer.text + str(answer.headers) + caplog.text
    assert OWN_KEY not in http.get("/metrics").text

    other = http.post(CHAT, json=body, headers={"x-own-key": "sk-another-client's-key"})
    assert other.status_code == 200
    assert router.provider.last.headers["authorization"] == "Bearer sk-another-client's-key"

    without = http.post(CHAT, json=body)
    if model == "own-or-ours":
        assert router.provider.last.headers["authorization"] == f"Bearer {KEY}"
    else:
        assert without.status_code == 401
        error = without.json()["error"]
        assert (error["param"], error["code"]) == ("x-own-key", "provider_key_missing")
        assert "in the header x-own-key" in error["message"]


def test_a_client_s_own_key_is_not_in_the_provider_s_words(http: httpx.Client, router: Running) -> None:
    for key in ("hunter2-hunter2", OWN_KEY):
        said = {"error": {"message": f"Incorrect API key provided: {key}", "code": key}}
        router.provider.reply("own", JSONResponse(said, 401))
        answer = http.post(CHAT, json={**ASK, "model": "own"}, headers={"x-own-key": key})
        assert answer.status_code == 401
        assert answer.json()["error"]["message"] == "Incorrect API key provided: [key]"
        assert key not in answer.text


@pytest.mark.parametrize("key", ["a b", "caf\u00e9", "x" * 5000])
def test_an_own_key_that_is_none_is_400_and_not_echoed(http: httpx.Client, key: str) -> None:
    answer = http.post(CHAT, json={**ASK, "model": "own"}, headers=[(b"x-own-key", key.encode("latin-1"))])
    assert answer.status_code == 400
    assert key not in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {**ASK, "max_tokens": 50}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_other_dialects_escalate_and_fall_back_as_well(
    http: httpx.Client, router: Running, path: str, body: dict[str, Any], stream: bool
) -> None:
    fell_back = http.post(path, json={**body, "model": "first", "stream": stream})
    assert fell_back.headers["x-router-target"] == "second", fell_back.text
    bad: list[Response] = [reply("", "content_filter"), reply(None, refusal="I can't."), reply("")]
    if stream:
        empty = {"role": "assistant", "content": ""}
        bad = [stream_of(empty, {"refusal": "I can't."}), stream_of(empty)]
    for answer in bad:
        router.provider.reply("weak", answer)
        escalated = http.post(path, json={**body, "model": "held", "stream": stream})
        assert escalated.status_code == 200, escalated.text
        assert (escalated.headers["x-router-target"], escalated.headers["x-router-reason"]) == (
            "best",
            "escalated",
        )
        assert "Hello" in escalated.text
        assert "I can't" not in escalated.text
    router.provider.reply("weak", *([stream_of({"content": "fine"})] if stream else [reply("fine")]))
    fine = http.post(path, json={**body, "model": "held", "stream": stream})
    assert fine.headers["x-router-target"] == "weak"
    assert "fine" in fine.text
