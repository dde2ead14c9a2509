"""The backend interface in terms of a group of ranks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hvp_workers.backend import (
    Backend,
    CheckpointDescription,
    EigshProgress,
    EigshResult,
    EigshSpec,
    GroupLostError,
    Operator,
    OperatorInfo,
    RankInfo,
    Source,
    Space,
)
from hvp_workers.group import Group


@final
class GroupBackend(Backend):
    """Sends each call to every rank and takes rank 0's answer, which all of them share."""

    def __init__(self, group: Group):
        self._group = group

    async def _call(self, method: str, *arguments: Any) -> Any:
        return (await self._group.run(method, *arguments))[0]

    async def start(self) -> None:
        """Start the ranks."""
        await self._group.start()

    async def close(self) -> None:
        """End the ranks."""
        await self._group.close()

    @property
    def generation(self) -> str:
        """The group's."""
        return self._group.generation

    @property
    def device(self) -> str:
        """The group's."""
        return self._group.device

    @property
    def num_ranks(self) -> int:
        """The group's."""
        return self._group.num_ranks

    async def ranks(self) -> list[RankInfo]:
        """Asked of every rank."""
        return await self._group.run("info")

    async def describe_checkpoint(self, checkpoint_dir: Path) -> CheckpointDescription:
        """See Backend."""
        found: CheckpointDescription = await self._call("describe_checkpoint", checkpoint_dir)
        return found

    async def describe_operator(self, operator: Operator) -> OperatorInfo:
        """See Backend."""
        found: OperatorInfo = await self._call("describe_operator", operator)
        return found

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

    async def save_vector(self, name: str, path: Path) -> None:
        """See Backend."""
        await self._call("save_vector", name, path)

    async def eigsh(
        self, operator: Operator, spec: EigshSpec, outputs: Sequence[str]
    ) -> AsyncIterator[EigshProgress | EigshResult]:
        """See Backend; the ranks hold the run between two calls, so others fit in between."""
        run = uuid.uuid4().hex
        yield EigshProgress(stage="loading", num_products=0, max_products=spec.max_products)
        try:
            await self._group.run("eigsh_start", run, operator, spec)
            while True:
                step: EigshProgress | EigshResult = await self._call(
                    "eigsh_step", run, tuple(outputs)
                )
                yield step
                if isinstance(step, EigshResult):
                    return
        except GroupLostError:
            run = ""  # it went with the ranks
            raise
        finally:
            if run:
                await self._group.run("eigsh_end", run)
