"""Parts compiled with TorchInductor, each compared with its own lines before it is believed."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from hvp_core.parts import Part

logger = logging.getLogger(__name__)

Kernels = Callable[..., Sequence[Tensor]]

#: Relative distance of a result from that of the lines, both in the same precision. Fusion rounds
#: less often than the lines do; a wrong kernel is wrong in the first digit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@final
@dataclass
class Compiler:
    """Compiles parts, and remembers what that took.

    Attributes:
        seconds: Spent compiling.
        compiled: Parts that run compiled.
        refused: Why parts run line by line.
    """

    seconds: float = 0.0
    compiled: int = 0
    refused: list[str] = field(default_factory=list)

    def __call__(self, part: Part) -> None:
        """Compile a part when it is first called."""
        if any(node.op == "call_function" for node in part.module.graph.nodes):
            part.run = _Checked(self, part)

    def compile(self, part: Part) -> Kernels | None:
        """Kernels of a part; None, with one warning, where there are none."""
        began = time.perf_counter()
        try:
            kernels = _compiled(part)
        except Exception as error:  # whatever a compiler does
            self.refuse(f"{type(error).__name__}: {str(error).strip()[:200]}")
            return None
        finally:
            self.seconds += time.perf_counter() - began
        self.compiled += 1
        return kernels

    def refuse(self, why: str) -> None:
        """Note, and say once, that a part is not compiled."""
        if not self.refused:
            logger.warning(
                "a block's dual runs line by line, which is slower and as correct: %s", why
            )
        self.refused.append(why)


def _compiled(part: Part) -> Kernels:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own making
        found: Kernels = compile_fx(copy.deepcopy(part.module), list(part.examples))
        return found


@final
class _Checked:
    """Runs lines and kernels at the first call, and whichever is to be trusted ever after."""

    def __init__(self, compiler: Compiler, part: Part):
        self._compiler, self._part = compiler, part
        self._run: Kernels | None = None

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        if self._run is not None:
            return self._run(*arguments)
        lines: Kernels = self._part.module
        kernels = self._compiler.compile(self._part)
        self._run = lines
        expected = lines(*arguments)
        if kernels is None:
            return expected
        try:
            found = kernels(*arguments)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            worst = max((_distance(a, b) for a, b in zip(found, expected, strict=True)), default=0)
            if worst <= 1:
                self._run = kernels
                return found
            why = f"a compiled result is {worst:.1e} times as far off as rounding allows"
        self._compiler.compiled -= 1
        self._compiler.refuse(why)
        return expected


def _distance(found: Tensor, expected: Tensor) -> float:
    """How far apart, in units of what rounding may do; 0 where neither is finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.inf
    if not found.is_floating_point():
        return 0.0 if bool((found == expected).all()) else torch.inf
    # The loss of a broken model is not finite either way; the walk says which block is at fault.
    wide = torch.promote_types(found.dtype, torch.float32)
    a, b = torch.nan_to_num(found.to(wide)), torch.nan_to_num(expected.to(wide))
    size = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) / (_TOLERANCE[found.dtype] * size + 1e-30)
