"""Checkpoints on one rank: looked at, then loaded as chains in shards."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.shards import part_of
from hvp_core.errors import CurvatureError
from hvp_core.model.agreement import disagreement
from hvp_core.model.chain import Chain
from hvp_core.model.family import ModelFacts, ModelFamily, NotAChainError, Way
from hvp_core.model.huggingface.choice import family_of
from hvp_core.model.loading import fill_buffers, load_shard, locate
from hvp_core.model.stored_tensors import StoredTensor
from hvp_core.settings import ComputeSettings
from hvp_core.sharding.collective import Collective
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace

from hvp_workers import backend as api
from hvp_workers.memory import Memory
from hvp_workers.operators import OperatorCache

logger = logging.getLogger(__name__)

_MODELS_KEPT = 2  # loaded at once; an older one is read again when it is needed
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@final
@dataclass(frozen=True)
class Description:
    """A checkpoint that has been described: what is public, and what loading it needs."""

    public: api.CheckpointDescription
    family: ModelFamily
    facts: ModelFacts
    sources: dict[str, StoredTensor]


@final
@dataclass(frozen=True)
class Model:
    """A checkpoint in memory, in shards."""

    chain: Chain
    space: ParameterSpace
    parameters: torch.Tensor
    operators: OperatorCache

    def part_of_parameters(self, names: Sequence[str]) -> torch.Tensor:
        """A copy of θ for some of the parameters, this rank's shard of their space.

        Args:
            names: Names of the parameters; none for all.
        """
        return part_of(self.space, self.parameters, self.operators.space_of(names)).clone()


class _NotThisWayError(Exception):
    """A model that has to be taken apart in another way, and why."""

    def __init__(self, why: CurvatureError):
        super().__init__(why)
        self.why = why


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
            family = family_of(directory)
            model = family.build(directory, torch.float32)
            facts = family.facts(model, directory)
            sources = locate(model, directory)
            parameters = []
            offset = 0
            for name, tensor in model.named_parameters():
                parameters.append(
                    api.ParameterTensor(name=name, shape=tuple(tensor.shape), offset=offset)
                )
                offset += tensor.numel()
            public = api.CheckpointDescription(
                architecture=type(model).__name__,
                num_parameters=offset,
                vocab_size=facts.vocab_size,
                max_positions=facts.max_positions,
                stored_dtype=next(iter(sources.values())).dtype,
                parameters=tuple(parameters),
                task=facts.task,
                batch_schema=facts.schema,
            )
            self._descriptions[directory] = Description(public, family, facts, sources)
        return self._descriptions[directory]

    def get(self, space: api.Space) -> Model:
        """The model of a space, loaded if it is not; all ranks must call it together.

        Raises:
            CurvatureError: The checkpoint cannot be described, taken apart or loaded.
        """
        space = space.whole
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
            CurvatureError: No way gives the model's own loss; the error of the last one.
        """
        against: dict[str, CurvatureError] = {}
        for way in self.describe(space.checkpoint_dir).family.ways:
            try:
                return self._load(space, way, against)
            except _NotThisWayError as error:
                against[way.words] = error.why
        raise list(against.values())[-1]

    def _load(self, space: api.Space, way: Way, against: Mapping[str, CurvatureError]) -> Model:
        """Build and read a model.

        Args:
            space: The checkpoint and its dtype.
            way: How to take the model apart.
            against: Why the faster ways do not work, by their words.

        Raises:
            _NotThisWayError: The model cannot be taken apart in this way, or the chain's loss is
                not the model's own.
            CurvatureError: INSUFFICIENT_CLUSTER_MEMORY, and errors of building and reading.
        """
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
        family, facts = description.family, description.facts
        model = family.build(space.checkpoint_dir, dtype)
        fill_buffers(model, description.sources)
        for module in model.modules():  # model.to() would choke on the empty parameters
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)
        try:
            chain = family.chain(model, facts, way, dtype, self._device)
        except NotAChainError as error:
            raise _NotThisWayError(error.why) from None
        if against:
            said = "; ".join(f"as {other}: {why.message}" for other, why in against.items())
            fallback = f"it is taken as {way.words}, because {said}"
            chain.notes = {**chain.notes, "fallback_model": fallback}
        layout = Layout(
            chain.shapes, [block.parameters for block in chain.blocks], self._collective.world_size
        )
        numbers = ParameterSpace(layout, self._collective, dtype, self._device)
        parameters = load_shard(numbers, description.sources)
        disagrees = disagreement(
            family,
            facts,
            model,
            chain,
            numbers,
            parameters,
            lambda batch: Curvature(
                chain, numbers, parameters, batch, 1, ComputeSettings(trace=False)
            ).loss(),
        )
        if disagrees is not None:
            logger.warning(
                "%s as %s does not give the model's own loss: %s",
                description.public.architecture,
                way.words,
                disagrees,
            )
            raise _NotThisWayError(disagrees)
        read = functools.partial(family.read, facts)
        operators = OperatorCache(chain, numbers, parameters, read, self._memory, self._tuning)
        return Model(chain, numbers, parameters, operators)
