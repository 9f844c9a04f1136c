"""A request as it came, and what each dialect has to be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from router.content import Content
from router.conversation import strip_harness, text_of
from router.features import Prompt, prompt_from_messages
from router.schemas import to_json
from router.upstream import Usage


@dataclass(frozen=True, slots=True)
class View:
    """A request as a chat completion.

    Attributes
    ----------
    body : dict
        Of a chat completion, without ``model`` and ``stream``.
    lost : tuple of str
        Fields that have no place in it, and without which the answer would be another one.
    """

    body: dict[str, Any]
    lost: tuple[str, ...] = ()


class Writer(Protocol):
    """Words a stream of chat chunks as server-sent events of one dialect."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        """The events for a chunk; maybe none."""
        ...

    def end(self) -> bytes:
        """The events after the last chunk; :class:`router.errors.UpstreamError` where the answer is not complete."""
        ...


class Dialect(Protocol):
    """What the server needs of a dialect."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str:
        """Where the server answers it."""
        ...

    def read(self, content: bytes, headers: Mapping[str, str]) -> Inbound:
        """Read a request; :class:`router.errors.RequestError` for what is wrong with it."""
        ...

    def to_chat(self, body: Mapping[str, Any], *, marks: bool = False) -> View:
        """The body as a chat completion; with ``marks``, the marks of prompt caching stay."""
        ...

    def answer(self, completion: Mapping[str, Any], inbound: Inbound, family: str) -> dict[str, Any]:
        """A whole chat completion of a target of ``family`` as an answer of this dialect."""
        ...

    def writer(self, inbound: Inbound, family: str) -> Writer:
        """Words the stream of a target of ``family``."""
        ...

    def usage(self, data: Mapping[str, Any]) -> Usage | None:
        """The usage in an answer or event of this dialect; None where it holds none."""
        ...

    def error_body(self, error: Exception, request_id: str | None = None) -> dict[str, Any]:
        """The body of an error; of one that is not the router's own it says nothing."""
        ...

    def ends(self, events: bytes) -> bool:
        """Whether the last event of a complete stream is among these."""
        ...

    def error_event(self, error: Exception, first: bytes, last: bytes) -> bytes:
        """The events that end a stream with an error, after these: the first and the last that were sent."""
        ...


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event that is named as its ``type`` says: Anthropic's form, and that of OpenAI's responses."""
    return b"event: " + str(data["type"]).encode() + b"\ndata: " + to_json(data) + b"\n\n"


def ended_by(events: bytes, *names: str) -> bool:
    """Whether the last of some named events, as one text, has one of these names."""
    last = events[:-2].rpartition(b"\n\n")[2]
    return any(last.startswith(b"event: " + name.encode() + b"\n") for name in names)


@dataclass(frozen=True)
class Inbound:
    """A request as it came.

    Attributes
    ----------
    dialect : Dialect
        The client's.
    body : dict
        What is dispatched is made of this; never changed.
    stream : bool
    size : int or None
        Bytes of the body as it came.
    headers : mapping
        Those of the client's headers that belong to the dialect, and so go to a provider of the same one.
    families : frozenset of str or None
        The families whose models have answered in this session; None where nobody knows. Set it with
        :func:`dataclasses.replace`.
    """

    dialect: Dialect
    body: dict[str, Any]
    stream: bool = False
    size: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    families: frozenset[str] | None = None

    @cached_property
    def chat(self) -> dict[str, Any]:
        """The request as a chat completion: for chat itself the body as it came."""
        return self.dialect.to_chat(self.body).body

    def content(self) -> Content:
        """What the decision may read."""
        return Content(self.body, self.size)

    def prompt(self) -> Prompt:
        """What the classifier reads: the same for the same conversation in any dialect."""
        messages = self.chat["messages"]
        while len(messages) > 1 and _is_reminder(messages[-2], messages[-1]):
            messages = messages[:-1]
        return prompt_from_messages(messages, self.chat.get("tools"))


def _is_reminder(before: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Whether a client's harness alone speaks after a tool's result, so that the result is still what is read."""
    text = text_of(message.get("content"))
    return (
        before.get("role") == "tool"
        and message.get("role") == "user"
        and bool(text)
        and not strip_harness(text)
    )
