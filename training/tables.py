"""Reports as tables for people."""

from __future__ import annotations

import math

from rich.table import Table

from training.benchmark import Benchmark
from training.comparison import Line
from training.comparison import Table as BenchmarkTable
from training.evaluation import Report
from training.findings import percent, says, says_calibration, says_steps, says_study
from training.guarantee_study import GuaranteeStudy
from training.ladder import LadderReport
from training.metrics import Calibration, Interval, MethodFigures
from training.novelty_study import NoveltyStudy
from training.steps import StepTable
from training.studies import Study

Cells = tuple[list[str], list[list[str]]]

# The comparisons whose calibration is told.
CALIBRATED = ("mmlu", "gsm8k")


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
    return _rich(f"{title}: calibration", *calibration_cells(calibration), _CALIBRATION)


_CALIBRATION = (
    "ECE over ten bins of equally many rows; by chance: what perfect predictions would have on these rows · "
    "AUC of the gain: only strong right against the rest"
)


def calibration_cells(calibration: Calibration) -> Cells:
    """The header and the rows of a calibration table."""
    header = ["predicted", "ECE", "by chance", "Brier", "base rate's", "AUC"]
    heads = {f"quality of {name}": figures for name, figures in calibration.quality.items()}
    rows = []
    for name, of in {**heads, "gain": calibration.gain}.items():
        figures = (of.ece, of.ece_by_chance, of.brier, of.base_brier, of.auc)
        rows.append([name, *(_number(figure, 3) for figure in figures)])
    return header, rows


def guarantee_table(study: GuaranteeStudy, title: str) -> Table:
    """What promises cost and how often they are kept, beside thresholds without one."""
    heading = (
        f"{title}: {study.n:,} rows, {study.splits} splits, {study.calibration:,} to choose on, "
        f"{100 * study.confidence:g}% confidence"
    )
    return _rich(heading, *guarantee_cells(study), _guarantee_caption(study), text=0)


def _guarantee_caption(study: GuaranteeStudy) -> str:
    return (
        "saved: share of calls not sent to strong, on the test half · broken: quality below the bar, on the test half "
        f"(which has noise of its own) / on the population (at most {100 * (1 - study.confidence):.3g}% is promised)"
    )


def guarantee_cells(study: GuaranteeStudy) -> Cells:
    """The header and the rows of a table of promises."""
    header = [
        "allowed loss",
        "promised: saved",
        "nothing promised",
        "broken",
        "tuned: saved",
        "broken",
        "random: saved",
    ]
    rows = [
        [
            f"{at.loss:.0%}",
            f"{at.promised.saving:.1%} ± {at.promised.saving_sd:.1%}",
            f"{at.nothing_promised:.0%}",
            f"{at.promised.broken:.1%} / {at.promised.broken_population:.1%}",
            f"{at.tuned.saving:.1%} ± {at.tuned.saving_sd:.1%}",
            f"{at.tuned.broken:.1%} / {at.tuned.broken_population:.1%}",
            f"{at.random_saving:.1%}",
        ]
        for at in study.losses
    ]
    return header, rows


def ladder_tables(report: LadderReport, title: str) -> list[Table]:
    """The whole first, then a table a source."""
    return [
        _rich(_about_ladder(part, name), *ladder_cells(part), _left_out(part))
        for name, part in {title: report, **report.by_source}.items()
    ]


def _about_ladder(report: LadderReport, title: str) -> str:
    best = report.targets.index(report.best_single)
    dollars = "" if report.mean_cost is None else f" at ${1000 * report.mean_cost[best]:.4g} per 1,000"
    return (
        f"{title}: n = {report.n:,} · {len(report.targets)} targets · "
        f"best single {report.best_single} {report.mean_quality[best]:.4f}{dollars}"
    )


def _left_out(report: LadderReport) -> str | None:
    left_out = [
        f"{count:,} rows left out, {why}"
        for count, why in (
            (report.seen, "the bundle was trained on them"),
            (report.incomplete, "they lack a target's label"),
        )
        if count
    ]
    return " · ".join(left_out) or None


def ladder_cells(report: LadderReport) -> Cells:
    """The header and the rows of a table of routers over several targets."""
    header = [
        "method",
        "AIQ",
        "95 % interval",
        "PerfGain",
        "CostSave",
        "quality",
        "$ per 1,000",
        "$ saved @95 %",
    ]
    header += ["setting", "nested: $ saved", "zero there", "quality"]
    single = report.mean_quality[report.targets.index(report.best_single)]
    rows = []
    for name, figures in report.methods.items():
        interval = "–" if figures.aiq_ci is None else f"{figures.aiq_ci[0]:.3f} – {figures.aiq_ci[1]:.3f}"
        rows.append(
            [
                name,
                "–" if figures.aiq is None else f"{figures.aiq:.4f}",
                interval,
                f"{figures.perf_gain:+.1%}",
                percent(figures.cost_save),
                f"{figures.quality:.4f}",
                "–" if figures.cost is None else f"{1000 * figures.cost:.4g}",
                percent(figures.cost_saving_at_95),
                _setting(figures.setting_at_95),
                percent(figures.nested_cost_saving),
                "–"
                if figures.nested_quality is None
                else percent(report.random_saving(figures.nested_quality)),
                "–"
                if figures.nested_quality is None or not single
                else f"{figures.nested_quality / single:.1%}",
            ]
        )
    return header, rows


def novelty_cells(study: NoveltyStudy) -> Cells:
    """The header and the rows of a table of what is flagged."""
    header = ["rows", "like the training rows", "n", "flagged", "AUROC"]
    rows = [
        [
            line.rows,
            "yes" if line.familiar else "no",
            f"{line.n:,}",
            percent(line.flagged),
            "" if line.auc is None else f"{line.auc:.3f}",
        ]
        for line in study.lines
    ]
    return header, rows


def routed_cells(study: NoveltyStudy) -> Cells:
    """The header and the rows of a table of rows of another kind, routed."""
    header = ["rows", "how", "strong calls", "quality", "of strong", "random: strong calls", "APGR"]
    rows = [
        [
            *(f"{one.rows}, n = {one.n:,}", how),
            *(percent(at.strong_share), f"{at.quality:.4f}"),
            f"{at.quality / one.strong_quality:.1%}" if one.strong_quality else "–",
            *(percent(at.random_share), "–" if at.apgr is None else f"{at.apgr:.3f}"),
        ]
        for one in study.routed
        for how, at in (("as scored", one.plain), ("flagged to strong", one.flagged_to_strong))
    ]
    return header, rows


def _rich(
    title: str, header: list[str], rows: list[list[str]], caption: str | None = None, text: int = 1
) -> Table:
    """``text`` columns at the left, figures after them; the learned router's rows stand out."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < text else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("learned") else None)
    return table


def _markdown(header: list[str], rows: list[list[str]], text: int = 1) -> list[str]:
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + " --- |" * text + " ---: |" * (len(header) - text))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def benchmark_tables(result: Benchmark) -> list[Table]:
    """One table a set of rows, what it says above it."""
    tables = []
    for found in result.tables:
        tables.append(_rich(f"{found.title}: {_about(found)}", *benchmark_cells(found), says(found), text=2))
        if found.name in CALIBRATED:
            tables.append(calibration_table(found.calibration, found.title))
    for steps in result.steps:
        title = f"{steps.title}: {_about_steps(steps)}"
        tables.append(_rich(title, *step_cells(steps), says_steps(steps), text=2))
    for study in result.studies:
        tables += _study_tables(study)
    return tables


def _study_tables(study: Study) -> list[Table]:
    match study.found:
        case GuaranteeStudy():
            return [guarantee_table(study.found, study.title)]
        case LadderReport():
            return ladder_tables(study.found, study.title)
        case NoveltyStudy():
            return [
                _rich(study.title, *novelty_cells(study.found), text=2),
                *([_rich(study.title, *routed_cells(study.found), text=2)] if study.found.routed else []),
            ]


def step_cells(table: StepTable) -> Cells:
    """The header and the rows of a table of agent steps."""
    header = ["method", "trained on", "steps exact", "sufficient", "runs sufficient", "$ a run", "$ saved"]
    rows = [
        [
            *(name, trained_on, percent(f.exact), percent(f.sufficient), percent(f.runs_sufficient)),
            *(f"{f.cost:.4f}", percent(f.cost_saving)),
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
    """The report: what each table says, how it was made, the picture, a table a set of rows, and what was skipped."""
    settings = result.settings
    versions = ", ".join(f"{name} {value}" for name, value in settings["versions"].items())
    said = [
        *((table.title, says(table)) for table in result.tables),
        *((table.title, says_steps(table)) for table in result.steps),
        *((study.title, says_study(study)) for study in result.studies),
    ]
    lines = [
        "# Benchmark",
        "",
        *(f"- **{title}**: {words}" for title, words in said),
        "",
        "## How it was made",
        "",
        f"    {command}",
        "",
        f"{versions}; encoder {settings['encoder']['name']} `{settings['encoder']['hash'][:12]}`; "
        f"seeds {settings['seed']} to {settings['seed'] + settings['repeats'] - 1}; "
        f"{settings['resamples']:,} resamples; {settings['seconds'] / 60:.0f} minutes.",
        "",
        "All methods are measured on the same rows of the same folds. APGR, CPT50 and CPT80 are RouteLLM's "
        "(arXiv 2406.18665), means over runs, ± their standard deviation; equal scores are ordered at random. The interval "
        "is a 95 % bootstrap over groups of near-duplicate prompts (cosine of the centred embeddings ≥ .95), with each "
        "resample's own deciles as thresholds. *Saved at 95 %* is what may be saved while quality stays at 95 % of strong's, "
        "the threshold picked on the same rows; *nested* with it picked on the training rows, the quality that gave, and "
        "what a router without knowledge saves at that very quality. *Learned ahead* is "
        "APGR of the learned router minus the row's, over the same resamples: **bold** where the interval leaves out zero.",
        "",
    ]
    if picture:
        lines += [f"![quality against strong calls]({picture})", ""]
    for found in result.tables:
        lines += [f"## {found.title}", "", says(found), ""]
        lines += [f"{_about(found)}. Dataset `{found.digest[:12]}`, {found.seconds:.0f} s.", ""]
        lines += _markdown(*benchmark_cells(found, mark="**"), text=2)
        if found.name in CALIBRATED:
            lines += [says_calibration(found.calibration), ""]
            lines += [*_markdown(*calibration_cells(found.calibration)), f"{_CALIBRATION}.", ""]
    for steps in result.steps:
        lines += [f"## {steps.title}", "", says_steps(steps), ""]
        lines += [f"{_about_steps(steps)}. Dataset `{steps.digest[:12]}`.", ""]
        lines += _markdown(*step_cells(steps), text=2)
    for study in result.studies:
        lines += [f"## {study.title}", "", says_study(study), "", *_study_lines(study)]
    lines += [f"Skipped: {name}: {why}." for name, why in result.skipped.items()]
    return "\n".join(lines).rstrip() + "\n"


def _study_lines(study: Study) -> list[str]:
    about = f"Trained on {study.trained_on}. Dataset `{study.digest[:12]}`, {study.seconds:.0f} s."
    found = study.found
    match found:
        case GuaranteeStudy():
            told = (
                f"{found.n:,} rows in {found.groups:,} groups, {found.splits} random halves, {found.calibration:,} groups "
                f"to choose on, {100 * found.confidence:g} % confidence. {_guarantee_caption(found)}."
            )
            return [told, "", about, "", *_markdown(*guarantee_cells(found), text=0)]
        case LadderReport():
            told = (
                "AIQ is RouterBench's area under the hull over the range of cost; PerfGain and CostSave are LLMRouterBench's, "
                "beside the best single model; *saved @95 %* is of its dollars at 95 % of its quality, *nested* with the "
                "setting picked on other folds, and the share of its quality that gave. *zero* is the best random mix of single "
                "models, *learned* takes the cheapest model within a loss of quality, *learned_value* the best quality less "
                "λ × cost, *pair* routes between two models alone. Settings are picked on the same rows but where nested."
            )
            return [
                f"{_about_ladder(found, 'All rows')}.",
                "",
                about,
                "",
                *_markdown(*ladder_cells(found)),
                told,
                "",
            ]
        case NoveltyStudy():
            told = (
                "*Flagged* is the share of rows beyond the cut of every training source. Rows like the training rows were held "
                "out of arrays and cuts alike. AUROC: the chance that such a row is more novel than a held-out one."
            )
            lines = [about, "", *_markdown(*novelty_cells(found), text=2), told, ""]
            if found.routed:
                lines += [
                    "Routed at the bundle's own threshold; *random* is what a router without knowledge needs for that quality.",
                    "",
                    *_markdown(*routed_cells(found), text=2),
                ]
            return lines


def benchmark_cells(table: BenchmarkTable, mark: str = "") -> Cells:
    """The header and the rows of a table; a difference whose interval leaves out zero is marked, or has a star."""
    run = [line.figures for line in table.lines if line.figures is not None]
    dollars = any(figures.cost_saving_at_95 is not None for figures in run)
    header = ["method", "trained on", "APGR", "95 % interval", "CPT50", "CPT80", "calls saved at 95 %"]
    header += ["$ saved"] * dollars + ["nested: calls saved", "random's there", "quality"]
    header += ["nested: $ saved"] * dollars + ["learned ahead"]
    rows = []
    for line in table.lines:
        if line.figures is None:
            rows.append([line.method, line.trained_on, f"not run: {line.why_not}", *[""] * (len(header) - 3)])
            continue
        f = line.figures
        nested = f.nested_strong_share_at_95
        cells = [line.method, line.trained_on, *_cells(f)[:4], percent(f.call_saving_at_95)]
        cells += [percent(f.cost_saving_at_95)] * dollars
        cells += (
            ["–", "–", "–"]
            if nested is None
            else [
                percent(1.0 - nested),
                percent(_random_saves(table, f.nested_quality)),
                _ratio(f.nested_quality, table.strong_quality),
            ]
        )
        cells += [percent(f.nested_cost_saving)] * dollars
        rows.append([*cells, _ahead(line, mark)])
    for row in table.published:
        figures = [f"{row.apgr:.3f}", "", *("–" if x is None else f"{x:.1f}" for x in (row.cpt50, row.cpt80))]
        about = [f"{row.method} (published, not run)", f"{row.trained_on}; {row.source}"]
        rows.append([*about, *figures, *[""] * (len(header) - 6)])
    return header, rows


def _random_saves(table: BenchmarkTable, quality: float | None) -> float | None:
    """Share of calls that a router without knowledge saves at a mean quality: it lies on a straight line."""
    gap = table.strong_quality - table.weak_quality
    if quality is None or gap <= 0.0:
        return None
    return min(max((table.strong_quality - quality) / gap, 0.0), 1.0)


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
            cells += [percent(figures.nested_strong_share_at_95), _ratio(figures.nested_quality, strong)]
        if dollars:
            cells.append(percent(figures.cost_saving_at_95))
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
        percent(figures.strong_share_at_95),
    ]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _setting(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _ratio(quality: float | None, strong: float) -> str:
    return "–" if quality is None or strong == 0 else f"{quality / strong:.1%} of strong"
