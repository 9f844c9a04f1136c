"""Do what the Dockerfile says, without an engine: the same files, the same commands, the same user and healthcheck.

Run by ``make test-image``; not a test module of its own, since it installs for a minute. What only an engine can do, to
build on the base image and to run in namespaces, is not tried. Prints what it measured and fails where a step fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_deployment import ROOT, of

READY_SECONDS = 120
USER = 10001


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="image-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        source, target, state = (folder / name for name in ("src", "router", "state"))
        source.mkdir()
        state.mkdir()
        for said in of("COPY"):
            if "--from" not in said:
                *names, _ = shlex.split(said)
                for name in names:
                    copy(ROOT / name, source)
        for said in of("RUN")[: len([said for said in of("RUN") if "/opt/router" in said])]:
            words = [word.replace("/opt/router", str(target)) for word in shlex.split(said)]
            words[0] = base_python() if words[0] == "python" else words[0]
            subprocess.run(words, cwd=source, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(source)
        size = sum(path.lstat().st_size for path in target.rglob("*")) / 2**20
        print(f"/opt/router: {size:.0f} MB beside the base image")
        assert not list(target.rglob("site-packages/torch")), "no torch"
        serve(target, state)


def base_python() -> str:
    """A Python that another user may run, where there is one."""
    for path in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        if path is None:
            continue
        test = [path, "-c", "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"]
        user = USER if os.geteuid() == 0 else None
        try:
            if subprocess.run(test, user=user, group=user, capture_output=True, cwd="/").returncode == 0:
                return path
        except PermissionError:
            pass
    raise SystemExit("image_alone: no Python 3.11 that every user may run")


def copy(path: Path, folder: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, folder)


def serve(target: Path, state: Path) -> None:
    """Run the entry point as the image's user, in an environment that holds nothing else, and its healthcheck."""
    text = " ".join(of("ENV")).replace("$PATH", os.environ["PATH"])
    environment = dict(re.findall(r"(\w+)=(\S+)", text.replace("/opt/router", str(target))))
    environment = {name: value.replace("/var/lib/router", str(state)) for name, value in environment.items()}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment["ROUTER_PORT"] = str(taken.getsockname()[1])
    user = USER if os.geteuid() == 0 else None
    if user is not None:
        os.chown(state, user, user)
    (entry,), (command,) = json.loads(of("ENTRYPOINT")[0]), json.loads(of("CMD")[0])
    [health] = of("HEALTHCHECK")
    check = json.loads(health.partition("CMD")[2])
    binaries = target / "bin"

    def run(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(binaries / words[0]), *words[1:]], env=environment, cwd=state, user=user, group=user,
            extra_groups=[] if user else None, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    # As it stands it refuses to serve anybody: an image that is started without clients' keys says what is missing.
    refused = run(entry, command)
    _, said = refused.communicate(timeout=READY_SECONDS)
    assert refused.returncode == 2, said
    assert "--clients" in said, said
    keys = run(entry, "keys", "new", "me", "--clients", str(state / "clients.yaml"))
    assert keys.wait(timeout=60) == 0
    environment["ROUTER_CLIENTS"] = str(state / "clients.yaml")
    environment["ROUTER_LEDGER"] = "default"
    started = time.monotonic()
    server = run(entry, command)
    try:
        while run(*check).wait(timeout=60) != 0:
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() - started < READY_SECONDS
            time.sleep(0.1)
        print(f"healthy after {time.monotonic() - started:.1f} s, as user {user or os.geteuid()}")
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
        assert server.returncode in (0, -signal.SIGTERM), said
    finally:
        if server.poll() is None:
            server.kill()
    kept = sorted(str(path.relative_to(state)) for path in state.rglob("*") if path.is_file())
    print(f"SIGTERM ended it; it wrote {', '.join(kept)}")


if __name__ == "__main__":
    main()
