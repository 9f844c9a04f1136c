"""Fit the quality heads: four parts, stacked and calibrated on rows they were not fitted on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router.features import NGRAM_BUCKETS, Features
from router.predictor import (
    PARTS,
    Array,
    Arrays,
    Prediction,
    calibrate,
    kernel,
    kernel_inputs,
    linear_inputs,
    predict,
    predict_part,
    prepare,
    stack,
    tfidf,
    tree_inputs,
    unit_rows,
)
from training.calibration import fit_gain_curve, fit_quality_curve
from training.dataset import split_folds

Floats = NDArray[np.float64]

# What is stacked. The linear part is known as well, for bundles that have it: beside the factors it says little of its own,
# and with it the stack ranks worse everywhere but on GSM8K (EXPERIMENTS.md, section 14).
STACKED = tuple(part for part in PARTS if part != "linear")
PROJECTION_AXES = 64
KNOTS = 6
RIDGE = 1000.0
# The kernel regression's: how many training prompts span it, and its penalty.
CENTRES = 1500
KERNEL_RIDGE = 5.0
# The factorisation's: its rank is at most this, and its penalty, times the square root of the rows.
FACTORS = 16
FACTOR_PENALTY = 0.134
# How far a stacking weight is expected to lie from the common one: its standard deviation, as a share of that one.
STACK_SPREAD = 0.25
INNER_FOLDS = 5


def source_weights(sources: NDArray[Any]) -> Floats:
    """How much each row counts, shape (n,), mean 1: a source counts as the square root of its rows.

    Otherwise the largest source drowns the others: of 15,000 exam questions and 700 everyday prompts a router would learn
    the exam. The square root is the usual compromise between rows and sources (as in multilingual training, Devlin's
    exponent for multilingual BERT being .7 and Arivazhagan et al. 2019, arXiv 1907.05019, going down to .2).
    """
    _, member, count = np.unique(sources, return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(count[member])
    scaled: Floats = weight / weight.mean()
    return scaled


class QualityEstimator:
    """One quality head a target; fitted attributes end in an underscore.

    Parameters
    ----------
    targets : sequence of str
        Cheapest first.
    parts : sequence of str
        Which parts are stacked; ``kernel`` keeps a projection of some training prompts.
    folds : int
        Inner folds, for the rows that weights and calibration are fitted on.
    seed : int

    Attributes
    ----------
    arrays_ : dict of str to ndarray
        All that prediction needs, in storage precision.
    out_of_fold_ : Prediction
        Predictions for the training rows, by parts that had not seen the row. Stacking weights for a row come from the
        other folds; only the two calibration curves have seen it.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        parts: Sequence[str] = STACKED,
        folds: int = INNER_FOLDS,
        seed: int = 0,
    ) -> None:
        self.targets = targets
        self.parts = parts
        self.folds = folds
        self.seed = seed

    def fit(
        self,
        features: Features,
        quality: Floats,
        groups: NDArray[Any],
        weight: Floats | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> QualityEstimator:
        """Fit on n rows.

        Parameters
        ----------
        features : Features of n prompts
        quality : ndarray, shape (n, T)
            0 to 1; NaN where a target has no label.
        groups : ndarray, shape (n,)
            Rows of one group stay in one inner fold.
        weight : ndarray, shape (n,), optional
            How much each row counts; all alike by default.
        progress : callable
            Called once an inner fold, and once for the final fit.
        """
        # On cores that are busy with anything else, a second thread makes the trees and BLAS ten times slower; on free
        # ones it saves a second or two.
        with threadpool_limits(limits=1):
            return self._fit(
                features, quality, groups, np.ones(len(features)) if weight is None else weight, progress
            )

    def _fit(
        self,
        features: Features,
        quality: Floats,
        groups: NDArray[Any],
        weight: Floats,
        progress: Callable[[], None],
    ) -> QualityEstimator:
        fold = split_folds(groups, min(self.folds, len(np.unique(groups))), self.seed)
        raw = np.full((len(self.parts), *quality.shape), np.nan)
        for k in np.unique(fold):
            inside, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            arrays = prepare(
                fit_parts(features.take(inside), quality[inside], self.parts, self.seed, weight[inside])
            )
            rows = features.take(held_out)
            for p, part in enumerate(self.parts):
                raw[p, held_out] = predict_part(part, rows, arrays)
            progress()

        stacked = np.empty_like(quality)
        for k in np.unique(fold):
            held_out = fold == k
            weights = fit_stack(raw[:, ~held_out], quality[~held_out], weight[~held_out])
            stacked[held_out] = stack(raw[:, held_out], weights)
        curves = fit_curves(stacked, quality, weight)
        self.out_of_fold_: Prediction = calibrate(stacked, curves, tuple(self.targets))
        self.arrays_: dict[str, Array] = {
            **fit_parts(features, quality, self.parts, self.seed, weight),
            **fit_stack(raw, quality, weight),
            **curves,
        }
        self._prepared = prepare(self.arrays_)
        progress()
        return self

    def predict(self, features: Features) -> Prediction:
        """Predict for n prompts, by the code that serves."""
        return predict(features, self._prepared, tuple(self.targets), self.parts)


def fit_parts(
    features: Features, quality: Floats, parts: Sequence[str], seed: int, weight: Floats | None = None
) -> dict[str, Array]:
    """The arrays of each part, fitted on the rows given. Targets without a label for a row leave the row out."""
    arrays: dict[str, Array] = fit_projection(features)
    weight = np.ones(len(features)) if weight is None else weight
    for part in parts:
        arrays.update(_FITS[part](features, quality, weight, prepare(arrays), seed))
    return arrays


def fit_stack(raw: Floats, quality: Floats, weight: Floats) -> dict[str, Array]:
    """Weights of the parts: non-negative ridge regression of the observed gains on the parts' gains.

    The ridge draws to equal weights on standardised parts instead of to zero, since on few rows equal weights are hard
    to beat and on many the data speaks. How hard it draws is what Bayes' rule gives for weights that are normally distributed
    around the common one: the variance of the gains that the parts leave, over the variance of a weight. Of single answers,
    right or wrong, little can be foreseen: there it counts as some thousand rows.

    Parameters
    ----------
    raw : ndarray, shape (P, n, T)
        The parts' predictions for rows they were not fitted on.
    quality : ndarray, shape (n, T)
    weight : ndarray, shape (n,)
        How much each row counts.
    """
    from scipy.optimize import nnls

    gain = quality[:, 1:] - quality[:, :1]
    labelled = ~np.isnan(gain)
    observed = gain[labelled]
    counts = np.broadcast_to(weight[:, None], gain.shape)[labelled]
    gains = np.stack([(part[:, 1:] - part[:, :1])[labelled] for part in raw], axis=1)  # (rows, P)
    centred = gains - np.average(gains, axis=0, weights=counts)
    spread = np.sqrt(np.average(centred**2, axis=0, weights=counts))
    spread[spread < 1e-9] = np.inf  # a part that says the same of all gets no weight
    root = np.sqrt(counts)
    z = root[:, None] * centred / spread
    y = root * (observed - np.average(observed, weights=counts))
    together = z.sum(axis=1)
    # Where the parts together show nothing, a little of each is kept: few rows are no proof that there is nothing.
    least = 0.1 * float(np.sqrt((y**2).sum() / counts.sum())) / len(raw)
    equal = max(float(together @ y) / max(float(together @ together), 1e-12), least)
    free = np.linalg.lstsq(z, y, rcond=None)[0]
    noise = np.sqrt(((y - z @ free) ** 2).sum() / counts.sum())
    pull = float(noise) / max(STACK_SPREAD * equal, 1e-12)
    weights, _ = nnls(
        np.vstack([z, pull * np.eye(len(raw))]), np.concatenate([y, np.full(len(raw), pull * equal)])
    )
    if not weights.any():
        weights = np.full(len(raw), equal)
    return {
        "stack.weight": weights / spread,
        "stack.mean": np.average(raw, axis=1, weights=weight),
        "stack.quality": _mean(quality, weight),
    }


def fit_curves(stacked: Floats, quality: Floats, weight: Floats) -> dict[str, Array]:
    """The calibration curves of every target's quality and of its gain over the cheapest."""
    slopes, intercepts, curves = [], [], []
    for t in range(quality.shape[1]):
        known = ~np.isnan(quality[:, t])
        slope, intercept = fit_quality_curve(stacked[known, t], quality[known, t], weight[known])
        slopes.append(slope)
        intercepts.append(intercept)
        if t:
            both = known & ~np.isnan(quality[:, 0])
            curves.append(
                fit_gain_curve(
                    stacked[both, t] - stacked[both, 0], quality[both, t] - quality[both, 0], weight[both]
                )
            )
    longest = max(len(curve.x) for curve in curves)
    return {
        "quality.slope": np.array(slopes),
        "quality.intercept": np.array(intercepts),
        # Rows of one array must be of one length: the last knot is repeated.
        "gain.x": np.stack([np.pad(curve.x, (0, longest - len(curve.x)), "edge") for curve in curves]),
        "gain.y": np.stack([np.pad(curve.y, (0, longest - len(curve.y)), "edge") for curve in curves]),
        "gain.slope": np.array([curve.slope for curve in curves]),
    }


def _mean(quality: Floats, weight: Floats) -> Floats:
    """Mean quality of each target over the rows that have a label for it, shape (T,)."""
    counts = np.where(np.isnan(quality), 0.0, weight[:, None])
    mean: Floats = (np.nan_to_num(quality) * counts).sum(axis=0) / np.maximum(counts.sum(axis=0), 1e-12)
    return mean


def fit_projection(features: Features) -> dict[str, Array]:
    """The leading principal axes of the embeddings."""
    mean = features.embedding.mean(axis=0)
    # The axes of the covariance, in order of falling variance; cheaper than an SVD of all rows.
    centred = (features.embedding - mean).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return {
        "projection.mean": mean.astype(np.float32),
        "projection.axes": vectors[:, ::-1][:, :PROJECTION_AXES].T.astype(np.float16),
    }


def fit_idf(features: Features, rows: int | None = None) -> NDArray[np.float16]:
    """Smoothed inverse document frequency of every bucket, shape (NGRAM_BUCKETS,), as if of ``rows`` prompts."""
    n = len(features) if rows is None else rows
    containing = np.bincount(features.ngrams.bucket, minlength=NGRAM_BUCKETS) * (n / max(len(features), 1))
    idf: NDArray[np.float16] = (np.log((1.0 + n) / (1.0 + containing)) + 1.0).astype(np.float16)
    return idf


def _fit_words(
    features: Features, quality: Floats, weight: Floats, arrays: Arrays, seed: int
) -> dict[str, Array]:
    from scipy.sparse import csr_matrix, vstack
    from sklearn.linear_model import LogisticRegression

    n = len(features)
    grams = features.ngrams
    idf = fit_idf(features)
    values = tfidf(features, idf.astype(np.float32))
    x = csr_matrix((values, grams.bucket, grams.start), shape=(n, NGRAM_BUCKETS))
    coefficients, intercepts = [], []
    for t in range(quality.shape[1]):
        known = np.flatnonzero(~np.isnan(quality[:, t]))
        q = quality[known, t]
        # A fractional quality is a success with weight q and a failure with weight 1 − q.
        successes, failures = known[q > 0], known[q < 1]
        if not len(successes) or not len(failures):
            coefficients.append(np.zeros(NGRAM_BUCKETS))
            intercepts.append(5.0 if len(successes) else -5.0)
            continue
        model = LogisticRegression(solver="liblinear", random_state=seed).fit(
            vstack([x[successes], x[failures]]),
            np.concatenate([np.ones(len(successes)), np.zeros(len(failures))]),
            sample_weight=np.concatenate([weight[successes] * q[q > 0], weight[failures] * (1.0 - q[q < 1])]),
        )
        coefficients.append(model.coef_[0])
        intercepts.append(float(model.intercept_[0]))
    return {
        "words.idf": idf,
        "words.coef": np.stack(coefficients).astype(np.float16),
        "words.intercept": np.array(intercepts),
    }


def _fit_kernel(
    features: Features, quality: Floats, weight: Floats, arrays: Arrays, seed: int
) -> dict[str, Array]:
    """Kernel ridge regression in the span of ``CENTRES`` training prompts (the Nyström method or "subset of regressors";
    Rudi et al. 2015, "Less is more: Nyström computational regularization", arXiv 1507.04717)."""
    mean, scale = _standardisation(features)
    fitted: dict[str, Array] = {"kernel.mean": mean, "kernel.scale": scale}
    x = kernel_inputs(features, {**arrays, **fitted})
    random = np.random.default_rng(seed)
    chosen = random.choice(
        len(x), size=max(1, min(CENTRES, len(x) // 2)), replace=False, p=weight / weight.sum()
    )
    # As they are stored: rounded afterwards, large coefficients of opposite sign would no longer cancel.
    fitted["kernel.centres"] = x[chosen].astype(np.float16)
    centres = fitted["kernel.centres"].astype(np.float32)
    between = kernel(centres, centres).astype(np.float64)
    similar = kernel(x, centres).astype(np.float64)
    labelled = ~np.isnan(quality)
    coefficients, intercepts = np.empty((len(centres), quality.shape[1])), np.empty(quality.shape[1])
    # Targets with labels for the same rows, most often all of them, share the costly system.
    alike = defaultdict(list)
    for t, mask in enumerate(labelled.T):
        alike[mask.tobytes()].append(t)
    for targets in alike.values():
        known = labelled[:, targets[0]]
        counts = weight[known] / weight[known].mean()
        rows, q = similar[known], quality[known][:, targets]
        middle, level = np.average(rows, axis=0, weights=counts), np.average(q, axis=0, weights=counts)
        root = np.sqrt(counts)[:, None]
        rows = root * (rows - middle)
        # A trace of identity: centres that coincide would make the system singular.
        system = rows.T @ rows + KERNEL_RIDGE * between + 1e-6 * np.eye(len(centres))
        coefficients[:, targets] = np.linalg.solve(system, rows.T @ (root * (q - level)))
        intercepts[targets] = level - middle @ coefficients[:, targets]
    fitted["kernel.coef"] = coefficients.astype(np.float32)
    fitted["kernel.intercept"] = intercepts
    return fitted


def _standardisation(features: Features) -> tuple[Array, Array]:
    """Mean and spread of the dense features; one that never varies keeps its scale."""
    scale = features.dense.std(axis=0)
    scale[scale < 1e-6] = 1.0
    return features.dense.mean(axis=0), scale


def _fit_trees(
    features: Features, quality: Floats, weight: Floats, arrays: Arrays, seed: int
) -> dict[str, Array]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x = tree_inputs(features, arrays)
    # Where all rows count alike, no weights: with them scikit-learn finds its bins by a slow weighted percentile each.
    alike = np.ptp(weight) == 0
    feature: list[int] = []
    threshold: list[float] = []
    children: list[tuple[int, int]] = []
    value: list[float] = []
    roots: list[list[int]] = []
    baselines: list[float] = []
    depth = 1
    for t in range(quality.shape[1]):
        known = ~np.isnan(quality[:, t])
        model = HistGradientBoostingRegressor(
            max_iter=60,
            learning_rate=0.05,
            max_leaf_nodes=8,
            min_samples_leaf=40 if known.sum() >= 800 else 10,
            early_stopping=False,
            random_state=seed,
        ).fit(x[known], quality[known, t], sample_weight=None if alike else weight[known])
        baselines.append(float(np.ravel(model._baseline_prediction)[0]))
        roots.append([])
        # scikit-learn has no public access to these nodes; a test holds our evaluation to its predict().
        for (tree,) in model._predictors:
            offset = len(feature)
            roots[-1].append(offset)
            for index, node in enumerate(tree.nodes):
                leaf = bool(node["is_leaf"])
                here = offset + index
                feature.append(0 if leaf else int(node["feature_idx"]))
                threshold.append(np.inf if leaf else float(node["num_threshold"]))
                children.append(
                    (here, here) if leaf else (offset + int(node["left"]), offset + int(node["right"]))
                )
                value.append(float(node["value"]) if leaf else 0.0)
                depth = max(depth, int(node["depth"]))
    most = max(map(len, roots))
    return {
        "trees.feature": np.array(feature, dtype=np.int32),
        "trees.threshold": np.array(threshold),
        "trees.children": np.array(children, dtype=np.int32),
        "trees.value": np.array(value),
        "trees.root": np.array([row + [-1] * (most - len(row)) for row in roots], dtype=np.int32),
        "trees.baseline": np.array(baselines),
        "trees.depth": np.array(depth),
    }


def _fit_linear(
    features: Features, quality: Floats, weight: Floats, arrays: Arrays, seed: int
) -> dict[str, Array]:
    from sklearn.linear_model import Ridge

    mean, scale = _standardisation(features)
    levels = np.linspace(0, 1, KNOTS + 2)[1:-1]
    fitted: dict[str, Array] = {
        "linear.mean": mean,
        "linear.scale": scale,
        "linear.knots": np.quantile((features.dense - mean) / scale, levels, axis=0).T.astype(np.float32),
    }
    x = linear_inputs(features, fitted)
    models = []
    for t in range(quality.shape[1]):
        known = ~np.isnan(quality[:, t])
        ridge = Ridge(alpha=RIDGE, solver="cholesky")
        models.append(ridge.fit(x[known], quality[known, t], sample_weight=weight[known]))
    fitted["linear.coef"] = np.stack([model.coef_ for model in models], axis=1)
    fitted["linear.intercept"] = np.array([model.intercept_ for model in models])
    return fitted


def _fit_factors(
    features: Features, quality: Floats, weight: Floats, arrays: Arrays, seed: int
) -> dict[str, Array]:
    """Logistic regression whose coefficients, dimensions by targets, are a product of two factors with a ridge on both.

    That draws the coefficients to low rank (it is their nuclear norm: Srebro, Rennie and Jaakkola 2005, "Maximum-margin matrix
    factorization"): the targets share the directions in which prompts are hard, and differ in how much that costs them. So
    the labels of one teach about the others, which with few labels counts most. RouteLLM's matrix factorisation has this
    form (arXiv 2406.18665, §4.2). The noise that a penalty on the nuclear norm must outweigh grows as the square root of the
    rows, and so does the penalty (Negahban and Wainwright 2011, arXiv 0912.5100).
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    x = unit_rows(features.embedding)
    dimension, targets = x.shape[1], quality.shape[1]
    rank = min(FACTORS, targets)
    labelled = ~np.isnan(quality)
    counts = np.where(labelled, weight[:, None], 0.0)
    q = np.where(labelled, quality, 0.0)
    share = np.clip((counts * q).sum(axis=0) / np.maximum(counts.sum(axis=0), 1e-12), 1e-3, 1.0 - 1e-3)
    penalty = FACTOR_PENALTY * float(np.sqrt(weight.sum()))
    start = np.random.default_rng(seed).normal(0.0, 0.1, (dimension + targets, rank))

    def split(flat: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        both = flat[:-targets].reshape(dimension + targets, rank)
        return both, both[:dimension], both[dimension:], flat[-targets:]

    def loss(flat: Floats) -> tuple[float, Floats]:
        both, projection, model, level = split(flat)
        hidden = x @ projection.astype(np.float32)
        logit = hidden @ model.T + level
        error = counts * (expit(logit) - q)
        entropy = float((counts * (np.logaddexp(0.0, logit) - q * logit)).sum())
        gradient = np.concatenate([x.T @ (error @ model).astype(np.float32), error.T @ hidden])
        return (
            entropy + 0.5 * penalty * float((both**2).sum()),
            np.concatenate([(gradient + penalty * both).ravel(), error.sum(axis=0)]),
        )

    found = minimize(
        loss,
        np.concatenate([start.ravel(), np.log(share / (1.0 - share))]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 100},
    ).x
    _, projection, model, level = split(found)
    return {"factors.coef": (projection @ model.T).astype(np.float32), "factors.intercept": level}


_FITS: Mapping[str, Callable[[Features, Floats, Floats, Arrays, int], dict[str, Array]]] = {
    "words": _fit_words,
    "kernel": _fit_kernel,
    "trees": _fit_trees,
    "linear": _fit_linear,
    "factors": _fit_factors,
}
