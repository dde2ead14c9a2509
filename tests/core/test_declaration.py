"""What a registered family may declare of its batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hvp_batches.schema import BatchField
from hvp_core.errors import CurvatureError
from hvp_core.model.declaration import check_declaration


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"kind": "float"}, "x", "its kind is 'float'; possible are integer and number"),
        ({"dims": "n"}, "x", "its dims are 'n'; possible is a tuple of 'n'"),
        ({"dims": ()}, "x", r"its dims are \(\); possible is a tuple"),
        ({"dims": ("s", "n")}, "x", "dimension 0 of it is 's'; possible"),
        ({"dims": ("n", 4)}, "x", "dimension 1 of it is 4; possible"),
        ({"dims": ("n", "0")}, "x", "dimension 1 of it is '0'; possible"),
        ({"dims": ("n", "a b")}, "x", "dimension 1 of it is 'a b'; possible"),
        ({"minimum": 3, "maximum": 2}, "x", "its minimum is 3 and its maximum 2; possible"),
        ({"name": ""}, "", "'' is no name of a field: a letter or _, then"),
        ({"name": "y"}, "y", "declared twice"),
    ],
)
def test_a_bad_declaration_is_named_with_its_family_its_field_and_what_is_possible(
    change: dict[str, Any], field: str, words: str
) -> None:
    x = replace(BatchField(name="x", kind="number", dims=("n", "4")), **change)
    y = BatchField(name="y", kind="integer", dims=("n",))
    with pytest.raises(CurvatureError, match=words) as refused:
        check_declaration("Mine", [x, y], outputs=("n", "3"), targets="y")
    assert refused.value.reason == "MODEL_UNSUPPORTED"
    assert refused.value.metadata == {"family": "Mine", "field": field}
    assert refused.value.message.startswith("Mine")


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (("n", "classes"), "y", "outputs is .*of the symbols that its fields have: n"),
        (("3",), "y", "outputs is"),
        ((), "y", "outputs is"),
        (("n", "3"), "z", "targets is 'z'; possible is the name of one of its fields"),
        (("n", "3"), "", "targets is ''; possible"),
    ],
)
def test_outputs_and_targets_are_of_the_fields(
    outputs: tuple[str, ...], targets: str, words: str
) -> None:
    x = BatchField(name="x", kind="number", dims=("n", "4"))
    y = BatchField(name="y", kind="integer", dims=("n",))
    with pytest.raises(CurvatureError, match=words) as refused:
        check_declaration("Mine", [x, y], outputs=outputs, targets=targets)
    assert refused.value.reason == "MODEL_UNSUPPORTED"
    check_declaration("Mine", [x, y], outputs=None, targets=targets)
