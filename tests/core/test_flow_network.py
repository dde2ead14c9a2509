"""Minimum cuts of small networks are those that are found by trying all."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hvp_core.autodiff.flow_network import FlowNetwork

Arcs = list[tuple[int, int, float]]


def random_arcs(seed: int, num_nodes: int, num_arcs: int) -> Arcs:
    """Arcs between nodes, of which the first is the source and the last the sink.

    Few capacities are different, so that many cuts are equal; some are zero, some infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(num_nodes, (num_arcs, 2), generator=generator).tolist()
    choice = torch.randint(6, (num_arcs,), generator=generator).tolist()
    sizes = [0, 1, 1, 2, 3, math.inf]
    return [
        (tail, head, sizes[size])
        for (tail, head), size in zip(ends, choice, strict=True)
        # Else there may be no finite cut.
        if not (tail == 0 and head == num_nodes - 1 and size == 5)
    ]


def cuts(arcs: Arcs, num_nodes: int) -> list[tuple[float, set[int]]]:
    """All cuts, by their capacity."""
    inner = range(1, num_nodes - 1)
    sides = [{0, *some} for count in range(num_nodes - 1) for some in combinations(inner, count)]
    return [
        (sum(size for tail, head, size in arcs if tail in side and head not in side), side)
        for side in sides
    ]


@pytest.mark.parametrize("num_arcs", [6, 14, 30])
def test_a_cut_is_the_least_of_all_and_its_near_side_the_largest(num_arcs: int) -> None:
    for seed in range(60):
        arcs = random_arcs(seed, 7, num_arcs)
        found = cuts(arcs, 7)
        least = min(size for size, _ in found)
        network = FlowNetwork(0, 6)
        for tail, head, size in arcs:
            network.connect(tail, head, size)
        if math.isinf(least):
            with pytest.raises(ValueError, match="no cut"):
                network.near_side()
            continue
        met = {each for tail, head, _ in arcs for each in (tail, head)} | {0, 6}
        largest = set.union(*(side for size, side in found if size == least))
        assert network.near_side() == largest & met
        assert (least, largest) in found  # of two that are the least, both together are it too


def test_what_is_not_connected_is_near() -> None:
    assert FlowNetwork("source", "sink").near_side() == {"source"}
