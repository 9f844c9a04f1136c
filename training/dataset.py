"""A labelled dataset: prompts with the quality of each target, from JSONL, CSV or Parquet."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.bundle import prompt_hashes
from router.errors import DatasetError, UsageError
from router.features import Prompt, prompt_from_messages, prompt_from_text
from training.records import Record, file_format, read_records, write_records

Floats = NDArray[np.float64]
Strings = NDArray[np.str_]
Ints = NDArray[np.int64]

# Fields that hold one number a model: nested in JSON, flat as ``quality.<model>`` in CSV and Parquet.
_PER_MODEL = ("quality", "cost", "output_tokens")
_FIELDS = ("id", "prompt", "messages", "tools", "source", "domain", "group", "sufficient", *_PER_MODEL)
# Where nobody counted the tokens.
CHARACTERS_A_TOKEN = 4
# How many bad rows an error shows.
_SHOWN = 3
_UNLABELLED = "has no label"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. ``str()`` gives ``file:line: field: what``."""

    file: str
    line: int
    field: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {f'{self.field}: ' if self.field else ''}{self.what}"


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file that was read: its path, SHA-256 (hexadecimal) and the rows taken from it."""

    path: str
    digest: str
    rows: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What reading a dataset met beside its rows.

    Attributes
    ----------
    files : tuple of FileReport
    skipped : tuple of BadRow
        Empty unless bad rows were to be skipped.
    extra_fields : mapping of str to int
        Fields that are not part of the format, with how many rows have them. They are ignored.
    """

    files: tuple[FileReport, ...] = ()
    skipped: tuple[BadRow, ...] = ()
    extra_fields: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Prompts and what each target made of them.

    Attributes
    ----------
    ids, sources, domains : ndarray of str, shape (n,)
        ``domains`` is empty strings where a row has none.
    groups : ndarray of str, shape (n,)
        Rows of one group stay on one side of a split. Identical prompts, whatever their case and white space
        (:func:`router.bundle.prompt_hashes`), share a group. A group bears the id of its first row.
    prompts : tuple of Prompt, length n
    targets : tuple of str, length T
    quality : ndarray, shape (n, T)
        0 to 1; NaN where a target has no label for a row.
    cost : ndarray, shape (n, T)
        US dollars a request; NaN where unknown.
    output_tokens : ndarray, shape (n, T)
        NaN where unknown.
    digest : str
        SHA-256 over the files it was read from, hexadecimal: of one file its own, of several that of their
        digests in order.
    report : LoadReport
        How the files were read; the same for every selection of their rows.
    """

    ids: Strings
    sources: Strings
    domains: Strings
    groups: Strings
    prompts: tuple[Prompt, ...]
    targets: tuple[str, ...]
    quality: Floats
    cost: Floats
    output_tokens: Floats
    digest: str = ""
    report: LoadReport = field(default_factory=LoadReport)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: ArrayLike) -> Dataset:
        """The rows that a boolean mask of shape (n,) marks, or those at the given indices, in that order."""
        index = np.asarray(rows)
        if index.dtype == np.bool_:
            if index.shape != (len(self),):
                raise ValueError(f"mask of shape {index.shape} for {len(self)} rows")
            index = np.flatnonzero(index)
        index = index.astype(np.int64)
        return replace(
            self,
            ids=self.ids[index],
            sources=self.sources[index],
            domains=self.domains[index],
            groups=self.groups[index],
            prompts=tuple(self.prompts[i] for i in index),
            quality=self.quality[index],
            cost=self.cost[index],
            output_tokens=self.output_tokens[index],
        )

    def for_targets(self, names: Sequence[str]) -> Dataset:
        """Only these targets, in this order.

        Rows that none of them has a label for stay, all NaN.

        Raises
        ------
        UsageError
            A name is not among the targets, or is given twice.
        """
        _check_known(names, self.targets)
        columns = [self.targets.index(name) for name in names]
        return replace(
            self,
            targets=tuple(names),
            quality=self.quality[:, columns],
            cost=self.cost[:, columns],
            output_tokens=self.output_tokens[:, columns],
        )


def load_dataset(
    paths: Sequence[Path],
    *,
    targets: Sequence[str] | None = None,
    ladder: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Read and check labelled rows; several files are joined.

    Parameters
    ----------
    paths : sequence of Path
        JSONL, CSV or Parquet by suffix, ``.gz`` too.
    targets : sequence of str, optional
        The models to keep, in this order; without it all that have a label, in order of appearance (those of
        the ladder in its order). A row without a label for any of them is a bad row.
    ladder : sequence of str, optional
        Models from cheapest to best, for rows that have ``sufficient`` instead of ``quality``: quality 1 from
        the sufficient model up, 0 below.
    skip_bad_rows : bool
        Leave bad rows out and list them in ``Dataset.report`` instead of raising.

    Notes
    -----
    A row without ``id`` gets its file's name and line, one without ``source`` the file's name. ``messages``
    is read rather than ``prompt`` where a row has both, and ``sufficient`` where a row has no quality.

    Raises
    ------
    DatasetError
        A row is bad (all are found, the first few are shown), a file or what is left is empty, all labels are
        equal, or a file is damaged or a pickle.
    UsageError
        A file is missing or of an unknown kind, or no row has a label for one of ``targets``.
    """
    if not paths:
        raise UsageError("no dataset is given")
    _check_unique("target", targets or ())
    _check_unique("ladder", ladder or ())
    rows, bad = _read(paths, ladder)
    known = list(dict.fromkeys([*(ladder or ()), *(name for row in rows for name in row.quality)]))
    known = [name for name in known if any(name in row.quality for row in rows)]
    unlabelled = _UNLABELLED
    if targets is None:
        targets = known
    else:
        unlabelled = f"no label for {' or '.join(targets)}"
        if rows:
            _check_known(targets, known)
    labelled = []
    for row in rows:
        if any(name in row.quality for name in targets):
            labelled.append(row)
        else:
            bad.append(BadRow(row.file, row.line, "quality", unlabelled))
    order = [str(path) for path in paths]
    bad.sort(key=lambda row: (order.index(row.file), row.line))
    if bad and not skip_bad_rows:
        raise DatasetError(f"{_summary(bad)}; --skip-bad-rows trains without")
    where = ", ".join(order)
    if not labelled:
        raise DatasetError(f"{where}: no usable row is left; {_summary(bad)}")
    quality = _matrix([row.quality for row in labelled], targets)
    given = quality[~np.isnan(quality)]
    if np.all(given == given[0]):
        raise DatasetError(
            f"{where}: every quality is {given[0]:g}; there is nothing to learn where all answers are alike"
        )
    taken = Counter(row.file for row in labelled)
    files = tuple(FileReport(str(path), _digest(path), taken[str(path)]) for path in paths)
    digests = [file.digest for file in files]
    return Dataset(
        ids=np.array([row.id for row in labelled], dtype=np.str_),
        sources=np.array([row.source for row in labelled], dtype=np.str_),
        domains=np.array([row.domain for row in labelled], dtype=np.str_),
        groups=_join_groups(labelled),
        prompts=tuple(row.prompt for row in labelled),
        targets=tuple(targets),
        quality=quality,
        cost=_matrix([row.cost for row in labelled], targets),
        output_tokens=_matrix([row.output_tokens for row in labelled], targets),
        digest=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        report=LoadReport(files, tuple(bad), dict(Counter(name for row in labelled for name in row.extra))),
    )


def load_prompts(path: Path) -> list[dict[str, Any]]:
    """Read and check rows that need no labels yet: the JSON shape without the labels, with an id each.

    A row may have a ``reference``: the right answer, a text or a number.

    Raises
    ------
    DatasetError
        A row is bad, or there is none.
    UsageError
        The file is missing or of an unknown kind.
    """
    rows: dict[str, dict[str, Any]] = {}
    bad: list[BadRow] = []
    (label,) = _labels([path])
    for record in read_records(path):
        try:
            row = _parse(record, path, label, ladder=None)
            if row.id in rows:
                raise _Bad("id", f"{row.id!r} appears twice; ids must be unique")
            fields = _fields_of(record, path)
            reference = _reference(fields)
        except _Bad as problem:
            bad.append(BadRow(str(path), record.line, problem.field, problem.what))
            continue
        kept = ("messages", "tools") if fields.get("messages") is not None else ("prompt",)
        rows[row.id] = {
            "id": row.id,
            **{name: fields[name] for name in kept if fields.get(name) is not None},
            "source": row.source,
            **{name: value for name, value in (("domain", row.domain), ("group", row.group)) if value},
            **reference,
        }
    if bad:
        raise DatasetError(_summary(bad))
    if not rows:
        raise DatasetError(f"{path}: has no rows")
    return list(rows.values())


def write_dataset(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write rows of the format's JSON shape, as JSONL, CSV or Parquet by suffix, and return how many.

    The file appears complete or not at all.
    """
    if file_format(path) == "jsonl":
        return write_records(rows, path)
    return write_records(_in_order([_flat(row) for row in rows]), path)


def row_problem(row: Mapping[str, Any]) -> str:
    """Why a row of the format's JSON shape cannot be used, as ``field: what``; empty where it can."""
    try:
        if not _parse_fields(row, ladder=None).quality:
            return f"quality: {_UNLABELLED}"
    except _Bad as problem:
        return f"{problem.field}: {problem.what}"
    return ""


def estimated_tokens(text: str) -> int:
    """Tokens of a text where nobody counted them: a quarter of its characters, rounded up."""
    return -(-len(text) // CHARACTERS_A_TOKEN)


def split_folds(groups: ArrayLike, folds: int, seed: int) -> Ints:
    """Deal whole groups out to folds of nearly equal size.

    Parameters
    ----------
    groups : array_like of str, shape (n,)
    folds : int
        At least 2, and at most the number of groups.
    seed : int
        Of the shuffle. The same groups and seed give the same folds, in whatever order the rows stand.

    Returns
    -------
    ndarray of int, shape (n,)
        0 to ``folds`` − 1.
    """
    names, member, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if folds < 2:
        raise UsageError(f"{folds} folds: at least 2 are needed")
    if len(names) < folds:
        raise UsageError(f"{len(names)} groups of prompts cannot make {folds} folds")
    shuffled = np.random.default_rng(seed).permutation(len(names))
    # Largest first into the emptiest fold; among equals the shuffle decides.
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    emptiest = [(0, fold) for fold in range(folds)]
    fold_of = np.empty(len(names), dtype=np.int64)
    for group in order:
        size, fold = emptiest[0]
        fold_of[group] = fold
        heapq.heapreplace(emptiest, (size + int(sizes[group]), fold))
    return fold_of[member]


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    source: str
    domain: str
    group: str
    prompt: Prompt
    quality: Mapping[str, float]
    cost: Mapping[str, float]
    output_tokens: Mapping[str, float]
    extra: tuple[str, ...]
    file: str = ""
    line: int = 0


def _read(paths: Sequence[Path], ladder: Sequence[str] | None) -> tuple[list[_Row], list[BadRow]]:
    """The rows of all files, and those that cannot be used."""
    rows: list[_Row] = []
    bad: list[BadRow] = []
    first_use: dict[str, str] = {}  # id → where it stands
    for path, label in zip(paths, _labels(paths), strict=True):
        records = 0
        for record in read_records(path):
            records += 1
            try:
                row = _parse(record, path, label, ladder)
                if row.id in first_use:
                    raise _Bad("id", f"{row.id!r} is also at {first_use[row.id]}; ids must be unique")
            except _Bad as problem:
                bad.append(BadRow(str(path), record.line, problem.field, problem.what))
                continue
            first_use[row.id] = f"{path}:{record.line}"
            rows.append(row)
        if records == 0:
            raise DatasetError(f"{path}: has no rows")
    return rows, bad


class _Bad(Exception):
    def __init__(self, field: str, what: str) -> None:
        super().__init__(field, what)
        self.field = field
        self.what = what


def _parse(record: Record, path: Path, label: str, ladder: Sequence[str] | None) -> _Row:
    row = _parse_fields(_fields_of(record, path), ladder)
    return replace(
        row,
        id=row.id or f"{label}:{record.line}",
        source=row.source or label,
        file=str(path),
        line=record.line,
    )


def _fields_of(record: Record, path: Path) -> Mapping[str, Any]:
    """The fields of a row as JSON would have them."""
    if record.problem:
        raise _Bad("", record.problem)
    kind = file_format(path)
    return record.fields if kind == "jsonl" else _from_cells(record.fields, textual=kind == "csv")


def _parse_fields(fields: Mapping[str, Any], ladder: Sequence[str] | None) -> _Row:
    quality = _per_model(fields, "quality", highest=1.0)
    if not quality and fields.get("sufficient") is not None:
        quality = _from_ladder(fields["sufficient"], ladder)
    return _Row(
        id=_word(fields, "id"),
        source=_word(fields, "source"),
        domain=_word(fields, "domain"),
        group=_word(fields, "group"),
        prompt=_prompt(fields),
        quality=quality,
        cost=_per_model(fields, "cost"),
        output_tokens=_per_model(fields, "output_tokens"),
        extra=tuple(n for n in fields if n not in _FIELDS and n.partition(".")[0] not in _PER_MODEL),
    )


def _reference(fields: Mapping[str, Any]) -> dict[str, str]:
    """The reference answer of a row that has one."""
    value = fields.get("reference")
    if value is None or value == "":
        return {}
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Bad("reference", f"must be a text or a number, got {_shown(value)}")
    return {"reference": str(value)}


def _labels(paths: Sequence[Path]) -> list[str]:
    """A name for each file: the shortest that tells them apart."""
    stems = [re.sub(r"(\.\w+?)(\.gz)?$", "", path.name, flags=re.IGNORECASE) or path.name for path in paths]
    below = [f"{path.resolve().parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    names = (stems, below, [str(path) for path in paths])
    return next((labels for labels in names if len(set(labels)) == len(labels)), names[-1])


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    if fields.get("messages") is not None:
        _check_messages(fields["messages"])
        tools = fields.get("tools")
        if not (tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))):
            raise _Bad("tools", "must be a list of objects")
        name, prompt = "messages", prompt_from_messages(fields["messages"], tools)
    else:
        name, text = "prompt", fields.get("prompt")
        if text is None:
            found = ", ".join(list(fields)[:8])
            raise _Bad(name, "is null" if name in fields else f"is missing; found {found or 'no field'}")
        if not isinstance(text, str):
            raise _Bad(name, f"must be text, is {_shown(text)}")
        prompt = prompt_from_text(text)
    if not prompt.text.strip():
        raise _Bad(name, "is empty" if name == "prompt" else "hold no text")
    try:
        prompt.text.encode()
    except UnicodeEncodeError:
        raise _Bad(name, "holds half of a surrogate pair, which is not Unicode text") from None
    return prompt


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _Bad("messages", "must be a list with at least one message")
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Bad(name, "must be an object with a role")
        if not isinstance(message.get("content"), str | list | None):
            raise _Bad(f"{name}.content", "must be text, a list of parts, or null")
        if not isinstance(message.get("tool_calls"), list | None):
            raise _Bad(f"{name}.tool_calls", "must be a list")


def _per_model(fields: Mapping[str, Any], name: str, highest: float = math.inf) -> dict[str, float]:
    """Numbers by model, from the nested and the flat form; null is no number, and not zero."""
    nested = fields.get(name)
    if not isinstance(nested, dict | None):
        raise _Bad(name, f"must be an object with a number a model (in CSV: columns {name}.<model>)")
    prefix = f"{name}."
    flat = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    values = {}
    for model, value in {**(nested or {}), **flat}.items():
        if value is None:
            continue
        if not model:
            raise _Bad(name, "a number has no model's name")
        where = f"{name}.{model}"
        if isinstance(value, bool):
            raise _Bad(where, f"is the boolean {str(value).lower()}; write {int(value)}")
        if not isinstance(value, int | float) or math.isnan(value):
            raise _Bad(where, f"{_shown(value)} is not a number")
        if not 0 <= value <= highest or math.isinf(value):
            raise _Bad(where, f"{_shown(value)} is not {'between 0 and 1' if highest == 1 else '0 or more'}")
        values[model] = float(value)
    return values


def _from_ladder(sufficient: Any, ladder: Sequence[str] | None) -> dict[str, float]:
    if not ladder:
        raise _Bad("sufficient", "needs the ladder of models it is of (--ladder low,mid,high)")
    if sufficient not in ladder:
        raise _Bad("sufficient", f"{_shown(sufficient)} is not on the ladder {','.join(ladder)}")
    lowest = ladder.index(sufficient)
    return {name: float(step >= lowest) for step, name in enumerate(ladder)}


def _word(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Bad(name, f"must be text, is {_shown(value)}")
    return str(value)


def _from_cells(cells: Mapping[str, Any], *, textual: bool) -> dict[str, Any]:
    """A flat row as JSON would have it; what does not parse as a number is left for the checks to name.

    ``textual``: numbers are text, as in CSV. Messages and tools are JSON in a cell, in Parquet perhaps lists.
    """
    fields = dict(cells)
    for name, cell in cells.items():
        if not isinstance(cell, str):
            continue
        if name in ("messages", "tools"):
            try:
                fields[name] = json.loads(cell)
            except (ValueError, RecursionError):
                raise _Bad(name, "malformed JSON in the cell") from None
        elif textual and name.partition(".")[0] in _PER_MODEL:
            word = cell.strip().lower()
            try:
                fields[name] = word == "true" if word in ("true", "false") else float(word)
            except ValueError:
                continue
    return fields


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _PER_MODEL and isinstance(value, Mapping):
            flat.update({f"{name}.{model}": number for model, number in value.items() if number is not None})
        elif name in ("messages", "tools") and value is not None:
            flat[name] = json.dumps(value, ensure_ascii=False)
        elif value is not None:
            flat[name] = value
    return flat


def _in_order(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows with their columns in the format's order, whichever row has a column first."""
    names = dict.fromkeys(name for row in rows for name in row)

    def place(name: str) -> int:
        head = name.partition(".")[0]
        return _FIELDS.index(head) if head in _FIELDS else len(_FIELDS)

    columns = sorted(names, key=place)
    for row in rows:
        yield {name: row.get(name) for name in columns}


def _join_groups(rows: Sequence[_Row]) -> Strings:
    """One group for rows that share a ``group`` or a prompt, directly or through others (union-find)."""
    parent = list(range(len(rows)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[int | str, int] = {}  # hash of the prompt or name of the group → the first row with it
    for index, (row, prompt) in enumerate(zip(rows, prompt_hashes(row.prompt for row in rows), strict=True)):
        keys: list[int | str] = [int(prompt), row.group] if row.group else [int(prompt)]
        for key in keys:
            a, b = root(first.setdefault(key, index)), root(index)
            parent[max(a, b)] = min(a, b)  # the first row stays the root and names the group
    return np.array([rows[root(index)].id for index in range(len(rows))], dtype=np.str_)


def _matrix(values: Sequence[Mapping[str, float]], targets: Sequence[str]) -> Floats:
    return np.array([[row.get(name, np.nan) for name in targets] for row in values], dtype=np.float64)


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    _check_unique("target", names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"unknown model {', '.join(unknown)}; the dataset has labels for {', '.join(known) or 'none'}"
        )


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"{what}: a model is named twice in {','.join(names)}")


def _summary(bad: Sequence[BadRow]) -> str:
    shown = "; ".join(map(str, bad[:_SHOWN]))
    if len(bad) <= 1:
        return shown
    rest = "; …" if len(bad) > _SHOWN else ""
    return f"{shown}{rest} ({len(bad)} bad rows in all)"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
