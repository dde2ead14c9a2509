"""Kronecker factors of each matrix of parameters, added up while a gradient is walked.

The derivative of a matrix W (m, n) leaves a subprogram as the operands of its last product, left
(m, T) @ right (T, n): of a layer they are its outputs' gradients and its inputs, at T positions.
The Fisher matrix of W is Σ_t (l_t l_tᵀ) ⊗ (r_t r_tᵀ), and near it is, with the sums over positions
taken apart, (left leftᵀ) ⊗ (rightᵀ right) / T (Martens and Grosse, "Optimizing neural networks with
Kronecker-factored approximate curvature", ICML 2015). An embedding's operands are ids and rows: its
left factor is the diagonal of the ids' counts. So no more is known of a model than its trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.autodiff.sums import Accumulator, GradientTerm
from hvp_core.curvature.shards import Collector, Results
from hvp_core.precision import exact_products
from hvp_core.sharding.layout import Parameter, Segment
from hvp_core.vectors.space import ParameterSpace

#: A factor with more rows is diagonal: to decompose one takes minutes.
MOST_ROWS = 4096
#: A position's term that is smaller beside the largest may be nothing but rounding.
_ROUNDINGS = 64
#: Factors of fewer elements together are never refused: they are nothing beside a process.
_ALWAYS = 1 << 16


class Side(NamedTuple):
    """A factor of a matrix: (size, size), or of a diagonal one (size,)."""

    size: int
    is_dense: bool

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return self.size**2 if self.is_dense else self.size

    def view(self, flat: Tensor, start: int) -> Tensor:
        """The factor, of elements that begin here."""
        found = flat[start : start + self.numel]
        return found.view(self.size, self.size) if self.is_dense else found

    def add_gram(self, total: Tensor, x: Tensor) -> None:
        """Add x xᵀ, or its diagonal, for x (size, T)."""
        if self.is_dense:
            total.addmm_(x, x.T)
        else:
            total += x.square().sum(1)


@final
@dataclass(frozen=True)
class Place:
    """Where the two factors of a matrix lie: with one rank, one after the other."""

    name: str
    left: Side
    right: Side
    owner: int
    offset: int  # in the owner's chunk

    def views(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors, as views of the owner's chunk."""
        left = self.left.view(chunk, self.offset)
        return left, self.right.view(chunk, self.offset + self.left.numel)


class Share(NamedTuple):
    """The factors of a segment's matrices, and the largest number of elements of one rank."""

    segment: Segment
    places: tuple[Place, ...]
    chunk: int


def deal(space: ParameterSpace, most_elements: int) -> list[Share]:
    """Deal the factors of all matrices out to the ranks.

    Args:
        space: Space of the parameters.
        most_elements: Elements of all factors together. Small factors are dense before large ones.
    """
    segments = space.layout.segments
    matrices = [each for segment in segments for each in segment.parameters if _is_matrix(each)]
    sides = sorted((size, each.name, side) for each in matrices for side, size in _sizes(each))
    left = max(most_elements, _ALWAYS) - sum(size for size, *_ in sides)
    dense = set()
    for size, name, side in sides:
        if size <= MOST_ROWS and size * size - size <= left:
            left -= size * size - size
            dense.add((name, side))
    loads = [0] * space.layout.world_size
    return [_share(segment, dense, loads) for segment in segments]


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) == 2 and parameter.numel > 0


def _sizes(parameter: Parameter) -> list[tuple[int, int]]:
    return list(enumerate(parameter.shape))


def _share(segment: Segment, dense: set[tuple[str, int]], loads: list[int]) -> Share:
    """A segment's factors, the largest first to the rank that has least of the segment so far."""
    pairs: list[tuple[str, Side, Side]] = []
    for each in segment.parameters:
        if _is_matrix(each):
            left, right = (Side(size, (each.name, side) in dense) for side, size in _sizes(each))
            pairs.append((each.name, left, right))
    taken, places = [0] * len(loads), list[Place]()
    for name, left, right in sorted(pairs, key=lambda pair: -(pair[1].numel + pair[2].numel)):
        owner = min(range(len(loads)), key=lambda rank: (taken[rank], loads[rank], rank))
        places.append(Place(name, left, right, owner, taken[owner]))
        taken[owner] += left.numel + right.numel
        loads[owner] += left.numel + right.numel
    return Share(segment, tuple(places), max(taken))


@final
@dataclass
class Tally:
    """What a parameter's derivative was made of.

    Attributes:
        kinds: Kinds of its terms; `dense` also where it came as it is.
        num_positions: T, the number of positions that added to it, a tensor until it is read.
    """

    kinds: set[str] = field(default_factory=set)
    num_positions: Tensor | float = 0.0


@final
class _BlockFactors(Accumulator):
    """Adds to a block's factors, and hands on to the sums of the gradient.

    Args:
        sums: Sums of the gradient.
        factors: Sides and views of the factors, by the parameters' names.
        tallies: What derivatives were made of, by the parameters' names; changed.
    """

    def __init__(
        self,
        sums: Accumulator,
        factors: Mapping[str, tuple[Place, Tensor, Tensor]],
        tallies: dict[str, Tally],
    ):
        self._sums, self._factors, self._tallies = sums, factors, tallies

    def add(self, name: str, terms: Sequence[GradientTerm], results: Mapping[str, Tensor]) -> None:
        """See Accumulator."""
        self._sums.add(name, terms, results)
        for term in terms:
            self._tally(name).kinds.add(term.kind)
            if name in self._factors and term.kind != "dense":
                with exact_products():
                    self._add(name, term.kind, *[results[each] for each in term.operands])

    def add_dense(self, parts: Mapping[str, Tensor]) -> None:
        """See Accumulator: of such a derivative no operands are known."""
        self._sums.add_dense(parts)
        for name in parts:
            self._tally(name).kinds.add("dense")

    def _tally(self, name: str) -> Tally:
        return self._tallies.setdefault(name, Tally())

    def _add(self, name: str, kind: str, first: Tensor, second: Tensor) -> None:
        """Add the positions that add to the derivative: others count for neither factor.

        Of padding, or of a first position's query, one side is zero or its rounding, and the other
        is as large as any.
        """
        place, left, right = self._factors[name]
        dtype = left.dtype
        if kind == "rows":
            rows = second.reshape(-1, second.shape[-1]).to(dtype)
            live = _live(_norms(rows, 1), dtype)
            counts = left.diagonal() if place.left.is_dense else left
            counts.index_add_(0, first.reshape(-1), live)  # whole numbers: in any order the same
        else:
            columns, rows = first.to(dtype), second.to(dtype)
            live = _live(_norms(columns, 0) * _norms(rows, 1), dtype)
            place.left.add_gram(left, columns * live)
        place.right.add_gram(right, (rows * live.unsqueeze(1)).T)
        self._tally(name).num_positions += live.sum(dtype=torch.float64)


def _norms(x: Tensor, dim: int) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return found


def _live(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for each position (T,) whose term is more than rounding beside the largest, else 0."""
    if not len(sizes):
        return sizes.to(dtype)
    return (sizes > _ROUNDINGS * torch.finfo(dtype).eps * sizes.max()).to(dtype)


class Totals(NamedTuple):
    """Factors of all matrices, summed over the ranks.

    Attributes:
        shares: Where the factors of each segment lie.
        chunks: This rank's chunk of each segment's factors.
        tallies: What derivatives were made of, on all ranks together, by the parameters' names.
    """

    shares: Sequence[Share]
    chunks: Sequence[Tensor]
    tallies: Mapping[str, Tally]


@final
class FactorSums(Collector):
    """A gradient, and beside it the factors of each matrix of parameters.

    Memory: the gradient, this rank's factors, and a block's factors of all ranks.

    Args:
        space: Space of the vectors.
        most_elements: As of `deal`.
    """

    def __init__(self, space: ParameterSpace, most_elements: int):
        self._space, self._results = space, Results(space, [space.dtype])
        self._shares = deal(space, most_elements)
        self._chunks = [
            torch.zeros(each.chunk, dtype=space.dtype, device=space.device) for each in self._shares
        ]
        self._tallies: dict[str, Tally] = {}

    @contextmanager
    def block(self, index: int) -> Iterator[Sequence[Accumulator]]:
        """See Collector; the factors are summed over the ranks at the end."""
        collective = self._space.collective
        alone = collective.world_size == 1
        flats: list[tuple[Share, Tensor, Tensor]] = []
        for number in self._space.layout.block_segments[index]:
            share, chunk = self._shares[number], self._chunks[number]
            if share.places:
                flat = chunk if alone else chunk.new_zeros(collective.world_size * share.chunk)
                flats.append((share, flat, chunk))
        factors = {
            place.name: (place, *place.views(flat[place.owner * share.chunk :]))
            for share, flat, _ in flats
            for place in share.places
        }
        with self._results.block(index) as (sums,):
            yield [_BlockFactors(sums, factors, self._tallies)]
        for _, flat, chunk in flats:
            if not alone:
                collective.scatter_sum(flat, chunk)

    def finish(self) -> list[Tensor]:
        """See Collector: the gradient."""
        return self._results.finish()

    def totals(self) -> Totals:
        """The factors, when the walk is over. All ranks call it together."""
        own = {
            name: (sorted(each.kinds), float(each.num_positions))
            for name, each in self._tallies.items()
        }
        found: dict[str, Tally] = {}
        for answer in self._space.collective.gather_objects(own):
            for name, (kinds, num_positions) in answer.items():
                tally = found.setdefault(name, Tally())
                tally.kinds.update(kinds)
                tally.num_positions += num_positions
        return Totals(self._shares, self._chunks, found)
