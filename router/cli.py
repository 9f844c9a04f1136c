"""The command ``router``."""

from __future__ import annotations

import errno
import json
import logging
import logging.config
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router import __version__
from router.errors import RouterError, UsageError, run_command

if TYPE_CHECKING:
    from rich.table import Table
    from sqlalchemy import Engine
    from uvicorn.supervisors import Multiprocess

    from router.features import Prompt
    from router.gateway import Gateway
    from router.ledger_store import Access
    from router.logs import Format
    from router.policy import Policy
    from router.predictor import Predictor
    from router.replay import Scenario
    from router.settings import Settings

logger = logging.getLogger("router")

app = typer.Typer(
    name="router",
    help="A learned LLM router: predicts whether a request needs a frontier model, and dispatches it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _group(name: str, text: str) -> typer.Typer:
    """Commands under one word of ``router``."""
    group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


policy_app = _group("policy", "Look at a policy without serving it.")


ledger_app = _group("ledger", "Look after the ledger: its schema, and the prompts that were captured.")

# Seconds that open streams get to end when the server is told to stop.
_GRACE_SECONDS = 30

# Read by numpy's linear algebra when it is imported. One prompt is .1 ms of work: sharing that out among threads
# costs more than it saves, and where other processes keep the cores busy, a hundred times as much.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="DIR", help="The bundle; the one that comes along by default."),
]

AllowKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-key",
        metavar="NAME[@HOST]",
        help="A variable that the policy may name as a key, and the host that it may be sent to; may be repeated. "
        "@HOST for requests without a key. By default a file may name any, a URL none.",
    ),
]

LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="A file or postgresql://…; ROUTER_LEDGER or the user's data directory by default.",
    ),
]

SinceOption = Annotated[
    str | None, typer.Option(help="2026-01-31, 2026-01-31T12:00, 7d, 24h, today, week, month, …; UTC.")
]
UntilOption = Annotated[
    str | None, typer.Option(help="As --since, and exclusive: a date is its first moment.")
]


def main() -> None:
    """Run the command; every error that a user can cause is one line on standard error."""
    for variable in _ONE_THREAD:
        os.environ.setdefault(variable, "1")
    run_command("router", partial(app, standalone_mode=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"router {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="FILE|URL", help="Targets, tiers, aliases and thresholds."),
    ] = None,
    bundle: BundleOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="8080 by default; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; 1 by default.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[
        str | None, typer.Option(metavar="FORM", help="text, by default, or json: an object a line.")
    ] = None,
    tracing: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="off, by default; on: spans go to OTEL_EXPORTER_OTLP_ENDPOINT; or propagate: providers are told too.",
        ),
    ] = None,
    clients: Annotated[
        Path | None,
        typer.Option(
            "--clients", metavar="FILE", help="Who may use the server; `router keys new` writes it."
        ),
    ] = None,
    open_to_anyone: Annotated[
        bool | None,
        typer.Option(
            "--open-to-anyone", help="Listen beyond this machine though there are no clients' keys."
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Record every request: a file, postgresql://…, or default: a file in the user's data directory.",
        ),
    ] = None,
    ledger_durability: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="batched, by default, or strict: recorded before its answer ends."),
    ] = None,
    session_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Share sessions with other servers and workers: redis://… or postgresql://…; each has its own by default.",
        ),
    ] = None,
    budget_store: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Where the policy's budgets are counted: a file, postgresql://… or redis://…; with the ledger by default.",
        ),
    ] = None,
    reload_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="How often policy and bundle are looked at for changes: 1 by default, 30 for a URL; 0 is never. "
            "SIGHUP does it at once.",
        ),
    ] = None,
    allow_key: AllowKeyOption = None,
    policy_allow_redirects: Annotated[
        bool | None, typer.Option("--policy-allow-redirects", help="Follow redirects of the policy's URL.")
    ] = None,
    policy_allow_private: Annotated[
        bool | None,
        typer.Option(
            "--policy-allow-private", help="The policy's URL may lead to an address that is not public."
        ),
    ] = None,
) -> None:
    """Serve the OpenAI-compatible API.

    Policy, bundle and settings are looked for in this order: flag, environment variable (ROUTER_POLICY,
    ROUTER_BUNDLE, ROUTER_HOST, ROUTER_PORT, ROUTER_WORKERS, ROUTER_LOG_LEVEL, ROUTER_LOG_FORMAT, ROUTER_TRACING,
    ROUTER_RELOAD_SECONDS, ROUTER_CLIENTS, ROUTER_OPEN_TO_ANYONE; ROUTER_ALLOWED_KEYS with commas), ./router.yaml,
    router.yaml in the user's configuration directory, what the package carries.
    """
    import uvicorn

    from router.app import create_app
    from router.exposure import check_exposure
    from router.gateway import load_gateway
    from router.logs import configuration
    from router.settings import load_settings

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server runs, and reloads on it
    settings, policy_found = load_settings(
        policy=policy,
        bundle=bundle,
        host=host,
        port=port,
        workers=workers,
        log_level=log_level,
        log_format=log_format,
        tracing=tracing,
        clients=clients,
        open_to_anyone=open_to_anyone,
        ledger=ledger,
        ledger_durability=ledger_durability,
        session_store=session_store,
        budget_store=budget_store,
        reload_seconds=reload_seconds,
        allowed_keys=_bindings(allow_key),
        policy_allow_redirects=policy_allow_redirects,
        policy_allow_private=policy_allow_private,
    )
    check_exposure(settings)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        log_config = configuration(settings.log_level, settings.log_format)
        logging.config.dictConfig(log_config)
        gateway = load_gateway(settings, policy_found)
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        _greet(_greeting(url, settings, gateway), settings.log_format)
        config: dict[str, Any] = {
            "log_config": log_config,
            "access_log": False,
            "server_header": False,
            "ws": "none",
            "timeout_graceful_shutdown": _GRACE_SECONDS,
        }
        if settings.workers == 1:
            server = uvicorn.Server(uvicorn.Config(create_app(settings, gateway), **config))
            server.run(sockets=[listener])
            return
        os.environ.update(settings.environment())
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            shared = stack.enter_context(tempfile.TemporaryDirectory(prefix="router-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
        factory = uvicorn.Config(
            "router.app:app_from_environment", factory=True, workers=settings.workers, **config
        )
        _workers()(factory, sockets=[listener]).run()


keys_app = _group("keys", "The keys of the server's clients: who may use it, for what, and how much.")

ClientsOption = Annotated[
    Path | None,
    typer.Option("--clients", metavar="FILE", help="The file of clients; ROUTER_CLIENTS names it too."),
]


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="The client's name, as it stands in the log.")],
    clients: ClientsOption = None,
    tiers: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tiers that it may ask for; all by default.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Targets that it may name itself; all by default, '' for none."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    threshold_override: Annotated[
        bool, typer.Option("--threshold-override", help="It may set x-router-threshold.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="It may ask why a request went where it went.")
    ] = False,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may see what shows other clients' traffic: /metrics.")
    ] = False,
) -> None:
    """Make a key for a client.

    The key is printed once, on standard output, and kept nowhere: the file holds its SHA-256. A running server
    reads the file again by itself.
    """
    from router.clients import new_client

    path = _clients_file(clients)
    key = new_client(
        path,
        name,
        tiers=_names(tiers),
        targets=_names(targets),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        threshold_override=threshold_override,
        explain=explain,
        admin=admin,
    )
    print(f"The key of {name}, which is shown this once; {path} holds its SHA-256:", file=sys.stderr)
    print(key)


@keys_app.command("list")
def keys_list(clients: ClientsOption = None) -> None:
    """Say who may use the server. To take a key back, take its entry out of the file."""
    from router.clients import load_clients

    for client in load_clients(_clients_file(clients)):
        said = client.model_dump(exclude={"id", "key_sha256"}, exclude_defaults=True)
        words = [
            name
            if value is True
            else f"{name}={','.join(sorted(value)) if isinstance(value, frozenset) else value}"
            for name, value in said.items()
        ]
        print("  ".join([client.id, *words]))


def _clients_file(given: Path | None) -> Path:
    named = os.environ.get("ROUTER_CLIENTS")
    path = given or (Path(named) if named else None)
    if path is None:
        raise UsageError("say which file holds the clients: --clients FILE, or ROUTER_CLIENTS")
    return path


def _bindings(allow_key: list[str] | None) -> str | None:
    """What ``--allow-key`` says, as ``ROUTER_ALLOWED_KEYS`` says it."""
    return ",".join(allow_key) if allow_key else None


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def decide(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT | -]", help="'-' reads a prompt, or JSONL, from standard input."),
    ] = None,
    bundle: BundleOption = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Allowed loss of quality; the bundle's own by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say which target a prompt would go to, without a server and without a policy.

    Rows of JSONL hold "prompt" or "messages". The score decides, as it does by the policy that comes along: a prompt
    unlike the training data is marked, and goes elsewhere only where a policy says so (`unknown`).
    """
    from router.bundle import default_bundle_dir
    from router.predictor import load_predictor

    if prompt is None and sys.stdin.isatty():
        raise UsageError("give a prompt, or - to read it from standard input")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    prompts, many = _read_prompts(text, rows=prompt in (None, "-"))
    folder = bundle
    if folder is None:
        named = os.environ.get("ROUTER_BUNDLE")
        folder = Path(named) if named else default_bundle_dir()
    predictor = load_predictor(folder)
    in_force = predictor.threshold if threshold is None else threshold
    decisions = [_decision(predictor, item, in_force) for item in prompts]
    if as_json:
        print(json.dumps({"decisions": decisions} if many else decisions[0]))
        return
    for decision in decisions:
        sign = ">" if decision["score"] > in_force else "≤"
        print(
            f"{decision['target']}  score {decision['score']:.4f} {sign} threshold {in_force:.4f}"
            + ("; unlike the training data" if decision["unfamiliar"] else "")
        )


@app.command()
def explain(
    request: Annotated[
        str, typer.Argument(metavar="REQUEST.json | -", help="The body of a request; '-' is standard input.")
    ],
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Found as the server finds it by default.")
    ] = None,
    bundle: BundleOption = None,
    header: Annotated[
        list[str] | None,
        typer.Option("--header", metavar="NAME=VALUE", help="A header of the request; may be repeated."),
    ] = None,
    allow_key: AllowKeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say step by step why a request goes where it goes; nothing is sent.

    The body is one of /v1/chat/completions or /v1/route; a session is not known here.
    """
    from router.explain import explain as run
    from router.gateway import load_gateway
    from router.schemas import read_route, route_answer
    from router.settings import load_settings

    headers = dict(map(_header, header or ()))
    content = _read_content(request)
    settings, found = load_settings(policy=policy, bundle=bundle, allowed_keys=_bindings(allow_key))
    in_force = load_gateway(settings, found, spends=False).in_force
    read = read_route(content, in_force.policy.limits)
    if read.many:
        raise UsageError("one prompt at a time, please: 'prompt' or 'messages' instead of 'prompts'")
    started = time.perf_counter()
    explained = run(read, headers, in_force)
    milliseconds = (time.perf_counter() - started) * 1e3
    if as_json:
        decision, bundle_id = explained.decision, in_force.bundle
        print(json.dumps(route_answer(decision, in_force.version, bundle_id, milliseconds, trail=True)))
        return
    for line in explained.lines():
        print(line)


@policy_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML, or JSON where the name ends in .json.")],
    bundle: BundleOption = None,
    allow_key: AllowKeyOption = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="For a server with a ledger: every target needs prices.")
    ] = False,
) -> int:
    """Say what is wrong with a policy, a line each with its line number; or what it says, where nothing is.

    The bundle is looked at too: whether it predicts the targets, and to the quality, that the policy asks for. So is
    what a server would ask for that is started with the same --allow-key, and with a ledger: ROUTER_ALLOWED_KEYS and
    ROUTER_LEDGER count as they do there.
    """
    from router.accounting import check_priced
    from router.errors import PolicyError
    from router.explain import shortcomings, summary
    from router.policy import parse_policy, placed
    from router.trust import Trust

    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: no policy can be read there ({error.strerror})") from None
    try:
        policy = parse_policy(content, file)
        predictor = _fit(policy, file, bundle) if policy.uses_prediction() else None
        allowed = _bindings(allow_key) or os.environ.get("ROUTER_ALLOWED_KEYS")
        if allowed is not None:
            Trust(allowed).check(policy, str(file))
        if ledger or os.environ.get("ROUTER_LEDGER"):
            check_priced(policy)
    except PolicyError as error:
        lines = placed(error.problems, content, file) if error.problems else [str(error)]
        for line in lines:
            print(line, file=sys.stderr)
        return 1
    print(f"{file}: valid, version {policy.hash}" + (f"; fits bundle {predictor}" if predictor else ""))
    for line in summary(policy):
        print(f"  {line}")
    for line in shortcomings(policy, os.environ):
        print(f"  warning  {line}")
    return 0


@policy_app.command()
def example() -> None:
    """Print a policy with public models and their prices, every field explained, to start one's own from."""
    from router.policy import example_policy_path

    print(example_policy_path().read_text(encoding="utf-8"), end="")


def _fit(policy: Policy, file: Path, bundle: Path | None) -> str:
    """The bundle that would be served with a policy; :class:`PolicyError` where the two do not fit."""
    from router.bundle import read_manifest
    from router.gateway import bound

    manifest = read_manifest(_bundle_of(policy, file, bundle))
    bound(policy, manifest)
    return manifest.id


def _bundle_of(policy: Policy, file: Path, flag: Path | None) -> Path:
    """The bundle's directory, as a server finds it that is given this policy."""
    from router.bundle import default_bundle_dir

    named = os.environ.get("ROUTER_BUNDLE")
    own = policy.server.bundle
    return flag or (Path(named) if named else file.parent / own if own else default_bundle_dir())


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise UsageError(f"--header {text}: expected NAME=VALUE")
    return name.strip().lower(), value.strip()


def _read_content(place: str) -> bytes:
    if place == "-":
        return sys.stdin.read().encode("utf-8", "surrogatepass")
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UsageError(f"{place}: no request can be read there ({error.strerror})") from None


@app.command()
def spend(
    ledger: LedgerOption = None,
    by: Annotated[
        str, typer.Option(help="mode, feature, tier, target, model, key, session, reason or day.")
    ] = "mode",
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Groups to show; 0 for all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated lines on standard output.")] = False,
) -> None:
    """Say where the money goes: tokens and dollars by group, most tokens first."""
    from router.spend import check_group, notes, read_spend, table

    if as_json and as_csv:
        raise UsageError("--json and --csv: one of the two")
    check_group(by)
    found = read_spend(_ledger(ledger), by=by, since=since, until=until, limit=limit)
    if as_json:
        print(json.dumps(found.as_json()))
    elif as_csv:
        print(found.as_csv(), end="")
    else:
        print(found.summary())
        if found.groups:
            _print_table(table(found))
        for note in notes(found):
            print(note, file=sys.stderr)


@app.command()
def budgets(
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Found as the server finds it by default.")
    ] = None,
    ledger: LedgerOption = None,
    budget_store: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE", help="As for serve; ROUTER_BUDGET_STORE, or with the ledger by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say how the budgets stand: spent, held, left, and how far it goes at this pace."""
    from router import budget_report
    from router.budget_store import open_store, store_beside
    from router.entry import now
    from router.ledger_store import ledger_url
    from router.settings import load_settings

    settings, found = load_settings(policy=policy, ledger=ledger, budget_store=budget_store)
    if found.budgets is None:
        raise UsageError(f"{settings.policy}: the policy has no budgets")
    where = settings.budget_store
    store = open_store(where) if where is not None else store_beside(ledger_url(settings.ledger))
    try:
        standings = budget_report.read_standings(found.budgets, store, now())
    finally:
        store.close()
    if as_json:
        print(json.dumps(budget_report.as_json(found.budgets, standings)))
        return
    from rich.console import Console

    print(budget_report.summary(standings))
    if standings:
        console = Console(highlight=False)
        console.print()
        console.print(budget_report.table(standings))


@app.command()
def replay(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[LEDGER|FILE.jsonl]",
            help="A ledger, or JSON lines with its fields; ROUTER_LEDGER or the user's data directory by default.",
        ),
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option("--policy", metavar="FILE", help="May be repeated.")
    ] = None,
    bundle: BundleOption = None,
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, help="In the place of those of the tiers' predictions.")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="TIER",
            help="Also: as if all requests but pinned ones had asked for this tier. May be repeated.",
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="mode, feature, key, session, tier, target, model, reason or day.")
    ] = "mode",
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Groups to show; 0 for all.")] = 20,
    moved: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each request that would have moved, as JSONL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what the same traffic would have cost under other policies; nothing is sent."""
    from router.history import read_history
    from router.replay import check_group, moves_table, notes, table
    from router.replay import replay as run

    check_group(by)
    if not policy:
        raise UsageError("say by which policy: --policy FILE")
    scenarios = list(_scenarios(policy, bundle, threshold, tier or []))
    start, end = _times(since, until)
    history = read_history(source if source is not None else _ledger(None), start, end)
    with ExitStack() as stack:
        file = None if moved is None else stack.enter_context(moved.open("w", encoding="utf-8"))
        found = run(history, scenarios, by, file)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    for line in found.lines():
        print(line)
    if not found.before.total.requests:
        return
    _print_table(table(found, limit))
    if (moves := moves_table(found)) is not None:
        _print_table(moves)
    for note in notes(found):
        print(note, file=sys.stderr)


def _scenarios(
    files: list[Path], folder: Path | None, threshold: float | None, tiers: list[str]
) -> Iterator[Scenario]:
    """Each policy as it is, and as if all requests asked for one of these tiers; policies of one bundle share it."""
    from router.policy import load_policy
    from router.replay import Bundle, Scenario, read_policy

    bundles: dict[Path, Bundle] = {}
    for file in files:
        policy = load_policy(file)
        bundle = None
        if policy.uses_prediction():
            place = _bundle_of(policy, file, folder)
            bundle = bundles.get(place) or bundles.setdefault(place, Bundle(place))
        for tier in (None, *tiers):
            own = read_policy(file, bundle, threshold)
            title = str(file) if tier is None else f"tier {tier}"
            if tier is not None and len(files) > 1:
                title += f" of {file}"
            yield Scenario(title, own, policy.hash, bundle, tier)


@app.command()
def traffic(
    requests: Annotated[int, typer.Option(min=1, max=10_000_000)] = 10_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    days: Annotated[int, typer.Option(min=1, max=1_000, help="Working days to spread them over.")] = 5,
    scale: Annotated[
        float,
        typer.Option(min=0.0001, max=10, help="Of all token counts: 0.1 makes contexts a tenth as long."),
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write them as `router replay` reads them.")
    ] = None,
    send: Annotated[
        str | None, typer.Option(metavar="URL", help="Send them to a running server, as fast as it answers.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Sessions at a time.")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="What all of them ask for; by default tiers of `router policy example`."),
    ] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variable with the key of a client of the server.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Ask for streamed answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What came back as one JSON object.")] = False,
) -> None:
    """Make up the traffic of a team of developers and their agents: to try policies on, or a server.

    The same numbers give the same traffic. Sent, it costs what the server's targets cost.
    """
    from router.workload import row
    from router.workload import traffic as make

    if out is None and send is None:
        raise UsageError("say what to do with it: --out FILE.jsonl or --send URL")
    made = partial(make, requests, seed=seed, days=days, scale=scale)
    if out is not None:
        if out.suffix != ".jsonl":
            raise UsageError(f"--out: {out} must end in .jsonl, by which `router replay` knows it")
        with out.open("w", encoding="utf-8") as file:
            for one in made():
                file.write(json.dumps(row(one), separators=(",", ":")) + "\n")
        print(f"{requests:,} requests in {out}", file=sys.stderr)
    if send is not None:
        import asyncio

        from router.sending import send as run

        key = None
        if key_env is not None and (key := os.environ.get(key_env)) is None:
            raise UsageError(f"--key-env: the variable {key_env} is not set")
        report = asyncio.run(run(made(), send, concurrency=concurrency, model=model, key=key, stream=stream))
        print(json.dumps(report.as_json()) if as_json else report)
        if not report.latencies:
            raise RouterError("no request was answered with 200")


def _print_table(view: Table) -> None:
    """A table as wide as it needs: names are to be copied, and a terminal breaks lines by itself."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, wide, view).maximum)
    console.print()
    console.print(view)


@ledger_app.command("migrate")
def migrate_ledger(ledger: LedgerOption = None) -> None:
    """Bring the ledger's schema up to this version; a server does so when it starts."""
    from router.ledger_migrations import VERSION, migrate

    with _opened(ledger, "write", migrated=False) as engine:
        found = migrate(engine)
    print(f"schema version {VERSION}" + (f", was {found}" if found != VERSION else "; nothing to do"))


@ledger_app.command("delete")
def delete_captures(
    ledger: LedgerOption = None,
    session: Annotated[str | None, typer.Option(help="A session, as the ledger knows it.")] = None,
    client: Annotated[str | None, typer.Option(help="The id of a client's key.")] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Take session and client off its rows too; their tokens stay.")
    ] = False,
) -> None:
    """Delete the captured prompts of a session or of a client."""
    from router.ledger_store import forget

    if (session is None) == (client is None):
        raise UsageError("give --session or --client")
    with _opened(ledger, "write") as engine:
        prompts, anonymous = forget(engine, session=session, client=client, rows=rows)
    print(f"{prompts} prompts deleted" + (f", {anonymous} rows made anonymous" if rows else ""))


@ledger_app.command("purge")
def purge_captures(
    ledger: LedgerOption = None,
    before: Annotated[
        str | None, typer.Option(help="Those captured before this time too: 2026-01-31, 30d, month, …")
    ] = None,
) -> None:
    """Delete the captured prompts whose time to be kept is over; a server does so by itself."""
    from datetime import UTC, datetime

    from router.entry import now
    from router.ledger_store import purge
    from router.spend import moment

    time_before = None if before is None else moment(before, datetime.now(UTC), "--before")
    with _opened(ledger, "write") as engine:
        gone = purge(engine, now(), before=time_before)
    print(f"{gone} prompts deleted")


@ledger_app.command("captures")
def print_captures(ledger: LedgerOption = None, since: SinceOption = None, until: UntilOption = None) -> None:
    """Print the captured prompts, each with its row, as JSONL on standard output."""
    from router.ledger_store import captured

    start, end = _times(since, until)
    with _opened(ledger) as engine:
        for row in captured(engine, since=start, until=end):
            print(json.dumps(row, ensure_ascii=False))


@ledger_app.command("export")
def export_prompts(ledger: LedgerOption = None, since: SinceOption = None, until: UntilOption = None) -> None:
    """Print the captured prompts as `router-train label` takes them: JSONL, each text once, on standard output."""
    from router.ledger_store import prompts_to_label

    start, end = _times(since, until)
    with _opened(ledger) as engine:
        for row in prompts_to_label(engine, since=start, until=end):
            print(json.dumps(row, ensure_ascii=False))


@ledger_app.command("check")
def check_ledger(ledger: LedgerOption = None) -> None:
    """Add up the rows again: their costs by their own prices, and the sums that `spend` reads."""
    from router.entry import NANO
    from router.ledger_store import check

    with _opened(ledger) as engine:
        found = check(engine)
    print(f"{found.rows:,} rows, ${found.cost / NANO:,.9f}, {found.tokens:,} tokens")
    if found.problems:
        raise RouterError("; ".join(found.problems))
    print("each cost follows from its tokens and prices, and the sums agree with the rows")


def _times(since: str | None, until: str | None) -> tuple[int | None, int | None]:
    from datetime import UTC, datetime

    from router.spend import moment

    now = datetime.now(UTC)
    return (
        None if since is None else moment(since, now, "--since"),
        None if until is None else moment(until, now, "--until"),
    )


def _ledger(flag: str | None) -> str | None:
    return flag if flag is not None else os.environ.get("ROUTER_LEDGER")


@contextmanager
def _opened(flag: str | None, access: Access = "read", *, migrated: bool = True) -> Iterator[Engine]:
    """The ledger's database; what goes wrong there is one line."""
    from router.ledger_migrations import check_version
    from router.ledger_store import database_errors, failed, ledger_url, open_engine

    url = ledger_url(_ledger(flag))
    engine = open_engine(url, access)
    try:
        if migrated:
            with engine.connect() as connection:
                check_version(connection)
        yield engine
    except database_errors() as error:
        raise failed(url, error) from None
    finally:
        engine.dispose()


def _decision(predictor: Predictor, prompt: Prompt, threshold: float) -> dict[str, Any]:
    started = time.perf_counter()
    prediction = predictor.predict([prompt])
    return {
        "target": predictor.targets[int(prediction.choose(threshold)[0])],
        "score": float(prediction.score[0]),
        "threshold": threshold,
        "reason": "predicted",
        "novelty": None if prediction.novelty is None else float(prediction.novelty[0]),
        "unfamiliar": bool(prediction.unfamiliar[0]),
        "quality": dict(zip(predictor.targets, map(float, prediction.quality[0]), strict=True)),
        "bundle": predictor.name,
        "decision_ms": round((time.perf_counter() - started) * 1e3, 3),
    }


def _read_prompts(text: str, *, rows: bool) -> tuple[list[Prompt], bool]:
    """The prompts in a text, and whether it is JSONL: its first line is an object, which is a row of ``rows``.

    Elsewhere an object without a prompt is one itself.
    """
    from router.features import prompt_from_text

    if not text.strip():
        raise UsageError("there is no prompt to decide on")
    lines = text.splitlines()
    first = next(line for line in lines if line.strip())
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and (rows or row.keys() & {"prompt", "messages"}):
        return list(_read_rows(lines)), True
    return [prompt_from_text(text)], False


def _read_rows(lines: list[str]) -> Iterator[Prompt]:
    from router.errors import RequestError
    from router.policy import Limits
    from router.schemas import read_route

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = read_route(line.encode("utf-8", "surrogatepass"), Limits())
        except RequestError as error:
            raise RouterError(f"standard input, line {number}: {error}") from None
        if row.many:
            raise RouterError(f"standard input, line {number}: one prompt a line, please")
        yield row.prompt(0)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that an address in use is an error before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = "that address is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise RouterError(f"cannot listen on {host}:{port}: {reason}; give another with --port") from None
    listener.set_inheritable(True)
    return listener


def _greeting(url: str, settings: Settings, gateway: Gateway) -> Iterator[str]:
    """What is served, and what is missing."""
    from router.exposure import for_this_machine

    policy = gateway.in_force.policy
    yield f"router {__version__} on {url}"
    shown = gateway.live.source.shown if gateway.live else settings.policy
    yield f"  policy   {shown} ({gateway.in_force.version})"
    yield f"  bundle   {gateway.in_force.bundle or 'none: the policy predicts nothing'}"
    if gateway.ledger is not None:
        yield f"  ledger   {gateway.ledger.url.render_as_string(hide_password=True)}"
        if policy.capture is not None:
            share, days = policy.capture.share, policy.capture.keep_days
            yield f"  capture  the prompts of {share:.3g} of the requests are kept there, for {days:g} days"
    if gateway.shared is not None:
        yield f"  sessions {gateway.shared.shown}"
    elif settings.workers > 1:
        yield "  warning  each worker has its own sessions: share them by --session-store redis://… or postgresql://…"
    if gateway.clients is not None:
        yield f"  clients  {settings.clients} ({len(gateway.clients)})"
    elif for_this_machine(settings):
        yield "  clients  none: whoever is on this machine may use it, and nobody else can reach it"
    else:
        yield "  warning  open to anyone who can reach it: they spend your providers' keys"
    for name, target in policy.targets.items():
        yield f"  target   {name}: {target.model}"
    for line in policy.missing_keys(os.environ):
        yield f"  warning  {line}"
    if all(target.echo for target in policy.targets.values()):
        yield "  These targets only echo what they are asked. To reach real providers, write a ./router.yaml with your"
        yield "  models and the variables that hold their keys (router policy example prints one), and start again."


def _workers() -> type[Multiprocess]:
    from uvicorn.supervisors import Multiprocess

    from router.metrics import forget_worker

    class Workers(Multiprocess):
        """Worker processes that are told of SIGHUP, where uvicorn's are replaced."""

        def keep_subprocess_alive(self) -> None:
            before = {process.pid for process in self.processes}
            super().keep_subprocess_alive()
            for pid in before - {process.pid for process in self.processes}:
                if pid is not None:
                    forget_worker(pid)

        def handle_hup(self) -> None:
            for process in self.processes:
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGHUP)

    return Workers


def _greet(lines: Iterator[str], form: Format) -> None:
    """Say to people, or to whatever reads the log, what is served."""
    for line in lines:
        if form == "text":
            print(line, file=sys.stderr)
        else:
            text = " ".join(line.split())
            logger.log(logging.WARNING if text.startswith("warning ") else logging.INFO, "%s", text)


if __name__ == "__main__":
    main()
