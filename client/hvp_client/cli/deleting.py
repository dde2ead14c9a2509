"""`hvp delete`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvp_operations.wording import NAME, shown

from hvp_client import Client
from hvp_client.cli.failures import failures_reported, usage_error

_DELETERS: dict[str, Callable[[Client, str], None]] = {
    "checkpoints": lambda client, name: client.delete_checkpoint(name),
    "dataBatches": lambda client, name: client.delete_batch(name),
    "blobs": lambda client, name: client.delete_blob(name),
    "vectors": lambda client, name: client.vector(name).delete(),
    "jobs": lambda client, name: client.job(name).delete(),
}


def delete(address: str, names: Sequence[str]) -> None:
    """Delete things by name, one after another.

    Args:
        address: Address of the server.
        names: Names of the resources, `projects/{project}/{collection}/{id}` each.
    """
    with failures_reported(), Client(address) as client:
        for name in names:
            collection = [*name.split("/"), "", "", ""][2]
            if collection not in _DELETERS:
                usage_error(
                    f"{shown(name, NAME)} names nothing that can be deleted; a name is "
                    f"projects/PROJECT/KIND/ID, KIND one of {', '.join(_DELETERS)}"
                )
            _DELETERS[collection](client, name)
