"""Calibration of qualities and gains on rows that the estimator was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# How many rows the straight line counts as that the isotonic curve is averaged with.
LINE_ROWS = 500


@dataclass(frozen=True, slots=True)
class GainCurve:
    """An increasing piecewise-linear curve; beyond its ends it goes on with ``slope``.

    Attributes
    ----------
    x, y : ndarray, shape (K,)
    slope : float
    """

    x: Floats
    y: Floats
    slope: float


def fit_gain_curve(raw: Floats, gain: Floats, weight: Floats | None = None, *, bins: int = 50) -> GainCurve:
    """Raw gains → expected gains: centred isotonic regression, without flat parts.

    Isotonic regression is a step function, and steps are ties: every threshold inside one is the same threshold.
    Centred isotonic regression (Oron and Flournoy 2017, doi 10.1080/19466315.2017.1286256) joins the centres of the
    steps by straight lines instead. Rows are first averaged in equal-count bins, so that single outliers at the ends
    make no steps of their own. What comes out is averaged with the straight line of least squares, which counts as
    ``LINE_ROWS`` rows, since the steps of few rows are mostly noise. Where the fit is flat throughout, the curve keeps a
    slope of a thousandth, for ranking is worth something even where the level is not known.

    Parameters
    ----------
    raw : ndarray, shape (n,)
        Stacked, uncalibrated gains.
    gain : ndarray, shape (n,)
        Observed gains, −1 to 1.
    weight : ndarray, shape (n,), optional
        How much each row counts.
    bins : int
        At most; never more than one a 20 rows.
    """
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(raw, kind="stable")
    pieces = np.array_split(order, max(1, min(bins, len(raw) // 20)))
    counts = np.ones(len(raw)) if weight is None else weight
    centre = np.array([np.average(raw[piece], weights=counts[piece]) for piece in pieces])
    level = np.array([np.average(gain[piece], weights=counts[piece]) for piece in pieces])
    size = np.array([counts[piece].sum() for piece in pieces])
    fitted = isotonic_regression(level, sample_weight=size)
    # Rounded: means that differ by the last bit only would make a flat part.
    _, block = np.unique(fitted.round(12), return_inverse=True)
    total = np.bincount(block, weights=size)
    x = np.bincount(block, weights=size * centre) / total
    y = np.bincount(block, weights=size * level) / total
    keep = np.concatenate(([True], np.diff(x) > 1e-9))
    x, y = x[keep], y[keep]
    if len(x) == 1:
        x = np.array([x[0] - 1.0, x[0] + 1.0])
        y = np.array([y[0] - 1e-3, y[0] + 1e-3])
    mean, at = np.average(gain, weights=counts), np.average(raw, weights=counts)
    spread = float(np.average((raw - at) ** 2, weights=counts))
    rise = max(float(np.average((raw - at) * gain, weights=counts)) / max(spread, 1e-12), 1e-3)
    share = len(raw) / (len(raw) + LINE_ROWS)
    y = share * y + (1.0 - share) * (mean + rise * (x - at))
    return GainCurve(x=x, y=y, slope=float((y[-1] - y[0]) / (x[-1] - x[0])))


def fit_quality_curve(raw: Floats, quality: Floats, weight: Floats | None = None) -> tuple[float, float]:
    """Raw qualities → a logistic curve (slope, intercept), by Platt's method with fractional labels.

    Fractional qualities enter as weights: a row of quality q counts q as a success and 1 − q as a failure.
    """
    from sklearn.linear_model import LogisticRegression

    n = len(raw)
    x = np.concatenate([raw, raw])[:, None]
    y = np.concatenate([np.ones(n), np.zeros(n)])
    counts = np.ones(n) if weight is None else weight
    weights = np.concatenate([counts * quality, counts * (1.0 - quality)])
    if min(quality.sum(), n - quality.sum()) < 1e-9:  # all right or all wrong: nothing to bend a curve to
        share = np.clip(quality.mean(), 0.5 / n, 1 - 0.5 / n)
        return 0.0, float(np.log(share / (1 - share)))
    keep = weights > 0
    model = LogisticRegression(C=1e3).fit(x[keep], y[keep], sample_weight=weights[keep])
    return max(float(model.coef_[0, 0]), 0.0), float(model.intercept_[0])
