"""A program with a group of ranks, for tests that end it from outside.

Usage: gang_driver.py RUN_DIR {wait|lose}

`wait` prints the ranks' process ids as JSON and runs a call that does not end; `lose` kills a rank,
hears of the loss, closes, and prints whether SIGTERM is still its own affair.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import psutil
from hvp_workers.backend import GroupLostError
from hvp_workers.ray_group import RayGroup


def on_sigterm(signum: int, frame: object) -> None:
    sys.exit(0)


async def main(run_dir: Path, mode: str) -> None:
    num_workers = 2 if mode == "wait" else 1
    group = RayGroup(
        num_workers=num_workers,
        device="cpu",
        run_dir=run_dir,
        engine="tests.workers.gang_engine:GangEngine",
    )
    await group.start()
    pids = await group.run("pid")
    if mode == "wait":
        family = [child.pid for child in psutil.Process().children(recursive=True)]
        print(json.dumps({"ranks": pids, "family": family}), flush=True)
        await group.run("append", 1, 600.0)
    os.kill(pids[0], signal.SIGKILL)
    try:
        await group.run("pid")
    except GroupLostError:
        await asyncio.sleep(1.0)  # for Ray to say on its streams what it wants to say
        await group.close()
        kept = signal.getsignal(signal.SIGTERM) is on_sigterm
        left = [child.name() for child in psutil.Process().children(recursive=True)]
        print(json.dumps({"kept": kept, "left": left}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_sigterm)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
