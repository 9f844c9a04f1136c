"""Rows of a file, whatever its format: JSONL, CSV or Parquet by suffix, plain or ``.gz``.

Nothing here knows what a row means; :mod:`training.dataset` and :mod:`training.sources` do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from router.errors import DatasetError, UsageError

Format = Literal["jsonl", "csv", "parquet"]
_FORMATS: Mapping[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
Output = IO[bytes] | gzip.GzipFile

_PICKLES = (".pkl", ".pickle", ".joblib")
# Protocols 2 and later open with this; 0 and 1 are text and fail as malformed rows.
_PICKLE_MAGIC = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
# The csv module stops at 131,072 characters a field; prompts are longer than that.
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read.

    Attributes
    ----------
    line : int
        Where the row starts, from 1; for Parquet the row's number.
    fields : dict
        By name. CSV cells are strings, and empty cells are left out; in Parquet nulls are left out.
    problem : str
        Why the row could not be read; empty where it was.
    """

    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def file_format(path: Path) -> Format:
    """The format by suffix; UsageError for one that is not known, DatasetError for a pickle."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _PICKLES:
        raise DatasetError(_refusal(path))
    if suffix not in _FORMATS:
        raise UsageError(f"{path}: suffix {suffix or '(none)'} is not one of {', '.join(_FORMATS)} (.gz too)")
    return _FORMATS[suffix]


def read_records(path: Path) -> Iterator[Record]:
    """Yield the rows of ``path``; one that cannot be read is a record with a ``problem`` and reading goes on.

    Raises
    ------
    UsageError
        The file is not there, or its suffix is not known.
    DatasetError
        The file as a whole cannot be read, or is a pickle.
    """
    if not path.is_file():
        raise UsageError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'no such file'}")
    readers = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    reader = readers[file_format(path)]
    try:
        with _open(path) as file:
            if file.peek(2)[:2] in _PICKLE_MAGIC:
                raise DatasetError(_refusal(path))
            yield from reader(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from None


def write_records(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write rows in the format of the suffix and return how many; CSV and Parquet want flat ones.

    The file appears complete or not at all. Equal rows give equal bytes, in ``.gz`` too.
    """
    kind = file_format(path)
    writers = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}
    with replacing(path) as file:
        if path.suffix.lower() != ".gz":
            return writers[kind](rows, file)
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            return writers[kind](rows, packed)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)  # mkstemp gives 0600
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _refusal(path: Path) -> str:
    return (
        f"{path}: is a pickle, and reading a pickle can run any code that it holds; "
        "export it as JSONL, CSV or Parquet"
    )


def _open(path: Path) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for line, raw in enumerate(file, start=1):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.rstrip()
        if not raw:
            continue
        try:
            fields = json.loads(raw)
        except json.JSONDecodeError as error:
            yield Record(line, problem=f"malformed JSON at column {error.colno} ({error.msg})")
        except UnicodeDecodeError:
            yield Record(line, problem="is not UTF-8")
        except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
            yield Record(line, problem="malformed JSON")
        else:
            if isinstance(fields, dict):
                yield Record(line, fields)
            else:
                yield Record(line, problem="must be a JSON object")


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            repeated = sorted({name for name in header if header.count(name) > 1})
            raise DatasetError(f"{path}:1: column {', '.join(map(repr, repeated))} appears more than once")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield Record(line, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
            elif cells:
                yield Record(line, problem=f"has {len(cells)} fields where the header has {len(header)}")
            line = reader.line_num + 1
    except UnicodeDecodeError:
        raise DatasetError(f"{path}:{reader.line_num + 1}: is not UTF-8 text") from None
    except csv.Error as error:
        raise DatasetError(f"{path}:{reader.line_num}: malformed CSV ({error})") from None
    finally:
        text.detach()  # the file belongs to the caller


def _read_parquet(path: Path, file: IO[bytes]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # Parquet is read from its end: a gzip stream is unpacked first.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file)
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                row += 1
                yield Record(row, {str(name): value for name, value in fields.items() if value is not None})
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _write_jsonl(rows: Iterable[Mapping[str, Any]], file: Output) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        count += 1
    return count


def _write_csv(rows: Iterable[Mapping[str, Any]], file: Output) -> int:
    rows = list(rows)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text.flush()
    text.detach()
    return len(rows)


def _write_parquet(rows: Iterable[Mapping[str, Any]], file: Output) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = list(rows)
    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return len(rows)


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
