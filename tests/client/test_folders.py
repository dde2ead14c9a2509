"""Folders as people have them, brought to a real server by SDK, by command and without either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import AsyncClient, Client, HvpError
from hvp_client._blobs import Source, upload_blobs
from hvp_client._session import new_request_id
from hvp_protos.v1 import checkpoint_pb2
from numpy.typing import NDArray

from tests.client.conftest import HVP, Server

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(llama_dir: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(llama_dir, tmp_path / "copy"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def litter(folder: Path) -> tuple[str, ...]:
    """What an earlier save, Mistral, peft and macOS leave beside a model."""
    for name in ("a-1.safetensors", "adapter_model.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not even safetensors")
    (folder / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "a-1.safetensors"}}))
    return tuple(sorted(path.name for path in folder.glob("*.safetensors*") if path.name != WHOLE))


def hvp(server: Server, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HVP), *map(str, arguments), "--address", server.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


async def register(server: Server, *paths: Path) -> checkpoint_pb2.CreateCheckpointResponse:
    """Send files to the server without looking at them."""
    async with AsyncClient(server.address) as client:
        session = client._session
        digests = await upload_blobs(session, [Source(content=path) for path in paths], None)
        files = [
            checkpoint_pb2.CheckpointFile(path=path.name, digest=digest)
            for path, digest in zip(paths, digests, strict=True)
        ]
        request = checkpoint_pb2.CreateCheckpointRequest(
            parent=session.parent, request_id=new_request_id(), files=files
        )
        return await session.wire.unary(
            "CheckpointService/CreateCheckpoint",
            request,
            checkpoint_pb2.CreateCheckpointResponse,
            timeout_s=60,
        )


async def test_files_that_transformers_would_not_read_are_left_out_and_named_by_everybody(
    server: Server, client: Client, llama_dir: Path, folder: Path
) -> None:
    plain = client.upload_checkpoint(llama_dir)
    assert plain.ignored_files == ()
    left_out = litter(folder)
    checkpoint = client.upload_checkpoint(folder)
    assert checkpoint == plain
    assert checkpoint.ignored_files == left_out
    done = hvp(server, "upload", folder)
    assert done.stdout.strip() == plain.name
    assert f"left out: {', '.join(left_out)}" in done.stderr
    sent = [name for name in (WHOLE, *left_out) if not name.startswith(".")]
    answer = await register(server, folder / "config.json", *(folder / name for name in sent))
    assert answer.checkpoint.name == plain.name
    assert [WHOLE, *answer.ignored_files] == sent


def test_a_head_of_its_own_behind_a_tied_config_has_transformers_loss(
    client: Client, folder: Path, input_ids: NDArray[np.int64]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(folder / WHOLE)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.flip(0).contiguous()}, folder / WHOLE)
    checkpoint = client.upload_checkpoint(folder)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.from_numpy(input_ids)
    H = client.operator(checkpoint, client.upload_batch({"input_ids": input_ids}), dtype="float64")
    assert H.shape == (sum(parameter.numel() for parameter in own.parameters()),) * 2
    loss = float(own(input_ids=ids, labels=ids).loss.detach())
    assert H.loss() == pytest.approx(loss, rel=1e-6)


def test_a_sequence_in_the_range_that_yarn_covers_is_served(client: Client, folder: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    configure(folder, max_position_embeddings=8, rope_parameters=rope | {"rope_theta": 10000.0})
    checkpoint = client.upload_checkpoint(folder)
    ids = np.random.default_rng(0).integers(0, 19, (1, 33))
    H = client.operator(checkpoint, client.upload_batch({"input_ids": ids[:, :32]}))
    assert H.loss() > 0
    with pytest.raises(HvpError, match="32 positions") as caught:
        client.operator(checkpoint, client.upload_batch({"input_ids": ids}))
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


CLASSIFIER = {"architectures": ["LlamaForTokenClassification"]}
REMOTE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "quantised": ("QUANTIZATION_UNSUPPORTED", {"quantization_config": {"bits": 4}}, (WHOLE,)),
    "two files": ("CHECKPOINT_FILES_INVALID", {}, ("a.safetensors", "b.safetensors")),
    "another task": ("TASK_UNSUPPORTED", CLASSIFIER, (WHOLE,)),
    "remote code": ("REMOTE_CODE_REFUSED", REMOTE, (WHOLE,)),
    "a padded vocabulary": ("TENSOR_SHAPE_MISMATCH", {"vocab_size": 16}, (WHOLE,)),
}


@pytest.mark.parametrize(("reason", "changes", "names"), REFUSED.values(), ids=REFUSED)
async def test_sdk_command_and_server_refuse_with_the_same_sentence(
    server: Server,
    client: Client,
    folder: Path,
    reason: str,
    changes: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    configure(folder, **changes)
    weights = (folder / WHOLE).read_bytes()
    (folder / WHOLE).unlink()
    for name in names:
        (folder / name).write_bytes(weights)
    with pytest.raises(HvpError) as by_server:
        await register(server, folder / "config.json", *(folder / name for name in names))
    with pytest.raises(HvpError) as by_sdk:
        client.upload_checkpoint(folder)
    done = hvp(server, "upload", folder)
    assert by_server.value.reason == by_sdk.value.reason == reason
    assert by_sdk.value.message.removeprefix(f"{folder}: ") == by_server.value.message
    assert done.returncode == 1
    assert done.stderr.startswith(f"{reason}: {by_sdk.value.message}")
    assert "; " in by_server.value.message  # what happened; what to do
