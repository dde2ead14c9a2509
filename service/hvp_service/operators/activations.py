"""Activations that an operator or a vector names: checked, and their shapes asked of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from hvp_workers.backend import Activation, Backend, BackendError, Operator, Space

from hvp_service.calls.errors import ServiceError
from hvp_service.group.supervisor import GroupSupervisor

T = TypeVar("T")

LONGEST = 512  # characters of a submodule's name
_MOST_KNOWN = 1024


def activation_of(module: str, *, of_input: bool, field: str) -> Activation | None:
    """The activation that a request names; None where it names no submodule.

    Raises:
        ServiceError: MODULES_INVALID.
    """
    if not module:
        if of_input:
            raise ServiceError(
                "MODULES_INVALID", "An own input is one of a submodule; name that.", field=field
            )
        return None
    if len(module) > LONGEST:
        raise ServiceError(
            "MODULES_INVALID",
            f"The name of a submodule has at most {LONGEST} characters, not {len(module)}.",
            field=field,
        )
    return Activation(module=module, side="input" if of_input else "output")


class Activations:
    """Asks the ranks what only a run of the model shows; they are asked once.

    Args:
        group: The ranks.
    """

    def __init__(self, group: GroupSupervisor):
        self._group = group
        self._known: dict[Space | Operator, tuple[int, ...]] = {}

    async def shape(self, space: Space, field: str) -> tuple[int, ...]:
        """The shape of vectors of a space of activations.

        Args:
            space: The space.
            field: Path of the submodule in the request, for errors.

        Raises:
            ServiceError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
            BackendError: As the backend's `shape`.
        """
        return await self._once(space, field, lambda backend: backend.shape(space))

    async def check(self, operator: Operator, field: str) -> None:
        """Check that a Jacobian of activations can be taken.

        Args:
            operator: The Jacobian.
            field: Path of the operator in the request, for errors.

        Raises:
            ServiceError: MODULE_NOT_FOUND, MODULE_UNSUPPORTED, MODULES_OUT_OF_ORDER.
            BackendError: As the backend's `check_jacobian`.
        """

        async def check(backend: Backend) -> tuple[int, ...]:
            await backend.check_jacobian(operator)
            return ()

        await self._once(replace(operator, precision="full"), field, check)

    async def _once(
        self,
        key: Space | Operator,
        field: str,
        ask: Callable[[Backend], Coroutine[Any, Any, tuple[int, ...]]],
    ) -> tuple[int, ...]:
        if key not in self._known:
            try:
                found = await self._group.call(ask)
            except BackendError as error:
                if not error.reason.startswith("MODULE"):
                    raise
                raise ServiceError(
                    error.reason, error.message, field=field, metadata=error.metadata
                ) from error
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        return self._known[key]
