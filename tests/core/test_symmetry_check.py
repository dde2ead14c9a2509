"""The first products of a run are compared: u·Av = v·Au, or nothing is answered."""

from __future__ import annotations

import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.linop.symmetry import SymmetryCheck
from hvp_core.settings import ComputeSettings
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor

from tests.core.dense import DenseSpace
from tests.core.problems import CPU, llama_problem


def symmetric(n: int, dtype: torch.dtype) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (A + A.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_symmetric_to_rounding_passes_and_what_is_not_is_named(dtype: torch.dtype) -> None:
    n = 200
    A, space = symmetric(n, dtype), DenseSpace(n, dtype)
    v = space.random(3, "sphere")
    check = SymmetryCheck(space, 0.0)
    check.see(v, A @ v)
    check.see(A @ v, A @ (A @ v))
    wrong = A.clone()
    wrong[:, : n // 2] *= 1.01
    for _ in range(4):
        check.see(v, A @ v)
    check.see(v, wrong @ v)  # no more is looked at
    broken = SymmetryCheck(space, 0.0)
    broken.see(v, wrong @ v)
    with pytest.raises(CurvatureError, match="rounding explains") as caught:
        broken.see(wrong @ v, wrong @ (wrong @ v))
    assert caught.value.reason == "SYMMETRY_BROKEN"
    assert float(caught.value.metadata["defect"]) > float(caught.value.metadata["allowed"])


def test_products_are_allowed_the_noise_of_their_precision() -> None:
    n, dtype = 200, torch.float32
    A, space = symmetric(n, dtype), DenseSpace(n, dtype)
    rounded = A.bfloat16()
    v = space.random(3, "sphere")

    def product(x: Tensor) -> Tensor:
        return (rounded @ x.bfloat16()).float()

    check = SymmetryCheck(space, 2**-8)
    check.see(v, product(v))
    check.see(product(v), product(product(v)))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_right_model_in_16_bits_raises_no_alarm(kind: str, scale: float) -> None:
    problem = llama_problem(torch.float32)
    layout = Layout(problem.chain.shapes, [each.parameters for each in problem.chain.blocks], 1)
    space = ParameterSpace(layout, Alone(), torch.float32, CPU)
    curvature = Curvature(
        problem.chain,
        space,
        space.from_flat(scale * problem.flat),
        problem.batch,
        2,
        ComputeSettings(precision="bfloat16"),
    )
    check, v = SymmetryCheck(space, 2**-8), space.random(1, "sphere")
    for _ in range(6):
        (product,) = curvature.product(kind, [v])
        check.see(v, product)
        v = product / product.norm()


def test_zero_products_are_symmetric() -> None:
    space = DenseSpace(3, torch.float64)
    check = SymmetryCheck(space, 0.0)
    for seed in (1, 2):
        check.see(space.random(seed, "gaussian"), space.zeros())
