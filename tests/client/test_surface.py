"""What `hvp_client` offers, and what importing it brings along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hvp_client
import pytest
from hvp_client import _surface

PUBLIC = """
AbortedError AlreadyExistsError AsyncClient AsyncJob AsyncOperator AsyncVector Batch Blob
CallCancelledError Checkpoint Client DataLossError DeadlineExceededError DensityResult
EigshResult Event FailedPreconditionError HvpError InternalError InvalidArgumentError Job
JobCancelledError JobFailedError JobStatus NotFoundError Operator OutOfRangeError ParameterTensor
PermissionDeniedError Progress Rank ResourceExhaustedError Retry ServerInfo
ServerUnreachableError Timeout UnauthenticatedError UnavailableError UnimplementedError
UnknownError Vector WorkerGroup
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


def test_the_methods_of_operators_are_those_of_the_declarations(tmp_path: Path) -> None:
    client = Path(hvp_client.__file__).parent
    subprocess.run([sys.executable, client.parent / "generate.py", tmp_path], check=True)
    for made in tmp_path.iterdir():
        assert made.read_text() == (client / made.name).read_text(), "run `make sdk`"
