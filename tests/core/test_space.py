"""The canonical order, its cut over ranks, and seeded vectors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.probes import fill, philox4x32
from hvp_core.vectors.space import ParameterSpace, partial_products
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, world_size=st.integers(1, 5), data=st.data())
def test_every_index_is_on_exactly_one_rank(
    shapes: list[list[int]], world_size: int, data: st.DataObject
) -> None:
    names = {f"p{i}": shape for i, shape in enumerate(shapes)}
    users = data.draw(st.lists(st.sets(st.sampled_from(list(names))), max_size=4))
    layout = Layout(names, users, world_size)
    seen = torch.zeros(layout.numel)
    for rank in range(world_size):
        for run in layout.runs(rank):
            seen[run.flat_start : run.flat_stop] += 1
            assert run.shard_offset + run.flat_stop - run.flat_start <= layout.shard_numel
    assert bool((seen == 1).all())


@settings(max_examples=30, deadline=None)
@given(shapes=shapes, world_size=st.integers(1, 4))
def test_a_gathered_segment_holds_its_parameters(shapes: list[list[int]], world_size: int) -> None:
    names = {f"p{i}": shape for i, shape in enumerate(shapes)}
    layout = Layout(names, [list(names)[::2], list(names)[1::2]], world_size)
    flat = torch.arange(layout.numel).float()
    shards = []
    for rank in range(world_size):
        shard = torch.zeros(layout.shard_numel)
        for run in layout.runs(rank):
            length = run.flat_stop - run.flat_start
            shard[run.shard_offset : run.shard_offset + length] = flat[
                run.flat_start : run.flat_stop
            ]
        shards.append(shard)
    for segment in layout.segments:
        place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
        views = segment.views(torch.cat([shard[place] for shard in shards]))
        for parameter in segment.parameters:
            expected = flat[parameter.offset : parameter.offset + parameter.numel]
            assert torch.equal(views[parameter.name].reshape(-1), expected)


def test_a_tensor_that_two_blocks_use_is_a_segment_of_its_own() -> None:
    layout = Layout(
        {"embed": [4], "a": [2], "b": [3], "norm": [2]},
        [["embed"], ["a", "b"], ["norm", "embed"]],
        2,
    )
    assert [[p.name for p in s.parameters] for s in layout.segments] == [
        ["embed"],
        ["a", "b"],
        ["norm"],
    ]
    assert layout.block_segments == ((0,), (1,), (0, 2))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: list[int], key: int, expected: list[int]
) -> None:
    assert philox4x32(torch.tensor(counter)[:, None], key)[:, 0].tolist() == expected


@given(start=st.integers(0, 40), length=st.integers(1, 30), seed=st.integers(0, 2**64 - 1))
@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_any_stretch_of_a_seeded_vector_is_the_same(
    law: str, start: int, length: int, seed: int
) -> None:
    whole = torch.empty(80, dtype=torch.float64)
    fill(whole, 0, seed, law)  # type: ignore[arg-type]
    part = torch.empty(length, dtype=torch.float64)
    fill(part, start, seed, law)  # type: ignore[arg-type]
    assert torch.equal(part, whole[start : start + length])


def test_seeded_vectors_have_the_moments_of_their_law() -> None:
    n = 400_000
    v = torch.empty(n, dtype=torch.float64)
    fill(v, 0, 1, "gaussian")
    sigma = n**-0.5
    assert abs(float(v.mean())) < 5 * sigma
    assert abs(float(v.var()) - 1) < 5 * sigma * 2**0.5
    assert abs(float((v**4).mean()) - 3) < 5 * sigma * 96**0.5
    fill(v, 0, 1, "rademacher")
    assert set(v.tolist()) == {1.0, -1.0}
    assert abs(float(v.mean())) < 5 * sigma


def small_space() -> ParameterSpace:
    return ParameterSpace(
        Layout({"a": [3, 2], "b": [5]}, [["a"], ["b"]], 1),
        Alone(),
        torch.float64,
        torch.device("cpu"),
    )


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_inner_products_lose_nothing_of_a_vector_with_a_few_large_elements(num_rows: int) -> None:
    """Added one by one in float32, what follows 4096² in a register would not count at all."""
    rows = torch.ones(num_rows, 3 << 17)
    rows[:, :: 1 << 16] = 4096
    exact = rows.double() @ rows[0].double()
    assert (partial_products(rows, rows[0]) / exact - 1).abs().max() < 1e-5
    wide = partial_products(rows.double(), rows[0].double())
    assert (wide / exact - 1).abs().max() < 1e-14


@pytest.mark.parametrize("num_rows", [1, 8])
def test_inner_products_of_signs_round_no_way_in_particular(num_rows: int) -> None:
    """Added one by one, the few numbers that such products are would be rounded alike each time."""
    generator = torch.Generator().manual_seed(0)
    v = (2 * torch.randint(2, (10**6,), generator=generator) - 1).double() / 1000
    product = 2 * v
    product[1:] -= v[:-1]
    product[:-1] -= v[1:]
    true = math.fsum((v * product).tolist())
    found = partial_products(v.repeat(num_rows, 1), product)
    assert (found / true - 1).abs().max() < 1e-15


def test_a_vector_survives_its_file(tmp_path: Path) -> None:
    space = small_space()
    v = space.random(3, "sphere")
    assert space.norm(v) == pytest.approx(1, abs=1e-15)
    space.write(v, tmp_path / "v")
    assert torch.equal(space.read(tmp_path / "v"), v)
    assert (tmp_path / "v").read_bytes() == space.to_flat(v).numpy().tobytes()


def test_a_file_of_another_length_or_with_nan_is_refused(tmp_path: Path) -> None:
    space = small_space()
    (tmp_path / "short").write_bytes(bytes(8 * 10))
    with pytest.raises(CurvatureError, match="SHAPE_MISMATCH"):
        space.read(tmp_path / "short")
    v = torch.zeros(11, dtype=torch.float64)
    v[7] = torch.nan
    (tmp_path / "nan").write_bytes(v.numpy().tobytes())
    with pytest.raises(CurvatureError) as caught:
        space.read(tmp_path / "nan")
    assert (caught.value.reason, caught.value.metadata["index"]) == ("NON_FINITE", "7")


@given(world_size=st.integers(1, 4), bounds=st.tuples(st.integers(0, 11), st.integers(0, 11)))
def test_a_range_is_written_by_the_ranks_that_hold_it_into_a_file_of_that_length(
    world_size: int, bounds: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    start, stop = sorted(bounds)
    layout = Layout({"a": [3, 2], "b": [5]}, [["a"], ["b"]], world_size)
    flat = torch.arange(11, dtype=torch.float64)
    path = tmp_path_factory.mktemp("range") / "part"
    for rank in range(world_size):
        alone = Alone()  # of several ranks that write one after another
        alone.rank = rank
        space = ParameterSpace(layout, alone, torch.float64, torch.device("cpu"))
        space.write(space.from_flat(flat), path, start, stop)
    assert path.read_bytes() == flat[start:stop].numpy().tobytes()
