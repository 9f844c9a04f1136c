"""Send made-up traffic to a running server, session beside session: each waits for its answers, as agents do."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from router.errors import RouterError
from router.schemas import to_json
from router.workload import Made, body, headers

_PATH = "/v1/chat/completions"


@dataclass(slots=True)
class Report:
    """What came back.

    Attributes
    ----------
    sent : int
    answers : Counter of str
        By status, or the kind of error where there was no answer.
    seconds : float
        From the first request to the last answer.
    latencies : list of float
        Seconds of each request that got an answer of 200, to its end.
    """

    sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Of the latencies, in seconds; 0 where there are none."""
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "answers": dict(self.answers),
            "seconds": self.seconds,
            "requests_per_second": self.sent / max(self.seconds, 1e-9),
            "p50_ms": self.quantile(0.5) * 1e3,
            "p99_ms": self.quantile(0.99) * 1e3,
        }

    def __str__(self) -> str:
        answers = ", ".join(f"{count:,} {what}" for what, count in self.answers.most_common())
        return (
            f"{self.sent:,} requests in {self.seconds:.1f} s ({self.sent / max(self.seconds, 1e-9):.0f} a second): {answers}; "
            f"p50 {self.quantile(0.5) * 1e3:.1f} ms, p99 {self.quantile(0.99) * 1e3:.1f} ms"
        )


async def send(
    traffic: Iterable[Made],
    url: str,
    *,
    concurrency: int = 16,
    model: str | None = None,
    key: str | None = None,
    stream: bool = False,
    timeout: float = 120.0,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Send each request once, whatever comes back.

    Parameters
    ----------
    traffic : iterable of Made
    url : str
        Of the server, without a path.
    concurrency : int
        Sessions at a time; the requests of a session follow one another.
    model : str or None
        What all of them ask for, in the place of their tiers.
    key : str or None
        Of a client of the server.
    stream : bool
        Whether answers are streamed.
    timeout : float
        Seconds that an answer may take.
    progress : callable, optional
        Told of the report after each answer.

    Raises
    ------
    RouterError
        Nothing answers at ``url``.
    """
    report = Report()
    waiting = iter(_sessions(traffic))
    bearer = {} if key is None else {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    started = time.perf_counter()
    async with httpx.AsyncClient(
        base_url=url, headers=bearer, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        try:
            await http.get("/healthz")
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise RouterError(f"--send: nothing answers at {url} ({error})") from None

        async def work() -> None:
            for session in waiting:
                for made in session:
                    await _send(http, made, model, stream, report)
                    if progress is not None:
                        progress(report)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    report.seconds = time.perf_counter() - started
    return report


async def _send(http: httpx.AsyncClient, made: Made, model: str | None, stream: bool, report: Report) -> None:
    content = to_json(body(made, model, stream=stream))
    report.sent += 1
    started = time.perf_counter()
    try:
        answer = await http.post(
            _PATH, content=content, headers={"content-type": "application/json", **headers(made)}
        )
    except httpx.HTTPError as error:
        report.answers[type(error).__name__] += 1
        return
    report.answers[str(answer.status_code)] += 1
    if answer.status_code == 200:
        report.latencies.append(time.perf_counter() - started)


def _sessions(traffic: Iterable[Made]) -> Sequence[list[Made]]:
    """The requests by session, those that begin first in front."""
    sessions: defaultdict[str, list[Made]] = defaultdict(list)
    for made in traffic:
        sessions[made.session].append(made)
    return list(sessions.values())
