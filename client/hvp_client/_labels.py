"""Labels, checked before they travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvp_client._exceptions import InvalidArgumentError


def check_labels(labels: Any) -> dict[str, str]:
    """Refuse labels that are no mapping of printable texts to printable texts.

    Args:
        labels: Texts by name; None for no labels.

    Returns:
        The labels.

    Raises:
        InvalidArgumentError: `LABELS_INVALID`.
    """
    if labels is None:
        return {}
    if not isinstance(labels, Mapping) or not all(
        isinstance(text, str) and text.isprintable() for item in labels.items() for text in item
    ):
        raise InvalidArgumentError(
            "labels are a mapping of texts to texts, such as {'run': '7'}",
            reason="LABELS_INVALID",
            field="labels",
        )
    return dict(labels)
