"""The process that looks at checkpoints: it reads what a stranger wrote, and may be lost by it.

A config.json decides how much is allocated before a weight is read, and each tensor's few bytes in
a file's header become objects of hundreds of bytes. So checkpoints are described away from the
ranks and the server, within a limit of memory, by a program that answers one question. `describer`
starts it and keeps the time.

Requests and answers are lines of JSON, on what were standard input and standard output.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from hvp_workers.describer import MEMORY_EXIT_CODE, READY
from hvp_workers.rank_process import loading_modules


def main(memory_bytes: int) -> None:
    """Answer requests until the other end of the pipe is closed.

    Args:
        memory_bytes: Memory that a description may take beside that of the libraries.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    # From the start, and in a thread: a server that dies ends this process whatever it is doing.
    threading.Thread(target=_receive, args=(sys.stdin, requests), daemon=True).start()

    with loading_modules():
        import torch  # noqa: F401  (here, so that its memory is no description's)
        import transformers  # noqa: F401

        from hvp_workers import models  # noqa: F401

    limit = _private_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    _send(answers, READY)
    while True:
        request = requests.get()
        # The server keeps the time. The kernel ends what no longer hears of the server's end.
        signal.alarm(int(request["time_limit_s"]) + 5)
        _send(answers, _answer(Path(request["directory"])))
        signal.alarm(0)


def _receive(pipe: IO[str], requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in pipe:
        requests.put(json.loads(line))
    os._exit(0)


def _answer(directory: Path) -> dict[str, Any]:
    import torch
    from hvp_core.errors import CurvatureError, is_out_of_memory
    from hvp_core.sharding.collective import Alone

    from hvp_workers.backend import Tuning
    from hvp_workers.memory import Memory
    from hvp_workers.models import ModelStore

    alone, device = Alone(), torch.device("cpu")
    try:
        # A store of its own each time: nothing of one checkpoint is left for the next.
        store = ModelStore(alone, device, Memory(alone, device), Tuning())
        return {"description": asdict(store.describe(directory).public)}
    except CurvatureError as error:
        if isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__):
            os._exit(MEMORY_EXIT_CODE)
        return _failure(error.reason, error.message, error.metadata)
    except Exception as error:  # any failure is reported by value
        if is_out_of_memory(error):
            os._exit(MEMORY_EXIT_CODE)
        return _failure(
            "INTERNAL",
            f"{type(error).__name__}: {error}",
            {"exception": type(error).__name__, "traceback": traceback.format_exc()},
        )


def _failure(reason: str, message: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {"error": {"reason": reason, "message": message, "metadata": dict(metadata)}}


def _send(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _private_bytes() -> int:
    """Bytes of this process that the limit counts now: private memory that can be written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return int(kib) * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
