"""What the SDK gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hvp_operations.operation import Table
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentsResult:
    """The moments (degree + 1,), from degree 0."""

    moments: NDArray[np.float64]
    num_products: int
    loss: float
    provenance: Mapping[str, str]

    def table(self) -> Table:
        """A row for each."""
        rows = enumerate(self.moments)
        return Table(
            headings=("degree", "moment"), rows=tuple((str(j), f"{m:.8g}") for j, m in rows)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"moments": self.moments.tolist(), "num_products": self.num_products}
