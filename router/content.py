"""What a decision may read of a request's body: read when a rule asks for it, and once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from router.capability import KnownNeeds, Needs
from router.sessions import conversation_identity
from router.steps import KnownResult, Result, last_results


class Content:
    """A request's body as a decision sees it.

    A request whose mode is looked up, at a target that declares no limits, is decided without any of this.

    Parameters
    ----------
    body : mapping
        Checked, and of any of the three dialects.
    size : int or None
        Bytes of the body as it came, where known: then small requests are not counted token by token.
    """

    def __init__(self, body: Mapping[str, Any], size: int | None = None) -> None:
        self._body = body
        self.needs = Needs(body, size)

    @cached_property
    def identity(self) -> str:
        """Which conversation it is of: see :func:`router.sessions.conversation_identity`."""
        body = self._body
        system = body.get("system") or body.get("instructions")
        said = body.get("messages") or body.get("input") or body.get("prompt") or ""
        items = said if isinstance(said, list) else [{"role": "user", "content": said}]
        # Only fields that the endpoint reads are checked.
        messages = (item for item in items if isinstance(item, dict))
        return conversation_identity(
            chain([{"role": "system", "content": system}] if system else [], messages)
        )

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """The tool results that the request ends in; empty where it ends in a human's words."""
        return last_results(self._body)


@dataclass(frozen=True, slots=True)
class KnownContent:
    """What was read of a :class:`Content` whose body is gone: enough to decide on the request once more."""

    needs: KnownNeeds
    results: tuple[KnownResult, ...] = ()
    identity: str = ""
