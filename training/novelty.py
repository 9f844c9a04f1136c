"""Which prompts are unlike the training prompts: what novelty is measured by, and the cut of the flag.

Each source has a distance and a cut of its own, and a prompt is flagged where it is beyond the cut of every source (the
nearest of the classes counts, as in Lee et al. 2018, arXiv 1807.03888). Of rows like those of a source at most ``FLAGGED``
are beyond its own cut, and so flagged: the cut is the conformal quantile of rows of the source that were measured by arrays
which had not seen them (conformal outlier detection: Bates et al. 2023, arXiv 2104.08279; by source: Vovk et al. 2003).
That promise is exact for arrays fixed beforehand; here each fold has its own, and the bundle's have seen all rows, so the
share is measured too. Of rows of another kind nothing is promised; how many are caught is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from router.features import Features
from router.predictor import NOVELTY_LIMIT, Array, Arrays, novelty_signs, prepare, standard_dense
from training.dataset import split_folds
from training.estimator import fit_idf, fit_projection

Floats = NDArray[np.float64]

# The share of rows like those of training that the cuts are drawn for: a fifth less than the 5 % that may be flagged, for
# arrays that differ from fold to fold cost the promise its exactness (drawn for .05, held-out MMLU had 5.1 %, GSM8K 5.7).
FLAGGED = 0.04
# A smaller source shares a distance with the other small ones.
MINIMUM_ROWS = 60
# More sources than these cost more than they tell; the largest are kept apart.
MAXIMUM_SOURCES = 8
# How far correlations of the dense features are drawn to none, and their least standard deviation: they are shares and
# logarithms.
SHRINKAGE = 0.1
LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class NoveltyFigures:
    """How many training rows are flagged by cuts, and measured by arrays, that had not seen them.

    Attributes
    ----------
    flagged : float
        Share of all rows.
    by_source : mapping of str to float
    """

    flagged: float
    by_source: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"flagged": self.flagged, "by_source": dict(self.by_source)}


def fit_novelty(
    features: Features,
    sources: NDArray[Any],
    groups: NDArray[Any],
    arrays: Arrays,
    *,
    folds: int = 5,
    seed: int = 0,
) -> tuple[dict[str, Array], NoveltyFigures]:
    """What novelty is measured by, and how many rows like the training rows it flags.

    Parameters
    ----------
    features : Features of n prompts
    sources : ndarray, shape (n,)
    groups : ndarray, shape (n,)
        Rows of one group stay in one fold.
    arrays : mapping
        The estimator's, prepared: its projection, and the frequencies of words where it has them.
    """
    kinds = kinds_of(sources)
    fold = split_folds(groups, min(folds, len(np.unique(groups))), seed)
    with threadpool_limits(limits=1):
        fitted = fit_distances(features, kinds, arrays)
        held_out = []
        for k in np.unique(fold):
            inside = np.flatnonzero(fold != k)
            rows = features.take(inside)
            found: dict[str, Array] = fit_projection(rows)
            if "words.idf" in arrays:
                # What an unseen n-gram counts grows with the rows: it must be what it is in the bundle.
                found["words.idf"] = fit_idf(rows, len(features))
            measures = prepare(found)
            measures |= fit_distances(rows, kinds[inside], measures, kinds.max() + 1)
            held_out.append(novelty_signs(features.take(np.flatnonzero(fold == k)), measures))
    signs = np.empty((len(held_out[0]), len(features), held_out[0].shape[2]))
    for k, part in zip(np.unique(fold), held_out, strict=True):
        signs[:, fold == k] = part
    return fitted | fit_cuts(signs, kinds), cross_validated(signs, kinds, sources, fold)


def kinds_of(sources: NDArray[Any]) -> NDArray[np.intp]:
    """Which of the distances each row belongs to, shape (n,): its source's, or that of all small sources together."""
    _, member, counts = np.unique(sources, return_inverse=True, return_counts=True)
    by_size = np.argsort(-counts, kind="stable")
    large = [s for s in by_size[:MAXIMUM_SOURCES] if counts[s] >= MINIMUM_ROWS] or [int(by_size[0])]
    kind = np.full(len(counts), len(large))
    kind[large] = np.arange(len(large))
    kinds: NDArray[np.intp] = kind[member]
    # Too few rows for a distance of their own, even together, count with the largest source.
    few = kinds == len(large)
    kinds[few] = 0 if few.sum() < MINIMUM_ROWS else len(large)
    return kinds


def fit_distances(
    features: Features, kinds: NDArray[np.intp], arrays: Arrays, count: int | None = None
) -> dict[str, Array]:
    """What distances from each kind of prompt are measured by, in the embedding and in the dense features.

    Parameters
    ----------
    features : Features of n prompts
    kinds : ndarray, shape (n,)
    arrays : mapping
        The projection.
    count : int, optional
        How many kinds there are, where a kind may be without a row here; it is then measured as all rows are.
    """
    # What never varied in any row says how the rows were gathered: that none had tools makes no request with tools unlike them.
    constant = features.dense.std(axis=0) < 1e-6
    fitted = []
    for kind in range(kinds.max() + 1 if count is None else count):
        rows = np.flatnonzero(kinds == kind)
        chosen = features.take(rows) if len(rows) > 1 else features
        fitted.append(_fit_embedding(chosen, arrays) | _fit_dense(chosen, constant))
    return {name: np.stack([one[name] for one in fitted]).astype(np.float32) for name in fitted[0]}


def _fit_embedding(features: Features, arrays: Arrays) -> dict[str, Array]:
    n, dimension = features.embedding.shape
    centre = features.embedding.mean(axis=0)
    centred = (features.embedding - centre).astype(np.float64)
    variance = ((centred @ arrays["projection.axes"].T) ** 2).mean(axis=0)
    whole = max(float((centred**2).sum(axis=1).mean()), 1e-12)
    rest = (whole - float(variance.sum())) / max(dimension - len(variance), 1)
    # Few rows overstate the variance of the leading axes and understate all others, so variances are drawn to their mean
    # (as Ledoit and Wolf 2004 do), the more the fewer the rows are beside the dimensions.
    drawn = dimension / (n + dimension)
    mean = whole / dimension
    return {
        "novelty.centre": centre,
        "novelty.centre_axes": centre @ arrays["projection.axes"].T,
        "novelty.variance": variance + drawn * (mean - variance),
        "novelty.rest": np.array(max(rest, 0.0) + drawn * (mean - max(rest, 0.0))),
    }


def _fit_dense(features: Features, constant: NDArray[np.bool_]) -> dict[str, Array]:
    mean = features.dense.mean(axis=0)
    # A feature that varies elsewhere but not in these rows is a strong sign once it does, but not an infinite one.
    scale = np.maximum(features.dense.std(axis=0), LEAST_SPREAD)
    scale[constant] = np.inf
    dense = standard_dense(features.dense, mean, scale, NOVELTY_LIMIT).astype(np.float64)
    covariance = dense.T @ dense / len(dense)
    shrunk = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(covariance))
    return {
        "novelty.dense_mean": mean,
        "novelty.dense_scale": scale,
        "novelty.dense_precision": np.linalg.inv(shrunk),
    }


def fit_cuts(signs: Floats, kinds: NDArray[np.intp]) -> dict[str, Array]:
    """How the signs of novelty are added up for each kind, and from what sum on a prompt is beyond it.

    Parameters
    ----------
    signs : ndarray, shape (S, n, signs)
        Of rows that the arrays which measured them had not seen, as seen from each kind.
    kinds : ndarray, shape (n,)
        From 0 to S − 1.
    """
    means, scales, cuts = [], [], []
    for kind, seen in enumerate(signs):
        own = seen[kinds == kind]
        mean, scale = own.mean(axis=0), own.std(axis=0)
        scale[scale < 1e-12] = np.inf  # a sign that is the same for all says nothing
        # Novelty is given in units of the cut, which must be above the mean.
        cuts.append(max(conformal_cut(((own - mean) / scale).sum(axis=1)), 1e-6))
        means.append(mean)
        scales.append(scale)
    return {
        "novelty.mean": np.stack(means),
        "novelty.scale": np.stack(scales),
        "novelty.cut": np.array(cuts),
    }


def conformal_cut(values: Floats, flagged: float = FLAGGED) -> float:
    """What at most a share ``flagged`` of new values is expected to be over: the ⌈(n + 1)(1 − flagged)⌉-th smallest."""
    rank = math.ceil((len(values) + 1) * (1.0 - flagged))
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def cross_validated(
    signs: Floats, kinds: NDArray[np.intp], sources: NDArray[Any], fold: NDArray[Any]
) -> NoveltyFigures:
    """The share of rows that is flagged where the cuts come from the other folds; arguments as of :func:`fit_cuts`."""
    flagged = np.zeros(len(kinds), dtype=bool)
    for k in np.unique(fold):
        inside = fold != k
        # A kind that is in this fold alone has no rows to be judged by.
        known = [kind for kind in range(len(signs)) if (kinds[inside] == kind).any()]
        cuts = fit_cuts(signs[known][:, inside], np.searchsorted(known, kinds[inside]))
        standard = (signs[known][:, ~inside] - cuts["novelty.mean"][:, None]) / cuts["novelty.scale"][:, None]
        flagged[~inside] = (standard.sum(axis=2) > cuts["novelty.cut"][:, None]).all(axis=0)
    return NoveltyFigures(
        float(flagged.mean()),
        {str(name): float(flagged[sources == name].mean()) for name in np.unique(sources)},
    )
