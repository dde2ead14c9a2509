"""The caller of the call that runs now: who it is, which projects it sees, and what it may do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

Role = Literal["read", "submit", "admin"]
#: Each role may do what those before it may.
ROLES: tuple[Role, ...] = get_args(Role)

Kind = Literal["local", "certificate", "key", "token"]

_MAX_NAMES = 16  # of one call that are remembered: the log of calls is no copy of requests


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Somebody who calls.

    Attributes:
        kind: What shows who it is; `local` shows only that it is on the server's machine.
        subject: Its name: a key's id, a token's subject, or the common name of a certificate.
        projects: The projects that it sees; None means all.
        role: What it may do in them.
        expire_time: When it stops being believed, microseconds since the epoch; None: never.
    """

    kind: Kind
    subject: str
    projects: frozenset[str] | None = None
    role: Role = "admin"
    expire_time: int | None = None

    def sees(self, project: str) -> bool:
        """Whether a project is there for this caller."""
        return self.projects is None or project in self.projects

    def may(self, role: Role) -> bool:
        """Whether it may do what takes a role."""
        return ROLES.index(self.role) >= ROLES.index(role)


SERVER = Identity(kind="local", subject="server")


@dataclass
class Call:
    """A call that runs, with the names of resources that it has dealt with so far."""

    identity: Identity
    names: dict[str, None] = field(default_factory=dict)  # a set in order

    def note(self, name: str) -> None:
        """Remember a name, as long as there are few."""
        if len(self.names) < _MAX_NAMES:
            self.names[name] = None


_CALL: ContextVar[Call | None] = ContextVar("hvp_call", default=None)


def current() -> Call | None:
    """The call in which this code runs; None in what the server does of its own accord."""
    return _CALL.get()


def identity() -> Identity:
    """Whoever this code runs for; the server itself, who may do everything, outside of calls."""
    call = current()
    return SERVER if call is None else call.identity


def sees(project: str) -> bool:
    """Whether whoever this code runs for sees a project; the server itself sees all."""
    return identity().sees(project)


@contextlib.contextmanager
def called_by(identity: Identity) -> Iterator[Call]:
    """Make what runs inside, with the tasks that it starts, a call of `identity`."""
    call = Call(identity)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
