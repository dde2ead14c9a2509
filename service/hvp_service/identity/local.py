"""API keys on the server's own machine, by its state folder: so the first key comes about."""

from __future__ import annotations

import asyncio
import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError
from hvp_service.identity.audit import AuditLog
from hvp_service.identity.caller import Identity, called_by
from hvp_service.identity.keys import KeyStore
from hvp_service.identity.rpc import KeyServicer
from hvp_service.storage.database import open_database
from hvp_service.storage.state_dir import StateDirectoryError, own_folder
from hvp_service.storage.troubles import DatabaseRefusedError


class LocalKeysError(Exception):
    """The state folder does not do, or the server would have refused; the message says why."""


@dataclass(frozen=True)
class _Keys:
    keys: KeyStore


def ask(state_dir: Path, method: str, request: Any) -> Any:
    """What a server on this state folder would answer, whether or not one runs.

    Whoever may write to the folder may do everything to what is in it, with or without a key.

    Args:
        state_dir: The folder; it is made where there is none.
        method: A method of KeyService.
        request: Its message.

    Returns:
        The message of the answer.

    Raises:
        LocalKeysError: The server would have refused, or the folder is not this user's.
    """
    try:
        return asyncio.run(_ask(state_dir, method, request))
    except (ServiceError, StateDirectoryError, DatabaseRefusedError, OSError) as error:
        raise LocalKeysError(str(error)) from None


async def _ask(root: Path, method: str, request: Any) -> Any:
    config = ServerConfig(state_dir=root)
    state_dir = own_folder(root)
    who = Identity(kind="local", subject=getpass.getuser())
    database = await open_database(config.database_url or state_dir.database)
    audit = AuditLog(config.audit_log or state_dir.audit_log)
    try:
        with called_by(who) as call:
            answer = await getattr(KeyServicer(_Keys(KeyStore(database))), method)(request, None)
        if method != "ListKeys":
            audit.note(who, f"KeyService/{method}", peer="state folder", names=list(call.names))
        return answer
    finally:
        await database.close()
        audit.close()
