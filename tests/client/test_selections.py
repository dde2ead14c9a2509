"""Operators on some of the parameters, through a server: rows and columns of the whole matrix."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest
from hvp_client import AsyncClient, Batch, Checkpoint, Client, InvalidArgumentError, Operator
from numpy.typing import NDArray

from tests.client.conftest import HVP, Server

ATTENTION = "model.layers.0.self_attn.[kv]_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def S(client: Client, checkpoint: Checkpoint, batch: Batch) -> Operator:  # noqa: N802
    """On keys, values and the last norm."""
    return client.operator(checkpoint, batch, dtype="float64", parameters=[ATTENTION, NORM])


def indices(H: Operator, names: Sequence[str]) -> NDArray[np.int64]:
    """Of the elements of these parameters in vectors of all."""
    return np.concatenate(
        [
            np.arange(each.offset, each.offset + each.num_elements)
            for each in H.parameter_tensors
            if each.name in names
        ]
    )


def submatrix(H: Operator, at: NDArray[np.int64]) -> NDArray[np.float64]:
    """Some of the rows and columns of the matrix of all, by products with it."""
    columns = np.zeros((H.shape[0], len(at)))
    columns[at, np.arange(len(at))] = 1
    found: NDArray[np.float64] = (H @ columns)[at]
    return found


def test_its_vectors_have_the_length_and_the_names_of_the_selection(
    S: Operator, H: Operator, checkpoint: Checkpoint
) -> None:
    known = [each.name for each in checkpoint.parameters]
    names = [name for name in known if "k_proj" in name or "v_proj" in name] + [NORM]
    assert list(S.parameter_names) == names
    assert S.shape == (len(indices(H, names)),) * 2
    assert S.selection == (ATTENTION, NORM)
    assert ATTENTION in repr(S)
    assert H.parameter_tensors == checkpoint.parameters
    assert H.selection == ()
    v = S.random_vector(seed=3)
    assert v.parameters == S.selection
    assert v.shape == (S.shape[0],)
    parts = v.named()
    assert list(parts) == names
    np.testing.assert_array_equal(
        np.concatenate([part.ravel() for part in parts.values()]), v.numpy()
    )
    np.testing.assert_array_equal(v[NORM], parts[NORM])
    theta, part = H.parameters().numpy(), S.parameters().numpy()
    np.testing.assert_array_equal(part, theta[indices(H, names)])


def test_products_are_rows_and_columns_of_the_matrix_of_all(S: Operator, H: Operator) -> None:
    at = indices(H, S.parameter_names)
    matrix = submatrix(H, at)
    v = S.random_vector(seed=1)
    np.testing.assert_allclose((S @ v).numpy(), matrix @ v.numpy(), atol=1e-11)
    np.testing.assert_allclose(S.gradient().numpy(), H.gradient().numpy()[at], atol=1e-12)
    assert S.loss() == pytest.approx(H.loss(), rel=1e-14)
    w = np.arange(len(at), dtype=float)
    assert S.quadratic(w) == pytest.approx(w @ matrix @ w, rel=1e-9)
    assert (v + S.zeros()).norm() == v.norm()


def test_every_kind_is_restricted_alike(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    for kind in ("ggn", "empirical_fisher_token", "empirical_fisher_sequence"):
        whole = client.operator(checkpoint, batch, kind=kind, dtype="float64")
        part = whole.restrict("*.mlp.*")
        assert part.kind == kind
        at = indices(whole, part.parameter_names)
        v = part.random_vector(seed=2).numpy()
        padded = np.zeros(whole.shape[0])
        padded[at] = v
        np.testing.assert_allclose(part @ v, (whole @ padded)[at], atol=1e-12)


def test_a_jacobian_has_the_columns_and_all_the_outputs(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    whole = client.jacobian(checkpoint, batch, dtype="float64")
    part = client.jacobian(checkpoint, batch, dtype="float64", parameters="*.mlp.*")
    assert part.output_shape == whole.output_shape
    names = [each.name for each in part.parameter_tensors]
    at = indices(client.operator(checkpoint, batch, dtype="float64"), names)
    u = part.T.random_vector(seed=4)  # outputs are outputs, whatever is selected
    np.testing.assert_allclose((part.T @ u).numpy(), (whole.T @ u).numpy()[at], atol=1e-12)
    narrower = whole.T.restrict(NORM)
    assert narrower.shape == (8, whole.shape[0])
    np.testing.assert_allclose((narrower @ u).numpy(), (whole.T @ u)[NORM].ravel())


def test_jobs_run_on_a_selection(S: Operator, H: Operator) -> None:
    at = indices(H, S.parameter_names)
    matrix = submatrix(H, at)
    expected = np.linalg.eigvalsh(matrix)
    job = S.eigsh(k=3, which="LA")
    pairs = job.result()
    np.testing.assert_allclose(np.sort(pairs.eigenvalues), expected[-3:], rtol=1e-6)
    top = pairs.eigenvectors[0]
    assert top.parameters == S.selection
    assert top.shape == (len(at),)
    np.testing.assert_allclose((S @ top).numpy(), matrix @ top.numpy(), atol=1e-10)
    assert job.spec["parameters"] == [ATTENTION, NORM]
    density = S.density(num_probes=2, num_steps=len(at), seed=1).result()
    assert float(np.sum(density.weights[0])) == pytest.approx(1)
    nodes = np.concatenate([np.asarray(each) for each in density.nodes])
    assert expected[0] - 1e-9 <= nodes.min()
    assert nodes.max() <= expected[-1] + 1e-9


def test_blocks_are_disjoint_have_all_parameters_and_stand_on_the_diagonal(H: Operator) -> None:
    blocks = H.blocks()
    assert list(blocks) == ["model.embed_tokens", "model.layers.0", "model.norm"]
    names = [name for block in blocks.values() for name in block.parameter_names]
    assert sorted(names) == sorted(H.parameter_names)
    for block in blocks.values():
        at = indices(H, block.parameter_names)
        padded = np.zeros(H.shape[0])
        padded[at] = 1
        np.testing.assert_allclose(block @ np.ones(len(at)), (H @ padded)[at], atol=1e-11)
    assert list(H.restrict("*norm*").blocks("tensor")) == list(H.restrict("*norm*").parameter_names)
    two = H.blocks([["*norm*"], ["*proj*", "*embed*"]])
    assert list(two) == ["*norm*", "*proj*, *embed*"]
    named = H.blocks({"norms": "*norm*", "rest": ["*proj*", "*embed*"]})
    assert named["norms"].parameter_names == two["*norm*"].parameter_names
    with pytest.raises(InvalidArgumentError, match="two blocks") as caught:
        H.blocks([["*norm*"], ["*"]])
    assert caught.value.reason == "PARAMETERS_INVALID"
    with pytest.raises(InvalidArgumentError, match="in no block"):
        H.blocks([["*norm*"]])
    with pytest.raises(InvalidArgumentError, match="Two blocks have the same patterns"):
        H.blocks([["*"], ["*"]])
    for by in ("rows", 3, None):
        with pytest.raises(InvalidArgumentError, match="'layer', 'tensor'") as caught:
            H.blocks(by)  # type: ignore[arg-type]
        assert caught.value.reason == "PARAMETERS_INVALID"


def test_a_restriction_is_among_the_parameters_that_are_left(S: Operator) -> None:
    inner = S.restrict("*.k_proj.*")
    assert inner.parameter_names == ("model.layers.0.self_attn.k_proj.weight",)
    with pytest.raises(InvalidArgumentError, match=r"k_proj") as caught:
        inner.restrict("*.v_proj.*")
    assert (caught.value.reason, caught.value.field) == ("PARAMETERS_NOT_FOUND", "parameters")


def test_a_restriction_takes_patterns_one_by_one_or_in_one_list(
    client: Client, checkpoint: Checkpoint, batch: Batch, S: Operator
) -> None:
    for one_by_one, in_a_list in (
        (S.restrict("*.k_proj.*", NORM), S.restrict(["*.k_proj.*", NORM])),
        (S.restrict("*norm*"), S.restrict(("*norm*",))),
    ):
        assert in_a_list.parameter_names == one_by_one.parameter_names
    J = client.jacobian(checkpoint, batch, dtype="float64")
    assert J.T.restrict(["*norm*", "*.mlp.*"]).shape == J.restrict("*norm*", "*.mlp.*").T.shape
    for nothing in ((), ([],), ([NORM], "*.k_proj.*"), ([[NORM]],)):
        with pytest.raises(InvalidArgumentError) as caught:
            S.restrict(*nothing)
        assert (caught.value.reason, caught.value.field) == ("PARAMETERS_INVALID", "parameters")


@pytest.mark.parametrize("glob", ["*.v_prj.*", f"model.{'x' * 300}.weight", ""], ids=len)
def test_sdk_and_server_refuse_a_pattern_in_the_same_words(
    client: Client, checkpoint: Checkpoint, batch: Batch, H: Operator, glob: str
) -> None:
    with pytest.raises(InvalidArgumentError) as early:
        H.restrict(glob)
    with pytest.raises(InvalidArgumentError) as late:
        client.operator(checkpoint, batch, parameters=glob)
    assert (early.value.reason, early.value.message) == (late.value.reason, late.value.message)
    assert early.value.message[0].isupper()
    assert early.value.message.endswith(".")
    with pytest.raises(KeyError, match=r"No parameter is called 'model.*nearest are"):
        H.random_vector(seed=0)["model.norm"]


def test_two_ways_to_say_the_same_give_one_space_and_others_do_not_mix(
    client: Client, checkpoint: Checkpoint, batch: Batch, S: Operator, H: Operator
) -> None:
    names = S.parameter_names
    same = client.operator(checkpoint, batch, dtype="float64", parameters=reversed(names))
    v = S.random_vector(seed=5)
    np.testing.assert_array_equal((same @ v).numpy(), (S @ v).numpy())
    assert (v - same.random_vector(seed=5)).norm() == 0
    everything = client.operator(checkpoint, batch, dtype="float64", parameters="*")
    assert (H @ everything.random_vector(seed=1)).shape == H.shape[:1]
    for wrong in (H, S.restrict(NORM)):
        with pytest.raises(InvalidArgumentError) as caught:
            wrong @ v
        assert caught.value.reason == "VECTOR_SPACE_MISMATCH"
        with pytest.raises(InvalidArgumentError) as caught:
            v + wrong.random_vector(seed=1)
        assert caught.value.reason == "VECTOR_SPACE_MISMATCH"
    with pytest.raises(InvalidArgumentError, match=str(S.shape[0])) as caught:
        S.vector(np.ones(H.shape[0]))
    assert caught.value.reason == "SHAPE_MISMATCH"


@pytest.mark.parametrize(
    ("globs", "reason", "words"),
    [
        (["model.layer.0.*"], "PARAMETERS_NOT_FOUND", "model.layers.0"),
        ([NORM, "lm_head.weight"], "PARAMETERS_NOT_FOUND", "tied"),
        ([""], "PARAMETERS_INVALID", "from 1 to 512"),
        (["x" * 513], "PARAMETERS_INVALID", "513"),
        (["*"] * 65, "PARAMETERS_INVALID", "64"),
        ([], "PARAMETERS_INVALID", "selects all"),
        ([3], "PARAMETERS_INVALID", "patterns of names"),
        (["\ud800"], "PARAMETERS_INVALID", "no pattern of names"),
    ],
)
def test_what_selects_nothing_is_refused_with_the_nearest_names(
    client: Client, checkpoint: Checkpoint, batch: Batch, globs: list[str], reason: str, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        client.operator(checkpoint, batch, parameters=globs)
    assert caught.value.reason == reason
    assert caught.value.field.startswith(("operator.parameters", "parameters"))


async def test_the_awaited_side_has_it_too(server: Server, llama_dir: object) -> None:
    async with AsyncClient(server.address) as client:
        checkpoint = await client.upload_checkpoint(str(llama_dir))
        batch = await client.upload_batch({"input_ids": [[1, 2, 3, 4]]})
        H = await client.operator(checkpoint, batch, parameters=NORM)
        assert H.shape == (8, 8)
        blocks = await H.blocks("tensor")
        assert list(blocks) == [NORM]
        assert (await (blocks[NORM] @ await H.zeros())).shape == (8,)


def test_the_command_takes_patterns_and_the_listing_shows_them(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    command = [str(HVP), "eigsh", "--checkpoint", checkpoint.name, "--ids", batch.name, "-k", "1"]
    command += ["--parameters", ATTENTION, "--parameters", NORM, "--format", "json"]
    env = {**os.environ, "HVP_ADDRESS": server.address}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    listed = subprocess.run(
        [str(HVP), "jobs"], capture_output=True, text=True, env=env, check=True
    ).stdout
    line = next(each for each in listed.splitlines() if found["job"].rpartition("/")[2] in each)
    assert f"in {ATTENTION}, {NORM}" in line
