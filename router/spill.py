"""Where rows wait while the ledger's database is away: a local file that is only appended to, one JSON object a line.

A file belongs to one process, which holds a lock on it; what a process that died left behind, the next one takes over.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SUFFIX = ".spill.jsonl"
REFUSED = "refused.jsonl"

Line = dict[str, Any]


class Spill:
    """The files of one directory; used by one thread.

    Parameters
    ----------
    folder : Path
        On a disk that outlives the process. Made when it is first needed.
    most_bytes : int
        Of this process's file; what goes beyond is not taken.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.lines = 0
        self._most = most_bytes
        self._mine: tuple[Path, int] | None = None  # path, and the descriptor that holds its lock

    def append(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]]) -> bool:
        """Write to the disk before returning; False, and nothing is written, where the file would be too large.

        Raises
        ------
        OSError
            The disk is full, or the directory cannot be written to.
        """
        lines = [{"row": row} for row in rows] + [{"prompt": prompt} for prompt in prompts]
        content = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        descriptor = self._open()
        size = os.fstat(descriptor).st_size
        if size + len(content) > self._most:
            return False
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)  # half a line would take the next one with it
            raise
        self.lines += len(lines)
        return True

    def waiting(self) -> Iterator[Path]:
        """The files to read back: this process's own, and those that no living process holds."""
        if self._mine is not None:
            yield self._mine[0]
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if self._mine is not None and path == self._mine[0]:
                continue
            try:
                descriptor = os.open(path, os.O_RDWR)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, descriptor):
                    yield path
            except BlockingIOError:
                pass  # its process lives, and reads it itself
            finally:
                os.close(descriptor)

    def read(self, path: Path) -> Iterator[tuple[Line, bytes]]:
        """Each line, read and as it stands; a line that was cut off, when its process died, is left out.

        One that cannot be read otherwise comes as an empty object.
        """
        with path.open("rb") as file:
            for content in file:
                if not content.endswith(b"\n"):
                    return
                try:
                    line = json.loads(content)
                except ValueError:
                    line = {}
                yield line if isinstance(line, dict) else {}, content

    def remove(self, path: Path) -> None:
        """Its rows are in the database."""
        path.unlink(missing_ok=True)
        if self._mine is not None and path == self._mine[0]:
            os.close(self._mine[1])
            self._mine = None
            self.lines = 0

    def refuse(self, content: bytes) -> None:
        """Keep aside what the database will not take, for a person to look at."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.folder / REFUSED, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            os.write(descriptor, content.rstrip(b"\n") + b"\n")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the lock; an empty file does not stay."""
        if self._mine is not None:
            path, descriptor = self._mine
            if os.fstat(descriptor).st_size == 0:
                path.unlink(missing_ok=True)
            os.close(descriptor)
            self._mine = None

    def _open(self) -> int:
        while self._mine is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self.folder / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Between the two, another process may have found it, empty and free, and taken it away.
            if _is_still(path, descriptor):
                self._mine = (path, descriptor)
            else:
                os.close(descriptor)
        return self._mine[1]


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
