"""Every operation keeps to what its declaration promises to all who read it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message
from hvp_operations.checking import checked, field_types, typed
from hvp_operations.codec import to_message, to_plain, to_values
from hvp_operations.documentation import attributes, paragraphs
from hvp_operations.eigsh import OPERATION, EigshSpec
from hvp_operations.operation import Facts, Operation, SpecError, load
from hvp_operations.registry import operations
from hvp_operations.svds import SvdsResult
from hvp_protos.v1 import job_pb2

FACTS = Facts(num_parameters=100, kind="hessian")
JACOBIAN = Facts(num_parameters=100, kind="jacobian", num_outputs=40)


def message_of(wrapper: type[Message], name: str) -> Message:
    """An empty message of an operation's, as the field of that name holds it."""
    found: Message = getattr(wrapper(), name)
    return found


def default(operation: Operation[Any]) -> dict[str, Any]:
    """The values of a spec that has its defaults, and vectors where it needs them."""
    return {
        each.field: ("projects/default/vectors/v",) * each.least
        for each in operation.inputs
        if each.least
    }


def names(message: Message) -> set[str]:
    return set(message.DESCRIPTOR.fields_by_name)


def test_an_operation_is_a_field_of_each_oneof_and_there_is_no_other() -> None:
    for wrapper, oneof in (
        (job_pb2.JobSpec, "spec"),
        (job_pb2.JobProgress, "detail"),
        (job_pb2.JobResult, "result"),
    ):
        fields = wrapper.DESCRIPTOR.oneofs_by_name[oneof].fields
        assert {field.name for field in fields} == set(operations())


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_a_declaration_has_the_fields_of_its_messages(operation: Operation[Any]) -> None:
    spec = message_of(job_pb2.JobSpec, operation.name)
    assert names(spec) == {*field_types(operation.spec), "operator"}
    progress = message_of(job_pb2.JobProgress, operation.name)
    assert names(progress) == set(field_types(operation.progress))
    result = message_of(job_pb2.JobResult, operation.name)
    vectors = set(operation.result.vectors)
    assert names(result) == {*field_types(operation.result), *vectors}
    assert names(result) == {field.name for field in dataclasses.fields(load(operation.record))}


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_every_field_of_a_spec_is_described_and_its_defaults_can_be_run(
    operation: Operation[Any],
) -> None:
    assert set(attributes(operation.spec)) == set(field_types(operation.spec))
    assert all(text.endswith(".") for text in attributes(operation.spec).values())
    assert paragraphs(operation.spec)[0].endswith(".")
    spec = operation.spec(**default(operation))
    facts = FACTS if operation.asked_of == "matrix" else JACOBIAN
    assert checked(operation, default(operation), facts) == spec
    cost = operation.cost(spec, facts)
    assert 0 < cost.least_vectors <= cost.wished_vectors
    assert cost.max_products > 0
    assert hasattr(load(operation.record), "plot") == operation.has_picture


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_a_spec_survives_the_wire(operation: Operation[Any]) -> None:
    message = message_of(job_pb2.JobSpec, operation.name)
    spec = operation.spec(**default(operation))
    to_message(spec, message)
    read = type(message).FromString(message.SerializeToString())
    assert typed(operation, to_values(read, operation.spec)) == spec
    plain = json.loads(json.dumps(to_plain(read, operation.spec)))
    assert typed(operation, plain) == spec


def fields_of_a_release() -> dict[str, set[str]]:
    """The fields of each message of the wire that `make lint` holds the protos against."""
    path = Path(__file__).parent.parent / "protos" / "baseline.binpb.gz"
    files = FileDescriptorSet.FromString(gzip.decompress(path.read_bytes())).file
    return {
        message.name: {field.name for field in message.field}
        for file in files
        for message in file.message_type
    }


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_a_client_that_lacks_the_newer_fields_of_a_spec_is_served(
    operation: Operation[Any],
) -> None:
    message = message_of(job_pb2.JobSpec, operation.name)
    to_message(operation.spec(**default(operation)), message)
    released = fields_of_a_release().get(message.DESCRIPTOR.name, names(message))
    for field in names(message) - released:
        message.ClearField(field)
    facts = FACTS if operation.asked_of == "matrix" else JACOBIAN
    checked(operation, to_values(message, operation.spec), facts)


def test_an_unspecified_word_is_auto_where_there_is_that_word() -> None:
    for operation in operations().values():
        message = message_of(job_pb2.JobSpec, operation.name)
        to_message(operation.spec(**default(operation)), message)
        if any(each.name == "METHOD_AUTO" for each in enum_values(message, "method")):
            message.ClearField("method")
            assert to_values(message, operation.spec)["method"] == "auto"


def enum_values(message: Message, name: str) -> list[Any]:
    """The values of a field's enum; none where it is of another type, or not there."""
    field = message.DESCRIPTOR.fields_by_name.get(name)
    return list(field.enum_type.values) if field is not None and field.enum_type else []


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        ({}, "VECTORS_MISSING", "b"),
        ({"b": ()}, "VECTORS_MISSING", "b"),
        ({"b": "projects/default/vectors/v"}, "B_INVALID", "b"),
        ({"b": (3,)}, "B_INVALID", "b"),
        ({"b": None}, "B_INVALID", "b"),
        ({"b": ("v",) * 65}, "B_INVALID", "b"),
        ({"b": ("v",), "x0": ("v", "v")}, "X0_INVALID", "x0"),
        ({"b": ("v",), "tol": 0.0}, "TOL_INVALID", "tol"),
        ({"b": ("v",), "tol": 1.0}, "TOL_INVALID", "tol"),
        ({"b": ("v",), "damping": -1.0, "method": "cg"}, "DAMPING_INVALID", "damping"),
        ({"b": ("v",), "max_products": 3}, "MAX_PRODUCTS_INVALID", "max_products"),
        ({"b": ("v",), "method": "gmres"}, "METHOD_UNSUPPORTED", "method"),
    ],
)
def test_a_question_about_vectors_names_as_many_as_it_takes(
    value: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        checked(operations()["solve"], value, FACTS)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)
    allowed = {"b": ("v",), "damping": -1.0}
    assert checked(operations()["solve"], allowed, FACTS).damping == -1


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_a_question_about_the_other_kind_of_operator_is_refused(operation: Operation[Any]) -> None:
    of_matrix = operation.asked_of == "matrix"
    with pytest.raises(SpecError) as refusal:
        checked(operation, default(operation), JACOBIAN if of_matrix else FACTS)
    expected = "OPERATOR_NOT_SYMMETRIC" if of_matrix else "OPERATOR_NOT_JACOBIAN"
    assert (refusal.value.reason, refusal.value.field) == (expected, "operator")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"k": 0}, "K_INVALID"),
        ({"k": 41}, "K_INVALID"),
        ({"tol": 1.0}, "TOL_INVALID"),
        ({"max_products": 23}, "MAX_PRODUCTS_INVALID"),
        ({"num_lanczos_vectors": 6}, "NUM_LANCZOS_VECTORS_INVALID"),
        ({"num_lanczos_vectors": 41}, "NUM_LANCZOS_VECTORS_INVALID"),
        ({"seed": -1}, "SEED_INVALID"),
        ({"which": "LM"}, "FIELD_UNKNOWN"),
    ],
)
def test_svds_has_as_many_values_as_the_smaller_side(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError) as refusal:
        checked(operations()["svds"], values, JACOBIAN)
    assert refusal.value.reason == reason
    assert checked(operations()["svds"], {"k": 40, "num_lanczos_vectors": 40}, JACOBIAN).k == 40


def test_the_vectors_of_a_result_know_their_side_of_the_operator() -> None:
    found = SvdsResult(
        num_products=8,
        singular_values=(2.0, 1.0),
        residuals=(0.0, 0.0),
        transposed_residuals=(0.0, 0.0),
        outcome="CONVERGED",
        adjoint_defect=0.0,
    )
    assert found.vector_spaces() == ("codomain", "codomain", "domain", "domain")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"k": "3"}, "K_INVALID"),
        ({"k": 2.0}, "K_INVALID"),
        ({"k": True}, "K_INVALID"),
        ({"k": 1 << 31}, "K_INVALID"),
        ({"k": None}, "K_INVALID"),
        ({"which": "la"}, "WHICH_UNSUPPORTED"),
        ({"which": 3}, "WHICH_UNSUPPORTED"),
        ({"tol": "small"}, "TOL_INVALID"),
        ({"tol": math.nan}, "TOL_INVALID"),
        ({"tol": None}, "TOL_INVALID"),
        ({"seed": 1 << 64}, "SEED_INVALID"),
        ({"seed": -1}, "SEED_INVALID"),
        ({"num_probes": 3}, "FIELD_UNKNOWN"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_its_fields_name(
    value: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        checked(OPERATION, value, FACTS)
    assert (refusal.value.reason, refusal.value.field) == (reason, next(iter(value)))
    assert refusal.value.message.startswith(("eigsh has no", f"{refusal.value.field} is "))


def test_numbers_of_numpy_are_numbers() -> None:
    values = {"k": np.int64(3), "tol": np.float32(0.5), "seed": np.uint64(2**64 - 1)}
    spec = checked(OPERATION, values, FACTS)
    assert spec == EigshSpec(k=3, tol=0.5, seed=checked(OPERATION, values, FACTS).seed)
    assert int(spec.seed) == 2**64 - 1


@pytest.mark.parametrize("operation", operations().values(), ids=lambda each: each.name)
def test_how_a_job_is_extended_is_declared_and_on_the_page_or_that_it_cannot_be(
    operation: Operation[Any],
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    own = [row for row in rows if f"`{operation.name}`" == row[0].split()[0]]
    assert own, f"docs/extending.md has no row for {operation.name}"
    extension = operation.extension
    if extension is None:
        assert all("cannot be extended: " in row[1] for row in own)
        return
    told = {word for row in own for word in re.findall(r"`(\w+)`", row[1])}
    assert told == set(extension.fields) <= set(field_types(operation.spec))
    assert set(extension.vectors) <= set(operation.result.vectors)
    assert extension.takes_result or not extension.vectors
    assert ("seed" in extension.fields) == extension.new_seed
