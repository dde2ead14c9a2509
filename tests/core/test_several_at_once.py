"""Products of several vectors at once are those of each alone, and of the dense matrix."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hvp_core.autodiff.product_spec import MATRICES, matrix
from hvp_core.curvature.curvature import Curvature
from hvp_core.losses.loss import CrossEntropy
from hvp_core.model import modules
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.functional import cross_entropy

from tests.core import test_selected_parameters as decoders
from tests.core.problems import gpt2_problem, llama_problem, module_problem
from tests.core.references import relative_error
from tests.core.test_model_families import Dense, curvature, dense_classifier, dense_net, sentences
from tests.modules import families, installed
from tests.modules.checkpoints import ROWS, classifier, module_checkpoint

#: All but those of drawn labels, of which tests/core/test_drawn_labels.py has the dense matrix.
KINDS = [kind for kind in MATRICES if matrix(kind).draws is None]


@dataclass(frozen=True)
class Case:
    """A curvature, and its dense matrices by torch."""

    curvature: Curvature
    matrices: dict[str, Tensor]


def of_classes(found: Curvature, dense: Dense, labels: Tensor) -> Case:
    """Of a model with one label for each row, where both units are the row."""
    losses = vmap(cross_entropy)
    by_row = jacrev(lambda theta: losses(dense.outputs(theta), labels), chunk_size=1)(dense.theta)
    fisher, mean = by_row.T @ by_row / len(labels), by_row.mean(0)
    matrices = {"hessian": dense.hessian(), "ggn": dense.gauss_newton()}
    for unit in ("token", "sequence"):
        matrices[f"empirical_fisher_{unit}"] = fisher
        matrices[f"gradient_covariance_{unit}"] = fisher - torch.outer(mean, mean)
    return Case(found, matrices)


def bert(folder: Path) -> Case:
    model, batch = classifier(folder, "bert", num_labels=3), sentences("classes", types=True)
    return of_classes(curvature(folder, batch), dense_classifier(model, batch), batch["labels"])


def registered(folder: Path) -> Case:
    net = module_checkpoint(folder, "scaled-mlp", families.Net(5), width=5)
    return of_classes(curvature(folder, ROWS), dense_net(net), ROWS["y"])


def images() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network with convolutions, five images and their classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return net.double(), torch.randn(5, 1, 6, 6).double(), torch.tensor([0, 2, 1, 1, 0])


def convolutions(folder: Path) -> Case:
    net, x, y = images()
    dense = Dense(net, lambda call: call(input=x), lambda z: cross_entropy(z, y))
    return of_classes(module_problem(net, CrossEntropy(), x, y).curvature(2), dense, y)


def llama(folder: Path) -> Case:
    return Case(llama_problem().curvature(2), decoders.dense("llama"))


def gpt2(folder: Path) -> Case:
    return Case(gpt2_problem().curvature(2), decoders.dense("gpt2"))


CASES: dict[str, Callable[[Path], Case]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "a registered module": registered,
    "convolutions": convolutions,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For a checkpoint; the package that registers the module is installed."""
    monkeypatch.syspath_prepend(installed(tmp_path / "site"))
    modules.registered.cache_clear()
    yield tmp_path / "model"
    modules.registered.cache_clear()
    sys.modules.pop("modules_of_a_user", None)


def vectors(count: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    "what",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in ("gpt2", "bert"))) for each in CASES],
)
def test_products_of_several_vectors_are_those_of_each_and_of_the_dense_matrix(
    what: str, folder: Path
) -> None:
    case = CASES[what](folder)
    three = vectors(3, case.curvature.space.dimension)
    for kind in KINDS:
        dense = case.matrices[kind]
        together = case.curvature.product(kind, three)
        for v, product in zip(three, together, strict=True):
            (alone,) = case.curvature.product(kind, [v])
            assert relative_error(product, alone) < 1e-13, kind
            assert relative_error(product, dense @ v) < 1e-10, kind
        forms = [float(v @ dense @ v) for v in three]
        if kind != "hessian":
            assert case.curvature.quadratic(kind, three) == pytest.approx(forms, rel=1e-10), kind
            each = [case.curvature.quadratic(kind, [v])[0] for v in three]
            assert case.curvature.quadratic(kind, three) == pytest.approx(each, rel=1e-12), kind


@pytest.mark.parametrize("what", ["llama", "convolutions"])
def test_in_float32_they_are_those_of_the_dense_matrix_to_its_rounding(
    what: str, folder: Path
) -> None:
    wide = CASES[what](folder)
    three = vectors(3, wide.curvature.space.dimension)
    if what == "llama":
        narrow = llama_problem(dtype=torch.float32).curvature(2)
    else:
        net, x, y = images()
        narrow = module_problem(net.float(), CrossEntropy(), x.float(), y).curvature(2)
    for kind in KINDS:
        products = narrow.product(kind, [v.float() for v in three])
        for v, product in zip(three, products, strict=True):
            assert relative_error(product.double(), wide.matrices[kind] @ v) < 1e-5, kind
