"""The whole service with two Ray ranks: the SDK's example, and a server killed in mid-run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hvp_client import Client
from hvp_core.model.huggingface import attention
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core import references
from tests.core.problems import llama_config, ragged_tokens, scatter
from tests.core.test_checkpoint import save

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

HVP = Path(sys.executable).parent / "hvp"


class Server:
    """`hvp serve` on a state directory, with Ray ranks.

    Args:
        state_dir: Of the server.
        workers: Number of ranks.
        packages: A folder of packages that are to be installed for it.
    """

    def __init__(self, state_dir: Path, workers: int = 2, packages: Path | None = None):
        path = os.pathsep.join(filter(None, [str(packages or ""), os.environ.get("PYTHONPATH")]))
        self._log = (state_dir.parent / "server.log").open("a")
        self.process = subprocess.Popen(
            [
                HVP,
                "serve",
                "--address=127.0.0.1:0",
                f"--state-dir={state_dir}",
                f"--workers={workers}",
                "--device=cpu",
            ],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving on "), (state_dir.parent / "server.log").read_text()
        self.address = line.split()[-1]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.stdout.close()
        self._log.close()
        assert rest == ""  # one line on standard output, ever
        return code


def remaining(processes: list[psutil.Process], within_s: float) -> list[str]:
    """Describes those of ``processes`` that still run after ``within_s`` seconds: none, at best."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    found = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
                found.append(f"{process.pid} {process.status()} {process.cmdline()}")
    return found


def one_layer() -> LlamaConfig:
    """The smallest Llama that has embeddings, a layer and a head."""
    config = llama_config()
    config.num_hidden_layers = 1
    return config


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    attention.register()
    model = LlamaForCausalLM(one_layer())
    scatter(model)
    return save(model, tmp_path / "model")


def test_two_ranks_serve_what_the_model_written_by_hand_says_and_survive_a_kill(
    tmp_path: Path, checkpoint_dir: Path
) -> None:
    tensors = {
        k: torch.from_numpy(v).double()
        for k, v in load_file(checkpoint_dir / "model.safetensors").items()
    }
    names = [name for name, _ in LlamaForCausalLM(one_layer()).named_parameters()]
    parameters = {name: tensors[name] for name in names}
    ids, labels, mask = ragged_tokens()
    config = one_layer()
    loss = references.token_loss(
        lambda p: references.llama(p, ids, mask, config), labels, parameters
    )
    flat = references.flatten(parameters)
    probe = torch.randn(len(flat), 2, generator=torch.Generator().manual_seed(0)).double()
    hessian = torch.func.hessian(loss)(flat)
    spectrum = torch.linalg.eigvalsh(hessian).numpy()

    server = Server(tmp_path / "state")
    with Client(server.address) as client:
        checkpoint = client.upload_checkpoint(checkpoint_dir)
        batch = client.upload_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})
        operator = client.operator(checkpoint, batch, dtype="float64", micro_batch_size=2)
        assert operator.shape == (len(flat), len(flat))
        assert operator.loss() == pytest.approx(float(loss(flat)), rel=1e-9)
        gradient = torch.func.grad(loss)(flat).numpy()
        np.testing.assert_allclose(
            operator.gradient().numpy(),
            gradient,
            rtol=0,
            atol=float(1e-9 * np.linalg.norm(gradient)),
        )
        expected = (hessian @ probe).numpy()
        np.testing.assert_allclose(
            np.asarray(operator @ probe.numpy()),
            expected,
            rtol=0,
            atol=float(1e-9 * np.linalg.norm(expected)),
        )
        forms = ((probe.T @ hessian) * probe.T).sum(1).numpy()
        np.testing.assert_allclose(operator.quadratic(probe), forms, rtol=1e-9)
        np.testing.assert_allclose(operator.slope(probe), gradient @ probe.numpy(), rtol=1e-9)
        ggn = client.operator(checkpoint, batch, kind="ggn", dtype="float64", micro_batch_size=2)
        products = ggn @ probe.numpy()
        np.testing.assert_allclose(
            ggn.quadratic(probe), (probe.numpy() * products).sum(0), rtol=1e-11
        )
        result = operator.eigsh(k=4, which="BE").result(timeout_s=120)
        ends = np.concatenate((spectrum[:2], spectrum[-2:]))
        np.testing.assert_allclose(result.eigenvalues, ends, rtol=0, atol=1e-8)
        assert result.outcome == "CONVERGED"

        damping = 0.5 - float(spectrum[0])
        b = operator.vector(probe.numpy()[:, 0])
        shifted = hessian.numpy() + damping * np.eye(len(flat))
        solution = np.linalg.solve(shifted, probe.numpy()[:, 0])
        for method in ("cg", "minres"):
            solved = operator.solve(b, damping=damping, method=method, tol=1e-10).result()
            assert solved.outcomes == ("CONVERGED",)
            error = np.linalg.norm(solved.x[0].numpy() - solution)
            assert error <= 1e-9 * np.linalg.norm(solution) * np.linalg.cond(shifted)

        job = operator.eigsh(k=2, which="SA", tol=1e-12, max_products=3000, num_lanczos_vectors=12)
        events = iter(job.watch())
        while next(events).num_products < 3:
            pass
        queued = operator.solve(b, damping=damping, tol=1e-10)
        b.delete()
        family = server.family()
        assert len(family) >= 4  # Ray's own and two ranks
        server.end(signal.SIGKILL)
    assert remaining(family, 30) == []

    server = Server(tmp_path / "state")
    try:
        with Client(server.address) as client:
            assert {c.name for c in client.checkpoints()} == {checkpoint.name}
            again = client.job(job.name)
            result = again.result(timeout_s=240)
            assert (again.state, again.attempt) == ("SUCCEEDED", 2)
            np.testing.assert_allclose(result.eigenvalues, spectrum[:2], rtol=0, atol=1e-8)
            (x,) = client.job(queued.name).result(timeout_s=240).x
            error = np.linalg.norm(x.numpy() - solution)
            assert error <= 1e-9 * np.linalg.norm(solution) * np.linalg.cond(shifted)
    finally:
        family = server.family()
        assert server.end(signal.SIGTERM) == 0
    assert remaining(family, 30) == []
    assert not list(Path("/dev/shm").glob("hvp-*"))  # noqa: S108 (where segments would be)
    assert os.environ.get("RAY_ADDRESS") is None
