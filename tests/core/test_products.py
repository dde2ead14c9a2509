"""Products against closed forms and dense Hessians in float64."""

from collections.abc import Callable

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, Logistic, SquaredError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from tests.core.problems import Problem, gpt2_problem, llama_problem, module_problem
from tests.core.references import relative_error

EXACT = 1e-9


def dense(problem: Problem, micro_batch_size: int = 2) -> Tensor:
    """H by one product with each unit vector."""
    curvature = problem.curvature(micro_batch_size)
    return torch.stack(curvature.hvp(list(torch.eye(problem.flat.numel(), dtype=torch.float64))))


def data(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_linear_regression_has_the_covariance_as_its_hessian() -> None:
    x, t = data(7, 4), data(7, 1)
    problem = module_problem(nn.Linear(4, 1, bias=False).double(), SquaredError(), x, t)
    assert relative_error(dense(problem), x.T @ x / 7) < EXACT
    w = problem.flat
    curvature = problem.curvature(3)
    assert relative_error(curvature.gradient(), x.T @ (x @ w - t[:, 0]) / 7) < EXACT
    assert curvature.loss() == pytest.approx(
        float((x @ w - t[:, 0]).square().sum() / 14), rel=EXACT
    )


def test_logistic_regression_weights_the_covariance_by_the_variance_of_the_label() -> None:
    x = data(9, 3)
    t = (data(9, 1) > 0).double()
    problem = module_problem(nn.Linear(3, 1, bias=False).double(), Logistic(), x, t)
    p = (x @ problem.flat).sigmoid()
    assert relative_error(dense(problem, 4), x.T @ torch.diag(p * (1 - p)) @ x / 9) < EXACT


def test_softmax_regression_has_its_closed_form_with_ignored_labels_left_out() -> None:
    x = data(6, 3)
    t = torch.tensor([0, 1, -100, 3, 2, -100])
    problem = module_problem(nn.Linear(3, 4, bias=False).double(), CrossEntropy(), x, t)
    p = (x @ problem.flat.view(4, 3).T).softmax(-1)
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for row in (0, 1, 3, 4):
        output = torch.diag(p[row]) - torch.outer(p[row], p[row])
        expected += torch.kron(output, torch.outer(x[row], x[row])) / 4
    assert relative_error(dense(problem, 4), expected) < EXACT


PLAIN: dict[str, Callable[[], nn.Sequential]] = {
    "blocks without parameters that differ only in what they do": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2)
    ),
    "a first block without parameters": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
    ),
    "a sum of products of different shapes": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), TwoWays(), nn.Tanh(), nn.Linear(3, 2)
    ),
}


class TwoWays(nn.Module):
    """Two products of one input, seen as matrices of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.halves = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.whole(x) + self.halves(x.view(-1, 2, 2)).mean(1)
        return found


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_have_torchs_own_gradient_hessian_and_gauss_newton_matrix(name: str) -> None:
    torch.manual_seed(0)
    module = PLAIN[name]().double()
    x, t = data(5, 4), data(5, 2)
    problem = module_problem(module, SquaredError(), x, t)
    shapes = {key: each.shape for key, each in module.named_parameters()}

    def outputs(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        values = {
            key: piece.view(shape)
            for (key, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        found: Tensor = functional_call(module, values, (x,))
        return found

    def loss(flat: Tensor) -> Tensor:
        return (outputs(flat) - t).square().sum() / 2 / 5

    curvature = problem.curvature(2)
    units = list(torch.eye(problem.flat.numel(), dtype=torch.float64))
    assert relative_error(curvature.gradient(), torch.func.grad(loss)(problem.flat)) < EXACT
    assert relative_error(dense(problem), torch.func.hessian(loss)(problem.flat)) < EXACT
    jacobian = torch.func.jacrev(outputs)(problem.flat).flatten(0, 1)
    found = torch.stack(curvature.ggn(units))
    assert relative_error(found, jacobian.T @ jacobian / 5) < EXACT
    assert not [note for note in curvature.notes() if note.startswith("fallback")]


DECODERS = {"llama": llama_problem, "gpt2": gpt2_problem}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_dense_hessian_of_the_same_model_written_by_hand(name: str) -> None:
    problem = DECODERS[name]()
    assert problem.loss is not None
    curvature = problem.curvature(2)
    assert len(problem.chain.blocks) == 4
    assert curvature.loss() == pytest.approx(float(problem.loss(problem.flat)), rel=1e-12)
    gradient = torch.func.grad(problem.loss)(problem.flat)
    assert relative_error(curvature.gradient(), gradient) < EXACT
    generator = torch.Generator().manual_seed(5)
    probes = torch.randn(40, problem.flat.numel(), generator=generator, dtype=torch.float64)
    dense_hessian = torch.func.hessian(problem.loss)(problem.flat)
    products = torch.stack(curvature.hvp(list(probes)))
    assert relative_error(products, probes @ dense_hessian) < EXACT
    one_by_one = torch.stack([curvature.hvp([probe])[0] for probe in probes[:3]])
    assert relative_error(one_by_one, products[:3]) < 1e-14


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 64])
def test_every_micro_batch_split_gives_the_same_numbers(name: str, micro_batch_size: int) -> None:
    problem = DECODERS[name]()
    whole, cut = problem.curvature(5), problem.curvature(micro_batch_size)
    probe = torch.cos(torch.arange(problem.flat.numel(), dtype=torch.float64))
    assert cut.loss() == pytest.approx(whole.loss(), rel=1e-13)
    assert relative_error(cut.gradient(), whole.gradient()) < 1e-11
    assert relative_error(cut.hvp([probe])[0], whole.hvp([probe])[0]) < 1e-11


def test_the_head_in_pieces_gives_the_same_numbers() -> None:
    problem = llama_problem()
    probe = torch.cos(torch.arange(problem.flat.numel(), dtype=torch.float64))
    whole = problem.curvature(2).hvp([probe])[0]
    pieces = llama_problem(positions_at_once=4).curvature(2)
    assert relative_error(pieces.hvp([probe])[0], whole) < 1e-12


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_the_product_is_linear_and_symmetric(seed: int, a: float, b: float) -> None:
    problem = gpt2_problem()
    curvature = problem.curvature(3)
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, problem.flat.numel(), generator=generator, dtype=torch.float64)
    hu, hv, h = curvature.hvp([u, v, a * u + b * v])
    assert float(u @ hv) == pytest.approx(float(v @ hu), rel=1e-10, abs=1e-10)
    assert float((h - a * hu - b * hv).norm()) <= 1e-11 * float(hu.norm() + hv.norm())


def test_float32_agrees_with_float64_to_its_rounding() -> None:
    single, double = llama_problem(torch.float32), llama_problem()
    probe = torch.cos(torch.arange(double.flat.numel(), dtype=torch.float64))
    found = single.curvature(2).hvp([probe.float()])[0].double()
    assert relative_error(found, double.curvature(2).hvp([probe])[0]) < 1e-4


def test_the_zero_vector_gives_the_zero_product() -> None:
    problem = llama_problem()
    assert float(problem.curvature(2).hvp([torch.zeros_like(problem.flat)])[0].abs().max()) == 0


class FusedNorm(nn.Module):
    """Calls the kernel below torch.nn.functional, where nothing can replace it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.native_layer_norm(x, [x.shape[-1]], self.scale, None, 1e-5)[
            0
        ]
        return result


class Softmax(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * self.scale, -1) * 3


@pytest.mark.parametrize("first_probe", ["zero", "unit", "random"])
@pytest.mark.parametrize("layer", [FusedNorm, Softmax])
def test_a_block_whose_forward_rule_torch_cannot_differentiate_again_is_right(
    layer: type[nn.Module], first_probe: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), layer(4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, t = data(5, 3), torch.tensor([0, 1, 2, 1, 0])
    problem = module_problem(module, CrossEntropy(), x, t)
    curvature = problem.curvature(2)
    n = problem.flat.numel()
    unit = torch.zeros(n, dtype=torch.float64)
    unit[-1] = 1
    # Routes are found at the first product, whatever that product would show of them.
    curvature.hvp([{"zero": 0 * unit, "unit": unit, "random": data(n, 1)[:, 0]}[first_probe]])
    found = torch.stack(curvature.hvp(list(torch.eye(n, dtype=torch.float64))))
    names = list(problem.parameters)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in problem.parameters.values()])
        own = {
            name: part.view(problem.parameters[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
        return nn.functional.cross_entropy(torch.func.functional_call(module, own, (x,)), t)

    # Reverse over reverse: a third derivation, by rules that torch tests.
    rows = torch.autograd.functional.hessian(loss, problem.flat)
    assert relative_error(found, rows) < EXACT
    assert not any(name.startswith("fallback") for name in curvature.notes())


def test_a_shared_tensor_counts_once_and_collects_from_both_uses() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    module[2].weight = module[0].weight
    module = module.double()
    x, t = data(4, 3), torch.tensor([0, 2, 1, 1])
    problem = module_problem(module, CrossEntropy(), x, t)
    assert problem.flat.numel() == 9

    def loss(flat: Tensor) -> Tensor:
        w = flat.view(3, 3)
        return nn.functional.cross_entropy(torch.tanh(x @ w.T) @ w.T, t)

    expected = torch.autograd.functional.hessian(loss, problem.flat)
    assert relative_error(dense(problem), expected) < EXACT


def test_any_module_of_one_tensor_is_one_block() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.a * x)

    x, t = data(5, 1), data(5, 1)
    problem = module_problem(Odd(), SquaredError(), x, t)
    a = problem.flat[0]
    expected = (
        (x * torch.cos(a * x)) ** 2 - x**2 * torch.sin(a * x) * (torch.sin(a * x) - t)
    ).sum() / 5
    assert float(dense(problem)[0, 0]) == pytest.approx(float(expected), rel=EXACT)


def test_batch_norm_in_train_mode_is_refused() -> None:
    from hvp_core.model.chain import ModuleChain

    with pytest.raises(CurvatureError, match="normalises over the batch"):
        ModuleChain(nn.Sequential(nn.BatchNorm1d(3)).train(), SquaredError())


def test_a_loss_that_is_not_finite_names_the_first_block_at_fault() -> None:
    problem = llama_problem()
    problem.parameters["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    with pytest.raises(CurvatureError) as caught:
        problem.curvature(2).loss()
    assert (caught.value.reason, caught.value.metadata["block"]) == ("NON_FINITE", "model.layers.1")
    with pytest.raises(CurvatureError, match=r"model\.layers\.1"):
        problem.curvature(2).hvp([problem.flat])


def test_an_operation_without_second_derivative_names_its_block() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    class Wall(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = OneWay.apply(x)
            return result

    module = nn.Sequential(nn.Linear(3, 3), Wall(), nn.Linear(3, 2)).double()
    problem = module_problem(module, CrossEntropy(), data(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(CurvatureError) as caught:
        problem.curvature(2).hvp([problem.flat])
    assert caught.value.reason == "DOUBLE_BACKWARD_UNSUPPORTED"
    assert caught.value.metadata["block"] == "1"


def test_the_pad_tokens_row_counts_like_any_other() -> None:
    problem = llama_problem(pad_token_id=2)
    problem.batch.inputs["input_ids"][:, ::2] = 2
    curvature = problem.curvature(2)
    n = problem.flat.numel()
    u, v = data(n, 2).T.contiguous()
    hu, hv = curvature.hvp([u, v])
    assert float(u @ hv) == pytest.approx(float(v @ hu), rel=1e-10)
    # The loss itself, moved: automatic differentiation has the fault that is looked for.
    v, step = v / v.norm(), 1e-4
    losses = []
    for sign in (1, -1):
        moved = problem.curvature(2)
        moved.parameters = problem.flat + sign * step * v
        losses.append(moved.loss())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(curvature.gradient() @ v) == pytest.approx(slope, rel=1e-7)
