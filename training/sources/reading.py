"""What every reader of a public format gives, and how it gets at its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.errors import DatasetError, UsageError
from training.records import read_records

# A row of the dataset's JSON shape.
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """The rows of a source.

    Attributes
    ----------
    rows : tuple of dict
        In the dataset's JSON shape.
    left_out : mapping of str to int
        Why rows were left out, and how many.
    notes : tuple of str
        What a reader of the report should know beside that.
    """

    rows: tuple[Row, ...]
    left_out: Mapping[str, int] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()


Reader = Callable[[Path], Reading]


def files_of(path: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder that match, in order of their names.

    Raises
    ------
    UsageError
        There is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    found = sorted(file for file in path.rglob(pattern) if file.is_file())
    if not found:
        raise UsageError(f"{path}: no file {pattern} in this folder")
    return found


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line and fields of each row of a JSONL, CSV or Parquet file, or of a ``.json`` file that holds a list.

    Raises
    ------
    DatasetError
        A row cannot be read: a public original that is damaged is not to be trained on.
    """
    if path.suffix.lower() == ".json":
        yield from enumerate(_json_list(path), start=1)
        return
    for record in read_records(path):
        if record.problem:
            raise DatasetError(f"{path}:{record.line}: {record.problem}")
        yield record.line, record.fields


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises :class:`DatasetError` where it is not one."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DatasetError(f"{path}: malformed JSON") from None


def required(fields: Mapping[str, Any], name: str, path: Path, line: int) -> Any:
    """A field that the format has in every row; where it is missing, the error names those that are there."""
    if name not in fields:
        raise DatasetError(f"{path}:{line}: {name}: is missing; found {', '.join(map(str, fields))}")
    return fields[name]


def number(value: Any, name: str, path: Path, line: int) -> float:
    """A number, from JSON or from a cell; true and false are 1 and 0."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DatasetError(f"{path}:{line}: {name}: {str(value)[:40]!r} is not a number") from None


def _json_list(path: Path) -> Iterator[Row]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{path}: must be a list of objects")
    yield from rows
