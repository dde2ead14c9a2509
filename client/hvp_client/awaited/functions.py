"""Numbers of a spectrum that have a name of their own: questions that `trace_of` answers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvp_operations.trace_of.record import TraceOfResult

from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.questions import AsyncQuestions


class AsyncFunctions(AsyncQuestions):
    """Log determinants and counts, by `trace_of`."""

    async def logdet(
        self,
        *,
        damping: float = 0.0,
        rtol: float = 0.01,
        atol: float = 0.0,
        num_steps: int | None = None,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[TraceOfResult]:
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
        return await self.trace_of(
            "log",
            damping=damping,
            rtol=rtol,
            atol=atol,
            num_steps=num_steps,
            max_products=max_products,
            seed=seed,
            labels=labels,
        )

    async def count(
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
    ) -> AsyncJob[TraceOfResult]:
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
        return await self.trace_of(
            "count",
            low=None if low == -math.inf else low,
            high=None if high == math.inf else high,
            rtol=rtol,
            atol=atol,
            num_steps=num_steps,
            max_products=max_products,
            seed=seed,
            labels=labels,
        )
