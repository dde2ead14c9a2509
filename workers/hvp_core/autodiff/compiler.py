"""Subprograms compiled with TorchInductor, each compared with its operations before it is used."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from hvp_core.autodiff.subprograms import Kernels, Subprogram
from hvp_core.blame import whose

logger = logging.getLogger(__name__)

#: How many times further from the truth a compiled result may be than that of the operations one by
#: one. Fusion rounds less often than these do, and in another order; a wrong kernel is wrong in the
#: first digit.
_SLACK = 8.0
_WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@final
@dataclass
class Compiler:
    """Compiles subprograms, which outlive operators: there is one compiler in a process.

    Attributes:
        seconds: Seconds spent compiling.
        compiled: Number of subprograms that run compiled.
        refused: For each subprogram that runs operation by operation, why.
    """

    seconds: float = 0.0
    compiled: int = 0
    refused: list[str] = field(default_factory=list)

    def __call__(self, subprogram: Subprogram) -> None:
        """Compile a subprogram when it is first called."""
        if any(node.op == "call_function" for node in subprogram.graph.nodes):
            subprogram.run = _Checked(self, subprogram)

    def compile(self, subprogram: Subprogram) -> Kernels | None:
        """Kernels of a subprogram; None, with one warning, where there are none."""
        began = time.perf_counter()
        try:
            kernels = _compiled(subprogram)
        except Exception as error:  # whatever a compiler does
            self.failed(error)
            return None
        finally:
            self.seconds += time.perf_counter() - began
        self.compiled += 1
        return kernels

    def failed(self, error: Exception) -> None:
        """Note a failure of the compiler or of its kernels: the operations run one by one.

        Raises:
            Exception: The error itself, where it is a bug of this library or a lack of memory.
        """
        if whose(error) != "model":
            raise error
        self.refuse(f"{type(error).__name__}: {str(error).strip()[:200]}")

    def refuse(self, why: str) -> None:
        """Note, and say once, that a subprogram is not compiled."""
        if not self.refused:
            logger.warning(
                "a block's dual runs line by line, which is slower and as correct: %s", why
            )
        self.refused.append(why)


def _compiled(subprogram: Subprogram) -> Kernels:
    """Kernels of a subprogram.

    Raises:
        RuntimeError: This torch does not have the compiler where it is looked for; the compiler
            raises other errors too.
    """
    try:
        from hvp_core.autodiff.inductor import compiled  # takes seconds, and most CPUs never ask
    except (ImportError, AttributeError) as error:  # another torch, whose inside lies elsewhere
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return compiled(subprogram)


@final
class _Checked:
    """Runs a subprogram both ways at the first call, and by the trusted way ever after."""

    def __init__(self, compiler: Compiler, subprogram: Subprogram):
        self._compiler, self._subprogram = compiler, subprogram
        self._run: Any = None  # operations or kernels, when it is known which

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        if self._run is not None:
            ready: Sequence[Tensor] = self._run(*arguments)
            return ready
        lines: Any = self._subprogram.module
        kernels = self._compiler.compile(self._subprogram)
        expected: Sequence[Tensor] = lines(*arguments)
        if kernels is not None and self._agree(kernels, expected, arguments):
            self._run = kernels
        else:
            self._run = lines
        return expected

    def _agree(
        self, kernels: Kernels, expected: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> bool:
        """Whether the kernels run, and find what the operations one by one find."""
        try:
            found = kernels(*arguments)
        except Exception as error:
            self._compiler.compiled -= 1
            self._compiler.failed(error)
            return False
        truth = _Wide(self._subprogram.module, arguments).run(*arguments)
        longest = max((size for each in arguments for size in each.shape), default=1)
        triples = zip(found, expected, truth, strict=True)
        worst = max((_excess(*each, longest) for each in triples), default=0)
        if worst > 1:
            self._compiler.compiled -= 1
            self._compiler.refuse(
                f"a compiled result is {worst:.1e} times as far off as rounding allows"
            )
        return worst <= 1


@final
class _Wide(Interpreter):
    """Runs a subprogram's operations in the next wider precision."""

    def __init__(self, module: GraphModule, arguments: Sequence[Tensor]):
        super().__init__(module)
        dtypes = [each.dtype for each in arguments if each.dtype in _WIDER]
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float64)
        self._dtype = _WIDER.get(narrowest, torch.float64)

    def run_node(self, n: Node) -> Any:
        """An operation's results, with every floating-point tensor widened."""
        return _map(super().run_node(n), self._tensor)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation whose arguments ask for the wider dtype wherever they name one."""
        return super().call_function(target, _map(args, self._name), _map(kwargs, self._name))

    def _tensor(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value

    def _name(self, value: Any) -> Any:
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return self._dtype if floating else value


def _map(value: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map(each, f) for each in value)
    if isinstance(value, dict):
        return {key: _map(each, f) for key, each in value.items()}
    return f(value)


def _excess(found: Tensor, expected: Tensor, truth: Tensor, longest: int) -> float:
    """How far a compiled result is from the truth, in units of what is allowed, at its worst row.

    A row is a run of the last dimension, such as the features of one token: what is wrong in one
    row of thousands hardly shows in the whole. A row that is small is allowed what a middling one
    is, since its terms may have cancelled; the median, and not the mean, because a few rows of a
    language model are often a thousand times larger than the others. Values that are not finite,
    such as masked scores, have to be so on both sides and are otherwise left out.

    Kernels on a CPU add numbers one after another, where torch adds pairwise: the errors of a sum
    of n grow as √n, and count for more where the sum is smaller than its terms. [meas] SmolLM2,
    512 tokens, x̄̇ of the head from a kept softmax over 49,152: 160 eps, and 6 one by one.

    Args:
        found: Result of the kernels.
        expected: Result of the operations one by one.
        truth: Result of the operations in wider arithmetic.
        longest: The most numbers that a sum may have.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.inf
    if not found.is_floating_point():
        return 0.0 if bool((found == expected).all()) else torch.inf
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return torch.inf
    eps = torch.finfo(found.dtype).eps
    sums = min(eps, torch.finfo(torch.float32).eps) * math.sqrt(longest)
    # Where only the wider arithmetic is finite, or is not, there is nothing to compare.
    finite &= truth.isfinite()
    found, expected, truth = (
        torch.where(finite, each.to(truth.dtype), 0).reshape(-1, each.shape[-1] if each.ndim else 1)
        for each in (found, expected, truth)
    )
    sizes, errors = _middling(_norms(truth)), _middling(_norms(expected - truth))
    allowed = _SLACK * errors + (16 * eps + 4 * sums) * sizes
    return float((_norms(found - truth) / (allowed + 1e-30)).max()) if found.numel() else 0.0


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms


def _middling(norms: Tensor) -> Tensor:
    """The norms of rows, none of them less than the median of those that are not zero."""
    some = norms[norms > 0]
    return norms.clamp(min=float(some.median())) if len(some) else norms


COMPILER = Compiler()
