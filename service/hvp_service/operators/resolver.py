"""From the names in an operator to the paths that the workers read, with every check between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from hvp_batches.fitting import BatchError, check_fit
from hvp_operations.matrices import Matrix, Term, check_blocks, check_samples
from hvp_operations.operation import Facts, SpecError
from hvp_operations.parameters import select
from hvp_operations.partition import Partition
from hvp_operations.wording import shown
from hvp_workers.backend import (
    Activation,
    Dtype,
    Operator,
    ParameterTensor,
    Precision,
    Space,
)

from hvp_service.batches.contents import batch_refused
from hvp_service.batches.store import BatchStore, DataBatch
from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import Name, parse
from hvp_service.checkpoints.store import Checkpoint, CheckpointStore
from hvp_service.operators.activations import Activations, activation_of
from hvp_service.operators.kinds import check_composition, check_kind, plain_kind, refused
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors.rows import (
    ALL_PARAMETERS,
    Outputs,
    Selection,
    Vector,
    VectorSpace,
    words_of,
)

DTYPES: tuple[Dtype, ...] = ("float32", "float64")
PRECISIONS: dict[str, tuple[Precision, ...]] = {  # by device, the default for float32 first
    "cpu": ("full", "bfloat16"),
    "cuda": ("bfloat16", "full", "tf32"),
}
DEFAULT_DTYPE: Dtype = "float32"


@dataclass(frozen=True, kw_only=True)
class OperatorRef:
    """An operator as a caller names it; the proto's OperatorSpec."""

    checkpoint: str
    data_batch: str
    kind: str  # the enum value's name
    dtype: str = ""
    micro_batch_size: int = 0
    precision: str = ""
    parameters: tuple[str, ...] = ()  # globs; none for all
    sample_seed: int = 0
    num_samples: int = 0  # 0: one where the kind draws labels
    terms: tuple[Term, ...] = ()  # in the place of the kind
    damping: float = 0.0
    precondition: str = ""  # name of a vector; "" for none
    shift: float = 0.0
    output_module: str = ""  # of a Jacobian; "" for the model's outputs
    input_module: str = ""  # "" for the parameters
    own_input: bool = False  # that of the output's module
    deterministic: bool = False
    blocks: Partition | None = None  # by which it is block-diagonal

    @property
    def is_composed(self) -> bool:
        """Whether it is more than one matrix as it stands."""
        return self.besides != Matrix()

    @property
    def own_term(self) -> Term:
        """The matrix of its kind."""
        return Term(
            kind=plain_kind(self.kind),
            sample_seed=self.sample_seed,
            num_samples=self.num_samples,
        )

    @property
    def besides(self) -> Matrix:
        """What it is beside, or in the place of, the matrix of its kind."""
        return Matrix(
            terms=self.terms,
            damping=self.damping,
            precondition=self.precondition,
            shift=self.shift,
            blocks=self.blocks,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedOperator:
    """An operator whose names exist and whose data fit the model."""

    checkpoint: Checkpoint
    batch: DataBatch
    operator: Operator
    selection: Selection
    precondition: Name | None = None
    output: Outputs | None = None  # the activation that a Jacobian is of; None: the outputs
    argument: Outputs | None = None  # that it is taken by; None: parameters

    def filled(self, ref: OperatorRef) -> OperatorRef:
        """What the operator was named by, with every default filled in."""
        ref = replace(ref, dtype=self.operator.space.dtype, precision=self.operator.precision)
        composition = self.operator.composition
        if composition is None:
            return replace(ref, num_samples=self.operator.num_samples)
        return replace(
            ref,
            kind="KIND_UNSPECIFIED",
            sample_seed=0,
            num_samples=0,
            terms=composition.terms,
            damping=composition.damping,
        )

    @property
    def facts(self) -> Facts:
        """The facts that an operation's rules and cost depend on."""
        composition = self.operator.composition
        return Facts(
            num_parameters=self.num_arguments,
            kind=self.operator.kind,
            num_outputs=self.num_outputs,
            is_semidefinite=composition and composition.is_semidefinite,
            parameter_names=tuple(each.name for each in self.parameters),
        )

    @property
    def parameters(self) -> list[ParameterTensor]:
        """The parameters that vectors of parameter space have, with offsets into these vectors."""
        return parameters_of(self.checkpoint, self.selection)

    @property
    def num_parameters(self) -> int:
        """n, the length of vectors of parameter space."""
        return sum(math.prod(tensor.shape) for tensor in self.parameters)

    @property
    def outputs(self) -> Outputs:
        """The space of the activation, or of the model's outputs, on the batch."""
        return self.output or outputs_of(self.checkpoint, self.batch)

    @property
    def num_outputs(self) -> int:
        """m, the length of the operator's products."""
        return self.length(self.codomain)

    def length(self, space: Outputs | None) -> int:
        """The length of vectors of a space of outputs; None for parameter space."""
        return self.num_parameters if space is None else math.prod(space.shape)

    @property
    def transposed(self) -> ResolvedOperator:
        """The operator of the transposed matrix; a symmetric one is itself."""
        if self.operator.kind != "jacobian":
            return self
        return replace(self, operator=replace(self.operator, kind="jacobian_transposed"))

    @property
    def domain(self) -> Outputs | None:
        """Space of the vectors that the operator takes; None for parameter space."""
        return self.outputs if self.operator.kind == "jacobian_transposed" else self.argument

    @property
    def codomain(self) -> Outputs | None:
        """Space of the operator's products; None for parameter space."""
        return self.outputs if self.operator.kind == "jacobian" else self.argument

    @property
    def num_arguments(self) -> int:
        """n, the length of the vectors that the operator takes."""
        return self.length(self.domain)


def select_parameters(
    checkpoint: Checkpoint, globs: Sequence[str], field: str = "parameters"
) -> Selection:
    """The parameters of a checkpoint that globs select.

    Raises:
        ServiceError: PARAMETERS_NOT_FOUND, PARAMETERS_INVALID.
    """
    names = [tensor.name for tensor in checkpoint.description.parameters]
    try:
        selected = select(globs, names, field)
    except SpecError as error:
        raise refused(error) from None
    return Selection(selected, tuple(globs)) if len(selected) < len(names) else ALL_PARAMETERS


def parameters_of(checkpoint: Checkpoint, selection: Selection) -> list[ParameterTensor]:
    """The parameters of a selection, in canonical order, with offsets into its own vectors."""
    found, offset, wanted = [], 0, set(selection.names)
    for tensor in checkpoint.description.parameters:
        if not wanted or tensor.name in wanted:
            found.append(replace(tensor, offset=offset))
            offset += math.prod(tensor.shape)
    return found


def outputs_of(checkpoint: Checkpoint, batch: DataBatch) -> Outputs:
    """The space of a model's outputs on a batch that fits it.

    Raises:
        ServiceError: KIND_UNSUPPORTED: the model has no outputs.
    """
    schema = checkpoint.description.batch_schema
    if not schema.outputs:
        raise _no_outputs(checkpoint, "kind")
    return Outputs(batch=batch.name, shape=schema.output_shape(batch.statistics.fields))


def check_space(
    resolved: ResolvedOperator, outputs: Outputs | None, vectors: Sequence[Vector], field: str
) -> None:
    """Check that an operator can take vectors.

    Args:
        resolved: The operator.
        outputs: The space of outputs that the vectors have to belong to; None for the operator's
            parameter space.
        vectors: The vectors.
        field: Path of their list in the request, for errors.

    Raises:
        ServiceError: VECTOR_SPACE_MISMATCH.
    """
    space = (
        resolved.checkpoint.name,
        resolved.operator.space.dtype,
        None if outputs is None else outputs.batch,
        None if outputs is None else outputs.activation,
        resolved.selection if outputs is None else ALL_PARAMETERS,
    )
    for index, vector in enumerate(vectors):
        _check_vector(vector, space, f"{field}[{index}]")


def check_preconditioner(resolved: ResolvedOperator, vector: Vector, field: str) -> None:
    """Check that a vector can be the diagonal of an operator's preconditioner.

    Raises:
        ServiceError: VECTOR_SPACE_MISMATCH.
    """
    dtype = resolved.operator.space.dtype
    space = (resolved.checkpoint.name, dtype, None, None, resolved.selection)
    _check_vector(vector, space, f"{field}.precondition")


def _check_vector(vector: Vector, space: VectorSpace, field: str) -> None:
    if vector.space != space:
        raise ServiceError(
            "VECTOR_SPACE_MISMATCH",
            f"{vector.name} is a {words_of(vector.space)}; the operator takes a {words_of(space)}.",
            field=field,
        )


def check_dtype(dtype: str, field: str = "dtype") -> Dtype:
    """Check that a dtype is served, and resolve "" to the default.

    Raises:
        ServiceError: DTYPE_UNSUPPORTED.
    """
    if not dtype:
        return DEFAULT_DTYPE
    if dtype not in DTYPES:
        raise ServiceError(
            "DTYPE_UNSUPPORTED",
            f"The dtype {shown(dtype)} is not served; {' and '.join(DTYPES)} are.",
            field=field,
        )
    return dtype


def check_precision(
    precision: str, dtype: Dtype, device: str, field: str = "precision"
) -> Precision:
    """Check that dtype and device have a precision, and resolve "" to their default.

    Raises:
        ServiceError: PRECISION_UNSUPPORTED.
    """
    served = PRECISIONS[device] if dtype == "float32" else ("full",)
    for known in served:
        if precision in ("", known):
            return known
    raise ServiceError(
        "PRECISION_UNSUPPORTED",
        f"The precision {shown(precision)} is not served for {dtype} on {device}; "
        f"{' and '.join(sorted(served))} {'is' if len(served) == 1 else 'are'}, and an empty one "
        "lets the server choose.",
        field=field,
        metadata={"dtype": dtype, "device": device},
    )


class OperatorResolver:
    """Resolves the names in an operator, with every check of the operator.

    Args:
        checkpoints: Store of the checkpoints.
        batches: Store of the batches.
        state_dir: Folder that holds the files of both.
        device: Device of the ranks, `cpu` or `cuda`.
        activations: Asks the ranks about activations.
        kinds: Kinds of the matrices that a sum may have.
    """

    def __init__(
        self,
        checkpoints: CheckpointStore,
        batches: BatchStore,
        state_dir: StateDir,
        device: str,
        activations: Activations,
        kinds: Sequence[str],
    ):
        self._kinds = kinds
        self.activations = activations
        self._checkpoints = checkpoints
        self._batches = batches
        self._state_dir = state_dir
        self.device = device

    @contextlib.asynccontextmanager
    async def using(
        self, ref: OperatorRef, field: str = "operator"
    ) -> AsyncIterator[ResolvedOperator]:
        """Resolve an operator for the block: its files stay until the block's end.

        Raises:
            ServiceError: As `resolve`.
        """
        with (
            self._checkpoints.hold(parse(ref.checkpoint, "checkpoints")),
            self._batches.hold(parse(ref.data_batch, "dataBatches")),
        ):
            yield await self.resolve(ref, field)

    async def resolve(self, ref: OperatorRef, field: str = "operator") -> ResolvedOperator:
        """Check an operator; nothing is computed but, once, the shapes of activations.

        Args:
            ref: The operator as the caller names it.
            field: Path of the operator in the request, for errors.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, KIND_UNSPECIFIED, KIND_UNSUPPORTED,
                DTYPE_UNSUPPORTED, PRECISION_UNSUPPORTED, MICRO_BATCH_INVALID,
                PARAMETERS_NOT_FOUND, PARAMETERS_INVALID, TERMS_INVALID, BLOCKS_INVALID,
                OPERATOR_NOT_SYMMETRIC, MODULES_INVALID, MODULE_NOT_FOUND, MODULE_UNSUPPORTED,
                MODULES_OUT_OF_ORDER, or a reason of `check_fit`, `check_samples` or
                `check_matrix`.
            BackendError: The ranks cannot run the model up to the submodules that are named.
        """
        composition, num_samples = None, 0
        if ref.is_composed:
            composition = check_composition(ref.kind, ref.own_term, ref.besides, self._kinds, field)
            kind, kinds = str(composition), {each.kind for each in composition.terms}
        else:
            kind = check_kind(ref.kind, f"{field}.kind")
            kinds = {kind}
            try:
                num_samples = check_samples(kind, ref.sample_seed, ref.num_samples, field)
            except SpecError as error:
                raise refused(error) from None
        dtype = check_dtype(ref.dtype, f"{field}.dtype")
        precision = check_precision(ref.precision, dtype, self.device, f"{field}.precision")
        if ref.micro_batch_size < 0:
            raise ServiceError(
                "MICRO_BATCH_INVALID",
                "A micro-batch has at least one sequence; 0 lets the server choose.",
                field=f"{field}.micro_batch_size",
            )
        if kind == "jacobian" and ref.micro_batch_size:
            raise ServiceError(
                "MICRO_BATCH_INVALID",
                "Outputs lie on the ranks as the server cuts the batch; leave micro_batch_size of "
                "a Jacobian 0.",
                field=f"{field}.micro_batch_size",
            )
        output, by = _activations_of(ref, kind, field)
        checkpoint_name = parse(ref.checkpoint, "checkpoints")
        batch_name = parse(ref.data_batch, "dataBatches")
        if batch_name.project != checkpoint_name.project:
            raise not_found(ref.data_batch, "data batch")
        checkpoint = await self._checkpoints.get(checkpoint_name)
        batch = await self._batches.get(batch_name)
        self._check_fit(checkpoint, batch, field)
        selection = select_parameters(checkpoint, ref.parameters, f"{field}.parameters")
        if kinds - {"hessian"} and not checkpoint.description.batch_schema.outputs:
            raise _no_outputs(checkpoint, f"{field}.kind")
        if ref.blocks is not None:
            try:
                names = [each.name for each in parameters_of(checkpoint, selection)]
                check_blocks(ref.blocks, names, f"{field}.blocks")
            except SpecError as error:
                raise refused(error) from None
        precondition = None
        if composition is not None and composition.precondition:
            precondition = parse(composition.precondition, "vectors")
            composition = replace(composition, precondition=precondition.id)
        operator = Operator(
            space=Space(
                checkpoint_dir=self._state_dir.checkpoint(checkpoint_name.id),
                dtype=dtype,
                parameters=selection.names,
            ),
            batch_path=self._batches.path(batch),
            kind=kind,
            micro_batch_size=ref.micro_batch_size,
            precision=precision,
            sample_seed=ref.sample_seed,
            num_samples=num_samples,
            composition=composition,
            output=output,
            by=by,
            deterministic=ref.deterministic,
        )

        async def outputs(activation: Activation | None, space: Space, name: str) -> Outputs | None:
            if activation is None:
                return None
            shape = await self.activations.shape(space, f"{field}.{name}")
            return Outputs(batch=batch.name, shape=shape, activation=activation)

        resolved = ResolvedOperator(
            checkpoint=checkpoint,
            batch=batch,
            precondition=precondition,
            operator=operator,
            selection=selection,
            output=await outputs(output, operator.outputs, "output_module"),
            argument=await outputs(by, operator.arguments, "input_module"),
        )
        if output is not None or by is not None:
            await self.activations.check(operator, field)
        return resolved

    @staticmethod
    def _check_fit(checkpoint: Checkpoint, batch: DataBatch, field: str) -> None:
        try:
            check_fit(checkpoint.description.batch_schema, batch.statistics.fields)
        except BatchError as error:
            raise batch_refused(error, f"{field}.data_batch") from None


def _activations_of(
    ref: OperatorRef, kind: str, field: str
) -> tuple[Activation | None, Activation | None]:
    """The activation that a Jacobian is of, and the one that it is taken by.

    Raises:
        ServiceError: MODULES_INVALID.
    """
    named = ref.output_module or ref.input_module or ref.own_input
    if named and kind != "jacobian":
        raise ServiceError(
            "MODULES_INVALID", f"Submodules are named of a Jacobian, not of a {kind}.", field=field
        )
    if ref.own_input and ref.input_module:
        raise ServiceError(
            "MODULES_INVALID",
            "A Jacobian is taken by one input: that of input_module, or the output's own.",
            field=f"{field}.own_input",
        )
    if (ref.input_module or ref.own_input) and ref.parameters:
        raise ServiceError(
            "PARAMETERS_INVALID",
            "By an activation all parameters are constants; leave parameters empty.",
            field=f"{field}.parameters",
        )
    output = activation_of(ref.output_module, of_input=False, field=f"{field}.output_module")
    by = activation_of(
        ref.output_module if ref.own_input else ref.input_module,
        of_input=ref.own_input,
        field=f"{field}.input_module",
    )
    return output, by


def _no_outputs(checkpoint: Checkpoint, field: str) -> ServiceError:
    return ServiceError(
        "KIND_UNSUPPORTED",
        f"{checkpoint.description.architecture} returns its loss alone, and this kind of operator "
        "is one of a model's outputs; ask for the Hessian, or register the model with its outputs "
        "and a loss.",
        field=field,
    )
