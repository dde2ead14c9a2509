"""Findings of a Lanczos run on a known spectrum, small enough to be made in a test."""

from __future__ import annotations

import numpy as np
from hvp_demo.findings import Findings, Snapshot


def findings(*, steps: int = 20, k: int = 6) -> Findings:
    """A heap of 4000 eigenvalues at zero with three outliers at each end."""
    rng = np.random.default_rng(0)
    spectrum = rng.normal(scale=0.1, size=4000)
    spectrum[:6] = [210.0, 95.0, 60.0, -30.0, -18.0, -11.0]
    basis = [rng.standard_normal(spectrum.size)]
    basis[0] /= np.linalg.norm(basis[0])
    diagonal: list[float] = []
    coupling: list[float] = []
    history: list[Snapshot] = []
    for step in range(1, steps + 1):
        w = spectrum * basis[-1]
        diagonal.append(float(basis[-1] @ w))
        for _ in range(2):
            for v in basis:
                w = w - (v @ w) * v
        coupling.append(float(np.linalg.norm(w)))
        basis.append(w / coupling[-1])
        off = coupling[:-1]
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
        index = np.r_[: min(k, step) // 2, step - (min(k, step) + 1) // 2 : step]
        estimates = coupling[-1] * np.abs(vectors[-1, index])
        history.append(
            Snapshot(
                num_products=step,
                ritz_values=tuple(values[index].tolist()),
                residual_estimates=tuple(estimates.tolist()),
            )
        )
    return Findings(
        model="Heap & outliers <4000>",
        num_parameters=spectrum.size,
        num_sequences=2,
        sequence_length=16,
        num_ranks=2,
        dtype="float32",
        loss=3.25,
        gradient_norm=1.5,
        probe_seed=1,
        probe_norm=spectrum.size**0.5,
        product_norm=100.0,
        product_s=0.5,
        u_dot_hv=12.5,
        v_dot_hu=12.5,
        eigenvalues=history[-1].ritz_values,
        residuals=history[-1].residual_estimates,
        intervals=tuple(
            (value - residual, value + residual)
            for value, residual in zip(
                history[-1].ritz_values, history[-1].residual_estimates, strict=True
            )
        ),
        claims=("Each interval holds an eigenvalue of the exact operator.", "That is all."),
        num_products=steps + k,
        num_completeness_products=0,
        outcome="MAX_PRODUCTS",
        symmetry_defect=1e-9,
        ritz_values=tuple(values.tolist()),
        ritz_weights=tuple((vectors[0] ** 2).tolist()),
        history=tuple(history),
        stage_s={"upload": 3.0, "eigsh": 61.0},
        provenance={"seed": "0", "checkpoint": "projects/default/checkpoints/<x>"},
    )
