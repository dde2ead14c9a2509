"""One more operation is one folder, one proto and a line in each `oneof`; a product is a row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.client.conftest import save_llama

ROOT = Path(__file__).parent.parent

USE = """
import json, sys
from hvp_client import Client, InvalidArgumentError

address, folder = sys.argv[1:]
with Client(address) as client:
    checkpoint = client.upload_checkpoint(folder)
    batch = client.upload_batch({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    H = client.operator(checkpoint, batch, dtype="float64")
    job = H.moments(5, seed=3)
    events = [event for event in job.watch() if event.progress and event.progress.detail]
    v = H.random_vector(seed=3, distribution="gaussian")
    expected = [v.dot(v)]
    for _ in range(3):
        w = H @ v
        expected += [v.dot(w), w.dot(w)]
        v = w
    given = H.random_vector(seed=3, distribution="gaussian")
    of_vector = H.moments(5, start=given)
    of_array = H.moments(5, start=given.numpy())
    given.delete()
    try:
        H.moments(0)
    except InvalidArgumentError as error:
        refusal = [error.reason, error.field]
    u = H.random_vector(seed=4)
    G = client.operator(checkpoint, batch, kind="output_gram", dtype="float64")
    J = client.jacobian(checkpoint, batch, dtype="float64")
    print(json.dumps({
        "product": (G @ u).numpy().tolist(),
        "of the Jacobian": (J.T @ (J @ u)).numpy().tolist(),
        "found": job.result().moments.tolist(),
        "of a vector": of_vector.result().moments.tolist(),
        "of an array": of_array.result().moments.tolist(),
        "expected": expected,
        "stages": [event.progress.stage for event in events],
        "latest": events[-1].progress.detail.moment,
        "headline": job.headline,
        "refusal": refusal,
        "checkpoint": checkpoint.name,
        "batch": batch.name,
    }))
"""


COPIED = ("protos", "client", "workers")
PRODUCT = """
OUTPUT_GRAM = ProductSpec(
    "output_gram", "product with J^T J", _GAUSS_NEWTON, lambda at: (at.y_dot,), semidefinite=True
)
"""


@dataclass(frozen=True)
class Tree:
    """The project with one operation and one product more; the service is as it is."""

    root: Path
    changed: frozenset[str]

    @property
    def environment(self) -> dict[str, str]:
        """In which it comes before the project's own."""
        folders = *[self.root / each for each in COPIED], ROOT / "service"
        return os.environ | {"PYTHONPATH": ":".join(map(str, folders)), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def is_written(path: Path) -> bool:
    """Whether a file is written by hand."""
    made = ("_pb2", "awaited/questions.py", "blocking/questions.py", "_records.py", ".pyc")
    return path.is_file() and not any(mark in str(path) for mark in made)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("tree")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "pyproject.toml", root)
    mine = Path(__file__).parent / "moments"
    shutil.copytree(
        mine, root / "protos/hvp_operations/moments", ignore=lambda *_: ["moments.proto"]
    )
    shutil.copy(mine / "moments.proto", root / "protos/hvp/v1")
    job = root / "protos/hvp/v1/job.proto"
    text = job.read_text().replace(
        'import "hvp/v1/eigsh.proto";',
        'import "hvp/v1/eigsh.proto";\nimport "hvp/v1/moments.proto";',
    )
    for oneof, kind in (("spec", "Spec"), ("detail", "Progress"), ("result", "Result")):
        text = re.sub(rf"(  oneof {oneof} {{\n)", rf"\1    Moments{kind} moments = 99;\n", text)
    job.write_text(text)
    operator = root / "protos/hvp/v1/operator.proto"
    text = operator.read_text()
    operator.write_text(
        re.sub(r"(KIND_UNSPECIFIED = 0;\n)", r"\1    KIND_OUTPUT_GRAM = 99;\n", text)
    )
    products = root / "workers/hvp_core/autodiff/product_spec.py"
    text, listed = products.read_text(), "#: Symmetric matrices"
    text = text.replace(listed, f"{PRODUCT}\n{listed}").replace(
        "(HESSIAN, ", "(OUTPUT_GRAM, HESSIAN, "
    )
    products.write_text(text)
    tools = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(root / "protos")}
    for generator in ("protos", "client"):
        subprocess.run(
            [sys.executable, str(root / generator / "generate.py")],
            env=tools,
            check=True,
            capture_output=True,
        )
    changed = frozenset(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if is_written(path)
        and not (
            (ROOT / path.relative_to(root)).is_file()
            and path.read_bytes() == (ROOT / path.relative_to(root)).read_bytes()
        )
    )
    return Tree(root, changed)


@pytest.fixture(scope="module")
def address(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state = tmp_path_factory.mktemp("state")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "hvp_service.app.server", "--address", "127.0.0.1:0"),
            *("--state-dir", str(state), "--backend", "inprocess", "--workers", "1"),
        ],
        env=tree.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield server.stdout.readline().removeprefix("serving on ").strip()
    server.terminate()
    server.wait(60)
    server.stdout.close()


def test_an_operation_is_one_folder_one_proto_and_a_line_in_each_oneof(tree: Tree) -> None:
    """And a product a row of the core's table, and a value of the wire's enum."""
    folder = "protos/hvp_operations/moments"
    assert tree.changed == {
        "protos/hvp/v1/operator.proto",
        "workers/hvp_core/autodiff/product_spec.py",
        f"{folder}/__init__.py",
        f"{folder}/algorithm.py",
        f"{folder}/record.py",
        "protos/hvp/v1/moments.proto",
        "protos/hvp/v1/job.proto",
    }
    lines = [
        sum(line not in before for line in after)
        for before, after in [
            [(each / "protos/hvp/v1/job.proto").read_text().splitlines() for each in trees]
            for trees in ((ROOT, tree.root),)
        ]
    ]
    assert lines == [4]  # one in each oneof, and the import


def test_it_runs_through_server_sdk_and_command_line(
    tree: Tree, address: str, tmp_path: Path
) -> None:
    model = save_llama(tmp_path / "model", vocab_size=19, hidden_size=8)
    told = json.loads(tree.run(sys.executable, "-W", "ignore", "-c", USE, address, str(model)))
    np.testing.assert_allclose(told["found"], told["expected"][:6], rtol=1e-12)
    assert told["of a vector"] == told["of an array"] == told["found"]
    assert set(told["stages"]) == {"iterating"}
    assert told["latest"] == pytest.approx(told["expected"][-1], rel=1e-12)
    assert told["headline"] == "moments to degree 5"
    num_targets = 6
    gram = np.array(told["of the Jacobian"]) / num_targets
    np.testing.assert_allclose(told["product"], gram, rtol=1e-9, atol=1e-12)
    assert told["refusal"] == ["DEGREE_INVALID", "degree"]

    hvp = str(Path(sys.executable).with_name("hvp"))

    answer = tree.run(
        *(hvp, "moments", "--checkpoint", told["checkpoint"], "--ids", told["batch"]),
        *("--degree", "5", "--seed", "3", "--dtype", "float64", "--format", "json"),
        *("--address", address),
    )
    assert json.loads(answer)["moments"] == told["found"]
    assert "--degree" in tree.run(hvp, "moments", "--help")
    assert "output_gram" in tree.run(hvp, "moments", "--help")
    assert "moments to degree 5 of hessian float64" in tree.run(hvp, "jobs", "--address", address)
