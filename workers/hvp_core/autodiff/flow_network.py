"""Minimum cuts of flow networks, by Dinic's algorithm (Soviet Math. Doklady 11, 1970)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator
from typing import final


@final
class FlowNetwork:
    """A directed network whose arcs have capacities.

    Law: of all sets of nodes without the sink that hold the source, `near_side` is one that arcs of
    the least total capacity leave; of several, the largest, whatever the order of the arcs.

    Args:
        source: Where flow comes from.
        sink: Where it goes.
    """

    def __init__(self, source: Hashable, sink: Hashable) -> None:
        self._places: dict[Hashable, int] = {}
        self._leaving: list[list[int]] = []  # of each node, its arcs; arc a ^ 1 is a turned round
        self._heads: list[int] = []
        self._room: list[float] = []  # what may still flow through an arc
        self._source, self._sink = self._place(source), self._place(sink)

    def connect(self, tail: Hashable, head: Hashable, capacity: float = math.inf) -> None:
        """Add an arc. One between nodes that have one already adds to its capacity."""
        ends = self._place(tail), self._place(head)
        for start, end, room in ((*ends, capacity), (*reversed(ends), 0)):
            self._leaving[start].append(len(self._heads))
            self._heads.append(end)
            self._room.append(room)

    def near_side(self) -> set[Hashable]:
        """The source's side of the minimum cut; called once, since it fills the network.

        Raises:
            ValueError: Every cut has an arc of infinite capacity.
        """
        while (distances := self._distances())[self._source] >= 0:
            for path in self._shortest_paths(distances):
                flow = min(self._room[arc] for arc in path)
                if math.isinf(flow):
                    raise ValueError("no cut of this network is finite")
                for arc in path:
                    self._room[arc] -= flow
                    self._room[arc ^ 1] += flow
        return {node for node, place in self._places.items() if distances[place] < 0}

    def _place(self, node: Hashable) -> int:
        place = self._places.setdefault(node, len(self._places))
        if place == len(self._leaving):
            self._leaving.append([])
        return place

    def _distances(self) -> list[int]:
        """For each node the number of arcs with room on its way to the sink; -1: no way."""
        heads, room = self._heads, self._room
        found = [-1] * len(self._leaving)
        found[self._sink] = 0
        waiting = deque([self._sink])
        while waiting:
            node = waiting.popleft()
            for arc in self._leaving[node]:
                if room[arc ^ 1] and found[heads[arc]] < 0:
                    found[heads[arc]] = found[node] + 1
                    waiting.append(heads[arc])
        return found

    def _shortest_paths(self, distances: list[int]) -> Iterator[list[int]]:
        """Ways from source to sink, each of which has room when it is given and none afterwards."""
        heads, room = self._heads, self._room
        untried = [iter(arcs) for arcs in self._leaving]  # an arc that has led nowhere never will
        path: list[int] = []
        node = self._source
        while True:
            if node == self._sink:
                yield path
                full = next(place for place, arc in enumerate(path) if not room[arc])
                node = heads[path[full] ^ 1]
                del path[full:]
            for arc in untried[node]:
                if room[arc] and distances[heads[arc]] == distances[node] - 1:
                    path.append(arc)
                    node = heads[arc]
                    break
            else:
                if not path:
                    return
                node = heads[path.pop() ^ 1]
