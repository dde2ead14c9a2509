"""Models beyond language models: classifiers of sequences, and modules that a package registers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hvp_core.curvature.curvature import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.model import modules
from hvp_core.sharding.collective import Alone, Collective, Distributed
from hvp_workers import backend as api
from hvp_workers.engine import RankEngine
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from transformers import CONFIG_MAPPING, BertLMHeadModel

from tests.core.problems import CPU, scatter
from tests.core.ranks import run_ranks
from tests.core.references import relative_error
from tests.modules import families, installed
from tests.modules.checkpoints import ROWS, SMALL, classifier, module_checkpoint

TASKS: dict[str, dict[str, Any]] = {
    "classes": {"num_labels": 3},
    "several labels": {"num_labels": 2, "problem_type": "multi_label_classification"},
    "one number": {"num_labels": 1},
    "numbers": {"num_labels": 2, "problem_type": "regression"},
}


def sentences(task: str, *, types: bool = False) -> dict[str, Tensor]:
    """Three sequences, two with padding, and labels of a task."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 11, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[2, 3:] = 0
    labels = {
        "classes": torch.tensor([2, 0, 1]),
        "several labels": torch.tensor([[1.0, 0], [0, 0], [1, 1]], dtype=torch.float64),
        "one number": torch.tensor([0.5, -1, 2], dtype=torch.float64),
        "numbers": torch.tensor([[0.5, 1], [-1, 0], [2, 3]], dtype=torch.float64),
    }[task]
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    if types:
        batch["token_type_ids"] = torch.randint(2, (3, 6), generator=generator)
    return batch


def curvature(
    folder: Path,
    batch: dict[str, Tensor],
    collective: Collective | None = None,
    rows: int = 2,
    dtype: Literal["float32", "float64"] = "float64",
) -> Curvature:
    """As a rank loads it from files."""
    ranks = RankEngine(collective or Alone(), "cpu", api.Tuning())
    if ranks.collective.rank == 0:
        save_file(batch, folder / "batch")
    if ranks.collective.world_size > 1:
        dist.barrier()
    space = api.Space(checkpoint_dir=folder, dtype=dtype)
    asked = api.Operator(space=space, batch_path=folder / "batch", micro_batch_size=rows)
    return ranks._operator(asked).curvature


class Dense:
    """Everything of a model by torch's own transforms of its own code.

    One column at a time: under vmap, torch 2.13 gives a BERT a Hessian that is not symmetric.

    Args:
        model: The model.
        outputs: Of a function that calls the model with other parameters.
        loss: Of the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[Callable[..., Any]], Tensor],
        loss: Callable[[Tensor], Tensor],
    ):
        named = dict(model.named_parameters())
        self.theta = torch.cat([each.detach().reshape(-1) for each in named.values()])
        sizes = [each.numel() for each in named.values()]

        def at(theta: Tensor) -> Tensor:
            parts = theta.split(sizes)
            values = {
                name: part.view_as(each)
                for (name, each), part in zip(named.items(), parts, strict=True)
            }
            return outputs(lambda **inputs: functional_call(model, values, kwargs=inputs))

        self.outputs, self.loss = at, lambda theta: loss(at(theta))
        self.of_outputs = loss

    def hessian(self) -> Tensor:
        found: Tensor = jacrev(grad(self.loss), chunk_size=1)(self.theta)
        return found

    def jacobian(self) -> Tensor:
        found: Tensor = jacrev(self.outputs, chunk_size=1)(self.theta)
        return found.reshape(-1, len(self.theta))

    def gauss_newton(self) -> Tensor:
        z = self.outputs(self.theta).detach()
        J, curve = self.jacobian(), hessian(self.of_outputs)(z).reshape(z.numel(), z.numel())
        return J.T @ curve @ J


def dense_classifier(model: nn.Module, batch: dict[str, Tensor]) -> Dense:
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    labels = batch["labels"]

    def loss(z: Tensor) -> Tensor:
        if not labels.is_floating_point():
            return nn.functional.cross_entropy(z, labels)
        if model.config.problem_type == "multi_label_classification":  # type: ignore[union-attr]
            return nn.functional.binary_cross_entropy_with_logits(z, labels)
        return nn.functional.mse_loss(z, labels.view_as(z))

    return Dense(model, lambda call: call(**inputs).logits, loss)


@pytest.mark.parametrize("task", TASKS)
def test_every_product_of_a_bert_that_classifies_padded_sequences(
    task: str, tmp_path: Path
) -> None:
    model = classifier(tmp_path, "bert", **TASKS[task])
    batch = sentences(task, types=True)
    ours = curvature(tmp_path, batch)
    own = model(**batch).loss
    assert ours.loss() == pytest.approx(own.item(), rel=1e-13)
    dense = dense_classifier(model, batch)
    assert float(dense.loss(dense.theta)) == pytest.approx(own.item(), rel=1e-13)
    n = len(dense.theta)
    v = torch.cos(torch.arange(n, dtype=torch.float64))
    assert relative_error(ours.hvp([v])[0], dense.hessian() @ v) < 1e-9
    assert relative_error(ours.ggn([v])[0], dense.gauss_newton() @ v) < 1e-9
    J = dense.jacobian()
    assert relative_error(ours.jvp([v])[0], J @ v) < 1e-9
    u = torch.sin(torch.arange(len(J), dtype=torch.float64))
    assert relative_error(ours.vjp([u])[0], J.T @ u) < 1e-9
    assert ours.slopes([v])[0] == pytest.approx(float(ours.gradient() @ v), rel=1e-9)
    assert not any(name.startswith("fallback") for name in ours.notes())
    assert len(ours.chain.blocks) == 4


def test_the_empirical_fisher_matrix_is_that_of_the_gradients_of_sequences(tmp_path: Path) -> None:
    model = classifier(tmp_path, "bert", num_labels=3)
    batch = sentences("classes")
    ours = curvature(tmp_path, batch)

    def gradient(row: int) -> Tensor:
        one = {name: each[row : row + 1] for name, each in batch.items()}
        dense = dense_classifier(model, one)
        return grad(dense.loss)(dense.theta)

    gradients = torch.stack([gradient(row) for row in range(3)])
    v = torch.cos(torch.arange(gradients.shape[1], dtype=torch.float64))
    for unit in ("token", "sequence"):  # a row has one target
        (fv,) = ours.empirical_fisher([v], unit)
        assert relative_error(fv, gradients.T @ (gradients @ v) / 3) < 1e-9


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("roberta", {}),  # positions that are counted from the padding token
        ("gpt2", {"n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 10}),
        # One layer, called twice: one block.
        pytest.param("albert", {"embedding_size": 4}, marks=pytest.mark.slow),
    ],
)
def test_classifiers_of_other_builds(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = classifier(tmp_path, kind, num_labels=3, **settings)
    batch = sentences("classes")
    ours = curvature(tmp_path, batch)
    loss = model(**batch).loss
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([each.reshape(-1) for each in gradient])
    v = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    hv = torch.autograd.grad(flat @ v, parameters, allow_unused=True, materialize_grads=True)
    assert ours.loss() == pytest.approx(loss.item(), rel=1e-13)
    assert relative_error(ours.gradient(), flat.detach()) < 1e-9
    assert relative_error(ours.hvp([v])[0], torch.cat([each.reshape(-1) for each in hv])) < 1e-9


def test_an_encoder_is_never_served_as_a_causal_language_model(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["bert"](**SMALL)
    model = BertLMHeadModel(config).double().eval()
    scatter(model)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 11, (2, 6))
    with pytest.raises(CurvatureError, match="looks at the tokens behind") as refused:
        curvature(tmp_path, {"input_ids": ids})
    assert refused.value.reason == "TASK_UNSUPPORTED"
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"is_decoder": True}))
    decoder = BertLMHeadModel(CONFIG_MAPPING["bert"](**SMALL, is_decoder=True)).double().eval()
    decoder.load_state_dict(model.state_dict())
    loss = decoder(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert curvature(tmp_path, {"input_ids": ids}).loss() == pytest.approx(loss, rel=1e-6)
    del written["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CurvatureError, match="names no class in architectures"):
        curvature(tmp_path, {"input_ids": ids})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's package on Python's path, and a folder for a checkpoint."""
    monkeypatch.syspath_prepend(installed(tmp_path / "site"))
    modules.registered.cache_clear()
    yield tmp_path / "model"
    modules.registered.cache_clear()
    sys.modules.pop("modules_of_a_user", None)


def dense_net(net: nn.Module) -> Dense:
    inputs = {name: ROWS[name] for name in ("x", "scale")}
    return Dense(
        net, lambda call: call(**inputs), lambda z: nn.functional.cross_entropy(z, ROWS["y"])
    )


def test_a_registered_module_with_outputs_has_every_product(package: Path) -> None:
    net = module_checkpoint(package, "scaled-mlp", families.Net(5), width=5)
    ours, dense = curvature(package, ROWS), dense_net(net)
    v = torch.cos(torch.arange(len(dense.theta), dtype=torch.float64))
    J = dense.jacobian()
    assert relative_error(ours.hvp([v])[0], dense.hessian() @ v) < 1e-9
    assert relative_error(ours.ggn([v])[0], dense.gauss_newton() @ v) < 1e-9
    assert relative_error(ours.jvp([v])[0], J @ v) < 1e-9
    losses = vmap(lambda z, y: nn.functional.cross_entropy(z, y))
    by_row = jacrev(lambda theta: losses(dense.outputs(theta), ROWS["y"]))(dense.theta)
    (fv,) = ours.empirical_fisher([v], "sequence")
    assert relative_error(fv, by_row.T @ (by_row @ v) / 5) < 1e-9
    # 32 bits in the file, and the parameters in 64.
    narrow = {name: each.float() if each.dim() else each for name, each in ROWS.items()}
    narrow["y"] = ROWS["y"]
    assert curvature(package, narrow).loss() == pytest.approx(ours.loss(), rel=1e-6)


def test_a_registered_module_that_returns_its_own_loss_has_its_hessian(package: Path) -> None:
    net = module_checkpoint(package, "own-mlp", families.OwnNet(5), width=5)
    plain = families.Net(5).double()
    plain.load_state_dict(net.state_dict())
    ours, dense = curvature(package, ROWS), dense_net(plain)
    v = torch.cos(torch.arange(len(dense.theta), dtype=torch.float64))
    assert ours.loss() == pytest.approx(float(dense.loss(dense.theta)), rel=1e-13)
    assert relative_error(ours.hvp([v])[0], dense.hessian() @ v) < 1e-9
    assert ours.slopes([v])[0] == pytest.approx(float(ours.gradient() @ v), rel=1e-9)
    for product in (
        lambda: ours.ggn([v]),
        lambda: ours.empirical_fisher([v], "token"),
        lambda: ours.jvp([v]),
        lambda: ours.quadratic("ggn", [v]),
    ):
        with pytest.raises(CurvatureError, match="returns its loss alone") as refused:
            product()
        assert refused.value.reason == "KIND_UNSUPPORTED"


def test_a_parameter_that_a_module_has_twice_is_one(package: Path) -> None:
    net = module_checkpoint(package, "tied-mlp", families.Tied(5), width=5)
    ours, dense = curvature(package, ROWS), dense_net(net)
    assert ours.space.dimension == len(dense.theta) == sum(p.numel() for p in net.parameters())
    v = torch.cos(torch.arange(len(dense.theta), dtype=torch.float64))
    assert relative_error(ours.gradient(), grad(dense.loss)(dense.theta)) < 1e-9
    assert relative_error(ours.hvp([v])[0], dense.hessian() @ v) < 1e-9


def test_the_laplacian_is_the_hessian_of_a_module_without_data(package: Path) -> None:
    module_checkpoint(package, "laplacian", families.Chain(9), length=9)
    ours = curvature(package, {"x": torch.zeros(1)})
    laplacian = (
        2 * torch.eye(9) - torch.eye(9).roll(1, 0).tril(-1) - torch.eye(9).roll(1, 1).triu(1)
    )
    for row, expected in zip(torch.eye(9, dtype=torch.float64), laplacian.double(), strict=True):
        assert torch.allclose(ours.hvp([row])[0], expected, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        ("mlp-in-train-mode", "MODEL_UNSUPPORTED", "is in train mode"),
        ("mlp-of-a-dict", "MODEL_UNSUPPORTED", "returns dict and no tensor"),
        ("mlp-of-no-rows", "LOSS_MISMATCH", "one class index for each row"),
        ("mlp-of-a-bent-loss", "LOSS_MISMATCH", "curve differs from the derivative"),
        ("mlp-that-raises", "MODEL_UNSUPPORTED", "without hvp too, correct the model"),
        ("mlp-of-a-spaced-name", "MODEL_UNSUPPORTED", "OfASpacedName, field 'the scale': .*letter"),
        ("mlp-of-a-strange-dimension", "MODEL_UNSUPPORTED", "field 'x': dimension 1 of it is '-4'"),
        ("missing", "ARCHITECTURE_UNKNOWN", "has no attribute 'NoSuchClass'"),
        ("nobody's", "ARCHITECTURE_UNKNOWN", "not one that transformers knows"),
    ],
)
def test_what_no_module_may_be_is_refused_before_a_weight_is_read(
    kind: str, reason: str, words: str, package: Path
) -> None:
    module_checkpoint(package, kind, families.Net(5), width=5)
    (package / "model.safetensors").unlink()
    with pytest.raises(CurvatureError, match=words) as refused:
        curvature(package, ROWS)
    assert refused.value.reason == reason


def test_advice_about_weights_and_configs_fits_a_registered_module(package: Path) -> None:
    module_checkpoint(package, "scaled-mlp", families.Net(5), width=6)
    with pytest.raises(CurvatureError, match="correct the sizes in config") as shape:
        curvature(package, ROWS)
    (package / "config.json").write_text(json.dumps({"model_type": "scaled-mlp"}))
    with pytest.raises(CurvatureError, match="correct what ScaledMlp reads of it") as config:
        curvature(package, ROWS)
    (package / "config.json").write_text(json.dumps({"model_type": "tied-mlp", "width": 5}))
    with pytest.raises(CurvatureError, match=r"safetensors\.torch\.save_model") as missing:
        curvature(package, ROWS)
    for refused in (shape, config, missing):
        assert "transformers" not in refused.value.message
        assert "came with" not in refused.value.message


@pytest.mark.parametrize("kind", ["mlp-of-a-sum", "mlp-of-what-counts"])
def test_a_loss_that_is_no_mean_over_rows_is_seen_when_the_model_is_loaded(
    kind: str, package: Path
) -> None:
    module_checkpoint(package, kind, families.OwnNet(5), width=5)
    with pytest.raises(CurvatureError, match="mean loss of its rows") as refused:
        curvature(package, ROWS)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


def test_rows_that_do_not_count_are_found_wherever_they_are(package: Path) -> None:
    module_checkpoint(package, "mlp-of-what-counts-unsaid", families.OwnNet(5), width=5)
    assert curvature(package, ROWS).loss() > 0  # where every row counts it is a mean over rows
    some = ROWS | {"y": torch.tensor([0, 1, 2, -100, -100])}
    with pytest.raises(CurvatureError, match="mean loss of its rows"):
        curvature(package, some).loss()


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"z": ROWS["x"].clone()}, "BATCH_FIELD_INVALID", "'z' that the model does not take"),
        ({"scale": None, "scal": ROWS["scale"]}, "BATCH_FIELD_INVALID", "did you mean scale"),
        ({"y": None}, "BATCH_FIELD_INVALID", "has no y, which the model takes"),
        ({"y": ROWS["y"] + 1}, "BATCH_VALUE_OUT_OF_RANGE", "y holds 3"),
        ({"y": ROWS["y"].double()}, "BATCH_FIELD_INVALID", "takes integers"),
        ({"x": ROWS["x"][:, :3].clone()}, "SHAPE_MISMATCH", r"takes \(n, 4\)"),
        ({"scale": ROWS["scale"][:4].clone()}, "SHAPE_MISMATCH", "give both the same n"),
        ({"y": torch.full((5,), -100)}, "NO_TARGETS", "No target"),
        ({"x": ROWS["x"] * torch.inf}, "BATCH_FIELD_INVALID", "infinite or undefined"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_refused(
    change: dict[str, Tensor | None], reason: str, words: str, package: Path
) -> None:
    module_checkpoint(package, "scaled-mlp", families.Net(5), width=5)
    batch = {name: each for name, each in (ROWS | change).items() if each is not None}
    with pytest.raises(CurvatureError, match=words) as refused:
        curvature(package, batch)
    assert refused.value.reason == reason


def products(folder: Path, collective: Collective, rows: int) -> dict[str, Tensor]:
    """What must not depend on the number of ranks, of each of three models."""
    found = {}
    for name, batch in (
        ("bert", sentences("classes")),
        ("scaled-mlp", ROWS),
        ("laplacian", {"x": torch.zeros(1)}),
    ):
        ours = curvature(folder / name, batch, collective, rows)
        v = ours.space.random(1, "gaussian")
        found[f"loss of {name}"] = torch.tensor(ours.loss())
        found[f"gradient of {name}"] = ours.space.to_flat(ours.gradient())
        found[f"Hv of {name}"] = ours.space.to_flat(ours.hvp([v])[0])
        if name != "laplacian":
            found[f"Gv of {name}"] = ours.space.to_flat(ours.ggn([v])[0])
            found[f"Jv of {name}"] = ours.output_space.to_whole(ours.jvp([v])[0])
    return found


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    sys.path.insert(0, str(folder / "site"))
    found = products(folder, Distributed(CPU), 1)
    if rank == world_size - 1:
        torch.save(found, folder / "found.pt")


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_numbers(world_size: int, package: Path) -> None:
    folder = package.parent
    classifier(folder / "bert", "bert", num_labels=3)
    module_checkpoint(folder / "scaled-mlp", "scaled-mlp", families.Net(5), width=5)
    module_checkpoint(folder / "laplacian", "laplacian", families.Chain(9), length=9)
    run_ranks(rank_main, world_size, folder)
    found, alone = torch.load(folder / "found.pt"), products(folder, Alone(), 3)
    for what, expected in alone.items():
        assert relative_error(found[what], expected) < 1e-11, what
