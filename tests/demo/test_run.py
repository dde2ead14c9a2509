"""How the demo spends its time."""

from __future__ import annotations

from hvp_demo.run import affordable


def test_a_slow_machine_gets_fewer_products_but_enough_to_begin() -> None:
    assert affordable(0.5, 6) == affordable(5.0, 6)
    assert affordable(12.0, 6) < affordable(5.0, 6)
    assert affordable(1000.0, 6) >= 2 * 6 + 6
    assert affordable(1000.0, 20) >= 2 * 20 + 6
