"""The tree of errors, and how a server's answer becomes one of it."""

from __future__ import annotations

import pickle
from typing import cast

import grpc
import pytest
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hvp_client import (
    DeadlineExceededError,
    HvpError,
    InvalidArgumentError,
    JobFailedError,
    NotFoundError,
    ServerUnreachableError,
    UnavailableError,
)
from hvp_client._exceptions import BY_STATUS
from hvp_client._results import error_from_proto
from hvp_client._status import error_from_rpc
from hvp_client._wire import is_resumable
from hvp_protos.v1 import job_pb2

ERRORS = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


def failure(status: grpc.StatusCode, message: str, *details: Message) -> grpc.aio.AioRpcError:
    packed = []
    for detail in details:
        packed.append(PackedAny())
        packed[-1].Pack(detail)
    rich = status_pb2.Status(code=status.value[0], message=message, details=packed)
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", rich.SerializeToString()))
    return bare_failure(status, message, metadata)


def bare_failure(
    status: grpc.StatusCode, message: str, trailing: grpc.aio.Metadata | None = None
) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(status, empty, trailing or empty, message, "")


@pytest.mark.parametrize("status", ERRORS, ids=lambda status: status.name)
def test_each_of_the_sixteen_statuses_has_its_own_class(status: grpc.StatusCode) -> None:
    info = error_details_pb2.ErrorInfo(reason="WHY", domain="hvp.dev")
    error = error_from_rpc(failure(status, "what happened", info), address="a:1")
    assert type(error) is BY_STATUS[status.name]
    assert error.code == type(error).code == status.name
    assert len(set(BY_STATUS.values())) == len(BY_STATUS) == 16


def test_an_internal_error_that_no_server_sent_is_a_broken_stream_that_may_go_on() -> None:
    error = error_from_rpc(
        bare_failure(grpc.StatusCode.INTERNAL, "Internal error from Core"), address="a:1"
    )
    assert (error.code, error.reason) == ("INTERNAL", "STATUS_LOST")
    assert is_resumable(error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain="hvp.dev")
    sent = error_from_rpc(failure(grpc.StatusCode.INTERNAL, "a fault", info), address="a:1")
    assert (sent.reason, str(sent)) == ("INTERNAL", "INTERNAL: a fault")
    assert not is_resumable(sent)


def test_reason_field_metadata_delay_and_request_id_come_from_the_details() -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="vector", description="too short")
    error = error_from_rpc(
        failure(
            grpc.StatusCode.INVALID_ARGUMENT,
            "12 elements, 13 expected",
            error_details_pb2.ErrorInfo(reason="SHAPE_MISMATCH", metadata={"expected": "13"}),
            bad,
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
            error_details_pb2.RequestInfo(request_id="r-1"),
        ),
        address="a:1",
    )
    assert isinstance(error, InvalidArgumentError)
    assert (error.reason, error.field, error.request_id) == ("SHAPE_MISMATCH", "vector", "r-1")
    assert error.metadata == {"expected": "13"}
    assert error.retry_after_s == 1.5
    assert str(error) == "SHAPE_MISMATCH: 12 elements, 13 expected"


def test_a_status_without_details_is_still_its_class() -> None:
    error = error_from_rpc(
        bare_failure(grpc.StatusCode.NOT_FOUND, "gone"), address="a:1", request_id="mine"
    )
    assert isinstance(error, NotFoundError)
    assert (error.reason, error.message, error.request_id) == ("NOT_FOUND", "gone", "mine")


def test_details_that_contradict_the_status_are_left_out() -> None:
    lying = failure(grpc.StatusCode.NOT_FOUND, "gone", error_details_pb2.ErrorInfo(reason="X"))
    metadata = cast("grpc.aio.Metadata", lying.trailing_metadata())
    error = error_from_rpc(
        bare_failure(grpc.StatusCode.INTERNAL, "broken", metadata),
        address="a:1",
    )
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")


def test_unavailable_without_a_reason_means_that_no_server_answered() -> None:
    refused = bare_failure(grpc.StatusCode.UNAVAILABLE, "refused")
    error = error_from_rpc(refused, address="127.0.0.1:9")
    assert isinstance(error, ServerUnreachableError)
    assert isinstance(error, UnavailableError)
    assert isinstance(error, ConnectionError)
    assert "127.0.0.1:9" in error.message
    assert "hvp serve" in error.message


@pytest.mark.parametrize(
    "kind", [*BY_STATUS.values(), ServerUnreachableError, JobFailedError], ids=lambda k: k.__name__
)
def test_every_error_survives_pickling(kind: type[HvpError]) -> None:
    error = kind("m", reason="R", field="f", metadata={"a": "b"}, request_id="r", retry_after_s=2)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == "R: m"


def test_errors_that_python_has_a_word_for_are_that_too() -> None:
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(DeadlineExceededError, TimeoutError)


def test_a_failed_job_says_what_a_call_would_have_said() -> None:
    message = job_pb2.JobError(code=11, reason="NON_FINITE", message="m", metadata={"block": "3"})
    error = error_from_proto(message, JobFailedError, "projects/p/jobs/j")
    assert (error.code, error.reason) == ("OUT_OF_RANGE", "NON_FINITE")
    assert error.metadata == {"block": "3", "job": "projects/p/jobs/j"}
