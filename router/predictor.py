"""Bundle + prompts → qualities and score; numpy only.

The estimator is a stack of parts. Each predicts the quality of every target from features; their predictions
are added with weights found on rows that the parts were not fitted on, and the sums are calibrated:

- ``words``: logistic regression on hashed word 1- and 2-grams, TF-IDF weighted;
- ``kernel``: kernel ridge regression on dense features and a projection of the embedding, at some training prompts;
- ``trees``: gradient-boosted trees on dense features and the leading axes of that projection;
- ``factors``: logistic regression on the embedding, of all targets together: what one teaches about difficulty serves all;
- ``linear``: ridge regression on the embedding and piecewise-linear dense features; of bundles that have it, which are
  fitted no more.

Beside them stands the novelty of a prompt: how unlike the training prompts it is, and so how little the stack knows of it.

What each part needs is arrays named ``<part>.<array>``; this module is the only place that knows how they are used,
and training predicts through it too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.bundle import (
    Bundle,
    Manifest,
    Probe,
    default_bundle_dir,
    default_encoders_dir,
    load_bundle,
)
from router.encoder import Encoder, EncoderConfig, encoder_hash, load_encoder
from router.errors import BundleError, EncoderError
from router.features import FEATURES_VERSION, Features, Prompt, extract

Array = NDArray[Any]
Floats = NDArray[np.float64]
Arrays = Mapping[str, Array]

# Dense features are standardised and held to this many standard deviations: what lies beyond was not seen.
DENSE_LIMIT = 4.0
# For novelty what lies beyond is what counts, but one feature alone must not outweigh all else.
NOVELTY_LIMIT = 10.0
# The embedding's entries are about 1/sqrt(d) in size; scaled by this, a ridge draws them to zero less than dense features.
EMBEDDING_SCALE = 10.0
# In exp(−width · squared distance), on the scales of kernel_inputs.
KERNEL_WIDTH = 0.02
# Axes of the projection that trees split on.
TREE_AXES = 20

# Scores of another processor's int8 kernels differ a little; a wrong tokenizer or pooling differs by far more.
PROBE_SCORE_TOLERANCE = 0.02
PROBE_COSINE = 0.99
PROBE_DIMENSIONS = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a bundle expects of each target, for n prompts.

    Attributes
    ----------
    targets : tuple of str, length T
        Cheapest first.
    quality : ndarray, shape (n, T)
        Calibrated expected quality, 0 to 1.
    gain : ndarray, shape (n, T)
        Calibrated expected gain in quality over the cheapest target; column 0 is zero. Calibrated as a gain, and so not
        exactly the difference of two calibrated qualities.
    novelty : ndarray, shape (n,), or None
        How unlike the training prompts a prompt is: 0 is their mean, and at most 5 % of prompts like them are over 1. None
        where the bundle does not measure it.
    """

    targets: tuple[str, ...]
    quality: Floats
    gain: Floats
    novelty: Floats | None = None

    def take(self, rows: NDArray[Any]) -> Prediction:
        """The prediction of some of the prompts, by index or mask."""
        novelty = None if self.novelty is None else self.novelty[rows]
        return Prediction(self.targets, self.quality[rows], self.gain[rows], novelty)

    @property
    def unfamiliar(self) -> NDArray[np.bool_]:
        """Shape (n,): which prompts are flagged as unlike the training prompts; none where novelty is not measured."""
        if self.novelty is None:
            return np.zeros(len(self.gain), dtype=bool)
        flagged: NDArray[np.bool_] = self.novelty > 1.0
        return flagged

    @property
    def score(self) -> Floats:
        """Shape (n,): the gain of the best other target over the cheapest; negative where the cheapest is best."""
        best: Floats = self.gain[:, 1:].max(axis=1)
        return best

    def choose(self, threshold: float) -> NDArray[np.intp]:
        """Shape (n,): the index of the cheapest target whose gain is within ``threshold`` of the score.

        With two targets this is ``score > threshold`` → 1, else 0. A negative threshold pays for the best other
        target even where it is expected to lose by up to that much.
        """
        # The cheapest is compared as `score > threshold` is, to the bit; subtracting first would round.
        within = self.gain >= self.score[:, None] - threshold
        within[:, 0] = self.score <= threshold
        # Rounding must not leave a row without a choice: the best other target always qualifies.
        best = 1 + self.gain[:, 1:].argmax(axis=1)
        chosen: NDArray[np.intp] = np.where(within.any(axis=1), within.argmax(axis=1), best)
        return chosen

    def choose_by_value(self, cost: ArrayLike, lam: float) -> NDArray[np.intp]:
        """Shape (n,): the index of the target with the highest quality − ``lam`` · cost; of equals the cheapest.

        Parameters
        ----------
        cost : array_like, shape (T,) or (n, T)
            US dollars a request.
        lam : float
            Quality that a dollar must buy, at least 0: at 50, a cent must gain half an answer. At 0 the best target is taken.
        """
        return choose_by_value(self.quality, cost, lam)


def choose_by_value(expected: Floats, cost: ArrayLike, lam: float) -> NDArray[np.intp]:
    """Shape (n,): where expected quality, shape (n, T), less ``lam`` times the cost is highest.

    As :meth:`Prediction.choose_by_value`, for qualities from anywhere. Of equals the first target is taken.
    """
    chosen: NDArray[np.intp] = (expected - lam * np.asarray(cost, dtype=np.float64)).argmax(axis=1)
    return chosen


class Predictor:
    """A loaded bundle with its encoder.

    Safe to call from several threads. Use :func:`load_predictor` to make one from a directory.

    Parameters
    ----------
    bundle : Bundle
    encoder : Encoder
        Must have the hash that the manifest names.

    Raises
    ------
    EncoderError
        The encoder is not the bundle's.
    BundleError
        The bundle does not give for its probes what it gave when it was trained.
    """

    def __init__(self, bundle: Bundle, encoder: Encoder) -> None:
        manifest = bundle.manifest
        if encoder.hash != manifest.encoder.hash:
            raise EncoderError(
                f"bundle {manifest.id} was trained with encoder {manifest.encoder.name} "
                f"{manifest.encoder.hash[:12]}, but the one found is {encoder.hash[:12]}: its weights, tokenizer, "
                "pooling or quantisation differ"
            )
        if manifest.features_version != FEATURES_VERSION:
            raise BundleError(
                f"bundle {manifest.id} was trained on features version {manifest.features_version}, this release "
                f"computes version {FEATURES_VERSION}; train it again"
            )
        self.bundle = bundle
        self.encoder = encoder
        self._arrays = prepare(bundle.arrays)
        self._replay(bundle.probes)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def name(self) -> str:
        """The bundle's name and hash, as decisions record it."""
        return self.manifest.id

    @property
    def targets(self) -> tuple[str, ...]:
        """Cheapest first."""
        return self.manifest.targets

    @property
    def threshold(self) -> float:
        """The bundle's own threshold."""
        return self.manifest.threshold

    @property
    def bars(self) -> dict[float, float]:
        """Share of the best target's quality → the bundle's threshold for it."""
        return self.manifest.bars

    @property
    def knows_steps(self) -> bool:
        """Whether it was trained on requests that end in a tool's result."""
        return self.manifest.knows_steps

    def predict(self, prompts: Sequence[Prompt]) -> Prediction:
        """Predict for n prompts; one call of the encoder a prompt."""
        return self.predict_features(extract(prompts, self.encoder))

    def predict_features(self, features: Features) -> Prediction:
        """Predict from features that were extracted before, with this bundle's encoder."""
        return predict(features, self._arrays, self.targets, self.manifest.parts)

    def _replay(self, probes: Sequence[Probe]) -> None:
        if not probes:
            return
        features = extract([probe.prompt for probe in probes], self.encoder)
        try:
            prediction = self.predict_features(features)
            scores = prediction.score
        except (KeyError, IndexError, ValueError) as error:
            raise BundleError(
                f"bundle {self.name}: its arrays do not fit its manifest ({type(error).__name__}: {error})"
            ) from None
        if prediction.quality.shape[1] != len(self.targets):
            raise BundleError(
                f"bundle {self.name}: it predicts {prediction.quality.shape[1]} targets, its manifest names "
                f"{len(self.targets)}"
            )
        for probe, score, embedding in zip(probes, scores, features.embedding, strict=True):
            expected = np.array(probe.embedding)
            head = embedding[: len(expected)]
            cosine = float(expected @ head / max(np.linalg.norm(expected) * np.linalg.norm(head), 1e-12))
            # Written so that NaN fails too.
            if not (cosine >= PROBE_COSINE and abs(float(score) - probe.score) <= PROBE_SCORE_TOLERANCE):
                raise BundleError(
                    f"bundle {self.name}: a probe scored {score:.4f} instead of {probe.score:.4f} (embedding cosine "
                    f"{cosine:.3f}); tokenizer, pooling or quantisation behave differently here than in training"
                )


def load_predictor(path: Path | None = None, encoders: Path | None = None) -> Predictor:
    """Load a bundle's directory and the encoder it names, and replay its probes.

    Parameters
    ----------
    path : Path, optional
        The bundle; the one that comes along by default.
    encoders : Path, optional
        Where encoders lie; ``encoders/`` beside the bundle and what the project ships by default. An encoder that
        is no directory there is loaded by sentence-transformers under its name.

    Raises
    ------
    BundleError, EncoderError
    """
    path = path or default_bundle_dir()
    bundle = load_bundle(path)
    return Predictor(bundle, _find_encoder(bundle.manifest, path, encoders))


def _find_encoder(manifest: Manifest, path: Path, encoders: Path | None) -> Encoder:
    folders = [encoders] if encoders else [path.parent / "encoders", default_encoders_dir()]
    name = manifest.encoder.name
    nearest: Path | None = None
    for folder in folders:
        for candidate in sorted(folder.glob("*/encoder.json")):
            here = candidate.parent
            try:
                found, called = encoder_hash(here), EncoderConfig.read(candidate).name
            except (OSError, EncoderError):
                continue  # an incomplete directory is not the one we look for
            if found == manifest.encoder.hash:
                return load_encoder(here)
            if called == name and nearest is None:
                nearest = here
    if nearest is not None:
        return load_encoder(nearest)  # the predictor says how it differs
    if "/" in name:  # a sentence-transformers model by path or hub name
        return load_encoder(name)
    raise EncoderError(
        f"bundle {manifest.id} needs encoder {name} ({manifest.encoder.hash[:12]}); it is not in "
        + " or ".join(str(folder) for folder in folders)
    )


def prepare(arrays: Arrays) -> dict[str, Array]:
    """Arrays as they are computed with: half precision is a storage form only, and what every prediction needs is there."""
    ready = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in arrays.items()}
    if "kernel.centres" in ready:
        ready["kernel.squared"] = (ready["kernel.centres"] * ready["kernel.centres"]).sum(axis=1)
    return ready


def predict(features: Features, arrays: Arrays, targets: tuple[str, ...], parts: Sequence[str]) -> Prediction:
    """Stack the parts and calibrate; ``arrays`` as :func:`prepare` gives them."""
    stacked = stack(np.stack([predict_part(part, features, arrays) for part in parts]), arrays)
    prediction = calibrate(stacked, arrays, targets)
    return replace(prediction, novelty=novelty(features, arrays)) if "novelty.cut" in arrays else prediction


def predict_part(part: str, features: Features, arrays: Arrays) -> Floats:
    """What one part alone expects of each target, shape (n, T), uncalibrated."""
    return _PARTS[part](features, arrays)


def stack(qualities: Floats, arrays: Arrays) -> Floats:
    """Shape (P, n, T) → (n, T): the parts' deviations from their means, weighted and added to the mean quality."""
    centred = qualities - arrays["stack.mean"][:, None, :]
    total: Floats = np.tensordot(arrays["stack.weight"], centred, axes=1) + arrays["stack.quality"]
    return total


def calibrate(stacked: Floats, arrays: Arrays, targets: tuple[str, ...]) -> Prediction:
    """Stacked qualities, shape (n, T), → calibrated qualities and gains.

    Qualities pass through a logistic curve each. The gain over the cheapest passes through an increasing
    piecewise-linear curve that continues as a straight line at both ends, so distinct gains stay distinct.
    """
    quality = _sigmoid(stacked * arrays["quality.slope"] + arrays["quality.intercept"])
    gain = np.zeros_like(stacked)
    for t in range(1, stacked.shape[1]):
        raw = stacked[:, t] - stacked[:, 0]
        x, y = arrays["gain.x"][t - 1], arrays["gain.y"][t - 1]
        inside = np.clip(raw, x[0], x[-1])
        gain[:, t] = np.interp(inside, x, y) + arrays["gain.slope"][t - 1] * (raw - inside)
    return Prediction(targets, quality, gain)


def novelty(features: Features, arrays: Arrays) -> Floats:
    """How unlike the training prompts each prompt is, shape (n,): as it is seen from the source it is most like.

    From each source the standardised signs of novelty are added up, on a scale where the source's cut is 1.
    """
    signs = novelty_signs(features, arrays)
    standard = (signs - arrays["novelty.mean"][:, None]) / arrays["novelty.scale"][:, None]
    least: Floats = (standard.sum(axis=2) / arrays["novelty.cut"][:, None]).min(axis=0)
    return least


def novelty_signs(features: Features, arrays: Arrays) -> Floats:
    """Signs that a prompt is unlike those of each source, shape (S, n, 3); (S, n, 2) where the bundle has no words.

    - The squared Mahalanobis distance of its embedding from the source's mean, with the source's variance along each
      axis of the projection and its mean variance along all others (probabilistic PCA, Tipping and Bishop 1999): what the
      projection leaves out is where other kinds of text stand out most.
    - The squared Mahalanobis distance of its dense features: length, layout, state of the conversation.
    - The mean inverse document frequency of its n-grams, in which one that no training prompt has counts most.
    """
    n, kinds = len(features), len(arrays["novelty.rest"])
    signs = np.empty((kinds, n, 3 if "words.idf" in arrays else 2))
    projected = features.embedding @ arrays["projection.axes"].T
    for start in range(0, n, 1024):  # bounds memory at 1024 × sources
        rows = slice(start, start + 1024)
        square = (projected[rows] - arrays["novelty.centre_axes"][:, None]) ** 2  # (S, rows, axes)
        whole = ((features.embedding[rows] - arrays["novelty.centre"][:, None]) ** 2).sum(axis=2)
        # Axes in half precision are not quite of unit length, so a prompt may seem to have less than nothing beside them.
        beside = np.maximum(whole - square.sum(axis=2), 0.0)
        along = (square / arrays["novelty.variance"][:, None]).sum(axis=2)
        signs[:, rows, 0] = along + beside / arrays["novelty.rest"][:, None]
        dense = standard_dense(
            features.dense[rows],
            arrays["novelty.dense_mean"][:, None],
            arrays["novelty.dense_scale"][:, None],
            NOVELTY_LIMIT,
        )
        signs[:, rows, 1] = ((dense @ arrays["novelty.dense_precision"]) * dense).sum(axis=2)
    if "words.idf" in arrays:
        grams = features.ngrams
        lengths = np.diff(grams.start)
        owner = np.repeat(np.arange(n), lengths)
        total = np.bincount(owner, weights=arrays["words.idf"][grams.bucket], minlength=n)
        signs[:, :, 2] = total / np.maximum(lengths, 1)
    return signs


def standard_dense(
    dense: NDArray[np.float32], mean: Array, scale: Array, limit: float = DENSE_LIMIT
) -> NDArray[np.float32]:
    """Dense features in standard deviations, held to ``limit`` of them; shapes broadcast."""
    standard: NDArray[np.float32] = np.clip((dense - mean) / scale, -limit, limit)
    return standard


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(large) is inf, and 1 / inf the right answer
        result: Floats = 1.0 / (1.0 + np.exp(-x))
    return result


def tfidf(features: Features, idf: Array) -> NDArray[np.float32]:
    """Values of the n-grams: (1 + log count) · idf, each row of unit length. Shape (entries,)."""
    grams = features.ngrams
    values: NDArray[np.float32] = ((1.0 + np.log(grams.count)) * idf[grams.bucket]).astype(np.float32)
    for start, end in itertools.pairwise(grams.start.tolist()):
        row = values[start:end]
        row /= math.sqrt(row @ row) or 1.0
    return values


def _words(features: Features, arrays: Arrays) -> Floats:
    values = tfidf(features, arrays["words.idf"])
    coefficients = arrays["words.coef"][:, features.ngrams.bucket]  # (T, entries)
    logits = np.empty((len(features), len(coefficients)))
    # Row by row: for one prompt, which is what a server asks for, each operation on sparse rows costs more than the product.
    for i, (start, end) in enumerate(itertools.pairwise(features.ngrams.start.tolist())):
        logits[i] = coefficients[:, start:end] @ values[start:end]
    return _sigmoid(logits + arrays["words.intercept"])


def project(embedding: NDArray[np.float32], arrays: Arrays) -> NDArray[np.float32]:
    """The embedding on the leading principal axes of the training prompts, shape (n, axes)."""
    axes: NDArray[np.float32] = (embedding - arrays["projection.mean"]) @ arrays["projection.axes"].T
    return axes


def unit_rows(x: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Rows scaled to unit length, so that a product is a cosine; a row of zeros stays one."""
    rows = np.asarray(x, dtype=np.float32)
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def kernel_inputs(features: Features, arrays: Arrays) -> NDArray[np.float32]:
    """What the kernel compares: standardised dense features and the direction of the projected embedding, shape (n, D)."""
    dense = standard_dense(features.dense, arrays["kernel.mean"], arrays["kernel.scale"])
    direction = unit_rows(project(features.embedding, arrays))
    return np.hstack([dense, direction * EMBEDDING_SCALE]).astype(np.float32)


def kernel(
    x: NDArray[np.float32], centres: NDArray[np.float32], centres_squared: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Gaussian kernel between n and m rows, shape (n, m); the squared lengths of the m may be given."""
    if centres_squared is None:
        centres_squared = (centres * centres).sum(axis=1)
    squared = (x * x).sum(axis=1)[:, None] + centres_squared - 2.0 * (x @ centres.T)
    similarity: NDArray[np.float32] = np.exp(-KERNEL_WIDTH * np.maximum(squared, 0.0))
    return similarity


def _kernel(features: Features, arrays: Arrays) -> Floats:
    x, centres = kernel_inputs(features, arrays), arrays["kernel.centres"]
    result = np.empty((len(x), arrays["kernel.coef"].shape[1]))
    squared = arrays.get("kernel.squared")
    for start in range(0, len(x), 4096):  # bounds memory at 4096 × centres
        rows = slice(start, start + 4096)
        result[rows] = kernel(x[rows], centres, squared) @ arrays["kernel.coef"]
    total: Floats = result + arrays["kernel.intercept"]
    return total


def tree_inputs(features: Features, arrays: Arrays) -> Floats:
    """What trees split on: dense features, then the leading axes of the projection."""
    axes = project(features.embedding, arrays)[:, :TREE_AXES]
    return np.hstack([features.dense, axes]).astype(np.float64)


def _trees(features: Features, arrays: Arrays) -> Floats:
    inputs = tree_inputs(features, arrays)
    roots = arrays["trees.root"]  # (T, K), -1 where a target has fewer trees
    result = np.empty((len(inputs), len(roots)))
    for start in range(0, len(inputs), 1024):  # bounds memory at 1024 × nodes
        rows = slice(start, start + 1024)
        result[rows] = np.where(roots >= 0, _leaves(inputs[rows], arrays), 0.0).sum(axis=2)
    total: Floats = result + arrays["trees.baseline"]
    return total


def _leaves(inputs: Floats, arrays: Arrays) -> Floats:
    """The value of the leaf that each row ends at in each tree, shape (n, T, K).

    Every node is asked at once, and then each tree is walked down: a few operations on all nodes take less than many on some.
    """
    children, roots = arrays["trees.children"], arrays["trees.root"]
    goes_right = inputs.take(arrays["trees.feature"], axis=1) > arrays["trees.threshold"]  # (n, nodes)
    row = len(children) * np.arange(len(inputs))[:, None]
    below = row + np.where(goes_right, children[:, 1], children[:, 0])  # in flat positions of (n, nodes)
    node = row + np.maximum(roots, 0).ravel()
    for _ in range(int(arrays["trees.depth"].item())):  # a leaf is its own child
        node = below.take(node)
    leaves: Floats = arrays["trees.value"].take(node - row).reshape(len(inputs), *roots.shape)
    return leaves


def linear_inputs(features: Features, arrays: Arrays) -> Floats:
    """Standardised dense features, their hinges at the knots, and the scaled embedding, shape (n, D)."""
    dense = standard_dense(features.dense, arrays["linear.mean"], arrays["linear.scale"]).astype(np.float64)
    knots = arrays["linear.knots"]
    hinges = np.maximum(dense[:, :, None] - knots, 0.0)
    return np.hstack([dense, hinges.reshape(len(dense), knots.size), features.embedding * EMBEDDING_SCALE])


def _linear(features: Features, arrays: Arrays) -> Floats:
    result: Floats = linear_inputs(features, arrays) @ arrays["linear.coef"] + arrays["linear.intercept"]
    return result


def _factors(features: Features, arrays: Arrays) -> Floats:
    logits = unit_rows(features.embedding) @ arrays["factors.coef"] + arrays["factors.intercept"]
    return _sigmoid(logits.astype(np.float64))


_PARTS: dict[str, Callable[[Features, Arrays], Floats]] = {
    "words": _words,
    "kernel": _kernel,
    "trees": _trees,
    "linear": _linear,
    "factors": _factors,
}
PARTS = tuple(_PARTS)
