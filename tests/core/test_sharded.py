"""Two and three real processes over gloo give what one gives."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hvp_core.autodiff import verify
from hvp_core.autodiff.comparison import Comparer
from hvp_core.autodiff.product_spec import Draws, Unit
from hvp_core.autodiff.traced import TracedHead
from hvp_core.autodiff.verdicts import Verdicts
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.sections import section_of
from hvp_core.curvature.shards import part_of
from hvp_core.errors import CurvatureError
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.svds import Svds
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.model.data import token_batch
from hvp_core.model.places import Place
from hvp_core.precision import reproducible
from hvp_core.runs.algorithm import drive
from hvp_core.sharding.collective import Alone, Collective, Distributed, open_collective
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshSpec
from hvp_operations.svds import SvdsSpec

from tests.core.dense import DenseOperator
from tests.core.problems import CPU, Problem, gpt2_problem, llama_problem, ragged_tokens
from tests.core.ranks import run_ranks
from tests.core.references import relative_error
from tests.core.test_sections import section
from tests.core.test_unused_parameters import with_a_tower

PROBLEMS = {"llama": llama_problem, "gpt2": gpt2_problem}


def numbers(problem: Problem, collective: Collective) -> dict[str, torch.Tensor]:
    """Everything that must not depend on the number of ranks."""
    curvature = problem.curvature(2, collective)
    space = curvature.space
    u, v = space.random(1, "gaussian"), space.random(2, "rademacher")
    hu, hv = curvature.hvp([u, v])
    search = Eigsh(spec=EigshSpec(k=4, which="BE", seed=Seed(3)), max_products=12, num_vectors=10)
    operator = DenseOperator(lambda x: curvature.hvp([x])[0], space)
    pairs = drive(search, operator).result
    return {
        "loss": torch.tensor(curvature.loss(), dtype=torch.float64),
        "gradient": space.to_flat(curvature.gradient()),
        "u": space.to_flat(u),
        "hu": space.to_flat(hu),
        "hv": space.to_flat(hv),
        "narrow": space.to_flat(curvature.hvp([v.bfloat16()])[0]),
        "uhv": torch.tensor([space.dot(u, hv), space.dot(v, hu)], dtype=torch.float64),
        "eigenvalues": torch.tensor(pairs.eigenvalues, dtype=torch.float64),
        "factored": space.to_flat(
            curvature.factors("empirical_fisher_token", 10**6).solve(u, 1e-3)
        ),
        "shard": torch.tensor(space.layout.shard_numel),
    }


def of_outputs(collective: Collective) -> dict[str, torch.Tensor]:
    """The same of products with the outputs, the empirical Fisher matrix, and passes forward."""
    curvature = llama_problem().curvature(2, collective)
    space, outputs = curvature.space, curvature.output_space
    u, v = space.random(1, "gaussian"), space.random(2, "rademacher")
    (ju,), w = curvature.jvp([u]), outputs.random(4, "gaussian")
    fisher = [each for unit in get_args(Unit) for each in curvature.empirical_fisher([u, v], unit)]
    fisher += curvature.product("fisher", [u, v], draws=Draws(2**63, 3))
    forms = [
        *curvature.quadratic("ggn", [u]),
        *curvature.quadratic("empirical_fisher_sequence", [u, v]),
        *curvature.quadratic("fisher", [u], draws=Draws(2**63, 3)),
    ]
    return {
        "fisher": torch.stack([space.to_flat(each) for each in fisher]),
        "slopes": torch.tensor(curvature.slopes([u, v]), dtype=torch.float64),
        "forms": torch.tensor(forms, dtype=torch.float64),
        "jvp": outputs.to_whole(ju),
        "vjp": space.to_flat(curvature.vjp([w])[0]),
        "inner": outputs.dots(ju.unsqueeze(0), w),
        "rows": torch.tensor(outputs.local_rows),
    }


def of_a_selection(collective: Collective) -> dict[str, torch.Tensor]:
    """The same of an operator on some of the parameters, which lie on the ranks by themselves."""
    problem = llama_problem()
    whole = problem.curvature(2, collective).space
    names = [name for name in problem.parameters if ".1." in name or "k_proj" in name]
    curvature = problem.curvature(2, collective, selected=names)
    space = curvature.space
    u, v = space.random(1, "gaussian"), space.random(2, "rademacher")
    products = [*curvature.hvp([u, v]), *curvature.ggn([u])]
    (ju,) = curvature.jvp([u])
    return {
        "point": space.to_flat(part_of(whole, whole.from_flat(problem.flat), space)),
        "u": space.to_flat(u),
        "gradient": space.to_flat(curvature.gradient()),
        "products": torch.stack([space.to_flat(each) for each in products]),
        "jvp": curvature.output_space.to_whole(ju),
        "vjp": space.to_flat(curvature.vjp([ju])[0]),
    }


class SectionOperator(LinearOperator):
    """The Jacobian of a section, for algorithms."""

    def __init__(self, curvature: Curvature):
        self.domain, self.codomain = curvature.input_space, curvature.output_space
        self._curvature = curvature

    def apply(self, vectors: Sequence[torch.Tensor], *, borrow: bool = False) -> list[torch.Tensor]:
        return self._curvature.jvp(vectors)

    def apply_transposed(
        self, vectors: Sequence[torch.Tensor], *, borrow: bool = False
    ) -> list[torch.Tensor]:
        return self._curvature.vjp(vectors)


def of_sections(collective: Collective) -> dict[str, torch.Tensor]:
    """The same of Jacobians of activations, also where a rank has no row of the batch."""
    problem, found = llama_problem(), {}
    for size in (2, 5):
        whole = problem.curvature(size, collective)
        output, by = Place("model.layers.1"), Place("model.layers.0")
        curvature = section(problem, output, by, size, whole=whole)
        domain, codomain = curvature.input_space, curvature.output_space
        v, u = domain.random(1, "gaussian"), codomain.random(2, "gaussian")
        found[f"jvp {size}"] = codomain.to_flat(curvature.jvp([v])[0])
        found[f"vjp {size}"] = domain.to_flat(curvature.vjp([u])[0])
        with pytest.raises(CurvatureError, match="MODULE_NOT_FOUND"):
            section_of(whole, Place("lost"), None)
        with pytest.raises(CurvatureError, match="MODULE_UNSUPPORTED"):
            section_of(whole, Place("model.layers.1.self_attn"), None)
    search = Svds(spec=SvdsSpec(k=1, tol=1e-2), max_products=60, num_vectors=20)
    result = drive(search, SectionOperator(curvature)).result
    assert result.outcome == "CONVERGED"
    found["singular values"] = torch.tensor(result.singular_values, dtype=torch.float64)
    return found


def of_checks(collective: Collective) -> dict[str, Any]:
    """What the ranks compare of a model's programs, and what becomes of one that is wrong."""
    compared: list[str] = []
    matches, run = Comparer._matches, TracedHead.run

    def counted(self: Comparer, link: Any, *args: Any) -> bool | None:
        compared.append(link.name)
        return matches(self, link, *args)

    def wrong(self: TracedHead, *args: Any, **kwargs: Any) -> Any:
        found = run(self, *args, **kwargs)
        found.dots = [None if each is None else 1.01 * each for each in found.dots]
        return found

    def product() -> tuple[torch.Tensor, dict[str, str]]:
        patch.setattr(verify, "_verified", Verdicts())
        curvature = problem.curvature(1, collective, strict=False)
        space = curvature.space
        return space.to_flat(curvature.hvp([space.random(1, "gaussian")])[0]), curvature.notes()

    ids, labels, _ = ragged_tokens()
    problem = replace(llama_problem(), batch=token_batch(ids, labels, torch.ones_like(ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparer, "_matches", counted)
        right, _ = product()
        names = list(compared)
        patch.setattr(TracedHead, "run", wrong)
        refused, notes = product()
    return {"compared": names, "right": right, "refused": refused, "notes": notes}


def rank_main(rank: int, world_size: int, session: str, folder: Path) -> None:
    collectives = {
        "memory": open_collective(
            rank=rank, world_size=world_size, device=CPU, same_host=True, session=session
        ),
        "sockets": Distributed(CPU),
    }
    for way, collective in collectives.items():
        # Longer than a window, and not a multiple of anything.
        chunk = torch.arange(2_100_003, dtype=torch.float64) + rank
        gathered = collective.gather(chunk).view(world_size, -1)
        assert all(torch.equal(gathered[r], chunk - rank + r) for r in range(world_size))
        out = torch.ones(1_000_001, dtype=torch.float64)
        collective.scatter_sum(torch.arange(world_size * 1_000_001).double() * (rank + 1), out)
        expected = 1 + (torch.arange(1_000_001).double() + rank * 1_000_001) * (
            world_size * (world_size + 1) / 2
        )
        assert torch.equal(out, expected), way
        narrow = torch.rand(world_size * 5003)
        with reproducible():
            once, again = torch.zeros(5003), torch.zeros(5003)
            for each in (once, again):
                collective.scatter_sum(narrow, each)
        parts = collective.gather(narrow).view(world_size, world_size, -1)[:, rank]
        assert torch.equal(once, parts.sum(0)), way
        assert torch.equal(once, again), way
    # Each model by each way for one number of ranks or another.
    for (name, make), way in zip(PROBLEMS.items(), ways(world_size), strict=True):
        found = numbers(make(), collectives[way])
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
    torch.save(told(collectives["memory"]), folder / f"told-{rank}.pt")
    torch.save(of_outputs(collectives["sockets"]), folder / f"outputs-{rank}.pt")
    torch.save(of_a_selection(collectives["sockets"]), folder / f"selection-{rank}.pt")
    torch.save(of_sections(collectives["sockets"]), folder / f"sections-{rank}.pt")
    torch.save(of_checks(collectives["memory"]), folder / f"checks-{rank}.pt")
    derivatives = unused(collectives["memory"])
    if rank == 0:
        torch.save(derivatives, folder / "unused.pt")


def told(collective: Collective) -> dict[str, str]:
    """Notes of a product of which one rank's rows have a mask that no kernel knows."""
    ids, labels, mask = ragged_tokens()
    mask[2, 1] = 0  # of the second micro-batch
    problem = replace(llama_problem(), batch=token_batch(ids, labels, mask))
    curvature = problem.curvature(2, collective, strict=False)
    curvature.hvp([curvature.space.random(1, "gaussian")])
    return curvature.notes()


def unused(collective: Collective) -> list[torch.Tensor]:
    """Derivatives of a model of which no text reaches a part."""
    curvature = with_a_tower().curvature(2, collective)
    space = curvature.space
    v = space.random(1, "gaussian")
    return [space.to_flat(each) for each in (curvature.gradient(), curvature.hvp([v])[0])]


def ways(world_size: int) -> list[str]:
    return ["memory", "sockets"] if world_size == 2 else ["sockets", "memory"]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """How many there were, and the folder with what they have found."""
    world_size, folder = request.param, tmp_path_factory.mktemp("ranks")
    session = uuid.uuid4().hex
    run_ranks(rank_main, world_size, session, folder)
    assert not Path(f"/dev/shm/hvp-{session}").exists()  # noqa: S108 (the place the code uses)
    return world_size, folder


def test_any_number_of_ranks_gives_the_same_numbers(ranks: tuple[int, Path]) -> None:
    world_size, folder = ranks
    for rank in range(world_size):
        notes = torch.load(folder / f"told-{rank}.pt")
        for layer in (0, 1):
            note = notes[f"fallback_model.layers.{layer}"]
            assert note.endswith("its mask is irregular (on rank 1)")
    for ours, whole in zip(torch.load(folder / "unused.pt"), unused(Alone()), strict=True):
        assert relative_error(ours, whole) < 1e-11
    for name, make in PROBLEMS.items():
        alone = numbers(make(), Alone())
        found = torch.load(folder / f"{name}.pt")
        assert torch.equal(found["u"], alone["u"])
        for what in ("loss", "gradient", "hu", "hv", "uhv", "eigenvalues", "factored"):
            assert relative_error(found[what], alone[what]) < 1e-11, (name, what)
        # v is exact in 16 bits: only the storing of the product rounds.
        assert relative_error(found["narrow"], alone["hv"]) < 4e-3
        segments = 4
        n = alone["u"].numel()
        assert int(found["shard"]) <= n // world_size + segments


def test_ranks_share_the_comparisons_of_traces_and_refuse_a_wrong_one_together(
    ranks: tuple[int, Path],
) -> None:
    world_size, folder = ranks
    found = [torch.load(folder / f"checks-{rank}.pt") for rank in range(world_size)]
    shares = [each["compared"] for each in found]
    assert sorted(itertools.chain(*shares)) == ["embedding", "head", "model.layers.0"]
    assert all(shares)
    for each in found:
        assert relative_error(each["refused"], each["right"]) < 1e-12
        assert "torch does not confirm its trace" in each["notes"]["fallback_head"]


def test_products_with_outputs_do_not_depend_on_the_ranks_either(ranks: tuple[int, Path]) -> None:
    world_size, folder = ranks
    alone = of_outputs(Alone())
    found = [torch.load(folder / f"outputs-{rank}.pt") for rank in range(world_size)]
    assert sum(int(each["rows"]) for each in found) == int(alone["rows"]) == 5
    for each in found:  # every rank knows the same
        for what in set(alone) - {"rows"}:
            assert relative_error(each[what], alone[what]) < 1e-11, what
    selection = of_a_selection(Alone())
    for rank in range(world_size):
        each = torch.load(folder / f"selection-{rank}.pt")
        for what, expected in selection.items():
            assert relative_error(each[what], expected) < 1e-11, what
    sections = of_sections(Alone())
    for rank in range(world_size):
        each = torch.load(folder / f"sections-{rank}.pt")
        for what, expected in sections.items():
            assert relative_error(each[what], expected) < 1e-11, what
