"""Attention in tiles against derivatives of its definition by automatic differentiation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hvp_core.attention import pieces, team
from hvp_core.attention.rule import Output, Pattern, Point, Qkv, Span
from hvp_core.attention.tiled import Tiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.core.attention_oracle import Derivatives, oracle

TILED = Tiled()
#: b, h, h/g, s, t, d, e.
Shape = tuple[int, int, int, int, int, int, int]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """In products this small, threads do little but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def tiles(rows: int, queries: int, keys: int, scores: int) -> Iterator[None]:
    """Small tiles, so that small problems have many of them."""
    with mock.patch.multiple(pieces, _ROWS=rows, _QUERIES=(1, queries), _KEYS=keys, _SCORES=scores):
        yield


class Problem:
    """A point, a direction, cotangents of O and their tangents."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        b, h, key_heads, s, t, d, e = shape
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        def point() -> Qkv:
            return Qkv(draw(b, h, s, d), draw(b, key_heads, t, d), draw(b, key_heads, t, e))

        self.x, self.x_dot = point(), point()
        self.o_bar, self.o_bar_dot = draw(b, h, s, e), draw(b, h, s, e)

    def oracle(self, pattern: Pattern, span: Span | None) -> Derivatives:
        return oracle(self.x, self.x_dot, self.o_bar, self.o_bar_dot, pattern, span)

    def together(self, pattern: Pattern, span: Span | None) -> Derivatives:
        """By the two methods that return values and tangents."""
        y, y_dot = TILED.dual(self.x, self.x_dot, pattern, span)
        at, dot = Point(self.x, y, self.o_bar), Point(self.x_dot, y_dot, self.o_bar_dot)
        first, second = TILED.backward_dual(at, dot, pattern, span)
        return Derivatives(*y, *y_dot, *first, *second)

    def apart(self, pattern: Pattern, span: Span | None) -> Derivatives:
        """By the four methods that return one of them."""
        y = TILED.forward(self.x, pattern, span)
        (y_dot,) = TILED.tangents(self.x, [self.x_dot], y, pattern, span)
        at, dot = Point(self.x, y, self.o_bar), Point(self.x_dot, y_dot, self.o_bar_dot)
        first = TILED.backward(at, pattern, span)
        (second,) = TILED.backward_tangents(at, [dot], pattern, span)
        return Derivatives(*y, *y_dot, *first, *second)

    def several(self, pattern: Pattern, span: Span | None) -> list[tuple[Output, Qkv]]:
        """Tangents along three directions of which the second is this one, all at once."""
        y = TILED.forward(self.x, pattern, span)
        x_dots = [Qkv(*(factor * part for part in self.x_dot)) for factor in (0.5, 1, -2)]
        y_dots = TILED.tangents(self.x, x_dots, y, pattern, span)
        at = Point(self.x, y, self.o_bar)
        # Each with another ḋO, which the tangents are affine in.
        dots = [
            Point(x_dot, y_dot, factor * self.o_bar_dot)
            for x_dot, y_dot, factor in zip(x_dots, y_dots, (-1, 1, 2), strict=True)
        ]
        seconds = TILED.backward_tangents(at, dots, pattern, span)
        return list(zip(y_dots, seconds, strict=True))


def check(got: Derivatives, truth: Derivatives, tolerance: float) -> None:
    """Relative to the largest entry, or to 1 where all are smaller."""
    for name, a, b in zip(truth._fields, got, truth, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a == -torch.inf, b == -torch.inf), name
        a, b = (part.double().masked_fill(part == -torch.inf, 0) for part in (a, b))
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        error = float((a - b).abs().max()) / scale if b.numel() else 0.0
        assert error < tolerance, f"{name}: {error}"


def span_of(*edges: tuple[int, int]) -> Span:
    start, stop = zip(*edges, strict=True)
    return Span(torch.tensor(start, dtype=torch.int32), torch.tensor(stop, dtype=torch.int32))


CAUSAL = Pattern(scale=0.3, causal=True)
CASES: dict[str, tuple[Shape, Pattern, Span | None]] = {
    "full": ((2, 2, 2, 70, 70, 8, 8), Pattern(scale=0.3, causal=False), None),
    "causal": ((2, 2, 2, 70, 70, 8, 8), CAUSAL, None),
    "grouped": ((1, 6, 2, 70, 70, 8, 8), CAUSAL, None),
    "one key head": ((1, 5, 1, 40, 40, 8, 8), CAUSAL, None),
    "unequal widths": ((1, 4, 2, 70, 70, 8, 5), CAUSAL, None),
    "more keys than queries": ((1, 2, 1, 20, 90, 8, 8), CAUSAL, None),
    "one query": ((1, 2, 1, 1, 90, 8, 8), CAUSAL, None),
    "more queries than keys": ((1, 2, 1, 90, 20, 8, 8), CAUSAL, None),
    "window": ((1, 2, 1, 90, 90, 8, 8), Pattern(scale=0.3, causal=True, window=17), None),
    "window of one": ((1, 2, 1, 50, 50, 8, 8), Pattern(scale=0.3, causal=True, window=1), None),
    "window, not causal": (
        (1, 2, 1, 60, 80, 8, 8),
        Pattern(scale=0.3, causal=False, window=17),
        None,
    ),
    "cap": ((1, 2, 1, 70, 70, 8, 8), Pattern(scale=0.3, causal=True, softcap=1.5), None),
    "padding on the right": ((3, 2, 1, 60, 60, 8, 8), CAUSAL, span_of((0, 60), (0, 41), (0, 1))),
    "padding on the left": ((3, 2, 1, 60, 60, 8, 8), CAUSAL, span_of((0, 60), (41, 60), (59, 60))),
    "no keys in a row": ((2, 2, 1, 60, 60, 8, 8), CAUSAL, span_of((7, 7), (0, 60))),
    "everything": (
        (3, 6, 2, 75, 83, 8, 5),
        Pattern(scale=0.3, causal=True, window=20, softcap=2.0),
        span_of((0, 83), (30, 83), (0, 50)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_every_method_equals_forward_over_reverse(name: str, small: bool) -> None:
    shape, pattern, span = CASES[name]
    problem = Problem(shape)
    truth = problem.oracle(pattern, span)
    with tiles(24, 12, 17, 600) if small else contextlib.nullcontext():
        check(problem.together(pattern, span), truth, 1e-12)
        check(problem.apart(pattern, span), truth, 1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_tangents_along_several_directions_are_those_along_each(name: str, small: bool) -> None:
    shape, pattern, span = CASES[name]
    problem = Problem(shape)
    x_dot, o_bar_dot = problem.x_dot, problem.o_bar_dot
    with tiles(24, 12, 17, 600) if small else contextlib.nullcontext():
        found = problem.several(pattern, span)
    for (y_dot, second), scale, factor in zip(found, (0.5, 1, -2), (-1, 1, 2), strict=True):
        problem.x_dot = Qkv(*(scale * part for part in x_dot))
        problem.o_bar_dot = factor * o_bar_dot
        truth = problem.oracle(pattern, span)
        check(truth._replace(**_tangents(y_dot, second)), truth, 1e-12)


def _tangents(y_dot: Output, second: Qkv) -> dict[str, Tensor]:
    names = ("o_dot", "lse_dot", "dq_dot", "dk_dot", "dv_dot")
    return dict(zip(names, (*y_dot, *second), strict=True))


def test_several_directions_share_the_tile_products_that_have_no_tangent() -> None:
    """One of the five forward, and two of the twelve backward, are done once for all."""
    problem = Problem((1, 2, 1, 64, 64, 32, 32))
    y = TILED.forward(problem.x, CAUSAL, None)
    at = Point(problem.x, y, problem.o_bar)

    def added(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]

    def watch() -> FlopCounterMode:
        mapping: dict[Any, Any] = {torch.ops.aten.baddbmm_: added}
        return FlopCounterMode(display=False, custom_mapping=mapping)

    def work(count: int) -> tuple[int, int]:
        x_dots = [problem.x_dot] * count
        with watch() as forward:
            y_dots = TILED.tangents(problem.x, x_dots, y, CAUSAL, None)
        dots = [Point(problem.x_dot, y_dot, problem.o_bar_dot) for y_dot in y_dots]
        with watch() as backward:
            TILED.backward_tangents(at, dots, CAUSAL, None)
        return forward.get_total_flops(), backward.get_total_flops()

    for one, four, shared, own in zip(work(1), work(4), (1, 2), (4, 10), strict=True):
        # Not quite: a shift is one more column of a product.
        assert four / one == pytest.approx((shared + 4 * own) / (shared + own), rel=0.005)


def test_steps_of_the_real_size_go_together() -> None:
    problem = Problem((1, 2, 1, 150, 1100, 4, 4))
    truth = problem.oracle(CAUSAL, None)
    check(problem.together(CAUSAL, None), truth, 1e-12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, Pattern, Span | None]:
    b, key_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    s, t = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    d, e = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    pattern = Pattern(
        scale=draw(st.sampled_from([1.0, 0.25])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 45)),
        softcap=draw(st.none() | st.sampled_from([0.5, 30.0])),
    )
    ends = st.integers(0, t)
    edges = st.tuples(ends, ends).map(lambda edge: (min(edge), max(edge)))
    spans = st.lists(edges, min_size=b, max_size=b).map(lambda some: span_of(*some))
    return (b, group * key_heads, key_heads, s, t, d, e), pattern, draw(st.none() | spans)


@settings(max_examples=40, deadline=None)
@given(cases(), st.tuples(*(st.integers(1, n) for n in (30, 16, 16, 3000))))
def test_any_shape_pattern_span_and_tiling_equals_forward_over_reverse(
    case: tuple[Shape, Pattern, Span | None], sizes: tuple[int, int, int, int]
) -> None:
    shape, pattern, span = case
    problem = Problem(shape)
    truth = problem.oracle(pattern, span)
    with tiles(*sizes):
        check(problem.together(pattern, span), truth, 1e-11)
        check(problem.apart(pattern, span), truth, 1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_a_dtype_loses_no_more_than_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    problem = Problem((2, 4, 2, 140, 140, 64, 64), dtype)
    pattern = Pattern(scale=64**-0.5, causal=True)
    truth = problem.oracle(pattern, None)
    for got in (problem.together(pattern, None), problem.apart(pattern, None)):
        check(got, truth, tolerance)
        for name, part in got._asdict().items():
            assert part.dtype == (torch.float32 if name.startswith("lse") else dtype), name


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    """Softmax is a function of differences: a key shifted for all moves L and nothing else."""
    problem = Problem((1, 2, 1, 40, 40, 8, 8), torch.float32)
    q, k, v = problem.x
    problem.x = Qkv(q * 3 + 10, k + 10, v)
    truth = problem.oracle(CAUSAL, None)
    assert float(truth.lse.max()) > 200
    got = problem.together(CAUSAL, None)
    check(got, truth, 1e-3)


def test_queries_that_look_nowhere_have_no_derivative() -> None:
    problem = Problem((1, 2, 1, 9, 4, 3, 3))
    got = problem.together(CAUSAL, None)
    assert torch.equal(got.lse[:, :, :5], torch.full((1, 2, 5), -torch.inf, dtype=torch.float64))
    for part in (got.o, got.o_dot, got.lse_dot, got.dq, got.dq_dot):
        assert not part[:, :, :5].any()
    assert not any(part.isnan().any() for part in got)


def test_keys_outside_a_span_are_not_even_read() -> None:
    problem = Problem((2, 2, 1, 30, 30, 4, 4))
    span = span_of((3, 30), (0, 21))
    clean = problem.together(CAUSAL, span)
    for point in (problem.x, problem.x_dot):
        for part in (point.k, point.v):
            part[0, :, :3] = part[1, :, 21:] = torch.nan
    for got, truth in zip(problem.together(CAUSAL, span), clean, strict=True):
        assert torch.equal(got, truth)


def test_strides_of_inputs_do_not_matter_and_outputs_are_laid_out_by_token() -> None:
    problem = Problem((2, 4, 2, 50, 50, 6, 6))
    truth = problem.together(CAUSAL, None)

    def strided(x: Tensor) -> Tensor:
        wide = torch.stack([x.transpose(1, 2)] * 3, dim=2)  # as one of q, k, v side by side
        return wide.flatten(2, 3).unflatten(2, (3, -1))[:, :, 1].transpose(1, 2)

    assert torch.equal(strided(problem.o_bar), problem.o_bar)
    assert strided(problem.o_bar).stride() != problem.o_bar.stride()
    problem.x = Qkv(*(strided(part) for part in problem.x))
    problem.x_dot = Qkv(*(strided(part) for part in problem.x_dot))
    problem.o_bar, problem.o_bar_dot = strided(problem.o_bar), strided(problem.o_bar_dot)
    for a, b in zip(problem.together(CAUSAL, None), truth, strict=True):
        assert torch.equal(a, b)
    for part in (truth.o, truth.o_dot, truth.dq, truth.dk, truth.dv_dot):
        assert part.transpose(1, 2).is_contiguous()


def test_inputs_that_require_gradients_leave_no_graph() -> None:
    problem = Problem((1, 2, 1, 20, 20, 4, 4))
    for part in (*problem.x, *problem.x_dot, problem.o_bar, problem.o_bar_dot):
        part.requires_grad_()
    assert not any(part.requires_grad for part in problem.together(CAUSAL, None))


def test_the_second_derivative_is_symmetric() -> None:
    """⟨u, ∂²f v⟩ = ⟨v, ∂²f u⟩ for f(x) = ⟨ō, O(x)⟩."""
    problem = Problem((2, 4, 2, 70, 70, 6, 6))
    pattern = Pattern(scale=0.4, causal=True, window=30, softcap=3.0)
    span = span_of((0, 70), (9, 70))
    x, v, u = problem.x, problem.x_dot, Problem((2, 4, 2, 70, 70, 6, 6), seed=1).x
    y = TILED.forward(x, pattern, span)

    def second(direction: Qkv) -> Qkv:
        (y_dot,) = TILED.tangents(x, [direction], y, pattern, span)
        at = Point(x, y, problem.o_bar)
        dot = Point(direction, y_dot, torch.zeros_like(problem.o_bar))
        return TILED.backward_tangents(at, [dot], pattern, span)[0]

    def inner(a: Qkv, b: Qkv) -> float:
        return float(sum((p * q).sum() for p, q in zip(a, b, strict=True)))

    assert inner(u, second(v)) == pytest.approx(inner(v, second(u)), rel=1e-11)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["causal", "one key head", "everything"])
def test_threads_share_jobs_and_always_add_in_the_same_order(threads: int, name: str) -> None:
    shape, pattern, span = CASES[name]
    problem = Problem(shape)
    truth = problem.oracle(pattern, span)
    torch.set_num_threads(threads)
    with tiles(24, 12, 17, 600), mock.patch.object(pieces, "_ALONE", 0):
        for method in (problem.together, problem.apart):
            got = method(pattern, span)
            check(got, truth, 1e-12)
            assert all(torch.equal(a, b) for a, b in zip(got, method(pattern, span), strict=True))
    assert torch.get_num_threads() == threads


def test_threads_follow_the_caller_into_inference_mode() -> None:
    problem = Problem((1, 2, 1, 40, 40, 4, 4))
    truth = problem.oracle(CAUSAL, None)
    torch.set_num_threads(2)
    with mock.patch.object(pieces, "_ALONE", 0), torch.inference_mode():
        got = problem.together(CAUSAL, None)
    assert got.o.is_inference()
    check(got, truth, 1e-12)


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def work(job: int, state: None) -> None:
        if job == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        team.run(range(5), work, lambda: None, workers=2)


def test_tensors_of_integers_are_refused_in_words() -> None:
    whole = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    assert TILED.supports(Problem((1, 2, 1, 3, 3, 2, 2)).x, CAUSAL, None) is None
    assert "int64" in str(TILED.supports(Qkv(whole, whole, whole), CAUSAL, None))


class Allocations(TorchDispatchMode):
    """The largest storage any operation returned, and the most that lived at once, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                size = storage.nbytes() // part.element_size()
                self.largest = max(self.largest, size)
                self._live[storage._cdata] = (StorageWeakRef(storage), size)
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def allocations(length: int, method: str) -> Allocations:
    problem = Problem((1, 4, 2, length, length, 8, 8), torch.float32)
    with Allocations() as seen:
        getattr(problem, method)(CAUSAL, None)
    return seen


@pytest.mark.parametrize("method", ["together", "apart"])
def test_nothing_of_all_queries_times_all_keys_is_kept(method: str) -> None:
    assert allocations(1024, method).largest < 1024 * 1024
    with tiles(48, 32, 64, 1 << 14):
        short, long = allocations(256, method), allocations(512, method)
    assert long.largest <= 2.1 * short.largest
    assert long.peak <= 2.1 * short.peak


def test_the_watch_on_allocations_sees_a_matrix_of_scores() -> None:
    x = torch.randn(64, 8)
    with Allocations() as seen:
        (x @ x.T).softmax(-1)
    assert seen.largest == 64 * 64
    assert seen.peak >= 2 * 64 * 64


def test_tiles_beyond_an_edge_are_not_computed() -> None:
    """A causal pattern costs little more than half, and a window only what it shows."""

    def work(pattern: Pattern) -> int:
        problem = Problem((1, 1, 1, 512, 512, 4, 4), torch.float32)
        scores = 0
        real = torch.bmm

        def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
            nonlocal scores
            scores += out.numel()
            return real(a, b, out=out)

        with tiles(16, 16, 64, 1 << 14), mock.patch("torch.bmm", counted):
            y: Output = TILED.forward(problem.x, pattern, None)
        assert y.o.isfinite().all()
        return scores

    full = work(Pattern(scale=1.0, causal=False))
    assert full == 512 * 512
    assert work(Pattern(scale=1.0, causal=True)) <= 0.52 * full
    assert work(Pattern(scale=1.0, causal=True, window=32)) <= (32 + 16) / 512 * full
