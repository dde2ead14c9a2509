"""The verdict of `client.verify`: what was checked of a model's curvature, with figures."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import numpy as np
from hvp_operations.operation import Table
from numpy.typing import NDArray

Verdict = Literal["pass", "fail", "undecided"]


@final
@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative errors that are put down to rounding.

    Attributes:
        algebra: Of identities that hold exactly, such as u·Hv = v·Hu.
        differences: Of differences of the loss, which lose half of the digits or more.
        change: Part of the loss by which steps should change it: the larger, the less rounding
            shows, and the more the loss' higher derivatives do.
    """

    algebra: float
    differences: float
    change: float = 1e-2


#: By dtype and precision of the operands of matrix products. Products of a deep model err by some
#: hundred units of roundoff; a kernel that is wrong by a hundredth is far beyond, but in 16 bits.
_TOLERANCES = {
    ("float64", "full"): Tolerance(algebra=1e-9, differences=1e-4, change=1e-4),
    ("float32", "full"): Tolerance(algebra=1e-4, differences=1e-2),
    ("float32", "tf32"): Tolerance(algebra=2e-2, differences=1e-1),
    ("float32", "bfloat16"): Tolerance(algebra=1e-1, differences=4e-1),
}


def tolerance(dtype: str, precision: str) -> Tolerance:
    """The tolerance for products of this dtype and precision."""
    return _TOLERANCES[dtype, precision]


@final
@dataclass(frozen=True, kw_only=True)
class Check:
    """One identity, and how far the model's numbers are from it.

    Attributes:
        what: The identity.
        error: Relative deviation.
        allowed: The deviation that rounding may cause.
        verdict: `pass` or `fail`; `undecided` where rounding hides the number.
        note: What the figures are of.
    """

    what: str
    error: float
    allowed: float
    verdict: Verdict
    note: str = ""


def judged(what: str, error: float, allowed: float, note: str = "") -> Check:
    """A check of which the error decides; no number at all is a failure."""
    verdict: Verdict = "pass" if error <= allowed else "fail"
    return Check(what=what, error=error, allowed=allowed, verdict=verdict, note=note)


@final
@dataclass(frozen=True, kw_only=True)
class Verification:
    """Checks of the curvature of one checkpoint on one batch.

    Attributes:
        checks: The checks, in the order in which they were made.
        loss: L(θ), in nats.
        num_parameters: n.
        dtype: Dtype of vectors.
        precision: Precision of the operands of matrix products.
    """

    checks: tuple[Check, ...]
    loss: float
    num_parameters: int
    dtype: str
    precision: str

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def table(self) -> Table:
        """The checks, for people."""
        return Table(
            title="passed" if self.passed else "FAILED",
            headings=("check", "relative error", "allowed", "verdict", ""),
            rows=tuple(
                (each.what, f"{each.error:.1e}", f"{each.allowed:.0e}", each.verdict, each.note)
                for each in self.checks
            ),
            notes=(
                f"{self.num_parameters:,} parameters, {self.dtype}, matrix products in "
                f"{'their own precision' if self.precision == 'full' else self.precision}, "
                f"L(θ) = {self.loss:.6g}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {"passed": self.passed, **asdict(self)}

    def __repr__(self) -> str:
        failed = sum(check.verdict == "fail" for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks failed" if failed else "passed"
        return f"<Verification {verdict}, n={self.num_parameters:,} {self.dtype}>"


# Differences of the loss --------------------------------------------------------------------------

#: Steps of a ladder, in units of its own; each is half of the one before.
LADDER = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)


def extrapolated(estimates: Sequence[float]) -> tuple[float, float]:
    """The limit of difference quotients at h, h/2, h/4, ... whose error is of order h².

    Where h is large the next order of h shows, where it is small rounding does; in between the
    extrapolated quotients agree, and there they are believed.

    Args:
        estimates: Three quotients or more, from the largest step to the smallest.

    Returns:
        The limit, and how far its neighbour is from it.
    """
    refined = [(4 * b - a) / 3 for a, b in itertools.pairwise(estimates)]
    gaps = [abs(a - b) for a, b in itertools.pairwise(refined)]
    known = [gap if math.isfinite(gap) else math.inf for gap in gaps]
    best = int(np.argmin(known))
    return refined[best + 1], known[best]


def of_differences(
    what: str, estimates: Sequence[float], expected: float, scale: float, allowed: float, note: str
) -> Check:
    """A check of a product against differences of the loss.

    Args:
        what: The identity.
        estimates: Difference quotients, as `extrapolated` takes them.
        expected: The number that products give.
        scale: Size of the numbers that were subtracted.
        allowed: Relative deviation that rounding may cause.
        note: What the figures are of.
    """
    found, doubt = extrapolated(estimates)
    error, doubt = abs(found - expected) / scale, doubt / scale
    if not doubt <= allowed:
        return Check(
            what=what,
            error=error,
            allowed=allowed,
            verdict="undecided",
            note=f"the differences themselves are known to {doubt:.0e} only",
        )
    return judged(what, error, allowed, note)


# Invariances --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """Parameters that may be multiplied by c and 1/c, and the loss stays what it is.

    Attributes:
        title: What they are.
        up: Names of those that are multiplied by c.
        down: Names of those that are divided by c.
    """

    title: str
    up: tuple[str, ...]
    down: tuple[str, ...]


#: What is linear in both, by the names that architectures use: (title, the one, the others).
_PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("up and down projection", r"up_proj\.(?:weight|bias)", ("down_proj.weight",)),
    ("values and output projection", r"v_proj\.(?:weight|bias)", ("o_proj.weight",)),
    (
        "norm and what it feeds",
        r"post_attention_layernorm\.(?:weight|bias)",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ),
    (
        "norm and what it feeds",
        r"post_attention_layernorm\.(?:weight|bias)",
        ("mlp.dense_h_to_4h.weight",),
    ),
    ("norm and what it feeds", r"ln_2\.(?:weight|bias)", ("mlp.c_fc.weight",)),
    ("norm and what it feeds", r"ln_1\.(?:weight|bias)", ("attn.c_attn.weight",)),
    (
        "values and output projection",
        r"attention\.self\.value\.(?:weight|bias)",
        ("attention.output.dense.weight",),
    ),
)


def rescalings(names: Sequence[str]) -> list[Rescaling]:
    """Rescalings that parameters of these names suggest: of each kind in the first and last layer.

    A name proves nothing: whether the loss stays the same is to be measured.
    """
    known, found = set(names), list[Rescaling]()
    for title, one, others in _PAIRS:
        pattern: Callable[[str], re.Match[str] | None] = re.compile(rf"(.*?){one}$").match
        up: dict[str, list[str]] = {}
        for name in names:
            if match := pattern(name):
                up.setdefault(match[1], []).append(name)
        whole = [
            Rescaling(title=title, up=tuple(each), down=tuple(prefix + o for o in others))
            for prefix, each in up.items()
            if known.issuperset(prefix + other for other in others)
        ]
        found += whole[:1] + whole[-1:] * (len(whole) > 1)
    return found


def sign_of(rescaling: Rescaling, sizes: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
    """+1 on what is multiplied and −1 on what is divided, in the order of a vector's parameters."""
    return np.concatenate(
        [np.full(size, 1.0 if name in rescaling.up else -1.0) for name, size in sizes]
    )
