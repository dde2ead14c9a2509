"""The blocking side of `hvp_client.awaited.functions`: made of it by `make sdk`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvp_operations.trace_of.record import TraceOfResult

from hvp_client.awaited.functions import AsyncFunctions
from hvp_client.blocking.job import Job
from hvp_client.blocking.questions import Questions


class Functions(Questions, twin=AsyncFunctions):
    """Log determinants and counts, by `trace_of`."""

    _twin: AsyncFunctions

    def logdet(
        self,
        *,
        damping: float = 0.0,
        rtol: float = 0.01,
        atol: float = 0.0,
        num_steps: int | None = None,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> Job[TraceOfResult]:
        """Estimate log det(A + λI), the trace of the logarithm; see `trace_of`.

        Args:
            damping: λ; A + λI has to be positive definite, or the outcome is `INDEFINITE`.
            rtol: Tolerance relative to the value, 0 < rtol < 1.
            atol: Tolerance in units of the value; the larger of the two counts.
            num_steps: Upper bound on the Lanczos steps of each probe; None lets the server choose.
            max_products: Upper bound on products; None lets the server choose.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            HvpError: As `trace_of`.
        """
        result: Job[TraceOfResult] = self._wait(
            self._twin.logdet(
                damping=damping,
                rtol=rtol,
                atol=atol,
                num_steps=num_steps,
                max_products=max_products,
                seed=seed,
                labels=labels,
            )
        )
        return result

    def count(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        rtol: float = 0.01,
        atol: float = 0.0,
        num_steps: int | None = None,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> Job[TraceOfResult]:
        """Estimate how many eigenvalues of A lie in (low, high]; see `trace_of`.

        Args:
            low: The lower end, which does not belong to the interval.
            high: The upper end, which does.
            rtol: Tolerance relative to the value, 0 < rtol < 1.
            atol: Tolerance in units of the value; the largest of the two and of 0.25 counts.
            num_steps: Upper bound on the Lanczos steps of each probe; None lets the server choose.
            max_products: Upper bound on products; None lets the server choose.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            HvpError: As `trace_of`.
        """
        result: Job[TraceOfResult] = self._wait(
            self._twin.count(
                low,
                high,
                rtol=rtol,
                atol=atol,
                num_steps=num_steps,
                max_products=max_products,
                seed=seed,
                labels=labels,
            )
        )
        return result
