"""Attention kernels against float64 automatic differentiation, on a CPU or a GPU.

Kernels run on a CPU only in Triton's interpreter, which has to be asked for before triton is
imported: the tests call `errors` in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final, get_args

import torch
from hvp_core.attention.flash import Flash
from hvp_core.attention.flash_launch import InputPrecision
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Tile
from hvp_core.attention.rule import Output, Pattern, Point, Qkv, Span
from torch import Tensor
from torch.func import jvp, vjp

#: Every output, in the order of `true_values`.
NAMES = ("o", "dq", "dk", "dv", "o_dot", "dq_dot", "dk_dot", "dv_dot")

#: Tiles as large as these problems: the interpreter's time goes with their number.
FEW: dict[tuple[Kernel, Mode], tuple[Pass, ...]] = {
    (kernel, mode): (Pass(Tile(32, 32, 4, 1), mode),)
    for kernel in get_args(Kernel)
    for mode in get_args(Mode)
}


@dataclass(frozen=True)
class Case:
    """An attention problem with random operands.

    Attributes:
        spans: [start, stop) of each row of the batch.
        contiguous: Whether heads are the outer dimension; else operands are slices of one tensor.
        common: A vector of this length is added to all keys and query tangents, as a bias would be.
    """

    b: int = 1
    heads: int = 2
    key_heads: int = 2
    s: int = 20
    t: int = 20
    d: int = 16
    e: int = 16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    contiguous: bool = False
    common: float = 0.0

    @property
    def pattern(self) -> Pattern:
        return Pattern(
            scale=self.d**-0.5, causal=self.causal, window=self.window, softcap=self.softcap
        )

    def span(self, device: str) -> Span | None:
        if self.spans is None:
            return None
        start, stop = torch.tensor(self.spans, dtype=torch.int32, device=device).unbind(1)
        return Span(start, stop)

    def allowed(self, device: str) -> Tensor:
        """(b, 1, s, t), by the definition."""
        query = torch.arange(self.s, device=device)[:, None] + self.t - self.s
        key = torch.arange(self.t, device=device)[None]
        keep = torch.ones(self.s, self.t, dtype=torch.bool, device=device)
        if self.causal:
            keep &= key <= query
        if self.window is not None:
            keep &= key > query - self.window
        spans = self.spans or ((0, self.t),) * self.b
        return torch.stack([keep & (key >= i) & (key < j) for i, j in spans])[:, None]

    def draw(
        self, dtype: torch.dtype, device: str, seed: int = 0
    ) -> tuple[Qkv, Qkv, Tensor, Tensor]:
        """(Q, K, V), their tangents, dO and ḋO."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def draw(h: int, n: int, width: int) -> Tensor:
            shape = (self.b, h, n, width) if self.contiguous else (self.b, n, h, width + 8)
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
            x = x.to(dtype)
            return x if self.contiguous else x[..., 8:].transpose(1, 2)

        sizes = (
            (self.heads, self.s, self.d),
            (self.key_heads, self.t, self.d),
            (self.key_heads, self.t, self.e),
        )
        x, x_dot = (Qkv(*(draw(*size) for size in sizes)) for _ in range(2))
        if self.common:
            x.k.add_(self.common)
            x_dot.q.add_(self.common)
        return x, x_dot, draw(self.heads, self.s, self.e), draw(self.heads, self.s, self.e)


def true_values(
    case: Case, x: Qkv, x_dot: Qkv, o_bar: Tensor, o_bar_dot: Tensor
) -> tuple[dict[str, Tensor], Output, Output]:
    """Forward over reverse through softmax attention in float64, and (O, L), (Ȯ, L̇)."""
    pattern, allowed = case.pattern, case.allowed(str(x.q.device))
    group = case.heads // case.key_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * pattern.scale
        if pattern.softcap is not None:
            scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
        # A row with no key: uniform weights that are then zeroed, so that nothing is a NaN.
        anywhere = allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed & anywhere, -torch.inf)
        lse = scores.logsumexp(-1).masked_fill(~anywhere[..., 0], -torch.inf)
        return scores.softmax(-1).mul(anywhere) @ v, lse

    def pull(q: Tensor, k: Tensor, v: Tensor, o_bar: Tensor) -> tuple[Tensor, ...]:
        back = vjp(lambda *x: attend(*x)[0], q, k, v)[1]
        return tuple(back(o_bar))

    x64, x_dot64 = tuple(a.double() for a in x), tuple(a.double() for a in x_dot)
    (o, lse), (o_dot, lse_dot), *_ = jvp(attend, x64, x_dot64)
    first, second, *_ = jvp(pull, (*x64, o_bar.double()), (*x_dot64, o_bar_dot.double()))
    values = dict(zip(NAMES, (o, *first, o_dot, *second), strict=True))
    return values, Output(o, lse), Output(o_dot, lse_dot)


def relative(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖; infinite if anything found is not a number."""
    error = torch.linalg.vector_norm(found.double() - true)
    size = torch.linalg.vector_norm(true)
    value = float(error / size.clamp(min=1e-30)) if float(size) else float(error)
    return value if value == value else float("inf")


def found_values(
    flash: Flash, case: Case, x: Qkv, x_dot: Qkv, o_bar: Tensor, o_bar_dot: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], Output, Output]:
    """Outputs of the fused methods, those of the separate methods, (O, L), (Ȯ, L̇)."""
    span = case.span(str(x.q.device))
    given = (case.pattern, span)
    y, y_dot = flash.dual(x, x_dot, *given)
    dot = Point(x_dot, y_dot, o_bar_dot)
    first, second = flash.backward_dual(Point(x, y, o_bar), dot, *given)
    fused = dict(zip(NAMES, (y.o, *first, y_dot.o, *second), strict=True))
    z = flash.forward(x, *given)
    (z_dot,) = flash.tangents(x, [x_dot], z, *given)
    at, dot = Point(x, z, o_bar), Point(x_dot, z_dot, o_bar_dot)
    first = flash.backward(at, *given)
    (second,) = flash.backward_tangents(at, [dot], *given)
    alone = dict(zip(NAMES, (z.o, *first, z_dot.o, *second), strict=True))
    return fused, alone, y, y_dot


def errors(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    precision: InputPrecision = "ieee",
) -> dict[str, float]:
    """Relative error of every output of every method."""
    operands = case.draw(dtype, device)
    true, y_true, y_dot_true = true_values(case, *operands)
    flash = Flash(input_precision=precision, choose=FEW if device == "cpu" else None)
    reason = flash.supports(operands[0], case.pattern, case.span(device))
    assert reason is None, reason
    fused, alone, y, y_dot = found_values(flash, case, *operands)
    result = {f"fused {name}": relative(fused[name], true[name]) for name in NAMES}
    result |= {f"alone {name}": relative(alone[name], true[name]) for name in NAMES}
    finite = y_true.lse.isfinite()
    assert torch.equal(y.lse.isfinite(), finite), "infinite exactly where there is no key"
    result["lse"] = relative(y.lse[finite], y_true.lse[finite])
    result["lse_dot"] = relative(y_dot.lse, y_dot_true.lse.masked_fill(~finite, 0))
    return result


def errors_of_plan(case: Case, plan: tuple[Pass, ...], processors: int = 1) -> dict[str, float]:
    """Relative errors of what `backward_dual` finds with these launches for dK and dV."""
    x, x_dot, o_bar, o_bar_dot = case.draw(torch.float32, "cpu")
    true, *_ = true_values(case, x, x_dot, o_bar, o_bar_dot)
    card = Card(hopper=True, processors=processors)
    flash = Flash(card=card, choose={**FEW, ("keys", "dual"): plan})
    given = (case.pattern, case.span("cpu"))
    y, y_dot = flash.dual(x, x_dot, *given)
    at, dot = Point(x, y, o_bar), Point(x_dot, y_dot, o_bar_dot)
    first, second = flash.backward_dual(at, dot, *given)
    fused = (y.o, *first, y_dot.o, *second)
    return {name: relative(x, true[name]) for name, x in zip(NAMES, fused, strict=True)}


def errors_of_several(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    precision: InputPrecision = "ieee",
    processors: int = 1,
) -> dict[str, float]:
    """Relative errors of the tangents of three probes at once: two in a launch, and one."""
    x, _, o_bar, _ = case.draw(dtype, device)
    drawn = [case.draw(dtype, device, seed) for seed in (1, 2, 3)]
    tile = Tile(32, 32, 4, 1)
    pairs: dict[tuple[Kernel, Mode], tuple[Pass, ...]] = {
        (kernel, "tangent"): (Pass(tile, "tangent", probes=2),) for kernel in get_args(Kernel)
    }
    card = Card(hopper=False, processors=processors) if device == "cpu" else None
    flash = Flash(input_precision=precision, card=card, choose={**FEW, **pairs})
    given = (case.pattern, case.span(device))
    y = flash.forward(x, *given)
    y_dots = flash.tangents(x, [each[1] for each in drawn], y, *given)
    dots = [Point(each[1], y_dot, each[3]) for each, y_dot in zip(drawn, y_dots, strict=True)]
    seconds = flash.backward_tangents(Point(x, y, o_bar), dots, *given)
    found: dict[str, float] = {}
    for number, (_, x_dot, _, o_bar_dot) in enumerate(drawn):
        true, y_true, y_dot_true = true_values(case, x, x_dot, o_bar, o_bar_dot)
        tangents = (y_dots[number].o, *seconds[number])
        for name, each in zip(NAMES[4:], tangents, strict=True):
            found[f"{name} of {number}"] = relative(each, true[name])
        lse_dot = y_dot_true.lse.masked_fill(~y_true.lse.isfinite(), 0)
        found[f"lse_dot of {number}"] = relative(y_dots[number].lse, lse_dot)
    return found


def supported() -> dict[str, str | None]:
    """What `Flash.supports` says of some problems."""
    pattern = Pattern(scale=1.0, causal=True)

    def ask(
        width: int = 16,
        dtype: torch.dtype = torch.float32,
        value: torch.dtype | None = None,
        pattern: Pattern = pattern,
    ) -> str | None:
        q = torch.zeros(1, 1, 2, width, dtype=dtype)
        return Flash().supports(Qkv(q, q, q.to(value or dtype)), pattern, None)

    return {
        "float64": ask(dtype=torch.float64),
        "mixed": ask(value=torch.float16),
        "wide": ask(width=320),
        "no scale": ask(pattern=Pattern(scale=0.0, causal=True)),
        "no cap": ask(pattern=Pattern(scale=1.0, causal=True, softcap=-1.0)),
        "fine": ask(),
    }


# Compiling without a card ------------------------------------------------------------------------


@final
class _Target:
    """Stands for the driver where nothing runs: no process holds memory of the card."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target(capability: int) -> None:
    """Let this process compile for a card, say 90 for Hopper, that need not be here."""
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(_Target(capability))


def compiled(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """A launcher's arguments, compiled and not launched."""
    return kernel.warmup(grid=grid, **arguments, **options)


def shared_bytes(case: Case, dtype: torch.dtype, precision: InputPrecision, card: Card) -> int:
    """The most shared memory that a program of any kernel of all methods needs."""
    needed: list[int] = []
    flash = Flash(
        input_precision=precision,
        launcher=lambda *one: needed.append(compiled(*one).metadata.shared),
        card=card,
        first_order=False,
    )
    x, x_dot, o_bar, o_bar_dot = case.draw(dtype, "meta")
    _, _, y, y_dot = found_values(flash, case, x, x_dot, o_bar, o_bar_dot)
    given = (case.pattern, case.span("meta"))
    flash.tangents(x, [x_dot, x_dot], y, *given)
    dot = Point(x_dot, y_dot, o_bar_dot)
    flash.backward_tangents(Point(x, y, o_bar), [dot, dot], *given)
    return max(needed)
