"""The blocking side of `hvp_client.awaited.asked`: made of it by `make sdk`."""

from __future__ import annotations

from typing import Any

from hvp_client._results import Plan
from hvp_client.awaited.asked import AsyncAsked
from hvp_client.blocking.linear_map import LinearMap
from hvp_client.blocking.twins import twin_of


class Asked(LinearMap, twin=AsyncAsked):
    """A linear map that questions can be asked about, each as a job."""

    _twin: AsyncAsked

    def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would cost, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: Arguments of that method, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether the job fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        return self._portal.run(
            self._twin.plan(operation, **{name: twin_of(value) for name, value in values.items()})
        )
