"""What is decided before a request runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hvp_core.errors import CurvatureError
from hvp_core.settings import ComputeSettings
from hvp_operations.eigsh import OPERATION, EigshSpec
from hvp_operations.operation import Cost, Facts
from hvp_workers.backend import Tuning
from hvp_workers.micro_batch import default_micro_batch
from hvp_workers.plan import policy
from hvp_workers.room import needed_bytes
from hypothesis import assume, given
from hypothesis import strategies as st

FLEXIBLE, PINNED = policy(deterministic=False), policy(deterministic=True)
PLAIN = ComputeSettings(
    schedule="auto", budget_bytes=250, compile=False, graphs=False, precision="full"
)


@pytest.mark.parametrize(
    ("device", "tuning", "expected"),
    [
        ("cpu", Tuning(), PLAIN),
        ("cpu", Tuning(compile="on"), replace(PLAIN, compile=True)),
        ("cpu", Tuning(schedule="lean"), replace(PLAIN, schedule="lean")),
        ("cuda", Tuning(), replace(PLAIN, compile=True, graphs=True)),
        ("cuda", Tuning(compile="off"), PLAIN),
    ],
)
def test_compiling_is_for_gpus_unless_somebody_says_otherwise(
    device: str, tuning: Tuning, expected: ComputeSettings
) -> None:
    assert FLEXIBLE.settings("full", tuning, device=device, available_bytes=1000) == expected


def test_the_precision_is_the_operators() -> None:
    assert FLEXIBLE.settings("tf32", Tuning(), device="cuda", available_bytes=0).precision == "tf32"


def cost(spec: EigshSpec, dimension: int) -> Cost:
    return OPERATION.cost(spec, Facts(num_parameters=dimension, kind="hessian"))


@pytest.mark.parametrize("k", [1, 300, 535])
def test_the_servers_own_budget_finds_and_certifies_as_many_pairs_as_were_asked_for(k: int) -> None:
    assert cost(EigshSpec(k=k, which="LA"), 536).max_products >= 2 * k


def test_a_basis_shrinks_to_the_memory_there_is_and_no_further() -> None:
    asked = cost(EigshSpec(k=6, which="BE"), 1000)
    assert FLEXIBLE.room_for(asked, vector_bytes=1, available_bytes=10**6) == 40 + 10
    assert FLEXIBLE.room_for(asked, vector_bytes=100, available_bytes=4000) == 32
    # For two passes.
    assert FLEXIBLE.room_for(asked, vector_bytes=100, available_bytes=2900) == 23
    with pytest.raises(CurvatureError, match="INSUFFICIENT_CLUSTER_MEMORY"):
        FLEXIBLE.room_for(asked, vector_bytes=100, available_bytes=2200)
    kept = cost(EigshSpec(k=6, which="BE", method="lanczos"), 1000)
    with pytest.raises(CurvatureError, match="INSUFFICIENT_CLUSTER_MEMORY"):
        FLEXIBLE.room_for(kept, vector_bytes=100, available_bytes=2900)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tuning", [Tuning(), Tuning(compile="on"), Tuning(schedule="lean")])
def test_a_pinned_plan_is_one_whatever_memory_there_is_and_compiles_nothing(
    device: str, tuning: Tuning
) -> None:
    little, plenty = (
        replace(
            PINNED.settings("full", tuning, device=device, available_bytes=each), budget_bytes=None
        )
        for each in (1 << 20, 1 << 40)
    )
    assert little == plenty == ComputeSettings(schedule=tuning.schedule, deterministic=True)


def test_a_pinned_run_has_all_the_vectors_that_it_can_use_or_is_refused() -> None:
    asked = cost(EigshSpec(k=6, which="BE"), 1000)
    needed = needed_bytes(50, 100)
    for available_bytes in (needed, 10**6, 10**12):
        assert PINNED.room_for(asked, vector_bytes=100, available_bytes=available_bytes) == 50
    with pytest.raises(CurvatureError, match=f"DETERMINISTIC_MEMORY.*{needed}.*{needed - 1}"):
        PINNED.room_for(asked, vector_bytes=100, available_bytes=needed - 1)


def test_what_a_pinned_plan_has_no_memory_for_it_does_not_do_otherwise() -> None:
    assert PINNED.affords_exact(9, 9)
    assert not FLEXIBLE.affords_exact(10, 9)
    with pytest.raises(CurvatureError, match="DETERMINISTIC_MEMORY") as caught:
        PINNED.affords_exact(10, 9)
    assert caught.value.metadata == {"needed_bytes": "10", "available_bytes": "9"}
    assert PINNED.at_once(3, each_bytes=10, room_bytes=30) == 3
    assert [FLEXIBLE.at_once(3, each_bytes=10, room_bytes=each) for each in (29, 9, -1)] == [
        2,
        0,
        0,
    ]
    with pytest.raises(CurvatureError, match="DETERMINISTIC_MEMORY"):
        PINNED.at_once(3, each_bytes=10, room_bytes=29)


@given(
    k=st.integers(1, 400),
    num_lanczos_vectors=st.none() | st.integers(1, 500),
    max_products=st.none() | st.integers(1, 900),
    dimension=st.integers(2, 500),
    num_ranks=st.integers(1, 4),
    padding=st.integers(0, 9),
    total_bytes=st.integers(1, 1 << 21),
    used=st.floats(0, 1),
)
def test_what_is_refused_before_it_is_queued_no_rank_would_run(
    k: int,
    num_lanczos_vectors: int | None,
    max_products: int | None,
    dimension: int,
    num_ranks: int,
    padding: int,
    total_bytes: int,
    used: float,
) -> None:
    spec = EigshSpec(k=k, num_lanczos_vectors=num_lanczos_vectors, max_products=max_products)
    asked = cost(spec, dimension)
    assume(total_bytes < needed_bytes(asked.least_vectors, 4 * dimension / num_ranks))
    with pytest.raises(CurvatureError):
        FLEXIBLE.room_for(
            asked,
            vector_bytes=4 * (-(-dimension // num_ranks) + padding),
            available_bytes=int(total_bytes * (1 - used)),
        )


def test_the_default_micro_batch_gives_every_rank_work() -> None:
    assert default_micro_batch(8, 64, 2, "cpu") == 4
    assert default_micro_batch(8, 256, 2, "cpu") == 2
    assert default_micro_batch(1, 4096, 3, "cpu") == 1
    assert default_micro_batch(100, 16, 3, "cpu") == 32
    assert default_micro_batch(16, 2048, 2, "cuda") == 4
