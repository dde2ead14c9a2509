"""The base of every operator that is asked questions: what they take, and the asking of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hvp_operations.operation import Spectral
from hvp_operations.registry import operations
from hvp_protos.v1 import job_pb2

from hvp_client._labels import check_labels
from hvp_client._results import Plan, plan_from_proto
from hvp_client._session import new_request_id
from hvp_client._specs import job_spec
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.linear_map import AsyncLinearMap
from hvp_client.awaited.vector import AsyncVector


class AsyncAsked(AsyncLinearMap):
    """A linear map that questions can be asked about, each as a job."""

    async def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would cost, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: Arguments of that method, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether the job fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        async with self._named(operation, values) as named:
            answer = await self._create_job(operation, named, validate_only=True)
        return plan_from_proto(answer.plan)

    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]:
        labels = check_labels(labels)
        async with self._named(operation, values) as named:
            answer = await self._create_job(operation, named, labels=labels)
        return AsyncJob(self._session, answer.job)

    @contextlib.asynccontextmanager
    async def _named(
        self, operation: str, values: Mapping[str, Any]
    ) -> AsyncIterator[Mapping[str, Any]]:
        """The arguments of a question with names in the place of vectors, for the block.

        Numbers are brought to the ranks and deleted at the block's end. A job that was queued in
        the block has its vectors until it ends.
        """
        declared = operations().get(operation)
        named = dict(values)
        async with contextlib.AsyncExitStack() as stack:
            for each in declared.inputs if declared else ():
                field = each.field
                given = values.get(field)
                if isinstance(given, Spectral) and each.numbers:
                    given, named[each.numbers] = given.spectral
                if each.taken_from:
                    given = getattr(given, each.taken_from, given)  # of a result
                is_left_out = given is None or (isinstance(given, (list, tuple)) and not given)
                vectors: Sequence[AsyncVector] = ()
                if not is_left_out:
                    vectors = await stack.enter_async_context(self._vectors(given, field))
                named[field] = tuple(vector.name for vector in vectors)
            yield named

    async def _create_job(
        self,
        operation: str,
        values: Mapping[str, Any],
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> job_pb2.CreateJobResponse:
        return await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=job_spec(operation, self._spec, self.shape, self.parameter_names, values),
                labels=labels,
                validate_only=validate_only,
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
