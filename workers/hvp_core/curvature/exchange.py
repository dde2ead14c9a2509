"""What ranks tell one another after each product: whether it is finite, and how it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor

from hvp_core.blame import InStep, raise_first
from hvp_core.errors import CurvatureError
from hvp_core.sharding.collective import Collective


@final
class Exchange:
    """One exchange between the ranks after each product, and what was learnt from it.

    Args:
        collective: The exchange between the ranks.
        own_notes: Says how this rank's products are computed.
    """

    def __init__(self, collective: Collective, own_notes: Callable[[], Mapping[str, str]]):
        self._collective, self._own_notes = collective, own_notes
        self._last_notes: dict[int, Mapping[str, str]] = {}  # notes, by rank

    def __call__(self, shards: Sequence[Tensor], step: InStep) -> bool:
        """Whether this product is finite on every rank. All ranks call it together.

        Args:
            shards: This rank's shards of the products.
            step: This rank's work on the product, which may have failed.

        Raises:
            CurvatureError: The error that was raised on the first rank that failed.
        """
        # One pass: what is not finite leaves no finite sum. The converse needs a closer look.
        fine = all(bool(shard.sum().isfinite()) or bool(shard.isfinite().all()) for shard in shards)
        own, rank = self._own_notes(), self._collective.rank
        changed_notes = None if own == self._last_notes.get(rank) else own
        answers = self._collective.gather_objects((fine, step.failure, changed_notes))
        self._last_notes.update(
            {
                rank: changed_notes
                for rank, (*_, changed_notes) in enumerate(answers)
                if changed_notes is not None
            }
        )
        raise_first(failure for _, failure, _ in answers)
        return all(fine for fine, *_ in answers)

    def notes(self) -> dict[str, str]:
        """How products were computed: the notes of all ranks, as of the last product."""
        changed_notes = {**self._last_notes, self._collective.rank: self._own_notes()}
        return merged([changed_notes.get(rank, {}) for rank in range(self._collective.world_size)])


def refuse_slower_ways(notes: Mapping[str, str]) -> None:
    """See that everything was computed the fast way.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED, naming what was computed in a slower way, and why.
    """
    slower = [name for name in notes if name.startswith("fallback_") or name == "not_compiled"]
    if slower:
        why = "; ".join(f"{name}: {notes[name]}" for name in slower)
        raise CurvatureError("MODEL_UNSUPPORTED", f"a strict policy allows no slower way: {why}")


def merged(notes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The notes of all ranks as one mapping; a value that not all ranks have names its ranks.

    Args:
        notes: The notes of each rank, in order of rank.
    """
    found = {}
    for key in dict.fromkeys(key for each in notes for key in each):
        ranks: dict[str, list[str]] = {}
        for rank, each in enumerate(notes):
            if key in each:
                ranks.setdefault(each[key], []).append(str(rank))
        found[key] = "; ".join(
            value if len(having) == len(notes) else f"{value} (on rank {', '.join(having)})"
            for value, having in ranks.items()
        )
    return found
