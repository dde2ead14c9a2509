"""The server's environment variables that reach the processes that compute.

These processes load files that strangers uploaded, write logs and cores, and may run on other
machines. What a shell or a cloud puts into the environment, keys of accounts above all, is no
business of theirs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

#: Nothing is ever fetched: a checkpoint is complete, or refused.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
        *("TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH"),
        *("CC", "CXX", "GLIBC_TUNABLES", "GRPC_ENABLE_FORK_SUPPORT", "GRPC_VERBOSITY"),
    }
)
_PREFIXES = (
    *("LC_", "PYTHON", "HVP_", "RAY_", "MALLOC_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"),
    *("TORCH", "PYTORCH_", "TRITON_", "CUDA", "NVIDIA_", "CUDNN_", "CUBLAS_"),
    *("NCCL_", "GLOO_", "UCX_", "FI_"),
)
# A family above may come to have secrets in it. The two of Ray's are its own, made by us.
_SECRETS = frozenset(
    {
        *("TOKEN", "TOKENS", "SECRET", "SECRETS", "KEY", "KEYS", "PASSWORD", "PASSWD"),
        *("CREDENTIALS", "DATABASE"),  # the URL of which has a password in it
    }
)
_NO_SECRETS = frozenset({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"})


def is_passed_on(name: str) -> bool:
    """Whether a variable of this name reaches the processes that compute."""
    if name in _NAMES or name in _NO_SECRETS:
        return True
    return name.startswith(_PREFIXES) and not _SECRETS & set(name.upper().split("_"))


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that a process that computes is started with."""
    return {name: text for name, text in environment.items() if is_passed_on(name)} | OFFLINE


def limit_environment() -> None:
    """Leave only such variables in this process, which must be a rank and nothing else."""
    kept = rank_environment(os.environ)
    os.environ.clear()
    os.environ.update(kept)


@contextlib.contextmanager
def limited_environment() -> Iterator[None]:
    """Limit the environment of processes that are started inside; it is as before afterwards.

    Threads that read the environment meanwhile see the smaller one.
    """
    before = dict(os.environ)
    limit_environment()
    try:
        yield
    finally:
        # What was set inside stays: Ray leaves notes to itself there.
        after = dict(os.environ)
        for name in OFFLINE:
            after.pop(name)
        os.environ.clear()
        os.environ.update(before | after)
