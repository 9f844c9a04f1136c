"""The server's description at ``/openapi.json``.

The bodies of the three dialects belong to OpenAI and Anthropic, and pass through with whatever is new in them: their
schemas here say what the router itself reads and writes, and leave the rest open.
"""

from __future__ import annotations

from typing import Any

from router.policy import MODE

Schema = dict[str, Any]

_OPEN: Schema = {"type": "object"}
_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}

# As router.spend has them, which is not loaded with the server.
SPEND_BY = ("mode", "feature", "tier", "target", "model", "key", "session", "reason", "day")

# What an answer carries, as far as it is known when it begins.
_ANSWER_HEADERS: dict[str, tuple[str, Schema]] = {
    "x-request-id": ("The request's own id, or the one it was given.", _TEXT),
    "request-id": ("The same, in Anthropic's dialect.", _TEXT),
    "x-router-policy": ("Version of the policy that decided.", _TEXT),
    "x-router-target": ("The target that answered.", _TEXT),
    "x-router-model": ("Its model.", _TEXT),
    "x-router-reason": ("Why that target.", _TEXT),
    "x-router-tier": ("The tier that decided; none where the client named a target.", _TEXT),
    "x-router-score": ("The predicted gain of the dearer target, where predicted.", _NUMBER),
    "x-router-threshold": ("The threshold that it was held against.", _NUMBER),
    "x-router-decision-ms": ("How long the decision took.", _NUMBER),
    "x-router-decided-target": ("The target that was decided on, where another answered.", _TEXT),
    "x-router-attempts": ("Calls of providers.", _COUNT),
    "x-router-trail": ("The stages of the decision, where they were asked for.", _TEXT),
    "x-router-token-count": ("Who counted the tokens: provider, or estimate.", _TEXT),
}
_ERROR_HEADERS: dict[str, tuple[str, Schema]] = {
    "retry-after": ("When to come back: seconds, or a date.", _TEXT),
    "www-authenticate": ("How to name oneself, with 401.", _TEXT),
}


def description(version: str) -> dict[str, Any]:
    """The description of a server of this version, as OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "router", "version": version},
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("Chat completion", "ChatRequest", "ChatAnswer", "Error", stream=True)
            },
            "/api/openrouter/chat/completions": {
                "post": _operation(
                    "Chat completion, at Kilo's path", "ChatRequest", "ChatAnswer", "Error", True
                )
            },
            "/v1/messages": {
                "post": _operation("Message", "MessagesRequest", "Message", "MessagesError", stream=True)
            },
            "/v1/messages/count_tokens": {
                "post": _operation("Count of input tokens", "CountRequest", "Count", "MessagesError")
            },
            "/v1/responses": {
                "post": _operation("Response", "ResponsesRequest", "Response", "Error", stream=True)
            },
            "/v1/route": {"post": _operation("Decision alone", "RouteRequest", "Decisions", "Error")},
            "/v1/models": {"get": _page("Tiers, targets and aliases", "Models")},
            "/healthz": {"get": _page("Alive", "Status")},
            "/readyz": {"get": _page("Ready to decide and to dispatch", "Status", unavailable=True)},
            "/metrics": {"get": _page("Counters in Prometheus' text format", None)},
            "/v1/budgets": {"get": _page("How the budgets stand", "Budgets")},
            "/v1/spend": {"get": _page("What was spent, by group", "Spend") | {"parameters": _spend()}},
            "/dashboard": {"get": _page("Where the money goes, for people", None, "text/html")},
            "/openapi.json": {"get": _page("This description", "Open")},
        },
        "components": {"schemas": _schemas()},
    }


def _operation(summary: str, request: str, answer: str, error: str, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if stream:
        content["text/event-stream"] = {}
    return {
        "summary": summary,
        "parameters": [
            _header("x-router-mode", "What kind of step this is: plan, code, …", pattern=f"^{MODE.pattern}$"),
            _header("x-request-id", "Comes back with the answer."),
            _header("x-router-session", "Which conversation it is part of."),
            _header("x-router-feature", "What it is counted as in the ledger."),
            _header("x-router-threshold", "The loss of quality allowed, -1 to 1, where clients may set it."),
            _header("x-router-explain", "1 asks for the stages of the decision, where clients may see them."),
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {
            "200": {"description": "The answer.", "headers": _answered(_ANSWER_HEADERS), "content": content},
            "default": {
                "description": "What was wrong, in the dialect's shape.",
                "headers": _answered(_ANSWER_HEADERS | _ERROR_HEADERS),
                "content": {"application/json": {"schema": _ref(error)}},
            },
        },
    }


def _page(
    summary: str, answer: str | None, media_type: str = "text/plain", unavailable: bool = False
) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}} if answer else {media_type: {"schema": _TEXT}}
    failed = {"503": {"description": "Not ready.", "content": content}} if unavailable else {}
    error = {"application/json": {"schema": _ref("Error")}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The page.", "content": content},
            **failed,
            "default": {"description": "What was wrong.", "content": error},
        },
    }


def _answered(headers: dict[str, tuple[str, Schema]]) -> dict[str, Any]:
    return {name: {"description": text, "schema": schema} for name, (text, schema) in headers.items()}


def _spend() -> list[dict[str, Any]]:
    """What is asked of the ledger."""
    time = "2026-01-31, 2026-01-31T12:00 (UTC), 24h, 7d, 2w, today, week, month, year"
    limit = {"type": "integer", "minimum": 0, "maximum": 999_999, "default": 20}
    return [
        _query("by", "The group.", {**_TEXT, "enum": list(SPEND_BY), "default": "mode"}),
        _query("since", f"From this time on: {time}.", _TEXT),
        _query("until", "Before this time; as since.", _TEXT),
        _query("limit", "Groups at most, those with the most tokens; 0 for all.", limit),
    ]


def _query(name: str, text: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


def _header(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": text,
        "schema": {**_TEXT, **schema},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _schemas() -> dict[str, Schema]:
    content = {"anyOf": [_TEXT, _list(_OPEN)]}
    turn = _object(
        ("role",),
        role=_TEXT,
        content=_or_null(content),
        tool_calls=_or_null(_list(_OPEN)),
    )
    shared = {
        "model": _or_null(
            {**_TEXT, "description": "A tier, tier:mode, a target or an alias; auto if it is not there."}
        ),
        "stream": _or_null({"type": "boolean"}),
        "tools": _or_null(_list(_OPEN)),
        "metadata": _or_null(_object(mode=_or_null(_TEXT))),
    }
    turns = _list(turn, minItems=1)
    limit = {**_COUNT, "description": "The most tokens that the answer may take."}
    item = _object(type=_TEXT)
    messages = {
        **shared,
        "messages": turns,
        "system": _or_null(content),
        "thinking": _or_null(_OPEN),
        "tool_choice": _or_null(_OPEN),
        "output_config": _or_null(_OPEN),
        "stop_sequences": _or_null(_list(_TEXT)),
    }
    decision = _object(
        ("target", "model", "reason"),
        target=_TEXT,
        model=_TEXT,
        reason=_TEXT,
        tier=_or_null(_TEXT),
        mode=_or_null(_TEXT),
        bundle=_or_null(_TEXT),
        score=_or_null(_NUMBER),
        threshold=_or_null(_NUMBER),
        decision_ms=_NUMBER,
    )
    words = {"message": _TEXT, "type": _TEXT}
    return {
        "Open": _OPEN,
        "Status": _object(("status",), status=_TEXT),
        "Budgets": _object(("at_limit", "on_outage", "budgets"), budgets=_list(_OPEN)),
        "Spend": _object(("by", "summary", "total", "groups"), by=_TEXT, summary=_TEXT, groups=_list(_OPEN)),
        "ChatRequest": _object(("messages",), messages=turns, stream_options=_or_null(_OPEN), **shared),
        "ChatAnswer": _object(("choices",), choices=_list(_OPEN)),
        "MessagesRequest": _object(("messages", "max_tokens"), max_tokens=limit, **messages),
        "CountRequest": _object(("messages",), **messages),
        "Count": _object(("input_tokens",), input_tokens=_COUNT),
        "Message": _object(
            ("id", "type", "role", "content", "stop_reason", "usage"),
            id=_TEXT,
            type={"const": "message"},
            role={"const": "assistant"},
            content=_list(_object(("type",), type=_TEXT)),
            stop_reason=_or_null(_TEXT),
            usage=_object(("input_tokens", "output_tokens"), input_tokens=_COUNT, output_tokens=_COUNT),
        ),
        "ResponsesRequest": _object(
            ("input",),
            input={"anyOf": [_TEXT, _list(item, minItems=1)]},
            instructions=_or_null(_TEXT),
            max_output_tokens=_or_null({**limit, "minimum": 1}),
            store=_or_null({"const": False, "description": "Nothing is stored."}),
            reasoning=_or_null(_OPEN),
            text=_or_null(_OPEN),
            **shared,
        ),
        "Response": _object(
            ("id", "object", "status", "output"),
            id=_TEXT,
            object={"const": "response"},
            status=_TEXT,
            output=_list(_object(("type",), type=_TEXT)),
        ),
        "RouteRequest": {
            "oneOf": [
                _object(("prompt",), prompt=_TEXT),
                _object(("prompts",), prompts=_list(_TEXT)),
                _object(("messages",), messages=turns),
            ]
        },
        "Decision": decision,
        "Decisions": {
            "anyOf": [_ref("Decision"), _object(("decisions",), decisions=_list(_ref("Decision")))]
        },
        "Models": _object(
            ("object", "data"), object={"const": "list"}, data=_list(_object(("id",), id=_TEXT))
        ),
        "Error": _object(
            ("error",),
            error=_object(
                ("message", "type", "param", "code"),
                **words,
                param=_or_null(_TEXT),
                code=_or_null(_TEXT),
            ),
        ),
        "MessagesError": _object(
            ("type", "error"),
            type={"const": "error"},
            error=_object(("type", "message"), **words),
            request_id=_or_null(_TEXT),
        ),
    }
