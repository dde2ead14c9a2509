from __future__ import annotations

import re
from pathlib import Path

import hvp_protos.v1
import pytest
from google.rpc import code_pb2
from hvp_protos.v1 import errors_pb2
from hvp_service.calls.errors import CODES, ServiceError, code_of

PROTOS = sorted((Path(hvp_protos.v1.__path__[0]).parent.parent / "hvp/v1").glob("*.proto"))
STATUS = re.compile("|".join(name for name, number in code_pb2.Code.items() if number))


def promised() -> set[tuple[str, str]]:
    """(status, reason) of every status line in the protos' comments."""
    found = set()
    for proto in PROTOS:
        for block in re.findall(r"(?:^\s*//.*\n)+", proto.read_text(), re.MULTILINE):
            status = ""
            for word in re.findall(r"[A-Z][A-Z_]{2,}|`[A-Z][A-Z_]+`|\.", block):
                if word == ".":
                    status = ""
                elif STATUS.fullmatch(word):
                    status = word
                elif word.startswith("`") and status and not word.startswith("`STATE"):
                    found.add((status, word.strip("`")))
    return found


def test_every_reason_in_the_protos_has_the_status_that_the_protos_say() -> None:
    pairs = promised()
    assert len(pairs) > 40
    for status, reason in pairs:
        names_field = reason == "NON_FINITE" and status == "INVALID_ARGUMENT"
        assert reason in CODES, reason
        assert code_pb2.Code.Name(code_of(reason, names_field=names_field)) == status, reason


def test_every_reason_between_backticks_in_the_protos_is_in_the_table() -> None:
    for proto in PROTOS:
        comments = "".join(re.findall(r"//.*", proto.read_text()))
        for reason in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", comments):
            assert reason in CODES, f"{proto.name}: {reason}"


def test_a_reason_outside_the_table_cannot_be_raised() -> None:
    with pytest.raises(ValueError, match="NONSENSE"):
        raise ServiceError("NONSENSE", "")


def test_a_reason_that_only_workers_know_is_internal() -> None:
    assert code_of("SOMETHING_NEW") == code_pb2.INTERNAL


def test_every_reason_of_the_enum_is_raised_somewhere_and_has_a_status() -> None:
    root = Path(__file__).parent.parent.parent
    source = "".join(
        path.read_text()
        for folder in (
            "service",
            "workers",
            "protos/hvp_batches",
            "protos/hvp_folders",
            "protos/hvp_operations",
        )
        for path in (root / folder).rglob("*.py")
    )
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values[1:]:
        reason = value.name.removeprefix("ERROR_REASON_")
        assert CODES[reason] > 0
        assert f'"{reason}"' in source, reason


def test_what_an_operation_refuses_is_the_callers_mistake() -> None:
    for reason in ("NUM_PROBES_INVALID", "WHICH_UNSUPPORTED"):
        assert code_of(reason) == code_pb2.INVALID_ARGUMENT
