"""The interface between service and workers; importing it loads neither torch nor Ray.

The vectors named here live on the ranks, cut as the parameters are. Bulk data travels by path on a
file system that service and ranks share; only names, scalars and small records cross this
interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hvp_batches.schema import BatchSchema
from hvp_operations.matrices import Matrix
from hvp_operations.operation import Detail, Result

Dtype = Literal["float32", "float64"]
#: Kinds of operator that are no symmetric matrix; those that are have a row in the core's table.
JACOBIANS = ("jacobian", "jacobian_transposed")
Form = Literal["quadratic", "slope"]
Precision = Literal["full", "tf32", "bfloat16"]
Schedule = Literal["auto", "lean", "fast", "cached"]
Compile = Literal["auto", "on", "off"]
Distribution = Literal["rademacher", "gaussian", "sphere"]


#: Of a question that names no vectors.
NO_INPUTS: Mapping[str, Sequence[str]] = MappingProxyType({})


class BackendError(Exception):
    """A refusal or failure with a reason code; survives pickling.

    Attributes:
        reason: UPPER_SNAKE code, as in the protos' comments.
        message: A sentence that says what happened, and one that says what to do.
        metadata: Figures and names that a program may want.
        trace: Traceback of an error that nobody foresaw: for the server's log, never for a client.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        trace: str = "",
    ):
        super().__init__(reason, message, dict(metadata or {}), trace)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.trace = trace

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class GroupLostError(BackendError):
    """A rank died or hung; every vector on the ranks is gone and the group starts anew."""


@dataclass(frozen=True, kw_only=True)
class ParameterTensor:
    """One parameter in the canonical order."""

    name: str
    shape: tuple[int, ...]
    offset: int  # first flat index


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """What a folder of config.json and safetensors holds, found without loading weights."""

    architecture: str
    num_parameters: int
    vocab_size: int  # 0 for models without tokens
    max_positions: int | None  # longest sequence; None when the model sets no limit
    stored_dtype: str  # safetensors' name, the first tensor's
    parameters: tuple[ParameterTensor, ...]
    task: str  # what the model is for
    batch_schema: BatchSchema  # what a batch for it holds


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What a submodule gives, or is given.

    Attributes:
        module: Name of the submodule.
        side: Its output, or its own input.
    """

    module: str
    side: Literal["output", "input"] = "output"


@dataclass(frozen=True, kw_only=True)
class Space:
    """A space of vectors: those of one space can be added.

    Attributes:
        checkpoint_dir: Folder of config.json and *.safetensors.
        dtype: The dtype of the elements.
        outputs_on: File of a batch, if the vectors are the model's outputs on it: for a language
            model (sequences, positions, vocabulary). None: they are vectors of parameter space.
        parameters: Names of the tensors that vectors of parameter space have, in canonical order;
            empty for all. A space of outputs has none.
        activation: The activation that vectors of outputs have; None for the model's own outputs.
    """

    checkpoint_dir: Path
    dtype: Dtype
    outputs_on: Path | None = None
    parameters: tuple[str, ...] = ()
    activation: Activation | None = None

    @property
    def whole(self) -> Space:
        """The space of all parameters."""
        return replace(self, outputs_on=None, parameters=(), activation=None)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A matrix of the mean loss of a checkpoint on a batch, or a Jacobian of activations.

    Or what is made of such matrices: `composition`, whose diagonal is a vector of `space` by its
    name on the ranks. Then `kind` is its formula, and the fields of samples say nothing.

    Law: `space` is a parameter space. The loss, or the outputs, are functions of its parameters,
    and all other parameters are constants. A Jacobian takes vectors of `arguments` to those of
    `outputs`.
    """

    space: Space
    batch_path: Path  # safetensors: the fields of the model's batch schema
    kind: str = "hessian"
    micro_batch_size: int = 0  # 0: by memory
    precision: Precision = "full"  # of the operands of matrix products
    sample_seed: int = 0  # of a Fisher matrix: the seed of its drawn labels
    num_samples: int = 0  # and how many are drawn for each target; 0 for other kinds
    composition: Matrix | None = None
    output: Activation | None = None  # that a Jacobian is of; None: the model's own outputs
    by: Activation | None = None  # that it is taken by; None: the parameters of `space`
    deterministic: bool = False  # whether it gives the same bits each time

    @property
    def plain(self) -> Operator:
        """The operator without activations, which has the same loss and its gradient."""
        return replace(self, output=None, by=None)

    @property
    def outputs(self) -> Space:
        """The space of the activation, or of the model's outputs, on the batch."""
        return replace(self.space.whole, outputs_on=self.batch_path, activation=self.output)

    @property
    def arguments(self) -> Space:
        """The space of what derivatives are taken by."""
        if self.by is None:
            return self.space
        return replace(self.space.whole, outputs_on=self.batch_path, activation=self.by)

    @property
    def domain(self) -> Space:
        """The space of the vectors that the operator takes."""
        return self.outputs if self.kind == "jacobian_transposed" else self.arguments

    @property
    def codomain(self) -> Space:
        """The space of the operator's products."""
        return self.outputs if self.kind == "jacobian" else self.arguments


@dataclass(frozen=True)
class Seeded:
    """A random vector: Philox4x32-10 by flat index."""

    seed: int
    distribution: Distribution


@dataclass(frozen=True)
class RawFile:
    """A file of little-endian elements of the space's dtype in canonical order, all finite."""

    path: Path


@dataclass(frozen=True)
class Combination:
    """A linear combination: the sum of coefficient times vector, over terms of both."""

    terms: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Zeros:
    """The zero vector."""


@dataclass(frozen=True)
class Parameters:
    """θ itself."""


Source = Seeded | RawFile | Combination | Zeros | Parameters


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Where a run stands, after each step.

    Attributes:
        operation: Name of the operation.
        stage: `loading`, then the operation's own stages, and `saving`.
        num_products: Number of operator products done.
        max_products: The most operator products that the run may make.
        seconds_per_product: Median seconds of a product so far.
        detail: The operation's own progress; None before the first step.
    """

    operation: str
    stage: str
    num_products: int
    max_products: int
    seconds_per_product: float = 0.0
    detail: Detail | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of a server for how its ranks compute; results do not depend on them.

    Attributes:
        schedule: What blocks keep of the forward walk (see `hvp_core.settings`).
        compile: Whether blocks are compiled at the first product; `auto` compiles where that pays.
        compile_cache: Folder for compiled kernels, and for the names of programs that have been
            compared with torch, on a file system that the ranks see, so that both are paid once;
            None leaves the place of kernels to torch.
    """

    schedule: Schedule = "auto"
    compile: Compile = "auto"
    compile_cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One process of a group."""

    rank: int
    hostname: str
    pid: int
    resident_bytes: int
    num_threads: int
    memory_bytes: int = 0  # its share of all there is, whether free or not; 0: unknown


class Backend(ABC):
    """One worker group. Calls are run one after another, in the order in which they were made.

    `ranks`, `describe_checkpoint` and `default_micro_batch` compute nothing. Law: none of these
    three waits for a product.

    Every method may raise BackendError, and GroupLostError after which `start` must be awaited
    again before anything else. Methods are called from one event loop only.
    """

    @abstractmethod
    async def start(self) -> None:
        """Start the ranks, or start them anew after a loss; idempotent while they live."""

    @abstractmethod
    async def close(self) -> None:
        """End the ranks, whatever they compute; idempotent.

        A call that still runs raises GroupLostError.
        """

    @property
    @abstractmethod
    def generation(self) -> str:
        """A name that changes with every start of the ranks; "" before the first start.

        Vectors last for as long as their generation.
        """

    @property
    @abstractmethod
    def device(self) -> str:
        """`cpu` or `cuda`."""

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """Number of processes in the group."""

    @abstractmethod
    async def ranks(self) -> list[RankInfo]:
        """The living processes, and their memory now."""

    @abstractmethod
    async def describe_checkpoint(self, checkpoint_dir: Path) -> CheckpointDescription:
        """Check a checkpoint without loading its weights, in a process of its own.

        Raises:
            BackendError: CONFIG_INVALID (metadata `limit`, `time` or `memory`, where the model
                takes too much of it before a weight is read), ARCHITECTURE_UNKNOWN,
                REMOTE_CODE_REFUSED, TENSOR_MISSING, TENSOR_SHAPE_MISMATCH, DTYPE_UNSUPPORTED,
                SAFETENSORS_INVALID.
        """

    @abstractmethod
    def default_micro_batch(self, num_sequences: int, sequence_length: int) -> int:
        """Sequences that a rank takes at once when an operator does not say."""

    @abstractmethod
    async def loss(self, operator: Operator) -> float:
        """L(θ), the mean over all targets of the batch that count. Cost: 1 GEMM pass."""

    @abstractmethod
    async def gradient(self, operator: Operator, output: str) -> None:
        """Store ∇L(θ) under the name `output`. Cost: 3 GEMM passes."""

    @abstractmethod
    async def apply(
        self, operator: Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        """Store the product with each input under the output name at the same place.

        Returns:
            Notes for a log on how this operator's products are computed: schedule, compilation and
            its seconds. They are empty if they are the same as at the last call.
        """

    @abstractmethod
    async def evaluate_forms(
        self, operator: Operator, form: Form, inputs: Sequence[str]
    ) -> list[float]:
        """A number for each input, a vector of `operator.space`; nothing is stored.

        Args:
            operator: The operator, which names the matrix A and the loss L.
            form: `quadratic`, v·Av with a symmetric matrix; or `slope`, ∇L·v whatever the matrix.
            inputs: Names of the vectors v.

        Raises:
            BackendError: INPUT_MISSING, VECTOR_SPACE_MISMATCH, NON_FINITE; VECTOR_MEMORY where
                the form is taken of products and there is no room for one.
        """

    @abstractmethod
    async def losses_along(
        self, operator: Operator, directions: Sequence[str], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """L(θ + Σ aᵢ dᵢ) for each point. Cost: 1 GEMM pass for each.

        Args:
            operator: The operator, which names the loss L and θ.
            directions: Names of the directions dᵢ, vectors of `operator.space`.
            points: The coefficients of each point, one for each direction.

        Returns:
            The losses. Far from θ one may be infinite or NaN.

        Raises:
            BackendError: INPUT_MISSING, VECTOR_SPACE_MISMATCH.
        """

    @abstractmethod
    async def shape(self, space: Space) -> tuple[int, ...]:
        """The shape of vectors of a space of activations, on all ranks together.

        Cost: at the first call a pass forward, up to the submodule.

        Raises:
            BackendError: MODULE_NOT_FOUND; MODULE_UNSUPPORTED: the submodule does not give one
                tensor, or is not called once.
        """

    @abstractmethod
    async def check_jacobian(self, operator: Operator) -> None:
        """Check that a Jacobian of activations can be taken.

        Raises:
            BackendError: As `shape`; MODULES_OUT_OF_ORDER: the output does not depend on the input.
        """

    @abstractmethod
    async def create_vector(self, name: str, space: Space, source: Source) -> None:
        """Make a vector on the ranks; replaces one of that name.

        Raises:
            BackendError: SHAPE_MISMATCH, NON_FINITE (metadata `index`), VECTOR_MEMORY,
                INPUT_MISSING.
        """

    @abstractmethod
    async def delete_vectors(self, names: Sequence[str]) -> None:
        """Free vectors; unknown names are ignored."""

    @abstractmethod
    async def inner_products(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """u·v for each pair, accumulated in float64."""

    @abstractmethod
    async def save_vector(
        self, name: str, path: Path, start: int = 0, stop: int | None = None
    ) -> None:
        """Write elements `start` to `stop` to a new file at `path`, made durable before return.

        The file holds nothing but these elements. A file of all elements is one that RawFile reads.

        Args:
            name: Name of the vector.
            path: Path of the file.
            start: First flat index.
            stop: Flat index behind the last; None for the vector's end.
        """

    @abstractmethod
    def run(
        self,
        operator: Operator,
        operation: str,
        spec: Any,
        outputs: Sequence[str],
        inputs: Mapping[str, Sequence[str]] = NO_INPUTS,
        earlier: Result | None = None,
    ) -> AsyncIterator[RunProgress | Result]:
        """Answer a question about an operator, giving progress after each step and the result last.

        Other calls may run between two steps. Closing the iterator (`aclose`) ends the run and
        frees what it holds.

        Args:
            operator: The operator that the question is about.
            operation: Name of the operation, as in `hvp_operations.registry`.
            spec: Spec of the operation, checked.
            outputs: Names for the vectors that belong to the result, as many as it can have. The
                first ones are taken, as many as `Result.vector_counts` says in all.
            inputs: Names of the vectors that the spec names, by its fields, and of those of the
                earlier result, by its fields behind `EARLIER`; the run reads them.
            earlier: Result that the run goes on from, where the operation's extension takes one.

        Raises:
            BackendError: INSUFFICIENT_CLUSTER_MEMORY, NON_FINITE, DOUBLE_BACKWARD_UNSUPPORTED;
                INPUT_MISSING, VECTOR_SPACE_MISMATCH for one of `inputs`.
        """
