"""Which matrix an operator is: rules that SDK, service and ranks have in common."""

from __future__ import annotations

from hvp_operations.operation import SpecError

#: Kinds that may have negative eigenvalues; the others are sums of squares.
INDEFINITE = frozenset({"hessian"})
#: Kinds whose labels are drawn from the model.
DRAWN = frozenset({"fisher"})
MOST_SAMPLES = 64  # labels that are drawn for each target


def check_samples(kind: str, sample_seed: int, num_samples: int, field: str = "") -> int:
    """Check which labels a kind of matrix draws.

    Args:
        kind: The kind, such as `fisher`.
        sample_seed: Seed of the labels, from 0 to 2**64 − 1; 0 also where none are drawn.
        num_samples: Number of labels of each target; 0 for the default, or where none are drawn.
        field: Path of the operator in the request, for errors.

    Returns:
        Number of labels that are drawn for each target; 0 for a kind that draws none.

    Raises:
        SpecError: SEED_INVALID, NUM_SAMPLES_INVALID.
    """
    path = f"{field}." if field else ""
    if kind in DRAWN:
        if not 0 <= num_samples <= MOST_SAMPLES:
            raise SpecError(
                "NUM_SAMPLES_INVALID",
                f"num_samples is {num_samples}; 1 to {MOST_SAMPLES} labels are drawn for each "
                "target.",
                f"{path}num_samples",
                {"num_samples": str(num_samples)},
            )
        return num_samples or 1
    for name, given, reason in (
        ("sample_seed", sample_seed, "SEED_INVALID"),
        ("num_samples", num_samples, "NUM_SAMPLES_INVALID"),
    ):
        if given:
            raise SpecError(
                reason,
                f"{name} is {given}, and the {kind} draws no labels; leave it out, or ask for the "
                f"{' or '.join(sorted(DRAWN))}.",
                f"{path}{name}",
                {name: str(given)},
            )
    return 0
