"""What the SDK gives of each question: made of their declarations by `make sdk`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvp_operations.block_mass.record import BlockMassResult as BlockMassResult
    from hvp_operations.density.record import DensityResult as DensityResult
    from hvp_operations.diagonal.record import DiagonalResult as DiagonalResult
    from hvp_operations.eigsh.record import EigshResult as EigshResult
    from hvp_operations.low_rank.record import LowRankResult as LowRankResult
    from hvp_operations.solve.record import SolveResult as SolveResult
    from hvp_operations.svds.record import SvdsResult as SvdsResult
    from hvp_operations.trace.record import TraceResult as TraceResult
    from hvp_operations.trace_of.record import TraceOfResult as TraceOfResult

__all__ = [
    "BlockMassResult",
    "DensityResult",
    "DiagonalResult",
    "EigshResult",
    "LowRankResult",
    "SolveResult",
    "SvdsResult",
    "TraceOfResult",
    "TraceResult",
]

_WHERE = {
    "BlockMassResult": "hvp_operations.block_mass.record",
    "DensityResult": "hvp_operations.density.record",
    "DiagonalResult": "hvp_operations.diagonal.record",
    "EigshResult": "hvp_operations.eigsh.record",
    "LowRankResult": "hvp_operations.low_rank.record",
    "SolveResult": "hvp_operations.solve.record",
    "SvdsResult": "hvp_operations.svds.record",
    "TraceOfResult": "hvp_operations.trace_of.record",
    "TraceResult": "hvp_operations.trace.record",
}


def __getattr__(name: str) -> Any:
    # numpy takes its time to import, which `hvp --help` need not spend.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
