"""What tests of the core share: programs that are traced once in a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hvp_core.autodiff import builder
from hvp_core.autodiff.cache import Cache


@pytest.fixture(scope="session", autouse=True)
def _room_for_the_programs_of_all_tests() -> Iterator[None]:
    """Tests take turns with more models and shapes than a rank would keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "_duals", Cache(1000))
        yield
