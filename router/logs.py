"""The log: a line for each record, on standard error, as text for people or as a JSON object for machines.

A line stays one, whatever a record holds: control characters are escaped. An exception is told by its type and place, since
its message may hold part of a prompt, and so may what a library says after the first line of its own.
"""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from router.decision import Decision

Format = Literal["text", "json"]
_Caught = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

# The loggers whose messages are written here, with privacy in mind.
_OWN = "router"
_UNDECIDED = Decision("-", "-", "-")
_DECIDED = ("target", "model", "reason", "tier", "mode", "score", "threshold")


@dataclass(frozen=True, slots=True)
class Access:
    """A request that has ended: the message of its line in the log.

    Attributes
    ----------
    method, path, status, ms : str, str, int, float
        What was asked, and what came of it after how many milliseconds.
    id : str
        Of the request, as in ``x-request-id``.
    client : str or None
    session : str or None
        A hash.
    decision : Decision or None
        As it came out; None where nothing was decided.
    stream : bool
    first_ms : float or None
        Milliseconds to the first event of a streamed answer.
    attempts : int
        Calls of targets.
    input_tokens, output_tokens, cached_tokens : int or None
        Of all these calls, as the providers counted; None where none did.
    cost : float or None
        US dollars by the policy's prices for these tokens; None where no target has prices.
    policy, bundle : str, str or None
    decision_ms : float
    error : str or None
        A short word.
    trace, span : str or None
        Ids of the request's span, where it is traced.
    """

    method: str
    path: str
    status: int
    ms: float
    id: str
    client: str | None
    session: str | None
    decision: Decision | None
    stream: bool
    first_ms: float | None
    attempts: int
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    cost: float | None
    policy: str
    bundle: str | None
    decision_ms: float
    error: str | None
    trace: str | None
    span: str | None

    def __str__(self) -> str:
        decision = self.decision or _UNDECIDED
        score = "-" if decision.score is None else f"{decision.score:.4f}"
        return (
            f"{self.method} {self.path} {self.status} {self.ms:.1f} ms id={self.id} client={self.client or '-'} "
            f"target={decision.target} reason={decision.reason} tier={decision.tier or '-'} "
            f"mode={decision.mode or '-'} score={score} attempts={self.attempts} policy={self.policy} "
            f"decision={self.decision_ms:.1f} ms" + (f" trace={self.trace}" if self.trace else "")
        )

    def fields(self) -> dict[str, Any]:
        """All of it, for a machine; what does not apply is null."""
        decision = self.decision
        return {
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "ms": round(self.ms, 3),
            "client": self.client,
            "session": self.session,
            **{name: getattr(decision, name, None) for name in _DECIDED},
            "stream": self.stream,
            "first_ms": None if self.first_ms is None else round(self.first_ms, 3),
            "attempts": self.attempts,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "cost": self.cost,
            "policy": self.policy,
            "bundle": self.bundle,
            "decision_ms": round(self.decision_ms, 3),
            "error": self.error,
            "trace_id": self.trace,
            "span_id": self.span,
        }


class TextLines(logging.Formatter):
    """``time LEVEL message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _one_line(_said(record))
        return super().formatMessage(record)

    def formatException(self, ei: _Caught) -> str:
        return f"  {_place(ei)}"


class JsonLines(logging.Formatter):
    """One JSON object of ASCII characters."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, Access):
            line["event"] = "request"
            line |= record.msg.fields()
        else:
            line["event"] = "log"
            line["message"] = message = _said(record)
            if message.startswith("id="):  # of a request that has not ended
                line["id"] = message[3:].partition(" ")[0]
        if record.exc_info:
            line["exception"] = _place(record.exc_info)
        return _dumps(line)


_dumps = json.JSONEncoder(separators=(",", ":")).encode


def configuration(level: str, form: Format) -> dict[str, Any]:
    """What ``logging.config.dictConfig`` takes; uvicorn applies it in every process.

    Parameters
    ----------
    level : str
        Of this server's own records. Of others, warnings are told; uvicorn's start and end too where a machine reads them.
    form : {"text", "json"}
    """
    machine = form == "json"
    formatter = {"()": "router.logs.json_lines" if machine else "router.logs.TextLines"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "router": {"level": level.upper()},
            "uvicorn": {"level": level.upper() if machine else "WARNING"},
        },
    }


def json_lines() -> JsonLines:
    """The formatter; from now on Python's warnings go through the log as well."""
    logging.captureWarnings(True)
    return JsonLines()


def _said(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name.partition(".")[0] == _OWN:
        return message
    return message.strip().partition("\n")[0]


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _place(caught: _Caught | Any) -> str:
    kind, _, tracked = caught if isinstance(caught, tuple) else (None, None, None)
    frames = traceback.extract_tb(tracked)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{kind.__name__ if kind else 'an exception'}{where}"
