"""Whose fault an exception is: the model's code, this library, or the memory of the machine.

A model's code is a stranger's, and fails in every way there is: while it is traced, run, or
differentiated. Such a failure is no reason for INTERNAL, and often none to fail at all, since
another way to compute the block may work. An exception of this library is a bug, and is never taken
for a block that has to be computed in another way.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar, final

import torch

from hvp_core.errors import CurvatureError, is_out_of_memory

Fault = Literal["memory", "model", "ours"]
T = TypeVar("T")

_OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("hvp_core", "hvp_workers"))
_STANDARD = sysconfig.get_paths()["stdlib"]
_PACKAGES = sysconfig.get_paths()["purelib"]
_TORCH = str(Path(torch.__file__).parent)
_TRANSFORMERS = str(Path(_PACKAGES, "transformers"))
_IN_TRANSFORMERS = (
    "If it does so in transformers too, checkpoint or batch are at fault; if not, this model is "
    "not served yet"
)
_ALONE = (
    "If it does so when it is called without hvp too, correct the model, its weights or the batch; "
    "if not, this model is not served yet"
)
#: Words in torch's message about an operation that it cannot differentiate.
_NO_DERIVATIVE = ("derivative", "autograd.Function")
#: And about one for which it has no kernel that gives the same bits each time.
_NOT_REPRODUCIBLE = "use_deterministic_algorithms"


def whose(error: Exception) -> Fault:
    """Whose fault an exception is, by the innermost frame that belongs to somebody's code.

    A refusal of torch itself (RuntimeError, NotImplementedError) is the model's fault, whoever
    calls torch: this library differentiates only what a model is made of. Any other exception that
    is raised in a frame of this library, an AssertionError, TypeError or KeyError, is its bug.
    """
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, torch.AcceleratorError):  # the device is broken, whoever used it
        return "ours"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        passes_on = frame.name == "__torch_function__" and frame.filename.startswith(_OURS)
        standard = frame.filename.startswith(_STANDARD) and not frame.filename.startswith(_PACKAGES)
        if passes_on or standard or frame.filename.startswith("<frozen"):
            continue
        ours = frame.filename.startswith(_OURS)
        return "ours" if ours and not isinstance(error, RuntimeError) else "model"
    return "model"


def explained(error: Exception, block: str, doing: str) -> CurvatureError:
    """The CurvatureError that explains an exception.

    This is the one place that gives a reason to exceptions of a model's code.

    Args:
        error: Exception that was raised while a block was worked on.
        block: Name of the block.
        doing: The work on the block, in words.

    Returns:
        A CurvatureError keeps its reason and gets the block's name. Others become OUT_OF_MEMORY;
        DOUBLE_BACKWARD_UNSUPPORTED, where torch has no derivative of an operation;
        DETERMINISM_UNSUPPORTED, where it was to compute reproducibly and cannot;
        MODEL_UNSUPPORTED, for anything else that a model raises; or INTERNAL with a traceback, for
        a bug of this library.
    """
    at = {"block": block, "operation": doing}
    if isinstance(error, CurvatureError):
        if "block" in error.metadata:
            return error
        message = f"block {block}: {error.message}"
        return CurvatureError(error.reason, message, {**at, **error.metadata})
    said = (str(error).strip().splitlines() or [""])[0][:300]
    fault = whose(error)
    if fault == "memory":
        return CurvatureError(
            "OUT_OF_MEMORY",
            f"block {block}, {doing}: a rank has no memory left ({said}); use a smaller "
            "micro-batch, float32, fewer Lanczos vectors or more workers",
            at,
        )
    words = f"{type(error).__name__}: {said}"
    if fault == "ours":
        lines = "".join(traceback.format_exception(error))
        return CurvatureError(
            "INTERNAL",
            f"block {block}, {doing}: {words}; this is a bug of hvp, please report it",
            {**at, "exception": type(error).__name__, "traceback": lines},
        )
    if isinstance(error, RuntimeError) and _NOT_REPRODUCIBLE in said:
        return CurvatureError(
            "DETERMINISM_UNSUPPORTED",
            f"block {block} has an operation that torch cannot compute with the same bits each "
            f"time ({said}); ask without deterministic, or replace the operation",
            at,
        )
    if isinstance(error, RuntimeError) and (
        isinstance(error, NotImplementedError) or any(each in said for each in _NO_DERIVATIVE)
    ):
        return CurvatureError(
            "DOUBLE_BACKWARD_UNSUPPORTED",
            f"block {block} has an operation without a second derivative ({said}); "
            "replace it by a composition of differentiable ones",
            at,
        )
    return CurvatureError(
        "MODEL_UNSUPPORTED",
        f"block {block}, {doing}: the model's code raises {words}{_place_and_advice(error)}",
        at,
    )


def _place_and_advice(error: Exception) -> str:
    """The line of the model's code that raised, and what to do, by whose code it is."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith((*_OURS, _TORCH, "<"))]
    if not theirs:
        return f". {_ALONE}"
    place = f" (line {theirs[-1].lineno} of {Path(theirs[-1].filename).name})"
    is_of_transformers = theirs[-1].filename.startswith(_TRANSFORMERS)
    return f"{place}. {_IN_TRANSFORMERS if is_of_transformers else _ALONE}"


@contextmanager
def working_on(block: str, doing: str) -> Iterator[None]:
    """Give every exception that is raised inside its reason.

    Args:
        block: Name of the block that is worked on.
        doing: The work on the block, in words.

    Raises:
        CurvatureError: The exception that was raised, as `explained` makes it.
    """
    try:
        yield
    except Exception as error:
        raise explained(error, block, doing) from error


def raised_again(error: Exception) -> CurvatureError:
    """For `Collective.same_fate`: an error that has its reason already, or is nobody's."""
    raise error


@final
class InStep:
    """Keeps a rank in step with the others when its own work on a block has failed.

    A walk gathers and scatters all the way, so a rank that left it would leave the others waiting.
    Instead the failure is noted, the rank goes on with nothing to do, and all ranks learn of the
    failure at the end.

    Attributes:
        failure: The first failure; None for none.
    """

    def __init__(self, *, alone: bool = False):
        """Begin without a failure.

        Args:
            alone: No other rank waits, so exceptions are raised at once.
        """
        self.failure: CurvatureError | None = None
        self._alone = alone
        self._at = ("", "")

    def on(self, block: str, doing: str) -> Self:
        """Name the work of a `with` statement, for the failure that it may become.

        Args:
            block: Name of the block that is worked on.
            doing: The work on the block, in words.
        """
        self._at = block, doing
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if self._alone or not isinstance(error, Exception):
            return False
        if self.failure is None:
            self.failure = explained(error, *self._at)
        return True

    def live(self, items: Sequence[T]) -> Sequence[T]:
        """The items to work on; none after a failure."""
        return items if self.failure is None else ()


def raise_first(failures: Iterable[CurvatureError | None]) -> None:
    """Raise the failure of the first rank that failed, on every rank alike.

    Args:
        failures: Failure of each rank, or None, in order of rank.

    Raises:
        CurvatureError: The failure of the first rank that failed.
    """
    for failure in failures:
        if failure is not None:
            raise failure
