"""A server whose products take ten minutes, for tests that stop it in the midst of one.

Usage: python -m tests.service.slow_server MARK, and then as `hvp serve`. The file MARK appears when
a rank is within a product.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "HVP_TEST_MARK"  # one of the variables that reach a rank


def slow_engine(collective: object, device: str, tuning: object) -> object:
    """A rank's engine, of which every step of a run is slow."""
    import torch
    from hvp_workers.engine import RankEngine

    engine = RankEngine(collective, device, tuning)  # type: ignore[arg-type]

    def step(run: str, outputs: Sequence[str]) -> None:
        Path(os.environ[MARK]).touch()
        end = time.monotonic() + 600
        while time.monotonic() < end:
            torch.ones(300, 300) @ torch.ones(300, 300)

    engine.run_step = step  # type: ignore[method-assign, assignment]
    return engine


if __name__ == "__main__":
    from hvp_service.app import server
    from hvp_workers import engine, ray_backend, ray_group

    os.environ[MARK] = sys.argv[1]
    vars(ray_backend)["RayGroup"] = functools.partial(
        ray_group.RayGroup, engine=f"{Path(__file__).stem}:slow_engine"
    )
    sys.path.insert(0, str(Path(__file__).parent))
    real = engine.RankEngine

    def once(*arguments: object) -> object:
        engine.RankEngine = real  # type: ignore[misc]
        return slow_engine(*arguments)  # type: ignore[arg-type]

    engine.RankEngine = once  # type: ignore[assignment, misc]
    sys.exit(server.main(sys.argv[2:]))
