"""What torch does by itself: gradients, and a product by differentiating the gradient again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import Contestant, Entry, SkippedError
from benchmarks.meter import captured
from benchmarks.problem import Problem, flattened


def gradients() -> list[Contestant]:
    """The same gradient, as torch runs it, compiled, and compiled and replayed as one graph."""
    return [
        Contestant(key="gradient-eager", name="gradient, eager", product="gradient", open=_eager),
        Contestant(
            key="gradient-compiled", name="gradient, compiled", product="gradient", open=_compiled
        ),
        Contestant(
            key="gradient-graph",
            name="gradient, compiled, CUDA graph",
            product="gradient",
            open=_graph,
        ),
    ]


def reverse_over_reverse() -> Contestant:
    """autograd.grad of autograd.grad of the whole model."""
    return Contestant(
        key="reverse-over-reverse",
        name="reverse over reverse: Hv",
        product="hvp",
        open=_reverse_over_reverse,
    )


#: In the order of their speed on the GPUs of today. [meas] H100, Llama 1.1B, 1 × 2048, with causal
#: attention that makes no mask: 27.8 ms; with torch's own choice and a mask, 34.5.
_ATTENTIONS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _gradient(problem: Problem, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    def gradient() -> Any:
        if problem.device.type == "cpu":
            return torch.autograd.grad(loss(), problem.parameters)
        with sdpa_kernel(_ATTENTIONS, set_priority=True):
            return torch.autograd.grad(loss(), problem.parameters)

    return gradient


def _entry(run: Callable[[], Any]) -> Entry:
    return Entry(run=run, product=lambda _: flattened(run()))


def _eager(problem: Problem) -> Entry:
    return _entry(_gradient(problem, problem.loss))


def _compiled_gradient(problem: Problem) -> Callable[[], Any]:
    if not problem.compiled:
        raise SkippedError("nothing is compiled in this run")
    return _gradient(problem, torch.compile(problem.loss, dynamic=False))


def _compiled(problem: Problem) -> Entry:
    return _entry(_compiled_gradient(problem))


def _graph(problem: Problem) -> Entry:
    if problem.device.type != "cuda":
        raise SkippedError("CUDA graphs need a CUDA device")
    if not problem.shape.graphs:
        raise SkippedError("its activations would stay in memory beside this model")
    return _entry(captured(_compiled_gradient(problem)))


def _reverse_over_reverse(problem: Problem) -> Entry:
    def product(tangents: list[Tensor]) -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            gradient = torch.autograd.grad(problem.loss(), problem.parameters, create_graph=True)
            return torch.autograd.grad(gradient, problem.parameters, tangents)

    tangents = problem.parts(problem.probe(0))
    return Entry(
        run=lambda: product(tangents),
        product=lambda index: flattened(product(problem.parts(problem.probe(index)))),
    )
