"""The questions that operators answer: made of their declarations by `make sdk`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hvp_operations.block_mass.record import BlockMassResult
from hvp_operations.density.record import DensityResult
from hvp_operations.diagonal.record import DiagonalResult
from hvp_operations.eigsh.record import EigshResult
from hvp_operations.low_rank.record import LowRankResult
from hvp_operations.solve.record import SolveResult
from hvp_operations.svds.record import SvdsResult
from hvp_operations.trace.record import TraceResult
from hvp_operations.trace_of.record import TraceOfResult

from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.vector import AsyncVector


class AsyncQuestions(ABC):
    """Every question about a symmetric matrix, as a job."""

    @abstractmethod
    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]: ...

    async def block_mass(
        self,
        by: str | Sequence[Any] | Mapping[str, Any] = "layer",
        *,
        num_probes: int = 64,
        rtol: float = 0.05,
        atol: float = 0.0001,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[BlockMassResult]:
        """Estimate how much of the matrix lies outside of its diagonal blocks, with an interval.

        The parameters are divided into blocks, and the matrix A into blocks A_ab of rows a and
        columns b. Their masses ‖A_ab‖², squares of Frobenius norms, are estimated by products
        with the parts that random vectors have on each block: of B blocks each vector takes B
        products. The run stops when the standard error of the off-block fraction, the mass off
        the diagonal blocks over the whole mass, is at most rtol times it, or at most `atol`.

        Args:
            by: How to divide the parameters into blocks: `layer` (names that agree up to the
                first number, and of the others those of one module), `tensor`, or the patterns
                of each block; 2 to 128 blocks that are disjoint and together all of the
                parameters.
            num_probes: Upper bound on the random vectors, 8 to 4096.
            rtol: Tolerance on the fraction's standard error, relative to the fraction, 0 < rtol
                < 1.
            atol: Tolerance on that standard error itself; the larger of the two counts.
            max_products: Upper bound on products; None lets the server choose.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `ATOL_INVALID`, `BY_INVALID`, `MAX_PRODUCTS_INVALID`,
                `NUM_PROBES_INVALID`, `PARAMETERS_INVALID`, `PARAMETERS_NOT_FOUND`,
                `RTOL_INVALID`, `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "block_mass",
            {
                "by": by,
                "num_probes": num_probes,
                "rtol": rtol,
                "atol": atol,
                "max_products": max_products,
                "seed": seed,
            },
            labels,
        )

    async def density(
        self,
        *,
        num_probes: int = 8,
        num_steps: int = 80,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[DensityResult]:
        """Estimate the spectral density by stochastic Lanczos quadrature.

        Each of K random probes gives an independent estimate of the whole spectrum, and the
        error of their mean falls as 1/√K. With m steps of Lanczos the moments of what a probe
        sees are exact up to degree 2m − 1, and features narrower than the spectrum's width over
        m are smeared.

        Args:
            num_probes: K, the number of random probes.
            num_steps: m, the number of Lanczos steps of each probe.
            seed: Seed of the probes.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `NUM_PROBES_INVALID`, `NUM_STEPS_INVALID`, `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "density",
            {"num_probes": num_probes, "num_steps": num_steps, "seed": seed},
            labels,
        )

    async def diagonal(
        self,
        method: Literal["auto", "hutchinson", "xdiag"] = "auto",
        *,
        rtol: float = 0.1,
        atol: float = 0.0,
        max_products: int | None = None,
        per: Literal["tensor", "layer"] | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[DiagonalResult[AsyncVector]]:
        """Estimate the diagonal by products with random signs, and the error of each element.

        The run stops when the norm of the standard error is at most rtol times that of the
        diagonal, or at most `atol`.

        Args:
            method: `hutchinson` averages z ∘ Az over random signs z; `xdiag` takes the diagonal
                on a sketch of the range exactly and averages over the rest, with each random
                vector left out of the sketch in turn. `auto` takes `xdiag` where there is
                memory for a sketch, and lets the sketch grow for as long as that pays; the
                result says why.
            rtol: Tolerance on the norm of the standard error, relative to that of the diagonal,
                0 < rtol < 1.
            atol: Tolerance on the norm of the standard error in units of the diagonal's; the
                larger of the two counts.
            max_products: Upper bound on products; None lets the server choose.
            per: `tensor` or `layer` gives sums over the parts of the diagonal from the same
                products, by `hutchinson`; None gives none.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `ATOL_INVALID`, `MAX_PRODUCTS_INVALID`, `METHOD_UNSUPPORTED`,
                `PER_UNSUPPORTED`, `RTOL_INVALID`, `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "diagonal",
            {
                "method": method,
                "rtol": rtol,
                "atol": atol,
                "max_products": max_products,
                "per": per,
                "seed": seed,
            },
            labels,
        )

    async def eigsh(
        self,
        k: int = 6,
        which: Literal["LA", "SA", "LM", "BE"] = "LM",
        *,
        tol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        num_lanczos_vectors: int | None = None,
        block_size: int | None = None,
        v0: AsyncVector | Sequence[AsyncVector] | Any = None,
        method: Literal["auto", "lanczos", "two_pass"] = "auto",
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[EigshResult[AsyncVector]]:
        """Search for k extremal eigenpairs by Lanczos, and verify them in float64.

        With a block size b > 1 products are taken b at a time, which share what does not depend
        on their vectors, and b copies of a repeated eigenvalue are found at once.

        Args:
            k: Number of eigenpairs, 1 ≤ k ≤ n.
            which: `LA` largest, `SA` smallest, `LM` largest in magnitude, `BE` half from each
                end and the odd one from the high end.
            tol: Stop when every wanted pair's estimated residual is at most tol times the
                largest Ritz value's magnitude, 0 ≤ tol < 1; 0 means the dtype's rounding.
            max_products: Upper bound on products, those that show completeness and those of the
                final residuals included; None lets the server choose.
            seed: Seed of the starting vectors, and of those that show completeness.
            num_lanczos_vectors: Rows of the Krylov basis, more than k where k < n; None lets
                the server choose by memory.
            block_size: b, the number of vectors whose products are taken in one call, 1 to 4;
                None lets the server choose, which takes 1.
            v0: Vectors to begin with, for example the eigenvectors of an earlier checkpoint;
                random ones where it is left out. Whatever they are, completeness is shown from
                random vectors. A vector on the server or a sequence of them, or real numbers
                (n,) or (n, k), which travel. A result stands for its `eigenvectors`.
            method: `lanczos` keeps a basis, of k + 8 rows or more; `two_pass` keeps none, and
                makes the products of one run twice, which takes k + 2 rows and does not know of
                blocks; `auto`: `lanczos` where memory allows its basis, else `two_pass`.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `BLOCK_SIZE_INVALID`, `K_INVALID`, `MAX_PRODUCTS_INVALID`,
                `METHOD_UNSUPPORTED`, `NUM_LANCZOS_VECTORS_INVALID`, `SEED_INVALID`,
                `TOL_INVALID`, `V0_INVALID`, `VECTORS_MISSING`, `VECTOR_SPACE_MISMATCH`,
                `WHICH_UNSUPPORTED`.
            NotFoundError: A vector is gone.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`, `INPUT_MISSING`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "eigsh",
            {
                "k": k,
                "which": which,
                "tol": tol,
                "max_products": max_products,
                "seed": seed,
                "num_lanczos_vectors": num_lanczos_vectors,
                "block_size": block_size,
                "v0": v0,
                "method": method,
            },
            labels,
        )

    async def low_rank(
        self,
        k: int = 20,
        method: Literal["auto", "nystrom", "eigsh"] = "auto",
        *,
        oversampling: int = 10,
        tol: float = 0.001,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[LowRankResult[AsyncVector]]:
        """Approximate the operator by a matrix of rank k that stays on the ranks.

        The result A_k = U diag(eigenvalues) Uᵀ is a matrix to compute with: `L @ v`,
        `L.solve(b, λ)`, `L.logdet(λ)`, and a preconditioner of `solve`. How far it is from A is
        bounded by products with a random vector that it does not depend on.

        Args:
            k: Number of vectors, 1 ≤ k ≤ n.
            method: `nystrom`, of a matrix without negative eigenvalues such as a GGN: what A
                does to random vectors, k + oversampling products in all; `eigsh`: the k
                eigenpairs of largest magnitude by Lanczos, the best there is, for more
                products. `auto` takes `nystrom` where it can.
            oversampling: Of `nystrom`: random vectors beyond k, 0 or more; each makes it
                better.
            tol: Of `eigsh`: residual of a pair that will do, relative to the largest
                eigenvalue's magnitude, 0 ≤ tol < 1.
            max_products: Upper bound on products, those that bound the error included; None
                lets the server choose.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `K_INVALID`, `MAX_PRODUCTS_INVALID`, `METHOD_UNSUPPORTED`,
                `OVERSAMPLING_INVALID`, `SEED_INVALID`, `TOL_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "low_rank",
            {
                "k": k,
                "method": method,
                "oversampling": oversampling,
                "tol": tol,
                "max_products": max_products,
                "seed": seed,
            },
            labels,
        )

    async def solve(
        self,
        b: AsyncVector | Sequence[AsyncVector] | Any,
        *,
        damping: float = 0.0,
        method: Literal["auto", "cg", "minres"] = "auto",
        tol: float = 1e-06,
        max_products: int | None = None,
        x0: AsyncVector | Sequence[AsyncVector] | Any = None,
        preconditioner: AsyncVector | Sequence[AsyncVector] | Any = None,
        preconditioner_values: Sequence[float] = (),
        factors: Literal["kronecker"] | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[SolveResult[AsyncVector]]:
        """Solve (A + λI) x = b by conjugate gradients or MINRES, for one b or several at once.

        Every right-hand side ends with the residual of its x, taken from a fresh product in
        float64. Where the products of the recurrence are too coarse for the tolerance, it is
        begun again from that residual for as long as this helps. Right-hand sides go in
        lockstep: their products share what does not depend on them.

        A preconditioner is a matrix M near A that is cheap to invert. Each step applies (M +
        λI)⁻¹, and the nearer M is, the fewer steps there are. Where M is U diag(values) Uᵀ with
        k orthonormal vectors, what is orthogonal to them is multiplied by 1 / (λ + the least of
        the values) (Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44 (2023)). Instead
        of given vectors, M can be made of Kronecker factors of the model's own, at the price of
        a gradient (Martens and Grosse, ICML 2015).

        Args:
            b: The right-hand side, or several. A vector on the server or a sequence of them, or
                real numbers (n,) or (n, k), which travel.
            damping: λ, which is added to the diagonal; below 0 for MINRES alone.
            method: `cg`, which needs A + λI to be positive definite and tells where it is not;
                `minres` for any symmetric matrix; `auto`: `cg` for matrices that have no
                negative eigenvalue, such as a GGN, unless λ < 0, else `minres`.
            tol: Stop when ‖b − (A + λI) x‖ ≤ tol ‖b‖, 0 < tol < 1.
            max_products: Upper bound on products for each right-hand side, those of its
                residual included; None lets the server choose.
            x0: Start for each right-hand side; zero where it is left out. A vector on the
                server or a sequence of them, or real numbers (n,) or (n, k), which travel. A
                result stands for its `x`.
            preconditioner: Result of `low_rank`; or one vector d with dᵢ ≥ 0 and dᵢ + λ > 0,
                the diagonal of a matrix near A; or the vectors of a low-rank matrix, with their
                values. λ is added to it, as to A. A vector on the server or a sequence of them,
                or real numbers (n,) or (n, k), which travel.
            preconditioner_values: Eigenvalues of the low-rank matrix, 0 or more, and above 0
                with λ; a result of `low_rank` brings its own.
            factors: `kronecker`, in the place of `preconditioner`: M has a Kronecker product
                for each matrix of parameters, of its layer's inputs and of its outputs'
                gradients, and a multiple of the identity for each other parameter. For a matrix
                of the model's own, such as the Hessian or the ggn, and λ > 0.
            seed: Seed of the labels that are drawn from the model for the factors. A Fisher
                matrix has its own seed, and an empirical one the batch's labels.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `B_INVALID`, `DAMPING_INVALID`, `FACTORS_INVALID`,
                `FACTORS_UNSUPPORTED`, `MAX_PRODUCTS_INVALID`, `METHOD_UNSUPPORTED`,
                `OPERATOR_HAS_NO_FACTORS`, `PRECONDITIONER_INVALID`,
                `PRECONDITIONER_VALUES_INVALID`, `SEED_INVALID`, `TOL_INVALID`,
                `VECTORS_MISSING`, `VECTOR_SPACE_MISMATCH`, `X0_INVALID`.
            NotFoundError: A vector is gone.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`, `INPUT_MISSING`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "solve",
            {
                "b": b,
                "damping": damping,
                "method": method,
                "tol": tol,
                "max_products": max_products,
                "x0": x0,
                "preconditioner": preconditioner,
                "preconditioner_values": preconditioner_values,
                "factors": factors,
                "seed": seed,
            },
            labels,
        )

    async def trace(
        self,
        method: Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"] = "auto",
        *,
        rtol: float = 0.01,
        atol: float = 0.0,
        max_products: int | None = None,
        per: Literal["tensor", "layer"] | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[TraceResult]:
        """Estimate the trace by products with random vectors, with a 95 % interval.

        The run stops when the standard error is at most rtol · |value|, or at most `atol`.

        Args:
            method: `hutchinson` averages z·Az over random signs z; `hutch++` takes the trace on
                a sketch of the range exactly and averages over the rest; `xtrace` does so with
                each random vector left out in turn; `xnystrace`, of a matrix without negative
                eigenvalues, needs half the products of that. `auto` chooses, and the result
                says why.
            rtol: Tolerance on the standard error, relative to the value, 0 < rtol < 1.
            atol: Tolerance on the standard error in units of the trace; the larger of the two
                counts.
            max_products: Upper bound on products; None lets the server choose.
            per: `tensor` or `layer` gives traces of the diagonal blocks from the same products,
                by `hutchinson`; None gives that of the whole alone.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `ATOL_INVALID`, `MAX_PRODUCTS_INVALID`, `METHOD_UNSUPPORTED`,
                `PER_UNSUPPORTED`, `RTOL_INVALID`, `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "trace",
            {
                "method": method,
                "rtol": rtol,
                "atol": atol,
                "max_products": max_products,
                "per": per,
                "seed": seed,
            },
            labels,
        )

    async def trace_of(
        self,
        function: Literal["log", "exp", "inverse", "sqrt", "count"] = "log",
        *,
        damping: float = 0.0,
        low: float | None = None,
        high: float | None = None,
        num_steps: int | None = None,
        rtol: float = 0.01,
        atol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[TraceOfResult]:
        """Estimate tr f(A + λI) by stochastic Lanczos quadrature, with a 95 % interval.

        Lanczos from a random vector z gives bounds on z·f(A + λI)z that close in as it goes on.
        The run takes as many steps as make them narrow beside the spread over the vectors, and
        as many vectors as the tolerance needs. What the steps leave open, what rounding does
        and the spread over the vectors are all in the interval.

        Args:
            function: `log` (the log determinant), `exp`, `inverse` or `sqrt`; `count`: the
                number of eigenvalues in (low, high]. `log` and `inverse` need A + λI to be
                positive definite, `sqrt` to have no negative eigenvalue; where a Ritz value
                shows that it is not, the run ends at once and the result says so.
            damping: λ, which is added to the diagonal.
            low: Of `count`, the lower end of the interval, which does not belong to it; by
                default there is none.
            high: Of `count`, the upper end, which does; by default there is none.
            num_steps: Upper bound on the Lanczos steps of each vector; None lets the server
                choose.
            rtol: Tolerance on standard error and quadrature error together, relative to the
                value, 0 < rtol < 1.
            atol: Tolerance on them in units of the value; the larger of the two counts. Of
                `count` it is at least 0.25.
            max_products: Upper bound on products; None lets the server choose.
            seed: Seed of the random vectors.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `ATOL_INVALID`, `DAMPING_INVALID`, `FUNCTION_UNSUPPORTED`,
                `HIGH_INVALID`, `LOW_INVALID`, `MAX_PRODUCTS_INVALID`, `NUM_STEPS_INVALID`,
                `RTOL_INVALID`, `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "trace_of",
            {
                "function": function,
                "damping": damping,
                "low": low,
                "high": high,
                "num_steps": num_steps,
                "rtol": rtol,
                "atol": atol,
                "max_products": max_products,
                "seed": seed,
            },
            labels,
        )


class AsyncJacobianQuestions(ABC):
    """Every question about a Jacobian, as a job."""

    @abstractmethod
    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]: ...

    async def svds(
        self,
        k: int = 6,
        *,
        tol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        num_lanczos_vectors: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob[SvdsResult[AsyncVector]]:
        """Search for the k largest singular values by Golub-Kahan-Lanczos bidiagonalisation.

        Both bases are kept orthogonal, every triplet is verified by a product each way in
        float64, and a run from a fresh random vector looks for what the first one may have
        missed.

        Args:
            k: Number of singular values, 1 ≤ k ≤ min(m, n).
            tol: Stop when every wanted triplet's estimated residual is at most tol times the
                largest singular value, 0 ≤ tol < 1; 0 means the dtype's rounding.
            max_products: Upper bound on products with J and with Jᵀ together, those that show
                completeness and those of the final residuals included; None lets the server
                choose.
            seed: Seed of the starting vector.
            num_lanczos_vectors: Vectors of each of the two bases, more than k where k < min(m,
                n); None lets the server choose by memory.
            labels: Kept with the job.

        Returns:
            The job, queued; `result()` waits for it.

        Raises:
            InvalidArgumentError: `K_INVALID`, `MAX_PRODUCTS_INVALID`,
                `NUM_LANCZOS_VECTORS_INVALID`, `SEED_INVALID`, `TOL_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        return await self._ask(
            "svds",
            {
                "k": k,
                "tol": tol,
                "max_products": max_products,
                "seed": seed,
                "num_lanczos_vectors": num_lanczos_vectors,
            },
            labels,
        )
