"""What the benchmark's tables say, in a line of plain words each."""

from __future__ import annotations

import math

from training.comparison import Table
from training.guarantee_study import GuaranteeStudy
from training.ladder import LadderReport
from training.metrics import Calibration, Interval
from training.novelty_study import NoveltyStudy
from training.steps import StepTable
from training.studies import Study

# The allowed loss that is told of.
LOSS = 0.05


def percent(value: float | None) -> str:
    """With one digit; a dash for what is not known."""
    # Without the rounding what is zero but for the last bit would bear a sign.
    return "–" if value is None or math.isnan(value) else f"{round(value, 9) + 0.0:.1%}"


def says(table: Table) -> str:
    """The learned router beside the best of the others and beside chance."""
    figures = {line.method: line.figures for line in table.lines if line.figures is not None}
    ours = figures["learned"]
    if not ours.defined:
        return f"{table.strong} is no better than {table.weak} on these rows: there is nothing to route for."
    words = f"The learned router recovers {ours.apgr:.3f} of the gap (chance: .5)"
    others = [
        line for line in table.lines if line.method in figures and line.method not in ("learned", "random")
    ]
    if others:
        best = max(others, key=lambda line: figures[line.method].apgr)
        words += (
            f"; the best other method, {best.method}, {figures[best.method].apgr:.3f}, {_beside(best.ahead)}"
        )
    return (
        f"{words}. At 95 % of strong's quality it saves {percent(ours.call_saving_at_95)} of strong calls, "
        f"random {percent(1.0 - table.random_share_at_95)}."
    )


def _beside(ahead: Interval | None) -> str:
    if ahead is None or math.isnan(ahead.low) or ahead.low <= 0.0 <= ahead.high:
        return "is not told apart from it"
    return "is clearly behind" if ahead.low > 0.0 else "is clearly ahead"


def says_calibration(calibration: Calibration) -> str:
    """How far predictions are off, beside what noise alone would make of it."""
    heads = {f"quality of {name}": of for name, of in calibration.quality.items()} | {
        "gain": calibration.gain
    }
    off = ", ".join(
        f"{of.ece:.3f} for the {name} ({of.ece_by_chance:.3f} by chance)" for name, of in heads.items()
    )
    return f"In ten bins predictions are off by {off}."


def says_steps(table: StepTable) -> str:
    """The learned router beside the logistic regression and chance."""
    lines = {name: figures for name, _, figures in table.lines}
    told = [
        f"{name}: {percent(of.sufficient)} of steps and {percent(of.runs_sufficient)} of whole runs, "
        f"{percent(of.cost_saving)} of the dollars saved"
        for name, of in (
            ("the learned router", lines["learned"]),
            ("a logistic regression", lines["logistic"]),
            ("tiers at random", lines["random"]),
        )
    ]
    return f"The tier picked is enough with {'; '.join(told)}."


def says_study(study: Study) -> str:
    """Of promises, of more than two targets, or of what is flagged."""
    match study.found:
        case GuaranteeStudy():
            return _says_guarantee(study.found)
        case LadderReport():
            return _says_ladder(study.found)
        case NoveltyStudy():
            return _says_novelty(study.found)


def _says_guarantee(study: GuaranteeStudy) -> str:
    at = min(study.losses, key=lambda at: abs(at.loss - LOSS))
    return (
        f"With {100 * at.loss:g} % of quality to lose, a promised threshold saves {percent(at.promised.saving)} of strong calls "
        f"and is broken in {percent(at.promised.broken_population)} of draws; a tuned one saves {percent(at.tuned.saving)}, "
        f"broken in {percent(at.tuned.broken_population)}; random saves {percent(at.random_saving)}."
    )


def _says_ladder(report: LadderReport) -> str:
    saved = {name: figures.cost_saving_at_95 for name, figures in report.methods.items()}
    names = ("learned", "learned_value", "knn", "clusters", "pair", "zero", "oracle")
    told = ", ".join(
        f"{'the best random mix' if name == 'zero' else name} {percent(saved[name])}"
        for name in names
        if name in saved
    )
    return f"Of the dollars of the best single model ({report.best_single}), at 95 % of its quality are saved by {told}."


def _says_novelty(study: NoveltyStudy) -> str:
    words = f"Of held-out rows of its own kind {percent(study.lines[0].flagged)} are flagged"
    away = sorted((line for line in study.lines if not line.familiar), key=lambda line: line.flagged)
    if away:
        low, high = away[0], away[-1]
        words += f", of others {percent(low.flagged)} ({low.rows}) to {percent(high.flagged)} ({high.rows})"
    for one in study.routed:
        plain, careful = (
            served.quality / max(one.strong_quality, 1e-12) for served in (one.plain, one.flagged_to_strong)
        )
        words += (
            f"; routed at its own threshold {one.rows} keeps {percent(plain)} of strong's quality with "
            f"{percent(one.plain.strong_share)} strong calls, and {percent(careful)} with "
            f"{percent(one.flagged_to_strong.strong_share)} where flagged rows go to strong"
        )
    return f"{words}."
