"""Compile the protos: `python protos/generate.py [OUTPUT_DIR]`, by default beside their sources."""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent


def generate(output: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` under `output`.

    Raises:
        RuntimeError: protoc refused a file; its words are on standard error.
    """
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("hvp_protos/v1/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    options = [f"--{kind}={output}" for kind in ("python_out", "mypy_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *options, *sources]) != 0:
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
