"""The backend interface in terms of a group of ranks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hvp_operations.operation import Result

from hvp_workers.backend import (
    NO_INPUTS,
    Backend,
    CheckpointDescription,
    Form,
    GroupLostError,
    Operator,
    RankInfo,
    RunProgress,
    Source,
    Space,
)
from hvp_workers.describer import Describer
from hvp_workers.group import Group
from hvp_workers.micro_batch import default_micro_batch


@final
class GroupBackend(Backend):
    """Sends each call to every rank and takes rank 0's answer, which all of them share.

    Calls that compute nothing are answered beside the ranks, whatever these do.
    """

    def __init__(self, group: Group):
        self._group = group
        self._describer = Describer()

    async def _call(self, method: str, *arguments: Any) -> Any:
        return (await self._group.run(method, *arguments))[0]

    async def start(self) -> None:
        """Start the ranks, and beside them the process that describes checkpoints."""
        self._describer.start()
        await self._group.start()

    async def close(self) -> None:
        """End the ranks, and the process that describes checkpoints."""
        await self._describer.close()
        await self._group.close()

    @property
    def generation(self) -> str:
        """See Backend."""
        return self._group.generation

    @property
    def device(self) -> str:
        """See Backend."""
        return self._group.device

    @property
    def num_ranks(self) -> int:
        """See Backend."""
        return self._group.num_ranks

    async def ranks(self) -> list[RankInfo]:
        """See Backend."""
        return await self._group.ranks()

    async def describe_checkpoint(self, checkpoint_dir: Path) -> CheckpointDescription:
        """See Backend."""
        return await self._describer.describe(checkpoint_dir)

    def default_micro_batch(self, num_sequences: int, sequence_length: int) -> int:
        """See Backend."""
        return default_micro_batch(num_sequences, sequence_length, self.num_ranks, self.device)

    async def loss(self, operator: Operator) -> float:
        """See Backend."""
        return float(await self._call("loss", operator))

    async def gradient(self, operator: Operator, output: str) -> None:
        """See Backend."""
        await self._call("gradient", operator, output)

    async def apply(
        self, operator: Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        """See Backend."""
        news: Mapping[str, str] = await self._call("apply", operator, tuple(inputs), tuple(outputs))
        return news

    async def evaluate_forms(
        self, operator: Operator, form: Form, inputs: Sequence[str]
    ) -> list[float]:
        """See Backend."""
        values: list[float] = await self._call("evaluate_forms", operator, form, tuple(inputs))
        return values

    async def losses_along(
        self, operator: Operator, directions: Sequence[str], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """See Backend."""
        losses: list[float] = await self._call(
            "losses_along", operator, tuple(directions), tuple(map(tuple, points))
        )
        return losses

    async def shape(self, space: Space) -> tuple[int, ...]:
        """See Backend."""
        return tuple(await self._call("shape", space))

    async def check_jacobian(self, operator: Operator) -> None:
        """See Backend."""
        await self._call("check_jacobian", operator)

    async def create_vector(self, name: str, space: Space, source: Source) -> None:
        """See Backend."""
        await self._call("create_vector", name, space, source)

    async def delete_vectors(self, names: Sequence[str]) -> None:
        """See Backend."""
        await self._call("delete_vectors", tuple(names))

    async def inner_products(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See Backend."""
        found: list[float] = await self._call("inner_products", tuple(pairs))
        return found

    async def save_vector(
        self, name: str, path: Path, start: int = 0, stop: int | None = None
    ) -> None:
        """See Backend."""
        await self._call("save_vector", name, path, start, stop)

    async def run(
        self,
        operator: Operator,
        operation: str,
        spec: Any,
        outputs: Sequence[str],
        inputs: Mapping[str, Sequence[str]] = NO_INPUTS,
        earlier: Result | None = None,
    ) -> AsyncIterator[RunProgress | Result]:
        """See Backend; the ranks hold the run between two calls, so others fit in between."""
        run = uuid.uuid4().hex
        yield RunProgress(operation=operation, stage="loading", num_products=0, max_products=0)
        try:
            await self._group.run(
                "run_start", run, operator, operation, spec, dict(inputs), earlier
            )
            while True:
                step: RunProgress | Result = await self._call("run_step", run, tuple(outputs))
                yield step
                if isinstance(step, Result):
                    return
        except GroupLostError:
            run = ""  # it went with the ranks
            raise
        finally:
            if run:
                await self._group.run("run_end", run)
