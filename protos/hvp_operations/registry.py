"""Every operation, by name: the packages in this one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import hvp_operations
from hvp_operations.operation import Operation


@functools.cache
def operations() -> Mapping[str, Operation[Any]]:
    """The operations by name, in the order of their names."""
    names = sorted(
        module.name for module in pkgutil.iter_modules(hvp_operations.__path__) if module.ispkg
    )
    found = [importlib.import_module(f"hvp_operations.{name}").OPERATION for name in names]
    return {operation.name: operation for operation in found}
