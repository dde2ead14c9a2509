"""Blocking handles: vectors, operators and jobs as most people use them.

Each wraps its awaitable twin and adds nothing but the wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard, final, overload

import numpy as np
from numpy.typing import NDArray

from hvp_client._exceptions import HvpError
from hvp_client._jobs import AsyncJob
from hvp_client._operators import AsyncOperator
from hvp_client._portal import Portal
from hvp_client._results import EigshResult, Event, Progress
from hvp_client._vectors import AsyncVector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@final
class Vector:
    """A vector of parameter space that lives on the server's ranks, n elements under a name.

    Element order is the canonical flat index: parameters as in the model's `named_parameters()`, a
    tied tensor once, row-major. Arithmetic happens on the ranks and gives new vectors. A vector
    that this client made is freed on the server some time after its last reference is gone, or at
    once by `delete()` or at the end of a `with` block; one that was looked up by name, and an
    eigenvector, stays until it is deleted.
    """

    __array_ufunc__ = None  # leaves np.float64(2) * v to this class

    def __init__(self, portal: Portal, twin: AsyncVector):
        self._portal = portal
        self._twin = twin

    @property
    def name(self) -> str:
        """`projects/{project}/vectors/{id}`."""
        return self._twin.name

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint whose parameter space it is in."""
        return self._twin.checkpoint

    @property
    def shape(self) -> tuple[int]:
        """`(n,)`."""
        return self._twin.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Float32 or float64."""
        return self._twin.dtype

    @property
    def durable(self) -> bool:
        """Whether the server can make it again when its ranks are started anew."""
        return self._twin.durable

    @property
    def create_time(self) -> datetime:
        """When it was made, UTC."""
        return self._twin.create_time

    def dot(self, other: Vector) -> float:
        """u·v, accumulated in float64 on the ranks.

        Args:
            other: A vector of the same checkpoint and dtype.

        Returns:
            The inner product; only this number travels.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.dot(other._twin))

    def norm(self) -> float:
        """‖v‖₂, accumulated in float64 on the ranks."""
        return self._portal.run(self._twin.norm())

    def numpy(self) -> NDArray[Any]:
        """Fetch the elements.

        Returns:
            A fresh array (n,) of the vector's dtype. Every chunk's checksum has been verified.

        Raises:
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.numpy())

    def axpy(self, scale: float, other: Vector) -> Vector:
        """Add a multiple of another: v + scale·other in one step.

        Args:
            scale: A finite number.
            other: A vector of the same checkpoint and dtype.

        Returns:
            A new vector.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH` or `NON_FINITE`.
        """
        return self._wrap(self._portal.run(self._twin.axpy(scale, other._twin)))

    def delete(self) -> None:
        """Free it on the server now.

        Raises:
            NotFoundError: It is gone already.
        """
        self._portal.run(self._twin.delete())

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin + other._twin))

    def __sub__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin - other._twin))

    def __mul__(self, scale: float) -> Vector:
        if not isinstance(scale, (int, float, np.number)):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin * float(scale)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin / float(divisor)))

    def __neg__(self) -> Vector:
        return self._wrap(self._portal.run(-self._twin))

    def __enter__(self) -> Vector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.delete()

    def _wrap(self, twin: AsyncVector) -> Vector:
        return Vector(self._portal, twin)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.shape} {self.dtype}>"


@final
class Operator:
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`.

    It has what SciPy asks of an operator, so `scipy.sparse.linalg.eigsh(H)` runs on this side with
    every product travelling; `eigsh` below runs where the vectors are.
    """

    __array_ufunc__ = None  # `array @ H` is not a numpy product

    def __init__(self, portal: Portal, twin: AsyncOperator):
        self._portal = portal
        self._twin = twin

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`, n the number of parameters."""
        return self._twin.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return self._twin.dtype

    @property
    def kind(self) -> str:
        """`hessian`, `ggn` or `empirical_fisher`."""
        return self._twin.kind

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._twin.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._twin.batch

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._twin.micro_batch_size

    def loss(self) -> float:
        """L(θ): mean over every supervised target of the batch, nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        return self._portal.run(self._twin.loss())

    def gradient(self) -> Vector:
        """∇L(θ), left on the ranks.

        Returns:
            A new vector. Cost: 4 GEMM passes.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        return self._wrap(self._portal.run(self._twin.gradient()))

    @overload
    def matvec(self, v: Vector) -> Vector: ...
    @overload
    def matvec(self, v: Any) -> NDArray[Any]: ...
    def matvec(self, v: Any) -> Vector | NDArray[Any]:
        """Hv.

        Args:
            v: A vector, or real numbers (n,) or (n, 1).

        Returns:
            A new vector for a vector; for numbers an array of their shape in `dtype`, for which v
            and Hv travel. Cost: one product.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE`, `DTYPE_UNSUPPORTED` or
                `VECTOR_SPACE_MISMATCH`; `field` is `v`.
            OutOfRangeError: `NON_FINITE`: the product is not finite.
        """
        if isinstance(v, Vector):
            return self._wrap(self._portal.run(self._twin.matvec(v._twin)))
        numbers: NDArray[Any] = self._portal.run(self._twin.matvec(v))
        return numbers

    @overload
    def matmat(self, V: Sequence[Vector]) -> list[Vector]: ...
    @overload
    def matmat(self, V: Any) -> NDArray[Any]: ...
    def matmat(self, V: Any) -> list[Vector] | NDArray[Any]:
        """HV for k vectors at once, which share the gathering of the weights.

        Args:
            V: A sequence of vectors, or real numbers (n, k).

        Returns:
            As many new vectors, or an array (n, k). Cost: k products; on the ranks 2k vectors.

        Raises:
            InvalidArgumentError: As for matvec.
            ResourceExhaustedError: `VECTOR_MEMORY`: give fewer at once.
        """
        if _is_vectors(V):
            twins = self._portal.run(self._twin.matmat([v._twin for v in V]))
            return [self._wrap(twin) for twin in twins]
        numbers: NDArray[Any] = self._portal.run(self._twin.matmat(V))
        return numbers

    # H is symmetric, so its adjoint is itself.
    rmatvec = matvec
    rmatmat = matmat

    @overload
    def __matmul__(self, other: Vector) -> Vector: ...
    @overload
    def __matmul__(self, other: list[Vector] | tuple[Vector, ...]) -> list[Vector]: ...
    @overload
    def __matmul__(self, other: Any) -> NDArray[Any]: ...
    def __matmul__(self, other: Any) -> Vector | list[Vector] | NDArray[Any]:
        if isinstance(other, Vector):
            return self.matvec(other)
        if _is_vectors(other):
            return self.matmat(other)
        product: NDArray[Any] = self._portal.run(self._twin @ other)
        return product

    def random_vector(self, *, seed: int, distribution: str = "rademacher") -> Vector:
        """A random probe, expanded on the ranks from its seed.

        Args:
            seed: From 0 to 2**64 − 1; the same vector on any number of ranks.
            distribution: `rademacher` (±1), `gaussian` or `sphere` (uniform, of norm 1).

        Returns:
            A new vector; nothing but the seed travels.

        Raises:
            InvalidArgumentError: `SEED_INVALID` or `DISTRIBUTION_UNSPECIFIED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        twin = self._twin.random_vector(seed=seed, distribution=distribution)
        return self._wrap(self._portal.run(twin))

    def vector(self, array: Any) -> Vector:
        """Bring an array to the ranks.

        Args:
            array: Real finite numbers (n,): numpy, or anything `np.asarray` takes.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        return self._wrap(self._portal.run(self._twin.vector(array)))

    def zeros(self) -> Vector:
        """The zero vector."""
        return self._wrap(self._portal.run(self._twin.zeros()))

    def parameters(self) -> Vector:
        """θ, the model's own parameters."""
        return self._wrap(self._portal.run(self._twin.parameters()))

    def eigsh(
        self,
        k: int,
        which: str = "LM",
        *,
        tol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        num_lanczos_vectors: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Job:
        """Queue a search for k extremal eigenpairs by thick-restart Lanczos.

        Args:
            k: How many, 1 ≤ k < n.
            which: `LA` largest, `SA` smallest, `LM` largest in magnitude, `BE` half from each end
                and the odd one from the high end.
            tol: Stop when every wanted pair's estimated residual is at most tol times the largest
                Ritz value's magnitude; 0 means the dtype's rounding.
            max_products: Upper bound on products, those of the final residuals included; None
                lets the server choose.
            seed: Of the starting vector.
            num_lanczos_vectors: Rows of the Krylov basis; None lets the server choose by memory.
            labels: Kept with the job.

        Returns:
            The job; `result()` waits for it.

        Raises:
            InvalidArgumentError: `K_INVALID`, `WHICH_UNSUPPORTED`, `TOL_INVALID`,
                `MAX_PRODUCTS_INVALID`, `NUM_LANCZOS_VECTORS_INVALID` or `SEED_INVALID`.
            FailedPreconditionError: `INSUFFICIENT_CLUSTER_MEMORY`.
            ResourceExhaustedError: `QUEUE_FULL`.
        """
        coroutine = self._twin.eigsh(
            k,
            which,
            tol=tol,
            max_products=max_products,
            seed=seed,
            num_lanczos_vectors=num_lanczos_vectors,
            labels=labels,
        )
        return Job(self._portal, self._portal.run(coroutine))

    def as_linear_operator(self) -> LinearOperator:
        """Make a `scipy.sparse.linalg.LinearOperator` of it.

        Returns:
            An operator on arrays; each product travels both ways.

        Raises:
            ImportError: SciPy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            self.shape,
            matvec=self.matvec,
            rmatvec=self.rmatvec,
            matmat=self.matmat,
            rmatmat=self.rmatmat,
            dtype=self.dtype,
        )

    def _wrap(self, twin: AsyncVector) -> Vector:
        return Vector(self._portal, twin)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} of {self.checkpoint} {self.shape} {self.dtype}>"


@final
class Job:
    """Long work on the server: a row that outlives this client and the server's own restarts.

    `state`, `attempt`, `progress` and `error` are asked for when they are read, until the job is
    known to have ended.
    """

    def __init__(self, portal: Portal, twin: AsyncJob):
        self._portal = portal
        self._twin = twin

    @property
    def name(self) -> str:
        """`projects/{project}/jobs/{id}`."""
        return self._twin.name

    @property
    def state(self) -> str:
        """`QUEUED`, `RUNNING`, `CANCELLING`, `SUCCEEDED`, `FAILED` or `CANCELLED`."""
        return self._current().state

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self._current().ended

    @property
    def attempt(self) -> int:
        """Which run this is, from 1; one more after each loss of the server or a rank."""
        return self._current().attempt

    @property
    def progress(self) -> Progress | None:
        """Where the run stands; None before the first product."""
        return self._current().progress

    @property
    def error(self) -> HvpError | None:
        """Why it failed, as an exception that is not raised; None unless it did."""
        return self._current().error

    @property
    def labels(self) -> dict[str, str]:
        """As given when the job was made."""
        return self._twin.labels

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked for: kind, checkpoint, batch, dtype, k, which."""
        return self._twin.spec

    @property
    def create_time(self) -> datetime:
        """When it was queued, UTC."""
        return self._twin.create_time

    @property
    def start_time(self) -> datetime | None:
        """When its latest attempt began, UTC."""
        return self._current().start_time

    @property
    def end_time(self) -> datetime | None:
        """When it ended, UTC."""
        return self._current().end_time

    def refresh(self) -> Job:
        """Ask the server for everything anew.

        Returns:
            This job.

        Raises:
            NotFoundError: It was deleted.
        """
        self._portal.run(self._twin.refresh())
        return self

    def result(self, timeout_s: float | None = None) -> EigshResult[Vector]:
        """Wait for the end and give the result; a restart of the server is waited out.

        Args:
            timeout_s: Longest wait, seconds; None waits for as long as it takes.

        Returns:
            The result.

        Raises:
            DeadlineExceededError: `JOB_NOT_ENDED`: the time is over and the job goes on.
            JobFailedError: The job failed; code, reason and metadata are its run's.
            JobCancelledError: The job was cancelled.
        """
        result = self._portal.run(self._twin.result(timeout_s))
        vectors = [Vector(self._portal, twin) for twin in result.eigenvectors]
        return replace(result, eigenvectors=vectors)  # type: ignore[arg-type, return-value]

    def watch(self, after_sequence: int = 0) -> Iterator[Event]:
        """Give what has happened to the job, then what happens, until it ends.

        Args:
            after_sequence: Begin after the event of this number; 0 means with the first.

        Returns:
            An iterator of events in order, each once. It connects again by itself when the
            connection breaks or the server is started anew.

        Raises:
            NotFoundError: No such job.
            UnavailableError: The server stayed away for longer than `Retry.job_patience_s`.
        """
        return self._portal.iterate(self._twin.watch(after_sequence))

    def cancel(self) -> None:
        """Ask the job to stop between two products; of no effect once it has ended."""
        self._portal.run(self._twin.cancel())

    def delete(self) -> None:
        """Forget the job.

        Raises:
            FailedPreconditionError: `JOB_NOT_ENDED`: cancel it first.
        """
        self._portal.run(self._twin.delete())

    def _current(self) -> AsyncJob:
        return self._twin if self._twin.ended else self._portal.run(self._twin.refresh())

    def __repr__(self) -> str:
        # Without a call: debuggers and notebooks show objects unasked.
        return f"<{type(self).__name__} {self.name} {self._twin.state}>"


def _is_vectors(value: Any) -> TypeGuard[Sequence[Vector]]:
    return isinstance(value, (list, tuple)) and any(isinstance(v, Vector) for v in value)
