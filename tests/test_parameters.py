"""Patterns of parameters' names: what they select, and what they are refused with."""

from __future__ import annotations

import pytest
from hvp_operations.operation import SpecError
from hvp_operations.parameters import MOST_NAMES, MOST_PATTERNS, select
from hvp_operations.wording import clipped, shown

NAMES = ["embed.weight", "layers.0.mlp.w", "layers.0.norm.w", "layers.1.mlp.w", "norm.w", "odd[0]"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ([], NAMES),
        (["*"], NAMES),
        (["norm.w", "layers.0.mlp.w"], ["layers.0.mlp.w", "norm.w"]),
        (["layers.*.w", "layers.0.*"], ["layers.0.mlp.w", "layers.0.norm.w", "layers.1.mlp.w"]),
        (["layers.?.mlp.*"], ["layers.0.mlp.w", "layers.1.mlp.w"]),
        (["layers.[1-9].*"], ["layers.1.mlp.w"]),
        (["odd[0]"], ["odd[0]"]),
    ],
)
def test_whole_names_are_selected_in_their_own_order(globs: list[str], expected: list[str]) -> None:
    assert list(select(globs, NAMES)) == expected


@pytest.mark.parametrize("glob", ["layer.0.*", "LAYERS.0.*", "layers.0", "*.mpl.*"])
def test_a_pattern_that_selects_nothing_names_its_neighbours(glob: str) -> None:
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.w") as caught:
        select(["norm.w", glob], NAMES, "operator.parameters")
    assert caught.value.reason == "PARAMETERS_NOT_FOUND"
    assert caught.value.field == "operator.parameters"
    assert caught.value.metadata["glob"] == glob


def test_a_long_pattern_is_told_by_its_beginning_and_its_end() -> None:
    with pytest.raises(SpecError) as caught:
        select([f"model.{'x' * 400}.weight"], NAMES)
    assert caught.value.message.startswith("No parameter is called 'model.xxx")
    assert "xxx.weight'; the nearest are " in caught.value.message
    assert len(caught.value.message) < 300
    assert len(clipped("x" * 81)) == len(clipped("x" * 80)) == 80
    assert shown(["x" * 400]) == f"['{'x' * 55}...{'x' * 18}']"


def test_there_is_a_bound_on_patterns_and_on_their_length() -> None:
    select(["norm.w"] * MOST_NAMES, NAMES)
    select(["norm*"] * MOST_PATTERNS, NAMES)
    for globs in (
        ["norm.w"] * (MOST_NAMES + 1),
        ["norm*"] * (MOST_PATTERNS + 1),
        [""],
        ["n" * 513],
    ):
        with pytest.raises(SpecError) as caught:
            select(globs, NAMES)
        assert caught.value.reason == "PARAMETERS_INVALID"


def test_patterns_that_would_be_slow_to_compare_are_not() -> None:
    glob = "*a" * 200 + "b"
    with pytest.raises(SpecError):
        select([glob], ["a" * 500] * 20)
