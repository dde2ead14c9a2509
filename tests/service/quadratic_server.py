"""A server on the quadratic backend, whose products take a moment: it starts without torch.

Usage: as `hvp serve`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from hvp_service.app import server

from tests.service.quadratic_backend import QuadraticBackend

PRODUCT_S = 0.05


class SlowBackend(QuadraticBackend):  # type: ignore[misc]  # final for everybody else
    """A backend whose products take a moment."""

    async def _pass_gate(self) -> None:
        await asyncio.sleep(PRODUCT_S)


def open_backend(**_: Any) -> SlowBackend:
    """In the place of the ranks' own."""
    return SlowBackend()


if __name__ == "__main__":
    vars(server)["open_backend"] = open_backend
    sys.exit(server.main())
