"""A bundle's card: what it is for, what it was trained on, and what it was measured to do."""

from __future__ import annotations

from router.bundle import Manifest
from training.estimator import CENTRES
from training.evaluation import Report
from training.metrics import CalibrationFigures, Interval, MethodFigures
from training.novelty import NoveltyFigures

_ROWS = ("learned", "prompt_length", "random", "oracle")


def write_card(
    manifest: Manifest, report: Report | None, gain: Interval | None, novelty: NoveltyFigures, command: str
) -> str:
    """Markdown."""
    threshold = manifest.thresholds["default"]
    lines = [
        f"# {manifest.name}",
        "",
        f"Predicts the quality of {', '.join(f'`{target}`' for target in manifest.targets)} (cheapest first) for a "
        "prompt, and the gain of a dearer one over the cheapest.",
        "",
        f"- created {manifest.created} by router {manifest.versions['router']}, seed {manifest.seed}",
        f"- encoder {manifest.encoder.name} ({manifest.encoder.hash[:12]})",
        f"- threshold {threshold.value:.4f}: {threshold.how}",
    ]
    if gain is not None:
        lines.append(f"- mean gain {gain.value:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f})")
    lines += [f"- **{note}**" for note in manifest.notes]
    lines += ["", "## Trained on", "", "| file | rows | SHA-256 |", "| --- | --- | --- |"]
    lines += [f"| {data.name} | {data.rows:,} | `{data.sha256[:16]}` |" for data in manifest.datasets]
    if report is not None:
        lines += [
            "",
            "## Held-out figures",
            "",
            "On the training rows, each predicted by parts that had not seen it (inner folds, grouped by prompt). The "
            "calibration curves alone have seen the row; `router-train crossval` gives the fully nested figures.",
            "",
        ]
        lines += _table("all", report)
        for name, part in report.by_source.items():
            lines += _table(name, part)
        lines += [
            "## Calibration",
            "",
            "How far predictions can be taken at their word, on the same rows. ECE is the mean distance between predicted and "
            "observed over ten bins of equally many rows; perfect predictions would have the one by chance. A Brier score (mean "
            "squared error) counts beside that of the mean label. The AUC of the gain is for rows where only the dearer target "
            "is right, against all others.",
            "",
        ]
        lines += _calibration("all", report)
        for name, part in report.by_source.items():
            lines += _calibration(name, part)
    lines += [
        "",
        "## Limits",
        "",
        "A score says what the labels say: for other kinds of prompts than these, or other models, measure first "
        "(`router-train evaluate`).",
        f"A prompt unlike the training rows is flagged, and the policy's `unknown` says where it goes. Of held-out rows like "
        f"them {flagged_words(novelty)} are flagged.",
    ]
    if "kernel" in manifest.parts:
        lines.append(
            f"The bundle holds a projection of the embedding of up to {CENTRES:,} training prompts. Embeddings can be "
            "inverted to something near the text: train on private prompts with `--no-neighbours`."
        )
    if command:
        lines += ["", "## Made by", "", "```", command, "```"]
    return "\n".join(lines) + "\n"


def flagged_words(novelty: NoveltyFigures) -> str:
    """The share of rows that is flagged, and that of each source where there are several."""
    sources = ", ".join(f"{name} {share:.1%}" for name, share in novelty.by_source.items())
    return f"{novelty.flagged:.1%}" + (f" ({sources})" if len(novelty.by_source) > 1 else "")


def _table(name: str, report: Report) -> list[str]:
    head = f"**{name}**: n = {report.n:,}, {report.weak} {report.weak_quality:.3f}, {report.strong} {report.strong_quality:.3f}"
    rows = [_row(method, report.methods[method]) for method in _ROWS if method in report.methods]
    return [
        head,
        "",
        "| method | APGR (95 % interval) | CPT50 | CPT80 | strong share at 95 % quality |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _calibration(name: str, report: Report) -> list[str]:
    rows = {f"quality of {target}": figures for target, figures in report.calibration.quality.items()}
    rows["gain"] = report.calibration.gain
    return [
        f"| {name} | ECE (by chance) | Brier (base rate's) | AUC |",
        "| --- | --- | --- | --- |",
        *(_calibrated(row, figures) for row, figures in rows.items()),
        "",
    ]


def _calibrated(row: str, figures: CalibrationFigures) -> str:
    return (
        f"| {row} | {figures.ece:.3f} ({figures.ece_by_chance:.3f}) | {figures.brier:.3f} ({figures.base_brier:.3f}) "
        f"| {figures.auc:.3f} |"
    )


def _row(method: str, figures: MethodFigures) -> str:
    low, high = figures.apgr_ci
    return (
        f"| {method} | {figures.apgr:.3f} ({low:.3f}–{high:.3f}) | {figures.cpt50:.1f} | {figures.cpt80:.1f} "
        f"| {figures.strong_share_at_95:.1%} |"
    )
