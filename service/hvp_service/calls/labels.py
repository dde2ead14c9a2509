"""Labels of a resource, its only fields that can be changed, and the tag of their version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from hvp_service.calls.errors import ServiceError

MAX_LABELS = 64
MAX_LABEL_LENGTH = 256


def check_labels(labels: Mapping[str, str], field: str = "labels") -> None:
    """Refuse labels that are too many or too long.

    Raises:
        ServiceError: LABELS_INVALID.
    """
    if len(labels) > MAX_LABELS or any(
        len(text) > MAX_LABEL_LENGTH for item in labels.items() for text in item
    ):
        raise ServiceError(
            "LABELS_INVALID",
            f"There are at most {MAX_LABELS} labels of {MAX_LABEL_LENGTH} characters.",
            field=field,
        )


def check_mask(paths: Sequence[str]) -> None:
    """Refuse to change anything but labels.

    Raises:
        ServiceError: FIELD_MASK_INVALID.
    """
    if list(paths) != ["labels"]:
        raise ServiceError(
            "FIELD_MASK_INVALID",
            f"Only labels can be changed; the mask is {list(paths)[:5]}.",
            field="update_mask",
        )


def etag_of(labels: Mapping[str, str]) -> str:
    """The tag of labels, 16 hexadecimal digits of their SHA-256."""
    text = json.dumps(dict(labels), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_etag(asked: str, labels: Mapping[str, str], resource: str) -> None:
    """Refuse a change to a version that is not the latest.

    Args:
        asked: The caller's tag; "" for any.
        labels: Labels of the latest version.
        resource: Name of the resource.

    Raises:
        ServiceError: ETAG_MISMATCH.
    """
    if asked and asked != etag_of(labels):
        raise ServiceError(
            "ETAG_MISMATCH",
            f"{resource} was changed since it was read; read it again.",
            field="etag",
            resource=resource,
        )
