"""A model as a chain of blocks y = f(p, x), each with a name and a few parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvp_core.attention.mask import Mask
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import IGNORED, Loss, at_least_float32
from hvp_core.precision import exact


@final
@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of a batch that go through the blocks together."""

    inputs: Mapping[str, Tensor]  # what the model takes, by name; "x" is the chain's first input
    targets: Tensor

    @property
    def sequence_length(self) -> int:
        """Number of positions of each token sequence; 1 where the rows are no token sequences."""
        ids = self.inputs.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.is_floating_point():
            return 1
        return ids.shape[1]


class Body(NamedTuple):
    """A block for one micro-batch, with everything that it reads laid open.

    Attributes:
        constants: Tensors that the block reads beside its parameters and its input, by the names
            `c/0` and so on.
        call: The block as a function: (params by canonical name, x, constants) -> y.
        masks: Masks that the block hands to its attention unread.
        fixed: Whether the constants keep their dtype when the block is run in another one.
        settings: Everything else that decides what `call` computes: settings of the micro-batch,
            and the cast.
    """

    constants: dict[str, Tensor]
    call: Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]
    masks: tuple[Mask, ...] = ()
    fixed: bool = False
    settings: Hashable = ()

    def run(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        """The output y by the model's own code, in arithmetic that can be differentiated."""
        with exact():
            return self.call(params, x, constants)

    def cast(self, dtype: torch.dtype) -> Body:
        """The block with floating constants of this dtype, and its output in at least float32.

        The values that blocks hand on to one another are sums over all blocks before. In 16 bits
        each block would round them anew; operands of matrix products are rounded inside a block.
        """
        constants = self.constants
        if not self.fixed:
            constants = {
                name: each.to(dtype) if each.is_floating_point() else each
                for name, each in constants.items()
            }
        if dtype.itemsize >= 4:
            return self._replace(constants=constants)
        narrow = self.call

        def call(
            params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
        ) -> Tensor:
            return at_least_float32(narrow(params, x, constants))

        return self._replace(constants=constants, call=call, settings=(self.settings, "cast"))


def function_of(body: Body) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """A block as a function of (params, x), its constants in place."""

    def f(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return body.run(p, x, body.constants)

    return f


class Block(ABC):
    """One link of the chain.

    Law: it depends on `params` and `x` alone, given the constants in `context`, and rows (the first
    dimension) do not depend on one another. Its code does not change: what one operator has traced
    of it holds for every other operator of its chain.
    """

    def __init__(self, name: str, parameters: Sequence[str]):
        self.name = name
        self.parameters = tuple(parameters)  # canonical names

    @abstractmethod
    def body(self, context: Any, dense: bool) -> Body:
        """The block for one micro-batch.

        Args:
            context: Constants of the micro-batch, as `Chain.context` gives them.
            dense: Give masks as tensors, which attention in plain operations reads.
        """

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        """The output y = f(params, x), with the parameters by canonical name."""
        body = self.body(context, dense=True)
        return function_of(body)(params, x)


class Chain(ABC):
    """The blocks of a model and the loss at their end.

    Attributes:
        blocks: The blocks, in the order of evaluation.
        shapes: Shape of every parameter of the model by canonical name, in canonical order.
        loss: Applied to the last block's output.
        notes: How the model was taken apart; `Curvature.notes` includes these notes.
        positions_at_once: Number of positions in each piece, for a chain whose last block takes its
            input in pieces; None chooses by memory.
        module: The model that the chain was made of. Its parameters may be on the meta device.
        input_moves: Derivatives are taken by the first input, which is no data, and by no
            parameter.
        ends_in_loss: The loss is one of the last block's output.
    """

    blocks: Sequence[Block]
    shapes: Mapping[str, tuple[int, ...]]
    loss: Loss
    notes: Mapping[str, str] = MappingProxyType({})
    positions_at_once: int | None = None
    module: nn.Module
    input_moves: bool = False
    ends_in_loss: bool = True

    @property
    def origin(self) -> Chain:
        """The chain whose blocks these are: this one, unless it is a part of another."""
        return self

    @abstractmethod
    def context(self, batch: MicroBatch) -> Any:
        """Constants that the blocks need for this micro-batch (masks, positions)."""

    def first_input(self, batch: MicroBatch) -> Tensor:
        """The input x of the first block."""
        return batch.inputs["x"]

    def sample_for_checks(self, batch: MicroBatch) -> MicroBatch:
        """A small part of a micro-batch, for checks."""
        return rows(batch, 0, 1)

    def pair(self, batch: MicroBatch) -> MicroBatch | None:
        """Two rows of the whole batch, to check that blocks take each row alone.

        None where that is known, or where the batch has one row.
        """
        return rows(batch, 0, 2) if len(batch.targets) > 1 else None

    def pieces(self, x: Tensor) -> list[slice]:
        """Slices of x's dimension 1 that may go through the last block one by one; [] for none."""
        return []

    def blocks_with(self, module: str) -> Sequence[int]:
        """Indices of the blocks that may run a submodule, by its name in the model.

        By default those whose name the submodule's begins with, and all others that are no part of
        the model by their name.
        """
        parts = {name for name, _ in self.module.named_modules()}
        inside = [
            index
            for index, block in enumerate(self.blocks)
            if block.name in parts and f"{module}.".startswith(f"{block.name}.")
        ]
        return inside or [
            index for index, block in enumerate(self.blocks) if block.name not in parts
        ]


def refuse_train_mode(module: nn.Module) -> None:
    """Refuse a model of which a part is in train mode, or normalises over the batch.

    Such a model is not one function of each row.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED, naming the first part that computes otherwise than in
            eval mode; where none of torch's is known to, the first whose class is not torch's.
    """
    parts = list(module.named_modules())
    for name, child in parts:
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (
            child.training or not child.track_running_stats
        ):
            raise _not_in_eval_mode(
                name,
                child,
                "normalises over the batch, so the loss is no sum over rows; let it keep running "
                "statistics and call model.eval()",
            )
        if child.training and _draws_or_updates(child):
            raise _not_in_eval_mode(
                name,
                child,
                "is in train mode, in which it drops out or updates what it computes with; call "
                "model.eval()",
            )
    training = [(name, child) for name, child in parts if child.training]
    if training:
        own = [each for each in training if not type(each[1]).__module__.startswith("torch.")]
        raise _not_in_eval_mode(
            *(own or training)[0],
            "is in train mode, in which it may drop out or update what it computes with; call "
            "model.eval()",
        )


def _draws_or_updates(module: nn.Module) -> bool:
    """Whether torch says of a class that it draws numbers, or updates buffers, in train mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    return isinstance(module, nn.RReLU)


def _not_in_eval_mode(name: str, module: nn.Module, what: str) -> CurvatureError:
    called = f"{name or 'the model'} ({type(module).__name__})"
    return CurvatureError("MODEL_UNSUPPORTED", f"{called} {what}", {"block": name})


@final
class ModuleBlock(Block):
    """A module, called with its inputs in their order.

    Args:
        name: Name of the block.
        module: The module. Its parameters may be on the meta device; its buffers must be real.
        names: The module's own parameter names, mapped to canonical ones.
        gives_loss: The module returns the mean loss of the rows that it is given, not a tensor of
            rows.
    """

    def __init__(
        self, name: str, module: nn.Module, names: Mapping[str, str], gives_loss: bool = False
    ):
        super().__init__(name, list(dict.fromkeys(names.values())))
        self._module = module
        self._names = dict(names)
        self._gives_loss = gives_loss

    def body(self, context: Sequence[Tensor], dense: bool) -> Body:
        """The module with these parameters and buffers in place of its own.

        Args:
            context: The module's inputs behind the first.
            dense: Not used: there are no masks.
        """
        buffers = dict(self._module.named_buffers())
        count = len(buffers)

        def call(
            params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
        ) -> Tensor:
            own = {local: params[canonical] for local, canonical in self._names.items()}
            given = list(constants.values())
            held = dict(zip(buffers, given, strict=False))
            with unchanged(self._module):
                y = functional_call(self._module, {**own, **held}, (x, *given[count:]))
            return self._checked(y, x)

        return Body(numbered([*buffers.values(), *context]), call)

    def _checked(self, y: Any, x: Tensor) -> Tensor:
        """The output (rows, ...); where the module returns the loss, the loss once for each row.

        Raises:
            CurvatureError: MODEL_UNSUPPORTED: the module returns no floating tensor, or more than
                one number where it should return the loss.
        """
        if not isinstance(y, Tensor) or not y.is_floating_point():
            what = (
                str(y.dtype).removeprefix("torch.") if isinstance(y, Tensor) else type(y).__name__
            )
            raise CurvatureError(
                "MODEL_UNSUPPORTED",
                f"{type(self._module).__name__}'s forward returns {what} and no tensor of floating "
                "numbers; let it return one tensor",
                {"block": self.name},
            )
        if not self._gives_loss:
            return y
        if y.numel() != 1:
            raise CurvatureError(
                "MODEL_UNSUPPORTED",
                f"{type(self._module).__name__}'s forward returns a tensor of {tuple(y.shape)} "
                "where the mean loss over its rows is wanted, one number; return that, or declare "
                "the loss that is taken of the output",
                {"block": self.name},
            )
        return y.reshape(1).expand(x.shape[0])


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undo every change that a module's forward makes to its attributes and buffers.

    The next run then does not depend on this one, and the module holds none of its tensors.
    """
    before = [(each, dict(each.__dict__), dict(each._buffers)) for each in module.modules()]
    try:
        yield
    finally:
        for each, attributes, buffers in before:
            now = each.__dict__
            if len(now) != len(attributes) or any(
                now.get(name) is not value for name, value in attributes.items()
            ):
                each.__dict__.clear()
                each.__dict__.update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)


def free_zeros(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Zeros for every parameter, by name; together they take the memory of one element.

    Parameters of one shape share a tensor: while a block is traced, each costs an operation.
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    zeros = {shape: zero.expand(shape) for shape in dict.fromkeys(shapes.values())}
    return {name: zeros[shape] for name, shape in shapes.items()}


def numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a body's constants, `c/0` and so on, in this order."""
    return {f"c/{index}": each for index, each in enumerate(tensors)}


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Every name a parameter is reachable by, mapped to the one in `named_parameters()`."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


@final
class ModuleChain(Chain):
    """Any `nn.Module`; an `nn.Sequential` of one input gives one block per child.

    Args:
        module: The module, in eval mode. Its parameters may be on the meta device; its buffers must
            be real.
        loss: The loss of the module's output.
        inputs: Names of the module's inputs, in the order in which it takes them.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED: a part is in train mode, or normalises over the batch.
    """

    def __init__(self, module: nn.Module, loss: Loss, inputs: Sequence[str] = ("x",)):
        refuse_train_mode(module)
        self.module = module
        self.loss = loss
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._inputs = tuple(inputs)
        names = canonical_names(module)
        is_cut = isinstance(module, nn.Sequential) and len(inputs) == 1 and loss.has_outputs
        children = list(module.named_children()) if is_cut else [("", module)]
        self.blocks = [
            ModuleBlock(
                prefix or type(child).__name__,
                child,
                {
                    local: names[f"{prefix}.{local}" if prefix else local]
                    for local, _ in child.named_parameters(remove_duplicate=False)
                },
                gives_loss=not loss.has_outputs,
            )
            for prefix, child in children
        ]

    def first_input(self, batch: MicroBatch) -> Tensor:
        """The first of the module's inputs."""
        return batch.inputs[self._inputs[0]]

    def context(self, batch: MicroBatch) -> list[Tensor]:
        """The module's inputs behind the first."""
        return [batch.inputs[name] for name in self._inputs[1:]]

    def pair(self, batch: MicroBatch) -> MicroBatch | None:
        """See Chain; where the module returns its loss, rows in which most and least is ignored.

        A mean over what counts is then no mean of the two, wherever in the batch such rows are.
        """
        if self.loss.has_outputs or len(batch.targets) < 2:
            return super().pair(batch)
        ignored = sum(
            each.reshape(len(each), -1).eq(IGNORED).sum(1) for each in batch.inputs.values()
        )
        least, most = int(torch.as_tensor(ignored).argmin()), int(torch.as_tensor(ignored).argmax())
        two = torch.tensor([least, most] if least != most else [0, 1])
        return MicroBatch(
            inputs={name: each[two] for name, each in batch.inputs.items()},
            targets=batch.targets[two],
        )


def parameter_values(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by canonical name, detached."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def as_batch(x: Tensor, targets: Tensor) -> MicroBatch:
    """A batch for a ModuleChain of one input.

    Args:
        x: The input, (rows, ...).
        targets: The targets, (rows, ...).

    Raises:
        CurvatureError: SHAPE_MISMATCH: the numbers of rows differ, or are zero.
    """
    if len(x) != len(targets) or len(x) == 0:
        raise CurvatureError(
            "SHAPE_MISMATCH", f"{len(x)} inputs and {len(targets)} targets; give as many, above 0"
        )
    return MicroBatch(inputs={"x": x}, targets=targets)


def rows(batch: MicroBatch, start: int, stop: int) -> MicroBatch:
    """Rows [start, stop) of a batch, as views."""
    return MicroBatch(
        inputs={name: tensor[start:stop] for name, tensor in batch.inputs.items()},
        targets=batch.targets[start:stop],
    )


def placed(batch: MicroBatch, device: torch.device, dtype: torch.dtype) -> MicroBatch:
    """The batch on a device, its floating numbers in at least float32.

    Args:
        batch: The batch, on a CPU.
        device: The device to copy it to.
        dtype: The dtype of the parameters that it meets.
    """
    dtype = torch.promote_types(dtype, torch.float32)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return MicroBatch(
        inputs={name: place(tensor) for name, tensor in batch.inputs.items()},
        targets=place(batch.targets),
    )
