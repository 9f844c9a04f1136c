from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from router.errors import UsageError
from training.metrics import Calibration, gain_calibration, quality_calibration
from training.plot import curve_figure, plot_curve, plot_methods, plot_reliability, reliability_figure
from training.threshold import for_strong_share

Floats = NDArray[np.float64]


def rows(n: int = 900) -> tuple[Floats, Floats, Floats]:
    random = np.random.default_rng(0)
    weak = random.random(n)
    strong = np.clip(weak + random.normal(0.15, 0.3, n), 0.0, 1.0)
    return (strong - weak + random.normal(0.0, 0.3, n)) / 2, weak, strong


def lines(figure: Figure) -> dict[str, tuple[Floats, Floats]]:
    """By label: the points of each line."""
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in figure.axes[0].get_lines()
    }


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def test_curves_run_from_weak_to_strong_between_random_and_oracle() -> None:
    score, weak, strong = rows()
    drawn = lines(curve_figure(score, weak, strong))
    for name in ("router", "oracle", "random"):
        x, y = drawn[name]
        assert (x[0], x[-1]) == (0.0, 100.0)
        assert (y[0], y[-1]) == pytest.approx((weak.mean(), strong.mean()))
    grid = np.linspace(1.0, 99.0, 50)
    learned, best, chance = (np.interp(grid, *drawn[name]) for name in ("router", "oracle", "random"))
    assert (best >= learned).all()
    assert learned.mean() > chance.mean()
    assert drawn["95% of strong's quality"][1] == pytest.approx([0.95 * strong.mean()] * 2)


def test_chosen_point_is_marked_and_told() -> None:
    score, weak, strong = rows()
    chosen = for_strong_share(score, 0.3, weak, strong)
    figure = curve_figure(score, weak, strong, chosen=chosen, title="Sample", names=("mini_$m$", "frontier"))
    paths = [np.asarray(line.get_xydata()) for line in figure.axes[0].get_lines()]
    (point,) = [path[0] for path in paths if len(path) == 1]
    assert point == pytest.approx((30.0, chosen.quality))
    assert "30% strong calls" in texts(figure)
    assert f"{chosen.threshold:.3g}" in texts(figure)
    assert figure.get_suptitle() == "Sample\nweak mini_$m$, strong frontier"


def test_dollars_stand_per_thousand_requests() -> None:
    score, weak, strong = rows()
    cost_weak, cost_strong = np.full(900, 0.0005), np.full(900, 0.01)
    chosen = for_strong_share(score, 0.5, weak, strong, cost_weak=cost_weak, cost_strong=cost_strong)
    figure = curve_figure(
        score, weak, strong, cost_weak=cost_weak, cost_strong=cost_strong, chosen=chosen, x="dollars"
    )
    x, _ = lines(figure)["router"]
    assert (x[0], x[-1]) == pytest.approx((0.5, 10.0))
    assert "dollars" in figure.axes[0].get_xlabel()
    assert "$5.25 per 1,000 requests" in texts(figure)
    with pytest.raises(UsageError, match="costs of both targets"):
        curve_figure(score, weak, strong, x="dollars")


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_tells_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    score, weak, strong = rows(200)
    path = tmp_path / f"curve{suffix}"
    plot_curve(path, score, weak, strong, chosen=for_strong_share(score, 0.5), names=("a$b$", "c"))
    assert path.read_bytes().startswith(magic)


def test_what_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curve\.jpeg2.*\.png, \.svg, \.pdf"):
        plot_curve(tmp_path / "curve.jpeg2", *rows(20))
    with pytest.raises(UsageError, match=r"missing/curve\.png: cannot be written"):
        plot_curve(tmp_path / "missing" / "curve.png", *rows(20))


def test_a_pair_without_a_strong_side_is_drawn_too(tmp_path: Path) -> None:
    score, weak, strong = rows(200)
    plot_curve(tmp_path / "reversed.png", score, strong, weak, chosen=for_strong_share(score, 0.5))
    plot_curve(tmp_path / "one.png", score[:1], weak[:1], weak[:1], chosen=for_strong_share(score[:1], 1.0))


def test_pyplot_is_left_alone() -> None:
    curve_figure(*rows(50))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def calibration() -> Calibration:
    score, weak, strong = rows()
    heads = {"mini_$m$": quality_calibration(weak, weak), "frontier": quality_calibration(strong, 1 - strong)}
    return Calibration(heads, gain_calibration(score, weak, strong))


def test_reliability_shows_each_head_and_the_gain() -> None:
    calibrated = calibration()
    figure = reliability_figure(calibrated, title="Sample")
    assert [axes.get_title() for axes in figure.axes] == [
        "quality of mini_$m$",
        "quality of frontier",
        "gain",
    ]
    assert figure.get_suptitle() == "Sample"
    drawn = (*calibrated.quality.values(), calibrated.gain)
    for axes, figures in zip(figure.axes, drawn, strict=True):
        (points,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert np.asarray(points.get_xdata()) == pytest.approx([part.predicted for part in figures.bins])
        assert np.asarray(points.get_ydata()) == pytest.approx([part.observed for part in figures.bins])
        (told,) = [text.get_text() for text in axes.texts]
        assert f"ECE {figures.ece:.3f}" in told
        assert f"{figures.base_brier:.3f}" in told
        # Everything that is drawn lies inside.
        (low, high) = axes.get_ylim()
        assert low < min(part.low for part in figures.bins)
        assert max(part.high for part in figures.bins) < high
    right, wrong, _ = figure.axes
    assert [line.get_ydata()[0] < line.get_ydata()[-1] for line in (right.lines[1], wrong.lines[1])] == [
        True,
        False,
    ]


def test_reliability_is_written_as_told_by_the_suffix(tmp_path: Path) -> None:
    plot_reliability(tmp_path / "r.png", calibration())
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"r\.txt: a plot is written as"):
        plot_reliability(tmp_path / "r.txt", calibration())
    with pytest.raises(UsageError, match="cannot be written"):
        plot_reliability(tmp_path / "none" / "r.png", calibration())


def test_methods_of_several_datasets_make_a_picture_each_format(tmp_path: Path) -> None:
    rising = np.stack([np.linspace(0.5, 0.8, 101), np.full(101, 0.01)])
    panels = [
        (f"set {i}", {"learned": rising, "random": rising, "one of another name": rising}) for i in range(4)
    ]
    plot_methods(tmp_path / "curves.svg", panels)
    drawn = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert drawn.count("set 3") == 1
    with pytest.raises(UsageError, match="written as"):
        plot_methods(tmp_path / "curves.txt", panels)
    with pytest.raises(UsageError, match="cannot be written"):
        plot_methods(tmp_path / "nowhere" / "curves.png", panels)
