"""Arithmetic in which second derivatives exist, are right and keep their precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hvp_core.errors import CurvatureError, is_out_of_memory
from hvp_core.settings import ComputeSettings, Precision


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` from differentiable parts.

    torch's forward rule of the fused norm takes its mean and deviation for constants, so that a
    gradient through it is silently wrong (torch 2.11 to 2.13).
    """
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def embedding(
    ids: torch.Tensor,
    table: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *others: Any,
    **more: Any,
) -> torch.Tensor:
    """`torch.nn.functional.embedding` whose derivative counts every row.

    torch gives the row of `padding_idx` no gradient although its forward rule has a tangent for it:
    a habit of training, and neither the gradient nor a symmetric Hessian of the loss.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED where max_norm makes the forward change its parameters.
    """
    if max_norm is not None:
        raise CurvatureError("MODEL_UNSUPPORTED", "an embedding with max_norm changes its weights")
    return torch.nn.functional.embedding(ids, table)


_PLACES = (torch, torch.Tensor, torch.linalg, torch.nn.functional)


def _functions(names: str) -> set[Any]:
    found = [getattr(place, name, None) for name in names.split() for place in _PLACES]
    return {each for each in found if each is not None}


_PRODUCTS = _functions(
    "__matmul__ __rmatmul__ addbmm addmm addmv baddbmm bilinear bmm chain_matmul conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d dot einsum inner linear matmul mm "
    "multi_dot mv tensordot vecdot"
)
_NORMS = _functions("batch_norm group_norm instance_norm rms_norm")


def _alike(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """The arguments with mixed floating operands, some of them of 16 bits, cast to one dtype.

    It is the narrowest dtype; for a norm the widest; for an operation that writes into a tensor,
    that tensor's own. None where there is nothing to cast.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = [
        place
        for place, each in enumerate(leaves)
        if isinstance(each, torch.Tensor) and each.is_floating_point()
    ]
    dtypes = sorted({leaves[place].dtype for place in places}, key=lambda each: each.itemsize)
    if len(dtypes) < 2 or dtypes[0].itemsize > 2 or kwargs.get("out") is not None:
        return None
    name = getattr(func, "__name__", "")
    dtype = dtypes[-1] if func in _NORMS else dtypes[0]
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        dtype = leaves[places[0]].dtype
    for place in places:
        leaves[place] = leaves[place].to(dtype)
    found = tree_unflatten(leaves, spec)
    return found[0], found[1]


_DATA: Any = torch.Tensor.data
#: Functions that give a tensor as a constant.
_STOPS = {torch.detach, torch.Tensor.detach, torch.Tensor.detach_, _DATA.__get__}
STOPPED = "no_grad and detach in its code are ignored: the loss is differentiated as a function"
_listening: ContextVar[tuple[set[str], ...]] = ContextVar("listening", default=())


def refuse_without_values(func: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Refuse to compute with a parameter whose values nobody has given.

    torch does not: a convolution with a tensor on the meta device returns whatever lay in memory.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED: an argument has no values.
    """
    missing = any(isinstance(each, torch.Tensor) and each.is_meta for each in arguments)
    if missing and getattr(func, "__name__", "") != "__get__":  # shapes and dtypes are known
        raise CurvatureError(
            "MODEL_UNSUPPORTED", "the model's code computes with a tensor that has no values"
        )


@final
class _Differentiable(TorchFunctionMode):
    """Replaces operations with wrong derivatives, and keeps every operation's precision.

    Matrix products are computed in 16 bits where an operand has them, as in torch's autocast:
    weights of 16 bits meet a residual stream in float32. So is any other operation that refuses
    mixed operands. Norms, softmaxes and losses of many models cast to float32 "for precision"; in a
    float64 run that cast would cost nine digits, so float64 stays.

    The loss is differentiated as a function of its parameters. A gradient that is stopped in the
    model's code (`no_grad`, `detach`, `data`) is a habit of training. Torch's derivatives by going
    backward obey it and those by going forward do not, so together they would be the derivatives of
    no function. Here no gradient is stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopped = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self._stopped = not args[0]
            return torch._C._set_grad_enabled(True) if args[0] else None
        if func in _STOPS:
            return self._not_stopped(args[0])
        refuse_without_values(func, (*args, *kwargs.values()))
        found = self._compute(func, args, kwargs)
        return self._not_stopped(found) if self._stopped else found

    def _not_stopped(self, found: Any) -> Any:
        """A value that the model's code would stop the gradient of; noted if it has one."""
        if isinstance(found, torch.Tensor) and found.requires_grad:
            for heard in _listening.get():
                heard.add(STOPPED)
        return found

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if func is torch.nn.functional.layer_norm:
            return layer_norm(*args, **kwargs)
        if func is torch.nn.functional.embedding:
            return embedding(*args, **kwargs)
        if func in _PRODUCTS or func in _NORMS:
            args, kwargs = _alike(func, args, kwargs) or (args, kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            same = None if is_out_of_memory(error) else _alike(func, args, kwargs)
            if same is None:
                raise
            return func(*same[0], **same[1])


@contextmanager
def exact() -> Iterator[None]:
    """Run a model so that its duals exist and keep their precision.

    Fused attention has neither a forward derivative nor a second one, so modules that call it get
    the plain formula; float64 stays float64.
    """
    before = torch.is_grad_enabled()
    try:
        with sdpa_kernel(SDPBackend.MATH), _Differentiable():
            yield
    finally:
        torch._C._set_grad_enabled(before)


@contextmanager
def listening() -> Iterator[set[str]]:
    """Collect remarks on the models' code that runs inside."""
    heard: set[str] = set()
    token = _listening.set((*_listening.get(), heard))
    try:
        yield heard
    finally:
        _listening.reset(token)


def compute_dtype(space: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype of the operands of matrix products.

    Args:
        space: The dtype of the vectors.
        precision: The precision that is asked for.

    Raises:
        CurvatureError: PRECISION_UNSUPPORTED: tf32 or bfloat16 for vectors that are not float32.
    """
    if precision == "full":
        return space
    if precision == "float64":
        return torch.float64
    if space != torch.float32:
        raise CurvatureError(
            "PRECISION_UNSUPPORTED",
            f"precision {precision} is for float32; {str(space).removeprefix('torch.')} runs in "
            "full precision",
        )
    return torch.bfloat16 if precision == "bfloat16" else space


@contextmanager
def matmuls(precision: Precision) -> Iterator[None]:
    """Compute matrix products of float32 operands in tf32, or in float32, whatever torch was told.

    Torch has two settings for this and raises wherever it meets them in disagreement; each device
    has its own beside them. All are restored at the end.
    """
    devices: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in devices]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # they disagree: most likely this one was left alone
        legacy = "highest"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for each, value in zip(devices, before, strict=True):
            each.fp32_precision = value


@contextmanager
def reproducible(wanted: bool = True) -> Iterator[None]:
    """Have torch take the kernels that give the same bits each time, and raise where it has none.

    Torch's own switch for the whole process, and the search for the fastest convolution; both are
    restored at the end. Compilers are not told, whose loading takes seconds: nothing is compiled
    inside.

    Args:
        wanted: Whether to; if not, nothing changes.
    """
    if not wanted:
        yield
        return
    fills: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode()
    filled, timed = fills.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    fills.fill_uninitialized_memory = torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before > 0, warn_only=before == 1)
        fills.fill_uninitialized_memory, torch.backends.cudnn.benchmark = filled, timed


@contextmanager
def arithmetic(settings: ComputeSettings) -> Iterator[None]:
    """Compute as settings say: matrix products in their precision, and reproducibly or not."""
    with matmuls(settings.precision), reproducible(settings.deterministic):
        yield


def exact_products() -> _GeneratorContextManager[None]:
    """Compute matrix products in their operands' own precision, whatever the process was told.

    It is a decorator too. It serves work that is not a product of an operator: inner products,
    rotations of a basis, checks.
    """
    return matmuls("full")
