"""What `hvp_client` offers, and what importing it brings along."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import hvp_client
import pytest
from hvp_client import _surface

PUBLIC = """
AbortedError AlreadyExistsError ApiKey AsyncClient AsyncJacobian AsyncJob AsyncOperator AsyncVector
Batch Blob BlockMassResult CallCancelledError Caller Checkpoint Client DataLossError
DeadlineExceededError DensityResult DiagonalResult EigshResult Event FailedPreconditionError
HvpError InternalError InvalidArgumentError Jacobian Job JobCancelledError JobFailedError JobStatus
LossAlong LowRankResult NotFoundError Operator OutOfRangeError OverData ParameterTensor
PermissionDeniedError Plan Progress Rank ResourceExhaustedError Retry ServerInfo
ServerUnreachableError SolveResult SvdsResult Timeout Tls TraceOfResult TraceResult
UnauthenticatedError UnavailableError UnimplementedError UnknownError Vector Verification
WorkerGroup
"""


def test_the_public_names_are_these_and_change_only_on_purpose() -> None:
    assert hvp_client.__all__ == PUBLIC.split()
    assert dir(hvp_client) == PUBLIC.split()


def test_every_public_name_is_there_and_no_other() -> None:
    brought_in = {name for name in vars(_surface) if not name.startswith("_")}
    assert brought_in == set(hvp_client.__all__)
    assert hvp_client.Client is _surface.Client
    with pytest.raises(AttributeError, match="Klient"):
        _ = hvp_client.Klient


def test_the_client_brings_no_torch_no_ray_and_no_part_of_the_server() -> None:
    code = """
import sys
import hvp_client, hvp_client.cli.main
for name in hvp_client.__all__:
    getattr(hvp_client, name)
heavy = "torch ray transformers scipy hvp_core hvp_workers hvp_service".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_shows_its_help_without_numpy_or_grpc() -> None:
    code = """
import sys
import hvp_client.cli.main
print([name for name in ("numpy", "grpc", "rich.live") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hvp_serve_loads_no_grpc_of_its_own_since_ranks_are_forked_first() -> None:
    code = """
import sys
import hvp_client.cli.main, hvp_client.cli.serving
print("grpc" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_generated_is_that_of_the_declarations_and_of_the_awaited_side(
    tmp_path: Path,
) -> None:
    client = Path(hvp_client.__file__).parent
    subprocess.run([sys.executable, client.parent / "generate.py", tmp_path], check=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    assert {str(path) for path in made} >= {"_records.py", "awaited/questions.py"}
    by_hand = {"__init__", "portal", "protocols", "twins"}
    assert {path.stem for path in (client / "blocking").glob("*.py")} - by_hand == {
        path.stem for path in made if path.parent.name == "blocking"
    }
    for path in made:
        assert (tmp_path / path).read_text() == (client / path).read_text(), "run `make sdk`"


@pytest.mark.parametrize("name", ["Client", "Jacobian", "Job", "Operator", "Vector"])
def test_both_sides_have_the_same_names_signatures_and_words(name: str) -> None:
    blocking, awaited = getattr(hvp_client, name), getattr(hvp_client, f"Async{name}")
    members = {each for each in dir(awaited) if not each.startswith("_")}
    assert members <= set(dir(blocking))
    assert blocking.__doc__ == awaited.__doc__
    for each in members:
        here, there = getattr(blocking, each), getattr(awaited, each)
        assert here.__doc__ == there.__doc__, each
        assert there.__doc__, each
        assert not inspect.iscoroutinefunction(here)
        if not isinstance(there, property):
            ours, theirs = inspect.signature(here), inspect.signature(there)
            assert list(ours.parameters) == list(theirs.parameters)
            assert [p.default for p in ours.parameters.values()] == [
                p.default for p in theirs.parameters.values()
            ]
