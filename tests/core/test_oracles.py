"""Products against other libraries': curvlinops, hessian-eigenthings, and matfree on JAX."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.losses.loss import CrossEntropy
from hvp_core.model.data import token_batch
from hvp_core.runs.algorithm import Budget, drive
from hvp_operations.eigsh import EigshSpec
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tests.core import references
from tests.core.dense import DenseOperator
from tests.core.problems import (
    VOCABULARY,
    Problem,
    gpt2_problem,
    llama_problem,
    module_problem,
    scatter,
)
from tests.core.references import relative_error
from tests.core.test_model_families import curvature as of_folder
from tests.core.test_model_families import sentences
from tests.modules.checkpoints import classifier

pytestmark = pytest.mark.oracle


class Case(NamedTuple):
    """One loss twice: as we take it, and as a module of logits, one row a target."""

    ours: Curvature
    module: nn.Module
    x: Tensor
    targets: Tensor


class Classifier(nn.Module):
    """The logits of a Hugging Face model, a row a sequence."""

    def __init__(self, model: Any, mask: Tensor):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=self.mask).logits
        return logits


def plain(module: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Case:
    scatter(module)
    targets = torch.tensor([2, 0, 1, 1, 2])
    problem = module_problem(module.to(dtype), CrossEntropy(), x.to(dtype), targets)
    return Case(problem.curvature(2), module, x.to(dtype), targets)


def mlp(dtype: torch.dtype, _: Path) -> Case:
    module = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)
    )
    return plain(module, torch.linspace(-1, 1, 20).view(5, 4), dtype)


def cnn(dtype: torch.dtype, _: Path) -> Case:
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    return plain(module, torch.sin(torch.arange(180.0)).view(5, 1, 6, 6), dtype)


class Written(nn.Module):
    """The rows of the logits, that have a target, of a decoder written out by hand.

    Transformers' own takes its norms in float32, whatever the dtype.
    """

    def __init__(self, problem: Problem, logits: Callable[..., Tensor], config: object):
        super().__init__()
        self.names = list(problem.parameters)
        self.values = nn.ParameterList(problem.parameters.values())
        self.logits, self.config = logits, config

    def forward(self, ids: Tensor) -> Tensor:
        p = dict(zip(self.names, self.values, strict=True))
        return self.logits(p, ids, None, self.config)[:, :-1].flatten(0, 1)


def decoder(problem: Problem, logits: Callable[..., Tensor]) -> Case:
    ids = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = token_batch(ids, ids, torch.ones_like(ids))
    ours = Problem(problem.chain, problem.parameters, batch).curvature(2)
    config = problem.chain._parts.model.config  # type: ignore[attr-defined]
    return Case(ours, Written(problem, logits, config), ids, ids[:, 1:].flatten())


def bert(dtype: torch.dtype, folder: Path) -> Case:
    classifier(folder, "bert", num_labels=3)
    batch = sentences("classes")
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    module = Classifier(model.to(dtype).eval(), batch["attention_mask"])
    ours = of_folder(folder, batch, dtype="float64" if dtype == torch.float64 else "float32")
    return Case(ours, module, batch["input_ids"], batch["labels"])


CASES: dict[str, Callable[[torch.dtype, Path], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "gpt2": lambda dtype, _: decoder(gpt2_problem(dtype), references.gpt2),
    "llama": lambda dtype, _: decoder(llama_problem(dtype), references.llama),
    "bert": bert,
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def probes(case: Case) -> list[Tensor]:
    parameters = dict(case.module.named_parameters())
    n = sum(each.numel() for each in parameters.values())
    dtype = next(iter(parameters.values())).dtype
    return [torch.cos(torch.arange(n) * frequency).to(dtype) for frequency in (1.0, 0.3)]


def asymmetry(vectors: list[Tensor], products: list[Tensor]) -> float:
    (u, v), (of_u, of_v) = vectors, products
    return abs(float(u @ of_v - v @ of_u)) / float(u.norm() * of_v.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_curvlinops_gives_the_same_products(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its products need a forward derivative of silu's gradient, which torch does not have.
    monkeypatch.setattr(references, "silu", lambda x: x * torch.sigmoid(x))
    case = CASES[name](dtype, tmp_path)
    library = importlib.import_module("curvlinops")
    products = {
        "hessian": library.HessianLinearOperator,
        "ggn": library.GGNLinearOperator,
        "empirical_fisher_token": library.EFLinearOperator,
    }
    vectors = probes(case)
    for kind, operator in products.items():
        theirs = operator(
            case.module,
            nn.CrossEntropyLoss(),
            list(case.module.parameters()),
            [(case.x, case.targets)],
            check_deterministic=False,
        )
        found = case.ours.product(kind, vectors)
        expected = [(theirs @ v).detach() for v in vectors]
        if (name, kind) == ("bert", "hessian"):
            # Torch 2.13 is wrong where this Hessian is taken under vmap, as there: u·Hv ≠ v·Hu.
            assert asymmetry(vectors, expected) > 1e-5
            assert asymmetry(vectors, found) < TOLERANCE[dtype]
            continue
        for ours, product in zip(found, expected, strict=True):
            assert relative_error(ours, product) < TOLERANCE[dtype], kind


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_hessian_eigenthings_gives_the_same_products(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = CASES[name](dtype, tmp_path)
    hessian = importlib.import_module("hessian_eigenthings.operators.hessian")
    ggn = importlib.import_module("hessian_eigenthings.operators.ggn")

    def of_outputs(outputs: Tensor, _: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, case.targets)

    operators = {
        "hessian": hessian.HessianOperator(
            case.module, [case.x], lambda model, x: of_outputs(model(x), x)
        ),
        "ggn": ggn.GGNOperator(case.module, [case.x], lambda model, x: model(x), of_outputs),
    }
    vectors = probes(case)
    for kind, operator in operators.items():
        found = case.ours.product(kind, vectors)
        for v, ours in zip(vectors, found, strict=True):
            assert relative_error(ours, operator.matvec(v).detach()) < TOLERANCE[dtype], kind


def test_jax_and_matfree_give_the_same_products_and_spectrum(tmp_path: Path) -> None:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jnp = importlib.import_module("jax.numpy")
    decomp = importlib.import_module("matfree.decomp")
    case = mlp(torch.float64, tmp_path)
    shapes = [tuple(each.shape) for each in case.module.parameters()]
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    x, targets = jnp.asarray(case.x.numpy()), jnp.asarray(case.targets.numpy())

    def loss(theta: Any) -> Any:
        parts = [
            each.reshape(shape) for each, shape in zip(jnp.split(theta, sizes), shapes, strict=True)
        ]
        (w1, b1, w2, b2, w3, b3) = parts
        hidden = jax.nn.softplus(jnp.tanh(x @ w1.T + b1) @ w2.T + b2)
        logs = jax.nn.log_softmax(hidden @ w3.T + b3)
        return -logs[jnp.arange(len(targets)), targets].mean()

    theta = jnp.asarray(
        torch.cat([each.detach().flatten() for each in case.module.parameters()]).numpy()
    )

    def product(v: Any) -> Any:
        return jax.jvp(jax.grad(loss), (theta,), (v,))[1]

    vectors = probes(case)
    for v, ours in zip(vectors, case.ours.product("hessian", vectors), strict=True):
        theirs = torch.from_numpy(np.array(product(jnp.asarray(v.numpy()))))
        assert relative_error(ours, theirs) < 1e-10
    # Their Lanczos on their products, ours on ours: both ends of the spectrum.
    start = jnp.asarray(vectors[0].numpy())
    tridiagonal = decomp.tridiag_sym(40, reortho="full", materialize=True)(product, start)
    theirs_values = np.linalg.eigvalsh(np.array(tridiagonal.J_small))
    operator = DenseOperator(
        torch.stack(case.ours.product("hessian", list(torch.eye(len(theta), dtype=torch.float64))))
    )
    spec = EigshSpec(k=4, which="BE", tol=1e-10)
    budget = Budget(max_products=500, num_vectors=200, inputs={"v0": ()})
    search = Eigsh.configure(spec, operator, budget)
    ours_values = np.sort(drive(search, operator).result.eigenvalues)
    np.testing.assert_allclose(ours_values[:2], theirs_values[:2], rtol=1e-8)
    np.testing.assert_allclose(ours_values[-2:], theirs_values[-2:], rtol=1e-8)
