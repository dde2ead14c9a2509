"""Compile the protos: `python protos/generate.py [OUTPUT_DIR]`, by default beside their sources.

What is on the wire lies under `hvp/v1`; the Python made of it is the package `hvp_protos.v1`, so
that no other distribution's `hvp` is in its way.
"""

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
SOURCE, PACKAGE = Path("hvp/v1"), Path("hvp_protos/v1")


def generate(output: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` under `output`.

    Raises:
        RuntimeError: protoc refused a file; its words are on standard error.
    """
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCE).glob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{kind}={folder}" for kind in ("python_out", "mypy_out", "grpc_python_out")]
        if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *options, *sources]) != 0:
            raise RuntimeError("protoc failed")
        (output / PACKAGE).mkdir(parents=True, exist_ok=True)
        for made in (Path(folder) / SOURCE).iterdir():
            text = made.read_text().replace("from hvp.v1 import", "from hvp_protos.v1 import")
            text = re.sub(r"'hvp\.v1\.(\w+_pb2)'", r"'hvp_protos.v1.\1'", text)
            (output / PACKAGE / made.name).write_text(text)


def error_table() -> str:
    """The page of every reason, from the enum and its comments."""
    text = (ROOT / SOURCE / "errors.proto").read_text()
    entry = re.compile(r"((?:  // .*\n)+)  ERROR_REASON_(\w+) = \d+ \[\(status\) = \"(\w+)\"\];")
    rows = [
        f"| `{name}` | {status} | {' '.join(told.replace('//', ' ').split())} |"
        for told, name, status in entry.findall(text)
    ]
    return "\n".join(
        [
            "# Reasons",
            "",
            "Every refusal carries one of these in its `google.rpc.ErrorInfo`, in the domain",
            "`hvp.dev`; in Python it is `error.reason`. Beside them an operation refuses a value",
            "of its spec as `<FIELD>_INVALID`, and a word that there is not as",
            "`<FIELD>_UNSUPPORTED`, with the status INVALID_ARGUMENT. Made by `make proto` from",
            "`protos/hvp/v1/errors.proto`.",
            "",
            "| reason | status | what happened, and what to do |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "docs"
    target.mkdir(exist_ok=True)
    (target / "errors.md").write_text(error_table())
