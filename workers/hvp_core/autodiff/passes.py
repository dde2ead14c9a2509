"""How a product goes through the blocks, and what they keep of it on the way forward."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: What a block keeps of a product on the way forward (see `block_dual.py`).
Retention = Literal["fast", "lean", "shared"]


class Passes(NamedTuple):
    """How a product goes through the blocks before the last.

    Attributes:
        forward: `value`: blocks hand on their values y alone; `tangent`: tangents ẏ beside them.
        backward: `none`: nothing goes back; `cotangent`: one cotangent ȳ for each product; `pair`:
            the gradient's cotangent ȳ and its tangent ȳ̇, which needs tangents forward.
    """

    forward: Literal["value", "tangent"]
    backward: Literal["none", "cotangent", "pair"]

    @property
    def keeps(self) -> bool:
        """Whether later products can use the primal half: they take it forward and backward."""
        return self.forward == "tangent" and self.backward != "none"


#: The passes of the loss: forward alone, without tangents.
VALUE = Passes("value", "none")
