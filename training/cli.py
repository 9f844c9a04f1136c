"""The command ``router-train``."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from router import __version__
from router.errors import RouterError, UsageError, run_command

# What takes a second to import (pandas, scikit-learn, matplotlib) is imported by the command that needs it.
if TYPE_CHECKING:
    from router.features import Encoder, Features
    from router.predictor import Predictor
    from training.dataset import Dataset
    from training.evaluation import Report
    from training.ladder import LadderReport
    from training.ladder_threshold import LadderThreshold

app = typer.Typer(
    name="router-train",
    help="Train, measure and tune routers from labelled prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Datasets = Annotated[list[Path], typer.Argument(metavar="DATASET", help="JSONL, CSV or Parquet; .gz too.")]
Weak = Annotated[str, typer.Option("--weak", metavar="M", help="The cheap model's name in the labels.")]
Strong = Annotated[
    str, typer.Option("--strong", metavar="M", help="The frontier model's name in the labels.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**31)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out, and list them.")]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="E",
        help="An encoder directory, or a sentence-transformers model by path or name.",
    ),
]
TargetsOption = Annotated[
    str | None, typer.Option("--targets", metavar="M,M,…", help="Three or more, cheapest first.")
]
LadderOption = Annotated[
    str | None,
    typer.Option(
        "--ladder", metavar="M,M,…", help="For rows with 'sufficient'; the targets, where none are named."
    ),
]
PricesOption = Annotated[
    Path | None,
    typer.Option("--prices", metavar="FILE", help="YAML: model → {input, output}, USD per million tokens."),
]


def main() -> None:
    """Run the command; every error that a user can cause is one line on standard error."""
    run_command(
        "router-train",
        partial(app, standalone_mode=False),
        missing="install the extra 'train': pip install 'llm-difficulty-router[train]'",
    )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"router-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="routellm-mmlu, routerbench, … (a wrong one lists all).")
    ],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The original's file or folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE")],
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="A model's name; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a public labelled set and write it as a dataset."""
    from training.sources import convert as run

    names = {}
    for pair in rename or ():
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--rename {pair}: expected OLD=NEW")
        names[old] = new
    report = run(source, path, out, names)
    say = _console().print
    say(f"{report.out}: {report.rows:,} of {report.read:,} rows", highlight=False)
    for why, count in report.left_out.items():
        say(f"  left out {count:,}: {why}", highlight=False)
    for name, quality in report.mean_quality.items():
        say(f"  mean quality {quality:.4f}  {name}", highlight=False)
    for note in report.notes:
        say(f"  {note}", highlight=False)
    if as_json:
        _emit({**asdict(report), "out": str(report.out)})


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="routellm-mmlu, alpacaeval, … (a wrong one lists all).")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("originals"),
) -> None:
    """Download a public original, resuming where an earlier run ended; checked by SHA-256."""
    from training.fetch import Progress as Fetching
    from training.fetch import fetch as run

    with _bars() as bars:
        rows: dict[str, Any] = {}

        def show(now: Fetching) -> None:
            if now.file not in rows:
                rows[now.file] = bars.add_task(f"{now.position}/{now.files} {now.file}")
            bars.update(rows[now.file], completed=now.done, total=now.total)

        report = run(name, out, show)
    console = _console()
    console.print(
        f"{len(report.files)} files of {report.name} in {out}; licence: {report.licence}", highlight=False
    )
    for path in report.unverified:
        console.print(f"  {path}: no hash is recorded for it; not verified", highlight=False)


@app.command()
def label(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help="Rows with prompt or messages, and a reference where there is a right answer.",
        ),
    ],
    weak: Weak,
    strong: Strong,
    out: Annotated[Path, typer.Option("--out", metavar="FILE")],
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="M", help="The grading model; --strong by default.")
    ] = None,
    pairwise: Annotated[
        bool,
        typer.Option("--pairwise/--graded", help="Compare the answers, in both orders, or grade each alone."),
    ] = True,
    prices_file: PricesOption = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="USD", help="Stop before spending more.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N")] = 8,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before spending.")] = False,
) -> None:
    """Make labels: both models answer each prompt; a row's reference says who is right, else a judge.

    Keys: the providers' own variables.
    """
    from router.dispatch import close_connections, complete
    from training.dataset import load_prompts
    from training.labels import Job, LabelReport, estimate, pending
    from training.labels import Progress as Labelling
    from training.labels import label as run
    from training.prices import load_prices

    rows = load_prompts(prompts)
    job = Job(weak, strong, judge or strong, pairwise)
    prices = load_prices(prices_file) if prices_file else {}
    waiting = pending(rows, job, out)
    console = _console()
    cost = estimate(waiting, prices, job)
    dollars = (
        f"about ${cost.cost:,.2f}, ${cost.highest:,.2f} at most"
        if cost.cost is not None
        else f"cost unknown: --prices has no price for {', '.join(cost.unpriced)}"
    )
    console.print(f"{cost.prompts:,} prompts to label, {cost.calls:,} calls: {dollars}", highlight=False)
    if waiting and not yes and not typer.confirm("Go on?", err=True):
        raise UsageError("nothing was spent")
    with _bars() as bars:
        bar = bars.add_task("labelling", total=len(rows))

        def show(now: Labelling) -> None:
            bars.update(
                bar, completed=now.done, description=f"labelling (${now.spent:.2f}, {now.failed} failed)"
            )

        async def work() -> LabelReport:
            try:
                return await run(
                    rows,
                    complete,
                    job,
                    out,
                    prices=prices,
                    budget=budget,
                    concurrency=concurrency,
                    progress=show,
                )
            finally:
                await close_connections()

        report = asyncio.run(work())
    console.print(
        f"{report.labelled:,} labelled ({report.resumed:,} before), {len(report.failed):,} failed, "
        f"{report.remaining:,} not tried, ${report.spent:.4f} spent",
        highlight=False,
    )
    if report.out is None:
        raise RouterError(f"{report.stopped or 'no row was labelled'}; what is done is in {report.partial}")


@app.command()
def crossval(
    datasets: Datasets,
    weak: Annotated[str | None, typer.Option("--weak", metavar="M")] = None,
    strong: Annotated[str | None, typer.Option("--strong", metavar="M")] = None,
    targets: TargetsOption = None,
    ladder: LadderOption = None,
    folds: Annotated[int, typer.Option("--folds", metavar="N", min=2)] = 5,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="Fold seeds to average over.")
    ] = 1,
    group_by: Annotated[
        str, typer.Option("--group-by", metavar="FIELD", help="group, domain or source.")
    ] = "group",
    encoder: EncoderOption = None,
    prices_file: PricesOption = None,
    seed: Seed = 0,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Cross-validate the router on a pair of models or, with --targets, several, beside baselines and the oracle.

    With --targets, --weak and --strong name a pair whose router stands beside the others.
    """
    from training.evaluation import crossval as run
    from training.evaluation import groups_by, pair_rows
    from training.ladder import crossval_targets

    title = f"{folds} folds by {group_by}"
    if targets or ladder:
        if repeats > 1:
            raise UsageError("--repeats goes with --weak and --strong alone")
        names = _targets(None, None, targets, ladder, prices_file)
        pair = _targets(weak, strong, None) if weak or strong else None
        dataset = _priced(_load(datasets, names, skip_bad_rows, _steps(ladder)), prices_file)
        _check_order(dataset)
        groups = groups_by(dataset, group_by)
        features = _features(dataset, _encoder(encoder))
        with _bars() as bars:
            bar = bars.add_task("cross-validating", total=folds)
            measured = crossval_targets(
                dataset,
                features,
                pair=(pair[0], pair[1]) if pair else None,
                folds=folds,
                groups=groups,
                seed=seed,
                progress=lambda: bars.advance(bar),
            )
        _show_ladder(measured, title, as_json)
        return
    weak, strong = _targets(weak, strong, None)
    dataset = _load(datasets, (weak, strong), skip_bad_rows)
    dataset = _priced(pair_rows(dataset, weak, strong), prices_file)
    groups = groups_by(dataset, group_by)
    features = _features(dataset, _encoder(encoder))
    with _bars() as bars:
        bar = bars.add_task("cross-validating", total=folds * repeats)
        report = run(
            dataset,
            features,
            folds=folds,
            repeats=repeats,
            groups=groups,
            seed=seed,
            progress=lambda: bars.advance(bar),
        )
    _show(report, f"{title} × {repeats}", as_json)


@app.command()
def fit(
    datasets: Datasets,
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    weak: Annotated[str | None, typer.Option("--weak", metavar="M")] = None,
    strong: Annotated[str | None, typer.Option("--strong", metavar="M")] = None,
    targets: TargetsOption = None,
    ladder: LadderOption = None,
    encoder: EncoderOption = None,
    prices_file: PricesOption = None,
    no_neighbours: Annotated[
        bool,
        typer.Option(
            "--no-neighbours", help="Keep no embedding of a training prompt: leaves the kernel part out."
        ),
    ] = False,
    seed: Seed = 0,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Train a bundle."""
    from router.bundle import check_destination
    from training.card import flagged_words
    from training.estimator import INNER_FOLDS, STACKED
    from training.train import fit as run

    names = _targets(weak, strong, targets, ladder, prices_file)
    check_destination(out)
    dataset = _priced(_load(datasets, names, skip_bad_rows, _steps(ladder)), prices_file)
    _check_order(dataset)
    chosen = _encoder(encoder)
    features = _features(dataset, chosen)
    parts = tuple(part for part in STACKED if not (no_neighbours and part == "kernel"))
    with _bars() as bars:
        bar = bars.add_task("fitting", total=INNER_FOLDS + 1)
        result = run(
            dataset,
            features,
            chosen,
            out,
            seed=seed,
            parts=parts,
            command="router-train " + shlex.join(sys.argv[1:]),
            progress=lambda: bars.advance(bar),
        )
    console = _console()
    if result.report is not None:
        _show(result.report, "out of fold")
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(
        f"of held-out rows like these {flagged_words(result.novelty)} are flagged as unfamiliar",
        highlight=False,
    )
    threshold = result.bundle.manifest.thresholds["default"]
    console.print(
        f"{out}: {result.bundle.manifest.id}, threshold {threshold.value:.4f} ({threshold.how})",
        highlight=False,
    )
    if as_json:
        _emit({"bundle": str(out), **result.bundle.manifest.model_dump(mode="json")})


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    datasets: Datasets,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            "--rename",
            metavar="OLD=NEW",
            help="A model of the rows, named as the bundle's target; repeatable.",
        ),
    ] = None,
    ladder: LadderOption = None,
    prices_file: PricesOption = None,
    seed: Seed = 0,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle on rows that it has not seen."""
    from training.evaluation import evaluate as run
    from training.ladder import evaluate_targets

    predictor = _predictor(bundle)
    dataset = _rows_for(predictor.targets, datasets, rename, ladder, prices_file, skip_bad_rows)
    features = _features(dataset, predictor.encoder)
    if len(predictor.targets) > 2:
        _show_ladder(evaluate_targets(predictor, dataset, features, seed=seed), predictor.name, as_json)
        return
    _show(run(predictor, dataset, features, seed=seed), predictor.name, as_json)


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    datasets: Datasets,
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality", metavar="X", help="Least share of strong's (the best target's) quality, as .95."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            "--confidence", metavar="X", help="Promise --quality for new rows, this surely, as .95."
        ),
    ] = None,
    strong_share: Annotated[
        float | None, typer.Option("--strong-share", metavar="X", help="Share of calls to strong, as .3.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option("--max-cost", metavar="USD", help="Per 1,000 requests; needs costs or --prices."),
    ] = None,
    rename: Annotated[list[str] | None, typer.Option("--rename", metavar="OLD=NEW")] = None,
    ladder: LadderOption = None,
    prices_file: PricesOption = None,
    write: Annotated[bool, typer.Option("--write", help="Make it the bundle's threshold.")] = False,
    write_bar: Annotated[
        bool,
        typer.Option(
            "--write-bar", help="With --quality: keep it beside, for a policy that says 'quality: X'."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="The curve as PNG, SVG or PDF.")
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Choose the threshold by quality, strong share or cost, on rows that the bundle has not seen."""
    from training.ladder_threshold import tune_targets
    from training.train import as_threshold, write_threshold
    from training.train import tune as run

    if sum(goal is not None for goal in (quality, strong_share, max_cost)) != 1:
        raise UsageError("give one of --quality, --strong-share and --max-cost")
    if confidence is not None and quality is None:
        raise UsageError("--confidence goes with --quality")
    if write_bar and quality is None:
        raise UsageError("--write-bar goes with --quality")
    written = write or write_bar
    predictor = _predictor(bundle)
    several = len(predictor.targets) > 2
    if several and (strong_share is not None or plot is not None):
        option = "--plot" if strong_share is None else "--strong-share"
        raise UsageError(
            f"{option} is for bundles with two targets, and this one has {len(predictor.targets)}; "
            "tune it by --quality or --max-cost"
        )
    dataset = _rows_for(predictor.targets, datasets, rename, ladder, prices_file, skip_bad_rows)
    features = _features(dataset, predictor.encoder)
    if several:
        tuned = tune_targets(
            predictor, dataset, features, quality=quality, confidence=confidence, max_cost=max_cost
        )
        _tell(tuned)
        if written:
            threshold = tuned.for_manifest("rows not trained on")
            write_threshold(bundle, threshold, quality=quality, default=write)
            _console().print(f"  written to {bundle}", highlight=False)
        if as_json:
            _emit({**tuned.as_dict(), "written": written, "bundle": predictor.name})
        return
    result = run(
        predictor,
        dataset,
        features,
        quality=quality,
        confidence=confidence,
        strong_share=strong_share,
        max_cost=max_cost,
        plot=plot,
    )
    chosen = result.chosen
    console = _console()
    seen = f"; {result.seen:,} rows left out, the bundle was trained on them" if result.seen else ""
    console.print(f"threshold {chosen.threshold:.4f}: {chosen.how}{seen}", highlight=False)
    console.print(
        f"  {chosen.strong_share:.1%} of calls to {predictor.targets[1]}, quality {chosen.quality:.4f} = "
        f"{chosen.quality / result.strong_quality:.1%} of always-strong; random needs {result.random_share:.1%} for that"
        if chosen.quality is not None
        else f"  {chosen.strong_share:.1%} of calls to {predictor.targets[1]}",
        highlight=False,
    )
    if chosen.cost is not None:
        console.print(f"  ${1000 * chosen.cost:.4f} per 1,000 requests", highlight=False)
    if written:
        threshold = as_threshold(chosen, result.strong_quality, "rows not trained on")
        write_threshold(bundle, threshold, quality=quality, default=write)
        console.print(f"  written to {bundle}", highlight=False)
    if plot:
        console.print(f"  plot: {plot}", highlight=False)
    if as_json:
        _emit(
            {
                **chosen.as_dict(),
                "strong_quality": result.strong_quality,
                "seen": result.seen,
                "written": written,
                "bundle": predictor.name,
            }
        )


@app.command()
def benchmark(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", envvar="ROUTER_BENCH_DATA", help="The public originals."),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="Fold seeds to average over.")
    ] = 20,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,…", help="mmlu, gsm8k, … (a wrong one lists all).")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            metavar="PYTHON",
            envvar="ROUTER_PEERS",
            help="The interpreter of the environment with UncommonRoute: .venv-peers/bin/python (make peers).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="REPORT.md", help="The tables, with the curves beside it as PNG."),
    ] = None,
    encoder: EncoderOption = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the router beside other routers on public labels: the same rows, the same folds."""
    from training.benchmark import benchmark as run
    from training.plot import plot_methods
    from training.tables import benchmark_markdown, benchmark_tables

    if data is None:
        raise UsageError("give --data, the folder with the public originals, or set ROUTER_BENCH_DATA")
    if out is not None and (out.suffix.lower() != ".md" or not out.absolute().parent.is_dir()):
        raise UsageError(f"{out}: expected a file REPORT.md in a folder that exists")
    names = tuple(name.strip() for name in (only or "").split(",") if name.strip())
    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        result = run(
            data, _encoder(encoder), only=names, repeats=repeats, seed=seed, peers=peers, progress=show
        )
    console = _console(wide=200)
    for table in benchmark_tables(result):
        console.print(table)
        console.print()
    for name, why in result.skipped.items():
        console.print(f"skipped {name}: {why}", style="yellow", highlight=False)
    if out is not None:
        panels = [
            (table.title, {line.method: line.curve for line in table.lines if line.curve is not None})
            for table in result.tables
            if table.drawn
        ]
        picture = out.with_suffix(".png")
        if panels:
            plot_methods(picture, panels)
        text = benchmark_markdown(
            result, "router-train " + shlex.join(sys.argv[1:]), picture.name if panels else ""
        )
        out.write_text(text, encoding="utf-8")
        console.print(f"report: {out}", highlight=False)
    if as_json:
        _emit(result.as_dict())


@app.command("export-encoder")
def export_encoder(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A sentence-transformers model by path or name.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", min=1, help="Keep the first N layers only.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What manifests call it.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="TEXT", help="Where it comes from; MODEL by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a sentence-transformers model into an int8 ONNX encoder, and measure how well it agrees."""
    from training.export import export_encoder as run

    agreement = run(model, out, layers=layers, name=name, source=source)
    _console().print(
        f"{out}: mean cosine with the original {agreement.mean:.4f}, worst {agreement.worst:.4f}, over {agreement.n} texts",
        highlight=False,
    )
    if as_json:
        _emit(asdict(agreement))


def _targets(
    weak: str | None,
    strong: str | None,
    targets: str | None,
    ladder: str | None = None,
    prices_file: Path | None = None,
) -> tuple[str, ...]:
    """The targets that a call names; a list of them, in the order of their prices where these are given."""
    listed = targets or (None if weak or strong else ladder)
    if listed and not (weak or strong):
        names = _names(listed)
    elif weak and strong and not listed:
        names = (weak, strong)
    else:
        raise UsageError("give --weak and --strong, or --targets")
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"targets {', '.join(names)}: at least two different ones are needed")
    if prices_file and listed:
        from training.prices import by_price, load_prices

        names = by_price(names, load_prices(prices_file))
    return names


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _steps(ladder: str | None) -> tuple[str, ...] | None:
    return _names(ladder) if ladder else None


def _check_order(dataset: Dataset) -> None:
    """Warn where the rows' costs say that the targets do not stand cheapest first."""
    import numpy as np

    known = np.isfinite(dataset.cost).all(axis=1)
    means = dataset.cost[known].mean(axis=0) if known.any() else np.zeros(len(dataset.targets))
    if (np.diff(means) < 0).any():
        order = ",".join(dataset.targets[t] for t in np.argsort(means, kind="stable"))
        _console().print(
            f"warning: targets are to be named cheapest first; by the rows' mean costs that is {order}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _load(
    paths: Sequence[Path],
    targets: Sequence[str] | None,
    skip_bad_rows: bool,
    ladder: Sequence[str] | None = None,
) -> Dataset:
    from training.dataset import load_dataset

    dataset = load_dataset(paths, targets=targets, ladder=ladder, skip_bad_rows=skip_bad_rows)
    console = _console()
    if dataset.report.skipped:
        console.print(f"{len(dataset.report.skipped):,} bad rows skipped:", style="yellow", highlight=False)
        for bad in dataset.report.skipped:
            console.print(f"  {bad}", style="yellow", highlight=False, soft_wrap=True)
    if dataset.report.extra_fields:
        extra = ", ".join(f"{name} ({count:,} rows)" for name, count in dataset.report.extra_fields.items())
        console.print(f"fields that are not read: {extra}", style="dim", highlight=False)
    return dataset


def _rows_for(
    targets: tuple[str, ...],
    paths: Sequence[Path],
    rename: Sequence[str] | None,
    ladder: str | None,
    prices_file: Path | None,
    skip_bad_rows: bool,
) -> Dataset:
    """Rows of a bundle's targets, with the rows' model names told by ``--rename``; of a pair those with both labels."""
    from dataclasses import replace

    from training.evaluation import pair_rows

    names = {}
    for pair in rename or ():
        old, equals, new = pair.partition("=")
        if not (old and equals and new in targets):
            raise UsageError(f"--rename {pair}: expected OLD=NEW with NEW one of {', '.join(targets)}")
        names[new] = old
    dataset = _load(paths, [names.get(target, target) for target in targets], skip_bad_rows, _steps(ladder))
    dataset = replace(dataset, targets=targets)
    if len(targets) == 2:
        dataset = pair_rows(dataset, targets[0], targets[1])
    return _priced(dataset, prices_file)


def _priced(dataset: Dataset, prices_file: Path | None) -> Dataset:
    if prices_file is None:
        return dataset
    from training.prices import load_prices, with_costs

    return with_costs(dataset, load_prices(prices_file))


def _encoder(location: str | None) -> Encoder:
    from router.bundle import default_encoder_dir
    from router.features import load_encoder

    return load_encoder(location or default_encoder_dir())


def _predictor(bundle: Path) -> Predictor:
    from router.predictor import load_predictor

    if not bundle.is_dir():
        raise UsageError(f"{bundle}: no such bundle directory")
    return load_predictor(bundle)


def _features(dataset: Dataset, encoder: Encoder) -> Features:
    from training.train import features_of

    with _bars() as bars:
        bar = bars.add_task("embedding", total=len(dataset))
        return features_of(dataset, encoder, progress=lambda n: bars.advance(bar, n))


def _show(report: Report, title: str, as_json: bool = False) -> None:
    from training.tables import report_tables

    console = _console()
    for table in report_tables(report, title):
        console.print(table)
        console.print()
    if as_json:
        _emit(report.as_dict())


def _show_ladder(report: LadderReport, title: str, as_json: bool) -> None:
    from training.tables import ladder_tables

    console = _console()
    for table in ladder_tables(report, title):
        console.print(table)
        console.print()
    if as_json:
        _emit(report.as_dict())


def _tell(tuned: LadderThreshold) -> None:
    """A threshold for several targets, in words."""
    left_out = [
        f"{count:,} rows left out, {why}"
        for count, why in (
            (tuned.seen, "the bundle was trained on them"),
            (tuned.incomplete, "they lack a target's label"),
        )
        if count
    ]
    say = _console().print
    say("; ".join([f"threshold {tuned.threshold:.4f}: {tuned.how}", *left_out]), highlight=False)
    ratio = (
        f" = {tuned.quality / tuned.best_single_quality:.1%} of {tuned.best_single}"
        if tuned.best_single_quality
        else ""
    )
    calls = ", ".join(f"{name} {share:.1%}" for name, share in tuned.shares.items() if share)
    say(f"  quality {tuned.quality:.4f}{ratio}; calls: {calls}", highlight=False)
    if tuned.cost is not None and tuned.best_single_cost is not None:
        say(
            f"  ${1000 * tuned.cost:.4f} per 1,000 requests; {tuned.best_single} alone ${1000 * tuned.best_single_cost:.4f}",
            highlight=False,
        )


def _console(wide: int = 140) -> Console:
    # A table must not be cut where nobody can widen the window.
    return Console(stderr=True, width=None if sys.stderr.isatty() else wide)


@contextmanager
def _bars() -> Iterator[Progress]:
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # in a log it would leave empty lines
    ) as bars:
        yield bars


def _emit(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
