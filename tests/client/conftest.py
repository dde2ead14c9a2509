"""A real server process with the in-process backend, a tiny model, and a client of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, Operator
from numpy.typing import NDArray

from tests.modules import installed

HVP = Path(sys.executable).parent / "hvp"


@final
@dataclass
class Server:
    """A server process; its log is in its state directory's neighbour."""

    process: subprocess.Popen[str]
    address: str

    @classmethod
    def start(
        cls,
        state_dir: Path,
        address: str = "127.0.0.1:0",
        packages: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> Server:
        """Start `hvp serve` and wait for its one line.

        Args:
            state_dir: Of the server.
            address: To serve on.
            packages: A folder of packages that are to be installed for it.
            arguments: More options.
        """
        path = os.pathsep.join(filter(None, [str(packages or ""), os.environ.get("PYTHONPATH")]))
        log = state_dir.with_suffix(".log")
        with log.open("a") as stderr:
            process = subprocess.Popen(
                [
                    str(HVP),
                    "serve",
                    f"--address={address}",
                    f"--state-dir={state_dir}",
                    "--workers=1",
                    "--device=cpu",
                    "--backend=inprocess",
                    *arguments,
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            )
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.startswith("serving on "):
            process.kill()
            process.wait()
            process.stdout.close()
            raise AssertionError(f"the server did not start:\n{log.read_text()}")
        return cls(process, line.removeprefix("serving on "))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it and give its exit code."""
        self.process.send_signal(how)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not end it."""
    folder = tmp_path_factory.mktemp("server")
    server = Server.start(folder / "state", packages=installed(folder / "site"))
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A blocking client of that server."""
    with Client(server.address) as client:
        yield client


def save_llama(directory: Path, *, vocab_size: int, hidden_size: int) -> Path:
    """Write a random Llama of one block, as Hugging Face does."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few hundred parameters."""
    return save_llama(tmp_path_factory.mktemp("llama"), vocab_size=19, hidden_size=8)


@pytest.fixture(scope="session")
def input_ids() -> NDArray[np.int64]:
    """(3, 7) token ids."""
    return np.random.default_rng(0).integers(0, 19, (3, 7))


@pytest.fixture
def checkpoint(client: Client, llama_dir: Path) -> Checkpoint:
    """The tiny model on the server; uploaded once in fact."""
    return client.upload_checkpoint(llama_dir)


@pytest.fixture
def batch(client: Client, input_ids: NDArray[np.int64]) -> Batch:
    """The tiny batch on the server."""
    return client.upload_batch({"input_ids": input_ids})


@pytest.fixture(name="H")
def hessian(client: Client, checkpoint: Checkpoint, batch: Batch) -> Operator:
    """The tiny model's Hessian in float64."""
    return client.operator(checkpoint, batch, dtype="float64", micro_batch_size=2)


@pytest.fixture(scope="session")
def small_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for a matrix: n = 184."""
    return save_llama(tmp_path_factory.mktemp("small"), vocab_size=7, hidden_size=4)


@pytest.fixture(scope="session")
def small_input_ids() -> NDArray[np.int64]:
    """(2, 5) token ids."""
    return np.random.default_rng(0).integers(0, 7, (2, 5))


@pytest.fixture(scope="session")
def small_by_hand(small_llama_dir: Path, small_input_ids: NDArray[np.int64]) -> Any:
    """Logits of the small model written by hand, labels, parameters by name and in a row."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.core import references

    model, ids = LlamaForCausalLM.from_pretrained(small_llama_dir), torch.tensor(small_input_ids)
    parameters = {name: each.detach().double() for name, each in model.named_parameters()}
    flat = references.flatten(parameters)
    return lambda p: references.llama(p, ids, None, model.config), ids, parameters, flat


@pytest.fixture(scope="session")
def dense(small_by_hand: Any) -> NDArray[np.float64]:
    """All of the small model's H, by torch's own differentiation of the model written by hand."""
    import torch

    from tests.core import references

    logits, labels, parameters, flat = small_by_hand
    loss = references.token_loss(logits, labels, parameters)
    matrix: NDArray[np.float64] = torch.func.hessian(loss)(flat).numpy()
    return matrix


@pytest.fixture(scope="session")
def dense_ggn(small_by_hand: Any) -> NDArray[np.float64]:
    """All of the small model's G, of the Jacobian of its logits."""
    from tests.core import references

    matrix: NDArray[np.float64] = references.gauss_newton(*small_by_hand).numpy()
    return matrix
