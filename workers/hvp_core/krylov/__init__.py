"""Eigenpairs from Krylov subspaces."""
