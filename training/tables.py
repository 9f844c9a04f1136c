"""Reports as tables for people."""

from __future__ import annotations

import math

from rich.table import Table

from training.benchmark import Benchmark, Line
from training.benchmark import Table as BenchmarkTable
from training.evaluation import Report
from training.guarantee_study import GuaranteeStudy
from training.ladder import LadderReport
from training.metrics import Calibration, Interval, MethodFigures
from training.steps import StepTable


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


def benchmark_tables(result: Benchmark) -> list[Table]:
    """One table a set of rows."""
    tables = []
    for found in result.tables:
        header, rows = benchmark_cells(found)
        table = Table(
            title=f"{found.title}: {_about(found)}",
            title_justify="left",
            caption=_calibration(found),
            caption_justify="left",
        )
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == "learned" else None)
        tables.append(table)
    for steps in result.steps:
        header, rows = step_cells(steps)
        table = Table(title=f"{steps.title}: {_about_steps(steps)}", title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def step_cells(table: StepTable) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of agent steps."""
    header = ["method", "trained on", "steps exact", "sufficient", "runs sufficient", "$ a run", "$ saved"]
    rows = [
        [
            *(name, trained_on, _percent(f.exact), _percent(f.sufficient), _percent(f.runs_sufficient)),
            *(f"{f.cost:.4f}", _percent(f.cost_saving)),
        ]
        for name, trained_on, f in table.lines
    ]
    return header, rows


def _about_steps(table: StepTable) -> str:
    return (
        f"{table.n:,} steps of {table.runs:,} runs, {table.repeats} × cross-validated by run; "
        "dollars of the input alone, nothing cached"
    )


def benchmark_markdown(result: Benchmark, command: str, picture: str = "") -> str:
    """The report: how it was made, the picture, a table a set of rows, and what was skipped."""
    settings = result.settings
    versions = ", ".join(f"{name} {value}" for name, value in settings["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"    {command}",
        "",
        f"{versions}; encoder {settings['encoder']['name']} `{settings['encoder']['hash'][:12]}`; "
        f"seeds {settings['seed']} to {settings['seed'] + settings['repeats'] - 1}; "
        f"{settings['resamples']:,} resamples; {settings['seconds'] / 60:.0f} minutes.",
        "",
        "All methods are measured on the same rows of the same folds. APGR, CPT50 and CPT80 are RouteLLM's "
        "(arXiv 2406.18665), means over runs, ± their standard deviation; equal scores are ordered at random. The interval "
        "is a 95 % bootstrap over groups of near-duplicate prompts (cosine ≥ .95), with each resample's own deciles as "
        "thresholds. *Saved at 95 %* is what may be saved while quality stays at 95 % of strong's, the threshold picked "
        "on the same rows; *nested* with it picked on the training rows, and the quality that gave. *Learned ahead* is "
        "APGR of the learned router minus the row's, over the same resamples: **bold** where the interval leaves out zero.",
        "",
    ]
    if picture:
        lines += [f"![quality against strong calls]({picture})", ""]
    for found in result.tables:
        header, rows = benchmark_cells(found, mark="**")
        lines += [
            f"## {found.title}",
            "",
            f"{_about(found)}. Dataset `{found.digest[:12]}`, {found.seconds:.0f} s.",
            "",
        ]
        lines += ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines += ["", _calibration(found), ""]
    for steps in result.steps:
        header, rows = step_cells(steps)
        lines += [f"## {steps.title}", "", f"{_about_steps(steps)}. Dataset `{steps.digest[:12]}`.", ""]
        lines += ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [f"Skipped: {name}: {why}." for name, why in result.skipped.items()]
    return "\n".join(lines).rstrip() + "\n"


def benchmark_cells(table: BenchmarkTable, mark: str = "") -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table; a difference whose interval leaves out zero is marked, or has a star."""
    run = [line.figures for line in table.lines if line.figures is not None]
    dollars = any(figures.cost_saving_at_95 is not None for figures in run)
    header = ["method", "trained on", "APGR", "95 % interval", "CPT50", "CPT80", "calls saved at 95 %"]
    header += ["$ saved"] * dollars + ["nested: calls saved", "quality"]
    header += ["nested: $ saved"] * dollars + ["learned ahead"]
    rows = []
    for line in table.lines:
        if line.figures is None:
            rows.append([line.method, line.trained_on, f"not run: {line.why_not}", *[""] * (len(header) - 3)])
            continue
        f = line.figures
        nested = f.nested_strong_share_at_95
        cells = [line.method, line.trained_on, *_cells(f)[:4], _percent(f.call_saving_at_95)]
        cells += [_percent(f.cost_saving_at_95)] * dollars
        cells += (
            ["–", "–"]
            if nested is None
            else [_percent(1.0 - nested), _ratio(f.nested_quality, table.strong_quality)]
        )
        cells += [_percent(f.nested_cost_saving)] * dollars
        rows.append([*cells, _ahead(line, mark)])
    for row in table.published:
        figures = [f"{row.apgr:.3f}", "", *("–" if x is None else f"{x:.1f}" for x in (row.cpt50, row.cpt80))]
        about = [f"{row.method} (published, not run)", f"{row.trained_on}; {row.source}"]
        rows.append([*about, *figures, *[""] * (len(header) - 6)])
    return header, rows


def _ahead(line: Line, mark: str) -> str:
    if line.ahead is None:
        return ""
    value, low, high = line.ahead.value, line.ahead.low, line.ahead.high
    text = f"{value:+.3f} ({low:+.3f} – {high:+.3f})" if not math.isnan(low) else _number(value, 3)
    if not (low > 0 or high < 0):
        return text
    return f"{mark}{text}{mark}" if mark else f"{text} *"


def _about(table: BenchmarkTable) -> str:
    runs = (
        f"{table.runs} × {table.folds} folds"
        if table.folds > 1
        else f"{table.runs} run{'s' * (table.runs > 1)}"
    )
    return (
        f"n = {table.n:,} in {table.groups:,} groups ({table.merged:,} rows merged as near-duplicates), {runs}; "
        f"{table.weak} {table.weak_quality:.4f}, {table.strong} {table.strong_quality:.4f}, gain {_spread(table.gain)}; "
        f"random saves {1.0 - table.random_share_at_95:.1%} of calls at 95 %"
    )


def _calibration(table: BenchmarkTable) -> str:
    return "learned, held out: " + "; ".join(
        f"{head} ECE {f['ece']:.3f}, Brier {f['brier']:.4f} (base rate {f['base_brier']:.4f}), AUC {_number(f['auc'], 3)}"
        for head, f in table.calibration.items()
    )


def _spread(interval: Interval) -> str:
    text = f"{interval.value:.3f} ({interval.low:.3f} – {interval.high:.3f})"
    return text if interval.low > 0 else f"{text}, which does not show that there is a strong side"


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
    low, high = figures.apgr_ci
    spread = f" ± {figures.apgr_sd:.3f}" if figures.apgr_sd and not math.isnan(figures.apgr_sd) else ""
    return [
        _number(figures.apgr, 4) + spread,
        "–" if math.isnan(low) else f"{low:.3f} – {high:.3f}",
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
