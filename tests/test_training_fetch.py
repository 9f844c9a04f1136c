"""Downloads against a server on the loopback."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from router.errors import DatasetError, UsageError
from training.fetch import Original, Progress, fetch, fetch_files, known_originals, originals_of
from training.sources import SOURCES, convert

CONTENT = os.urandom(300_000)


@dataclass
class Server:
    url: str
    ranges: list[str | None] = field(default_factory=list)
    cut_at: list[int] = field(default_factory=list)  # answers that break off, and after how many bytes
    plain: bool = False  # knows no ranges
    kind: str = "application/octet-stream"

    def original(self, name: str = "file.bin", sha256: str | None = None) -> Original:
        return Original(
            f"{self.url}/{name}", name, sha256 or hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            if "missing" in self.path:
                self.send_error(404)
                return
            start = int(wanted[len("bytes=") : -1]) if wanted and not state.plain else 0
            if start >= len(CONTENT):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Type", state.kind)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            end = start + state.cut_at.pop(0) if state.cut_at else len(CONTENT)
            self.wfile.write(CONTENT[start:end])
            if end < len(CONTENT):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{listening.server_address[1]}")
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_a_file_arrives_whole_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[Progress] = []
    (file,) = fetch_files([server.original("deep/file.bin")], tmp_path, seen.append)
    assert file.path.read_bytes() == CONTENT
    assert (file.verified, file.downloaded, file.bytes) == (True, True, len(CONTENT))
    assert seen[-1] == Progress("deep/file.bin", 1, 1, len(CONTENT), len(CONTENT))
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_part_is_continued_where_it_ends(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    (file,) = fetch_files([server.original()], tmp_path)
    assert file.path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cut_at = [100_000, 150_000]
    (file,) = fetch_files([server.original()], tmp_path)
    assert file.path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=250000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.plain = True
    (tmp_path / "file.bin.part").write_bytes(b"old" * 1000)
    (file,) = fetch_files([server.original()], tmp_path)
    assert file.path.read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_a_part_that_nothing_follows_is_complete_or_begun_anew(
    server: Server, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / "file.bin.part").write_bytes(part)
    (file,) = fetch_files([server.original()], tmp_path)
    assert file.path.read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"file.bin: is not the recorded original .* expected 000000000000"
    ):
        fetch_files([server.original(sha256="0" * 64)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_and_right_is_not_fetched(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    (file,) = fetch_files([server.original()], tmp_path)
    assert (file.downloaded, server.ranges) == (False, [])
    path.write_bytes(b"edited")
    with pytest.raises(DatasetError, match="remove the file to fetch it anew"):
        fetch_files([server.original()], tmp_path)
    assert path.read_bytes() == b"edited"


def test_an_unknown_hash_is_unverified(server: Server, tmp_path: Path) -> None:
    original = Original(f"{server.url}/file.bin", "file.bin", None)
    (file,) = fetch_files([original], tmp_path)
    assert not file.verified
    assert file.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_a_web_page_is_not_taken_for_the_file(server: Server, tmp_path: Path) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DatasetError, match="a web page came instead of the file"):
        fetch_files([Original(f"{server.url}/file.bin", "file.bin", None)], tmp_path)


def test_without_a_network_the_error_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    files = [server.original("missing.csv"), server.original("other.csv")]
    expected = rf"cannot download {server.url}/missing.csv \(the server answered 404\); .* put the file at "
    with pytest.raises(DatasetError, match=expected + rf"{tmp_path}/missing.csv, and 1 more"):
        fetch_files(files, tmp_path)
    with pytest.raises(DatasetError, match=r"cannot download http://127.0.0.1:9/x \(.*refused"):
        fetch_files([Original("http://127.0.0.1:9/x", "x", None)], tmp_path)


def test_the_folder_must_be_writable(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written"):
        fetch_files([server.original()], tmp_path / "file")


def test_every_source_with_an_original_is_known_and_pinned() -> None:
    assert set(known_originals()) == set(SOURCES) - {"arena"}  # a format of many releases, not one original
    for name in known_originals():
        for original in originals_of(name):
            assert original.url.startswith("https://")
            assert not {"main", "master", "HEAD"} & set(original.url.split("/"))
            assert original.sha256 is None or len(original.sha256) == 64
            assert not Path(original.path).is_absolute()
    with pytest.raises(UsageError, match="unknown original 'arena'; known are routellm-mmlu"):
        fetch("arena", Path())


def test_the_registry_describes_the_files_that_readers_read(
    bench_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "routellm-mmlu": "routellm/mmlu",
        "routellm-gsm8k": "routellm/gsm8k",
        "routellm-mtbench": "routellm/mt_bench",
        "routerbench": "routerbench",
        "alpacaeval": "alpaca_eval",
        "uncommonroute": "uncommonroute",
    }
    monkeypatch.setattr(httpx.Client, "stream", None)  # nothing is to be downloaded
    for name, folder in folders.items():
        report = fetch(name, bench_data / folder)
        assert report.unverified == ()
        assert len(report.files) == len([f for f in (bench_data / folder).rglob("*") if f.is_file()])
    assert convert("routellm-gsm8k", bench_data / "routellm/gsm8k", tmp_path / "x.jsonl").rows == 1_307
