"""The bodies of the HTTP interface: requests read and checked, answers and errors in OpenAI's shape.

Only what the router itself uses is checked, by hand: the rest of a body belongs to the provider, which knows
better, and validating every message of a long conversation would cost more than deciding on it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from router.content import Content
from router.decision import Decision, RequestFacts, Trail
from router.errors import RequestError, UpstreamError
from router.features import Prompt, prompt_from_messages, prompt_from_text
from router.policy import MODE, Limits

MODE_HEADERS = ("x-router-mode", "x-kilocode-mode")
THRESHOLD_HEADER = "x-router-threshold"
EXPLAIN_HEADER = "x-router-explain"
REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_SURROGATE = re.compile(rb"\\u[dD][89abAB]", re.ASCII)

# OpenAI's error type for a status, where it is not the provider that says it.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# Anthropic's types that OpenAI does not have.
_FOREIGN = frozenset(("api_error", "billing_error", "overloaded_error"))


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """The body of ``/v1/route``: texts, or one conversation.

    Attributes
    ----------
    body : dict
    many : bool
        Whether the client sent a list, and so gets one.
    size : int
        Bytes of the body as it came.
    """

    body: dict[str, Any]
    many: bool
    size: int

    def __len__(self) -> int:
        return len(self.body["prompts"]) if self.many else 1

    def content(self, index: int) -> Content:
        """What the decision may read of the prompt at ``index``."""
        if self.many:
            return Content({**self.body, "prompts": None, "prompt": self.body["prompts"][index]})
        return Content(self.body, self.size)

    def prompt(self, index: int) -> Prompt:
        """What the classifier reads of the prompt at ``index``."""
        if self.many:
            return prompt_from_text(self.body["prompts"][index])
        if "prompt" in self.body:
            return prompt_from_text(self.body["prompt"])
        return prompt_from_messages(self.body["messages"], self.body.get("tools"))


def ask_for_usage(body: dict[str, Any]) -> None:
    """Put OpenRouter's ``usage: {"include": true}``, which OpenAI refuses, as OpenAI's ``stream_options``; in place."""
    usage = body.get("usage")
    if not isinstance(usage, dict) or "include" not in usage:
        return
    del body["usage"]
    if usage["include"] is True and body.get("stream") and body.get("stream_options") is None:
        body["stream_options"] = {"include_usage": True}


def read_route(content: bytes, limits: Limits) -> RouteRequest:
    """Read the body of ``/v1/route``; raises :class:`RequestError`."""
    body = read_object(content)
    given = [field for field in ("prompt", "prompts", "messages") if field in body]
    if len(given) != 1:
        raise RequestError(
            "Give one of 'prompt', 'prompts' and 'messages'.", param=given[1] if given else None
        )
    if "messages" in body:
        check_messages(body)
    elif "prompt" in body:
        if not isinstance(body["prompt"], str):
            wrong("prompt", "must be a string")
    else:
        prompts = body["prompts"]
        if not isinstance(prompts, list):
            wrong("prompts", "must be a list of strings")
        if len(prompts) > limits.prompts:
            wrong("prompts", f"has {len(prompts)} entries; at most {limits.prompts} go into one request")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                wrong(f"prompts[{index}]", "must be a string")
    return RouteRequest(body, "prompts" in body, len(content))


def read_facts(
    body: Mapping[str, Any], headers: Mapping[str, str], limits: Limits, content: Content | None = None
) -> RequestFacts:
    """What the decision needs of a body and its headers; raises :class:`RequestError`."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        wrong("model", "must be a string")
    return RequestFacts(model or "auto", _mode(body, headers), _threshold(headers, limits), content)


def wants_trail(headers: Mapping[str, str], limits: Limits) -> bool:
    """Whether the client asks for the stages of its decision, and may have them."""
    return limits.explain and headers.get(EXPLAIN_HEADER, "").strip().lower() in ("1", "true", "yes")


def trail_header(trail: Trail) -> str:
    """A decision's stages as one line of ASCII."""
    return " | ".join(f"{stage}={outcome}" for stage, outcome in trail).encode("ascii", "replace").decode()


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object; raises :class:`RequestError` for anything else."""
    try:
        body = json.loads(content, parse_constant=_no_constant)
        if _SURROGATE.search(content):
            # Half a surrogate pair passes JSON's grammar, but no text can hold it.
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("The body holds half a surrogate pair, which is not valid Unicode.") from None
    except (ValueError, RecursionError) as error:
        place = (
            f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise RequestError(f"The body is not valid JSON{place}.") from None
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.")
    return body


def read_stream(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for a stream; raises :class:`RequestError`."""
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        wrong("stream", "must be true or false")
    return bool(stream)


def check_messages(body: Mapping[str, Any]) -> None:
    """That ``messages`` and ``tools`` can be read, in chat's form and in Anthropic's; raises :class:`RequestError`."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        wrong("messages", "must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            wrong(f"messages[{index}]", "must be an object")
        if not isinstance(message.get("role"), str):
            wrong(f"messages[{index}].role", "must be a string")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) for part in content):
                wrong(f"messages[{index}].content", "must be a list of objects")
        elif content is not None and not isinstance(content, str):
            wrong(f"messages[{index}].content", "must be a string, a list of parts, or null")
        if not _is_list_of_objects(message.get("tool_calls")):
            wrong(f"messages[{index}].tool_calls", "must be a list of objects")
    if not _is_list_of_objects(body.get("tools")):
        wrong("tools", "must be a list of objects")


def wrong(param: str, what: str) -> NoReturn:
    """Refuse a field: :class:`RequestError` that names it."""
    raise RequestError(f"'{param}' {what}.", param=param)


def to_json(data: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a provider may send, becomes a question mark."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def request_id(headers: Mapping[str, str]) -> str | None:
    """The client's own request id, where it is fit to be echoed and logged."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else None


def route_answer(
    decision: Decision, policy: str, bundle: str | None, milliseconds: float, *, trail: bool = False
) -> dict[str, Any]:
    """A decision as ``/v1/route`` gives it; with its stages where these are asked for."""
    stages = [{"stage": stage, "outcome": outcome} for stage, outcome in decision.trail]
    return {
        "target": decision.target,
        "model": decision.model,
        "score": decision.score,
        "threshold": decision.threshold,
        "novelty": decision.novelty,
        "unfamiliar": decision.unfamiliar,
        "reason": decision.reason,
        "tier": decision.tier,
        "mode": decision.mode,
        "policy": policy,
        "bundle": bundle if decision.score is not None else None,
        "decision_ms": round(milliseconds, 3),
        **({"trail": stages} if trail else {}),
    }


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object. Of an error that is not the router's own it says nothing."""
    if isinstance(error, RequestError):
        kind = _TYPES.get(error.status, "invalid_request_error")
        return _error(str(error), kind, error.param, error.code)
    if isinstance(error, UpstreamError):
        told = None if error.type in _FOREIGN else error.type
        kind = told or _TYPES.get(error.status, "upstream_error")
        return _error(str(error), kind, error.param, error.code)
    return _error(
        "The server had an error while processing the request.", "server_error", None, "internal_error"
    )


def _error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _is_list_of_objects(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


def _mode(body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    for header in MODE_HEADERS:
        if header in headers:
            return _checked_mode(headers[header], header)
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        wrong("metadata", "must be an object")
    if metadata and metadata.get("mode") is not None:
        return _checked_mode(metadata["mode"], "metadata.mode")
    return None


def _checked_mode(value: Any, where: str) -> str | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        mode = value.strip().lower()
        if MODE.fullmatch(mode):
            return mode
    wrong(where, "must be a word of at most 64 letters, digits, '-', '_' and '.'")


def _threshold(headers: Mapping[str, str], limits: Limits) -> float | None:
    text = headers.get(THRESHOLD_HEADER)
    if text is None:
        return None
    if not limits.threshold_override:
        raise RequestError(
            f"{THRESHOLD_HEADER} may not be set: limits.threshold_override in the policy allows it, or the client's key.",
            status=403,
            param=THRESHOLD_HEADER,
        )
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not -1 <= threshold <= 1:
        wrong(THRESHOLD_HEADER, "must be a number from -1 to 1")
    return threshold


def _no_constant(word: str) -> NoReturn:
    # Python reads NaN and Infinity; JSON does not have them, and no provider would take them.
    raise ValueError(word)
