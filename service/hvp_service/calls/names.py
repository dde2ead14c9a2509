"""Resource names: `projects/{project}/{collection}/{id}`.

Names that callers write come in here alone, and a project that is not the caller's does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from hvp_operations.wording import NAME, clipped, shown

from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.identity import caller

Collection = Literal[
    "blobs",
    "uploads",
    "checkpoints",
    "dataBatches",
    "vectors",
    "sessions",
    "jobs",
    "workerGroups",
    "keys",
]
KINDS: dict[str, str] = dict(
    zip(
        get_args(Collection),
        [
            *("blob", "upload", "checkpoint", "data batch", "vector", "session", "job"),
            *("worker group", "key"),
        ],
        strict=True,
    )
)

PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
#: Stands for every project, in names and parents of API keys.
ALL_PROJECTS = "-"
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
    """Read a name of one collection that a caller wrote.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND when nothing could ever have this name, or nothing that
            the caller may know of.
    """
    parts = text.split("/")
    if (
        len(parts) == 4
        and parts[0] == "projects"
        and _is_project(parts[1], all_too=collection == "keys")
        and parts[2] == collection
        and IDENTIFIER.fullmatch(parts[3])
        and caller.sees(parts[1])
    ):
        return noted(Name(parts[1], collection, parts[3]))
    raise not_found(clipped(text, NAME), KINDS[collection])


def parse_parent(text: str, *, all_too: bool = False) -> str:
    """The project of `projects/{project}` that a caller wrote.

    Args:
        text: The parent.
        all_too: Whether it may be ALL_PROJECTS, which is there for whoever sees every one.

    Raises:
        ServiceError: PARENT_INVALID. RESOURCE_NOT_FOUND: it is not the caller's.
    """
    prefix, _, project = text.partition("/")
    if prefix != "projects" or not _is_project(project, all_too=all_too):
        raise ServiceError(
            "PARENT_INVALID",
            "A parent is 'projects/{project}', the project in lower-case letters, digits and "
            f"hyphens; got {shown(text)}.",
            field="parent",
        )
    require_project(project)
    return project


def _is_project(text: str, *, all_too: bool) -> bool:
    return PROJECT.fullmatch(text) is not None or (all_too and text == ALL_PROJECTS)


def require_project(project: str) -> None:
    """Refuse a project that is not the caller's, as if it did not exist.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND.
    """
    if caller.sees(project):
        return
    own = ", ".join(sorted(caller.identity().projects or ()))
    raise ServiceError(
        "RESOURCE_NOT_FOUND",
        f"There is no project {project!r} for these credentials; they are for {own}.",
        resource=f"projects/{project}",
    )


def noted(name: Name) -> Name:
    """The same name, which the log of calls is to mention."""
    if (call := caller.current()) is not None:
        call.note(str(name))
    return name
