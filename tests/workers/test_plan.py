"""What is decided before a request runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hvp_core.errors import CurvatureError
from hvp_core.policy import Policy
from hvp_workers.backend import EigshSpec, Tuning
from hvp_workers.eigsh_size import least_bytes
from hvp_workers.micro_batch import default_micro_batch
from hvp_workers.plan import plan_eigsh, policy
from hypothesis import assume, given
from hypothesis import strategies as st

PLAIN = Policy(schedule="auto", budget_bytes=250, compile=False, graphs=False, precision="full")


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
    device: str, tuning: Tuning, expected: Policy
) -> None:
    assert policy("full", tuning, device=device, available_bytes=1000) == expected


def test_the_precision_is_the_operators() -> None:
    assert policy("tf32", Tuning(), device="cuda", available_bytes=0).precision == "tf32"


@pytest.mark.parametrize("k", [1, 300, 535])
def test_the_servers_own_budget_finds_and_certifies_as_many_pairs_as_were_asked_for(k: int) -> None:
    spec = EigshSpec(k=k, which="LA")
    plan = plan_eigsh(spec, dimension=536, vector_bytes=1, available_bytes=10**6)
    assert plan.max_products >= 2 * k


def test_a_basis_shrinks_to_the_memory_there_is_and_no_further() -> None:
    spec = EigshSpec(k=6, which="BE")
    assert plan_eigsh(spec, dimension=1000, vector_bytes=1, available_bytes=10**6).num_vectors == 40
    less = plan_eigsh(spec, dimension=1000, vector_bytes=100, available_bytes=4000)
    assert less.num_vectors == 32 - 10
    with pytest.raises(Exception, match="INSUFFICIENT_CLUSTER_MEMORY"):
        plan_eigsh(spec, dimension=1000, vector_bytes=100, available_bytes=2900)


@given(
    k=st.integers(1, 400),
    num_lanczos_vectors=st.integers(0, 500),
    max_products=st.integers(0, 900),
    dimension=st.integers(2, 500),
    num_ranks=st.integers(1, 4),
    padding=st.integers(0, 9),
    total_bytes=st.integers(1, 1 << 21),
    used=st.floats(0, 1),
)
def test_what_is_refused_before_it_is_queued_no_rank_would_run(
    k: int,
    num_lanczos_vectors: int,
    max_products: int,
    dimension: int,
    num_ranks: int,
    padding: int,
    total_bytes: int,
    used: float,
) -> None:
    spec = EigshSpec(k=k, num_lanczos_vectors=num_lanczos_vectors, max_products=max_products)
    needed = least_bytes(spec, dimension=dimension, vector_bytes=4 * dimension / num_ranks)
    assume(total_bytes < needed)
    with pytest.raises(CurvatureError):
        plan_eigsh(
            spec,
            dimension=dimension,
            vector_bytes=4 * (-(-dimension // num_ranks) + padding),
            available_bytes=int(total_bytes * (1 - used)),
        )


def test_the_default_micro_batch_gives_every_rank_work() -> None:
    assert default_micro_batch(8, 64, 2, "cpu") == 4
    assert default_micro_batch(8, 256, 2, "cpu") == 2
    assert default_micro_batch(1, 4096, 3, "cpu") == 1
    assert default_micro_batch(100, 16, 3, "cpu") == 32
    assert default_micro_batch(16, 2048, 2, "cuda") == 4
