"""A model as a chain of blocks y = f(p, x), each with a name and a few parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvp_core.attention.mask import Mask
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.precision import exact


@final
@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of a batch that go through the blocks together."""

    inputs: Mapping[str, Tensor]  # what the model takes, by name; "x" is the chain's first input
    targets: Tensor


class Body(NamedTuple):
    """A block with what it computes with laid open.

    Attributes:
        constants: Tensors it reads that are neither parameters nor its input: `c/0` and so on.
        call: (params by canonical name, x, constants) -> y.
        masks: What it hands to its attention unread.
        fixed: Whether the constants keep their dtype when the block is run in another one.
        settings: Whatever else decides what `call` does: of the micro-batch, and the cast.
    """

    constants: dict[str, Tensor]
    call: Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]
    masks: tuple[Mask, ...] = ()
    fixed: bool = False
    settings: Hashable = ()

    def run(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        """Y by the model's own code, so that it can be differentiated and means what it says."""
        with exact():
            return self.call(params, x, constants)

    def cast(self, dtype: torch.dtype) -> Body:
        """The block with floating constants of this dtype, and its output in at least float32.

        What blocks hand on to one another is a sum over all blocks before. In 16 bits it would be
        rounded anew by each of them; operands of matrix products are rounded inside a block.
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
        """The block for one micro-batch; `dense` wants masks as tensors."""

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        """Y = f(params, x); params by canonical name."""
        body = self.body(context, dense=True)
        return body.run(params, x, body.constants)


class Chain(ABC):
    """The blocks of a model and the loss at their end.

    Attributes:
        blocks: In the order of evaluation.
        shapes: Shape of every parameter of the model by canonical name, in canonical order.
        loss: Applied to the last block's output.
        notes: How the model was taken apart, as `Curvature.notes` tells it.
    """

    blocks: Sequence[Block]
    shapes: Mapping[str, tuple[int, ...]]
    loss: Loss
    notes: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def context(self, batch: MicroBatch) -> Any:
        """Constants that the blocks need for this micro-batch (masks, positions)."""

    def first_input(self, batch: MicroBatch) -> Tensor:
        """X of the first block."""
        return batch.inputs["x"]

    def few(self, batch: MicroBatch) -> MicroBatch:
        """A little of a micro-batch, for checks."""
        return rows(batch, 0, 1)

    def pair(self, batch: MicroBatch) -> MicroBatch | None:
        """Two rows of the whole batch, to see that blocks take each alone; None if it is known."""
        return rows(batch, 0, 2) if len(batch.targets) > 1 else None

    def pieces(self, x: Tensor) -> list[slice]:
        """Slices of dimension 1 that may go through the last block one by one; [] for none."""
        return []


def refuse_train_mode(module: nn.Module) -> None:
    """Refuse a model that is not, in every part of it, one function of each row.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED, naming the part.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (
            child.training or not child.track_running_stats
        ):
            raise CurvatureError(
                "MODEL_UNSUPPORTED",
                f"{name} normalises over the batch, so the loss is no sum over rows; "
                "call model.eval() with running statistics",
                {"block": name},
            )
    training = [(name, each) for name, each in module.named_modules() if each.training]
    if training:
        name, child = training[-1]  # an inner one, which does something
        what = f"{name or 'the model'} ({type(child).__name__})"
        raise CurvatureError(
            "MODEL_UNSUPPORTED",
            f"{what} is in train mode, in which it may drop out or update what it computes with; "
            "call model.eval()",
            {"block": name},
        )


@final
class ModuleBlock(Block):
    """A module of one tensor argument."""

    def __init__(self, name: str, module: nn.Module, names: Mapping[str, str]):
        """Args: name; module; names: the module's own parameter names to canonical ones."""
        super().__init__(name, list(dict.fromkeys(names.values())))
        self._module = module
        self._names = dict(names)

    def body(self, context: Any, dense: bool) -> Body:
        """The module with these parameters and buffers in place of its own."""
        buffers = dict(self._module.named_buffers())
        places = {f"c/{index}": name for index, name in enumerate(buffers)}

        def call(
            params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
        ) -> Tensor:
            own = {local: params[canonical] for local, canonical in self._names.items()}
            held = {name: constants[place] for place, name in places.items()}
            result: Tensor = functional_call(self._module, {**own, **held}, (x,))
            return result

        return Body({place: buffers[name] for place, name in places.items()}, call)


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Every name a parameter is reachable by, mapped to the one in `named_parameters()`."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


@final
class ModuleChain(Chain):
    """Any `nn.Module` of one tensor; `nn.Sequential` gives one block per child.

    The module must be in eval mode.
    """

    def __init__(self, module: nn.Module, loss: Loss):
        refuse_train_mode(module)
        self.loss = loss
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        names = canonical_names(module)
        children = (
            list(module.named_children()) if isinstance(module, nn.Sequential) else [("", module)]
        )
        self.blocks = [
            ModuleBlock(
                prefix or type(child).__name__,
                child,
                {
                    local: names[f"{prefix}.{local}" if prefix else local]
                    for local, _ in child.named_parameters(remove_duplicate=False)
                },
            )
            for prefix, child in children
        ]

    def context(self, batch: MicroBatch) -> None:
        """Nothing."""


def parameter_values(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by canonical name, detached."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def as_batch(x: Tensor, targets: Tensor) -> MicroBatch:
    """A batch for a ModuleChain."""
    if len(x) != len(targets) or len(x) == 0:
        raise CurvatureError(
            "SHAPE_MISMATCH", f"{len(x)} inputs and {len(targets)} targets; give as many, above 0"
        )
    return MicroBatch(inputs={"x": x}, targets=targets)


def rows(batch: MicroBatch, start: int, stop: int) -> MicroBatch:
    """Rows [start, stop) of a batch."""
    return MicroBatch(
        inputs={name: tensor[start:stop] for name, tensor in batch.inputs.items()},
        targets=batch.targets[start:stop],
    )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch on a device."""
    return MicroBatch(
        inputs={name: tensor.to(device) for name, tensor in batch.inputs.items()},
        targets=batch.targets.to(device),
    )
