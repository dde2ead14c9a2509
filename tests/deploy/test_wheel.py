"""The wheel: one file, of which an extra makes the SDK or all of the service.

The second is installed and run where the images' steps are followed, in `test_docker`.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = [
    Path(each)
    for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]["packages"]
]


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    constraints = str(ROOT / "constraints.txt")
    tracked = tmp_path_factory.mktemp("source")
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={tracked}/"], cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "."],
        cwd=tracked,
        check=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PIP_CONSTRAINT": constraints,
            "PIP_BUILD_CONSTRAINT": constraints,
        },
    )
    [wheel] = folder.iterdir()
    return wheel


@pytest.mark.slow
def test_the_wheel_has_all_files_of_its_packages_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {each for each in archive.namelist() if ".dist-info/" not in each}
        rest = {Path(each).name for each in archive.namelist() if ".dist-info/" in each}
    listing = subprocess.run(
        ["git", "ls-files", *map(str, PACKAGES)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    folders = {package.parent.as_posix() for package in PACKAGES}
    tracked = {path.partition("/")[2] for path in listing.stdout.splitlines()}
    assert {path.partition("/")[0] for path in listing.stdout.splitlines()} == folders
    assert names == tracked
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= names
    assert any(each.endswith("_pb2_grpc.py") for each in names)
    assert not [each for each in names if each.startswith(("tests", "hvp_demo", "benchmarks"))]
    assert rest == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}


@pytest.mark.slow
def test_the_sdk_installs_alone_and_says_how_to_get_the_server(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel],
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )

    listed = run(python, "-m", "pip", "list", "--format=freeze").stdout.lower()
    assert "grpcio==" in listed
    assert not {"torch", "ray", "transformers", "sqlalchemy", "scipy"} & {
        line.partition("==")[0] for line in listed.splitlines()
    }
    assert run(python, "-m", "pip", "check").returncode == 0
    assert run(python, "-c", "import hvp_client; hvp_client.Client").returncode == 0
    hvp = python.with_name("hvp")
    assert "serve" in run(hvp, "--help").stdout
    refused = run(hvp, "serve", "--state-dir", "state")
    assert refused.returncode == 2
    assert "pip install 'hvp[service]'" in refused.stderr
    assert not (tmp_path / "state").exists()
