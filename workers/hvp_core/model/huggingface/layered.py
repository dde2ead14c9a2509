"""Any layered model of transformers as a chain: embedding, one block per layer, head.

No architecture is named here. The model's own forward is run with its layers replaced: to find out
in which order they are called and with which constants, to stop before the first (the embedding
block), and to hand a tensor to whatever follows the last (the head block). The whole model need
never exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hvp_core.blame import explained, whose
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, OutputHead
from hvp_core.model.chain import Block, Chain, MicroBatch, free_zeros, refuse_train_mode
from hvp_core.model.huggingface.layered_blocks import (
    Context,
    Embedding,
    Head,
    Layer,
    Parts,
    RowHead,
    StopForward,
    Whole,
    replaced,
)
from hvp_core.precision import exact, exact_products

logger = logging.getLogger(__name__)

#: Tokens × vocabulary at once in the head, on a CPU: 64 MiB in float32, and ten such tensors.
LOGIT_ELEMENTS = 16 << 20
_ON_GPU = 4  # times as many there, for GEMMs of full speed
_FEW = 16  # positions that a check takes
#: A language model: logits of the next token at every position.
LANGUAGE = OutputHead(loss=CrossEntropy(), unit="token")


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
class LayeredChain(Chain):
    """A model from transformers, in eval mode: a language model, or one that judges whole rows.

    Args:
        model: The model. Its parameters may be on the meta device; its buffers must be real.
        dtype: The dtype of the parameters that the chain will be run with.
        device: The device that the chain will be run on.
        one_block: Do not cut the model, whatever layers it has.
        head: The model's outputs and their loss.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED: a part is in train mode, or normalises over the batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        one_block: bool = False,
        head: OutputHead = LANGUAGE,
    ):
        refuse_train_mode(model)
        self.module = model
        self.loss, self._unit = head.loss, head.unit
        self.notes: dict[str, str] = {}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._parts = Parts(model, dtype, device)
        self.blocks: list[Block] = [Whole(self._parts)]
        if not one_block:
            for candidate in _candidate_layers(model):
                if self._cut(candidate):
                    break

    @property
    def is_cut(self) -> bool:
        """Whether the model is cut into more than one block."""
        return len(self.blocks) > 1

    def first_input(self, batch: MicroBatch) -> Tensor:
        """Token ids (b, s)."""
        return batch.inputs["input_ids"]

    def sample_for_checks(self, batch: MicroBatch) -> MicroBatch:
        """One row's first positions that are no padding, with targets that count."""
        mask = batch.inputs.get("attention_mask")
        start = 0 if mask is None else int(mask[0].ne(0).int().argmax())
        place = slice(start, start + _FEW)
        inputs = {name: each[:1, place] for name, each in batch.inputs.items()}
        targets = batch.targets[:1, place] if self._unit == "token" else batch.targets[:1]
        return MicroBatch(
            inputs=inputs, targets=targets if targets.is_floating_point() else targets.clamp(min=0)
        )

    def pair(self, batch: MicroBatch) -> None:
        """None: when the chain was built, its loss row by row was compared with the model's own."""

    def context(self, batch: MicroBatch) -> Context:
        """Masks, positions and the like, recorded from the model's own forward."""
        context = Context(batch.inputs)
        if self.is_cut:
            context.layer_arguments = self._record(batch.inputs)[0]
        return context

    def pieces(self, x: Tensor) -> list[slice]:
        """Slices of positions, so many at once that the logits stay small."""
        if not self.is_cut or self._unit == "row":
            return []
        vocabulary = self._parts.model.config.get_text_config().vocab_size
        elements = LOGIT_ELEMENTS * (1 if x.device.type == "cpu" else _ON_GPU)
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
        given: dict[str, Any] = dict(inputs)

        def skip(index: int) -> Callable[..., Any]:
            def call(x: Any, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(x, Tensor):
                    raise CurvatureError("MODEL_UNSUPPORTED", "a layer's input is no tensor")
                if index != len(arguments) or (passed and x is not passed[-1]):
                    raise CurvatureError("MODEL_UNSUPPORTED", "the layers are not a chain")
                arguments.append((args, kwargs))
                passed.append(x.clone())
                if len(arguments) == len(parts.layers):
                    raise StopForward(x)
                return parts.as_layer_output(passed[-1])

            return call

        calls = [skip(index) for index in range(len(parts.layers))]
        # Positions become angles by a product, which in tf32 would be off by radians.
        with torch.no_grad(), exact_products(), replaced(parts.layers, calls):
            try:
                parts.run({}, None, **given)
            except StopForward:
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
                zeros = free_zeros(layers[0], parts.dtype, parts.device)
                with torch.no_grad():
                    y = functional_call(layers[0], zeros, (x, *args), kwargs)
                if isinstance(y, tuple) == parts.tuples:
                    before, after = self._outer_parameters(ids)
                    break
            except Exception as error:
                # Whatever a model does with a skipped layer; not what we do wrong.
                if not isinstance(error, CurvatureError) and whose(error) != "model":
                    raise explained(error, type(parts.model).__name__, "its cutting") from error
                logger.debug("not a chain of %s: %r", type(layers[0]).__name__, error)
        else:
            parts.layers = []
            return False
        blocks: list[Block] = [Embedding(parts, before)]
        name_of = {module: name for name, module in parts.model.named_modules()}
        for index, layer in enumerate(parts.layers):
            names = {
                local: parts.names[f"{name_of[layer]}.{local}"]
                for local, _ in layer.named_parameters(remove_duplicate=False)
            }
            blocks.append(Layer(parts, index, name_of[layer], names))
        head = Head(parts, after) if self._unit == "token" else RowHead(parts, after)
        self.blocks = [*blocks, head]
        return True

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
            # What depends on parameters does so under no_grad too.
            with (
                torch.enable_grad(),
                exact(),
                replaced(parts.layers, [pass_on] * len(parts.layers)),
            ):
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
