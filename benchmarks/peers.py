"""Libraries that compute the same products, each in its own way of being used.

`make bench` and `make oracle` install them from benchmarks/peers.txt. Attention runs by the
formula, as fused kernels have neither a forward derivative nor a second one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import Contestant, Entry, NotInstalledError, SkippedError
from benchmarks.problem import Problem

CURVLINOPS = "curvlinops-for-pytorch"
EIGENTHINGS = "hessian-eigenthings"


def peers() -> list[Contestant]:
    """Their Hessian and Gauss-Newton products, and a compiled one where that is possible."""
    table: list[tuple[str, str, str, str, Callable[[Problem], Entry]]] = [
        ("curvlinops-hvp", "curvlinops: Hv", "hvp", CURVLINOPS, _curvlinops_hvp),
        (
            "curvlinops-hvp-compiled",
            "curvlinops: Hv, compiled",
            "hvp",
            CURVLINOPS,
            _curvlinops_hvp_compiled,
        ),
        ("curvlinops-ggn", "curvlinops: Gv", "ggn", CURVLINOPS, _curvlinops_ggn),
        ("eigenthings-hvp", "hessian-eigenthings: Hv", "hvp", EIGENTHINGS, _eigenthings_hvp),
        ("eigenthings-ggn", "hessian-eigenthings: Gv", "ggn", EIGENTHINGS, _eigenthings_ggn),
    ]
    return [
        Contestant(
            key=key,
            name=name,
            product="hvp" if product == "hvp" else "ggn",
            open=build,
            library=library,
            version=installed_version(library),
        )
        for key, name, product, library, build in table
    ]


def installed_version(distribution: str) -> str:
    """Of a distribution, or "" where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def load(module: str, distribution: str) -> Any:
    """Import an optional library.

    Raises:
        NotInstalledError: It, or something it needs, is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalledError(f"{distribution} ({error})") from error


def _entry(problem: Problem, product: Callable[[Tensor], Any]) -> Entry:
    def plain(flat: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return product(flat)

    v = problem.probe(0)
    return Entry(run=lambda: plain(v), product=lambda index: plain(problem.probe(index)).detach())


class _Logits(nn.Module):
    """Ids to logits of all positions but the last, one row per target."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.model = problem.model
        self._problem = [problem]

    def forward(self, ids: Tensor) -> Tensor:
        return self._problem[0].logits(self.model)


def _curvlinops(problem: Problem, name: str, compiled: bool = False) -> Entry:
    operator = getattr(load("curvlinops", CURVLINOPS), name)(
        _Logits(problem),
        nn.CrossEntropyLoss(),
        problem.parameters,
        [(problem.ids, problem.targets)],
        check_deterministic=False,
    )
    if compiled and not problem.compiled:
        raise SkippedError("nothing is compiled in this run")
    if compiled:  # what it multiplies a batch with is a cached property; their docs compile that
        operator.__dict__["_mp"] = torch.compile(operator._mp, dynamic=False)
    return _entry(problem, lambda flat: operator @ flat)


def _curvlinops_hvp(problem: Problem) -> Entry:
    return _curvlinops(problem, "HessianLinearOperator")


def _curvlinops_hvp_compiled(problem: Problem) -> Entry:
    return _curvlinops(problem, "HessianLinearOperator", compiled=True)


def _curvlinops_ggn(problem: Problem) -> Entry:
    return _curvlinops(problem, "GGNLinearOperator")


def _eigenthings_hvp(problem: Problem) -> Entry:
    module = load("hessian_eigenthings.operators.hessian", EIGENTHINGS)
    operator = module.HessianOperator(
        problem.model, [problem.ids], lambda model, batch: problem.loss()
    )
    return _entry(problem, operator.matvec)


def _eigenthings_ggn(problem: Problem) -> Entry:
    module = load("hessian_eigenthings.operators.ggn", EIGENTHINGS)
    operator = module.GGNOperator(
        problem.model,
        [problem.ids],
        lambda model, batch: problem.logits(model),
        lambda logits, batch: torch.nn.functional.cross_entropy(logits, problem.targets),
    )
    return _entry(problem, operator.matvec)
