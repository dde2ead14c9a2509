"""How a product goes through the blocks, and what they keep of it on the way forward."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: What a block keeps of a product on the way forward (see `block_dual.py`).
Retention = Literal["fast", "lean", "shared"]


class Passes(NamedTuple):
    """How a product goes through the blocks before the last.

    Attributes:
        forward: With values y alone, or with tangents ẏ beside them.
        backward: Not at all; with one cotangent ȳ for each product; or with the pair of the
            gradient's cotangent ȳ and its tangent ȳ̇, which needs tangents forward.
    """

    forward: Literal["value", "tangent"]
    backward: Literal["none", "cotangent", "pair"]

    @property
    def keeps(self) -> bool:
        """Whether a primal half is worth keeping for later products: they take it both ways."""
        return self.forward == "tangent" and self.backward != "none"


#: Forward alone, without tangents.
VALUE = Passes("value", "none")
