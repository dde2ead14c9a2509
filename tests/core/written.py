"""Runs whose state goes through bytes after every step."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Found
from hvp_core.runs.snapshot import Snapshot, restored, written
from safetensors.torch import load, save

StateT = TypeVar("StateT")


def through_bytes(state: StateT) -> StateT:
    """The state as another process would read it."""
    snapshot = written(state)
    # What is read must not be what was there before.
    parts = [
        save({path: each.contiguous() for path, each in tensors.items()})
        for tensors in (snapshot.shards, snapshot.tensors)
    ]
    text = json.dumps(snapshot.values, allow_nan=False)
    shards, tensors = map(load, parts)
    return restored(type(state), Snapshot(shards, tensors, json.loads(text)))


def run(
    algorithm: Algorithm[Any], operator: LinearOperator, *, interrupted: bool
) -> tuple[list[Advance], Found, Any]:
    """Advances, answer and last state of a run, each step of which may be a process' own."""
    state = algorithm.begin(operator)
    reported: list[Advance] = []
    while True:
        if interrupted:
            state = through_bytes(state)
        advance = algorithm.step(operator, state)
        if advance is None:
            return reported, algorithm.result(operator, state), state
        reported.append(advance)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(one == other)
