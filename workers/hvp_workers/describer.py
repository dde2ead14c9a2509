"""Describing a checkpoint in a process of its own, beside the ranks and whatever they compute."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvp_batches.schema import schema_from_json

from hvp_workers.backend import BackendError, CheckpointDescription, ParameterTensor
from hvp_workers.environment import rank_environment

READY = {"ready": True}
MEMORY_EXIT_CODE = 77

_LARGEST_ANSWER_BYTES = 256 << 20  # parameters by name: more than any checkpoint's headers hold
_READ_BYTES = 1 << 20
_GIB = 1 << 30
_LAST_WORD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class DescriberLimits:
    """Limits of time and memory for describing one checkpoint.

    Attributes:
        time_s: Seconds from the question to the answer. Building a model of a thousand layers
            without its weights takes seconds.
        memory_bytes: Memory beside that of the libraries. Weights are not read; buffers, such as
            tables of positions, and the names of tensors take it.
        start_s: Seconds for importing the libraries, which a machine under load does slowly.

    Raises:
        ValueError: A limit is not positive.
    """

    time_s: float = 60.0
    memory_bytes: int = 2 * _GIB
    start_s: float = 180.0

    def __post_init__(self) -> None:
        if min(self.time_s, self.memory_bytes, self.start_s) <= 0:
            raise ValueError("every limit must be positive")


@final
class Describer:
    """Owns the process that describes checkpoints (see `describing`).

    The process is started ahead of its first question.

    Law: an answer never waits for a rank; a question that takes more than the limits is refused,
    and the next one is answered by a new process. Questions are answered one after another.
    """

    def __init__(self, limits: DescriberLimits | None = None):
        self._limits = limits or DescriberLimits()
        self._child: _Child | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Start the process and do not wait for it; idempotent."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hvp-describer")
            self._child = _Child(self._limits)

    @property
    def pid(self) -> int | None:
        """Id of the process; None when there is none at the moment."""
        return None if self._child is None else self._child.pid

    async def close(self) -> None:
        """End the process, and with it a question under way; idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._child is not None:
            self._child.kill()  # which wakes the thread
        await asyncio.to_thread(thread.shutdown)
        if self._child is not None:
            self._child.end()
            self._child = None

    async def describe(self, checkpoint_dir: Path) -> CheckpointDescription:
        """Check a checkpoint without loading its weights.

        Raises:
            BackendError: As `Backend.describe_checkpoint`; WORKER_GROUP_LOST: not started, or ended
                meanwhile; WORKER_GROUP_START_FAILED: the process does not start.
        """
        if self._thread is None:
            raise BackendError("WORKER_GROUP_LOST", "The backend has not been started.")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._describe, checkpoint_dir)

    def _describe(self, checkpoint_dir: Path) -> CheckpointDescription:
        while True:
            if self._thread is None:
                raise BackendError(
                    "WORKER_GROUP_LOST", "The server has ended before the checkpoint was read."
                )
            if self._child is None:
                self._child = _Child(self._limits)
            child = self._child
            try:
                answer = child.ask(checkpoint_dir)
            except _EndedError as ended:
                child.end()
                self._child = None
                # What earlier questions left behind, or a killer from outside, is no fault of this
                # one: a new process tells.
                if self._thread is None or (child.num_answers and not ended.final):
                    continue
                raise ended.refusal from None
            return _as_description(answer)


class _EndedError(Exception):
    """There is no answer, and the process is of no more use.

    Attributes:
        refusal: Error to raise to the caller.
        final: Whether a new process would do no better.
    """

    def __init__(self, refusal: BackendError, *, final: bool):
        super().__init__(str(refusal))
        self.refusal = refusal
        self.final = final


@final
class _Child:
    """One process; every method but `kill` is called from one thread at a time."""

    def __init__(self, limits: DescriberLimits):
        self._limits = limits
        self._is_ready = False
        self._start_s = time.monotonic()
        self.num_answers = 0
        self._process = subprocess.Popen(  # noqa: S603 - this project's own program
            # -P: what lies in the folder that the server was started in is nobody's module.
            [sys.executable, "-P", "-m", "hvp_workers.describing", str(limits.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=rank_environment(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # a Ctrl-C in the terminal is for the server alone
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, checkpoint_dir: Path) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            _EndedError: There is no answer.
        """
        if not self._is_ready:
            left_s = self._start_s + self._limits.start_s - time.monotonic()
            if self._receive(left_s) != READY:
                raise self._ended("it did not start")
            self._is_ready = True
        request = {"directory": str(checkpoint_dir), "time_limit_s": self._limits.time_s}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended("it had ended before") from None
        answer = self._receive(self._limits.time_s)
        self.num_answers += 1
        return answer

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + limit_s
        line = bytearray()
        while not line.endswith(b"\n"):
            readable, _, _ = select.select(
                [descriptor], [], [], max(0.0, deadline - time.monotonic())
            )
            if not readable:
                raise _EndedError(self._too_much(f"{limit_s:.0f} s", "time"), final=True)
            data = os.read(descriptor, _READ_BYTES)
            line += data
            if not data or len(line) > _LARGEST_ANSWER_BYTES:
                raise self._ended("it gave no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self, what: str) -> _EndedError:
        try:
            # What has closed its pipe is about to say by its exit code what happened to it.
            code = self._process.wait(_LAST_WORD_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        if code == MEMORY_EXIT_CODE:
            limit = f"{self._limits.memory_bytes / _GIB:.3g} GiB"
            return _EndedError(self._too_much(limit, "memory"), final=False)
        if not self._is_ready:
            refusal = BackendError(
                "WORKER_GROUP_START_FAILED",
                f"The process that looks at checkpoints is gone: {what} (exit code {code}). The "
                "server's log says why; check its memory and its installation, and call again.",
            )
        else:
            refusal = BackendError(
                "CONFIG_INVALID",
                f"Looking at this checkpoint ended the process that did it ({_told(code)}). Check "
                "config.json against the one that the model was published with.",
                {"file": "config.json", "exit_code": str(code)},
            )
        return _EndedError(refusal, final=False)

    def _too_much(self, limit: str, kind: str) -> BackendError:
        if not self._is_ready:
            return BackendError(
                "WORKER_GROUP_START_FAILED",
                f"The process that looks at checkpoints did not start within {limit}. The machine "
                "may be overloaded; call again.",
            )
        return BackendError(
            "CONFIG_INVALID",
            f"The model that config.json describes takes more than {limit} to lay out, before a "
            "weight is read. Check its sizes: positions, layers, and the tables made of them.",
            {"file": "config.json", "limit": kind},
        )

    def kill(self) -> None:
        """Kill the process, if it still lives; from any thread."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.kill()
        with contextlib.suppress(BrokenPipeError):  # a question that was never read
            self._process.communicate()


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _as_description(answer: dict[str, Any]) -> CheckpointDescription:
    if "error" in answer:
        raise BackendError(**answer["error"])
    found = answer["description"]
    parameters = tuple(
        ParameterTensor(name=each["name"], shape=tuple(each["shape"]), offset=each["offset"])
        for each in found.pop("parameters")
    )
    schema = schema_from_json(found.pop("batch_schema"))
    return CheckpointDescription(**found, parameters=parameters, batch_schema=schema)
