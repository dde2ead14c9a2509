"""What holds for all tests."""

from __future__ import annotations

import logging

import torch  # noqa: F401 (it sets the logger up)

# The compiler describes every tensor it looks at to this logger. Nobody listens, but pytest records
# whatever reaches the root.
trace_log = logging.getLogger("torch.__trace")
trace_log.propagate = False
trace_log.handlers.clear()
