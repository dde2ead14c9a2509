"""Triton kernels of attention against forward over reverse in float64."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

import pytest
import torch
from hvp_core.attention.flash import Flash
from hvp_core.attention.flash_first_order import FirstOrder
from hvp_core.attention.flash_launch import InputPrecision
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Tile, plans
from hvp_core.attention.rule import Pattern, Point, Qkv

from tests.core.flash_cases import (
    NAMES,
    Case,
    errors,
    errors_of_plan,
    errors_of_several,
    relative,
    shared_bytes,
    supported,
    target,
)
from tests.core.ranks import imported

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES: dict[str, Case] = {
    "causal": Case(heads=1, key_heads=1, s=40, t=40),
    "full": Case(heads=1, key_heads=1, causal=False, s=35, t=45),
    "one query": Case(heads=1, key_heads=1, s=1, t=33),
    "more queries than keys": Case(heads=1, key_heads=1, s=40, t=20),
    "grouped": Case(heads=4, key_heads=2, s=20, t=20),
    "window": Case(heads=1, key_heads=1, s=40, t=70, window=9),
    "window, not causal": Case(heads=1, key_heads=1, s=35, t=40, window=5, causal=False),
    "capped": Case(heads=1, key_heads=1, softcap=1.5),
    "padded": Case(b=2, heads=1, key_heads=1, s=35, t=40, spans=((0, 13), (17, 40))),
    "rows without a key": Case(b=2, heads=1, key_heads=1, spans=((20, 20), (7, 12))),
    "head dimension 5, values 40": Case(heads=1, key_heads=1, d=5, e=40),
    "head dimension 80, values 72": Case(heads=1, key_heads=1, d=80, e=72),
    "head dimension 256": Case(heads=1, key_heads=1, d=256, e=256, s=17, t=17),
    "keys with a bias": Case(heads=1, key_heads=1, common=2.0, s=40, t=40),
    "everything": Case(
        b=2, heads=2, key_heads=1, s=20, t=35, d=24, e=16, window=15, softcap=2.0,
        spans=((3, 35), (0, 29)),
    ),
}  # fmt: skip

#: Launches that the committed table would not choose in the interpreter.
PLANS: dict[str, tuple[Pass, ...]] = {
    "values, then keys": (
        Pass(Tile(16, 32, 4, 1), "dual", keys=False),
        Pass(Tile(32, 16, 4, 1), "dual", values=False),
    ),
    "primal, then tangent": (
        Pass(Tile(32, 32, 4, 1), "primal"),
        Pass(Tile(16, 16, 4, 1), "tangent"),
    ),
    "descriptors": (Pass(Tile(16, 32, 4, 1, descriptors=True), "dual"),),
}

#: Capability, shared memory of a program, type, products, width.
CARDS: dict[str, tuple[int, int, torch.dtype, InputPrecision, int]] = {
    "Hopper": (90, 232_448, torch.bfloat16, "ieee", 64),
    "Hopper, wide": (90, 232_448, torch.bfloat16, "ieee", 128),
    "Hopper, float32": (90, 232_448, torch.float32, "tf32", 64),
    "Ampere": (80, 166_912, torch.bfloat16, "ieee", 128),
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ProcessPoolExecutor]:
    """A process in which kernels are interpreted: that is decided when triton is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        pool.submit(int).result()  # starts the process
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield pool


def check(found: Mapping[str, float], bound: float) -> None:
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error < bound}
    assert not wrong


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_every_method_is_forward_over_reverse(name: str, interpreted: ProcessPoolExecutor) -> None:
    """The fused methods and the separate ones, which are therefore equal."""
    found = interpreted.submit(errors, CASES[name]).result()
    check(found, 3e-6)


@needs_triton
@pytest.mark.parametrize("name", ["grouped", "window", "head dimension 5, values 40", "everything"])
def test_probes_that_share_a_launch_get_what_each_gets_alone(
    name: str, interpreted: ProcessPoolExecutor
) -> None:
    check(interpreted.submit(errors_of_several, CASES[name]).result(), 3e-6)


@needs_triton
def test_a_group_split_among_programs_is_summed_for_each_probe(
    interpreted: ProcessPoolExecutor,
) -> None:
    case = Case(heads=2, key_heads=1)
    check(interpreted.submit(errors_of_several, case, processors=100).result(), 3e-6)


@needs_triton
@pytest.mark.parametrize("name", PLANS)
def test_results_do_not_depend_on_how_work_is_split(
    name: str, interpreted: ProcessPoolExecutor
) -> None:
    case = Case(s=20, t=35, key_heads=1, window=15, softcap=2.0, contiguous=True)
    check(interpreted.submit(errors_of_plan, case, PLANS[name]).result(), 3e-6)


@needs_triton
def test_a_group_split_among_programs_is_summed(interpreted: ProcessPoolExecutor) -> None:
    case = Case(heads=2, key_heads=1)
    plan = (Pass(Tile(32, 32, 4, 1), "dual"),)
    check(interpreted.submit(errors_of_plan, case, plan, processors=100).result(), 3e-6)
    check(interpreted.submit(errors_of_plan, case, plan, processors=1).result(), 3e-6)


@needs_triton
def test_what_is_not_supported_is_said(interpreted: ProcessPoolExecutor) -> None:
    answers = interpreted.submit(supported).result()
    assert answers == {
        "float64": "in float64 has no kernels",
        "mixed": "of queries, keys and values of different types has no kernels",
        "wide": "with a head dimension of 320 has no kernels: at most 256",
        "no scale": "with a scale or a cap that is not positive has no kernels",
        "no cap": "with a scale or a cap that is not positive has no kernels",
        "fine": None,
    }


@needs_triton
def test_without_the_interpreter_a_cpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = Qkv(*(torch.zeros(1, 1, 2, 16) for _ in range(3)))
    pattern = Pattern(scale=1.0, causal=True)
    assert Flash().supports(x, pattern, None) == "on cpu has no kernels"


@needs_triton
@pytest.mark.parametrize(
    "name", ["Hopper", *(pytest.param(name, marks=pytest.mark.slow) for name in [*CARDS][1:])]
)
def test_the_committed_launches_compile_for_cards_that_are_not_here_and_fit_their_memory(
    name: str,
) -> None:
    capability, most, dtype, precision, width = CARDS[name]
    case = Case(
        b=2, heads=4, key_heads=2, s=260, t=260, d=width, e=width,
        spans=((0, 260), (30, 200)), contiguous=True,
    )  # fmt: skip
    card = Card(hopper=capability == 90, processors=132)
    with ProcessPoolExecutor(1, imported(), target, (capability,)) as pool:
        assert pool.submit(shared_bytes, case, dtype, precision, card).result() <= most


def test_a_tile_that_does_not_fit_has_a_smaller_one_until_nothing_is_left() -> None:
    tile: Tile | None = Tile(128, 64, 8, 3, descriptors=True)
    sizes = []
    while tile is not None:
        sizes.append(tile.queries * tile.keys * tile.stages)
        tile = tile.smaller()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 16 * 16


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_every_plan_computes_everything_once(
    kernel: Kernel, width: int, hopper: bool, wide: bool
) -> None:
    card = Card(hopper=hopper, processors=100)
    wanted: dict[Mode, tuple[int, ...]] = {"primal": (0,), "tangent": (1, 2, 3), "dual": (0, 1)}
    for mode, sides in wanted.items():
        several = len(sides) == 3
        for plan in plans(kernel, mode, width, card, wide=wide, exact=wide, several=several):
            made = [
                (name, side)
                for one in plan
                for probes in one.launches(max(sides))
                for side in one.makes(probes)
                for name, computed in (("dk", one.keys), ("dv", one.values))
                if computed
            ]
            assert sorted(made) == [(name, side) for name in ("dk", "dv") for side in sides]


BOUNDS: list[tuple[torch.dtype, str, Callable[[Case], float]]] = [
    (torch.bfloat16, "ieee", lambda case: 2e-2),
    (torch.float16, "ieee", lambda case: 3e-3),
    (torch.float32, "ieee", lambda case: 1e-5),
    (torch.float32, "tf32", lambda case: 5e-3),
]


@needs_triton
@pytest.mark.gpu
@on_a_gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # from autograd's own thread
@pytest.mark.parametrize(("dtype", "precision", "bound"), BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_every_method_is_forward_over_reverse(
    name: str, dtype: torch.dtype, precision: str, bound: Callable[[Case], float]
) -> None:
    case = dataclasses.replace(CASES[name], s=5 * CASES[name].s + 3, t=5 * CASES[name].t + 3)
    if case.spans is not None:
        case = dataclasses.replace(case, spans=tuple((5 * i, 5 * j) for i, j in case.spans))
    check(errors(case, dtype, "cuda", precision), bound(case))  # type: ignore[arg-type]
    several = errors_of_several(case, dtype, "cuda", precision)  # type: ignore[arg-type]
    check(several, bound(case))


@needs_triton
@pytest.mark.gpu
@on_a_gpu
def test_two_runs_agree_in_every_bit() -> None:
    from tests.core.flash_cases import found_values

    case = Case(b=2, heads=8, key_heads=2, s=300, t=300, d=64, e=64)
    operands = case.draw(torch.bfloat16, "cuda")
    ours = Flash(first_order=False)
    first, second = (found_values(ours, case, *operands)[0] for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@needs_triton
@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(b=2, heads=4, key_heads=2, s=300, t=300, d=128, e=128),
        Case(b=2, heads=4, key_heads=2, s=300, t=300, d=64, e=64),
        Case(heads=4, key_heads=1, s=200, t=333, d=80, e=128, causal=False),
        Case(heads=2, key_heads=2, s=64, t=64, d=128, e=128, contiguous=True),
    ],
)
def test_first_derivatives_of_cudnn_are_ours(case: Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuDNN's are used on Hopper")
    x, _, o_bar, _ = case.draw(dtype, "cuda")
    cudnn, ours = FirstOrder(), Flash(first_order=False)
    y = cudnn.forward(x, case.pattern, None)
    true = ours.forward(x, case.pattern, None)
    assert y is not None
    at = Point(x, true, o_bar)
    found = cudnn.backward(at, case.pattern, None)
    assert found is not None
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert relative(y.o, true.o.double()) < bound
    assert relative(y.lse, true.lse.double()) < 1e-4
    for one, other in zip(found, ours.backward(at, case.pattern, None), strict=True):
        assert relative(one, other.double()) < bound
