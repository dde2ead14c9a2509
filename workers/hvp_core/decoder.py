"""Any Hugging Face decoder as a chain: embedding, one block per layer, head.

No architecture is named here. The model's own forward is run with its layers replaced: to find out
in which order they are called and with which constants, to stop before the first (the embedding
block), and to hand a tensor to whatever follows the last (the head block). Parameters that a run
does not need are zeros of no memory, so the whole model need never exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import PreTrainedModel

from hvp_core.attention.mask import Mask
from hvp_core.chain import (
    Block,
    Body,
    Chain,
    MicroBatch,
    canonical_names,
    refuse_train_mode_batch_norm,
)
from hvp_core.errors import CurvatureError
from hvp_core.loss import CrossEntropy

logger = logging.getLogger(__name__)

#: Tokens × vocabulary at once in the head: 16 MiB in float32, and ten such tensors.
LOGIT_ELEMENTS = 4 << 20
_FEW = 16  # positions that a check takes


class _StopForward(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a layer's input out of the model's forward."""

    def __init__(self, x: Tensor):
        self.x = x


@contextmanager
def _replaced(layers: Sequence[nn.Module], calls: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Run with each layer's forward replaced."""
    for layer, call in zip(layers, calls, strict=True):
        layer.__dict__["forward"] = call
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _free_zeros(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A zero for every parameter, each of one element's memory."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return {name: zero.expand(parameter.shape) for name, parameter in module.named_parameters()}


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"c/{index}": each for index, each in enumerate(tensors)}


def _candidate_layers(model: nn.Module) -> list[nn.ModuleList]:
    """Outermost module lists, the one with most parameters first."""
    lists = {
        name: child for name, child in model.named_modules() if isinstance(child, nn.ModuleList)
    }
    outermost = [
        child
        for name, child in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    return sorted(outermost, key=lambda child: -sum(p.numel() for p in child.parameters()))


@final
class _Parts:
    """What the blocks of one decoder share."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device):
        self.model = model
        self.names = canonical_names(model)
        self.dtype, self.device = dtype, device
        self.buffers = dict(model.named_buffers())
        self.layers: list[nn.Module] = []
        self.tuples = False  # layers return (x, ...) instead of x

    def zeros(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every parameter, as zeros; of the dtype of these."""
        dtype = next(iter(like.values())).dtype if like else self.dtype
        return _free_zeros(self.model, dtype, self.device)

    def run(
        self,
        params: Mapping[str, Tensor],
        constants: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's own forward.

        Args:
            params: Those not given are zeros.
            constants: The model's buffers in their order, if they are to be arguments.
            inputs: Of the model.
        """
        buffers = dict(zip(self.buffers, constants.values(), strict=False)) if constants else {}
        return functional_call(
            self.model,
            {**self.zeros(params), **buffers, **params},
            kwargs={**inputs, "use_cache": False, "return_dict": True},
        )

    def constants(self, context: _Context) -> dict[str, Tensor]:
        """Buffers, and the mask of the keys that are there, if some are not."""
        mask = context.attention_mask
        return _numbered([*self.buffers.values(), *([] if mask is None else [mask])])

    def mask(self, constants: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The mask among such constants.

        Ones where there is none: without a mask, models look into their positions for packed
        sequences, and what depends on values cannot be traced.
        """
        found = constants.get(f"c/{len(self.buffers)}")
        return torch.ones_like(ids) if found is None else found

    def as_layer_output(self, x: Tensor) -> Any:
        return (x,) if self.tuples else x


@final
class _Embedding(Block):
    """Token ids (b, s) to the first layer's input (b, s, d)."""

    def __init__(self, parts: _Parts, parameters: Sequence[str]):
        super().__init__("embedding", parameters)
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model up to its first layer."""
        return Body(self._parts.constants(context), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        def stop(hidden: Tensor, *_: Any, **__: Any) -> Any:
            raise _StopForward(hidden)

        parts = self._parts
        with _replaced(parts.layers[:1], [stop]):
            try:
                parts.run(params, constants, input_ids=x, attention_mask=parts.mask(constants, x))
            except _StopForward as stopped:
                return stopped.x
        raise CurvatureError("MODEL_UNSUPPORTED", "the model's forward never called its layers")


@final
class _Layer(Block):
    """(b, s, d) to (b, s, d)."""

    def __init__(self, parts: _Parts, index: int, name: str, names: Mapping[str, str]):
        super().__init__(name, list(dict.fromkeys(names.values())))
        self._module = parts.layers[index]
        self._index = index
        self._names = dict(names)

    def body(self, context: Any, dense: bool) -> Body:
        """The layer with the constants that the model gave it, and its buffers."""
        leaves, spec = tree_flatten(context.layer_arguments[self._index])
        if dense:
            leaves = [each.dense() if isinstance(each, Mask) else each for each in leaves]
        buffers = dict(self._module.named_buffers())
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        constants = _numbered([*[leaves[index] for index in places], *buffers.values()])

        def call(
            params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
        ) -> Tensor:
            own = {local: params[canonical] for local, canonical in self._names.items()}
            given = list(constants.values())
            held = dict(zip(buffers, given[len(places) :], strict=True))
            filled = list(leaves)
            for index, value in zip(places, given, strict=False):
                filled[index] = value
            args, kwargs = tree_unflatten(filled, spec)
            y = functional_call(self._module, {**own, **held}, (x, *args), kwargs)
            result: Tensor = y[0] if isinstance(y, tuple) else y
            return result

        return Body(constants, call, tuple(each for each in leaves if isinstance(each, Mask)))


@final
class _Head(Block):
    """The last layer's output (b, s, d) to logits (b, s, V), position by position."""

    def __init__(self, parts: _Parts, parameters: Sequence[str]):
        super().__init__("head", parameters)
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model behind its last layer."""
        return Body(_numbered(list(self._parts.buffers.values())), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        parts = self._parts

        def bypass(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return parts.as_layer_output(hidden)

        def inject(*_: Any, **__: Any) -> Any:
            return parts.as_layer_output(x)

        calls = [bypass] * (len(parts.layers) - 1) + [inject]
        with _replaced(parts.layers, calls):
            # What the model makes of these zeros never reaches the output.
            logits: Tensor = parts.run(
                params,
                constants,
                inputs_embeds=torch.zeros_like(x),
                attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
            ).logits
        return logits


@final
class _Whole(Block):
    """Token ids (b, s) to logits (b, s, V) in one block."""

    def __init__(self, parts: _Parts):
        super().__init__(type(parts.model).__name__, list(parts.zeros()))
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model."""
        return Body(self._parts.constants(context), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        mask = self._parts.mask(constants, x)
        logits: Tensor = self._parts.run(params, constants, input_ids=x, attention_mask=mask).logits
        return logits


@final
class _Context:
    """Constants of one micro-batch."""

    def __init__(self, attention_mask: Tensor | None):
        self.attention_mask = attention_mask
        self.layer_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


@final
class DecoderChain(Chain):
    """A causal language model from transformers, in eval mode.

    Args:
        model: Its parameters may be on the meta device; its buffers must be real.
        dtype: Of the parameters it will be run with.
        device: Where it will be run.
        one_block: Do not cut the model, whatever is found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        one_block: bool = False,
    ):
        refuse_train_mode_batch_norm(model)
        self.loss = CrossEntropy()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._parts = _Parts(model, dtype, device)
        #: Positions that go through the head together; None chooses by memory.
        self.positions_at_once: int | None = None
        self.blocks: list[Block] = [_Whole(self._parts)]
        if not one_block:
            for candidate in _candidate_layers(model):
                if self._cut(candidate):
                    break

    @property
    def is_cut(self) -> bool:
        """More than one block was found."""
        return len(self.blocks) > 1

    def first_input(self, batch: MicroBatch) -> Tensor:
        """Token ids."""
        return batch.inputs["input_ids"]

    def few(self, batch: MicroBatch) -> MicroBatch:
        """One row, a few positions."""
        inputs = {name: each[:1, :_FEW] for name, each in batch.inputs.items()}
        return MicroBatch(inputs=inputs, targets=batch.targets[:1, :_FEW])

    def context(self, batch: MicroBatch) -> _Context:
        """Masks, positions and the like, recorded from the model's own forward."""
        context = _Context(batch.inputs.get("attention_mask"))
        if self.is_cut:
            context.layer_arguments = self._record(batch.inputs)[0]
        return context

    def pieces(self, x: Tensor) -> list[slice]:
        """Positions, so many at once that the logits stay small."""
        if not self.is_cut:
            return []
        vocabulary = self._parts.model.config.get_text_config().vocab_size
        elements = LOGIT_ELEMENTS * (1 if x.device.type == "cpu" else 16)
        most = max(1, elements // (x.shape[0] * vocabulary))
        count = -(-x.shape[1] // most)
        # Pieces of one size run one program.
        equal = next(each for each in range(count, x.shape[1] + 1) if x.shape[1] % each == 0)
        step = self.positions_at_once or -(-x.shape[1] // (equal if equal < 2 * count else count))
        return [slice(start, start + step) for start in range(0, x.shape[1], step)]

    def _record(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Tensor]:
        """Arguments of each layer, and the first layer's input; the layers themselves are skipped.

        Raises:
            CurvatureError: MODEL_UNSUPPORTED when the layers are no chain.
        """
        parts = self._parts
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        passed: list[Tensor] = []

        def skip(index: int) -> Callable[..., Any]:
            def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index != len(arguments) or (passed and x is not passed[-1]):
                    raise CurvatureError("MODEL_UNSUPPORTED", "the layers are not a chain")
                arguments.append((args, kwargs))
                passed.append(x.clone())
                if len(arguments) == len(parts.layers):
                    raise _StopForward(x)
                return parts.as_layer_output(passed[-1])

            return call

        calls = [skip(index) for index in range(len(parts.layers))]
        with torch.no_grad(), _replaced(parts.layers, calls):
            try:
                parts.run(
                    {},
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs.get("attention_mask"),
                )
            except _StopForward:
                return arguments, passed[0]
        raise CurvatureError("MODEL_UNSUPPORTED", "the model did not call its layers")

    def _cut(self, layers: nn.ModuleList) -> bool:
        """Try to cut the model at these layers."""
        parts = self._parts
        ids = torch.zeros(1, 2, dtype=torch.long, device=parts.device)
        parts.layers = list(layers)
        for parts.tuples in (False, True):
            try:
                arguments, x = self._record({"input_ids": ids})
                args, kwargs = arguments[0]
                zeros = _free_zeros(layers[0], parts.dtype, parts.device)
                with torch.no_grad():
                    y = functional_call(layers[0], zeros, (x, *args), kwargs)
                if isinstance(y, tuple) == parts.tuples:
                    before, after = self._outer_parameters(ids)
                    break
            except Exception as error:  # whatever a model does with a skipped layer
                logger.debug("not a chain of %s: %r", type(layers[0]).__name__, error)
        else:
            parts.layers = []
            return False
        blocks: list[Block] = [_Embedding(parts, before)]
        for index, layer in enumerate(parts.layers):
            names = {
                local: parts.names[self._name_of(layer, local)]
                for local, _ in layer.named_parameters(remove_duplicate=False)
            }
            blocks.append(_Layer(parts, index, self._name_of(layer), names))
        self.blocks = [*blocks, _Head(parts, after)]
        return True

    def _name_of(self, module: nn.Module, parameter: str = "") -> str:
        for name, child in self._parts.model.named_modules():
            if child is module:
                return f"{name}.{parameter}" if parameter else name
        raise CurvatureError("INTERNAL", "a layer is not part of its model")

    def _outer_parameters(self, ids: Tensor) -> tuple[list[str], list[str]]:
        """Parameters outside the layers used before the first and after the last of them.

        Raises:
            CurvatureError: MODEL_UNSUPPORTED when a layer's constants depend on parameters.
        """
        parts = self._parts
        inside = {id(module) for layer in parts.layers for module in layer.modules()}
        reached: list[int] = []  # layers entered so far
        when: dict[str, list[int]] = {}

        def pass_on(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            constants = tree_leaves((args, kwargs))
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in constants):
                raise CurvatureError("MODEL_UNSUPPORTED", "a layer's constants have parameters")
            reached.append(1)
            return parts.as_layer_output(x)

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                when.setdefault(name, []).append(len(reached))

            return hook

        owners: dict[str, list[str]] = {}
        handles = []
        for name, module in parts.model.named_modules():
            direct = [
                parts.names[f"{name}.{local}" if name else local]
                for local in module._parameters
                if module._parameters[local] is not None
            ]
            if direct and id(module) not in inside:
                owners[name] = direct
                handles.append(module.register_forward_pre_hook(note(name)))
        leaves = {name: zero.detach().requires_grad_() for name, zero in parts.zeros().items()}
        try:
            with torch.enable_grad(), _replaced(parts.layers, [pass_on] * len(parts.layers)):
                parts.run(leaves, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        before, after = [], []
        for name, direct in owners.items():
            calls = when.get(name, [])
            # A module with children of its own may use its parameters at any time.
            anytime = any(True for _ in parts.model.get_submodule(name).children())
            if anytime or any(call < len(parts.layers) for call in calls):
                before += direct
            if anytime or any(call >= len(parts.layers) for call in calls):
                after += direct
        order = {name: index for index, name in enumerate(self.shapes)}
        return (
            sorted(set(before), key=order.__getitem__),
            sorted(set(after), key=order.__getitem__),
        )
