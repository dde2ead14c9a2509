"""What ranks tell one another once a product: is it one, and how was it made?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from hvp_core.blame import InStep, raise_first
from hvp_core.curvature.itinerary import Itinerary, merged
from hvp_core.sharding.collective import Collective


@final
class Exchange:
    """One exchange between the ranks after each product, and what was learnt from it.

    Args:
        collective: Of the ranks.
        itinerary: This rank's own, which says how its products are computed.
    """

    def __init__(self, collective: Collective, itinerary: Itinerary):
        self._collective, self._itinerary = collective, itinerary
        self._told: dict[int, Mapping[str, str]] = {}  # notes, by rank

    def __call__(self, shards: Sequence[Tensor], step: InStep) -> bool:
        """Whether this product is finite on every rank.

        Args:
            shards: What this rank has found.
            step: Of its work, which may have failed.

        Raises:
            CurvatureError: What was raised on a rank.
        """
        # One pass: what is not finite leaves no finite sum. The converse needs a closer look.
        fine = all(bool(shard.sum().isfinite()) or bool(shard.isfinite().all()) for shard in shards)
        own, rank = self._itinerary.notes(), self._collective.rank
        told = None if own == self._told.get(rank) else own
        answers = self._collective.gather_objects((fine, step.failure, told))
        self._told.update(
            {rank: told for rank, (*_, told) in enumerate(answers) if told is not None}
        )
        raise_first(failure for _, failure, _ in answers)
        return all(fine for fine, *_ in answers)

    def notes(self) -> dict[str, str]:
        """How products were computed: as of the last one, for all ranks."""
        told = {**self._told, self._collective.rank: self._itinerary.notes()}
        return merged([told.get(rank, {}) for rank in range(self._collective.world_size)])
