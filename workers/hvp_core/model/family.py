"""Families of models: how a checkpoint is built, which batches it takes, how it is taken apart.

The model_type of its config.json decides (`huggingface/choice.py`). Code never comes with a
checkpoint: families are those of this package, and those that installed packages register
(`modules.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from hvp_batches.contents import contents
from hvp_batches.fitting import BatchError, check_fit
from hvp_batches.schema import POSITIONS, ROWS, BatchField, BatchSchema, FieldContents
from safetensors.torch import load_file
from torch import Tensor, nn

from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import OutputHead
from hvp_core.model.chain import Chain, MicroBatch

#: Sizes of the symbols of a schema in an example; any other is `_SIZE`.
_SIZES = {ROWS: 2, POSITIONS: 16}
_SIZE = 5


@final
@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of taking a model apart.

    Attributes:
        words: Description of the way, for notes.
        one_block: The model is not cut.
        own_attention: The model computes its attention in plain operations of its own.
    """

    words: str
    one_block: bool = False
    own_attention: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about a model that has been built.

    Attributes:
        task: What the model is for, in words.
        schema: The fields of a batch for the model.
        head: The model's outputs and their loss.
        vocab_size: Token ids are below this number; 0 for models without tokens.
        max_positions: The longest sequence; None where there is no limit, or no sequence.
    """

    task: str
    schema: BatchSchema
    head: OutputHead
    vocab_size: int = 0
    max_positions: int | None = None

    def output_shape(self, batch: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of the outputs on a batch, by field, that fits the schema."""
        return self.schema.output_shape(_contents(batch))


class NotAChainError(Exception):
    """A model that cannot be taken apart in the way that was asked for, and why."""

    def __init__(self, why: CurvatureError):
        super().__init__(why)
        self.why = why


class ModelFamily(ABC):
    """Models that are built, fed and taken apart alike."""

    @abstractmethod
    def build(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """The model of a folder, its parameters on the meta device, its buffers real, in eval mode.

        Args:
            directory: Folder of config.json and safetensors.
            dtype: The dtype of the parameters.

        Raises:
            CurvatureError: CONFIG_INVALID, and other reasons that the family names.
        """

    @abstractmethod
    def facts(self, model: nn.Module, directory: Path) -> ModelFacts:
        """Facts about a model that `build` gave for a folder.

        Raises:
            CurvatureError: CONFIG_INVALID.
        """

    @property
    @abstractmethod
    def ways(self) -> Sequence[Way]:
        """Ways of taking the family's models apart, the fastest way first."""

    @abstractmethod
    def chain(
        self,
        model: nn.Module,
        facts: ModelFacts,
        way: Way,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Chain:
        """The model as a chain of blocks.

        Args:
            model: The model, as `build` gave it.
            facts: Facts about the model.
            way: How to take the model apart.
            dtype: The dtype of the parameters that the chain will be run with.
            device: The device that the chain will be run on.

        Raises:
            NotAChainError: The model cannot be taken apart in this way.
        """

    @abstractmethod
    def own_loss(self, model: nn.Module, facts: ModelFacts, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch, all rows at once, as the model's own code computes it.

        Args:
            model: The model; its parameters have values wherever they are used.
            facts: Facts about the model.
            batch: Tensors by field of the schema.

        Raises:
            CurvatureError: TASK_UNSUPPORTED: the model's values show that it does not belong to
                this family.
        """

    def micro_batch(self, facts: ModelFacts, batch: Mapping[str, Tensor]) -> MicroBatch:
        """A batch that fits the schema, as the chain takes it: inputs apart from targets."""
        target = facts.schema.targets
        inputs = {
            each.name: batch[each.name]
            for each in facts.schema.fields
            if each.name in batch and (each.name != target or not facts.head.loss.has_outputs)
        }
        first = next(iter(inputs.values()))
        targets = batch[target] if target and target in batch else first.new_zeros(len(first))
        return MicroBatch(inputs=inputs, targets=targets)

    def example(self, facts: ModelFacts) -> dict[str, Tensor]:
        """Two rows of every field that a batch must have, and padding at the end of the second.

        The values are integers and normal numbers of a fixed seed, within the ranges of the schema.
        """
        generator = torch.Generator().manual_seed(0)
        schema = facts.schema
        sizes = {
            symbol: min(size, schema.longest.get(symbol, size)) for symbol, size in _SIZES.items()
        }
        return {
            each.name: _values(each, sizes, generator)
            for each in schema.fields
            if each.required or _is_mask_of_padding(each)
        }

    def read(self, facts: ModelFacts, path: Path) -> MicroBatch:
        """The batch in a safetensors file.

        Raises:
            CurvatureError: The batch does not fit the schema; the reason is that of `check_fit`.
        """
        tensors = load_file(path)
        try:
            check_fit(facts.schema, _contents(tensors))
        except BatchError as error:
            raise CurvatureError(error.reason, error.message, error.metadata) from None
        whole = {
            name: each if each.is_floating_point() else each.long()
            for name, each in tensors.items()
        }
        return self.micro_batch(facts, whole)


def _contents(tensors: Mapping[str, Tensor]) -> tuple[FieldContents, ...]:
    return contents({name: each.numpy() for name, each in tensors.items()})


def _is_mask_of_padding(wanted: BatchField) -> bool:
    bounds = wanted.minimum, wanted.maximum
    is_mask = wanted.kind == "integer" and bounds == (0, 1) and wanted.dims == (ROWS, POSITIONS)
    return is_mask and wanted.name == "attention_mask"


def _values(wanted: BatchField, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [int(dim) if dim.isdecimal() else sizes.get(dim, _SIZE) for dim in wanted.dims]
    if _is_mask_of_padding(wanted):
        mask = torch.ones(shape, dtype=torch.long)
        mask[-1, -(shape[1] // 4) :] = 0
        return mask
    if wanted.kind == "number":
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if wanted.minimum is not None and wanted.maximum is not None:
            values = values.sigmoid() * (wanted.maximum - wanted.minimum) + wanted.minimum
        return values
    low = 0 if wanted.minimum is None else wanted.minimum
    high = low + 1 if wanted.maximum is None else wanted.maximum
    values = torch.randint(low, high + 1, shape, generator=generator)
    if wanted.ignored is not None:
        # Rows in which not as many count: a mean over what counts is then no mean over rows.
        values[0].view(-1)[values[0].numel() // 2 :] = wanted.ignored
    return values
