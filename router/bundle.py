"""The trained artefact: a directory of arrays and JSON, checked before anything in it is used.

Nothing in a bundle can run code: the estimator is arrays in safetensors, the rest is JSON and hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from router.errors import BundleError
from router.features import Prompt, prompt_from_messages, prompt_from_text

# Raise it when a bundle written by this code can no longer be read by the code before, and keep a reader (or a
# clear error) for each older version. 2 added `tool_result_rows`; of a bundle of version 1 it is 0. 3 added `curve`; of
# older bundles it is None.
SCHEMA_VERSION = 3

MANIFEST_FILE = "manifest.json"
ESTIMATOR_FILE = "estimator.safetensors"
SEEN_FILE = "seen.bin"
PROBES_FILE = "probes.jsonl"
CARD_FILE = "card.md"
_HASHED_FILES = (ESTIMATOR_FILE, SEEN_FILE, PROBES_FILE)

# A bundle trained on fewer rows that end in a tool's result does not know what an agent's step needs.
STEP_ROWS = 500
# `thresholds["quality-0.95"]` is the one for 95 % of the best target's quality.
_BAR = "quality-"

# A bundle over this is refused at saving: it is copied, committed and loaded at start.
MAXIMUM_BYTES = 30 * 2**20

_DEFAULT_ENCODER = "all-MiniLM-L6-v2-2-layers-int8"

Array = NDArray[Any]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderReference(_Frozen):
    """The encoder a bundle was trained with."""

    name: str
    hash: str
    dimension: int


class DatasetReference(_Frozen):
    """A dataset a bundle was trained on."""

    name: str
    sha256: str
    rows: int


class Threshold(_Frozen):
    """A threshold and how it was chosen.

    ``strong_share`` and ``quality_ratio`` (routed over always-strong) are those of the rows it was chosen on.
    """

    value: float
    how: str
    rows: int
    strong_share: float | None = None
    quality_ratio: float | None = None


class CostQualityCurve(_Frozen):
    """What thresholds cost and give, on rows that the estimator was not fitted on.

    Attributes
    ----------
    axis : {"strong_share", "relative_cost"}
        What ``spend`` is: the share of calls to strong; of three or more targets, dollars over those of the dearest one.
    rows : int
    thresholds, spend, quality : tuple of float
        A value each a point, at most 101; thresholds fall, ``quality`` is the mean over the rows.
    alone : dict of str to (float, float)
        Target → spend and quality of asking it always. A router without knowledge gets what lies on the straight line
        between the cheapest and the dearest.
    """

    axis: Literal["strong_share", "relative_cost"]
    rows: int
    thresholds: tuple[float, ...] = Field(min_length=2, max_length=101)
    spend: tuple[float, ...]
    quality: tuple[float, ...]
    alone: dict[str, tuple[float, float]]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not len(self.thresholds) == len(self.spend) == len(self.quality):
            raise ValueError("thresholds, spend and quality differ in length")
        return self

    def at(self, threshold: float) -> tuple[float, float]:
        """Spend and quality that a threshold is expected to give: between two points, on the line that joins them."""
        rising = np.array(self.thresholds)[::-1]
        spend, quality = (np.interp(threshold, rising, values[::-1]) for values in (self.spend, self.quality))
        return float(spend), float(quality)


class Manifest(_Frozen):
    """``manifest.json``.

    ``targets`` stand cheapest first. ``thresholds["default"]`` is what is in force where neither the policy nor the
    request says otherwise; ``thresholds["quality-0.95"]`` is for a policy that asks for that share of the best target's
    quality. ``metrics`` are held-out figures by source. ``tool_result_rows`` are the training rows that ended in a tool's
    result. ``curve`` is for people; bundles of before have none.
    """

    schema_version: int
    name: str
    created: str
    targets: tuple[str, ...] = Field(min_length=2)
    encoder: EncoderReference
    features_version: int
    datasets: tuple[DatasetReference, ...]
    seed: int
    versions: dict[str, str]
    parts: tuple[str, ...]
    thresholds: dict[str, Threshold]
    metrics: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    tool_result_rows: int = Field(default=0, ge=0)
    curve: CostQualityCurve | None = None
    files: dict[str, str] = {}

    @field_validator("thresholds")
    @classmethod
    def _check_default(cls, thresholds: dict[str, Threshold]) -> dict[str, Threshold]:
        if "default" not in thresholds:
            raise ValueError('no "default" among them')
        return thresholds

    @property
    def id(self) -> str:
        """Name and the first 8 digits of the estimator's hash; what logs and answers call the bundle."""
        return f"{self.name}@{self.files.get(ESTIMATOR_FILE, '')[:8]}"

    @property
    def threshold(self) -> float:
        """The one in force where neither the policy nor the request says otherwise."""
        return self.thresholds["default"].value

    @property
    def bars(self) -> dict[float, float]:
        """Share of the best target's quality → the threshold that was found for it."""
        bars = {}
        for name, threshold in self.thresholds.items():
            with contextlib.suppress(ValueError):
                if name.startswith(_BAR):
                    bars[float(name.removeprefix(_BAR))] = threshold.value
        return bars

    @property
    def knows_steps(self) -> bool:
        """Whether it was trained on enough rows that end in a tool's result."""
        return self.tool_result_rows >= STEP_ROWS


def quality_bar(quality: float) -> str:
    """The name of the threshold for a share of the best target's quality: ``quality-0.95``."""
    return f"{_BAR}{quality:g}"


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with what the bundle must give for it, replayed at load.

    ``embedding`` is the head of the prompt's embedding, so that an encoder that behaves differently is caught even
    where scores happen to agree.
    """

    row: Mapping[str, Any]
    score: float
    embedding: tuple[float, ...]

    @property
    def prompt(self) -> Prompt:
        """The probe as the classifier reads it."""
        return prompt_of(self.row)


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory.

    Attributes
    ----------
    manifest : Manifest
    arrays : mapping of str to ndarray
        The estimator.
    seen : ndarray of uint64, sorted
        Hashes of the training prompts.
    probes : tuple of Probe
    card : str
        Markdown.
    """

    manifest: Manifest
    arrays: Mapping[str, Array]
    seen: NDArray[np.uint64]
    probes: tuple[Probe, ...]
    card: str

    def has_seen(self, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """Shape (n,): which prompts the bundle was trained on."""
        found: NDArray[np.bool_] = np.isin(prompt_hashes(prompts), self.seen)
        return found


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """A row's ``messages`` (with ``tools``) or ``prompt`` as a prompt."""
    if "messages" in row:
        return prompt_from_messages(row["messages"], row.get("tools"))
    return prompt_from_text(row["prompt"])


def prompt_hashes(prompts: Iterable[Prompt]) -> NDArray[np.uint64]:
    """64 bits a prompt: BLAKE2b over its text with white space folded and case dropped, shape (n,)."""
    return np.array(
        [
            int.from_bytes(
                hashlib.blake2b(
                    " ".join(prompt.text.lower().split()).encode("utf-8", "replace"), digest_size=8
                ).digest(),
                "little",
            )
            for prompt in prompts
        ],
        dtype=np.uint64,
    )


def save_bundle(bundle: Bundle, path: Path) -> Bundle:
    """Write a bundle to ``path``: complete, or not at all. An older bundle there is replaced.

    Returns the bundle with the hashes of its files in the manifest.

    Raises
    ------
    BundleError
        ``path`` holds something that is not a bundle or cannot be written, or the bundle is over ``MAXIMUM_BYTES``.
    """
    check_destination(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _save(bundle, path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror})") from None


def check_destination(path: Path) -> None:
    """Raise :class:`BundleError` where ``path`` holds something that is not a bundle."""
    if path.exists() and not (path / MANIFEST_FILE).is_file():
        raise BundleError(f"{path} exists and is not a bundle; choose another directory")


def _save(bundle: Bundle, path: Path) -> Bundle:
    from safetensors.numpy import save

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        # Not safetensors' save_file, which writes for the owner's eyes alone: a server may run as another user.
        arrays = {name: np.asarray(values, order="C") for name, values in bundle.arrays.items()}
        (new / ESTIMATOR_FILE).write_bytes(save(arrays))
        (new / SEEN_FILE).write_bytes(np.sort(bundle.seen).astype("<u8").tobytes())
        lines = [
            json.dumps(
                {**probe.row, "score": probe.score, "embedding": list(probe.embedding)}, ensure_ascii=False
            )
            for probe in bundle.probes
        ]
        (new / PROBES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (new / CARD_FILE).write_text(bundle.card, encoding="utf-8")
        hashes = {file: _sha256(new / file) for file in _HASHED_FILES}
        manifest = bundle.manifest.model_copy(update={"files": hashes})
        write_manifest(manifest, new)
        size = sum(file.stat().st_size for file in new.iterdir())
        if size > MAXIMUM_BYTES:
            raise BundleError(
                f"the bundle is {size / 2**20:.1f} MB, over {MAXIMUM_BYTES / 2**20:.0f} MB; "
                "train with --no-neighbours, or on fewer rows"
            )
        replaced = path.exists()
        if replaced:
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if replaced:
                old.rename(path)
            raise
    return Bundle(manifest, bundle.arrays, np.sort(bundle.seen), bundle.probes, bundle.card)


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write ``manifest.json`` into a bundle's directory in one step."""
    scratch = path / f".{MANIFEST_FILE}.new"
    try:
        scratch.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        scratch.replace(path / MANIFEST_FILE)
    except OSError as error:
        raise BundleError(f"{path / MANIFEST_FILE}: cannot be written ({error.strerror})") from None


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` of a bundle's directory; raises :class:`BundleError`."""
    file = path / MANIFEST_FILE
    if not path.is_dir():
        raise BundleError(f"{path}: no such bundle directory")
    if not file.is_file():
        raise BundleError(f"{path}: {MANIFEST_FILE} is missing; not a bundle")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = int(raw["schema_version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{file}: not a readable manifest; the file is damaged or not a bundle's") from None
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{file}: schema version {version} is newer than {SCHEMA_VERSION}, which this release reads; upgrade it"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{file}: {where}: {first['msg']}") from None


def load_bundle(path: Path) -> Bundle:
    """Read a bundle; every file is checked against the manifest's hash before it is parsed.

    Raises
    ------
    BundleError
        A file is missing, truncated or changed, or the schema is newer than this release.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    manifest = read_manifest(path)
    contents: dict[str, bytes] = {}
    for file in _HASHED_FILES:
        try:
            contents[file] = (path / file).read_bytes()
        except OSError:
            raise BundleError(f"{path}: {file} is missing") from None
        if hashlib.sha256(contents[file]).hexdigest() != manifest.files.get(file):
            raise BundleError(f"{path / file}: truncated or changed: its hash is not the manifest's")
    try:
        arrays = load(contents[ESTIMATOR_FILE])
        # Not splitlines(), which also splits at line separators inside a prompt.
        rows = [json.loads(line) for line in contents[PROBES_FILE].decode().split("\n") if line]
        probes = tuple(Probe(row, float(row.pop("score")), tuple(row.pop("embedding"))) for row in rows)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: not readable ({error})") from None
    card = path / CARD_FILE
    return Bundle(
        manifest=manifest,
        arrays=arrays,
        seen=np.frombuffer(contents[SEEN_FILE], dtype="<u8").astype(np.uint64),
        probes=probes,
        card=card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "",
    )


def models_dir() -> Path:
    """Where what the project ships lies: in the wheel, or ``models/`` of a checkout."""
    package = Path(__file__).parent
    carried = package / "_models"
    return carried if carried.is_dir() else package.parent / "models"


def default_bundle_dir() -> Path:
    """The bundle that the server starts with where none is named."""
    return models_dir() / "default"


def default_encoders_dir() -> Path:
    """Where encoders that bundles name are looked up."""
    return models_dir() / "encoders"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def default_encoder_dir() -> Path:
    """The encoder that training takes where none is named."""
    return default_encoders_dir() / _DEFAULT_ENCODER
