"""Vectors that a search for eigenpairs holds; without torch, so that the service can ask too."""

from __future__ import annotations

from hvp_workers.backend import EigshSpec

USABLE = 0.8  # of the memory that is free: the rest is for blocks and logits
_WORKING_VECTORS = 3  # the product, its vector, a random restart


def default_max_products(spec: EigshSpec, dimension: int) -> int:
    """The budget of products, asked for or chosen."""
    return spec.max_products or min(10 * dimension, max(300 + spec.k, 3 * spec.k))


def basis_sizes(spec: EigshSpec, dimension: int) -> tuple[int, int]:
    """The smallest basis that will do, and the one to have where memory allows.

    Args:
        spec: What was asked for; 0 means by default.
        dimension: n.
    """
    asked, k = spec.num_lanczos_vectors, spec.k
    if asked:
        return asked, asked
    max_products = default_max_products(spec, dimension)
    wish = min(max(2 * k + 16, 40), dimension, max(max_products - k, k + 1))
    return min(k + 8, wish), wish


def vectors_beside_basis(k: int) -> int:
    """Vectors that a run holds beside its basis: the eigenvectors and one to make them, its own."""
    return _WORKING_VECTORS + k + 1


def least_bytes(spec: EigshSpec, *, dimension: int, vector_bytes: float) -> int:
    """Free memory without which a rank does not begin.

    Args:
        spec: What was asked for.
        dimension: n.
        vector_bytes: Of one vector on the rank.
    """
    least, _ = basis_sizes(spec, dimension)
    return int((least + vectors_beside_basis(spec.k)) * vector_bytes / USABLE)
