"""Resident memory of a product on a real model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json
from pathlib import Path

import torch
from hvp_demo.checkpoint import cache_dir, ensure_checkpoint, find_gguf

from hvp_core.model.huggingface.checkpoint import build_empty
from hvp_core.model.loading import load_shard, locate
from hvp_core.sharding.collective import Alone
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.sharding.layout import Layout
from hvp_core.settings import ComputeSettings
from hvp_core.vectors.space import ParameterSpace
from hvp_core.curvature.curvature import Curvature


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024


torch.set_num_threads(1)
directory = ensure_checkpoint(find_gguf(), cache_dir())
empty = resident("RssAnon")  # pages of the file itself are the kernel's to drop
model = build_empty(directory, torch.float32)
chain = LayeredChain(model, torch.float32, torch.device("cpu"))
layout = Layout(chain.shapes, [block.parameters for block in chain.blocks], 1)
space = ParameterSpace(layout, Alone(), torch.float32, torch.device("cpu"))
theta = load_shard(space, locate(model, directory))
held = resident("RssAnon") - empty
ids = torch.randint(49152, (1, 256), generator=torch.Generator().manual_seed(0))
curvature = Curvature(chain, space, theta, token_batch(ids), 1, ComputeSettings(schedule="lean"))
loaded = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
product = curvature.hvp([space.random(1, "rademacher")])[0]
print(json.dumps({
    "weights": theta.nbytes,
    "held": held,
    "added": resident("VmHWM") - loaded,
    "notes": curvature.notes(),
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_product_on_256_tokens_of_a_135m_model_adds_less_than_two_and_a_half_gigabytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["added"] < 2.5e9  # vector, product and all the work in between
    assert found["held"] < 1.2 * found["weights"]
    assert found["notes"] == {"precision": "full", "schedule_hessian": "31 lean"}
