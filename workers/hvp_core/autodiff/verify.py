"""Checks that a block's trace is the block, once for each program.

Programs are compared with torch (`comparison.py`) on one row and a few positions of the batch: in
float64, or in float32 where a block has so many parameters that copies of them count, as a large
vocabulary's table has. Ranks share the work: what several of them meet, one compares for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, final

import torch
from torch import Tensor

from hvp_core.autodiff.directions import comparison_dtype, noise_like, random_direction
from hvp_core.autodiff.executor import BlockExecutor, HeadExecutor
from hvp_core.autodiff.passes import Passes
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.reference import Function, Params, backward_dual, held
from hvp_core.autodiff.selected_parameters import Link, SelectedParameters
from hvp_core.autodiff.verdicts import Verdicts, digest
from hvp_core.blame import explained, raised_again, working_on
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import Loss
from hvp_core.model.chain import Body, Chain, MicroBatch, function_of
from hvp_core.sharding.collective import Collective

#: In the place of a program's key, of a last block that has none.
_NOT_TRACED = "not traced"
#: Parameters that may wait to be compared, on each of several ranks: 256 MiB in float32.
_ROOM = 1 << 26
_verified = Verdicts()  # of programs and what they were taken through


def keep_verdicts(folder: Path, device: torch.device) -> None:
    """Remember in a folder which programs are right, and believe what it says.

    Args:
        folder: Folder of this server alone.
        device: Device of this process's rank.
    """
    _verified.keep_in(folder, device)


class BuildHead(Protocol):
    """Builds the executor of the last block and a product's rule (`ExecutorBuilder.head`)."""

    def __call__(
        self,
        spec: ProductSpec,
        link: Link,
        body: Body,
        loss: Loss,
        p: Params,
        x: Tensor,
        target: Tensor,
        scale: float,
    ) -> HeadExecutor:
        """The executor."""


class Comparer(Protocol):
    """Compares traces with torch (`comparison.Comparer`)."""

    def block(
        self,
        link: Link,
        passes: Passes,
        bodies: Callable[[bool], Body],
        f: Function,
        x: Tensor,
        p: Params,
    ) -> bool | None:
        """Whether the trace of a block, not the last, is the block."""

    def untraced(
        self, link: Link, passes: Passes, f: Function, x: Tensor, p: Params
    ) -> bool | None:
        """Whether torch's own derivatives of a block are those of the block."""

    def head(
        self, link: Link, traced: HeadExecutor, f: Function, x: Tensor, target: Tensor, p: Params
    ) -> bool | None:
        """Whether the trace of the last block and the loss is right."""

    def untraced_head(
        self, link: Link, f: Function, x: Tensor, target: Tensor, p: Params
    ) -> bool | None:
        """Whether torch's own derivatives of the last block and the loss are those of the block."""


@final
@dataclass(frozen=True)
class _Comparison:
    """A comparison that is to be made.

    Attributes:
        block: Name of the block.
        numel: Number of the block's parameters.
        run: Makes the comparison: whether the trace is right, None where nothing can be told.
    """

    block: str
    numel: int
    run: Callable[[], bool | None]


@final
class Verifier:
    """Walks a small piece of the batch along with the preparation of an operator.

    Args:
        chain: The model.
        batches: This rank's micro-batches. A piece of the first is taken, where there is one.
        spec: The product that is going to be computed.
        build_head: Builds the executor of the small piece's end, under default settings.
        comparer: Compares traces with torch.
        selected: The parameters that the model is differentiated by.
        collective: The ranks.
    """

    def __init__(
        self,
        chain: Chain,
        batches: Sequence[MicroBatch],
        spec: ProductSpec,
        build_head: BuildHead,
        comparer: Comparer,
        selected: SelectedParameters,
        collective: Collective,
    ):
        self._chain, self._selected, self._collective = chain, selected, collective
        self._spec, self._build_head, self._comparer = spec, build_head, comparer
        self._last = len(chain.blocks) - 1
        self._piece = None
        if batches:
            small = chain.sample_for_checks(batches[0])
            self._piece = small, chain.context(small)
        self._x = torch.empty(0)  # the input of the next block
        # Alone there is nobody to share with.
        self._room = 0 if collective.world_size == 1 else _ROOM
        self._waiting: dict[Hashable, _Comparison] = {}
        self._answers: dict[Hashable, bool | None] = {}
        self._met: dict[Hashable, set[int]] = {}  # programs, and the blocks that are of them

    @property
    def wrong(self) -> list[int]:
        """Blocks, by index, whose traces are not what torch says."""
        met = [self._met[key] for key, answer in self._answers.items() if answer is False]
        return sorted(set().union(*met))

    @property
    def contradicted(self) -> list[int]:
        """Blocks of `wrong` that have a trace; of the last there may be none."""
        untraced = (self._last, _NOT_TRACED) in self._answers
        return [index for index in self.wrong if not (untraced and index == self._last)]

    def block(
        self, index: int, p: Params, executor: BlockExecutor | None, *, keeps_shape: bool
    ) -> None:
        """Pass a block, not the last.

        Args:
            index: Index of the block.
            p: Parameters of the block.
            executor: Executor of the block; None if this rank has nothing to take through it.
            keeps_shape: The output is shaped as the input. Where the block's program was met
                before, it is then not run: its input serves the next block as well.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED: torch has no second derivative of the
                block either; other errors of the block's code as `explained` says.
        """
        if self._piece is None or executor is None:
            return
        block, link = self._chain.blocks[index], self._selected.links[index]
        passes = self._selected.passes(index, self._spec.passes)
        batch, context = self._piece
        if index == 0:
            self._x = self._chain.first_input(batch)
        key = None if executor.key is None else _key(executor.key, p, link, passes)
        is_known = key is not None and self._knows(key, index)
        if keeps_shape and is_known:
            return
        dtype, x = comparison_dtype(p), _in(comparison_dtype(p), self._x)

        def body(dense: bool) -> Body:
            return block.body(context, dense).cast(dtype)

        f = function_of(body(True))
        untraced = partial(self._comparer.untraced, link, passes, f, x)
        by_torch = partial(_by_torch, link, passes, f, x, untraced)
        if key is None:
            by_torch(_in_dtype(p, dtype))
        elif not is_known:
            self._see(
                key, link, p, partial(self._comparer.block, link, passes, body, f, x), by_torch
            )
        own = next((each.dtype for each in p.values()), dtype)
        with torch.no_grad():  # in the parameters' own precision: a copy of a large table is dear
            y = function_of(block.body(context, dense=True).cast(own))(p, _in(own, self._x))
        self._x = _in(torch.float64, y)

    def head(self, p: Params) -> None:
        """Pass the last block.

        Args:
            p: Parameters of the block.

        Raises:
            CurvatureError: As for `block`.
        """
        if self._piece is None:
            return
        index = len(self._chain.blocks) - 1
        block, link = self._chain.blocks[index], self._selected.links[index]
        passes, loss = self._spec.passes, self._chain.loss
        batch, context = self._piece
        if index == 0:
            self._x = self._chain.first_input(batch)
        dtype, x = comparison_dtype(p), _in(comparison_dtype(p), self._x)
        body = block.body(context, dense=True).cast(dtype)
        f, like = function_of(body), {name: torch.empty_like(p[name], dtype=dtype) for name in p}
        target = self._spec.targets_like(batch.targets)
        traced = self._build_head(self._spec, link, body, loss, like, x, target, 1.0)
        key = (index, _NOT_TRACED) if traced.key is None else _key(traced.key, p, link, passes)
        if self._knows(key, index):
            return
        untraced = partial(self._comparer.untraced_head, link, f, x, target)
        by_torch = partial(_by_torch, link, passes, f, x, untraced)
        if traced.key is None:
            by_torch(_in_dtype(p, dtype))
            self._answers[key] = False
            return
        compare = partial(self._comparer.head, link, traced, f, x, target)
        self._see(key, link, p, compare, by_torch)

    def settle(self) -> bool:
        """Make the comparisons that wait, each on one of the ranks that ask for it.

        Returns:
            Whether the walk has to be gone once more, on every rank: somewhere a program told
            nothing at the block that it was compared at, and others are of it too.

        Raises:
            CurvatureError: As for `block`. All ranks raise it.
        """
        waiting, self._waiting = self._waiting, {}
        ranks = self._collective
        names = {key: digest(key) or f"{ranks.rank} {i}" for i, key in enumerate(waiting)}
        asked = ranks.gather_objects({names[key]: each.numel for key, each in waiting.items()})
        mine = _shares(asked)[ranks.rank]
        answers: dict[str, bool | None] = {}
        with ranks.same_fate(raised_again):
            for key, each in waiting.items():
                if names[key] in mine:
                    with working_on(each.block, "the check of its trace"):
                        answers[names[key]] = each.run()
        found = {
            name: each for given in ranks.gather_objects(answers) for name, each in given.items()
        }
        for key in waiting:
            self._note(key, found[names[key]])
        self._room = 0
        untold = any(self._answers[key] is None and len(self._met[key]) > 1 for key in waiting)
        return any(ranks.gather_objects(untold))

    def _knows(self, key: Hashable, index: int) -> bool:
        """Whether a block's program is compared, or will be; otherwise it is to be compared."""
        if key in _verified:
            return True
        self._met.setdefault(key, set()).add(index)
        return key in self._waiting or self._answers.get(key) is False

    def _see(
        self,
        key: Hashable,
        link: Link,
        p: Params,
        compare: Callable[[Params], bool | None],
        by_torch: Callable[[Params], None],
    ) -> None:
        """Compare a program, now or in `settle`; where it is wrong, see that torch is right."""

        def run(p: Params) -> bool | None:
            p = _in_dtype(p, comparison_dtype(p))
            right = compare(p)
            if right is False:
                by_torch(p)
            return right

        numel = sum(each.numel() for each in p.values())
        if numel > self._room:
            self._note(key, run(p))
            return
        self._room -= numel
        kept = {name: each.clone() for name, each in p.items()}
        self._waiting[key] = _Comparison(link.name, numel, partial(run, kept))

    def _note(self, key: Hashable, answer: bool | None) -> None:
        self._answers[key] = answer
        if answer:
            _verified.add(key)


def _shares(asked: Sequence[Mapping[str, int]]) -> list[set[str]]:
    """Which comparisons each rank makes: large ones first, each by who has the least so far.

    Args:
        asked: For each rank the comparisons that it could make, with their sizes.
    """
    sizes = {name: size for each in asked for name, size in each.items()}
    shares: list[set[str]] = [set() for _ in asked]
    loads = [0] * len(asked)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min((rank for rank, each in enumerate(asked) if name in each), key=loads.__getitem__)
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


def _by_torch(
    link: Link,
    passes: Passes,
    f: Function,
    x: Tensor,
    is_right: Callable[[Params], bool | None],
    p: Params,
) -> None:
    """See that torch has a block's second derivative, if the product has one, and a right one.

    Raises:
        CurvatureError: What `explained` makes of the error that torch raises; MODEL_UNSUPPORTED:
            an operation's own second rule contradicts its first.
    """
    if passes.backward != "pair":
        return
    _try(link, f, x, p)
    if is_right(p) is False:
        raise CurvatureError(
            "MODEL_UNSUPPORTED",
            "an operation of this block has a rule for its second derivative that contradicts the "
            "first one; correct the operation's backward or its jvp",
            {"block": link.name},
        )


def _try(link: Link, f: Function, x: Tensor, p: Params) -> None:
    """Take a block's second derivative once, to see that it has one.

    Raises:
        CurvatureError: What `explained` makes of the error that torch raises.
    """
    x_dot = None if link.takes_data else noise_like(x, 1)
    f, p = held(f, p, link.selected)
    try:
        backward_dual(f, p, random_direction(p, 1000), x, x_dot, lambda y, y_dot: (y, y_dot))
    except Exception as error:
        raise explained(error, link.name, "the second derivative") from error


def _key(traced: Hashable, p: Params, link: Link, passes: Passes) -> Hashable:
    """The key under which a verified trace is remembered.

    A program says nothing of widths, nor of what is differentiated: the key adds both.
    """
    shapes = tuple(tuple(p[name].shape) for name in link.parameters)
    selected = tuple(name in link.selected for name in link.parameters)
    return traced, shapes, selected, link.takes_data, passes


def _in_dtype(p: Params, dtype: torch.dtype) -> Params:
    return {name: each.to(dtype) for name, each in p.items()}


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
