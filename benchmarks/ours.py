"""This project's products, and the float64 ones that all are held against."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface.checkpoint import build_from_config
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.settings import ComputeSettings, Schedule
from hvp_core.settings import Precision as Arithmetic
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor

from benchmarks.contest import Contestant, Entry
from benchmarks.counts import Product
from benchmarks.meter import graph_pools
from benchmarks.peers import installed_version
from benchmarks.problem import Problem
from benchmarks.shapes import Precision

_ARITHMETIC: dict[Precision, Arithmetic] = {"fp32": "full", "tf32": "tf32", "bf16": "bfloat16"}
#: Exact products of larger models are kept as float32, which is rounding of 6e-8.
_KEPT_IN_FLOAT64 = 1 << 28


@final
@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of our ways: a product and the policy it is computed by."""

    product: Product
    schedule: Schedule = "lean"
    graphs: bool = False
    probes: int = 1

    @property
    def key(self) -> str:
        """Such as hvp-fast-graph."""
        schedule = "ours" if self.product == "gradient" else self.schedule
        several = f"-{self.probes}" if self.probes > 1 else ""
        return f"{self.product}-{schedule}{several}{'-graph' if self.graphs else ''}"

    @property
    def name(self) -> str:
        """For the table."""
        if self.product == "gradient":
            return "ours: gradient"
        several = f" of {self.probes}" if self.probes > 1 else ""
        what = "Hv" if self.product == "hvp" else "Gv"
        return f"ours: {what}{several}, {self.schedule}{', CUDA graph' if self.graphs else ''}"

    def contestant(self) -> Contestant:
        """Ready to be opened."""
        return Contestant(
            key=self.key,
            name=self.name,
            product=self.product,
            open=partial(_open, self),
            library="hvp",
            version=installed_version("hvp"),
            probes=self.probes,
            cached=self.schedule == "cached",
        )


def variants(device: torch.device) -> list[Contestant]:
    """Ours on a kind of device: as CUDA graphs where there are any."""
    graphs = device.type == "cuda"
    chosen = [Variant(product="gradient")]
    if graphs:
        chosen += [Variant(product="hvp", schedule="lean"), Variant(product="hvp", schedule="fast")]
    schedules: tuple[Schedule, ...] = ("lean", "fast", "cached")
    chosen += [Variant(product="hvp", schedule=each, graphs=graphs) for each in schedules]
    chosen += [
        Variant(product="hvp", schedule=each, graphs=graphs, probes=4) for each in schedules[1:]
    ]
    chosen += [Variant(product="ggn", schedule=each, graphs=graphs) for each in schedules[1:]]
    return [variant.contestant() for variant in chosen]


def _open(variant: Variant, problem: Problem) -> Entry:
    curvature = _curvature(
        problem,
        torch.float32,
        settings=ComputeSettings(
            schedule=variant.schedule,
            compile=problem.compiled,
            graphs=variant.graphs,
            precision=_ARITHMETIC[problem.precision],
            strict=True,
        ),
    )

    own_weights = curvature.parameters.nbytes
    if variant.product == "gradient":
        return Entry(
            run=curvature.gradient,
            product=lambda _: curvature.gradient(),
            own_weights=own_weights,
            notes=curvature.notes,
        )
    kind: str = "hessian" if variant.product == "hvp" else "ggn"
    # As for the other contestants, vectors are of the model's type, and where they are multiplied.
    multiply = partial(curvature.product, kind, borrow=True)
    vectors = curvature.probes(variant.probes)
    for index, vector in enumerate(vectors):
        vector.copy_(problem.probe(index, vector.dtype))
    if variant.graphs:
        pools = graph_pools()
        multiply(vectors)
        multiply(vectors)
        if graph_pools() == pools:
            raise RuntimeError("a CUDA graph was asked for and none was captured")

    def product(index: int) -> Tensor:
        vectors[0].copy_(problem.probe(index, vectors[0].dtype))
        found = multiply(vectors)[0].clone()
        vectors[0].copy_(problem.probe(0, vectors[0].dtype))
        return found

    return Entry(
        run=lambda: multiply(vectors),
        product=product,
        own_weights=own_weights,
        notes=curvature.notes,
    )


def _curvature(
    problem: Problem,
    dtype: torch.dtype,
    *,
    settings: ComputeSettings,
    micro_batch_size: int | None = None,
) -> Curvature:
    """The product engine of one rank, as a worker builds it, on the problem's own weights.

    Alone, a rank's shard is the flat vector itself.
    """
    key = f"chain in {dtype}"
    if key not in problem.memo:
        with problem.save_config() as folder:
            model = build_from_config(Path(folder), dtype)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(problem.device)
        chain = LayeredChain(model, dtype, problem.device)
        layout = Layout(chain.shapes, [block.parameters for block in chain.blocks], 1)
        space = ParameterSpace(layout, Alone(), dtype, problem.device)
        # A bfloat16 checkpoint is held as it is stored.
        stored = torch.bfloat16 if settings.precision == "bfloat16" else dtype
        problem.memo[key] = chain, space, problem.theta(stored)
    chain, space, theta = problem.memo[key]
    rows = micro_batch_size or problem.shape.rows
    return Curvature(chain, space, theta, token_batch(problem.ids.cpu()), rows, settings=settings)


# What is exact -----------------------------------------------------------------------------------


def references(
    problem: Problem, products: Collection[Product], say: Callable[[str], None]
) -> tuple[dict[Product, Tensor], str]:
    """Exact products with probe 0, on the CPU, and a sentence that says what they are.

    float64 where it fits, else float32; eager, block by block, one sequence at a time. None fit:
    nothing, and the sentence says so.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    reasons = []
    try:
        for dtype in (torch.float64, torch.float32):
            try:
                say(f"  reference in {dtype} ...")
                return _exact(problem, products, dtype), (
                    f"our own eager product in {str(dtype).removeprefix('torch.')} "
                    "on the same weights and tokens"
                )
            except Exception as error:  # mostly memory; other reasons are said as well
                reasons.append(f"{dtype}: {str(error).strip().splitlines()[0][:120]}")
                error.__traceback__ = None
            finally:
                problem.memo.clear()
    finally:
        torch.set_float32_matmul_precision(precision)
    return {}, f"none ({'; '.join(reasons)})"


def _exact(
    problem: Problem, products: Collection[Product], dtype: torch.dtype
) -> dict[Product, Tensor]:
    settings = ComputeSettings(schedule="lean", strict=True)
    curvature = _curvature(problem, dtype, micro_batch_size=1, settings=settings)
    v = problem.probe(0, dtype)
    ways: dict[Product, Callable[[], Tensor]] = {
        "gradient": curvature.gradient,
        "hvp": lambda: curvature.hvp([v])[0],
        "ggn": lambda: curvature.ggn([v])[0],
    }
    wide = dtype == torch.float64 and problem.numel <= _KEPT_IN_FLOAT64
    kept = torch.float64 if wide else torch.float32
    return {product: ways[product]().to(dtype=kept, device="cpu") for product in products}
