from __future__ import annotations

import asyncio
import logging
import os
import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from provider import serve
from running import WordPredictor
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.app import create_app
from router.errors import BundleError, PolicyError, SourceError, UsageError
from router.fetch import Document, Fetcher, FetchError
from router.gateway import Gateway, load_gateway
from router.live import Live, signature
from router.policy import Policy, parse_policy
from router.settings import Settings, load_settings, policy_source
from router.sources import FileSource, UrlSource
from router.trust import Trust

SIGNALS = """\
version: 1
targets: {{a: {{echo: true}}, b: {{echo: true}}}}
tiers: {{auto: {{default: {0}}}}}
default_tier: auto
"""
PREDICTS = """\
version: 1
targets: {a: {echo: true}, b: {echo: true}, c: {echo: true}}
tiers: {auto: {predict: {weak: a, strong: b}}}
default_tier: auto
"""
PREDICTS_THREE = PREDICTS.replace("{weak: a, strong: b}", "{targets: {small: a, mid: b, big: c}}")
A, B = SIGNALS.format("a"), SIGNALS.format("b")
WRONG = A.replace("default: a", "default: z")


class Ladder(WordPredictor):
    name = "ladder@0"
    targets = ("small", "mid", "big")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines of the log, warnings and up marked."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(("! " if record.levelno >= logging.WARNING else "  ") + record.getMessage())

    handler = Lines()
    logger = logging.getLogger("router")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def metric(gateway: Gateway, name: str) -> float:
    lines = [line for line in gateway.metrics.text().decode().splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0


def reloads(gateway: Gateway, what: str = "policy") -> tuple[float, ...]:
    results = ("ok", "invalid", "unreachable")
    return tuple(metric(gateway, f'router_{what}_reloads_total{{result="{result}"}}') for result in results)


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A live gateway on a policy file and a bundle's directory, asked by hand."""

    def __init__(self, folder: Path, text: str, predictor: WordPredictor | None = None) -> None:
        self.path = folder / "policy.yaml"
        self.path.write_text(text)
        self.bundle = folder / "bundle"
        self.bundle.mkdir()
        (self.bundle / "manifest.json").write_text("0")
        self.clock = Clock()
        policy = parse_policy(text.encode(), "start")
        self.gateway = Gateway(policy, predictor, {})
        self.live = Live(
            self.gateway, policy, FileSource(self.path, settle=0.001), self.bundle, clock=self.clock
        )

    @property
    def version(self) -> str:
        return self.gateway.in_force.version

    def look(self, *texts: str) -> None:
        """Look at the policy, after each of some texts is written."""
        for text in texts:
            self.path.write_text(text)
            asyncio.run(self.live.look_at_policy())
        if not texts:
            asyncio.run(self.live.look_at_policy())

    def look_at_bundle(self) -> None:
        (self.bundle / "manifest.json").write_text((self.bundle / "manifest.json").read_text() + "0")
        asyncio.run(self.live.look_at_bundle())


def version(text: str) -> str:
    return parse_policy(text.encode(), "x").hash


# A policy file.


def test_a_changed_file_is_in_force(tmp_path: Path, log: list[str]) -> None:
    rig = Rig(tmp_path, A)
    before = rig.gateway.in_force
    rig.look()
    assert rig.gateway.in_force is before
    rig.clock.now += 60
    rig.look(B)
    assert rig.version == version(B) != version(A)
    assert before.version == version(A)  # what a request has taken does not change
    assert rig.live.report()["policy_since"] == "2023-11-14T22:14:20Z"
    assert reloads(rig.gateway) == (1, 0, 0)
    assert log == [f"  policy: {version(B)} is in force now"]
    rig.look("# only a comment\n" + B)
    assert (reloads(rig.gateway), len(log)) == ((1, 0, 0), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WRONG.encode(), "policy.yaml:3: tiers.auto.default: no target is named z"),
        (A[: len(A) // 2].encode(), "policy.yaml"),
        (b"", "a policy is a mapping"),
        (b"version: 1\n# caf\xe9", "UTF-8"),
        (A.encode() + b"#" * 2**20, "over the limit of 1,048,576 bytes"),
        (PREDICTS_THREE.encode(), "the bundle predicts weak, strong"),
        (None, "no policy can be read there"),
    ],
)
def test_a_bad_file_changes_nothing_but_log_metric_and_readiness(
    tmp_path: Path, content: bytes | None, message: str, log: list[str]
) -> None:
    rig = Rig(tmp_path, A, WordPredictor())
    rig.look()
    rig.clock.now += 100
    for _ in range(3):
        rig.path.unlink() if content is None and rig.path.exists() else None
        if content is not None:
            rig.path.write_bytes(content)
        rig.look()
    assert rig.version == version(A)
    assert len(log) == 1, log  # one line a change, not one a poll
    assert log[0].startswith("! policy: the last good one stays in force: ")
    assert message in log[0]
    report = rig.live.report()
    assert message in report["policy_error"]
    assert report["policy_error_since"] == "2023-11-14T22:15:00Z"
    assert report["policy_since"] == "2023-11-14T22:13:20Z"
    assert reloads(rig.gateway) == ((0, 0, 3) if content is None else (0, 1, 0))
    assert metric(rig.gateway, "router_policy_age_seconds") == 100
    rig.look(A)
    assert "policy_error" not in rig.live.report()
    assert metric(rig.gateway, "router_policy_age_seconds") == 0
    assert log[1:] == ["  policy: the one in force is what its source says again"]
    assert reloads(rig.gateway)[0] == 0


def test_the_page_of_metrics_names_the_policy_in_force_and_no_other(tmp_path: Path) -> None:
    rig = Rig(tmp_path, A)
    rig.look(B, A, B)
    page = rig.gateway.metrics.text().decode()
    assert page.count("router_policy_info{") == 1
    assert f'router_policy_info{{version="{version(B)}"}} 1.0' in page


def test_links_that_are_swapped_as_a_config_map_s_are(tmp_path: Path) -> None:
    for name, text in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.yaml").write_text(text)
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "policy.yaml").symlink_to("data/policy.yaml")
    source = FileSource(tmp_path / "policy.yaml", settle=0)
    assert asyncio.run(source.poll()).hash == version(A)
    (tmp_path / "data.new").symlink_to("two")
    (tmp_path / "data.new").replace(tmp_path / "data")
    assert asyncio.run(source.poll()).hash == version(B)


def test_a_file_that_is_being_written_does_not_count_yet(tmp_path: Path) -> None:
    """The half that is there is a valid policy by itself, and waited for all the same."""
    path = tmp_path / "policy.yaml"
    path.write_text(A)
    source = FileSource(path, settle=0.15)
    first = source.load()

    async def write() -> Policy:
        with path.open("w") as file:
            file.write(B)
            file.flush()
            poll = asyncio.create_task(source.poll())
            await asyncio.sleep(0.05)
            file.write("limits: {prompts: 7}\n")
        return await poll

    assert asyncio.run(write()).limits.prompts == 7
    assert first.limits.prompts == 1000


def test_the_same_content_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(A)
    source = FileSource(path, settle=0)
    assert asyncio.run(source.poll()) is asyncio.run(source.poll())
    path.write_text(WRONG)
    errors = []
    for _ in range(2):
        with pytest.raises(PolicyError) as caught:
            asyncio.run(source.poll())
        errors.append(caught.value)
    assert errors[0] is errors[1]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.yaml")
    assert not FileSource(tmp_path / "policy.yaml").can_change


def test_a_policy_from_a_file_is_checked_where_the_settings_bind_keys(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    keyed = "{model: openai/x, api_key_env: SOME_KEY, api_base: https://some.example}"
    path.write_text(A.replace("{echo: true}", keyed, 1))
    assert policy_source(Settings(policy=path)).load()
    with pytest.raises(PolicyError, match=r"SOME_KEY may not be sent to some\.example"):
        policy_source(Settings(policy=path, allowed_keys="OTHER_KEY@some.example")).load()
    assert policy_source(Settings(policy=path, allowed_keys="SOME_KEY@some.example")).load()


# A bundle, and the two together.


def bundles(monkeypatch: pytest.MonkeyPatch, *loaded: Any) -> list[Any]:
    """What loading gives, one after another; errors are raised."""
    queue = list(loaded)

    def load(path: Path) -> Any:
        found = queue.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("router.predictor.load_predictor", load)
    return queue


def test_a_changed_bundle_is_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    rig = Rig(tmp_path, PREDICTS, WordPredictor())
    other = WordPredictor()
    other.threshold = 0.7
    queue = bundles(monkeypatch, other)
    asyncio.run(rig.live.look_at_bundle())
    assert len(queue) == 1  # nothing has changed, nothing is loaded
    rig.look_at_bundle()
    assert rig.gateway.in_force.predictor is other
    predict = rig.gateway.in_force.policy.tiers["auto"].predict
    assert predict is not None
    assert predict.threshold == 0.7  # the policy is bound to the new one
    assert rig.version == version(PREDICTS)
    assert reloads(rig.gateway, "bundle") == (1, 0, 0)
    assert reloads(rig.gateway) == (0, 0, 0)
    assert log == ["  bundle: words@0 is in force now"]


def test_a_damaged_bundle_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    first, second = WordPredictor(), WordPredictor()
    rig = Rig(tmp_path, PREDICTS, first)
    bundles(monkeypatch, BundleError(f"{rig.bundle}: estimator.safetensors is missing"), second)
    rig.look_at_bundle()
    asyncio.run(rig.live.look_at_bundle())
    assert rig.gateway.in_force.predictor is first
    assert "estimator.safetensors is missing" in rig.live.report()["bundle_error"]
    assert reloads(rig.gateway, "bundle") == (0, 1, 0)
    rig.look(PREDICTS + "limits: {prompts: 7}\n")
    assert rig.gateway.in_force.policy.limits.prompts == 7
    assert "bundle_error" in rig.live.report()  # which a new policy does not mend
    rig.look_at_bundle()
    assert rig.gateway.in_force.predictor is second
    assert "bundle_error" not in rig.live.report()
    assert len(log) == 4


@pytest.mark.parametrize("policy_first", [True, False])
def test_policy_and_bundle_that_fit_only_one_another_come_in_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy_first: bool
) -> None:
    rig = Rig(tmp_path, PREDICTS, WordPredictor())
    ladder = Ladder()
    bundles(monkeypatch, ladder)
    steps: list[Callable[[], None]] = [lambda: rig.look(PREDICTS_THREE), rig.look_at_bundle]
    first, second = steps if policy_first else reversed(steps)
    first()
    assert rig.version == version(PREDICTS)
    assert isinstance(rig.gateway.in_force.predictor, WordPredictor)
    assert rig.gateway.in_force.predictor is not ladder
    wrong = "policy_error" if policy_first else "bundle_error"
    assert "the bundle predicts" in rig.live.report()[wrong]
    second()
    assert (rig.version, rig.gateway.in_force.predictor) == (version(PREDICTS_THREE), ladder)
    assert not [key for key in rig.live.report() if "error" in key]


def test_a_policy_that_fits_no_bundle_does_not_keep_a_new_bundle_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, PREDICTS, WordPredictor())
    other = WordPredictor()
    bundles(monkeypatch, other)
    rig.look(PREDICTS_THREE)
    rig.look_at_bundle()
    assert (rig.version, rig.gateway.in_force.predictor) == (version(PREDICTS), other)
    report = rig.live.report()
    assert "policy_error" in report
    assert "bundle_error" not in report


def test_the_bundle_is_loaded_with_the_first_policy_that_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, A)
    loaded = WordPredictor()
    bundles(monkeypatch, BundleError("it is damaged"), loaded)
    rig.look_at_bundle()
    assert rig.gateway.in_force.predictor is None
    rig.look(PREDICTS)
    assert rig.version == version(A)
    assert "it is damaged" in rig.live.report()["policy_error"]
    rig.look_at_bundle()
    assert (rig.version, rig.gateway.in_force.predictor) == (version(PREDICTS), loaded)
    assert "policy_error" not in rig.live.report()


def test_a_real_bundle_is_watched_by_its_files(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    policy = tmp_path / "policy.yaml"
    policy.write_text(PREDICTS)
    settings, found = load_settings(policy=str(policy), bundle=bundle)
    gateway = load_gateway(settings, found)
    live = gateway.live
    assert live is not None
    before = gateway.in_force
    estimator = (bundle / "estimator.safetensors").read_bytes()
    (bundle / "estimator.safetensors").write_bytes(estimator[:1000])
    asyncio.run(live.look_at_bundle())
    assert gateway.in_force is before
    assert "truncated or changed" in live.report()["bundle_error"]
    (bundle / "estimator.safetensors").write_bytes(estimator)
    asyncio.run(live.look_at_bundle())
    assert gateway.in_force.predictor is not before.predictor
    assert gateway.in_force.bundle == before.bundle
    assert "bundle_error" not in live.report()
    shutil.rmtree(bundle)
    assert signature(bundle) == ()
    asyncio.run(live.look_at_bundle())
    assert "no such bundle" in live.report()["bundle_error"]


# A policy from a URL.


class Site:
    """Serves a policy with an ETag; counts what it sends."""

    def __init__(self) -> None:
        self.content = A.encode()
        self.status = 200
        self.sent: list[int] = []
        self.url = ""
        self.app = Starlette(routes=[Route("/policy.yaml", self.get)])

    async def get(self, request: Request) -> Response:
        etag = f'"{hash(self.content)}"'
        status = self.status
        if status == 200 and request.headers.get("if-none-match") == etag:
            status = 304
        self.sent.append(status)
        body = self.content if status == 200 else b""
        return Response(body, status, {"etag": etag})


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    with serve(site.app) as url:
        site.url = f"{url}/policy.yaml?sig=s3cret"
        yield site


def started(site_url: str, folder: Path, **more: Any) -> Gateway:
    """A gateway as the command starts it."""
    settings, policy = load_settings(policy=site_url, state_dir=folder / "state", **more)
    return load_gateway(settings, policy)


def looked(gateway: Gateway) -> Live:
    assert gateway.live is not None
    asyncio.run(gateway.live.look_at_policy())
    return gateway.live


def test_a_url_is_asked_for_changes_alone(site: Site, tmp_path: Path) -> None:
    gateway = started(site.url, tmp_path)
    assert gateway.in_force.version == version(A)
    for _ in range(3):
        looked(gateway)
    site.content = B.encode()
    looked(gateway)
    looked(gateway)
    assert gateway.in_force.version == version(B)
    # One to start with, one of the server that runs.
    assert site.sent == [200, 200, 304, 304, 200, 304]
    assert gateway.live is not None
    assert gateway.live.report()["policy_source"] == site.url.removesuffix("?sig=s3cret")
    assert reloads(gateway) == (1, 0, 0)


def test_a_url_that_fails_leaves_the_last_good_policy(site: Site, tmp_path: Path, log: list[str]) -> None:
    gateway = started(site.url, tmp_path)
    looked(gateway)
    site.status = 500
    for _ in range(3):
        live = looked(gateway)
    assert live.report()["policy_error"] == f"{live.source.shown}: answers with status 500"
    site.status, site.content = 200, WRONG.encode()
    for _ in range(3):
        looked(gateway)
    assert "no target is named z" in live.report()["policy_error"]
    assert gateway.in_force.version == version(A)
    assert reloads(gateway) == (0, 1, 3)
    assert [line for line in log if line.startswith("!")] == log
    assert len(log) == 2
    site.content = A.encode()
    assert "policy_error" not in looked(gateway).report()
    assert "s3cret" not in str(log)


def test_the_last_good_policy_survives_a_restart_without_its_url(
    site: Site, tmp_path: Path, log: list[str]
) -> None:
    site.content = B.encode()
    looked(started(site.url, tmp_path))
    site.status = 503
    gateway = started(site.url, tmp_path)
    assert gateway.in_force.version == version(B)
    assert log[-1].endswith("answers with status 503; the policy that was last in force is taken instead")
    assert "status 503" in looked(gateway).report()["policy_error"]
    site.status = 200
    assert "policy_error" not in looked(gateway).report()
    site.status = 503
    with pytest.raises(SourceError, match="status 503; and no earlier policy from there is kept here"):
        started(site.url, tmp_path / "elsewhere")
    (kept,) = (tmp_path / "state" / "policies").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "s3cret" not in kept.read_text()


@pytest.mark.parametrize("content", [WRONG, PREDICTS_THREE], ids=["invalid", "not for this bundle"])
def test_a_restart_with_a_bad_policy_at_the_url_takes_the_last_good_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    bundles(monkeypatch, *[WordPredictor()] * 3)
    looked(started(site.url, tmp_path))
    site.content = content.encode()
    gateway = started(site.url, tmp_path)
    assert gateway.in_force.version == version(A)
    assert "policy_error" in looked(gateway).report()
    assert gateway.in_force.version == version(A)
    with pytest.raises(PolicyError):
        started(site.url, tmp_path / "elsewhere")


def test_a_policy_that_does_not_fit_the_bundle_is_not_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles(monkeypatch, WordPredictor())
    gateway = started(site.url, tmp_path, bundle=tmp_path)
    looked(gateway)
    site.content = PREDICTS_THREE.encode()
    assert "the bundle predicts weak, strong" in looked(gateway).report()["policy_error"]
    site.status = 503
    settings = Settings(policy=site.url, state_dir=tmp_path / "state")
    assert policy_source(settings).load().hash == version(A)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("harm", ["writable", "damaged", "stolen"])
def test_a_kept_policy_that_others_could_have_written_is_not_taken(
    site: Site, tmp_path: Path, harm: str, log: list[str]
) -> None:
    looked(started(site.url, tmp_path))
    (kept,) = (tmp_path / "state" / "policies").iterdir()
    if harm == "writable":
        kept.chmod(0o666)
    elif harm == "damaged":
        kept.write_text("{")
    else:  # another policy, put there; what it may do is checked again
        keyed = A.replace("{echo: true}", "{model: openai/x, api_key_env: OPENAI_API_KEY}", 1)
        kept.write_text(kept.read_text().replace(A.replace("\n", "\\n"), keyed.replace("\n", "\\n")))
    site.status = 503
    with pytest.raises(SourceError, match="no earlier policy"):
        started(site.url, tmp_path)
    assert "not used" in log[-1]


def test_a_policy_from_a_url_has_no_say_in_keys_and_settings(site: Site, tmp_path: Path) -> None:
    keyed = A.replace("{echo: true}", "{model: openai/x, api_key_env: OPENAI_API_KEY}", 1)
    site.content = keyed.encode()
    with pytest.raises(PolicyError, match="--allow-key"):
        started(site.url, tmp_path)
    assert started(site.url, tmp_path, allowed_keys="OPENAI_API_KEY").in_force.version == version(keyed)
    site.content = (A + "server: {host: 0.0.0.0}\n").encode()
    with pytest.raises(PolicyError, match="server: a policy from a URL has no such section"):
        started(site.url, tmp_path)


def test_a_url_that_fails_is_asked_less_and_less_often(tmp_path: Path) -> None:
    class Failing(Fetcher):
        async def fetch(self, url: str, known: Document | None = None) -> Document:
            raise FetchError("no")

    source = UrlSource("https://example.com/p.yaml", Trust(), Failing(), tmp_path, seconds=30)
    pauses = [source.pause]
    for _ in range(8):
        with pytest.raises(SourceError):
            asyncio.run(source.poll())
        pauses.append(source.pause)
    for pause, expected in zip(pauses, (30, 60, 120, 240, 480, 600, 600, 600, 600), strict=True):
        assert expected * 0.9 <= pause <= expected * 1.1
    assert len({source.pause for _ in range(5)}) > 1  # servers that started together drift apart


def test_a_server_that_is_never_to_ask_does_not(tmp_path: Path) -> None:
    source = UrlSource("https://example.com/p.yaml", Trust(), Fetcher(), tmp_path, seconds=0)
    assert source.pause == 0


@pytest.mark.parametrize(
    "place", ["http://example.com/p.yaml", "ftp://example.com/p.yaml", "https://user:pw@example.com/p"]
)
def test_a_url_that_no_policy_comes_from_is_a_wrong_call(place: str) -> None:
    with pytest.raises(UsageError):
        load_settings(policy=place)


def test_worker_processes_get_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        policy="https://example.com/p.yaml?sig=a,b",
        allowed_keys="A@x.example,B@y.example",
        policy_allow_private=True,
        reload_seconds=2.5,
        state_dir=tmp_path,
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


# The server that follows.


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def follow(live: Live, body: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with live.following():
            await body()

    asyncio.run(run())


def test_following_goes_on_after_a_mistake_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    rig = Rig(tmp_path, A)
    rig.live.source = source = FileSource(rig.path, seconds=0.01, settle=0)
    poll = source.poll
    monkeypatch.setattr(source, "poll", lambda: 1 / 0)

    async def body() -> None:
        await until(lambda: bool(log))
        assert "ZeroDivisionError at " in log[0]
        monkeypatch.setattr(source, "poll", poll)
        rig.path.write_text(B)
        await until(lambda: rig.version == version(B))

    follow(rig.live, body)


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGHUP"), reason="there is no SIGHUP")
def test_sighup_looks_at_once(tmp_path: Path) -> None:
    import signal

    rig = Rig(tmp_path, A)
    rig.live.source = FileSource(rig.path, seconds=0, settle=0)  # never by itself
    before = signal.getsignal(signal.SIGHUP)

    async def body() -> None:
        rig.path.write_text(B)
        await asyncio.sleep(0.05)
        assert rig.version == version(A)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: rig.version == version(B))

    follow(rig.live, body)
    assert signal.getsignal(signal.SIGHUP) is before


def test_over_http_version_and_readiness(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(A)
    settings, found = load_settings(policy=policy, reload_seconds=0.02)
    gateway = load_gateway(settings, found)
    with serve(create_app(gateway=gateway)) as url, httpx.Client(base_url=url) as http:

        def until_ready(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            for _ in range(1000):
                ready = http.get("/readyz")
                assert ready.status_code == 200
                if condition(ready.json()):
                    return dict(ready.json())
            raise AssertionError(ready.text)

        answer = http.post("/v1/route", json={"prompt": "x"})
        assert answer.json()["policy"] == answer.headers["x-router-policy"] == version(A)
        assert http.post("/v1/route", content=b"{").headers["x-router-policy"] == version(A)
        policy.write_text(B)
        ready = until_ready(lambda state: state["policy"] == version(B))
        assert ready["policy_source"] == str(policy)
        assert "policy_error" not in ready
        answer = http.post("/v1/route", json={"prompt": "x"})
        assert (answer.json()["target"], answer.headers["x-router-policy"]) == ("b", version(B))
        policy.write_text(WRONG)
        ready = until_ready(lambda state: "policy_error" in state)
        assert ready["policy"] == version(B)
        assert "no target is named z" in ready["policy_error"]
        assert 'router_policy_reloads_total{result="ok"} 1.0' in http.get("/metrics").text


def test_a_request_sees_one_policy_from_beginning_to_end(tmp_path: Path) -> None:
    """It has arrived, its body has not; meanwhile another policy is put in force."""
    rig = Rig(tmp_path, A)
    app = create_app(gateway=rig.gateway)

    async def run() -> list[Any]:
        sent: list[Any] = []
        half = asyncio.Event()
        events = iter([b'{"prompt"', b': "x"}'])

        async def receive() -> dict[str, Any]:
            body = next(events, None)
            if body is None:
                await asyncio.sleep(3600)
            more = body == b'{"prompt"'
            if not more:
                half.set()
                await until(lambda: rig.version == version(B))
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/route",
            "raw_path": b"/v1/route",
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
        }
        request = asyncio.create_task(app(scope, receive, send))
        await half.wait()
        rig.path.write_text(B)
        await rig.live.look_at_policy()
        await request
        return sent

    head, body = asyncio.run(run())[:2]
    assert dict(head["headers"])[b"x-router-policy"].decode() == version(A) != rig.version
    assert b'"target":"a"' in body["body"]
