"""The repository keeps its own promises: imports, generated code, documents, versions."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> what importing all of it must not bring in
FORBIDDEN = {
    "hvp_folders": {
        *("torch", "ray", "grpc", "google", "numpy", "safetensors", "transformers"),
        *("hvp_protos", "hvp_client", "hvp_service", "hvp_workers", "hvp_core"),
    },
    "hvp_operations": {
        *("torch", "ray", "grpc", "transformers"),
        *("hvp_folders", "hvp_protos", "hvp_client", "hvp_service", "hvp_workers", "hvp_core"),
    },
    "hvp_protos": {"torch", "ray", "hvp_client", "hvp_service", "hvp_workers", "hvp_core"},
    "hvp_client": {"torch", "ray", "transformers", "hvp_service", "hvp_workers", "hvp_core"},
    "hvp_demo": {"ray", "hvp_core", "hvp_workers"},
    "hvp_service": {"torch", "ray", "transformers", "hvp_client", "hvp_core"},
    "hvp_core": {"ray", "grpc", "hvp_protos", "hvp_client", "hvp_service", "hvp_workers"},
    "hvp_workers": {"hvp_protos", "hvp_client", "hvp_service"},
}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
#: Imported one after the other: what the first brings in, the second may bring in too.
TOGETHER = [("hvp_core", "hvp_workers")]
ALONE = [(each,) for each in FORBIDDEN if not any(each in some for some in TOGETHER)]


@pytest.mark.parametrize("packages", [*ALONE, *TOGETHER], ids=" ".join)
def test_a_package_imports_only_what_the_architecture_allows(packages: tuple[str, ...]) -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *packages],
        check=True,
        capture_output=True,
        text=True,
    )
    answers = [set(json.loads(line)) for line in answer.stdout.splitlines()[-len(packages) :]]
    for package, loaded in zip(packages, answers, strict=True):
        assert package in loaded
        assert not loaded & FORBIDDEN[package]
    for before, after in pairwise(packages):
        assert FORBIDDEN[before] >= FORBIDDEN[after]


# room of hvp_core -> rooms it may import beside its own; every room may import the root's modules
ROOMS = {
    "": set(),
    "sharding": set(),
    "vectors": {"sharding"},
    "linop": {"sharding", "vectors"},
    "runs": {"sharding", "vectors", "linop"},
    "krylov": {"sharding", "vectors", "linop", "runs"},
    "stochastic": {"sharding", "vectors", "linop", "runs", "krylov"},
    "losses": set(),
    "attention": set(),
    "model": {"sharding", "vectors", "losses", "attention"},
    "model.huggingface": {"sharding", "vectors", "losses", "attention", "model"},
    "autodiff": {"sharding", "vectors", "losses", "attention", "model"},
    "curvature": {"sharding", "vectors", "linop", "losses", "attention", "model", "autodiff"},
}
LONGEST_CHAIN = 8  # modules of hvp_core, each imported by the one before


def test_no_modules_import_one_another_in_a_circle_at_any_time() -> None:
    graph = _imports(*FORBIDDEN)
    assert len(graph) > 100
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_room_of_the_core_imports_only_the_rooms_below_it() -> None:
    graph = _imports("hvp_core")
    assert {_room(module) for module in graph} == ROOMS.keys()
    crossings = {
        f"{module} imports {each}"
        for module, imported in graph.items()
        for each in imported
        if _room(each) not in {"", _room(module), *ROOMS[_room(module)]}
    }
    assert not crossings


def test_one_room_of_the_core_imports_transformers() -> None:
    users = {
        _room(module)
        for module, path in _modules("hvp_core").items()
        if any(name.partition(".")[0] == "transformers" for name in _imported(path))
    }
    assert users == {"model.huggingface"}


def test_no_chain_of_imports_in_the_core_is_long() -> None:
    graph = _imports("hvp_core")
    longest: dict[str, list[str]] = {}
    for module in TopologicalSorter(graph).static_order():  # what it imports comes first
        below = max((longest[each] for each in graph[module]), key=len, default=[])
        longest[module] = [module, *below]
    chain = max(longest.values(), key=len)
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def _room(module: str) -> str:
    """The folder of hvp_core that a module lies in."""
    folders = [f"hvp_core.{room}" for room in ROOMS if f"{module}.".startswith(f"hvp_core.{room}.")]
    return max(folders, key=len, default="hvp_core.").removeprefix("hvp_core.")


def _modules(*packages: str) -> dict[str, Path]:
    """Files of packages by the name of their module, generated ones left out."""
    files = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path
        for package in packages
        for folder in ROOT.glob(f"*/{package}")
        for path in folder.rglob("*.py")
        if "_pb2" not in path.name
    }
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def _imports(*packages: str) -> dict[str, set[str]]:
    """For each module of packages the ones among them that it imports, at any time."""
    files = _modules(*packages)
    return {
        # A package that a module lies in is there before it.
        name: {
            each for each in _imported(path) & files.keys() if not f"{name}.".startswith(f"{each}.")
        }
        for name, path in files.items()
    }


# Modules of the service that gRPC itself calls, that make its server, or that call it.
AROUND_CALLS = {
    *("app/probe", "app/transport", "calls/around", "calls/draining", "calls/identities"),
    *("calls/limits", "calls/observing", "calls/request_ids", "calls/statuses"),
}


def test_each_room_of_the_service_knows_messages_at_its_door_alone() -> None:
    """`rpc` turns messages into values and back and decides nothing; `service` knows no gRPC."""
    service = ROOT / "service" / "hvp_service"
    modules = {
        path.relative_to(service).with_suffix("").as_posix(): path for path in service.rglob("*.py")
    }
    doors = {name for name in modules if name.endswith(("/rpc", "/messages"))}
    assert modules.keys() > AROUND_CALLS
    assert {f"{room}/rpc" for room in ("blobs", "jobs", "operators", "vectors")} < doors
    for name in modules.keys() - doors - AROUND_CALLS:
        knows = {
            each
            for each in _imported(modules[name])
            if re.match(r"grpc|hvp_protos|google.protobuf", each)
        }
        # The table of reasons is an enum of the protos.
        assert name == "calls/errors" or not knows, f"{name} imports {knows}"
    decisions = (ast.Raise, ast.Try, ast.While, ast.With, ast.AsyncWith, ast.Assert)
    for name in doors:
        nodes = ast.walk(ast.parse(modules[name].read_text()))
        deciding = [node.lineno for node in nodes if isinstance(node, decisions)]
        assert not deciding, f"{name} decides something in lines {deciding}"


def _imported(path: Path) -> set[str]:
    """Modules that a file names in imports, those inside functions too, but for types alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_generated_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    generator = ROOT / "protos" / "generate.py"
    subprocess.run(
        [sys.executable, str(generator), str(tmp_path)],
        check=True,
        capture_output=True,
        # protoc finds its mypy plugin beside the interpreter
        env={"PATH": str(Path(sys.executable).parent)},
    )
    committed = {path.name: path for path in ROOT.glob("protos/hvp_protos/v1/*_pb2*.py*")}
    generated = {path.name: path for path in tmp_path.glob("hvp_protos/v1/*")}
    assert generated.keys() == committed.keys()
    for name, path in generated.items():
        assert path.read_text() == committed[name].read_text(), f"run `make proto`: {name} is old"
    page = (ROOT / "docs" / "errors.md").read_text()
    assert (tmp_path / "errors.md").read_text() == page, "run `make proto`"


def snippets(language: str) -> list[str]:
    """Code blocks of a language in the documents."""
    documents = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for document in documents for block in pattern.findall(document.read_text())]


@pytest.mark.parametrize("snippet", snippets("python"))
def test_snippets_compile_and_import_what_exists(snippet: str) -> None:
    tree = ast.parse(snippet)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports, "a snippet shows where its names come from"
    lines = "\n".join(ast.unparse(node) for node in imports)
    exec(lines, {})  # noqa: S102  the project's own documents


def test_snippets_call_methods_that_the_sdk_has() -> None:
    import hvp_client

    owners = {"client": hvp_client.Client, "H": hvp_client.Operator, "job": hvp_client.Job}
    calls = [
        (node.value.id, node.attr)
        for snippet in snippets("python")
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in owners
    ]
    assert len(calls) > 5
    for owner, attribute in calls:
        assert hasattr(owners[owner], attribute), f"{owner}.{attribute}"


def test_commands_in_the_readme_exist() -> None:
    from hvp_client.cli.main import app

    known = {
        str(command.name or getattr(command.callback, "__name__", "").replace("_", "-"))
        for command in app.registered_commands
    } | {str(group.name) for group in app.registered_groups}
    shown = set(re.findall(r"^hvp ([a-z_-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown
    assert shown <= known


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("hvp") == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_pinned_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        name(requirement)
        for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]
    }
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    assert wanted - {"hvp"} <= pinned


def name(requirement: str) -> str:
    """Normalised name of a requirement."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_a_question_is_known_by_name_where_it_is_declared_and_answered_alone() -> None:
    elsewhere = ["tests", "docs", "*.md"]
    generated = ["*_pb2*", "client/hvp_client/_records.py", "client/hvp_client/*/questions.py"]
    places = [f":!{place}" for place in elsewhere + generated]
    listing = subprocess.run(
        ["git", "grep", "-il", "eigsh", "--", *places],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    known = set(listing.stdout.splitlines())
    assert known == {
        *("protos/hvp_operations/eigsh/__init__.py", "protos/hvp_operations/eigsh/record.py"),
        *("protos/hvp/v1/eigsh.proto", "protos/hvp/v1/job.proto"),
        "workers/hvp_core/krylov/lanczos.py",
        # Its eigenpairs are one of the ways to a low-rank matrix.
        *("protos/hvp_operations/low_rank/__init__.py", "protos/hvp/v1/low_rank.proto"),
        "protos/hvp_operations/low_rank/record.py",
        *("workers/hvp_core/stochastic/low_rank.py", "benchmarks/preconditioning.py"),
        "client/hvp_demo/run.py",
        # All that 0.1 could be asked; revisions are never written anew.
        "service/hvp_service/storage/migrations/versions/r0002_sessions_and_inputs.py",
    }


def test_tracked_files_name_no_folder_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    home = re.compile(rb"(?<![\w.])/(work|home|root|Users|opt)/[\w.-]+")
    found = {
        path: match.group().decode()
        for path in listing.stdout.split("\0")
        if path and (ROOT / path).is_file() and (match := home.search((ROOT / path).read_bytes()))
    }
    assert not found
