"""Products of conjugate gradients with several preconditioners and without, on a real model.

    python -m benchmarks.preconditioning --output FOLDER

The system is (G + λI) x = ∇L with the Gauss-Newton matrix of the last two layers of SmolLM2-135M,
or of other parameters.
What is compared is numbers of products, which depend on no machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_client import Client, LowRankResult, Operator, Vector
from hvp_demo.checkpoint import MODEL_NAME, cache_dir, ensure_checkpoint, find_gguf
from hvp_demo.server import running_server
from hvp_demo.text import python_reference, token_batch
from hvp_operations.solve import SolveProgress

_COLOURS = ("#8a8f98", "#1f6feb", "#d4762c")
_LAYERS = ("model.layers.28.*", "model.layers.29.*")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A solve.

    Attributes:
        name: What it is called in table and picture.
        num_products: Products that it took, that of its true residual included.
        outcome: How it ended.
        relative_residual: The true one.
        history: Pairs of products and the recurrence's relative residual.
    """

    name: str
    num_products: int
    outcome: str
    relative_residual: float
    history: tuple[tuple[int, float], ...]


def solved(G: Operator, b: Vector, name: str, **asked: Any) -> Run:
    """Solve a system and keep its history."""
    job = G.solve(b, method="cg", **asked)
    history = [(0, 1.0)]
    for event in job.watch():
        progress = event.progress
        if progress is not None and progress.stage == "iterating":
            assert isinstance(progress.detail, SolveProgress)
            history.append((progress.num_products, progress.detail.residuals[0]))
    (system,) = job.result().systems
    return Run(
        name=name,
        num_products=system.num_products,
        outcome=system.outcome,
        relative_residual=system.relative_residual,
        history=tuple(history),
    )


def measure(output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask a server of one's own for the approximation and for all solves."""
    folder = ensure_checkpoint(find_gguf(), cache_dir())
    tokens = token_batch(folder, python_reference(), num_sequences=2, sequence_length=128)
    server = running_server(output, num_workers=1, device=arguments.device)
    with server as address, Client(address) as client:
        checkpoint, batch = client.upload_checkpoint(folder), client.upload_batch(tokens)
        G = client.operator(
            checkpoint,
            batch,
            kind="ggn",
            parameters=arguments.parameters,
            precision=arguments.precision,
        )
        asked = {"method": arguments.method, "oversampling": arguments.oversampling}
        L: LowRankResult[Vector] = G.low_rank(arguments.k, **asked).result()
        largest, b = float(L.eigenvalues.max()), G.gradient()
        systems = []
        for relative in arguments.relative_dampings:
            damping = relative * largest
            wanted = {"damping": damping, "tol": arguments.tol}
            runs = [
                solved(G, b, "plain CG", **wanted),
                solved(G, b, f"with L of rank {arguments.k}", preconditioner=L, **wanted),
            ]
            if arguments.factors:
                runs.append(solved(G, b, "with Kronecker factors", factors="kronecker", **wanted))
            for run in runs:
                print(relative, run.name, run.num_products, run.outcome, run.relative_residual)
            systems.append(
                {
                    "damping": damping,
                    "relative_damping": relative,
                    "condition": (largest + damping) / damping,
                    "condition_bound": L.condition_bound(damping),
                    "runs": [vars(run) for run in runs],
                }
            )
        return {
            "model": MODEL_NAME,
            "num_parameters": G.shape[0],
            "parameters": arguments.parameters,
            "dtype": str(G.dtype),
            "precision": G.precision,
            "tokens": "2 x 128",
            "tol": arguments.tol,
            "low_rank": L.to_json(),
            "suggested_damping": L.suggest_damping(),
            "systems": systems,
        }


def draw(found: dict[str, Any], path: Path) -> None:
    """The residual against products, of all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    systems = found["systems"]
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            1, len(systems), figsize=(4.5 * len(systems), 3.4), squeeze=False, layout="constrained"
        )
        for axis, system in zip(axes[0], systems, strict=True):
            for run, colour in zip(system["runs"], _COLOURS, strict=False):
                products, residuals = zip(*run["history"], strict=True)
                name = f"{run['name']}: {run['num_products']} products"
                axis.semilogy(products, residuals, color=colour, lw=1.4, label=name)
            axis.axhline(found["tol"], color="black", lw=0.6, ls=":")
            axis.legend(frameon=False, loc="upper right")
            axis.set_xlabel("products with G")
            axis.set_ylabel("relative residual")
            axis.set_title(f"λ = {system['relative_damping']:g} λ₁", size=9, loc="left")
        figure.suptitle(
            f"(G + λI) x = ∇L, {', '.join(found['parameters'])} of {found['model']}, "
            f"n = {found['num_parameters']:,}",
            size=9,
        )
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def main() -> None:
    """Measure, and write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--k", type=int, default=20, help="vectors of the preconditioner")
    parser.add_argument(
        "--parameters", nargs="+", default=list(_LAYERS), help="patterns of their names"
    )
    parser.add_argument("--method", choices=("nystrom", "eigsh"), default="nystrom")
    parser.add_argument("--oversampling", type=int, default=10, help="of nystrom")
    parser.add_argument(
        "--relative-dampings", type=float, nargs="+", default=[1e-2, 1e-3], help="λ / λ₁"
    )
    parser.add_argument(
        "--factors", action="store_true", help="with Kronecker factors too, which takes longest"
    )
    parser.add_argument("--tol", type=float, default=1e-4, help="of the true residual")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="full")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = measure(arguments.output, arguments)
    (arguments.output / "preconditioning.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(found, arguments.output / "preconditioning.png")


if __name__ == "__main__":
    main()
