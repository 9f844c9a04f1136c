"""Public labelled data → the dataset format: one reader a format, found by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router.errors import DatasetError, UsageError
from training.dataset import row_problem, write_dataset
from training.records import file_format
from training.sources.alpacaeval import read_alpacaeval
from training.sources.arena import read_arena
from training.sources.coderouterbench import read_coderouterbench
from training.sources.reading import Reader, Reading, Row
from training.sources.routellm import read_gsm8k, read_mmlu, read_mtbench
from training.sources.routerbench import read_routerbench
from training.sources.twinrouterbench import read_twinrouterbench
from training.sources.uncommonroute import read_uncommonroute

__all__ = ["SOURCES", "ConvertReport", "Reading", "convert", "read_source"]

SOURCES: Mapping[str, Reader] = {
    "routellm-mmlu": read_mmlu,
    "routellm-gsm8k": read_gsm8k,
    "routellm-mtbench": read_mtbench,
    "routerbench": read_routerbench,
    "alpacaeval": read_alpacaeval,
    "arena": read_arena,
    "uncommonroute": read_uncommonroute,
    "twinrouterbench": read_twinrouterbench,
    "coderouterbench": read_coderouterbench,
}


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What ``convert`` wrote.

    Attributes
    ----------
    source : str
    out : Path
    rows : int
        Written.
    read : int
        Rows of the source: those written and those left out.
    left_out : mapping of str to int
        Why, and how many.
    mean_quality : mapping of str to float
        By target, over the rows that have a label for it.
    notes : tuple of str
    """

    source: str
    out: Path
    rows: int
    read: int
    left_out: Mapping[str, int]
    mean_quality: Mapping[str, float]
    notes: tuple[str, ...] = ()


def read_source(source: str, path: Path) -> Reading:
    """Read a public original; rows that the dataset format does not allow are left out and counted.

    Raises
    ------
    UsageError
        The source is not known, or its files are not there.
    DatasetError
        A file is damaged or not of this format.
    """
    if source not in SOURCES:
        raise UsageError(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    reading = SOURCES[source](path)
    rows, left_out = [], Counter(reading.left_out)
    seen: set[str] = set()
    for row in reading.rows:
        problem = row_problem(row) or ("id: appears twice" if str(row["id"]) in seen else "")
        if problem:
            left_out[problem] += 1
            continue
        seen.add(str(row["id"]))
        rows.append({name: value for name, value in row.items() if value not in (None, "", {})})
    return Reading(tuple(rows), left_out, reading.notes)


def convert(source: str, path: Path, out: Path, rename: Mapping[str, str] | None = None) -> ConvertReport:
    """Write a public original as a dataset, JSONL, CSV or Parquet by the suffix of ``out``.

    Parameters
    ----------
    rename : mapping of str to str, optional
        Model names, old → new. Several may take one name (one tier of many models); rows in which two models
        would then bear the same name are left out.

    Raises
    ------
    UsageError
        The source or a name to be changed is not known, a file is not there, or ``out`` is one that is read.
    DatasetError
        A file is damaged, or no row is left. Nothing is written then.
    """
    file_format(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError(f"{out}: is the original itself; choose another file")
    reading = read_source(source, path)
    rows, left_out = list(reading.rows), Counter(reading.left_out)
    if rename:
        _check_renamed(rename, rows)
        renamed = [_renamed(row, rename) for row in rows]
        left_out["two models of the row take one name"] += sum(row is None for row in renamed)
        rows = [row for row in renamed if row is not None]
    if not rows:
        raise DatasetError(f"{path}: no row is left; left out: {_reasons(+left_out) or 'none, it is empty'}")
    write_dataset(rows, out)
    return ConvertReport(
        source=source,
        out=out,
        rows=len(rows),
        read=len(rows) + left_out.total(),
        left_out=dict(+left_out),
        mean_quality=_mean_quality(rows),
        notes=reading.notes,
    )


def _check_renamed(rename: Mapping[str, str], rows: list[Row]) -> None:
    known = dict.fromkeys(name for row in rows for name in row["quality"])
    unknown = [name for name in rename if name not in known]
    if unknown:
        raise UsageError(f"cannot rename {', '.join(unknown)}; the source has {', '.join(known)}")
    if empty := [name for name, new in rename.items() if not new.strip()]:
        raise UsageError(f"cannot rename {', '.join(empty)} to nothing")


def _renamed(row: Row, rename: Mapping[str, str]) -> Row | None:
    result: dict[str, Any] = dict(row)
    for name in ("quality", "cost", "output_tokens"):
        if name in row:
            result[name] = {rename.get(model, model): value for model, value in row[name].items()}
            if len(result[name]) < len(row[name]):
                return None
    return result


def _mean_quality(rows: list[Row]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row["quality"])
    return {
        name: float(np.mean([r["quality"][name] for r in rows if name in r["quality"]])) for name in names
    }


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())
