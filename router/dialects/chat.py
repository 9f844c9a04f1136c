"""OpenAI's chat completions: what the other dialects are translated to and from, and so nearly nothing to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.dialects.inbound import Inbound, View
from router.schemas import ask_for_usage, check_messages, error_body, read_object, read_stream, to_json, wrong
from router.upstream import Usage, usage_of

DONE = b"data: [DONE]\n\n"


class Chat:
    """``/v1/chat/completions``."""

    name = "chat"
    path = "/v1/chat/completions"

    def read(self, content: bytes, headers: Mapping[str, str]) -> Inbound:
        body = read_object(content)
        check_messages(body)
        stream = read_stream(body)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            wrong("stream_options", "must be an object")
        ask_for_usage(body)
        return Inbound(self, body, stream, len(content))

    def to_chat(self, body: Mapping[str, Any], *, marks: bool = False) -> View:
        return View(body if isinstance(body, dict) else dict(body))

    def answer(self, completion: Mapping[str, Any], inbound: Inbound, family: str) -> dict[str, Any]:
        return dict(completion)

    def writer(self, inbound: Inbound, family: str) -> ChatWriter:
        return ChatWriter()

    def usage(self, data: Mapping[str, Any]) -> Usage | None:
        return usage_of(data)

    def error_body(self, error: Exception, request_id: str | None = None) -> dict[str, Any]:
        return error_body(error)

    def ends(self, events: bytes) -> bool:
        return events.endswith(DONE)

    def error_event(self, error: Exception, first: bytes, last: bytes) -> bytes:
        return b"data: " + to_json(error_body(error)) + b"\n\n"


class ChatWriter:
    """Chunks as events, and ``[DONE]``."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        return b"data: " + to_json(chunk) + b"\n\n"

    def end(self) -> bytes:
        return DONE


CHAT = Chat()
