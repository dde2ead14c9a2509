"""`hvp doctor`: problems of this machine and of a server, and what to do about each."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast

import grpc
from hvp_protos.v1 import system_pb2, system_pb2_grpc
from rich.console import Console
from rich.markup import escape

from hvp_client._channels import Way
from hvp_client._credentials import Credentials, project_for
from hvp_client._enums import plain_name
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._settings import Tls
from hvp_client._status import error_from_rpc
from hvp_client.cli.doctor_server import examine_server, settings_of
from hvp_client.cli.findings import Finding

_GIB = 1 << 30
_ANSWER_S = 5.0
_SIGNS = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "problem": "[red]problem[/]"}
_SDK_PACKAGES = ("hvp", "grpcio", "protobuf", "numpy", "safetensors", "google-crc32c")
_SERVER_PACKAGES = ("torch", "ray", "transformers", "sqlalchemy", "pydantic-settings")


def examine(
    address: str | None,
    default_address: str,
    *,
    state_dir: Path | None,
    as_json: bool,
    config_file: Path | None = None,
) -> int:
    """Examine this machine and a server, and print the findings.

    Args:
        address: Address of the server that ought to answer; None: a server at the default address
            may answer, but need not.
        default_address: Address of a server by default.
        state_dir: Folder in which a server would keep its state; None for that of the settings.
        as_json: Print a JSON array.
        config_file: File of a server's settings; None for that of HVP_CONFIG, if there is one.

    Returns:
        1 if there is a problem, else 0.
    """
    # Without a folder to stand in, libraries end the process as they are imported.
    findings = list(_current_folder())
    if not findings:
        config, of_settings = settings_of(config_file)
        if state_dir is None:
            state_dir = Path() if config is None else config.state_dir
        asked = address or default_address
        server = _server(asked, expected=address is not None)
        findings = [
            *_python(),
            *_packages(),
            *of_settings,
            *_devices(),
            *_memory(),
            *_surroundings(),
            *_disk(state_dir),
        ]
        if config is not None:
            answering = asked if server.verdict == "ok" else ""
            findings += examine_server(config, state_dir, answering)
        findings.append(server)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for finding in findings:
            console.print(f"{_SIGNS[finding.verdict]} {finding.what}: {escape(finding.found)}")
            if finding.fix:
                console.print(f"        {escape(finding.fix)}")
    return int(any(finding.verdict == "problem" for finding in findings))


def _current_folder() -> Iterator[Finding]:
    try:
        Path.cwd()
    except FileNotFoundError:
        where = str(Path("/proc/self/cwd").readlink()).removesuffix(" (deleted)")
        yield Finding(
            what="current folder",
            verdict="problem",
            found=f"{where} has been deleted",
            fix="change to one that exists; nothing else can be looked at from here",
        )


def _python() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding(
        what="Python",
        verdict="problem" if old else "ok",
        found=f"{platform.python_version()} on {platform.platform(terse=True)}",
        fix="use Python 3.11 or newer" if old else "",
    )


def _packages() -> Iterator[Finding]:
    for packages, extra in ((_SDK_PACKAGES, ""), (_SERVER_PACKAGES, "service")):
        missing, found = [], []
        for package in packages:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                missing.append(package)
        # A machine that only calls a server needs none of the server's packages.
        verdict: Literal["ok", "note", "problem"] = "ok"
        if missing:
            verdict = "note" if extra else "problem"
        install = f"pip install 'hvp[{extra}]' to run a server here" if extra else "pip install hvp"
        yield Finding(
            what="server packages" if extra else "packages",
            verdict=verdict,
            found=", ".join(found + [f"no {package}" for package in missing]),
            fix=install if missing else "",
        )


def _devices() -> Iterator[Finding]:
    """The devices that ranks could compute on.

    Importing torch takes seconds, so that is done only where there is a GPU that it may see.
    """
    try:
        from hvp_workers import surroundings
    except ImportError:  # a machine that only calls a server
        return
    if (built_for := surroundings.torch_accelerator()) is None:
        return
    if not built_for:
        yield Finding(what="devices", verdict="ok", found="CPU only (torch without CUDA)")
        return
    names, talk = [], ""
    if surroundings.has_gpu_driver():
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            talk = ".".join(map(str, torch.cuda.nccl.version()))
    if names:
        yield Finding(what="devices", verdict="ok", found=f"{', '.join(names)}; {built_for}")
        alone = len(names) == 1
        yield Finding(
            what="NCCL",
            verdict="ok" if talk or alone else "problem",
            found=talk or "this torch has none",
            fix="" if talk or alone else "install torch for CUDA: ranks exchange tensors by NCCL",
        )
    else:
        yield Finding(
            what="devices",
            verdict="note",
            found=f"torch for {built_for} sees no GPU",
            fix="check `nvidia-smi`, or use --device cpu",
        )


def _memory() -> Iterator[Finding]:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total_bytes = page_bytes * os.sysconf("SC_PHYS_PAGES")
    free_bytes = page_bytes * os.sysconf("SC_AVPHYS_PAGES")
    yield Finding(
        what="memory",
        verdict="ok",
        found=f"{free_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB free, "
        f"{os.cpu_count()} cores",
    )
    shared = Path("/dev/shm")  # noqa: S108 (looked at, not written to)
    if shared.is_dir():
        size_bytes = shutil.disk_usage(shared).total
        # Ray keeps weights there, one copy for all ranks of a machine; containers give 64 MiB.
        small = size_bytes < _GIB
        yield Finding(
            what="shared memory",
            verdict="note" if small else "ok",
            found=f"{shared} holds {size_bytes / _GIB:.2f} GiB",
            fix="start the container with --shm-size of at least the model's size" if small else "",
        )


def _surroundings() -> Iterator[Finding]:
    """Causes for which a server would not start."""
    try:
        from hvp_workers import surroundings
    except ImportError:  # a machine that only calls a server
        return
    for obstacle in surroundings.obstacles():
        yield Finding(
            what=obstacle.what, verdict="problem", found=obstacle.problem, fix=obstacle.fix
        )
    if unused := surroundings.unused_temporary():
        yield Finding(
            what="temporary folder",
            verdict="note",
            found=f"Ray cannot put its sockets into {unused}, whose path is too long or not ASCII; "
            f"{surroundings.temp_root()} is used in its place",
            fix="set TMPDIR to a short path of ASCII characters if that one is small",
        )


def _disk(state_dir: Path) -> Iterator[Finding]:
    existing = next(p for p in (state_dir.absolute(), *state_dir.absolute().parents) if p.exists())
    usage = shutil.disk_usage(existing)
    tight = usage.free < 2 * _GIB
    # Ray schedules nothing on a machine whose disk is fuller than this.
    full = usage.used > 0.95 * usage.total
    yield Finding(
        what="disk",
        verdict="problem" if full else "note" if tight else "ok",
        found=f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free at {existing}",
        fix="free some, or put --state-dir on another disk" if tight or full else "",
    )
    if not os.access(existing, os.W_OK):
        yield Finding(
            what="state directory",
            verdict="problem",
            found=f"{existing} cannot be written to",
            fix="give another --state-dir",
        )


def _server(address: str, *, expected: bool) -> Finding:
    """Ask a server what it is, without the SDK, whose imports would take longer."""
    try:
        key = Credentials.given(None)
        way = Way.to(address, Tls.from_environment(), key)
    except InvalidArgumentError as error:
        return Finding(what="server", verdict="problem", found=error.reason, fix=error.message)
    # Never through a proxy of the environment.
    with way.channel((("grpc.enable_http_proxy", 0),)) as channel:
        stub = system_pb2_grpc.SystemServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            shown = way.metadata()
            info = stub.GetServerInfo(
                system_pb2.GetServerInfoRequest(), timeout=_ANSWER_S, metadata=shown
            )
            listed = stub.ListWorkerGroups(
                system_pb2.ListWorkerGroupsRequest(parent=f"projects/{project_for(None, key)}"),
                timeout=_ANSWER_S,
                metadata=shown,
            )
        except grpc.RpcError as error:
            reason = error_from_rpc(cast("grpc.aio.AioRpcError", error), address=way.address).reason
            return Finding(
                what="server",
                verdict="problem" if expected else "note",
                found=f"{reason} at {way.address}",
                fix="start one with `hvp serve`, or give its --address",
            )
    groups = [
        (len(group.ranks), plain_name(system_pb2.WorkerGroup.State, group.state, "STATE_"))
        for group in listed.worker_groups
    ]
    states = ", ".join(
        f"{count} rank{'' if count == 1 else 's'} {state}" for count, state in groups
    )
    lost = any(state == "LOST" for _, state in groups)
    return Finding(
        what="server",
        verdict="problem" if lost else "ok",
        found=f"hvp {info.version} at {way.address}: {states or 'no worker group'}",
        fix="look into the server's log; it starts the ranks anew by itself" if lost else "",
    )
