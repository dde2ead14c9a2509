"""Checkpoints on one rank: looked at, then loaded as chains in shards."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from hvp_core.curvature.walk import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.architecture import longest_sequence
from hvp_core.model.huggingface.check import disagreement
from hvp_core.model.huggingface.checkpoint import build_empty, fill_buffers, load_shard, locate
from hvp_core.model.huggingface.decoder import DecoderChain
from hvp_core.model.huggingface.stored_tensors import StoredTensor
from hvp_core.sharding.collective import Collective
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import Space

from hvp_workers import backend as api
from hvp_workers.memory import Memory
from hvp_workers.operators import OperatorCache

logger = logging.getLogger(__name__)

_MODELS_KEPT = 2  # loaded at once; an older one is read again when it is needed
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@final
@dataclass(frozen=True)
class Description:
    """A checkpoint that has been looked at."""

    public: api.CheckpointDescription
    sources: dict[str, StoredTensor]


@final
@dataclass(frozen=True)
class Model:
    """A checkpoint in memory, in shards."""

    chain: DecoderChain
    space: Space
    parameters: torch.Tensor
    operators: OperatorCache


class _NotThisWayError(Exception):
    """A model that has to be taken apart in another way, and why."""

    def __init__(self, way: str, why: CurvatureError):
        super().__init__(way, why)
        self.way, self.why = way, why


@final
class ModelStore:
    """Loads models when they are asked for and keeps the latest."""

    def __init__(
        self, collective: Collective, device: torch.device, memory: Memory, tuning: api.Tuning
    ):
        self._collective = collective
        self._device = device
        self._memory = memory
        self._tuning = tuning
        self._descriptions: dict[Path, Description] = {}
        self._models: OrderedDict[api.Space, Model] = OrderedDict()

    def describe(self, directory: Path) -> Description:
        """Check a checkpoint without loading its weights."""
        if directory not in self._descriptions:
            model = build_empty(directory, torch.float32)
            sources = locate(model, directory)
            text = model.config.get_text_config()
            parameters = []
            offset = 0
            for name, tensor in model.named_parameters():
                parameters.append(
                    api.ParameterTensor(name=name, shape=tuple(tensor.shape), offset=offset)
                )
                offset += tensor.numel()
            self._descriptions[directory] = Description(
                api.CheckpointDescription(
                    architecture=type(model).__name__,
                    num_parameters=offset,
                    vocab_size=text.vocab_size,
                    max_positions=longest_sequence(text),
                    stored_dtype=next(iter(sources.values())).dtype,
                    parameters=tuple(parameters),
                ),
                sources,
            )
        return self._descriptions[directory]

    def get(self, space: api.Space) -> Model:
        """The model, loaded if it is not."""
        if space in self._models:
            self._models.move_to_end(space)
            return self._models[space]
        while len(self._models) >= _MODELS_KEPT:
            self._models.popitem(last=False)
        self._models[space] = loaded = self._first_right(space)
        return loaded

    def _first_right(self, space: api.Space) -> Model:
        """The model, taken apart in the first way that gives its own loss.

        Raises:
            CurvatureError: What speaks against the last way, if there is none.
        """
        against: dict[str, CurvatureError] = {}
        for one_block in (False, True):
            for own_attention in (False, True):
                try:
                    return self._load(space, one_block, own_attention, against)
                except _NotThisWayError as error:
                    against[error.way] = error.why
        raise list(against.values())[-1]

    def _load(
        self,
        space: api.Space,
        one_block: bool,
        own_attention: bool,
        against: Mapping[str, CurvatureError],
    ) -> Model:
        """Build and read a model.

        Args:
            space: The checkpoint and its dtype.
            one_block: Do not cut it.
            own_attention: Let it compute its attention in plain operations of its own.
            against: What speaks against the faster ways, by way.

        Raises:
            _NotThisWayError: The chain's loss is not the model's own.
        """
        way = "one block" if one_block else "a chain of its layers"
        way += ", its attention in plain operations" if own_attention else ""
        dtype = DTYPES[space.dtype]
        description = self.describe(space.checkpoint_dir)
        needed = description.public.num_parameters * dtype.itemsize // self._collective.world_size
        available = self._memory.least_available()
        if needed > available:
            raise CurvatureError(
                "INSUFFICIENT_CLUSTER_MEMORY",
                f"a rank needs {needed} bytes for its share of the parameters and has {available}; "
                "use more workers or float32",
                {"needed_bytes": str(needed), "available_bytes": str(available)},
            )
        model = build_empty(space.checkpoint_dir, dtype)
        fill_buffers(model, description.sources)
        for module in model.modules():  # model.to() would choke on the empty parameters
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)
        if own_attention:
            attention.use(model, "eager")
        chain = DecoderChain(model, dtype, self._device, one_block=one_block)
        if not (one_block or chain.is_cut):
            why = CurvatureError("MODEL_UNSUPPORTED", "the model's layers are not a chain")
            raise _NotThisWayError(way, why)
        if against:
            said = "; ".join(f"as {other}: {why.message}" for other, why in against.items())
            chain.notes["fallback_model"] = f"it is taken as {way}, because {said}"
        layout = Layout(
            chain.shapes, [block.parameters for block in chain.blocks], self._collective.world_size
        )
        numbers = Space(layout, self._collective, dtype, self._device)
        parameters = load_shard(numbers, description.sources)
        disagrees = disagreement(
            model,
            chain,
            numbers,
            parameters,
            lambda batch: Curvature(chain, numbers, parameters, batch, 1).loss(),
        )
        if disagrees is not None:
            logger.warning(
                "%s as %s does not give the model's own loss: %s",
                description.public.architecture,
                way,
                disagrees,
            )
            raise _NotThisWayError(way, disagrees)
        operators = OperatorCache(
            chain,
            numbers,
            parameters,
            description.public.vocab_size,
            self._memory,
            self._tuning,
        )
        return Model(chain, numbers, parameters, operators)
