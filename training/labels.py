"""Make labels: both targets answer each prompt; a reference or a judge says how good the answers are.

Finished rows are appended to ``OUT.partial`` as they come, so nothing that was paid for is lost.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from router.dispatch import Completion
from router.errors import DatasetError, RouterError, UpstreamError, UsageError
from training.dataset import estimated_tokens, write_dataset
from training.judge import (
    Message,
    comparison,
    grading,
    matches,
    read_score,
    read_share_of_first,
    transcript,
)
from training.records import file_format, write_records

# What an answer is expected to take where nobody knows; half a page.
_EXPECTED_ANSWER = 400
_EXPECTED_VERDICT = 20
# Tokens of the judge's instructions, with a margin.
_INSTRUCTIONS = 150
# The key is wrong or the account empty: all other rows would fail alike.
_HOPELESS = (401, 402)
# So would they where a model never answered; where it did, it is about this prompt (moderation, say).
_HOPELESS_AT_FIRST = (403, 404)
# The provider may answer the same request a second time.
_PASSING = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0

Row = Mapping[str, Any]


class Complete(Protocol):
    """One call of a model, as :func:`router.dispatch.complete`."""

    def __call__(
        self, model: str, messages: Sequence[Message], /, *, max_tokens: int
    ) -> Awaitable[Completion]: ...


class Price(Protocol):
    """US dollars per million tokens, as :class:`router.policy.Prices`."""

    @property
    def input(self) -> float: ...

    @property
    def output(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of whom.

    Attributes
    ----------
    weak, strong, judge : str
        Model ids.
    pairwise : bool
        Where the row has no reference: compare the two answers, in both orders, rather than grade each.
    max_tokens : int
        The most that any call may write.
    """

    weak: str
    strong: str
    judge: str
    pairwise: bool = True
    max_tokens: int = 2_048

    def __post_init__(self) -> None:
        if self.weak == self.strong:
            raise UsageError(f"weak and strong are the same model, {self.weak}")

    @property
    def models(self) -> tuple[str, ...]:
        """Each model once."""
        return tuple(dict.fromkeys((self.weak, self.strong, self.judge)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job will take.

    Attributes
    ----------
    prompts, calls : int
    input_tokens, output_tokens : mapping of str to int
        By model; four characters a token, answers of 400 tokens.
    cost : float or None
        US dollars; None where a model has no price.
    highest : float or None
        The same where every call writes as much as it may.
    unpriced : tuple of str
        Models without a price.
    """

    prompts: int
    calls: int
    input_tokens: Mapping[str, int]
    output_tokens: Mapping[str, int]
    cost: float | None
    highest: float | None
    unpriced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt that got no label, and why."""

    id: str
    why: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. ``spent`` is in US dollars, of this run, as far as prices are known."""

    done: int
    total: int
    failed: int
    spent: float


@dataclass(frozen=True, slots=True)
class LabelReport:
    """How a job ended.

    Attributes
    ----------
    out : Path or None
        The dataset; None where the job stopped before its end.
    partial : Path or None
        Where finished rows are kept for another run; None where none is needed.
    labelled, resumed : int
        Rows with labels, and how many of them an earlier run had made.
    failed : tuple of Failure
        Also in ``OUT.failed.jsonl``.
    remaining : int
        Prompts that were not tried.
    stopped : str
        Why the job stopped before its end; empty where it did not.
    spent : float
        US dollars, of this run, as far as prices are known.
    calls : mapping of str to int
        By model, in this run, repeated ones included.
    """

    out: Path | None
    partial: Path | None
    labelled: int
    resumed: int
    failed: tuple[Failure, ...]
    remaining: int
    stopped: str
    spent: float
    calls: Mapping[str, int]


def estimate(prompts: Sequence[Row], prices: Mapping[str, Price], job: Job) -> Estimate:
    """What labelling would take, before anything is spent."""
    expected = [
        call for prompt in prompts for call in _calls_for(prompt, job, _EXPECTED_ANSWER, _EXPECTED_VERDICT)
    ]
    longest = [call for prompt in prompts for call in _calls_for(prompt, job, job.max_tokens, job.max_tokens)]
    read, written = Counter[str](), Counter[str]()
    for call in expected:
        read[call.model] += call.input
        written[call.model] += call.output
    unpriced = tuple(model for model in job.models if model not in prices)
    cost, highest = (None, None) if unpriced else (_dollars(expected, prices), _dollars(longest, prices))
    return Estimate(len(prompts), len(expected), read, written, cost, highest, unpriced)


def pending(prompts: Sequence[Row], job: Job, out: Path) -> list[Row]:
    """The prompts that :func:`label` has still to do: those that no earlier run finished.

    Raises
    ------
    UsageError
        ``OUT.partial`` is of another job.
    """
    done = _Partial(out, job).rows_for(prompts)
    return [prompt for prompt in prompts if prompt["id"] not in done]


async def label(
    prompts: Sequence[Row],
    complete: Complete,
    job: Job,
    out: Path,
    *,
    prices: Mapping[str, Price] | None = None,
    budget: float | None = None,
    concurrency: int = 8,
    tries: int = 3,
    delay: float = 1.0,
    progress: Callable[[Progress], None] | None = None,
) -> LabelReport:
    """Label prompts and write a dataset; run again, it goes on where it ended.

    Parameters
    ----------
    prompts : sequence of mapping
        Rows of the dataset's JSON shape without labels, as :func:`training.dataset.load_prompts` reads them.
    complete : callable
        Calls a model.
    out : Path
        JSONL, CSV or Parquet by suffix. It appears when every prompt was tried.
    prices : mapping of str to Price, optional
        Used where a call does not report its cost.
    budget : float, optional
        US dollars that this run may spend. A prompt is begun only where its dearest course still fits.
    concurrency : int
        Prompts in work at a time.
    tries : int
        How often a call is made that fails in passing, or a judge asked that does not keep to the form.
    delay : float
        Seconds before the second try, doubled for each further one; ``Retry-After`` comes before it.

    Raises
    ------
    UsageError
        ``out`` is there already or of an unknown kind, its ``.partial`` is of another job, or a budget is set
        and a model has no price.
    """
    prices = prices or {}
    file_format(out)
    if concurrency < 1 or tries < 1:
        raise UsageError("concurrency and tries must be at least 1")
    unpriced = [model for model in job.models if model not in prices]
    if budget is not None and unpriced:
        raise UsageError(f"a budget cannot be kept without a price for {', '.join(unpriced)}")
    with _Partial(out, job) as partial:
        done = partial.rows_for(prompts)
        resumed = len(done)
        run = _Run(complete, job, prices, budget, tries, delay)
        failed: list[Failure] = []
        waiting = iter([prompt for prompt in prompts if prompt["id"] not in done])

        def tell() -> None:
            if progress:
                progress(Progress(len(done) + len(failed), len(prompts), len(failed), run.spent))

        async def work() -> None:
            for prompt in waiting:
                if not await run.may_begin(prompt):
                    return
                try:
                    row = await run.row(prompt)
                except _Hopeless as error:
                    run.stopped = str(error)
                    return
                except RouterError as error:
                    failed.append(Failure(prompt["id"], str(error)))
                except Exception as error:  # one odd answer must not end a job that costs money
                    failed.append(Failure(prompt["id"], f"{type(error).__name__}: {error}"))
                else:
                    partial.append(row)
                    done[prompt["id"]] = row
                finally:
                    await run.ended(prompt)
                tell()

        tell()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(work())

        finished = not run.stopped
        complete_out = out if finished and done else None
        if complete_out:
            write_dataset([done[prompt["id"]] for prompt in prompts if prompt["id"] in done], out)
        failures = out.with_name(f"{out.name}.failed.jsonl")
        if failed:
            write_records([asdict(failure) for failure in failed], failures)
        else:
            failures.unlink(missing_ok=True)
        if finished and not failed:
            partial.remove()
        return LabelReport(
            out=complete_out,
            partial=partial.path if partial.path.exists() else None,
            labelled=len(done),
            resumed=resumed,
            failed=tuple(failed),
            remaining=len(prompts) - len(done) - len(failed),
            stopped=run.stopped,
            spent=run.spent,
            calls=dict(run.calls),
        )


class _Hopeless(RouterError):
    """An error that all other calls would meet too."""


class _Run:
    """The calls of one run: who was called, what was spent, what may still be."""

    def __init__(
        self,
        complete: Complete,
        job: Job,
        prices: Mapping[str, Price],
        budget: float | None,
        tries: int,
        delay: float,
    ) -> None:
        self.spent = 0.0
        self.stopped = ""
        self.calls = Counter[str]()
        self._answered = Counter[str]()
        self._complete = complete
        self._job = job
        self._prices = prices
        self._budget = budget
        self._tries = tries
        self._delay = delay
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    async def may_begin(self, prompt: Row) -> bool:
        """Reserve the dearest course of a prompt; wait for others to end where it does not fit yet."""
        need = self._dearest(prompt)
        async with self._changed:
            while self._budget is not None and self.spent + self._reserved + need > self._budget:
                if self._reserved == 0 or self.stopped:
                    self.stopped = self.stopped or f"the budget of ${self._budget:g} is spent"
                    return False
                await self._changed.wait()
            if self.stopped:
                return False
            self._reserved += need
        return True

    async def ended(self, prompt: Row) -> None:
        """Give back what was reserved."""
        async with self._changed:
            self._reserved = max(self._reserved - self._dearest(prompt), 0.0)
            if self._reserved < 1e-12:
                self._reserved = 0.0
            self._changed.notify_all()

    async def row(self, prompt: Row) -> dict[str, Any]:
        """Both answers and how good they are, as a row of the dataset."""
        messages = _messages(prompt)
        answers: dict[str, Completion] = {}
        costs: dict[str, float | None] = {}
        for model in (self._job.weak, self._job.strong):
            answers[model], costs[model] = await self._call(model, messages)
        weak, strong = answers[self._job.weak].text, answers[self._job.strong].text
        quality: tuple[float, float]
        if "reference" in prompt:
            quality = float(matches(weak, prompt["reference"])), float(matches(strong, prompt["reference"]))
        else:
            judge = self._compare if self._job.pairwise else self._grade
            quality = await judge(transcript(messages), weak, strong)
        return {
            **prompt,
            "quality": {self._job.weak: quality[0], self._job.strong: quality[1]},
            "cost": {model: cost for model, cost in costs.items() if cost is not None},
            "output_tokens": {model: answer.output_tokens for model, answer in answers.items()},
        }

    async def _grade(self, ask: str, weak: str, strong: str) -> tuple[float, float]:
        first = await self._verdict(grading(ask, weak), read_score)
        return first, await self._verdict(grading(ask, strong), read_score)

    async def _compare(self, ask: str, weak: str, strong: str) -> tuple[float, float]:
        first = await self._verdict(comparison(ask, weak, strong), read_share_of_first)
        second = 1 - await self._verdict(comparison(ask, strong, weak), read_share_of_first)
        share = (first + second) / 2
        return share, 1 - share

    async def _verdict(self, messages: Sequence[Message], read: Callable[[str], float | None]) -> float:
        for _ in range(self._tries):
            answer, _cost = await self._call(self._job.judge, messages)
            verdict = read(answer.text)
            if verdict is not None:
                return verdict
        raise DatasetError(f"the judge {self._job.judge} did not keep to the form in {self._tries} tries")

    async def _call(self, model: str, messages: Sequence[Message]) -> tuple[Completion, float | None]:
        for attempt in range(1, self._tries + 1):
            self.calls[model] += 1
            try:
                answer = await self._complete(model, messages, max_tokens=self._job.max_tokens)
            except UpstreamError as error:
                never = error.status in _HOPELESS_AT_FIRST and not self._answered[model]
                if error.status in _HOPELESS or never:
                    raise _Hopeless(f"{model}: {error}") from None
                if attempt == self._tries or (error.status < 500 and error.status not in _PASSING):
                    raise
                await asyncio.sleep(_wait(error.retry_after, self._delay * 2 ** (attempt - 1)))
            else:
                self._answered[model] += 1
                cost = self._cost(model, answer)
                self.spent += cost or 0.0
                return answer, cost
        raise AssertionError("the last try returns or raises")

    def _cost(self, model: str, answer: Completion) -> float | None:
        if answer.cost is not None or model not in self._prices:
            return answer.cost
        price = self._prices[model]
        return (answer.input_tokens * price.input + answer.output_tokens * price.output) / 1e6

    def _dearest(self, prompt: Row) -> float:
        if self._budget is None:
            return 0.0
        return estimate([prompt], self._prices, self._job).highest or 0.0


class _Partial:
    """``OUT.partial``: a line that says what job it is of, then a line a finished row, JSON each."""

    def __init__(self, out: Path, job: Job) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._out = out
        self._job = job
        self._rows: dict[str, dict[str, Any]] = {}
        self._whole = 0
        if self.path.exists():
            self._read()

    def __enter__(self) -> _Partial:
        if self._whole == 0 and self._out.exists():
            raise UsageError(f"{self._out}: exists; remove it or choose another file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self._whole else "wb")
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._file.truncate(self._whole)
        self._file.seek(self._whole)
        if self._whole == 0:
            self.append({"job": asdict(self._job)})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> None:
        content = self.path.read_bytes()
        # A line that was being written when a run was killed has no end: it is dropped.
        self._whole = content.rfind(b"\n") + 1
        lines = list(self._lines(content[: self._whole]))
        if lines and lines[0].get("job") != asdict(self._job):
            raise UsageError(
                f"{self.path}: is of another job (other models or another way to judge); "
                "remove it or choose another file"
            )
        self._rows = {str(row.get("id")): row for row in lines[1:]}

    def _lines(self, content: bytes) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise DatasetError(f"{self.path}:{number}: malformed JSON; remove the line") from None
            if not isinstance(row, dict):
                raise DatasetError(f"{self.path}:{number}: must be a JSON object; remove the line")
            yield row

    def rows_for(self, prompts: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Finished rows by id, of prompts that have not changed since."""
        return {
            prompt["id"]: row
            for prompt in prompts
            if (row := self._rows.get(prompt["id"]))
            and all(row.get(name) == prompt.get(name) for name in ("prompt", "messages", "reference"))
        }

    def append(self, row: Row) -> None:
        """Keep a finished row: it is in the file when this returns."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def remove(self) -> None:
        """The job is done."""
        self._file.close()
        self.path.unlink()


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that a prompt takes, with the tokens it reads and writes."""

    model: str
    input: int
    output: int


def _calls_for(prompt: Row, job: Job, answer: int, verdict: int) -> Iterator[_Call]:
    messages = _messages(prompt)
    asked = estimated_tokens(json.dumps(messages, ensure_ascii=False))
    shown = estimated_tokens(transcript(messages)) + _INSTRUCTIONS
    answer, verdict = min(answer, job.max_tokens), min(verdict, job.max_tokens)
    yield _Call(job.weak, asked, answer)
    yield _Call(job.strong, asked, answer)
    for _ in range(0 if "reference" in prompt else 2):
        yield _Call(job.judge, shown + answer * (2 if job.pairwise else 1), verdict)


def _dollars(calls: Sequence[_Call], prices: Mapping[str, Price]) -> float:
    return sum(c.input * prices[c.model].input + c.output * prices[c.model].output for c in calls) / 1e6


def _messages(prompt: Row) -> Sequence[Message]:
    messages: Sequence[Message] | None = prompt.get("messages")
    return messages or [{"role": "user", "content": prompt["prompt"]}]


def _wait(retry_after: str | None, otherwise: float) -> float:
    try:
        return min(float(retry_after or otherwise), _LONGEST_WAIT)
    except ValueError:  # a date
        return min(otherwise, _LONGEST_WAIT)
