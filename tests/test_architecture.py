"""What may import what; the text of the files decides, so that a lazy import counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import router

ROOT = Path(__file__).parent.parent
ROUTER = sorted((ROOT / "router").rglob("*.py"))
TRAINING = sorted((ROOT / "training").rglob("*.py"))
# Importing the server must not cost what only training or dispatch needs.
HEAVY = ("litellm", "torch", "sklearn", "pandas", "scipy", "joblib", "matplotlib", "sqlalchemy", "training")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each import of a file as (module, name); the name is empty where the module itself is imported."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*package.split(".")[: -node.level + 1 or None], *filter(None, [module])])
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            named = node.args[0]
            if isinstance(named, ast.Constant):
                yield str(named.value), ""
            elif isinstance(named, ast.JoinedStr):
                # router/__init__.py imports its own modules by name.
                assert ast.unparse(named).startswith("f'{__name__}."), f"{path}: {ast.unparse(named)}"


def top(module: str) -> str:
    return module.partition(".")[0]


def test_there_are_files_to_look_at() -> None:
    assert len(ROUTER) > 10
    assert len(TRAINING) > 10


@pytest.mark.parametrize("path", ROUTER, ids=lambda path: path.stem)
def test_router_never_imports_training(path: Path) -> None:
    assert not [module for module, _ in imports(path) if top(module) == "training"]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_training_imports_of_router_what_the_design_allows(path: Path) -> None:
    allowed = {f"router.{name}" for name in ("features", "bundle", "predictor", "errors", "dispatch")}
    for module, name in imports(path):
        if module == "router" and name:
            assert name == "__version__" or f"router.{name}" in allowed, f"from router import {name}"
        elif top(module) == "router" and module != "router":
            assert module in allowed, module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "router"
    }
    assert used <= {"__version__"}


def test_only_dispatch_imports_litellm() -> None:
    assert {
        path.name for path in ROUTER + TRAINING if any(top(m) == "litellm" for m, _ in imports(path))
    } <= {"dispatch.py", "peers.py"}  # the latter in a process of its own


def test_peers_are_imported_by_nobody_but_their_own_process() -> None:
    """training/peers.py names other routers inside functions that only its script runs."""
    tree = ast.parse((ROOT / "training" / "peers.py").read_text(encoding="utf-8"))
    modules = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {top(module) for module in modules} <= set(sys.stdlib_module_names)
    assert loaded_after("import training.peers") <= {"training"}


@pytest.mark.parametrize("path", ROUTER + TRAINING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nothing_loads_a_pickle(path: Path) -> None:
    loaders = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
    for module, name in imports(path):
        assert top(module) not in loaders
        assert (module, name) not in {("joblib", "load"), ("pandas", "read_pickle"), ("torch", "load")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr != "read_pickle"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


def test_every_name_of_the_public_api_resolves() -> None:
    for name in router.__all__:
        assert getattr(router, name) is not None
    assert len(set(router.__all__)) == len(router.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Bundel'"):
        router.Bundel  # noqa: B018


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded after ``code``."""
    report = "\nimport sys\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split()) & set(HEAVY)


def test_importing_the_server_loads_nothing_heavy() -> None:
    assert loaded_after("import router, router.app, router.cli, router.predictor") == set()


def test_predicting_loads_nothing_heavy(tiny_bundle: Path) -> None:
    code = (
        "from pathlib import Path; from router import load_predictor, prompt_from_text;"
        f"load_predictor(Path({str(tiny_bundle)!r})).predict([prompt_from_text('Why?')])"
    )
    assert loaded_after(code) == set()


def test_the_version_is_told_without_loading_numpy() -> None:
    report = "import sys, router; print(router.__version__, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [router.__version__, "False"]
