"""`hvp keys`: through a server, or on its machine without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from hvp_protos.v1 import key_pb2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvp_client import ApiKey, Client
from hvp_client._credentials import project_for
from hvp_client._identities import key_from_proto
from hvp_client.cli.display import print_laid_out
from hvp_client.cli.failures import failures_reported, usage_error

_DAY_S = 86400.0


class _Keys(Protocol):
    """Where keys are made, listed and revoked."""

    def create_api_key(
        self, role: str, *, label: str = "", ttl_s: float | None = None, all_projects: bool = False
    ) -> tuple[ApiKey, str]: ...

    def api_keys(self, *, all_projects: bool = False) -> list[ApiKey]: ...

    def revoke_api_key(self, key: str) -> ApiKey: ...


def create(
    address: str,
    state_dir: Path | None,
    *,
    project: str | None,
    role: str,
    label: str,
    days: float | None,
    as_json: bool,
) -> None:
    """Make a key and print its text: alone on standard output, so that a script can keep it.

    Args:
        address: Address of the server.
        state_dir: Its state folder, to do without the server.
        project: The project that the key opens; `-`: every one.
        role: What it may do.
        label: Words by which people tell it from others.
        days: Days until it expires; None: never.
        as_json: Print a JSON object.
    """
    with _keys(address, state_dir, project) as (keys, every):
        ttl_s = None if days is None else days * _DAY_S
        key, text = keys.create_api_key(role, label=label, ttl_s=ttl_s, all_projects=every)
    if as_json:
        print(json.dumps(_record(key) | {"api_key": text}, indent=2))
        return
    until = f"until {key.expire_time:%Y-%m-%d %H:%M} UTC" if key.expire_time else "for ever"
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"{escape(key.name)}, role {key.role}, {until}. This is its text, shown this once; clients "
        "take it from HVP_API_KEY:"
    )
    print(text)


def list_all(address: str, state_dir: Path | None, *, project: str | None, as_json: bool) -> None:
    """Print a project's keys, the newest first.

    Args:
        address: Address of the server.
        state_dir: Its state folder, to do without the server.
        project: The project; `-`: the keys that open every one.
        as_json: Print a JSON array.
    """
    with _keys(address, state_dir, project) as (keys, every):
        found = keys.api_keys(all_projects=every)
    if as_json:
        print(json.dumps([_record(key) for key in found], indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    if not found:
        console.print("no keys")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("id", "role", "state", "made", "used", "label"):
        table.add_column(column, no_wrap=True)
    for key in found:
        table.add_row(
            key.name.rpartition("/")[2],
            key.role,
            _state(key),
            f"{key.create_time:%Y-%m-%d}",
            f"{key.use_time:%Y-%m-%d %H:%M}" if key.use_time else "never",
            escape(key.label),
        )
    print_laid_out(table, console)


def revoke(address: str, state_dir: Path | None, key: str, *, project: str | None) -> None:
    """Revoke a key.

    Args:
        address: Address of the server.
        state_dir: Its state folder, to do without the server.
        key: Name or id of the key.
        project: Its project, for an id; `-`: it opens every one.
    """
    with _keys(address, state_dir, project) as (keys, every):
        if "/" in key:
            name = key
        else:
            named = [each.name for each in keys.api_keys(all_projects=every)]
            name = next((each for each in named if each.endswith(f"/{key}")), "")
            if not name:
                usage_error(f"there is no key {key} in this project; see `hvp keys list`")
        revoked = keys.revoke_api_key(name)
    print(_state(revoked))


@contextmanager
def _keys(
    address: str, state_dir: Path | None, project: str | None
) -> Iterator[tuple[_Keys, bool]]:
    """The keys to work on, and whether those of every project are meant."""
    every = project == "-"
    with failures_reported():
        if state_dir is None:
            with Client(address, project=None if every else project) as client:
                yield client, every
            return
        yield _LocalKeys(state_dir, project_for(project, None)), every


class _LocalKeys:
    """A server's keys by its state folder, without the server."""

    def __init__(self, state_dir: Path, project: str):
        self._state_dir = state_dir
        self._parent = f"projects/{project}"

    def create_api_key(
        self, role: str, *, label: str = "", ttl_s: float | None = None, all_projects: bool = False
    ) -> tuple[ApiKey, str]:
        request = key_pb2.CreateKeyRequest(parent=self._parent, role=role, label=label)
        if ttl_s is not None:
            request.ttl.FromNanoseconds(int(ttl_s * 1e9))
        answer = self._ask("CreateKey", request)
        return key_from_proto(answer.key), answer.api_key

    def api_keys(self, *, all_projects: bool = False) -> list[ApiKey]:
        answer = self._ask("ListKeys", key_pb2.ListKeysRequest(parent=self._parent))
        return [key_from_proto(message) for message in answer.keys]

    def revoke_api_key(self, key: str) -> ApiKey:
        return key_from_proto(self._ask("RevokeKey", key_pb2.RevokeKeyRequest(name=key)).key)

    def _ask(self, method: str, request: Any) -> Any:
        try:
            from hvp_service.identity.local import LocalKeysError, ask
        except ModuleNotFoundError as error:
            usage_error(
                f"the server's packages are not installed ({error.name} is missing); "
                "run `pip install 'hvp[service]'`, or ask the server at --address"
            )
        try:
            return ask(self._state_dir, method, request)
        except LocalKeysError as error:
            usage_error(str(error))


def _record(key: ApiKey) -> dict[str, object]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in asdict(key).items()
    }


def _state(key: ApiKey) -> str:
    if key.revoke_time:
        return f"revoked {key.revoke_time:%Y-%m-%d %H:%M}"
    if key.expire_time and key.expire_time <= datetime.now(UTC):
        return f"expired {key.expire_time:%Y-%m-%d}"
    return f"until {key.expire_time:%Y-%m-%d}" if key.expire_time else "open"
