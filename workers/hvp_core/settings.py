"""How products are computed, as opposed to what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

Schedule = Literal["auto", "lean", "fast", "cached"]
Precision = Literal["full", "tf32", "bfloat16", "float64"]


@final
@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Choices that change time and memory, and rounding, but not the meaning of a result.

    Attributes:
        schedule: What blocks keep of the forward walk. `lean` keeps the inputs of the blocks, which
            are computed again on the way back (11 GEMM passes for a Hessian's product); `fast`
            keeps what the way back needs (8); `cached` keeps the primal half for the next product
            too (6). `auto` takes the fastest that fits `budget_bytes`.
        budget_bytes: Memory for what blocks keep; None for most of what is free when the first
            product begins.
        compile: Compile the blocks' duals with TorchInductor.
        graphs: Replay a whole product as one CUDA graph.
        precision: Precision of the operands of matrix products. `full` is the space's own; `tf32`
            and `bfloat16` apply to float32 spaces: statistics, losses, vectors and sums stay in
            float32. `float64` computes in float64 throughout, and a product of a float32 vector is
            rounded when it is added up.
        strict: Whether a slower way than the fast one is an error. For tests and benchmarks: they
            then see what they mean to see.
        trace: Trace the blocks. Without, torch differentiates each by itself, which begins sooner
            and is slower: for a loss that is asked for once.
        deterministic: The same bits each time: no choice that changes rounding looks at free
            memory, time or history, and nothing is summed in the order in which threads run.
            `compile` and `graphs` are off then. What is not to be had so is refused.
    """

    schedule: Schedule = "auto"
    budget_bytes: int | None = None
    compile: bool = False
    graphs: bool = False
    precision: Precision = "full"
    strict: bool = False
    trace: bool = True
    deterministic: bool = False
