"""A deterministic operator gives the same bits twice, whatever memory and history there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hvp_workers.backend import BackendError, Operator, Seeded
from hvp_workers.engine import RankEngine

from tests.workers.deterministic import (
    VECTORS,
    ask,
    bits,
    engine_of,
    facts,
    forget_operators,
    have,
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


def test_an_answer_that_rests_on_a_product_in_float64_is_refused_without_memory_for_one(
    engine: RankEngine, operator: Operator
) -> None:
    # Vectors of 8 elements: what is large is θ in float64.
    selected = replace(operator, space=replace(operator.space, parameters=("model.norm.weight",)))
    told = {}
    for available_bytes in (12_000, PLENTY):
        forget_operators(engine, operator)
        have(engine, available_bytes)
        for each in (replace(selected, deterministic=False), selected):
            try:
                told[available_bytes, each.deterministic] = ask(engine, each, "eigsh")[0].outcome  # type: ignore[attr-defined]
            except BackendError as error:
                told[available_bytes, each.deterministic] = error.reason
    assert told == {
        (12_000, False): "UNVERIFIED",
        (12_000, True): "DETERMINISTIC_MEMORY",
        (PLENTY, False): "CONVERGED",
        (PLENTY, True): "CONVERGED",
    }


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
