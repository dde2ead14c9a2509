"""Arrays in and out: numpy's, torch's if the caller has imported it, and what numpy converts."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPYS_TOO = frozenset({"torch.float16", "torch.float32", "torch.float64"})


def as_numpy(value: Any) -> NDArray[Any]:
    """Make a numpy array of numbers of any kind.

    Args:
        value: An array, a torch tensor on any device and with or without a gradient, or anything
            that `np.asarray` takes. A dtype of torch's that numpy lacks, as bfloat16, becomes
            float32, which holds each of its numbers exactly.

    Returns:
        The array; a view where that is possible.

    Raises:
        TypeError: The value is no array.
        ValueError: The value is no array, for example a list of lists of unequal lengths.
    """
    if hasattr(value, "_portal") or any(
        hasattr(each, "_portal") for each in (value if isinstance(value, (list, tuple)) else ())
    ):  # a handle, whose elements cannot be waited for in the midst of a call
        raise TypeError("a vector on the server is no array here; np.asarray(v) fetches it")
    if not _is_tensor(value):
        return np.asarray(value)
    if value.is_floating_point() and str(value.dtype) not in _NUMPYS_TOO:
        value = value.detach().float()
    try:
        array: NDArray[Any] = value.numpy(force=True)  # detaches, and fetches from a GPU
    except RuntimeError as error:  # of a tensor without elements, as those under functorch
        raise TypeError(str(error)) from error
    return array


def like(given: Any, array: NDArray[Any]) -> Any:
    """Give a result in the caller's kind of array.

    Args:
        given: The caller's argument.
        array: The result, as a numpy array.

    Returns:
        A torch tensor of the array's dtype on the device of `given` where that is a tensor, else
        the array.
    """
    if not _is_tensor(given):
        return array
    return sys.modules["torch"].from_numpy(np.ascontiguousarray(array)).to(given.device)


def _is_tensor(value: Any) -> bool:
    # Who has a tensor has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
