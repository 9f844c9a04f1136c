"""Reports as tables for people."""

from __future__ import annotations

import math

from rich.table import Table

from training.evaluation import Report
from training.guarantee_study import GuaranteeStudy
from training.ladder import LadderReport
from training.metrics import Calibration, MethodFigures


def report_tables(report: Report, title: str) -> list[Table]:
    """The whole first, then a table a source; after each, how far its predictions can be taken at their word."""
    parts = {title: report, **report.by_source}
    return [
        table
        for name, part in parts.items()
        for table in (_table(part, name), calibration_table(part.calibration, name))
    ]


def calibration_table(calibration: Calibration, title: str) -> Table:
    """Error, Brier score and AUC of each quality head and of the gain."""
    table = Table(
        title=f"{title}: calibration",
        title_justify="left",
        caption="ECE over ten bins of equally many rows; by chance: what perfect predictions would have on these rows · "
        "AUC of the gain: only strong right against the rest",
        caption_justify="left",
    )
    table.add_column("predicted")
    for name in ("ECE", "by chance", "Brier", "base rate's", "AUC"):
        table.add_column(name, justify="right")
    heads = {f"quality of {name}": figures for name, figures in calibration.quality.items()}
    for name, of in {**heads, "gain": calibration.gain}.items():
        figures = (of.ece, of.ece_by_chance, of.brier, of.base_brier, of.auc)
        table.add_row(name, *(_number(figure, 3) for figure in figures))
    return table


def guarantee_table(study: GuaranteeStudy, title: str) -> Table:
    """What promises cost and how often they are kept, beside thresholds without one."""
    table = Table(
        title=f"{title}: {study.n:,} rows, {study.splits} splits, {study.calibration:,} to choose on, "
        f"{100 * study.confidence:g}% confidence",
        title_justify="left",
        caption="saved: share of calls not sent to strong, on the test half · broken: quality below the bar, on the test half "
        f"(which has noise of its own) / on the population (at most {100 * (1 - study.confidence):.3g}% is promised)",
        caption_justify="left",
    )
    table.add_column("allowed loss", justify="right")
    for name in ("promised: saved", "nothing promised", "broken", "tuned: saved", "broken", "random: saved"):
        table.add_column(name, justify="right")
    for at in study.losses:
        table.add_row(
            f"{at.loss:.0%}",
            f"{at.promised.saving:.1%} ± {at.promised.saving_sd:.1%}",
            f"{at.nothing_promised:.0%}",
            f"{at.promised.broken:.1%} / {at.promised.broken_population:.1%}",
            f"{at.tuned.saving:.1%} ± {at.tuned.saving_sd:.1%}",
            f"{at.tuned.broken:.1%} / {at.tuned.broken_population:.1%}",
            f"{at.random_saving:.1%}",
        )
    return table


def ladder_tables(report: LadderReport, title: str) -> list[Table]:
    """The whole first, then a table a source."""
    tables = [_ladder_table(report, title)]
    tables += [_ladder_table(part, name) for name, part in report.by_source.items()]
    return tables


def _ladder_table(report: LadderReport, title: str) -> Table:
    best = report.targets.index(report.best_single)
    single = report.mean_quality[best]
    dollars = "" if report.mean_cost is None else f" at ${1000 * report.mean_cost[best]:.4g} per 1,000"
    left_out = [
        f"{count:,} rows left out, {why}"
        for count, why in (
            (report.seen, "the bundle was trained on them"),
            (report.incomplete, "they lack a target's label"),
        )
        if count
    ]
    table = Table(
        title=f"{title}: n = {report.n:,} · {len(report.targets)} targets · "
        f"best single {report.best_single} {single:.4f}{dollars}",
        title_justify="left",
        caption=" · ".join(left_out) or None,
        caption_justify="left",
    )
    table.add_column("method")
    for name in (
        "AIQ",
        "95 % interval",
        "PerfGain",
        "CostSave",
        "quality",
        "$ per 1,000",
        "$ saved @95 %",
        "setting",
        "nested",
        "quality",
    ):
        table.add_column(name, justify="right")
    for name, figures in report.methods.items():
        interval = "–" if figures.aiq_ci is None else f"{figures.aiq_ci[0]:.3f} – {figures.aiq_ci[1]:.3f}"
        table.add_row(
            name,
            "–" if figures.aiq is None else f"{figures.aiq:.4f}",
            interval,
            f"{figures.perf_gain:+.1%}",
            _percent(figures.cost_save),
            f"{figures.quality:.4f}",
            "–" if figures.cost is None else f"{1000 * figures.cost:.4g}",
            _percent(figures.cost_saving_at_95),
            _setting(figures.setting_at_95),
            _percent(figures.nested_cost_saving),
            "–" if figures.nested_quality is None or not single else f"{figures.nested_quality / single:.1%}",
            style="bold" if name.startswith("learned") else None,
        )
    return table


def _table(report: Report, title: str) -> Table:
    weak, strong = report.weak_quality, report.strong_quality
    table = Table(
        title=f"{title}: n = {report.n:,} · {report.weak} {weak:.4f} · {report.strong} {strong:.4f}",
        title_justify="left",
        caption=" · ".join(
            [
                *([f"{report.seen:,} rows left out, the bundle was trained on them"] if report.seen else []),
                *([] if report.unfamiliar is None else [f"{report.unfamiliar:.1%} flagged as unfamiliar"]),
            ]
        )
        or None,
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


def _setting(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _percent(value: float | None) -> str:
    # Without the rounding what is zero but for the last bit would bear a sign.
    return "–" if value is None or math.isnan(value) else f"{round(value, 9) + 0.0:.1%}"


def _ratio(quality: float | None, strong: float) -> str:
    return "–" if quality is None or strong == 0 else f"{quality / strong:.1%} of strong"
