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
from transformers import PreTrainedModel

from hvp_core.chain import Block, Chain, MicroBatch, canonical_names, refuse_train_mode_batch_norm
from hvp_core.errors import CurvatureError
from hvp_core.loss import CrossEntropy

logger = logging.getLogger(__name__)

logger = logging.getLogger(__name__)

#: Tokens × vocabulary at once in the head: 16 MiB in float32, and ten such tensors.
LOGIT_ELEMENTS = 4 << 20


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
        self.zeros = _free_zeros(model, dtype, device)
        self.layers: list[nn.Module] = []
        self.tuples = False  # layers return (x, ...) instead of x

    def run(self, params: Mapping[str, Tensor], **inputs: Any) -> Any:
        """The model's own forward; parameters not given are zeros."""
        return functional_call(
            self.model,
            {**self.zeros, **params},
            kwargs={**inputs, "use_cache": False, "return_dict": True},
        )

    def as_layer_output(self, x: Tensor) -> Any:
        return (x,) if self.tuples else x


@final
class _Embedding(Block):
    """Token ids (b, s) to the first layer's input (b, s, d)."""

    def __init__(self, parts: _Parts, parameters: Sequence[str]):
        super().__init__("embedding", parameters)
        self._parts = parts

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        def stop(hidden: Tensor, *_: Any, **__: Any) -> Any:
            raise _StopForward(hidden)

        with _replaced(self._parts.layers[:1], [stop]):
            try:
                self._parts.run(params, input_ids=x, attention_mask=context.attention_mask)
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
        shapes = tuple(tuple(p.shape) for p in self._module.parameters())
        self.kind = (type(self._module), shapes)

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        own = {local: params[canonical] for local, canonical in self._names.items()}
        args, kwargs = context.layer_arguments[self._index]
        y = functional_call(self._module, own, (x, *args), kwargs)
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result


@final
class _Head(Block):
    """The last layer's output (b, s, d) to logits (b, s, V), position by position."""

    def __init__(self, parts: _Parts, parameters: Sequence[str]):
        super().__init__("head", parameters)
        self._parts = parts

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        parts = self._parts

        def bypass(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return parts.as_layer_output(hidden)

        def inject(*_: Any, **__: Any) -> Any:
            return parts.as_layer_output(x)

        calls = [bypass] * (len(parts.layers) - 1) + [inject]
        with _replaced(parts.layers, calls):
            # What the model makes of these zeros never reaches the output.
            logits: Tensor = parts.run(params, inputs_embeds=torch.zeros_like(x)).logits
        return logits


@final
class _Whole(Block):
    """Token ids (b, s) to logits (b, s, V) in one block."""

    def __init__(self, parts: _Parts):
        super().__init__(type(parts.model).__name__, list(parts.zeros))
        self._parts = parts

    def forward(self, params: Mapping[str, Tensor], x: Tensor, context: Any) -> Tensor:
        logits: Tensor = self._parts.run(
            params, input_ids=x, attention_mask=context.attention_mask
        ).logits
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
        step = self.positions_at_once or max(1, LOGIT_ELEMENTS // (x.shape[0] * vocabulary))
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
        device = next(iter(parts.zeros.values())).device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        parts.layers = list(layers)
        for parts.tuples in (False, True):
            try:
                arguments, x = self._record({"input_ids": ids})
                args, kwargs = arguments[0]
                zeros = {
                    local: parts.zeros[parts.names[self._name_of(layers[0], local)]]
                    for local, _ in layers[0].named_parameters()
                }
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
            constants = torch.utils._pytree.tree_leaves((args, kwargs))
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
        leaves = {name: zero.detach().requires_grad_() for name, zero in parts.zeros.items()}
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
