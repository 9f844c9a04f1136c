"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os

# Small fits on a busy machine: a second OpenMP thread waits for a core more than it computes. Read when numpy and
# scikit-learn are loaded, so it stands before they are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledgers import own_schema

from router.bundle import default_encoder_dir
from router.encoder import OnnxEncoder
from router.features import Features
from router.predictor import Predictor, load_predictor

ROOT = Path(__file__).parent.parent
TINY_ROWS = 150


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """The public labelled originals; tests that need them skip where they are not."""
    folder = os.environ.get("ROUTER_BENCH_DATA")
    if not folder:
        pytest.skip("ROUTER_BENCH_DATA is not set: the public labelled data is needed")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"ROUTER_BENCH_DATA={folder} is not a directory")
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Embeddings are cached for the session alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def encoder_dir() -> Path:
    """The encoder that comes along; not to be written to."""
    return default_encoder_dir()


@pytest.fixture(scope="session")
def encoder(encoder_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(encoder_dir)


@pytest.fixture(scope="session")
def sample_rows() -> list[dict[str, Any]]:
    """data/sample.jsonl as it is written."""
    lines = (ROOT / "data" / "sample.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.fixture(scope="session")
def tiny_file(sample_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that the tiny bundle is trained on, as a dataset."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.jsonl"
    write_jsonl(path, sample_rows[:TINY_ROWS])
    return path


@pytest.fixture(scope="session")
def fresh_file(sample_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that the tiny bundle has not seen, as a dataset."""
    path = tmp_path_factory.mktemp("fresh") / "fresh.jsonl"
    write_jsonl(path, sample_rows[TINY_ROWS : TINY_ROWS + 100])
    return path


@pytest.fixture(scope="session")
def tiny_features(tiny_file: Path, encoder: OnnxEncoder) -> Features:
    """Features of the rows of ``tiny_file``."""
    from training.dataset import load_dataset
    from training.train import features_of

    return features_of(load_dataset([tiny_file]), encoder)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_file: Path, tiny_features: Features, encoder: OnnxEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle for the pair weak and strong, trained in a second or two; not to be written to."""
    from training.dataset import load_dataset
    from training.train import fit

    path = tmp_path_factory.mktemp("bundles") / "tiny"
    fit(load_dataset([tiny_file], targets=["weak", "strong"]), tiny_features, encoder, path)
    return path


@pytest.fixture(scope="session")
def tiny_predictor(tiny_bundle: Path) -> Predictor:
    return load_predictor(tiny_bundle)


@pytest.fixture(scope="session")
def ladder_rows(sample_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows labelled with the cheapest of three targets that suffices: low where the sample's weak model did."""

    def sufficient(row: dict[str, Any], i: int) -> str:
        if row["quality"]["weak"] >= 0.5 and i % 8:
            return "low"
        return "mid" if i % 3 else "high"

    return [
        {
            **{name: value for name, value in row.items() if name != "quality"},
            "sufficient": sufficient(row, i),
        }
        for i, row in enumerate(sample_rows[:250])
    ]


@pytest.fixture(scope="session")
def ladder_bundle(
    ladder_rows: list[dict[str, Any]], encoder: OnnxEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle for low, mid and high, trained on the first 150 of these rows; not to be written to."""
    from training.dataset import load_dataset
    from training.train import features_of, fit

    folder = tmp_path_factory.mktemp("ladder")
    write_jsonl(folder / "rows.jsonl", ladder_rows[:TINY_ROWS])
    dataset = load_dataset([folder / "rows.jsonl"], ladder=("low", "mid", "high"))
    fit(dataset, features_of(dataset, encoder), encoder, folder / "bundle", parts=("linear",))
    return folder / "bundle"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def router_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command `router` in this process and a directory of its own: status, standard output, standard error."""
    import router.cli
    from router.logs import configuration

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["router", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            router.cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    yield call
    # `serve` logs to the standard error of its test, which is closed behind it.
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
    for name in configuration("info", "text")["loggers"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def postgres() -> Iterator[str]:
    """A PostgreSQL URL with a schema of its own; tests that need it skip where there is no server."""
    with own_schema() as url:
        yield url


@pytest.fixture
def redis_url() -> str:
    """A Redis URL; tests use keys that nobody else has, and need not take them away: they end by themselves."""
    server = os.environ.get("ROUTER_TEST_REDIS_URL")
    if not server:
        pytest.skip("ROUTER_TEST_REDIS_URL is not set: a Redis server is needed")
    return server


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty ledger's URL, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    return str(request.getfixturevalue("postgres"))


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)
