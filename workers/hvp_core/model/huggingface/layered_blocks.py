"""The blocks of a model from transformers: embedding, layers, head, or the model as one.

Each block runs the model's own code, with its layers replaced where they are not wanted and its
buffers as arguments. Parameters that a run does not need are zeros that take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hvp_core.attention.mask import Mask
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import (
    Block,
    Body,
    canonical_names,
    free_zeros,
    numbered,
    unchanged,
)


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


def _setting(leaf: Any) -> Hashable:
    """A key for what an argument may decide: a plain value itself, of anything else its type."""
    # 1, 1.0 and True are equal and not the same argument.
    plain = isinstance(leaf, bool | int | float | str | None)
    return type(leaf), leaf if plain else None


@final
class Parts:
    """The model, and what its blocks share of it."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device):
        self.model = model
        self.names = canonical_names(model)
        self.dtype, self.device = dtype, device
        self.buffers = dict(model.named_buffers())
        self.layers: list[nn.Module] = []
        self.tuples = False  # layers return (x, ...) instead of x

    def zeros(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Zeros for every parameter, in the dtype of the tensors in `like`, or of the chain."""
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
            params: Parameters by canonical name; those that are missing are zeros.
            constants: Tensors that begin with the model's buffers, in their order; None takes the
                model's own.
            inputs: The model's inputs, by name.
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
        """Width of a token's embedding, which some models project to the width of their layers."""
        weight = getattr(self.model.get_input_embeddings(), "weight", x)
        return int(weight.shape[-1])

    def constants(self, context: Context) -> dict[str, Tensor]:
        """The model's buffers, and a micro-batch's inputs beside the token ids."""
        return numbered([*self.buffers.values(), *context.beside.values()])

    def beside(
        self, names: Sequence[str], constants: Mapping[str, Tensor], ids: Tensor
    ) -> dict[str, Tensor]:
        """The inputs beside the token ids, by name, out of the constants that `constants` gave.

        Where there is no mask, one of ones is added: without a mask, models look into their
        positions for packed sequences, and code that depends on values cannot be traced.
        """
        given = list(constants.values())[len(self.buffers) :]
        found = dict(zip(names, given, strict=False))
        return found if "attention_mask" in found else {**found, "attention_mask": _ones(ids)}

    def as_layer_output(self, x: Tensor) -> Any:
        """A hidden state in the form in which this model's layers return it."""
        return (x,) if self.tuples else x


def _ones(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)


def _logits(output: Any) -> Tensor:
    """The logits in a model's output.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED: there are none.
    """
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
        return _body(self._parts, context, self._call)

    def _call(
        self,
        names: Sequence[str],
        params: Mapping[str, Tensor],
        x: Tensor,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        def stop(hidden: Tensor, *_: Any, **__: Any) -> Any:
            raise StopForward(hidden)

        parts = self._parts
        with replaced(parts.layers[:1], [stop]):
            try:
                parts.run(params, constants, input_ids=x, **parts.beside(names, constants, x))
            except StopForward as stopped:
                return stopped.x
        raise CurvatureError("MODEL_UNSUPPORTED", "the model's forward never called its layers")


@final
class Layer(Block):
    """One layer, from hidden states (b, s, d) to hidden states (b, s, d)."""

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
        constants = numbered([*[leaves[index] for index in places], *buffers.values()])

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
    """The last layer's output (b, s, d) to the logits of each position (b, s, V)."""

    def __init__(self, parts: Parts, parameters: Sequence[str]):
        super().__init__("head", parameters)
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model behind its last layer; positions do not know of one another there."""
        return Body(numbered(list(self._parts.buffers.values())), self._call, fixed=True)

    def _call(
        self, params: Mapping[str, Tensor], x: Tensor, constants: Mapping[str, Tensor]
    ) -> Tensor:
        parts = self._parts
        with replaced(parts.layers, _handing_on(parts, x)):
            # What the model makes of these zeros never reaches the output.
            return _logits(
                parts.run(
                    params,
                    constants,
                    inputs_embeds=x.new_zeros(*x.shape[:2], parts.embedding_width(x)),
                    attention_mask=_ones(x),
                )
            )


@final
class RowHead(Block):
    """The last layer's output (b, s, d) to the logits of each row (b, C).

    The pooling of a row's positions may depend on its token ids, so the model is given them.
    """

    def __init__(self, parts: Parts, parameters: Sequence[str]):
        super().__init__("head", parameters)
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The model behind its last layer."""
        constants = numbered([*self._parts.constants(context).values(), context.ids])
        call = partial(self._call, tuple(context.beside))
        return Body(constants, call, fixed=True, settings=tuple(context.beside))

    def _call(
        self,
        names: Sequence[str],
        params: Mapping[str, Tensor],
        x: Tensor,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        parts, ids = self._parts, list(constants.values())[-1]
        with replaced(parts.layers, _handing_on(parts, x)):
            beside = parts.beside(names, constants, ids)
            return _logits(parts.run(params, constants, input_ids=ids, **beside))


def _handing_on(parts: Parts, x: Tensor) -> list[Callable[..., Any]]:
    """Replacements for the layers' forward: the last layer gives x, the others their own input."""

    def bypass(hidden: Tensor, *_: Any, **__: Any) -> Any:
        return parts.as_layer_output(hidden)

    def inject(*_: Any, **__: Any) -> Any:
        return parts.as_layer_output(x)

    return [bypass] * (len(parts.layers) - 1) + [inject]


def _body(parts: Parts, context: Context, call: Callable[..., Tensor]) -> Body:
    """The body of a block that takes token ids and the micro-batch's other inputs."""
    names = tuple(context.beside)
    return Body(parts.constants(context), partial(call, names), fixed=True, settings=names)


@final
class Whole(Block):
    """Token ids (b, s) to the model's logits, in one block."""

    def __init__(self, parts: Parts):
        super().__init__(type(parts.model).__name__, list(parts.zeros()))
        self._parts = parts

    def body(self, context: Any, dense: bool) -> Body:
        """The whole model."""
        return _body(self._parts, context, self._call)

    def _call(
        self,
        names: Sequence[str],
        params: Mapping[str, Tensor],
        x: Tensor,
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        beside = self._parts.beside(names, constants, x)
        return _logits(self._parts.run(params, constants, input_ids=x, **beside))


@final
class Context:
    """Constants of one micro-batch.

    Attributes:
        ids: Token ids (b, s).
        beside: The model's other inputs by name, each (b, s).
        layer_arguments: Arguments that the model gives each layer beside its input.
    """

    def __init__(self, inputs: Mapping[str, Tensor]):
        self.ids = inputs["input_ids"]
        self.beside = {name: each for name, each in inputs.items() if name != "input_ids"}
        self.layer_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
