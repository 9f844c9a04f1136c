"""Cost/quality curves and reliability diagrams as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from router.errors import UsageError
from training.metrics import QUALITY_BAR, Calibration, CalibrationFigures, Curve, full_curve, oracle_scores
from training.threshold import ChosenThreshold

XAxis = Literal["calls", "dollars"]

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_BLUE, _GREEN, _VERMILION = "#0072B2", "#009E73", "#D55E00"
_GREY, _LIGHT, _INK = "#767676", "#E3E3E3", "#222222"
_BOX = MappingProxyType(
    {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
)
# A line of more points looks the same and makes a heavy file.
_POINTS = 400


def plot_curve(
    path: Path,
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    chosen: ChosenThreshold | None = None,
    x: XAxis = "calls",
    names: tuple[str, str] | None = None,
    title: str = "",
    seed: int = 0,
) -> None:
    """Draw :func:`curve_figure` into a file, its format told by the suffix: PNG, SVG or PDF.

    Raises
    ------
    UsageError
        The suffix is another one, or the file cannot be written.
    """
    _check_suffix(path)
    figure = curve_figure(
        score,
        weak,
        strong,
        cost_weak=cost_weak,
        cost_strong=cost_strong,
        chosen=chosen,
        x=x,
        names=names,
        title=title,
        seed=seed,
    )
    _save(figure, path)


def plot_reliability(path: Path, calibration: Calibration, *, title: str = "") -> None:
    """Draw :func:`reliability_figure` into a file, its format told by the suffix: PNG, SVG or PDF.

    Raises
    ------
    UsageError
        The suffix is another one, or the file cannot be written.
    """
    _check_suffix(path)
    _save(reliability_figure(calibration, title=title), path)


def reliability_figure(calibration: Calibration, *, title: str = "") -> Figure:
    """Reliability diagrams: observed against predicted, for each quality head and for the gain.

    A point is a bin of equally many rows with its 95 % interval; on the diagonal, predictions can be taken at their word.

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.
    """
    panels = {f"quality of {name}": figures for name, figures in calibration.quality.items()}
    panels["gain"] = calibration.gain
    figure = Figure(figsize=(4.3 * len(panels), 5.2), layout="constrained", facecolor="white")
    for axes, (name, figures) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _reliability(axes, figures)
        axes.set_title(name, fontsize=12, color=_INK, pad=48, parse_math=False)
        axes.set_xlabel(f"predicted {name.split(maxsplit=1)[0]}", fontsize=12, color=_INK)
        axes.set_ylabel(f"observed {name.split(maxsplit=1)[0]}", fontsize=12, color=_INK)
    if title:
        figure.suptitle(title, fontsize=12, color=_INK, parse_math=False)
    return figure


def _reliability(axes: Any, figures: CalibrationFigures) -> None:
    predicted = np.array([part.predicted for part in figures.bins])
    observed = np.array([part.observed for part in figures.bins])
    low = np.array([part.low for part in figures.bins])
    high = np.array([part.high for part in figures.bins])
    ends = np.array([min(predicted.min(), low.min()), max(predicted.max(), high.max())])
    ends += np.array([-0.04, 0.04]) * np.ptp(ends)
    axes.plot(ends, ends, color=_GREY, linestyle=(0, (1, 1.5)), linewidth=2.0, label="as predicted", zorder=1)
    # Wilson's interval always holds the mean; rounding must not make a length negative.
    length = np.maximum([observed - low, high - observed], 0.0)
    axes.errorbar(
        predicted,
        observed,
        yerr=length,
        fmt="o",
        color=_BLUE,
        markersize=6,
        capsize=3,
        label="a bin of rows",
        zorder=3,
    )
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    told = f"ECE {figures.ece:.3f} (by chance {figures.ece_by_chance:.3f})"
    told += f"\nBrier {figures.brier:.3f} (base rate {figures.base_brier:.3f})"
    if np.isfinite(figures.auc):
        told += f"\nAUC {figures.auc:.3f}"
    axes.text(
        0.5, 1.02, told, transform=axes.transAxes, fontsize=10, color=_INK, ha="center", va="bottom"
    )  # above, where it can hide no row
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    axes.tick_params(labelsize=11, colors=_INK)
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a plot is written as {', '.join(SUFFIXES)}")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def curve_figure(
    score: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    cost_weak: ArrayLike | None = None,
    cost_strong: ArrayLike | None = None,
    chosen: ChosenThreshold | None = None,
    x: XAxis = "calls",
    names: tuple[str, str] | None = None,
    title: str = "",
    seed: int = 0,
) -> Figure:
    """Quality against strong calls or dollars: the scores' curve, the oracle's, and random's straight line.

    Parameters
    ----------
    score, weak, strong : array_like, shape (n,)
        Scores, and the qualities of the two targets.
    cost_weak, cost_strong : array_like, shape (n,), optional
        US dollars a request; NaN where unknown.
    chosen : ChosenThreshold, optional
        The point to mark; chosen on the same rows.
    x : {"calls", "dollars"}
        Strong-call share in %, or US dollars per 1,000 requests.
    names : tuple of str, optional
        Of the weak and the strong target, for the line under the title.
    title : str
    seed : int
        Orders equal scores.

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.

    Raises
    ------
    UsageError
        Dollars are asked for and no row has the costs of both targets.
    """
    learned = full_curve(score, weak, strong, cost_weak, cost_strong, seed=seed)
    oracle = full_curve(oracle_scores(weak, strong), weak, strong, cost_weak, cost_strong, seed=seed)
    along = _position(learned, x)
    bar = QUALITY_BAR * learned.quality[-1]

    figure = Figure(figsize=(7.6, 5.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _line(axes, along, learned.quality, label="router", color=_BLUE, linewidth=2.6, zorder=3)
    _line(axes, _position(oracle, x), oracle.quality, label="oracle", color=_GREEN, linestyle=(0, (5, 1.5)))
    ends = np.array([0, -1])
    _line(axes, along[ends], learned.quality[ends], label="random", color=_GREY, linestyle=(0, (1, 1.5)))
    axes.axhline(bar, color=_VERMILION, linewidth=1.2, label=f"{QUALITY_BAR:.0%} of strong's quality")
    axes.plot(along[ends], learned.quality[ends], "o", color=_INK, markersize=6, zorder=4)
    _label(axes, "always weak", (along[0], learned.quality[0]), (10, -4), "left")
    _label(axes, "always strong", (along[-1], learned.quality[-1]), (0, 22), "right")
    if chosen is not None:
        _mark(axes, chosen, learned, x)

    unit = "strong calls (%)" if x == "calls" else "cost (US dollars per 1,000 requests)"
    axes.set_xlabel(unit, fontsize=12, color=_INK)
    axes.set_ylabel("mean quality", fontsize=12, color=_INK)
    axes.tick_params(labelsize=11, colors=_INK)
    axes.grid(color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    # Above the axes: inside, it would cover a curve for one dataset or another.
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=11, handlelength=2.4
    )
    heading = [title] if title else []
    if names is not None and names != ("weak", "strong"):  # those say nothing more
        heading.append(f"weak {names[0]}, strong {names[1]}")
    if heading:
        figure.suptitle("\n".join(heading), fontsize=12, color=_INK, parse_math=False)
    return figure


# The learned router stands out; the others are told apart by colour and dash.
_METHOD_STYLES = MappingProxyType(
    {
        "learned": {"color": _BLUE, "linewidth": 2.6, "zorder": 5},
        "average": {"color": _VERMILION, "linewidth": 1.6},
        "tfidf_logistic": {"color": "#E69F00", "linewidth": 1.3},
        "minilm_knn": {"color": _GREEN, "linewidth": 1.3},
        "clusters": {"color": "#CC79A7", "linewidth": 1.3},
        "matrix_factorisation": {"color": "#56B4E9", "linewidth": 1.3},
        "prompt_length": {"color": _INK, "linewidth": 1.2, "linestyle": (0, (5, 1.5))},
        "prompt_shortness": {"color": _GREY, "linewidth": 1.2, "linestyle": (0, (5, 1.5))},
        "litellm_heuristic_v2": {"color": "#8B0000", "linewidth": 1.2, "linestyle": (0, (3, 1, 1, 1))},
        "litellm_rules": {"color": "#7A5C00", "linewidth": 1.2, "linestyle": (0, (3, 1, 1, 1))},
        "uncommonroute": {"color": "#5E3C99", "linewidth": 1.2, "linestyle": (0, (3, 1, 1, 1))},
        "random": {"color": _GREY, "linewidth": 1.2, "linestyle": (0, (1, 1.5))},
    }
)


def plot_methods(path: Path, panels: Sequence[tuple[str, Mapping[str, NDArray[np.float64]]]]) -> None:
    """Quality against strong calls, a panel a dataset, a line a method with a band of its spread over runs.

    Parameters
    ----------
    path : Path
        PNG, SVG or PDF by suffix.
    panels : sequence of (title, curves)
        A curve is a method's mean quality and its standard deviation at even strong shares, shape (2, points).

    Raises
    ------
    UsageError
        The suffix is another one, or the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a plot is written as {', '.join(SUFFIXES)}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.0 * rows + 0.9), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axes, (title, curves) in zip(grid, panels, strict=False):
        for name, (mean, spread) in curves.items():
            style: dict[str, Any] = {**_METHOD_STYLES.get(name, {"color": _GREY})}
            share = np.linspace(0.0, 100.0, len(mean))
            (line,) = axes.plot(share, mean, label=name, **style)
            lines.setdefault(name, line)
            axes.fill_between(
                share, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0
            )
        strong = next(iter(curves.values()))[0, -1]
        bar = axes.axhline(QUALITY_BAR * strong, color=_LIGHT, linewidth=1.4, zorder=0)
        lines.setdefault(f"{QUALITY_BAR:.0%} of strong's quality", bar)
        axes.set_title(title, fontsize=11, color=_INK, parse_math=False)
        axes.set_xlabel("strong calls (%)", fontsize=10, color=_INK)
        axes.set_ylabel("mean quality", fontsize=10, color=_INK)
        axes.tick_params(labelsize=9, colors=_INK)
        axes.grid(color=_LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside upper center",
        ncols=min(4, 2 * columns),
        frameon=False,
        fontsize=10,
    )
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def _position(curve: Curve, x: XAxis) -> NDArray[np.float64]:
    if x == "calls":
        return 100.0 * curve.share
    if curve.cost is None:
        raise UsageError("a plot over dollars needs the costs of both targets, and no row has them")
    return 1000.0 * curve.cost


def _line(axes: Any, along: NDArray[np.float64], quality: NDArray[np.float64], **style: Any) -> None:
    points = np.unique(np.linspace(0, len(along) - 1, _POINTS).round().astype(int))
    axes.plot(along[points], quality[points], **{"linewidth": 2.0, **style})


def _label(axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], align: str) -> None:
    axes.annotate(
        text,
        at,
        offset,
        textcoords="offset points",
        horizontalalignment=align,
        verticalalignment="top",
        fontsize=11,
        color=_INK,
        zorder=6,
        bbox=_BOX,
        parse_math=False,
    )


def _mark(axes: Any, chosen: ChosenThreshold, curve: Curve, x: XAxis) -> None:
    at = float(np.interp(chosen.strong_share, curve.share, _position(curve, x)))
    quality = float(np.interp(chosen.strong_share, curve.share, curve.quality))
    axes.plot(at, quality, "o", markersize=11, color=_VERMILION, markeredgecolor="white", zorder=5)
    text = f"threshold {chosen.threshold:.3g}\n{chosen.strong_share:.0%} strong calls, quality {quality:.3f}"
    if x == "dollars":
        text += f"\n${at:,.2f} per 1,000 requests" if at >= 1 else f"\n${at:.3g} per 1,000 requests"
    # The corner under the curves is free: the right one where they rise, the left one where they fall.
    rises = curve.quality[-1] >= curve.quality[0]
    axes.annotate(
        text.replace("-", "−"),
        (at, quality),
        (0.98, 0.05) if rises else (0.02, 0.05),
        textcoords="axes fraction",
        horizontalalignment="right" if rises else "left",
        verticalalignment="bottom",
        fontsize=11,
        color=_INK,
        zorder=6,
        bbox=_BOX,
        parse_math=False,
        arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.8, "shrinkB": 6},
    )
