"""Checkpoints are described in a process that may be lost, and that nobody else goes with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from hvp_workers.backend import BackendError
from hvp_workers.describer import Describer, DescriberLimits
from safetensors.numpy import save_file

from tests.client.conftest import save_llama

LLAMA = "LlamaForCausalLM"
OWNER = """
import sys, time
from hvp_workers.describer import Describer
describer = Describer()
describer.start()
print(describer.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), vocab_size=19, hidden_size=8)


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def describer() -> AsyncIterator[Describer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "of an account")
        opened = Describer(DescriberLimits(memory_bytes=256 << 20))
        opened.start()
        opened.start()
    yield opened
    await opened.close()
    await opened.close()


@pytest.mark.asyncio(loop_scope="module")
class TestOneDescriber:
    """One process, until a question is too much for it and another takes its place."""

    async def test_it_says_what_a_checkpoint_holds(self, describer: Describer, llama: Path) -> None:
        found = await describer.describe(llama)
        assert (found.architecture, found.stored_dtype) == (LLAMA, "F32")
        assert found.parameters[0].offset == 0
        assert all(isinstance(parameter.shape, tuple) for parameter in found.parameters)

    async def test_its_environment_has_no_keys_and_it_fetches_nothing(
        self, describer: Describer
    ) -> None:
        environment = psutil.Process(describer.pid).environ()
        assert "AWS_SECRET_ACCESS_KEY" not in environment
        assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"

    async def test_a_refusal_keeps_its_reason_and_the_process(
        self, describer: Describer, tmp_path: Path
    ) -> None:
        before = describer.pid
        with pytest.raises(BackendError) as refusal:
            await describer.describe(write_config(tmp_path / "x", model_type="nothing-known"))
        assert refusal.value.reason == "ARCHITECTURE_UNKNOWN"
        assert refusal.value.metadata == {"model_type": "nothing-known"}
        assert describer.pid == before

    async def test_a_table_of_positions_by_positions_is_refused_by_the_process_that_met_it_first(
        self, describer: Describer, tmp_path: Path, llama: Path
    ) -> None:
        assert describer.pid is not None
        os.kill(describer.pid, signal.SIGKILL)  # from outside: the question goes to the next one
        folder = write_config(
            tmp_path / "x",
            model_type="gpt_neo",
            max_position_embeddings=200_000,  # a table of 40 GB for each layer
            **{"hidden_size": 32, "num_heads": 2, "num_layers": 2},
            attention_types=[[["global", "local"], 1]],
        )
        with pytest.raises(BackendError, match=r"0\.25 GiB") as refusal:
            await describer.describe(folder)
        assert refusal.value.reason == "CONFIG_INVALID"
        assert refusal.value.metadata["limit"] == "memory"
        assert describer.pid is None
        assert (await describer.describe(llama)).architecture == LLAMA


async def test_what_takes_too_long_is_refused_and_its_process_ended(llama: Path) -> None:
    describer = Describer(DescriberLimits(time_s=1e-5))  # shorter than any answer takes
    describer.start()
    process = psutil.Process(describer.pid)
    with pytest.raises(BackendError, match="Check its sizes") as refusal:
        await describer.describe(llama)
    assert refusal.value.reason == "CONFIG_INVALID"
    assert refusal.value.metadata["limit"] == "time"
    assert not process.is_running()
    assert describer.pid is None
    await describer.close()


async def test_closing_ends_a_question_under_way_and_its_caller_hears_of_it(llama: Path) -> None:
    describer = Describer()
    describer.start()
    process = psutil.Process(describer.pid)
    process.suspend()
    question = asyncio.ensure_future(describer.describe(llama))
    await asyncio.sleep(0.1)
    await describer.close()
    with pytest.raises(BackendError, match="WORKER_GROUP_LOST"):
        await question
    assert not process.is_running()


def test_it_dies_with_its_owner_however_that_ends() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    _, left = psutil.wait_procs([child], timeout=60)
    assert left == []


def test_a_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        DescriberLimits(time_s=0.0)
