"""Block-diagonal operators, computed on the ranks, against the dense matrix without the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hvp_client import AsyncClient, Client, InvalidArgumentError, Operator
from hvp_protos.v1 import operator_pb2

from tests.client.conftest import Server
from tests.client.test_sums import Matrix, close, diagonal, ggn, numbers, small_hessian

__all__ = ["small_hessian"]  # the fixture `small`


def within(H: Operator, groups: list[Any]) -> Matrix:
    """Ones in the diagonal blocks of groups of parameters."""
    of = np.concatenate(
        [
            np.full(math.prod(each.shape), [each.name in group for group in groups].index(True))
            for each in H.parameter_tensors
        ]
    )
    ones: Matrix = np.equal.outer(of, of).astype(np.float64)
    return ones


def layers(H: Operator) -> list[Any]:
    return [each.parameter_names for each in H.blocks().values()]


def test_products_are_those_of_the_matrix_without_what_couples_the_blocks(
    client: Client, small: Operator, dense: Matrix, dense_ggn: Matrix
) -> None:
    H, G, n = small, ggn(client, small), small.shape[0]
    eye, d, V = np.eye(n), diagonal(n), numbers(n)
    by_layer, by_tensor = within(H, layers(H)), within(H, [[name] for name in H.parameter_names])
    root = d**-0.5
    B = H.block_diagonal()
    two = {"attention": "*.self_attn.*", "rest": ["*.mlp.*", "*norm*", "*embed*"]}
    attention = [name for name in H.parameter_names if ".self_attn." in name]
    halves = within(H, [attention, [name for name in H.parameter_names if name not in attention]])
    cases: list[tuple[Operator, Matrix, str]] = [
        (B, by_layer * dense, "block_diagonal[layer](hessian)"),
        (H.block_diagonal("tensor"), by_tensor * dense, "block_diagonal[tensor](hessian)"),
        (H.block_diagonal(two), halves * dense, "block_diagonal[2 blocks](hessian)"),
        (
            2.0 * B + 1e-3 * client.identity(H),
            2 * by_layer * dense + 1e-3 * eye,
            "block_diagonal[layer](2 hessian) + 0.001 identity",
        ),
        (
            B - G.block_diagonal(),
            by_layer * (dense - dense_ggn),
            "block_diagonal[layer](hessian - ggn)",
        ),
        (
            (H - G).preconditioned(d).block_diagonal(),
            root[:, None] * by_layer * (dense - dense_ggn) * root,
            "D^-1/2 (block_diagonal[layer](hessian - ggn)) D^-1/2",
        ),
        (
            client.identity(H) + B.preconditioned(d),
            root[:, None] * by_layer * dense * root + eye,
            "D^-1/2 (block_diagonal[layer](hessian)) D^-1/2 + identity",
        ),
    ]
    for operator, matrix, kind in cases:
        assert isinstance(operator, Operator)
        assert operator.kind == kind
        close(operator @ V, matrix @ V)
        v = operator.random_vector(seed=1)
        assert operator.quadratic(v) == pytest.approx(v.numpy() @ matrix @ v.numpy(), rel=1e-9)
    assert not isinstance(B + H, Operator)  # SciPy's sum of two on this side


def test_questions_are_answered_of_the_block_diagonal_matrix(
    client: Client, small: Operator, dense: Matrix, dense_ggn: Matrix
) -> None:
    H = small
    matrix = within(H, layers(H)) * dense
    B = H.block_diagonal()
    found = B.eigsh(2, "LA", tol=1e-8).result()
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix)[-2:], rtol=1e-6)
    assert found.provenance["operator"] == "block_diagonal[layer](hessian)"
    nothing = B.block_mass().result()
    assert (nothing.off_block_fraction, nothing.low, nothing.outcome) == (0, 0, "CONVERGED")
    b = numbers(H.shape[0], 1)[:, 0]
    G = ggn(client, H).block_diagonal("tensor")
    x = np.asarray(G.solve(b, damping=0.1, method="cg", tol=1e-9).result().x[0])
    tensors = within(H, [[name] for name in H.parameter_names]) * dense_ggn
    assert np.linalg.norm(tensors @ x + 0.1 * x - b) <= 1.01e-9 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (["model.*", "*.mlp.*"], "PARAMETERS_INVALID"),
        (["*.mlp.*"], "PARAMETERS_INVALID"),
        (["nothing.*"], "PARAMETERS_NOT_FOUND"),
        ("row", "PARAMETERS_INVALID"),
        (None, "PARAMETERS_INVALID"),
    ],
)
def test_blocks_that_cannot_be_are_refused(small: Operator, by: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        small.block_diagonal(by)
    assert (refusal.value.reason, refusal.value.field) == (reason, "by")


def test_an_operator_is_block_diagonal_once(small: Operator) -> None:
    with pytest.raises(InvalidArgumentError, match="already") as refusal:
        small.block_diagonal().block_diagonal("tensor")
    assert refusal.value.reason == "TERMS_INVALID"


async def test_a_server_refuses_what_the_sdk_would_not_send(
    server: Server, small: Operator
) -> None:
    Kind = operator_pb2.OperatorSpec.Kind
    word, none = operator_pb2.Partition(per="row"), operator_pb2.Partition()
    block = operator_pb2.Block(name="a", parameters=["x"])
    cases = [
        (Kind.KIND_JACOBIAN, operator_pb2.Partition(per="layer"), "OPERATOR_NOT_SYMMETRIC"),
        (Kind.KIND_GGN, word, "PARAMETERS_INVALID"),
        (Kind.KIND_GGN, none, "PARAMETERS_INVALID"),
        (Kind.KIND_GGN, operator_pb2.Partition(blocks=[block]), "PARAMETERS_NOT_FOUND"),
    ]
    async with AsyncClient(server.address) as client:
        for kind, blocks, reason in cases:
            spec = operator_pb2.OperatorSpec(
                checkpoint=small.checkpoint, data_batch=small.batch, kind=kind, blocks=blocks
            )
            with pytest.raises(InvalidArgumentError, match=reason):
                await client._session.wire.unary(
                    "OperatorService/DescribeOperator",
                    operator_pb2.DescribeOperatorRequest(operator=spec),
                    operator_pb2.DescribeOperatorResponse,
                )
