"""The log of who did what: a line of JSON for each call that changes something or is refused."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvp_service.identity.caller import Identity

_FILE_BYTES = 64 << 20
_NUM_FILES = 16


class AuditLog:
    """Appends lines to a file; a full one is put aside under a number, and the oldest go.

    Lines hold names and no contents: no key, no labels, no numbers of a model.

    Args:
        path: The file; None keeps no log.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path | None):
        self._handler: logging.Handler | None = None
        if path is not None:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            self._handler = logging.handlers.RotatingFileHandler(
                path, maxBytes=_FILE_BYTES, backupCount=_NUM_FILES - 1
            )

    def note(
        self,
        identity: Identity | None,
        method: str,
        *,
        peer: str = "",
        names: Sequence[str] = (),
        outcome: str = "OK",
        call_id: str = "",
    ) -> None:
        """Write one line.

        Args:
            identity: Who called; None: nobody knows.
            method: `Service/Method`, or a command.
            peer: Address of the caller.
            names: Resources that were dealt with.
            outcome: OK, CANCELLED, or the reason of the refusal.
            call_id: Name of the call in the server's log.
        """
        if self._handler is None:
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "caller": None if identity is None else f"{identity.kind}:{identity.subject}",
            "role": None if identity is None else identity.role,
            "method": method,
            "resources": list(names),
            "outcome": outcome,
            "peer": peer,
            "call_id": call_id,
        }
        # A disk that is full costs the line and a word on stderr, not the call.
        self._handler.emit(
            logging.LogRecord("audit", logging.INFO, "", 0, json.dumps(line), None, None)
        )

    def close(self) -> None:
        """Close the file."""
        if self._handler is not None:
            self._handler.close()
