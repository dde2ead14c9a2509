"""The blocking side of `hvp_client.awaited.catalogue`: made of it by `make sdk`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import Any

from hvp_client._batches import Batch
from hvp_client._blobs import Blob
from hvp_client._checkpoints import Checkpoint
from hvp_client._identities import ApiKey, Caller
from hvp_client._system import ServerInfo, WorkerGroup
from hvp_client.awaited.catalogue import AsyncCatalogue
from hvp_client.blocking.job import Job
from hvp_client.blocking.twins import Blocking
from hvp_client.blocking.vector import Vector


class Catalogue(Blocking, ABC, twin=AsyncCatalogue):
    """The checkpoints, batches, blobs, vectors and jobs of a project, and facts of the server."""

    _twin: AsyncCatalogue

    def checkpoint(self, name: str) -> Checkpoint:
        """Look up a checkpoint; NotFoundError if there is none of that name."""
        return self._portal.run(self._twin.checkpoint(name))

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of the project, without their parameters."""
        return self._portal.run(self._twin.checkpoints())

    def relabel_checkpoint(
        self, name: Checkpoint | str, labels: Mapping[str, str], *, etag: str | None = None
    ) -> Checkpoint:
        """Give a checkpoint other labels, in the place of all that it has.

        Args:
            name: A checkpoint or its name.
            labels: At most 64 labels; names and values have at most 256 characters each.
            etag: `checkpoint.etag` of the labels to replace: the call fails if they have changed
                since. None replaces whatever labels there are.

        Returns:
            The checkpoint, without its parameters.

        Raises:
            NotFoundError: No such checkpoint.
            InvalidArgumentError: `LABELS_INVALID`.
            AbortedError: `ETAG_MISMATCH`: the labels have changed; look the checkpoint up again.
        """
        return self._portal.run(self._twin.relabel_checkpoint(name, labels, etag=etag))

    def delete_checkpoint(self, name: Checkpoint | str) -> None:
        """Delete a checkpoint, its vectors, and the files that nothing else is made of.

        Raises:
            NotFoundError: No such checkpoint.
            FailedPreconditionError: `RESOURCE_IN_USE`: a job that has not ended uses it.
        """
        self._portal.run(self._twin.delete_checkpoint(name))

    def batch(self, name: str) -> Batch:
        """Look up a batch; NotFoundError if there is none of that name."""
        return self._portal.run(self._twin.batch(name))

    def batches(self) -> list[Batch]:
        """All batches of the project."""
        return self._portal.run(self._twin.batches())

    def delete_batch(self, name: Batch | str) -> None:
        """Delete a batch, the outputs on it, and its file.

        Raises:
            NotFoundError: No such batch.
            FailedPreconditionError: `RESOURCE_IN_USE`: a job that has not ended uses it.
        """
        self._portal.run(self._twin.delete_batch(name))

    def blobs(self) -> list[Blob]:
        """All blobs of the project: files that checkpoints and batches are made of, or may be."""
        return self._portal.run(self._twin.blobs())

    def delete_blob(self, name: Blob | str) -> None:
        """Delete a blob of which no checkpoint and no batch is made.

        The server deletes such a blob by itself when nobody has asked for it for a day.

        Raises:
            FailedPreconditionError: `RESOURCE_IN_USE`: delete the checkpoint or batch first.
            NotFoundError: No such blob.
        """
        self._portal.run(self._twin.delete_blob(name))

    def vector(self, name: str) -> Vector:
        """Look up a vector; NotFoundError if there is none of that name."""
        result: Vector = self._wait(self._twin.vector(name))
        return result

    def vectors(self) -> list[Vector]:
        """All vectors of the project."""
        result: list[Vector] = self._wait(self._twin.vectors())
        return result

    def job(self, name: str) -> Job[Any]:
        """Look up a job; NotFoundError if there is none of that name."""
        result: Job[Any] = self._wait(self._twin.job(name))
        return result

    def jobs(self, states: Iterable[str] | None = None) -> list[Job[Any]]:
        """All jobs of the project, newest first.

        Args:
            states: States of the jobs to list, of `QUEUED`, `RUNNING`, `SUCCEEDED`, `FAILED` and
                `CANCELLED`; None means all. A job that is being cancelled is RUNNING.

        Returns:
            The jobs.

        Raises:
            InvalidArgumentError: `STATE_UNKNOWN`.
        """
        result: list[Job[Any]] = self._wait(self._twin.jobs(states))
        return result

    def server_info(self) -> ServerInfo:
        """The server's version, and the dtypes, precisions and kinds of operator that it serves."""
        return self._portal.run(self._twin.server_info())

    def worker_groups(self) -> list[WorkerGroup]:
        """The worker groups of the server, with the processes and the memory of their ranks."""
        return self._portal.run(self._twin.worker_groups())

    def whoami(self) -> Caller:
        """Who the server takes this client for, and what it may do."""
        return self._portal.run(self._twin.whoami())

    def create_api_key(
        self, role: str, *, label: str = "", ttl_s: float | None = None, all_projects: bool = False
    ) -> tuple[ApiKey, str]:
        """Make an API key of the project; the client's own role must be `admin`.

        Args:
            role: `read`, `submit` or `admin`; each may do what those before it may.
            label: At most 128 characters by which people tell it from others.
            ttl_s: Seconds until it expires; None: never.
            all_projects: Whether it opens every project, which takes a client that sees them all.

        Returns:
            The key, and its text, which is shown this once.

        Raises:
            InvalidArgumentError: `KEY_INVALID`.
            PermissionDeniedError: `ROLE_REQUIRED`.
            NotFoundError: `RESOURCE_NOT_FOUND`: the project is not this client's.
        """
        return self._portal.run(
            self._twin.create_api_key(role, label=label, ttl_s=ttl_s, all_projects=all_projects)
        )

    def api_keys(self, *, all_projects: bool = False) -> list[ApiKey]:
        """The API keys of the project, newest first, revoked and expired ones too.

        Args:
            all_projects: List those that open every project in their place.

        Raises:
            PermissionDeniedError: `ROLE_REQUIRED`: the client's own role is not `admin`.
        """
        return self._portal.run(self._twin.api_keys(all_projects=all_projects))

    def revoke_api_key(self, key: ApiKey | str) -> ApiKey:
        """Revoke an API key for good: within seconds its calls are refused and end.

        Args:
            key: A key or its name; one that is revoked already stays so.

        Raises:
            PermissionDeniedError: `ROLE_REQUIRED`: the client's own role is not `admin`.
            NotFoundError: `RESOURCE_NOT_FOUND`.
        """
        return self._portal.run(self._twin.revoke_api_key(key))
