"""Triton, or what lets the modules of kernels be imported without it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:  # no wheel for this platform; `Flash.supports` says so before any launch
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=float)
