"""A deterministic operator gives the same bits twice, whatever memory and history there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hvp_core.sharding.collective import Distributed
from hvp_operations.eigsh import EigshSpec
from hvp_workers.backend import BackendError, Operator, RunProgress, Seeded
from hvp_workers.engine import RankEngine
from torch.multiprocessing.spawn import spawn

from tests.core.ranks import free_port
from tests.workers.deterministic import (
    VECTORS,
    ask,
    bits,
    engine_of,
    facts,
    forget_operators,
    have,
    operator_of,
    written,
)

PLENTY = 1 << 36
#: Hardly enough for all that the questions hold, and for what blocks keep of eight products.
LITTLE = 1_600_000
TOO_LITTLE = 140_000


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return written("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(operator: Operator) -> RankEngine:
    """One for the module, with vectors."""
    return with_vectors(engine_of(PLENTY), operator)


@pytest.fixture(scope="module")
def short(operator: Operator) -> RankEngine:
    """Another one, of less memory, which has worked already on the operator without the flag."""
    made = with_vectors(engine_of(LITTLE), operator)
    made.apply(replace(operator, deterministic=False), VECTORS[:1], ["x"])
    return made


def with_vectors(engine: RankEngine, operator: Operator) -> RankEngine:
    for seed, name in enumerate(VECTORS):
        engine.create_vector(name, operator.space, Seeded(seed, "gaussian"))
    return engine


def test_all_answers_have_the_same_bits_with_plenty_at_first_and_with_little_after_other_work(
    engine: RankEngine, short: RankEngine, operator: Operator
) -> None:
    first, found = bits(engine, operator), bits(short, operator)
    assert [name for name in first if found[name] != first[name]] == []


def product(engine: RankEngine, operator: Operator, names: list[str]) -> list[torch.Tensor]:
    engine.apply(operator, names, [f"H{name}" for name in names])
    return [engine._vectors[f"H{name}"].shard for name in names]


def test_without_the_flag_memory_changes_bits_and_with_it_there_is_a_refusal(
    engine: RankEngine, short: RankEngine, operator: Operator
) -> None:
    plain = replace(operator, deterministic=False)
    expected = product(engine, plain, VECTORS), ask(engine, plain, "eigsh")
    own = product(engine, operator, VECTORS), ask(engine, operator, "eigsh")
    forget_operators(short, operator)
    have(short, TOO_LITTLE)
    others = product(short, plain, VECTORS), ask(short, plain, "eigsh")
    assert not all(map(torch.equal, others[0], expected[0]))
    assert facts(others[1][0]) != facts(expected[1][0])
    for refused in (
        lambda: short.apply(operator, VECTORS, ["a", "b", "c"]),
        lambda: ask(short, operator, "eigsh"),
    ):
        with pytest.raises(BackendError) as caught:
            refused()
        assert caught.value.reason == "DETERMINISTIC_MEMORY"
        needed = int(caught.value.metadata["needed_bytes"])
        assert needed > int(caught.value.metadata["available_bytes"])
        assert str(needed) in caught.value.message
    have(short, LITTLE)  # and with memory the refused operator is the same again
    assert all(map(torch.equal, product(short, operator, VECTORS), own[0]))
    assert facts(ask(short, operator, "eigsh")[0]) == facts(own[1][0])


@pytest.mark.parametrize(("flag", "told"), [(False, "UNVERIFIED"), (True, "DETERMINISTIC_MEMORY")])
def test_an_answer_that_rests_on_a_product_in_float64_is_refused_without_memory_for_one(
    engine: RankEngine, operator: Operator, flag: bool, told: str
) -> None:
    spec = EigshSpec(k=1, which="LA", tol=0.1)
    engine.run_start("r", replace(operator, deterministic=flag), "eigsh", spec, {})
    have(engine, 10_000)
    try:
        while isinstance(step := engine.run_step("r", ["e0"]), RunProgress):
            pass
        outcome = step.outcome  # type: ignore[attr-defined]
    except BackendError as error:
        outcome = error.reason
    finally:
        engine.run_end("r")
        have(engine, PLENTY)
    assert outcome == told


def test_forms_that_are_taken_of_products_are_taken_of_all_at_once_or_refused(
    engine: RankEngine, operator: Operator
) -> None:
    expected = engine.evaluate_forms(operator, "quadratic", VECTORS)
    budget, held = engine._vector_budget, engine._held_bytes()
    engine._vector_budget = held + 2 * engine._vectors["v0"].shard.nbytes
    try:
        plain = replace(operator, deterministic=False)
        assert engine.evaluate_forms(plain, "quadratic", VECTORS) == pytest.approx(
            expected, rel=1e-4
        )
        with pytest.raises(BackendError, match="DETERMINISTIC_MEMORY: the products of 3 vectors"):
            engine.evaluate_forms(operator, "quadratic", VECTORS)
    finally:
        engine._vector_budget = budget


def test_provenance_says_what_was_pinned(engine: RankEngine, operator: Operator) -> None:
    result, _ = ask(engine, operator, "eigsh")
    told = result.provenance
    assert told["deterministic"] == "true"
    assert told["schedule_hessian"] == "3 shared"
    assert told["micro_batch_size"] == "5"
    assert told["num_threads"] == str(torch.get_num_threads())
    assert told["torch"] == torch.__version__
    assert told["compiled"] == "false"
    assert int(told["num_vectors"]) > int(told["num_lanczos_vectors"]) == 40
    assert told["device_name"]


def test_the_operator_with_the_flag_and_that_without_are_two(
    engine: RankEngine, operator: Operator
) -> None:
    plain = replace(operator, deterministic=False)
    assert engine._operator(operator) is not engine._operator(plain)
    assert engine._operator(operator) is engine._operator(replace(operator, kind="ggn"))
    assert not torch.are_deterministic_algorithms_enabled()  # between calls torch is as it was


def on_two_ranks(rank: int, port: int, folder: Path, name: str, available_bytes: int) -> None:
    """One of two ranks: what the model in a folder gives, told by rank 0."""
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    engine = engine_of(available_bytes, Distributed(torch.device("cpu")), folder / "cache")
    operator = operator_of(folder, name)
    if available_bytes == LITTLE:  # it is to be warm too
        with_vectors(engine, operator)
        engine.apply(replace(operator, deterministic=False), VECTORS, ["x", "y", "z"])
    found = bits(engine, operator)
    (folder / f"{available_bytes}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def alone(_: int, folder: Path, name: str, available_bytes: int) -> None:
    """The one rank of a fresh process: everything that there is to ask."""
    torch.set_num_threads(1)
    engine, operator = engine_of(available_bytes, cache=folder / "cache"), operator_of(folder, name)
    if available_bytes == LITTLE:
        with_vectors(engine, operator)
        engine.apply(replace(operator, kind="ggn", deterministic=False), VECTORS, ["x", "y", "z"])
    found = bits(engine, operator, everything=True)
    (folder / f"{available_bytes}-0.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "num_ranks"), [("gpt2", 1), ("llama", 2)])
def test_processes_give_the_same_bits_on_an_empty_folder_and_on_one_that_remembers_checks(
    name: str, num_ranks: int, tmp_path: Path
) -> None:
    written(name, tmp_path)
    for seed, available_bytes in ((1, PLENTY), (2, LITTLE)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", str(seed))
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
            given = (tmp_path, name, available_bytes)
            if num_ranks == 1:
                spawn(alone, given, nprocs=1)
            else:
                spawn(on_two_ranks, (free_port(), *given), nprocs=2)
    assert list((tmp_path / "cache" / "verified").iterdir())
    for rank in range(num_ranks):
        cold, warm = (
            json.loads((tmp_path / f"{available_bytes}-{rank}.json").read_text())
            for available_bytes in (PLENTY, LITTLE)
        )
        assert [each for each in cold if warm[each] != cold[each]] == []
