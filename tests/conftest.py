"""What all tests share: modules are loaded without garbage collection, and are no garbage."""

from __future__ import annotations

import gc

gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from here on, without looking through what was imported.

    Torch, transformers and the tests are a million objects, all of which stay.
    """
    gc.freeze()
    gc.enable()
