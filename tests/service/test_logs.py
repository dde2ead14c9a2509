"""One line for each thing that happened, in one form, and nothing secret in any of them."""

from __future__ import annotations

import base64
import io
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from hvp_protos.v1 import job_pb2, operator_pb2, vector_pb2
from hvp_service.app.dependencies import Dependencies
from hvp_service.app.logs import Patient
from hvp_service.calls.record import add_call
from hvp_service.jobs import service as jobs
from hvp_workers.backend import BackendError

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_transport import Wire, connected, eigsh, refusal, spec
from tests.service.world import PROJECT, create_job, make_operator

PARENT = f"projects/{PROJECT}"
SECRET = "hvp_sentinel0123456789"  # noqa: S105  no key of anything

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
async def wire(deps: Dependencies) -> AsyncIterator[Wire]:
    async with connected(deps) as wire:
        yield wire


@pytest.fixture
def lines() -> Iterator[Lines]:
    """All lines of ours, as the log has them."""
    processors = [structlog.contextvars.merge_contextvars, add_call]
    with structlog.testing.capture_logs(processors) as lines:
        yield lines


async def test_a_call_has_one_line_with_its_method_project_job_and_code(
    deps: Dependencies, wire: Wire, lines: Lines
) -> None:
    job = await create_job(deps, await make_operator(deps))
    await jobs.wait(deps, job.name, 30.0)
    lines.clear()
    await wire.jobs.GetJob(job_pb2.GetJobRequest(name=str(job.name)))
    missing = job_pb2.GetJobRequest(name=f"{PARENT}/jobs/none")
    _, details = await refusal(wire.jobs.GetJob(missing))
    found, refused = lines
    assert (found["event"], found["log_level"], found["code"]) == ("call", "info", "OK")
    assert (found["method"], found["project"]) == ("JobService/GetJob", PROJECT)
    assert found["job"] == str(job.name)
    assert found["generation"] == deps.group.backend.generation
    assert found["duration_s"] > 0
    assert (refused["code"], refused["reason"]) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    assert refused["request_id"] == details["RequestInfo"].request_id != found["request_id"]


async def test_the_line_of_a_new_job_has_its_name_and_so_have_all_lines_of_its_run(
    deps: Dependencies, wire: Wire, lines: Lines
) -> None:
    operator = await spec(deps)
    lines.clear()
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator))
    made = await wire.jobs.CreateJob(request)
    await wire.jobs.WaitJob(
        job_pb2.WaitJobRequest(name=made.job.name, timeout=Duration(seconds=30))
    )
    assert [line["job"] for line in lines if line["event"] == "call"] == [made.job.name] * 2
    run = [line for line in lines if line["event"] != "call"]
    assert {"job started", "answer found", "job left"} <= {line["event"] for line in run}
    for line in run:
        assert line["job"] == made.job.name
        assert (line["attempt"], line["operation"]) == (1, "eigsh")
        assert line["generation"] == deps.group.backend.generation
    assert run[-1]["duration_s"] > 0


@pytest.mark.parametrize(
    ("reason", "level"),
    [("NON_FINITE", "info"), ("OUT_OF_MEMORY", "warning"), ("INTERNAL", "error")],
)
async def test_the_level_of_a_calls_line_says_who_has_to_look_into_it(
    deps: Dependencies,
    backend: QuadraticBackend,
    wire: Wire,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    level: str,
) -> None:
    async def fail(*_: Any) -> None:
        raise BackendError(reason, "a sentence", trace="Traceback: in a rank")

    monkeypatch.setattr(backend, "loss", fail)
    request = operator_pb2.EvaluateLossRequest(operator=await spec(deps))
    lines.clear()
    await refusal(wire.operators.EvaluateLoss(request))
    (line,) = lines
    assert (line["log_level"], line["reason"]) == (level, reason)
    assert ("in a rank" in line.get("exception", "")) == (level == "error")


async def test_a_call_that_its_caller_gives_up_has_a_line_that_says_so(
    deps: Dependencies, backend: QuadraticBackend, wire: Wire, lines: Lines
) -> None:
    backend.gate.clear()
    job = await create_job(deps, await make_operator(deps))
    lines.clear()
    watch = wire.jobs.WatchJob(job_pb2.WatchJobRequest(name=str(job.name)), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in watch:
            pass
    await deps.drain.idle(10.0)  # the server has noticed
    (line,) = [line for line in lines if line["event"] == "call"]
    assert (line["method"], line["code"]) == ("JobService/WatchJob", "DEADLINE_EXCEEDED")
    backend.gate.set()


async def test_no_line_has_credentials_or_elements_of_vectors(
    deps: Dependencies,
    wire: Wire,
    lines: Lines,
    caplog: pytest.LogCaptureFixture,
    backend: QuadraticBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    key = await deps.keys.create(PROJECT, "submit")
    operator = await spec(deps)
    values = np.array([1.2345678901, -9.87654321, 0.0, 1.0, 2.0, 3.0])
    data = values.tobytes()
    head = vector_pb2.CreateVectorRequest(
        parent=PARENT, checkpoint=operator.checkpoint, dtype="float64", request_id="w"
    )
    piece = vector_pb2.WriteVectorRequest(create=head, data=data, crc32c=google_crc32c.value(data))
    for text in (key[1], SECRET):
        metadata = (("authorization", f"Bearer {text}"), ("x-password", SECRET))
        call = wire.vectors.WriteVector(iter([piece]), metadata=metadata)
        if text == SECRET:
            await refusal(call)
        else:
            vector = (await call).vector
            read = vector_pb2.ReadVectorRequest(name=vector.name)
            assert [each.data async for each in wire.vectors.ReadVector(read, metadata=metadata)]

    async def crash(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(backend, "loss", crash)  # its traceback goes through the handlers
    request = operator_pb2.EvaluateLossRequest(operator=operator)
    shown = (("authorization", f"Bearer {key[1]}"),)
    await refusal(wire.operators.EvaluateLoss(request, metadata=shown))
    told = "\n".join([*map(str, lines), *map(_traceback, lines), caplog.text])
    assert "a fault" in told
    for secret in (SECRET, key[1], key[1].rpartition("_")[2]):
        assert secret not in told
    for form in (repr(data)[2:-1], base64.b64encode(data).decode(), data.hex(), "1.2345678901"):
        assert form not in told


def _traceback(line: MutableMapping[str, Any]) -> str:
    return str(structlog.processors.format_exc_info(None, "", dict(line)))


async def test_a_probe_of_the_health_is_a_line_for_those_who_look_for_it(
    wire: Wire, lines: Lines
) -> None:
    from grpc_health.v1 import health_pb2

    await wire.health.Check(health_pb2.HealthCheckRequest())
    assert [line["log_level"] for line in lines] == ["debug"]


SCRIPT = """
import logging, sys, warnings
from hvp_service.app.logs import adopt_loggers, configure_logs
own = logging.getLogger("ray")
own.addHandler(logging.StreamHandler())
own.propagate = False
configure_logs(sys.argv[1], sys.argv[2])
import structlog
log = structlog.get_logger()
with structlog.contextvars.bound_contextvars(job="projects/p/jobs/j"):
    log.debug("quiet"); log.info("ours", number=1)
    own.warning("of %s", "ray"); logging.getLogger("sqlalchemy").info("chatter")
    logging.getLogger("grpc").error("of grpc", exc_info=ValueError("why"))
    logging.getLogger("hvp_workers.models").info("of a worker")
    warnings.warn("of Python")
    try: 1 / 0
    except ZeroDivisionError: log.exception("fault")
"""


def told(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_every_line_is_one_object_of_json_whoever_tells_of_it() -> None:
    found = [json.loads(line) for line in told("info", "json")]
    texts = ["ours", "of ray", "of grpc", "of a worker", "fault"]
    assert [line["event"] for line in found if "of Python" not in line["event"]] == texts
    assert sum("of Python" in line["event"] for line in found) == 1
    for line in found:
        assert line["job"] == "projects/p/jobs/j"
        assert {"timestamp", "level"} <= line.keys()
    by_event = {line["event"]: line for line in found}
    assert (by_event["of ray"]["logger"], by_event["of ray"]["level"]) == ("ray", "warning")
    assert "ValueError: why" in by_event["of grpc"]["exception"]
    assert "ZeroDivisionError" in by_event["fault"]["exception"]


def test_the_level_and_the_form_are_settings() -> None:
    found = told("error", "console")
    assert not any("ours" in line or "of ray" in line for line in found)
    assert any("[error" in line and "fault" in line for line in found)
    with pytest.raises(json.JSONDecodeError):
        json.loads(found[0])


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("closed", [False, True])
def test_a_log_that_cannot_be_written_to_fails_no_call(closed: bool) -> None:
    stream = io.StringIO() if closed else Full()
    if closed:
        stream.close()
    assert Patient(stream).write("a line") == 0
    Patient(stream).flush()
