"""Made-up traffic of a team of developers and their agents: sessions of :mod:`router.traffic`, side by side over working days.

To try policies on without a history (:func:`rows`, which ``router replay`` reads), and to put load on a server
(:func:`body`). The same numbers give the same traffic on every machine.

Each person has a key, a tier that all its sessions ask for, and a client that tells modes or does not. Titles, commit
messages and summaries ask for tier ``internal``. Tokens are read from a cache as if one target with a cache answered the
whole session.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from types import MappingProxyType
from typing import Any

from router.traffic import Step, generate

# How often each kind of session is drawn; the families that are adverse to some rule on purpose are rare.
USUAL: Mapping[str, int] = MappingProxyType(
    {
        "short": 10, "edit_loop": 3, "plan_then_edit": 4, "debug_bursts": 3, "asides": 4, "idle_gaps": 3,
        "random_phases": 3, "summarised": 1, "early_hard": 2, "late_hard": 1, "mostly_hard": 1, "sparse_hard": 1,
        "alternating": 1, "false_alarms": 1,
    }
)  # fmt: skip
# People in turn: what their sessions ask for, the feature they are tagged with, and whether their client tells modes.
_TIERS = ("balanced", "top", "balanced", "top", "free", "balanced", "top")
_FEATURES = ("editor", "terminal", "editor", "review")
_TELLS = (True, True, False)
# What clients ask on the side: the mode of tier internal.
_ASIDE_MODES = {"title": "title", "commit-message": "commit", "summary": "summary"}
_TOOLS = {"read": "read_file", "edit": "edit_file", "run": "bash"}

_FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)  # a Monday
_REQUESTS_A_DAY = 400  # of one person
_CACHE_SECONDS = 300
_CHARACTERS = 4  # of a token, by the estimate of router.capability
_READ = 8_000  # characters that a tool gave in an earlier step

_WORDS = (
    "the order service keeps each line of a basket until it is paid and then moves it to the archive table where "
    "reports read it once a night so a change of the schema must reach both places and the cache in front of them "
    "before any client can see a new column or lose an old one which the tests of the importer check by name"
)
_ASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "plan": (
            "Plan how to split the order service from the billing code without stopping either of them.",
            "Think through how sessions should move to the shared store, and list the steps.",
        ),
        "architect": (
            "Design how several workers can share one rate limit, and say what happens when the store is away.",
        ),
        "debug": (
            "The nightly report misses the last hour since the clocks changed; find out why.",
            "This test passes alone and breaks when it runs after the importer; find the cause.",
        ),
        "code": ("Write the endpoint that lists archived orders, with paging.", "Add a cache to the lookup."),
        "edit": ("Rename the field to customer_id everywhere.", "Sort the imports and fix the typing."),
        "ask": ("What does this function return for an empty list?", "Which module reads the settings?"),
        "title": ("Write a title of at most six words for this conversation.",),
        "commit": ("Write a commit message for this change.",),
        "summary": ("Summarise what was done so far.",),
    }
)


@dataclass(frozen=True, slots=True)
class Made:
    """One made-up request.

    Attributes
    ----------
    id : str
    time : int
        Microseconds since 1970, UTC.
    session, client : str
    asked : str
        The model that it asks for: a tier.
    mode : str or None
        As its client tells it.
    doing : str
        The mode that it is in, told or not.
    feature : str
    step : Step
    cached : int
        Tokens of its context that are read from a cache, if one target answers the session.
    failed_test : bool
        Whether the tool's result that it ends in says that a test failed.
    begun : (int, str)
        Tokens of the context that its thread began with, and the mode that it was in.
    scale : float
        Of all tokens.
    """

    id: str
    time: int
    session: str
    client: str
    asked: str
    mode: str | None
    doing: str
    feature: str
    step: Step
    cached: int
    failed_test: bool
    begun: tuple[int, str]
    scale: float = 1.0

    def tokens(self, count: int) -> int:
        return math.ceil(count * self.scale)

    @property
    def context(self) -> int:
        return self.tokens(self.step.context)

    @property
    def first(self) -> int:
        return self.tokens(self.begun[0])

    @property
    def new(self) -> int:
        """Tokens of the context that the one before did not hold."""
        return min(self.tokens(self.step.new), self.context)

    @property
    def output(self) -> int:
        return self.tokens(self.step.output)


def traffic(
    requests: int, *, seed: int = 0, days: int = 5, start: datetime = _FIRST_DAY, scale: float = 1.0
) -> Iterator[Made]:
    """Requests in the order of their time, a working day at a time; about 400 of each person a day.

    Parameters
    ----------
    requests : int
        Exactly so many.
    seed : int
    days : int
        Working days over which they are spread.
    start : datetime
        Midnight of the first; Saturdays and Sundays are left out.
    scale : float
        Of all token counts: 0.1 makes contexts a tenth as long.
    """
    people = max(len(_TIERS), math.ceil(requests / days / _REQUESTS_A_DAY))
    day = start
    for number in range(days):
        while day.weekday() >= 5:
            day += timedelta(days=1)
        share = requests * (number + 1) // days - requests * number // days
        made: list[Made] = []
        for person in range(people):
            quota = share * (person + 1) // people - share * person // people
            made += _day_of(person, quota, f"{seed} {number} {person}", day, scale)
        made.sort(key=lambda one: (one.time, one.id))
        yield from made
        day += timedelta(days=1)


def _day_of(person: int, quota: int, name: str, day: datetime, scale: float) -> Iterator[Made]:
    """A person's requests of a day, session after session; some begin before the one before has ended."""
    random = Random(name)
    clock = (day + timedelta(hours=9)).timestamp() + random.uniform(-1_800, 3_600)
    noon = (day + timedelta(hours=12, minutes=30)).timestamp()
    session = 0
    while quota > 0:
        family = random.choices(list(USUAL), list(USUAL.values()))[0]
        steps = generate(family, random.randrange(1 << 30)).steps[:quota]
        yield from _session(person, f"{name} {session}", steps, clock, scale)
        quota -= len(steps)
        session += 1
        lasted = steps[-1].seconds
        clock += lasted * (0.5 if random.random() < 0.25 else 1) + random.expovariate(1 / 420)
        if noon < clock < noon + 2_700:
            clock = noon + 2_700
    # What does not fit into the day is asked in the evening.


def _session(person: int, name: str, steps: tuple[Step, ...], clock: float, scale: float) -> Iterator[Made]:
    random = Random(f"{name} results")
    tells = _TELLS[person % len(_TELLS)]
    caches: dict[int, tuple[int, float]] = {}  # by thread: tokens, and when they were used
    begun: dict[int, tuple[int, str]] = {}
    key = hashlib.sha256(name.encode()).hexdigest()
    for number, step in enumerate(steps):
        held, used = caches.get(step.thread, (0, -math.inf))
        caches[step.thread] = (step.context, step.seconds)
        aside = _ASIDE_MODES.get(step.feature or "")
        yield Made(
            id=f"{key[32:56]}{number:08x}",
            time=round((clock + step.seconds) * 1e6),
            session=key[:32],
            client=f"dev-{person + 1:02d}",
            asked="internal" if aside else _TIERS[person % len(_TIERS)],
            mode=aside or (step.mode if tells else None),
            doing=aside or step.mode,
            feature=step.feature or _FEATURES[person % len(_FEATURES)],
            step=step,
            cached=math.floor(scale * held) if step.seconds - used <= _CACHE_SECONDS else 0,
            failed_test=step.tool == "run" and random.random() < (0.5 if step.mode == "debug" else 0.15),
            begun=begun.setdefault(step.thread, (step.context, aside or step.mode)),
            scale=scale,
        )


def row(made: Made) -> dict[str, Any]:
    """A request as a line of JSON that ``router replay`` reads; the gain is the score, and no bundle's."""
    results = []
    if made.step.tool != "none":
        results.append([_TOOLS[made.step.tool], _CHARACTERS * made.new, 0, int(made.failed_test)])
    basis: dict[str, Any] = {"asked": made.asked, "tokens": made.context}
    if made.doing == made.step.mode:
        basis["needs"] = ["tools"]
    return {
        "id": made.id,
        "time": made.time,
        "session": made.session,
        "client": made.client,
        "mode": made.mode,
        "feature": made.feature,
        "tier": made.asked,
        "score": round(made.step.gain, 6),
        "input_tokens": made.context,
        "cached_read_tokens": made.cached,
        "cache_write_tokens": made.context - made.cached,
        "output_tokens": made.output,
        "basis": basis | ({"results": results} if results else {}),
    }


def body(made: Made, model: str | None = None, *, stream: bool = False) -> dict[str, Any]:
    """A chat completion of as many tokens, by the estimate of :mod:`router.capability`.

    The requests of a thread begin alike: what a provider could read from a cache is the same text.

    Parameters
    ----------
    made : Made
    model : str or None
        What it asks for; by default what it was made to.
    stream : bool
    """
    ask = _ask(made, made.begun[1])
    begins = max(_CHARACTERS * made.first - len(ask), 0)
    ends = max(_CHARACTERS * made.context - len(ask), begins)
    text = _text(made, ends)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": text[:begins]},
        {"role": "user", "content": ask},
    ]
    latest = max(ends - _CHARACTERS * made.new, begins)
    for start in range(begins, latest, _READ):
        messages += _read("read_file", text[start : min(start + _READ, latest)])
    if made.step.tool != "none":
        said = "\n1 failed, 12 passed" if made.failed_test else ""
        messages += _read(_TOOLS[made.step.tool], text[latest:ends] + said)
    elif latest > begins or ends > latest:
        attached = f"<attached_files>{text[latest:ends]}</attached_files>"
        messages += [
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": f"{_ask(made, made.doing)}\n{attached}"},
        ]
    tools = [{"type": "function", "function": {"name": name}} for name in _TOOLS.values()]
    return {
        "model": model or made.asked,
        "messages": messages,
        "max_tokens": max(made.output, 1),
        **({"tools": tools} if made.doing == made.step.mode else {}),
        **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
    }


def _ask(made: Made, mode: str) -> str:
    asks = _ASKS[mode]
    return asks[int(made.session[:4], 16) % len(asks)]


def _read(tool: str, result: str) -> list[dict[str, Any]]:
    """A call of a tool and what it gave."""
    call = {"id": "call", "type": "function", "function": {"name": tool, "arguments": "{}"}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call", "content": result},
    ]


def headers(made: Made) -> dict[str, str]:
    """What a client of the gateway sends beside the body."""
    mode = {} if made.mode is None else {"x-router-mode": made.mode}
    named = {"x-router-session": made.session, "x-router-feature": made.feature, "x-request-id": made.id}
    return named | mode


def _text(made: Made, length: int) -> str:
    """Words without end, of which a thread always has the beginning."""
    start = int(made.session[4:8], 16) % len(_WORDS) + made.step.thread
    return ((f"{_WORDS} " * (length // len(_WORDS) + 2))[start:])[:length]
