"""What a request needs of a target, and what a target lacks for it.

The estimate of tokens, for models whose tokenizer is not here, so that it rather says too many than too few: a letter or a
white space is .25 of a token, any other ASCII character (digits, punctuation) .65, each UTF-8 byte beyond ASCII .5, a message
or a part of one 4 more. Beside OpenAI's cl100k and Anthropic's published tokenizer it says .95 to 1.5 times the truth on code,
prose, JSON, Chinese and Japanese, .8 at least on digests, logs and lists of versions, and up to 2.1 times on Cyrillic.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from router.policy import Capability, Target

# Room that is kept for the answer where the client does not say how long it may be.
ANSWER_TOKENS = 4_096
# Providers count about (width × height) / 750 for an image, and scale large ones down to this.
IMAGE_TOKENS = 1_600
# A page of a document is 1,500 to 3,000 tokens, and in base64 some 40,000 characters.
FILE_TOKENS = 3_000
_FILE_CHARACTERS = 20
# 10 to 32 tokens a second; compressed speech is some 10,000 characters of base64 a second.
AUDIO_TOKENS = 500
_AUDIO_CHARACTERS = 300

_PLAIN = (string.ascii_letters + string.whitespace).encode()
_PLAIN_TOKENS, _OTHER_TOKENS, _BEYOND_TOKENS = 0.25, 0.65, 0.5
_PART_TOKENS = 4
# Deeper than any dialect nests its parts; what a client hides below is not counted.
_DEPTH = 12

_MEDIA: Mapping[str, Capability] = {
    "image_url": "images",
    "image": "images",
    "input_image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "file": "files",
    "input_file": "files",
    "document": "files",
}
# Where the three dialects keep what the model reads …
_CONVERSATION = ("messages", "input", "system", "instructions", "prompt")
# … and what reaches it as JSON.
_AS_JSON = ("tools", "functions", "response_format", "text", "output_format", "output_config")
_ANSWER = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Lack(NamedTuple):
    """What a target lacks for a request, in words for a person, and the error's code."""

    words: str
    code: str


class Needs:
    """What a request needs of a target; each part is found when it is asked for, and once.

    Parameters
    ----------
    body : mapping
        Of a request, in any of the three dialects.
    size : int or None
        Bytes of the body as it came. A text has at most a token a byte, so that a small body need not be counted.
    """

    def __init__(self, body: Mapping[str, Any], size: int | None = None) -> None:
        self._body = body
        self._size = size

    @property
    def features(self) -> frozenset[Capability]:
        """What the target must be able to do."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[frozenset[Capability], int]:
        """The features, and how many images, audio clips and files there are."""
        found: set[Capability] = set()
        media = 0
        for field in ("messages", "input"):
            value = self._body.get(field)
            for message in value if isinstance(value, list) else ():
                media += _media_of(message, found)
        if self._body.get("tools") or self._body.get("functions"):
            found.add("tools")
        if self._wants_schema():
            found.add("json_schema")
        modalities = self._body.get("modalities")
        if isinstance(modalities, list) and "audio" in modalities:
            found.add("audio")
        return frozenset(found), media

    @cached_property
    def answer(self) -> int:
        """Tokens that the answer may have; 0 where the client does not say."""
        asked = [self._body.get(field) for field in _ANSWER]
        return max((n for n in asked if isinstance(n, int) and n > 0), default=0)

    @property
    def room(self) -> int:
        """Tokens to keep free for the answer."""
        return self.answer or ANSWER_TOKENS

    @property
    def answers(self) -> int:
        """How many answers the client asks for at once."""
        asked = self._body.get("n")
        return asked if isinstance(asked, int) and asked > 1 else 1

    @cached_property
    def at_most(self) -> int:
        """A bound of :attr:`tokens` that costs nothing: the body's bytes, and what images and files add to them."""
        if self._size is None:
            return self.tokens
        return self._size + self._read[1] * max(IMAGE_TOKENS, FILE_TOKENS, AUDIO_TOKENS)

    @cached_property
    def tokens(self) -> int:
        """Estimated tokens of the input; the module says how."""
        texts: list[str] = []
        flat = sum(_collect(self._body.get(field), texts, 0) for field in _CONVERSATION)
        for field in _AS_JSON:
            if isinstance(value := self._body.get(field), list | dict):
                texts.append(_as_json(value))
        return flat + estimate_tokens("".join(texts))

    def _wants_schema(self) -> bool:
        for field in ("response_format", "output_format", "text", "output_config"):
            value = self._body.get(field)
            if not isinstance(value, dict):
                continue
            inner = value.get("format", value)
            if isinstance(inner, dict) and inner.get("type") == "json_schema":
                return True
        return False


@dataclass(frozen=True, slots=True)
class KnownNeeds:
    """What :class:`Needs` found in a request whose body is gone."""

    features: frozenset[Capability] = frozenset()
    answer: int = 0
    tokens: int = 0
    answers: int = 1

    @property
    def room(self) -> int:
        return self.answer or ANSWER_TOKENS

    @property
    def at_most(self) -> int:
        return self.tokens


def estimate_tokens(text: str) -> int:
    """Tokens of a text by the rule of this module, rounded up."""
    raw = text.encode("utf-8", "surrogatepass")
    rest = raw.translate(None, _PLAIN)
    plain = len(raw) - len(rest)
    beyond = 0 if len(raw) == len(text) else len(rest) - len(rest.decode("ascii", "ignore"))
    tokens = plain * _PLAIN_TOKENS + (len(rest) - beyond) * _OTHER_TOKENS + beyond * _BEYOND_TOKENS
    return int(tokens) + 1 if text else 0


def lacks(target: Target, needs: Needs | KnownNeeds) -> Lack | None:
    """What the target lacks for the request; None where it can take it. What a target does not declare, it is taken to have."""
    if target.supports is not None and (missing := needs.features - target.supports):
        words = " and ".join(sorted(missing)).replace("json_schema", "JSON schemas")
        return Lack(f"does not take {words}", "unsupported_content")
    if target.max_output_tokens is not None and needs.answer > target.max_output_tokens:
        return Lack(
            f"answers with at most {target.max_output_tokens:,} tokens, and {needs.answer:,} are asked for",
            "context_length_exceeded",
        )
    window = target.context_window
    if window is None or needs.at_most + needs.room <= window:
        return None
    if needs.tokens + needs.room <= window:
        return None
    return Lack(
        f"has a context window of {window:,} tokens, and about {needs.tokens:,} with room for {needs.room:,} are needed",
        "context_length_exceeded",
    )


def _media_of(message: Any, found: set[Capability]) -> int:
    """How many images, audio clips and files a message holds, those in tool results included."""
    if not isinstance(message, dict):
        return 0
    count = 0
    for field in ("content", "output"):
        parts = message.get(field)
        for part in parts if isinstance(parts, list) else ():
            if not isinstance(part, dict):
                continue
            kind = part.get("type")
            if isinstance(kind, str) and kind in _MEDIA:
                if not _is_text(part):
                    found.add(_MEDIA[kind])
                count += 1
            elif kind == "tool_result":
                count += _media_of(part, found)
    return count


def _is_text(part: Mapping[str, Any]) -> bool:
    """Anthropic's documents may be plain text, which every model reads."""
    source = part.get("source")
    return isinstance(source, dict) and source.get("type") in ("text", "content")


def _collect(value: Any, texts: list[str], depth: int) -> int:
    """Put the texts below ``value`` into ``texts``; the tokens of what is not text."""
    if isinstance(value, str):
        texts.append(value)
        return 0
    if depth > _DEPTH:
        return 0
    if isinstance(value, list):
        return sum([_collect(item, texts, depth + 1) for item in value])
    if not isinstance(value, dict):
        return 0
    kind = value.get("type")
    if isinstance(kind, str) and kind in _MEDIA and not _is_text(value):
        return _media_tokens(_MEDIA[kind], value)
    tokens = _PART_TOKENS
    for key, item in value.items():
        if key == "input" and isinstance(item, dict):  # what a tool is called with
            texts.append(_as_json(item))
        elif key not in ("type", "role", "cache_control"):
            tokens += _collect(item, texts, depth + 1)
    return tokens


def _media_tokens(kind: Capability, part: Mapping[str, Any]) -> int:
    if kind == "images":
        return IMAGE_TOKENS
    data = max(map(len, _strings(part)), default=0)
    if kind == "audio":
        return max(AUDIO_TOKENS, data // _AUDIO_CHARACTERS)
    return max(FILE_TOKENS, data // _FILE_CHARACTERS)


def _strings(part: Mapping[str, Any]) -> list[str]:
    """The strings of a part and of the objects in it: its data are the longest of them."""
    inner = [value for value in part.values() if isinstance(value, dict)]
    return [value for one in (part, *inner) for value in one.values() if isinstance(value, str)]


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""
