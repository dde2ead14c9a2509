"""The blocks of a decoder from transformers: embedding, layers, head, or the model as one.

Each runs the model's own code, with its layers replaced where they are not wanted and its buffers
as arguments. Parameters that a run does not need are zeros of no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hvp_core.attention.mask import Mask
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Block, Body, canonical_names


class StopForward(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a layer's input out of the model's forward."""

    def __init__(self, x: Tensor):
        self.x = x


@contextmanager
def replaced(layers: Sequence[nn.Module], calls: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Run with each layer's forward replaced."""
    for layer, call in zip(layers, calls, strict=True):
        layer.__dict__["forward"] = call
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Take back what a module's forward has written down in itself.

    The next run then does not depend on this one, and holds none of its tensors.
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
    """A zero for every parameter, each of one element's memory."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return {name: zero.expand(parameter.shape) for name, parameter in module.named_parameters()}


def _setting(leaf: Any) -> Hashable:
    """What an argument that is no tensor may decide; of anything else its kind."""
    # 1, 1.0 and True are equal and not the same argument.
    plain = isinstance(leaf, bool | int | float | str | None)
    return type(leaf), leaf if plain else None


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"c/{index}": each for index, each in enumerate(tensors)}


@final
class Parts:
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
        return free_zeros(self.model, dtype, self.device)

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
        given = constants.values() if constants else self.buffers.values()
        # Copies: rotary positions of some models write into theirs.
        buffers = {name: each.clone() for name, each in zip(self.buffers, given, strict=False)}
        with unchanged(self.model):
            return functional_call(
                self.model,
                {**self.zeros(params), **buffers, **params},
                kwargs={**inputs, "use_cache": False, "return_dict": True},
            )

    def embedding_width(self, x: Tensor) -> int:
        """Of a token's embedding, which some models project to the width of their layers."""
        weight = getattr(self.model.get_input_embeddings(), "weight", x)
        return int(weight.shape[-1])

    def constants(self, context: Context) -> dict[str, Tensor]:
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
        """As this model's layers return it."""
        return (x,) if self.tuples else x


def _logits(output: Any) -> Tensor:
    """Of a model's output."""
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise CurvatureError("MODEL_UNSUPPORTED", "the model's forward returns no logits")
    return found


@final
class Embedding(Block):
    """Token ids (b, s) to the first layer's input (b, s, d)."""

    def __init__(self, parts: Parts, parameters: Sequence[str]):
        super().__init__("embedding", parameters)
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model up to its first layer."""
        return Body(self._parts.constants(context), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        def stop(hidden: Tensor, *_: Any, **__: Any) -> Any:
            raise StopForward(hidden)

        parts = self._parts
        with replaced(parts.layers[:1], [stop]):
            try:
                parts.run(params, constants, input_ids=x, attention_mask=parts.mask(constants, x))
            except StopForward as stopped:
                return stopped.x
        raise CurvatureError("MODEL_UNSUPPORTED", "the model's forward never called its layers")


@final
class Layer(Block):
    """(b, s, d) to (b, s, d)."""

    def __init__(self, parts: Parts, index: int, name: str, names: Mapping[str, str]):
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
            with unchanged(self._module):
                y = functional_call(self._module, {**own, **held}, (x, *args), kwargs)
            result: Tensor = y[0] if isinstance(y, tuple) else y
            return result

        masks = tuple(each for each in leaves if isinstance(each, Mask))
        settings = str(spec), *[_setting(each) for each in leaves]
        return Body(constants, call, masks, settings=settings)


@final
class Head(Block):
    """The last layer's output (b, s, d) to logits (b, s, V), position by position."""

    def __init__(self, parts: Parts, parameters: Sequence[str]):
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
        with replaced(parts.layers, calls):
            # What the model makes of these zeros never reaches the output.
            return _logits(
                parts.run(
                    params,
                    constants,
                    inputs_embeds=x.new_zeros(*x.shape[:2], parts.embedding_width(x)),
                    attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
                )
            )


@final
class Whole(Block):
    """Token ids (b, s) to logits (b, s, V) in one block."""

    def __init__(self, parts: Parts):
        super().__init__(type(parts.model).__name__, list(parts.zeros()))
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model."""
        return Body(self._parts.constants(context), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        mask = self._parts.mask(constants, x)
        return _logits(self._parts.run(params, constants, input_ids=x, attention_mask=mask))


@final
class Context:
    """Constants of one micro-batch."""

    def __init__(self, attention_mask: Tensor | None):
        self.attention_mask = attention_mask
        self.layer_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
