"""How a request is computed and how much memory it takes, decided before it runs."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.retention import no_memory_for
from hvp_core.errors import CurvatureError
from hvp_core.settings import ComputeSettings
from hvp_operations.operation import Cost

from hvp_workers.backend import Precision, Tuning
from hvp_workers.room import USABLE, needed_bytes

_EXACT_WORKING = 1.5  # blocks and activations in float64, beside the vectors
_KEPT = 0.25  # of the memory that is free, for what a product leaves to the next one

#: Settings for the forward pass that labels are drawn in: in the vectors' own type.
DRAWING = ComputeSettings(schedule="lean")
#: Settings for the products that verify eigenpairs: as exact as can be, nothing kept or compiled.
EXACT = ComputeSettings(schedule="lean", precision="float64")


class Policy(ABC):
    """Decides what memory decides: all that may change how a request is rounded, in one place.

    Law: all ranks are asked with the same numbers and so decide alike.
    """

    is_deterministic: bool

    @abstractmethod
    def settings(
        self, precision: Precision, tuning: Tuning, *, device: str, available_bytes: int
    ) -> ComputeSettings:
        """How the products of an operator are computed.

        Args:
            precision: Precision of the operands of matrix products.
            tuning: Settings of the server.
            device: `cpu` or `cuda`.
            available_bytes: Memory that is free on the rank that has least.
        """

    @abstractmethod
    def room_for(self, cost: Cost, *, vector_bytes: int, available_bytes: int) -> int:
        """Number of vectors that a run may hold.

        Args:
            cost: Products and vectors that the run takes.
            vector_bytes: Bytes of one vector on one rank.
            available_bytes: Memory that is free on the rank that has least.

        Raises:
            CurvatureError: INSUFFICIENT_CLUSTER_MEMORY, or DETERMINISTIC_MEMORY (metadata: needed
                and available bytes).
        """

    @abstractmethod
    def affords_exact(self, needed_bytes: int, available_bytes: int) -> bool:
        """Whether there is memory for products in float64.

        Raises:
            CurvatureError: DETERMINISTIC_MEMORY: there is none, and answers would be others.
        """

    @abstractmethod
    def at_once(self, wished: int, *, each_bytes: int, room_bytes: int) -> int:
        """Number of products that are taken in one call; 0 where there is no room for one.

        Args:
            wished: Number that would be best.
            each_bytes: Memory of each.
            room_bytes: Memory for all.

        Raises:
            CurvatureError: DETERMINISTIC_MEMORY: there is no room for all.
        """

    def as_wanted(self, how: ComputeSettings) -> ComputeSettings:
        """Fixed settings, such as `EXACT`, as this policy wants them."""
        return replace(how, deterministic=self.is_deterministic)

    def provenance(self, curvature: Curvature, num_vectors: int) -> Mapping[str, str]:
        """What an answer says of the choices that were made by rule.

        Args:
            curvature: Computes the products.
            num_vectors: Vectors that the run may hold.
        """
        return {}


@final
class Flexible(Policy):
    """The fastest way that fits the memory that there is."""

    is_deterministic = False

    def settings(
        self, precision: Precision, tuning: Tuning, *, device: str, available_bytes: int
    ) -> ComputeSettings:
        """See Policy.

        Compiling takes minutes once and then saves most of the time on a GPU; on a CPU, where large
        matrix products take what there is to take, it stays off unless it is asked for.
        """
        compiled = tuning.compile == "on" or (tuning.compile == "auto" and device == "cuda")
        return ComputeSettings(
            schedule=tuning.schedule,
            budget_bytes=int(available_bytes * _KEPT),
            compile=compiled,
            graphs=compiled and device == "cuda",
            precision=precision,
        )

    def room_for(self, cost: Cost, *, vector_bytes: int, available_bytes: int) -> int:
        """See Policy: as many as the run can make use of and memory allows."""
        room = int(available_bytes * USABLE) // vector_bytes
        if room < cost.least_vectors:
            needed = needed_bytes(cost.least_vectors, vector_bytes)
            raise CurvatureError(
                "INSUFFICIENT_CLUSTER_MEMORY",
                f"{cost.least_vectors} vectors at the least need {needed} bytes on a rank that has "
                f"{available_bytes} free; use more workers, float32, or ask for less",
                {"needed_bytes": str(needed), "available_bytes": str(available_bytes)},
            )
        return min(cost.wished_vectors, room)

    def affords_exact(self, needed_bytes: int, available_bytes: int) -> bool:
        """See Policy."""
        return needed_bytes <= available_bytes

    def at_once(self, wished: int, *, each_bytes: int, room_bytes: int) -> int:
        """See Policy."""
        return max(0, min(wished, room_bytes // each_bytes))


@final
class Pinned(Policy):
    """One way, whatever memory there is, or a refusal: for the same bits each time.

    What is left to memory is whether blocks keep their primal half between products, which changes
    no bit (`retention.pinned`).
    """

    is_deterministic = True

    def settings(
        self, precision: Precision, tuning: Tuning, *, device: str, available_bytes: int
    ) -> ComputeSettings:
        """See Policy. Nothing is compiled: a first call would round otherwise than later ones."""
        return ComputeSettings(
            schedule=tuning.schedule,
            budget_bytes=int(available_bytes * _KEPT),
            precision=precision,
            deterministic=True,
        )

    def room_for(self, cost: Cost, *, vector_bytes: int, available_bytes: int) -> int:
        """See Policy: as many as the run can make use of."""
        needed = needed_bytes(cost.wished_vectors, vector_bytes)
        if needed > available_bytes:
            what = f"a run with all its {cost.wished_vectors} vectors"
            raise no_memory_for(what, needed, available_bytes, "float32, or ask for less")
        return cost.wished_vectors

    def affords_exact(self, needed_bytes: int, available_bytes: int) -> bool:
        """See Policy."""
        if needed_bytes > available_bytes:
            raise no_memory_for(
                "the product in float64 that an answer rests on",
                needed_bytes,
                available_bytes,
                "or float64 throughout",
            )
        return True

    def at_once(self, wished: int, *, each_bytes: int, room_bytes: int) -> int:
        """See Policy."""
        if wished * each_bytes > room_bytes:
            raise no_memory_for(
                f"the products of {wished} vectors at once",
                wished * each_bytes,
                max(0, room_bytes),
                "or give fewer at once",
            )
        return wished

    def provenance(self, curvature: Curvature, num_vectors: int) -> Mapping[str, str]:
        """See Policy. How blocks were taken through a product, its notes say."""
        return {
            "deterministic": "true",
            "micro_batch_size": str(curvature.micro_batch_size),
            "num_vectors": str(num_vectors),
            "compiled": "false",
            "num_threads": str(torch.get_num_threads()),
            "device_name": _device_name(curvature.space.device),
        }


def policy(*, deterministic: bool) -> Policy:
    """The policy of an operator.

    Args:
        deterministic: Whether the operator is to give the same bits each time.
    """
    return _PINNED if deterministic else _FLEXIBLE


_FLEXIBLE, _PINNED = Flexible(), Pinned()


def _device_name(device: torch.device) -> str:
    """The kind of machine that a rank computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def exact_bytes(theta_numel: int, vector_numel: int) -> int:
    """Memory on a rank for a float64 product with a float32 vector: θ and v are copied too.

    Args:
        theta_numel: Number of elements of θ on the rank.
        vector_numel: Number of elements of a vector on the rank; a vector may have only some of the
            parameters.
    """
    return int(_EXACT_WORKING * (8 * theta_numel + (8 + 4) * vector_numel))
