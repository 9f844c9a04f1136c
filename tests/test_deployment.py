"""The Dockerfile and the compose file, held to what they name; no engine is needed, and so none of it is run here."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.login import SECRET
from router.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, each with all its lines."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()
    ]


def of(name: str) -> list[str]:
    return [said for instruction, said in instructions() if instruction == name]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the top level from the build."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            verdict = not line.startswith("!")
    return verdict


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [source for said in of("COPY") if "--from" not in said for source in shlex.split(said)[:-1]]
    assert {"pyproject.toml", "constraints.txt", "router", "training", "models"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert ignored("tests")
    assert ignored(".git")


def test_all_that_the_wheel_takes_is_copied() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"]]
    copied = {source for said in of("COPY") if "--from" not in said for source in shlex.split(said)[:-1]}
    assert {path.split("/")[0] for path in needed} <= copied


def test_versions_are_pinned_and_extras_exist() -> None:
    import tomllib

    [install] = [said for said in of("RUN") if "pip install" in said]
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    extras = re.findall(r"\w+", words[-1].partition("[")[2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras
    assert set(extras) <= set(project["optional-dependencies"])
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            assert re.match(r"[\w-]+", requirement)[0] in pinned  # type: ignore[index]
    assert "torch" not in pinned


def test_it_is_not_root_and_starts_the_command() -> None:
    assert of("USER") == ["10001:10001"]
    assert [json.loads(said) for said in of("ENTRYPOINT") + of("CMD")] == [["router"], ["serve"]]
    [health] = of("HEALTHCHECK")
    command = json.loads(health.partition("CMD")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/readyz" in command[2]


def test_every_setting_is_one_of_the_server_s(compose: dict[str, Any]) -> None:
    known = {f"ROUTER_{name.upper()}" for name in Settings.model_fields} | {SECRET}
    said = set(re.findall(r"ROUTER_\w+(?==)", " ".join(of("ENV"))))
    said |= {name for name in compose["services"]["router"]["environment"] if name.startswith("ROUTER_")}
    assert {"ROUTER_HOST", "ROUTER_LEDGER", "ROUTER_SESSION_STORE", "ROUTER_CLIENTS"} <= said <= known


def test_services_are_pinned_watched_and_wait_for_one_another(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services.keys() == {"router", "balancer", "postgres", "redis"}
    for name, service in services.items():
        if "build" not in service:
            assert re.fullmatch(r"[\w/]+:\d[\w.-]+", service["image"]), name
            assert "healthcheck" in service, name
        for other, wait in service.get("depends_on", {}).items():
            assert other in services
            assert wait == {"condition": "service_healthy"}
    assert services["router"]["deploy"]["replicas"] == 2
    # uvicorn's own time, and some more; without it the engine kills after ten seconds.
    assert int(services["router"]["stop_grace_period"].removesuffix("s")) > 30


def test_secrets_come_from_the_environment(compose: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = (DEPLOY / "env.example").read_text()
    for variable, default in re.findall(r"\$\{(\w+):?([?-][^}]*)?\}", text):
        assert variable in example
        if "PASSWORD" in variable or "KEY" in variable:
            assert default in ("-", "?set it in .env"), variable
    assert not re.search(r"(?m)^[A-Z_]*(PASSWORD|KEY)=.", example)


def test_what_is_mounted_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"], source


def test_the_balancer_asks_whether_the_servers_are_ready(compose: dict[str, Any]) -> None:
    said = (DEPLOY / "haproxy.cfg").read_text()
    [port] = [
        value.rpartition("=")[2] for value in " ".join(of("ENV")).split() if value.startswith("ROUTER_PORT")
    ]
    assert re.search(rf"server-template router \d+ router:{port} ", said)
    assert "option httpchk GET /readyz" in said
    # Nothing that was sent is sent again: it may have been billed.
    assert re.findall(r"retry-on (.*)", said) == ["conn-failure"]
