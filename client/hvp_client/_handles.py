"""What a handle tells without a call: the same for those that block and those that are awaited."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeGuard, TypeVar

import numpy as np
from hvp_protos.v1 import operator_pb2, vector_pb2

from hvp_client._exceptions import InvalidArgumentError
from hvp_client._specs import kind_name
from hvp_client._times import from_timestamp

Handle = TypeVar("Handle")


class OperatorFields(ABC):  # noqa: B024 (what takes a call differs)
    """An operator as the server described it, every default filled in.

    Law: nothing here changes while the handle lives.
    """

    __array_ufunc__ = None  # numpy leaves `array @ H` to this class

    def __init__(self, description: operator_pb2.DescribeOperatorResponse):
        self._description = description
        self._spec = description.operator

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`, n the number of parameters."""
        return (self._description.num_parameters, self._description.num_parameters)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return np.dtype(self._spec.dtype)

    @property
    def kind(self) -> str:
        """`hessian`, `ggn` or `empirical_fisher`."""
        return kind_name(self._spec.kind)

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._spec.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._spec.data_batch

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._spec.micro_batch_size

    @property
    def precision(self) -> str:
        """Of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._spec.precision

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} of {self.checkpoint} {self.shape} {self.dtype}>"


class VectorFields(ABC):  # noqa: B024 (as above)
    """A vector as the server described it when it was made or looked up.

    Law: nothing here changes while the handle lives.
    """

    # Makes numpy scalars on the left, as in np.float64(2) * v, leave the product to this class.
    __array_ufunc__ = None

    def __init__(self, message: vector_pb2.Vector):
        self._message = message

    @property
    def name(self) -> str:
        """`projects/{project}/vectors/{id}`."""
        return self._message.name

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint whose parameter space it is in."""
        return self._message.checkpoint

    @property
    def shape(self) -> tuple[int]:
        """`(n,)`."""
        return (self._message.num_elements,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Float32 or float64."""
        return np.dtype(self._message.dtype)

    @property
    def durable(self) -> bool:
        """Whether the server can make it again when its ranks are started anew."""
        return self._message.durable

    @property
    def create_time(self) -> datetime:
        """When it was made, UTC."""
        return from_timestamp(self._message.create_time)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.shape} {self.dtype}>"


def require_handle(value: Any, handle: type[Handle], field: str) -> Handle:
    """Refuse what is no handle of this class, with what to do where it is numbers.

    Args:
        value: What the caller gave.
        handle: `Vector` or `AsyncVector`.
        field: The argument's name.

    Returns:
        The value.

    Raises:
        InvalidArgumentError: `VECTOR_EXPECTED`.
    """
    if isinstance(value, handle):
        return value
    raise InvalidArgumentError(
        f"{field} must be a {handle.__name__}, not {type(value).__name__}; H.vector(array) makes "
        "one of numbers",
        reason="VECTOR_EXPECTED",
        field=field,
    )


def is_sequence_of(value: Any, handle: type[Handle]) -> TypeGuard[Sequence[Handle]]:
    """Whether a list or tuple holds handles of this class."""
    return isinstance(value, (list, tuple)) and any(isinstance(v, handle) for v in value)
