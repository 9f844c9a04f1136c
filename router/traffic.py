"""Made-up agent sessions: what a coding agent asks for request by request, to try a policy on before it meets users.

A trace is one session: its context grows request by request, tools answer, people go away and come back, and each request
either needs the strong target or does not. What a predictor would say of it is drawn to fit: noisy, and calibrated over requests
of which ``USUAL_SHARE`` are hard, so in a session of easier or harder work it is off as a real one is.

The same family and seed give the same trace on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Literal

Tool = Literal["none", "read", "edit", "run"]

# The share of hard requests over which the predicted gains are calibrated.
USUAL_SHARE = 0.25
# How many standard deviations of the predictor's noise lie between hard and easy requests: AUC .92, and .76.
SHARP, DULL = 2.0, 1.0

# Tokens that a request adds to the context (the last answer left out) and tokens of its answer, as least and most.
_SIZES: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = MappingProxyType(
    {
        "plan": ((600, 3_500), (700, 2_200)),
        "architect": ((600, 3_500), (700, 2_200)),
        "debug": ((500, 3_000), (300, 1_400)),
        "code": ((200, 1_800), (200, 1_200)),
        "edit": ((150, 1_500), (100, 700)),
        "ask": ((100, 900), (150, 900)),
    }
)
# What an agent reads when a step begins, by what it does. "none" is a human's message.
_TOOLS: Mapping[str, tuple[Tool, ...]] = MappingProxyType(
    {
        "plan": ("none", "read", "read"),
        "architect": ("none", "read", "read"),
        "debug": ("run", "run", "read"),
        "code": ("edit", "read", "run"),
        "edit": ("edit", "read", "edit", "run"),
        "ask": ("none",),
    }
)
# Requests that clients make for themselves, each with a context of its own: tokens in, tokens out.
_ASIDES: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = MappingProxyType(
    {
        "title": ((150, 600), (5, 20)),
        "commit-message": ((400, 3_000), (15, 80)),
        "summary": ((500, 2_500), (60, 250)),
    }
)
_SYSTEM_PROMPT = (7_000, 16_000)  # with the schemas of the tools
_FULL = 100_000  # where agents summarise what was said and begin anew


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a session.

    Attributes
    ----------
    seconds : float
        Since the session began.
    thread : int
        Requests of one thread share a prefix that a provider can cache; an aside has a thread of its own, and so has
        what follows a summary of the conversation.
    mode : str
        What the agent is doing: plan, architect, debug, code, edit, ask, or internal for an aside.
    feature : str or None
        What an aside is for: title, commit-message, summary.
    tool : str
        What kind of tool's result the request ends with; ``"none"`` where a human speaks.
    context : int
        Tokens of the whole request.
    new : int
        Those of them that the thread's last request did not hold.
    output : int
        Tokens of the answer.
    needs_strong : bool
        The truth: the weak target would fail.
    gain : float
        What a predictor says of that, between 0 and 1.
    """

    seconds: float
    thread: int
    mode: str
    feature: str | None
    tool: Tool
    context: int
    new: int
    output: int
    needs_strong: bool
    gain: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One session of a family."""

    family: str
    seed: int
    steps: tuple[Step, ...]


class _Agent:
    """A session being written; each method adds what its name says."""

    def __init__(self, random: Random, *, sharpness: float = SHARP, pace: float = 12.0) -> None:
        self.random = random
        self.steps: list[Step] = []
        self._sharpness = sharpness
        self._pace = pace  # seconds from request to request, in the middle
        self._seconds = 0.0
        self._thread = 0
        self._threads = 1
        self._context = 0
        self._waiting = random.randint(*_SYSTEM_PROMPT)  # tokens that the next request adds

    def does(self, mode: str, hard: bool) -> None:
        """One request of the conversation; a full context is summarised first."""
        if self._context > _FULL:
            self.summarises()
        added, answer = _SIZES[mode]
        new = self._waiting + self._between(added)
        output = self._between(answer)
        self._context += new
        tool = self.random.choice(_TOOLS[mode]) if self.steps else "none"
        self._add(self._thread, mode, None, tool, self._context, new, output, hard)
        self._waiting = output

    def asks_aside(self, feature: str) -> None:
        """A small request with a context of its own, which never needs the strong target."""
        added, answer = _ASIDES[feature]
        tokens = self._between(added)
        self._add(
            self._new_thread(), "internal", feature, "none", tokens, tokens, self._between(answer), False
        )

    def rests(self, least_minutes: float, most_minutes: float) -> None:
        """Nothing for some minutes: a human reads, or is away."""
        self._seconds += 60 * self.random.uniform(least_minutes, most_minutes)

    def summarises(self) -> None:
        """The conversation goes on from a summary: another prefix, much shorter."""
        self._thread = self._new_thread()
        self._context = 0
        self._waiting = self.random.randint(*_SYSTEM_PROMPT) + self.random.randint(1_500, 5_000)

    def flips(self, chance: float) -> bool:
        return self.random.random() < chance

    def _new_thread(self) -> int:
        self._threads += 1
        return self._threads - 1

    def _between(self, bounds: tuple[int, int]) -> int:
        """Many small ones and few large ones, as tool results and answers are."""
        least, most = bounds
        return round(least + (most - least) * self.random.betavariate(1.2, 2.6))

    def _add(
        self,
        thread: int,
        mode: str,
        feature: str | None,
        tool: Tool,
        context: int,
        new: int,
        output: int,
        hard: bool,
    ) -> None:
        # Log-odds of a normal observation with this distance between the two kinds: calibrated at USUAL_SHARE.
        middle = self._sharpness / 2 if hard else -self._sharpness / 2
        observed = self.random.gauss(middle, 1.0)
        odds = math.log(USUAL_SHARE / (1 - USUAL_SHARE)) + self._sharpness * observed
        gain = 1 / (1 + math.exp(-odds))
        seconds = round(self._seconds, 1)
        self.steps.append(Step(seconds, thread, mode, feature, tool, context, new, output, hard, gain))
        self._seconds += self._pace * self.random.lognormvariate(0.0, 0.5)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of session. ``write`` draws one."""

    description: str
    write: Callable[[Random], _Agent]


def _edit_loop(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(55, 80)):
        agent.does("edit", agent.flips(0.05))
    return agent


def _plan_then_edit(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(3, 7)):
        agent.does("plan", agent.flips(0.9))
    for _ in range(random.randint(30, 65)):
        agent.does("edit", agent.flips(0.05))
    return agent


def _debug_bursts(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(3, 5)):
        for _ in range(random.randint(6, 12)):
            agent.does("code", agent.flips(0.04))
        for _ in range(random.randint(3, 6)):
            agent.does("debug", agent.flips(0.9))
    return agent


def _alternating(random: Random) -> _Agent:
    agent = _Agent(random)
    hard = agent.flips(0.5)
    for _ in range(random.randint(24, 60)):
        agent.does("debug" if hard else "edit", hard)
        hard = not hard
    return agent


def _early_hard(random: Random) -> _Agent:
    agent = _Agent(random)
    agent.does("plan", True)
    for _ in range(random.randint(35, 75)):
        agent.does("edit", False)
    return agent


def _late_hard(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(22, 45)):
        agent.does("edit", False)
    for _ in range(random.randint(8, 20)):
        agent.does("debug", agent.flips(0.9))
    return agent


def _short(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(2, 6)):
        agent.does("ask", agent.flips(0.3))
    return agent


def _idle_gaps(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(16, 40)):
        agent.does("code", agent.flips(0.2))
        if agent.flips(0.4):
            agent.rests(6, 45)
    return agent


def _asides(random: Random) -> _Agent:
    agent = _Agent(random)
    agent.does("plan", agent.flips(0.5))
    agent.asks_aside("title")
    for _ in range(random.randint(30, 60)):
        agent.does("edit", agent.flips(0.12))
        if agent.flips(0.3):
            agent.asks_aside(random.choice(("commit-message", "summary")))
    return agent


def _sparse_hard(random: Random) -> _Agent:
    agent = _Agent(random, pace=45.0)
    for _ in range(random.randint(3, 6)):
        for _ in range(random.randint(8, 14)):
            agent.does("code", False)
        agent.does("debug", True)
    return agent


def _mostly_hard(random: Random) -> _Agent:
    agent = _Agent(random)
    for _ in range(random.randint(25, 50)):
        agent.does(random.choice(("architect", "debug")), agent.flips(0.85))
    return agent


def _false_alarms(random: Random) -> _Agent:
    agent = _Agent(random, sharpness=DULL)
    for _ in range(random.randint(40, 75)):
        agent.does("edit", agent.flips(0.03))
    return agent


def _summarised(random: Random) -> _Agent:
    agent = _Agent(random)
    hard = False
    for _ in range(2):
        for _ in range(random.randint(35, 50)):
            hard = agent.flips(0.85) if hard else agent.flips(0.1)
            agent.does("debug" if hard else "code", hard)
        agent.summarises()
    for _ in range(random.randint(8, 16)):
        agent.does("code", agent.flips(0.15))
    return agent


def _random_phases(random: Random) -> _Agent:
    agent = _Agent(random)
    hard_phase = agent.flips(0.4)
    for _ in range(random.randint(12, 70)):
        agent.does("debug" if hard_phase else "edit", agent.flips(0.8 if hard_phase else 0.08))
        if agent.flips(1 / 8):
            hard_phase = not hard_phase
    return agent


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "edit_loop": Family("a long loop of edits, one in twenty hard", _edit_loop),
        "plan_then_edit": Family("a few planning steps, nearly all hard, then edits", _plan_then_edit),
        "debug_bursts": Family("coding with bursts of hard debugging", _debug_bursts),
        "alternating": Family("hard and easy in turn, each step (adverse to per-request)", _alternating),
        "early_hard": Family("one hard step, then a long easy tail (adverse to sticky)", _early_hard),
        "late_hard": Family("an easy start, hard late (adverse to sticky)", _late_hard),
        "short": Family("two to six requests, three in ten hard", _short),
        "idle_gaps": Family("pauses longer than a cache lives, after four steps in ten", _idle_gaps),
        "asides": Family(
            "titles, commit messages and summaries in between, in contexts of their own", _asides
        ),
        "sparse_hard": Family(
            "slow steps, a single hard one in ten: its cache has gone (adverse to per-request)", _sparse_hard
        ),
        "mostly_hard": Family(
            "85 % hard: each easy-looking step tempts away (adverse to per-request)", _mostly_hard
        ),
        "false_alarms": Family("easy work under a dull predictor (adverse to per-request)", _false_alarms),
        "summarised": Family("the context is summarised twice and grows again", _summarised),
        "random_phases": Family("hard and easy phases of random length", _random_phases),
    }
)


def generate(family: str, seed: int) -> Trace:
    """One session.

    Parameters
    ----------
    family : str
        A key of ``FAMILIES``.
    seed : int

    Raises
    ------
    KeyError
        There is no such family.
    """
    agent = FAMILIES[family].write(Random(f"{family} {seed}"))
    return Trace(family, seed, tuple(agent.steps))


def traces(family: str, count: int, first_seed: int = 0) -> Iterator[Trace]:
    """``count`` sessions of a family, of consecutive seeds."""
    for seed in range(first_seed, first_seed + count):
        yield generate(family, seed)
