"""Resource names: `projects/{project}/{collection}/{id}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from hvp_operations.wording import NAME, clipped, shown

from hvp_service.calls.errors import ServiceError, not_found

Collection = Literal[
    "blobs", "uploads", "checkpoints", "dataBatches", "vectors", "sessions", "jobs", "workerGroups"
]
KINDS: dict[str, str] = dict(
    zip(
        get_args(Collection),
        ["blob", "upload", "checkpoint", "data batch", "vector", "session", "job", "worker group"],
        strict=True,
    )
)

PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class Name:
    """A parsed resource name; `str` gives it back."""

    project: str
    collection: Collection
    id: str

    def __str__(self) -> str:
        return f"projects/{self.project}/{self.collection}/{self.id}"


def parse(text: str, collection: Collection) -> Name:
    """Read a name of one collection.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND when nothing could ever have this name.
    """
    parts = text.split("/")
    if (
        len(parts) == 4
        and parts[0] == "projects"
        and PROJECT.fullmatch(parts[1])
        and parts[2] == collection
        and IDENTIFIER.fullmatch(parts[3])
    ):
        return Name(parts[1], collection, parts[3])
    raise not_found(clipped(text, NAME), KINDS[collection])


def parse_parent(text: str) -> str:
    """The project of `projects/{project}`.

    Raises:
        ServiceError: PARENT_INVALID.
    """
    prefix, _, project = text.partition("/")
    if prefix != "projects" or not PROJECT.fullmatch(project):
        raise ServiceError(
            "PARENT_INVALID",
            "A parent is 'projects/{project}', the project in lower-case letters, digits and "
            f"hyphens; got {shown(text)}.",
            field="parent",
        )
    return project
