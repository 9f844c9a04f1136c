"""Reports as tables for people."""

from __future__ import annotations

import math

from rich.table import Table

from training.evaluation import Report
from training.metrics import MethodFigures


def report_tables(report: Report, title: str) -> list[Table]:
    """The whole first, then a table a source."""
    tables = [_table(report, title)]
    tables += [_table(part, name) for name, part in report.by_source.items()]
    return tables


def _table(report: Report, title: str) -> Table:
    weak, strong = report.weak_quality, report.strong_quality
    table = Table(
        title=f"{title}: n = {report.n:,} · {report.weak} {weak:.4f} · {report.strong} {strong:.4f}",
        title_justify="left",
        caption=f"calibration error of the learned gain {report.calibration_error:.3f}"
        + (f" · {report.seen:,} rows left out, the bundle was trained on them" if report.seen else "")
        + ("" if report.unfamiliar is None else f" · {report.unfamiliar:.1%} flagged as unfamiliar"),
        caption_justify="left",
    )
    dollars = any(f.cost_saving_at_95 is not None for f in report.methods.values())
    nested = any(f.nested_quality is not None for f in report.methods.values())
    table.add_column("method")
    table.add_column("APGR", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("CPT50", justify="right")
    table.add_column("CPT80", justify="right")
    table.add_column("strong @95 %", justify="right")
    if nested:
        table.add_column("nested: strong", justify="right")
        table.add_column("quality", justify="right")
    if dollars:
        table.add_column("$ saved", justify="right")
    for name, figures in report.methods.items():
        cells = [name, *_cells(figures)]
        if nested:
            cells += [_percent(figures.nested_strong_share_at_95), _ratio(figures.nested_quality, strong)]
        if dollars:
            cells.append(_percent(figures.cost_saving_at_95))
        table.add_row(*cells, style="bold" if name == "learned" else None)
    return table


def _cells(figures: MethodFigures) -> list[str]:
    spread = f" ± {figures.apgr_sd:.3f}" if figures.apgr_sd else ""
    return [
        _number(figures.apgr, 4) + spread,
        f"{_number(figures.apgr_ci[0], 3)} – {_number(figures.apgr_ci[1], 3)}",
        _number(figures.cpt50, 1),
        _number(figures.cpt80, 1),
        _percent(figures.strong_share_at_95),
    ]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def _ratio(quality: float | None, strong: float) -> str:
    return "–" if quality is None or strong == 0 else f"{quality / strong:.1%} of strong"
