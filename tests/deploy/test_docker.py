"""Images: what their files say, and whether their steps lead to a server that serves."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.following import SYSTEM, Follower, Stage, read_stages

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "deploy" / "docker"
IMAGES = ("server", "worker")


@pytest.fixture(scope="module", name="stages")
def _stages() -> dict[str, Stage]:
    return read_stages(DOCKER / "Dockerfile")


def line_of(stages: dict[str, Stage], name: str) -> list[Stage]:
    base = stages[name].base
    return [*(line_of(stages, base) if base in stages else []), stages[name]]


def test_the_dockerfile_passes_the_linter() -> None:
    answer = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", DOCKER / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_is_told_to_end(
    image: str, stages: dict[str, Stage]
) -> None:
    line = line_of(stages, image)

    def last(instruction: str) -> str:
        return [value for stage in line for value in stage.values(instruction)][-1]

    user, group = last("USER").split(":")
    assert int(user) == int(group) >= 10_000
    assert f"--uid {user}" in " ".join(value for stage in line for value in stage.values("RUN"))
    assert last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(last("ENTRYPOINT"))[0] == "tini"
    assert json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    steps = [step.instruction for step in stages[image].steps]
    assert "RUN" not in steps[steps.index("USER") :]
    assert not any(value.startswith("latest") for stage in line for value in stage.values("FROM"))


def test_no_compiler_of_packages_nor_source_is_left_in_an_image(stages: dict[str, Stage]) -> None:
    """Multi-stage: from where things are built only the environment comes over."""
    for image in IMAGES:
        line = line_of(stages, image)
        assert [stage.name for stage in line] == ["base", image]
        copied = [value for stage in line for value in stage.values("COPY")]
        assert [each for each in copied if "--from" in each] == [
            f"--from=build-{image} /usr/local/hvp /usr/local/hvp"
        ]
        assert not any("pip" in value for stage in line for value in stage.values("RUN"))


def test_everything_that_is_installed_has_its_version_from_the_constraints(
    stages: dict[str, Stage],
) -> None:
    [environment] = stages["build"].values("ENV")
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f"{name}=/src/constraints.txt" in environment
    assert stages["build"].values("COPY")[0] == "constraints.txt ./"
    runs = [value for stage in stages.values() for value in stage.values("RUN")]
    installs = [value for value in runs if "pip" in value]
    assert len(installs) == 4
    # A version beside that of the constraints would be a second place.
    assert not [value for value in installs if re.search(r"[=<>]=|--upgrade|PIP_CONSTRAINT", value)]
    assert all(stage.base in stages or stage.base == "${PYTHON_IMAGE}" for stage in stages.values())
    image = re.search(
        r"^ARG PYTHON_IMAGE=python:(\S+)-slim", (DOCKER / "Dockerfile").read_text(), re.M
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert image
    assert image[1] == project["requires-python"].removeprefix(">=")


def test_what_images_copy_is_there_and_reaches_docker(stages: dict[str, Stage]) -> None:
    sources = {
        word.removeprefix("./").rstrip("/")
        for stage in stages.values()
        for step in stage.steps
        if step.instruction == "COPY" and "--from" not in step.value
        for word in [each for each in step.words if not each.startswith("--")][:-1]
    }
    assert sources
    assert all((ROOT / each).exists() for each in sources)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(each for each in lines if each and not each.startswith("#")) == "*"
    # Nothing else is sent, and so nothing secret that lies about in a checkout.
    assert {each.removeprefix("!") for each in lines if each.startswith("!")} == sources


def test_no_secret_is_put_into_a_layer(stages: dict[str, Stage]) -> None:
    secret = re.compile(r"token|password|secret|api_?key|tls_key|\.pem", re.IGNORECASE)
    for stage in stages.values():
        for step in stage.steps:
            assert not secret.search(step.value), step.value


def test_bake_and_compose_build_the_stages_that_there_are(stages: dict[str, Stage]) -> None:
    bake: dict[str, Any] = json.loads((DOCKER / "docker-bake.json").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert bake["variable"]["VERSION"]["default"] == version
    assert set(bake["group"]["default"]["targets"]) == bake["target"].keys()
    names = {
        each["tags"][0].removeprefix("${REGISTRY}/").removesuffix(":${VERSION}")
        for each in bake["target"].values()
    }
    assert names == {"server", "server-cuda", "worker", "worker-cuda"}
    assert {each.get("target") for each in bake["target"].values()} - {None} == set(IMAGES)
    for target in bake["target"].values():
        assert set(target.get("inherits", [])) <= bake["target"].keys()
    for path in DOCKER.glob("compose*.yaml"):
        service = yaml.safe_load(path.read_text())["services"]["server"]
        assert service["image"].endswith(f":${{VERSION:-{version}}}")
        if "build" in service:
            assert service["build"]["target"] in IMAGES
            assert (path.parent / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).exists()


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, text
    return float(found[1])


def test_compose_gives_a_server_what_it_needs_and_no_more() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    server = compose["services"]["server"]
    grace = float(server["command"][server["command"].index("--grace-s") + 1])
    # After its grace a server has its ranks to end.
    assert seconds(server["stop_grace_period"]) >= grace + 20
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert set(server["secrets"]) == compose["secrets"].keys()
    for name, variable in {"certificate": "HVP_TLS_CERTIFICATE", "key": "HVP_TLS_KEY"}.items():
        assert server["environment"][variable] == f"/run/secrets/{name}"
        assert name in compose["secrets"]
    [volume] = [each for each in server["volumes"] if each.endswith(":/var/lib/hvp")]
    assert volume.partition(":")[0] in compose["volumes"]
    assert server["shm_size"]
    assert server["environment"]["HVP_ADDRESS"].startswith("0.0.0.0:")


@pytest.mark.slow
def test_the_steps_of_each_image_lead_to_programs_that_run(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    """Without Docker, apt and the network: see `Follower` for what is done and what is not."""
    follower = Follower(ROOT, stages, tmp_path)
    skipped = [
        part.split()[0]
        for stage in stages.values()
        for value in stage.values("RUN")
        if value.split()[0] in SYSTEM
        for part in value.split("&&")
    ]
    assert set(skipped) == SYSTEM  # nothing else is left undone

    def run(image: str, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        follower.build(image)
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=follower.environment(image) | more,
            capture_output=True,
            text=True,
            timeout=120,
        )

    for name in ("hvp", "ray"):
        link = "usr/local/bin/" + name
        follower.build("worker")
        assert (follower.root / link).readlink() == follower.root / "usr/local/hvp/bin" / name
    found = run("worker", "python", "-c", "import hvp_workers.ray_rank as r; print(r.__file__)")
    assert found.stdout.startswith(str(follower.root / "usr/local/hvp/lib")), found.stderr
    refused = run("worker", "hvp-node", "--head", "--block")
    assert (refused.returncode, refused.stderr.partition(":")[0]) == (2, "error")
    assert run("worker", "hvp-node", "health", NODE_IP="127.0.0.2").returncode != 0

    follower.build("server")
    [entry] = [json.loads(value) for value in stages["server"].values("ENTRYPOINT")]
    assert entry[:2] == ["tini", "--"]
    [health] = stages["server"].values("HEALTHCHECK")
    environment = follower.environment("server") | {"OMP_NUM_THREADS": "1"}
    state = tmp_path / "state"
    with subprocess.Popen(
        [
            *(*entry[2:], "--address", "127.0.0.1:0", "--state-dir", str(state)),
            *("--backend", "inprocess", "--workers", "1"),
        ],
        env=environment,
        executable=str(follower.root / "usr/local/bin" / entry[2]),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix("serving on ").strip()
            command = json.loads(health.partition("CMD ")[2])
            answer = run("server", *command, HVP_ADDRESS=address)
            assert (answer.returncode, answer.stdout) == (0, "SERVING\n"), answer.stderr
        finally:
            server.terminate()
        assert server.wait(60) == 0
    assert state.stat().st_mode & 0o777 == 0o700
    assert run("server", *command, HVP_ADDRESS=address).returncode == 1


def test_the_ignore_file_keeps_the_demo_and_caches_out() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for path in ("client/hvp_demo", "client/__pycache__"):
        assert any(fnmatch.fnmatch(path, each) for each in lines if not each.startswith("!"))
