"""Texts of a caller in messages to people, at a length that a line takes."""

from __future__ import annotations

from typing import Any

#: Characters that the name of a resource takes at most: a project, a kind and a digest.
NAME = 200
_TEXT = 80
_END = 20  # of these, ones of the text's end


def clipped(text: str, most: int = _TEXT) -> str:
    """A text of at most so many characters: of a longer one the middle is left out."""
    if len(text) <= most:
        return text
    return f"{text[: most - _END - 3]}...{text[-_END:]}"


def shown(value: Any, most: int = _TEXT) -> str:
    """A value as Python writes it, clipped; a text keeps its quotes."""
    return repr(clipped(value, most)) if isinstance(value, str) else clipped(repr(value), most)


_MATRICES = {
    "hessian": "the Hessian",
    "ggn": "the Gauss-Newton matrix",
    "fisher": "the Fisher matrix of drawn labels",
    "empirical_fisher_token": "the empirical Fisher matrix of tokens",
    "empirical_fisher_sequence": "the empirical Fisher matrix of sequences",
    "gradient_covariance_token": "the covariance of the targets' gradients",
    "gradient_covariance_sequence": "the covariance of the sequences' gradients",
}


def name_of_matrix(kind: str) -> str:
    """What the matrix of a kind of operator is called in a sentence.

    Args:
        kind: The kind, as a result's provenance has it.
    """
    return _MATRICES.get(kind, f"the {kind.replace('_', ' ')}")
