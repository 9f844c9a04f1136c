"""Which prompts are unlike the training prompts: what novelty is measured by, and the cut of the flag.

Of rows like those of training at most ``FLAGGED`` are flagged. The cut is a split-conformal quantile of rows that were
measured by arrays which had not seen them (conformal outlier detection: Bates et al. 2023, arXiv 2104.08279), and it is the
highest of the quantiles of the sources: a rare source is held to the same share as a common one (Mondrian conformal
prediction, Vovk et al. 2003). Against rows of another kind it promises nothing; how many it catches is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.features import Features
from router.predictor import Array, Arrays, project, standard_dense
from training.dataset import split_folds

Floats = NDArray[np.float64]

# The share of rows like those of training that may be flagged.
FLAGGED = 0.05
# How far the correlations of the dense features are drawn to none, and their least standard deviation: they are shares
# and logarithms.
SHRINKAGE = 0.1
LEAST_SPREAD = 0.05
# A source with fewer rows has no quantile of its own: of 19 rows none is beyond the 95 % quantile but the largest.
MINIMUM_ROWS = 60


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


def fit_distances(features: Features, weight: Floats, arrays: Arrays) -> dict[str, Array]:
    """What distances from the training prompts are measured by, in the embedding and in the dense features.

    Parameters
    ----------
    features : Features of n prompts
    weight : ndarray, shape (n,)
        How much each row counts.
    arrays : mapping
        The projection.
    """
    axes = project(features.embedding, arrays).astype(np.float64)
    square = ((features.embedding - arrays["projection.mean"]).astype(np.float64) ** 2).sum(axis=1)
    variance = np.average(axes**2, axis=0, weights=weight)
    n, dimension = features.embedding.shape
    whole = max(float(np.average(square, weights=weight)), 1e-12)
    mean_variance = whole / dimension
    rest = (whole - float(variance.sum())) / max(dimension - axes.shape[1], 1)
    # Few rows overstate the variance of the leading axes and understate all others, so variances are drawn to their mean
    # (as Ledoit and Wolf 2004 do), the more the fewer the rows are beside the dimensions.
    drawn = dimension / (n + dimension)

    mean = np.average(features.dense, axis=0, weights=weight)
    spread = np.sqrt(np.average((features.dense - mean) ** 2, axis=0, weights=weight))
    fitted: dict[str, Array] = {
        "novelty.variance": (variance + drawn * (mean_variance - variance)).astype(np.float32),
        "novelty.rest": np.array(rest + drawn * (mean_variance - rest), dtype=np.float32),
        "novelty.dense_mean": mean.astype(np.float32),
        # A feature that never varied is a strong sign once it does, but not an infinite one.
        "novelty.dense_scale": np.maximum(spread, LEAST_SPREAD).astype(np.float32),
    }
    dense = standard_dense(features, fitted)
    covariance = (dense * weight[:, None]).T @ dense / weight.sum()
    shrunk = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(covariance))
    return fitted | {"novelty.dense_precision": np.linalg.inv(shrunk)}


def fit_cut(signs: Floats, sources: NDArray[Any]) -> dict[str, Array]:
    """How signs of novelty are added up, and from what sum on a prompt is flagged.

    Parameters
    ----------
    signs : ndarray, shape (n, signs)
        Of rows that the arrays which measured them had not seen.
    sources : ndarray, shape (n,)
    """
    mean, scale = signs.mean(axis=0), signs.std(axis=0)
    scale[scale < 1e-12] = np.inf  # a sign that is the same for all says nothing
    total = ((signs - mean) / scale).sum(axis=1)
    # Novelty is given in units of the cut, which must be above the mean.
    cut = max(conformal_cut(total, sources), 1e-6)
    return {"novelty.mean": mean, "novelty.scale": scale, "novelty.cut": np.array(cut)}


def conformal_cut(total: Floats, sources: NDArray[Any], flagged: float = FLAGGED) -> float:
    """The value that at most a share ``flagged`` of new rows of any source is over: the ⌈(n + 1)(1 − flagged)⌉-th smallest.

    Sources of under ``MINIMUM_ROWS`` rows share a quantile with all rows.
    """
    names, counts = np.unique(sources, return_counts=True)
    sets = [total, *(total[sources == name] for name in names[counts >= MINIMUM_ROWS])]
    return max(_quantile(values, flagged) for values in sets)


def _quantile(values: Floats, flagged: float) -> float:
    rank = math.ceil((len(values) + 1) * (1.0 - flagged))
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def cross_validated(
    signs: Floats, sources: NDArray[Any], groups: NDArray[Any], *, folds: int = 5, seed: int = 0
) -> NoveltyFigures:
    """The share of rows that is flagged where the cut comes from the other folds."""
    fold = split_folds(groups, min(folds, len(np.unique(groups))), seed)
    flagged = np.zeros(len(signs), dtype=bool)
    for k in np.unique(fold):
        arrays = fit_cut(signs[fold != k], sources[fold != k])
        total = ((signs[fold == k] - arrays["novelty.mean"]) / arrays["novelty.scale"]).sum(axis=1)
        flagged[fold == k] = total > arrays["novelty.cut"]
    names = np.unique(sources)
    return NoveltyFigures(
        float(flagged.mean()), {str(name): float(flagged[sources == name].mean()) for name in names}
    )
