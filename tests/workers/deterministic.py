"""Everything that can be asked of an operator, with its bits; and an engine short of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hvp_core.model.huggingface import attention
from hvp_core.sharding.collective import Alone, Collective
from hvp_operations.density import DensitySpec
from hvp_operations.diagonal import DiagonalSpec
from hvp_operations.eigsh import EigshSpec
from hvp_operations.low_rank import LowRankSpec
from hvp_operations.matrices import Matrix, Term
from hvp_operations.operation import Result
from hvp_operations.solve import SolveSpec
from hvp_operations.svds import SvdsSpec
from hvp_operations.trace import TraceSpec
from hvp_operations.trace_of import TraceOfSpec
from hvp_workers.backend import Operator, RunProgress, Seeded, Space, Tuning
from hvp_workers.engine import RankEngine
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from tests.core.problems import gpt2_config, llama_config, ragged_tokens, scatter
from tests.core.test_checkpoint import save

MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
}
VECTORS = ["v0", "v1", "v2"]
#: Questions, each with how many vectors its answer has at the most.
QUESTIONS: dict[str, tuple[str, Any, int]] = {
    "eigsh": ("hessian", EigshSpec(k=2, which="BE", tol=1e-2), 2),
    "density": ("hessian", DensitySpec(num_probes=3, num_steps=6), 0),
    "trace": ("hessian", TraceSpec(max_products=40), 0),
    "trace_of": ("hessian", TraceOfSpec("exp", max_products=30, num_steps=6), 0),
    "diagonal": ("hessian", DiagonalSpec(max_products=40), 2),
    "solve": ("hessian", SolveSpec(("b", "b"), damping=60.0, tol=1e-3), 4),
    "low_rank": ("hessian", LowRankSpec(2, tol=1e-2), 2),
}
#: Those whose products are of further kinds, which take long to trace.
MORE: dict[str, tuple[str, Any, int]] = {
    "trace of a ggn": ("ggn", TraceSpec(max_products=40), 0),
    "trace_of a ggn": ("ggn", TraceOfSpec("exp", max_products=30, num_steps=6), 0),
    "solve of a ggn": ("ggn", SolveSpec(("b", "b"), damping=0.1, tol=1e-3), 4),
    "low_rank of a ggn": ("ggn", LowRankSpec(4), 4),
    "svds": ("jacobian", SvdsSpec(k=1, tol=1e-1, num_lanczos_vectors=12), 2),
}
KINDS = ("hessian",)
ALL_KINDS = (
    *KINDS,
    "jacobian",
    "ggn",
    "fisher",
    "empirical_fisher_sequence",
    "gradient_covariance_token",
)


def written(name: str, folder: Path) -> Operator:
    """A tiny model and a batch of it in a folder, and the deterministic operator in float32."""
    attention.register()
    model = MODELS[name]()
    scatter(model)
    ids, labels, mask = ragged_tokens()
    save_file({"input_ids": ids, "labels": labels, "attention_mask": mask}, folder / "batch")
    save(model, folder / name)
    return operator_of(folder, name)


def operator_of(folder: Path, name: str) -> Operator:
    """The deterministic operator in float32 of what was written to a folder."""
    return Operator(
        space=Space(checkpoint_dir=folder / name, dtype="float32"),
        batch_path=folder / "batch",
        deterministic=True,
    )


def engine_of(
    available_bytes: int, collective: Collective | None = None, cache: Path | None = None
) -> RankEngine:
    """An engine that thinks it has so much free memory."""
    engine = RankEngine(collective or Alone(), "cpu", Tuning(compile_cache=cache))
    have(engine, available_bytes)
    return engine


def have(engine: RankEngine, available_bytes: int) -> None:
    """Have an engine think that so much memory is free."""
    engine._memory.least_available = lambda: available_bytes  # type: ignore[method-assign]


def forget_operators(engine: RankEngine, operator: Operator) -> None:
    """Have an engine load its operators anew, with the memory that there is then."""
    engine._models.get(operator.space).operators._loaded.clear()


def ask(engine: RankEngine, operator: Operator, name: str) -> tuple[Result, list[torch.Tensor]]:
    """The answer to one of the questions, and its vectors, this rank's shards."""
    kind, spec, count = (QUESTIONS | MORE)[name]
    operation = name.split()[0]
    inputs = {"b": VECTORS[:2]} if operation == "solve" else {}
    outputs = [f"{name}{index}" for index in range(count)]
    engine.run_start("run", replace(operator, kind=kind), operation, spec, inputs)
    while isinstance(step := engine.run_step("run", outputs), RunProgress):
        pass
    engine.run_end("run")
    vectors = [engine._vectors[each].shard for each in outputs if each in engine._vectors]
    engine.delete_vectors(outputs)
    return step, vectors


def facts(result: Result) -> str:
    """All figures of a result, to the last bit.

    Provenance says too how many vectors the operator was ever given at once.
    """
    told = {key: each for key, each in result.provenance.items() if "schedule_" not in key}
    return repr(replace(result, provenance=told))


def bits(engine: RankEngine, operator: Operator, *, everything: bool = False) -> dict[str, str]:
    """What an operator gives, to the last bit, by what is asked."""
    for seed, name in enumerate(VECTORS):
        engine.create_vector(name, operator.space, Seeded(seed, "gaussian"))
    found: dict[str, Any] = {
        "loss": engine.loss(operator),
        "losses": engine.losses_along(operator, VECTORS[:1], [[0.1], [-0.2]]),
    }
    if everything:
        found["slopes"] = engine.evaluate_forms(operator, "slope", VECTORS)
    engine.gradient(operator, "g")
    found["gradient"] = engine._vectors["g"].shard
    operators = {
        kind: replace(operator, kind=kind, num_samples=int(kind == "fisher"))
        for kind in (ALL_KINDS if everything else KINDS)
    }
    names = ("hessian", "ggn") if everything else ("hessian",)
    damped = Matrix(terms=tuple(Term(kind=name) for name in names), damping=0.5)
    operators["sum"] = replace(operator, kind=str(damped), composition=damped)
    for kind, each in operators.items():
        for given in (VECTORS[:1], VECTORS):
            outputs = [f"A{name}" for name in given]
            engine.apply(each, given, outputs)
            found[f"{kind} of {len(given)}"] = [engine._vectors[name].shard for name in outputs]
        if kind != "jacobian":
            found[f"{kind} forms"] = engine.evaluate_forms(each, "quadratic", VECTORS)
    engine.delete_vectors(outputs)
    for name in QUESTIONS | (MORE if everything else {}):
        result, vectors = ask(engine, operator, name)
        found[name] = [facts(result), *vectors]
    return {name: _digest(value) for name, value in found.items()}


def _digest(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_digest, value))
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return value if isinstance(value, str) else float(value).hex()
