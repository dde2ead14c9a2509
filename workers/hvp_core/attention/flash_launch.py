"""How tensors become arguments of the Triton kernels, and tiles become launches that fit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor

from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Plan, Tile, bucket, plans
from hvp_core.attention.rule import Pattern, Qkv, Span

#: Arithmetic for products of float32 operands: as they are, in three tf32 products, or in one.
InputPrecision = Literal["ieee", "tf32x3", "tf32"]
#: Runs a kernel, given its grid, arguments and options.
Launcher = Callable[[Any, tuple[int], dict[str, Any], dict[str, Any]], None]

_T = TypeVar("_T")

#: Bytes of the second-level cache (40 MB and more) that the heads that run together may fill.
_CACHE_BYTES = 16 << 20
#: Programs to have for each processor before heads of a group share one; and where a group does not
#: fit the cache. Heads then go one after the other, and causal programs differ in length: with few
#: of them, most processors wait for the last head. [meas] H100, keys dual: width 64, S = 8192 with
#: 3: 6.1 ms, with 16: 3.9; width 64, S = 2048: 0.261 and 0.271.
_WAVES = (3, 16)


def launch(
    kernel: Any, grid: tuple[int], arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Run a kernel on the current stream."""
    kernel[grid](**arguments, **options)


@cache
def kernels() -> Any:
    """The kernels, loaded when first needed: triton may be missing."""
    return importlib.import_module("hvp_core.attention.flash_kernels")


@cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def card(device: torch.device) -> Card:
    """The facts about a device that plans depend on; for a CPU those of one plain processor."""
    if device.type != "cuda":
        return Card(hopper=False, processors=1)
    properties = torch.cuda.get_device_properties(device)
    return Card(hopper=properties.major == 9, processors=properties.multi_processor_count)


@cache
def _triton(module: str) -> Any:
    return importlib.import_module(f"triton.{module}")


#: Arguments by their names without a suffix: 0 for the values, then the tangents of each probe.
Sides = Mapping[int, Mapping[str, Tensor]]
_SUFFIXES = ("_dot", "_dot2")


def named(sides: Sides, probes: Sequence[int]) -> dict[str, Tensor]:
    """Arguments by the kernels' names, of a launch for these probes."""
    assert len(probes) <= len(_SUFFIXES)
    found = dict(sides.get(0, {}))
    for suffix, probe in zip(_SUFFIXES, probes, strict=False):
        found |= {name + suffix: value for name, value in sides[probe].items()}
    return found


@final
@dataclass(frozen=True)
class Problem:
    """Sizes and pattern of one call."""

    pattern: Pattern
    span: Span | None
    b: int
    heads: int
    key_heads: int
    s: int
    t: int
    d: int
    e: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Qkv, pattern: Pattern, span: Span | None) -> Problem:
        """The problem that these inputs pose."""
        b, heads, s, d = x.q.shape
        key_heads, t, e = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        return Problem(pattern, span, b, heads, key_heads, s, t, d, e, x.q.dtype, x.q.device)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def wide(self) -> bool:
        """Whether elements have four bytes."""
        return self.dtype.itemsize == 4


def contiguous_rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; itself if it is so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_first(b: int, h: int, n: int, width: int, like: Tensor) -> Tensor:
    """An empty (b, h, n, width) whose memory is (b, n, h, width), as projections read it."""
    return torch.empty(b, n, h, width, dtype=like.dtype, device=like.device).transpose(1, 2)


@final
class Runner:
    """Chooses tiles and launches kernels; remembers what fitted and what was fastest.

    Args:
        input_precision: Arithmetic for products of float32 operands.
        tune: Time the alternatives the first time a class of shapes is met.
        launcher: Runs a kernel.
        card: The device to plan for; None asks the device.
        choose: Plans to use in place of the committed ones.
    """

    def __init__(
        self,
        input_precision: InputPrecision,
        tune: bool,
        launcher: Launcher,
        card: Card | None,
        choose: Mapping[tuple[Kernel, Mode], Plan],
    ) -> None:
        self._precision = input_precision
        self._tune = tune
        self._launcher = launcher
        self._card = card
        self._choose = choose
        self._chosen: dict[tuple[object, ...], Plan] = {}
        self._fitting: dict[tuple[object, ...], Tile] = {}

    def with_plan(
        self,
        kernel: Kernel,
        mode: Mode,
        problem: Problem,
        num_probes: int,
        execute: Callable[[Plan], _T],
    ) -> _T:
        """`execute` a plan: the committed one, or the fastest if tuning was asked for."""
        if (kernel, mode) in self._choose:
            return execute(self._choose[kernel, mode])
        card = self.card(problem.device)
        width = bucket(max(problem.d, problem.e))
        exact = self._precision != "tf32"
        several = num_probes > 1
        options = plans(kernel, mode, width, card, wide=problem.wide, exact=exact, several=several)
        if not self._tune or problem.device.type != "cuda":
            return execute(options[0])
        lengths = (problem.s.bit_length(), problem.t.bit_length(), problem.b * problem.heads)
        kind = (kernel, mode, several, width, problem.dtype)
        shape = (*kind, problem.group, lengths, problem.pattern.causal)
        if shape not in self._chosen:
            self._chosen[shape] = min(options, key=lambda plan: _seconds(lambda: execute(plan)))
        return execute(self._chosen[shape])

    def fitted(
        self, one: Pass, probes: Sequence[int], problem: Problem, execute: Callable[[Tile], _T]
    ) -> _T:
        """`execute` a launch with its tile, or the next smaller one until it fits the card."""
        errors = _triton("runtime.errors")
        key = (one, len(probes), problem.dtype, problem.d, problem.e, problem.device)
        tile = self._fitting.get(key, one.tile)
        while True:
            try:
                result = execute(tile)
            except (errors.OutOfResources, errors.PTXASError):
                smaller = tile.smaller()
                if smaller is None:
                    raise
                tile = smaller
            else:
                self._fitting[key] = tile
                return result

    def card(self, device: torch.device) -> Card:
        """The card that tensors are on."""
        return self._card or card(device)

    def parts(self, problem: Problem, probes: Sequence[int], tile: Tile) -> int:
        """Number of programs that share a group's heads, so that processors end together."""
        programs = -(-problem.t // tile.keys) * problem.b * problem.key_heads
        streamed = _streamed_bytes(problem, problem.s, probes) * problem.group
        enough = _WAVES[streamed > _CACHE_BYTES] * self.card(problem.device).processors
        divisors = [n for n in range(1, problem.group + 1) if problem.group % n == 0]
        return next((n for n in divisors if programs * n >= enough), problem.group)

    def run(
        self,
        kernel: Any,
        one: Pass,
        probes: Sequence[int],
        p: Problem,
        reads: Sides,
        arguments: Sides,
        tile: Tile,
    ) -> None:
        """One launch of a kernel whose programs own queries.

        Args:
            kernel: A kernel of `flash_kernels`.
            one: The pass that the launch is part of.
            probes: Probes whose tangents are computed, by their number from 1.
            p: Sizes and pattern.
            reads: The kernel's (b, h, n, d) inputs.
            arguments: The kernel's other tensors.
            tile: Sizes of the tiles.
        """
        # The heads of a group stream the same keys and values.
        chunk = max(_CACHE_BYTES // _streamed_bytes(p, p.t, probes), 1) * p.group
        tiles = -(-p.s // tile.queries)
        self._run(kernel, one, probes, p, reads, arguments, tile, tiles, p.b * p.heads, chunk, {})

    def run_keys(
        self,
        one: Pass,
        probes: Sequence[int],
        p: Problem,
        reads: Sides,
        arguments: Sides,
        parts: int,
        tile: Tile,
    ) -> None:
        """One launch for dK and dV, with `parts` programs to a group of heads."""
        sizes = {"parts": parts, "KEYS": one.keys, "VALUES": one.values}
        chunk = max(_CACHE_BYTES // (_streamed_bytes(p, p.s, probes) * p.group // parts), 1)
        tiles, all_heads = -(-p.t // tile.keys), p.b * p.key_heads * parts
        kernel = kernels().backward_keys
        self._run(kernel, one, probes, p, reads, arguments, tile, tiles, all_heads, chunk, sizes)

    def _run(
        self,
        kernel: Any,
        one: Pass,
        probes: Sequence[int],
        p: Problem,
        reads: Sides,
        arguments: Sides,
        tile: Tile,
        tiles: int,
        all_heads: int,
        chunk: int,
        sizes: Mapping[str, Any],
    ) -> None:
        if tiles * all_heads == 0:
            return
        bd, be = bucket(p.d), bucket(p.e)
        read = named(reads, probes)
        tma = tile.descriptors and all(map(_describable, read.values()))
        blocks = {
            name: (tile.keys if name[0] in "kv" else tile.queries, be if name[0] in "vo" else bd)
            for name in read
        }
        pattern = p.pattern
        common: dict[str, Any] = dict.fromkeys(kernel.arg_names)
        common.update(
            {name: _descriptor(x, blocks[name]) if tma else rows(x) for name, x in read.items()}
        )
        common.update({name: _argument(x) for name, x in named(arguments, probes).items()})
        common.update(
            start=None if p.span is None else p.span.start.contiguous(),
            stop=None if p.span is None else p.span.stop.contiguous(),
            scale=pattern.scale,
            softcap=pattern.softcap,
            window=pattern.window,
            heads=p.heads,
            group=p.group,
            s=p.s,
            t=p.t,
            all_heads=all_heads,
            chunk=min(chunk, all_heads),
            D=p.d,
            E=p.e,
            BD=bd,
            BE=be,
            BM=tile.queries,
            BN=tile.keys,
            CAUSAL=pattern.causal,
            PRIMAL=one.mode != "tangent",
            PROBES=len(probes),
            PRECISION=self._precision if p.wide else "ieee",
            TMA=tma,
            **sizes,
        )
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if tile.registers is not None:
            options["maxnreg"] = tile.registers
        self._launcher(kernel, (tiles * all_heads,), common, options)

    def row_sums(self, arguments: Sides, probes: Sequence[int], problem: Problem) -> None:
        """Launch the kernel for D and, with a probe, Ḋ."""
        p = problem
        width = bucket(p.e)
        block = max(4096 // width, 1)
        programs = p.b * p.heads * -(-p.s // block)
        if programs:
            kernel = kernels().row_sums
            common: dict[str, Any] = dict.fromkeys(kernel.arg_names)
            common.update({name: _argument(x) for name, x in named(arguments, probes).items()})
            common.update(heads=p.heads, s=p.s, E=p.e, BE=width, BM=block, DUAL=bool(probes))
            self._launcher(kernel, (programs,), common, {"num_warps": 4})


def _streamed_bytes(p: Problem, length: int, probes: Sequence[int]) -> int:
    """Bytes that a program reads of one head while it loops over all of it."""
    return max(length * (p.d + p.e) * p.dtype.itemsize * (1 + len(probes)), 1)


def rows(x: Tensor) -> Any:
    """A (b, h, n, d) tensor in the form that the kernels take: a pointer and its strides."""
    return kernels().Rows(x, *x.stride()[:3])


def _argument(value: Any) -> Any:
    return rows(value) if isinstance(value, Tensor) and value.dim() == 4 else value


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it."""
    strides = [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1][:-1]
    sixteen = all(n > 0 and n * x.element_size() % 16 == 0 for n in strides)
    return sixteen and x.data_ptr() % 16 == 0 and x.numel() > 0


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    aligned = 16 // x.element_size()
    # The stride of a dimension of one element means nothing, but has to be valid.
    strides = [n if size > 1 else aligned for n, size in zip(x.stride(), x.shape, strict=True)]
    strides[-1] = 1
    return _triton("tools.tensor_descriptor").TensorDescriptor(
        x, list(x.shape), strides, [1, 1, *block]
    )


def _seconds(run: Callable[[], object]) -> float:
    """Median of a few runs, or infinity if it does not fit at all."""
    errors = _triton("runtime.errors")
    try:
        run()
    except (errors.OutOfResources, errors.PTXASError):
        return float("inf")
    times: list[float] = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2]
