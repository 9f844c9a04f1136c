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
from training.guarantee_study import GuaranteeStudy
from training.ladder import LadderReport
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


def _save(figure: Figure, path: Path, dpi: int = 160) -> None:
    try:
        figure.savefig(path, dpi=dpi)
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


Curves = Mapping[str, NDArray[np.float64]]


def plot_methods(path: Path, panels: Sequence[tuple[str, Curves]]) -> None:
    """Draw :func:`methods_figure` into a file, its format told by the suffix: PNG, SVG or PDF.

    Raises
    ------
    UsageError
        The suffix is another one, or the file cannot be written.
    """
    _check_suffix(path)
    _save(methods_figure(panels), path, dpi=130)


def methods_figure(panels: Sequence[tuple[str, Curves]]) -> Figure:
    """Quality against strong calls, a panel a dataset, a line a method with a band of its spread over runs.

    Parameters
    ----------
    panels : sequence of (title, curves)
        A curve is a method's mean quality and its standard deviation at even strong shares, shape (2, points).

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.

    Raises
    ------
    UsageError
        There are no panels.
    """
    if not panels:
        raise UsageError("there is no curve to draw")
    figure, grid = _panels(len(panels))
    lines: dict[str, Any] = {}
    for axes, (title, curves) in zip(grid, panels, strict=True):
        for name, (mean, spread) in curves.items():
            style = _style(name)
            share = np.linspace(0.0, 100.0, len(mean))
            (line,) = axes.plot(share, mean, label=name, **style)
            lines.setdefault(name, line)
            axes.fill_between(
                share, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0
            )
        strong = next(iter(curves.values()))[0, -1]
        bar = axes.axhline(QUALITY_BAR * strong, color=_LIGHT, linewidth=1.4, zorder=0)
        lines.setdefault(f"{QUALITY_BAR:.0%} of strong's quality", bar)
        _dress(axes, title, "strong calls (%)", "mean quality")
    _legend(figure, lines, len(panels))
    return figure


def few_rows_figure(points: Mapping[str, Sequence[tuple[int, float, float]]], *, title: str = "") -> Figure:
    """APGR against training rows on a logarithmic scale, a line a method.

    Parameters
    ----------
    points : mapping of str to sequence of (rows, APGR, standard deviation over draws)

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.
    """
    figure = Figure(figsize=(7.6, 4.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    lines = {}
    ticks: set[int] = set()
    for name, found in points.items():
        rows, mean, spread = np.array(sorted(found), dtype=np.float64).T
        style = _style(name)
        (lines[name],) = axes.plot(rows, mean, marker="o", markersize=4, **style)
        axes.fill_between(rows, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
        ticks |= {row for row, _, _ in found}
    lines["random"] = axes.axhline(0.5, **_style("random"))
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{row:,}" for row in sorted(ticks)])
    axes.minorticks_off()
    _dress(axes, title, "training rows", "APGR")
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=10)
    return figure


def guarantee_figure(studies: Mapping[str, GuaranteeStudy]) -> Figure:
    """Above, calls saved against the quality that may be lost; below, how often the threshold breaks it: a column a study.

    A band is the standard deviation over splits; breaks are those on the population, which a promise is about.

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.

    Raises
    ------
    UsageError
        There are no studies.
    """
    if not studies:
        raise UsageError("there is no study of promises to draw")
    figure = Figure(figsize=(4.6 * len(studies), 6.4), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(studies), squeeze=False, sharex="col", height_ratios=(3, 2))
    lines: dict[str, Any] = {}
    for (top, bottom), (title, study) in zip(grid.T, studies.items(), strict=True):
        loss = 100.0 * np.array([at.loss for at in study.losses])
        for name, rules, color in (
            ("promised", [at.promised for at in study.losses], _BLUE),
            ("tuned", [at.tuned for at in study.losses], _VERMILION),
        ):
            saving = 100.0 * np.array([of.saving for of in rules])
            spread = 100.0 * np.array([of.saving_sd for of in rules])
            (lines[name],) = top.plot(loss, saving, marker="o", markersize=5, color=color, linewidth=2.0)
            top.fill_between(loss, saving - spread, saving + spread, color=color, alpha=0.15, linewidth=0)
            broken = 100.0 * np.array([of.broken_population for of in rules])
            bottom.plot(loss, broken, marker="o", markersize=5, color=color, linewidth=2.0)
        chance = 100.0 * np.array([at.random_saving for at in study.losses])
        (lines["random"],) = top.plot(loss, chance, marker="o", markersize=4, **_style("random"))
        allowed = 100.0 * (1.0 - study.confidence)
        lines[f"at most {allowed:.3g} % are promised"] = bottom.axhline(
            allowed, color=_INK, linewidth=1.2, linestyle="--"
        )
        bottom.set_ylim(-3.0, 103.0)
        bottom.set_xticks(loss)
        _dress(top, title, "", "strong calls saved (%)")
        _dress(bottom, "", "quality that may be lost (%)", "broken (% of draws)")
    _legend(figure, lines, len(studies))
    return figure


# The routers of a ladder; single targets are points of their own.
_LADDER_STYLES = MappingProxyType(
    {
        "learned": {"color": _BLUE, "linewidth": 2.6, "zorder": 5},
        "learned_value": {"color": "#56B4E9", "linewidth": 2.0, "zorder": 5},
        "knn": {"color": _GREEN, "linewidth": 1.5},
        "clusters": {"color": "#CC79A7", "linewidth": 1.5},
        "pair": {"color": _VERMILION, "linewidth": 1.5},
        "zero": {"color": _GREY, "linewidth": 1.4, "linestyle": (0, (1, 1.5))},
        "oracle": {"color": _INK, "linewidth": 1.4, "linestyle": (0, (5, 1.5))},
    }
)


def ladder_figure(report: LadderReport, *, title: str = "") -> Figure:
    """Quality against cost: the single targets as points, each router as the hull of its settings.

    The random mixes of the targets are the dotted line ``zero``: what needs no look at the prompt.

    Returns
    -------
    Figure
        Bound to no window and to no global state of pyplot.

    Raises
    ------
    UsageError
        The targets' costs are not known.
    """
    if report.mean_cost is None:
        raise UsageError("a plane of cost and quality needs the costs of all targets, and no row has them")
    figure = Figure(figsize=(8.4, 5.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    lines: dict[str, Any] = {}
    for name, style in _LADDER_STYLES.items():
        if name in report.methods and report.methods[name].hull:
            cost, quality = np.array(report.methods[name].hull).T
            look: dict[str, Any] = dict(style)
            # Between its corners a hull is straight in dollars, which a logarithmic axis bends.
            along = np.geomspace(cost[0], cost[-1], _POINTS) if cost[0] > 0.0 else cost
            (lines[name],) = axes.plot(1000.0 * along, np.interp(along, cost, quality), **look)
    costs = 1000.0 * np.array(report.mean_cost)
    (lines["one target"],) = axes.plot(costs, report.mean_quality, "o", color=_INK, markersize=6, zorder=6)
    best = report.targets.index(report.best_single)
    bar = axes.axhline(QUALITY_BAR * report.mean_quality[best], color=_LIGHT, linewidth=1.6, zorder=0)
    lines[f"{QUALITY_BAR:.0%} of the best target's quality"] = bar
    axes.set_xscale("log")
    for target, cost, quality in zip(report.targets, costs, report.mean_quality, strict=True):
        axes.annotate(
            target.split("/")[-1],
            (cost, quality),
            (5, -3),
            textcoords="offset points",
            verticalalignment="top",
            fontsize=8,
            color=_INK,
            parse_math=False,
            zorder=7,
        )
    _dress(axes, title, "US dollars per 1,000 requests (logarithmic)", "mean quality")
    axes.margins(x=0.08)
    _legend(figure, lines, 2)
    return figure


def _style(name: str) -> dict[str, Any]:
    return dict(_METHOD_STYLES.get(name, {"color": _GREY}))


def _panels(count: int) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many axes, at most three in a row."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.4 * columns, 4.0 * rows + 0.9), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, color=_INK, parse_math=False)
    axes.set_xlabel(x, fontsize=10, color=_INK)
    axes.set_ylabel(y, fontsize=10, color=_INK)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.grid(color=_LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _legend(figure: Figure, lines: Mapping[str, Any], columns: int) -> None:
    """Above all panels, where it hides no line."""
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside upper center",
        ncols=min(4, 2 * columns),
        frameon=False,
        fontsize=10,
    )


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
