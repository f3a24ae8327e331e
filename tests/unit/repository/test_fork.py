"""Preloaded modules may count GPUs, but must not start CUDA: forks could not use it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from generation import sample
from parallel.engines.registry import ENGINES, modules_of
from tests.harness import ENVIRONMENT, ROOT
from training.launch import PRELOAD

LISTS = [
    sample.PRELOAD,
    *([*PRELOAD, *modules_of(name, name != "reference")] for name in ENGINES),
]
EVERYTHING = list(dict.fromkeys(name for names in LISTS for name in names))
_RUN = """
import sys
from tests.cuda_calls import launch_and_report
launch_and_report(sys.argv[1], sys.argv[2:])
"""


@pytest.mark.world
def test_preloads_do_not_start_cuda(tmp_path: Path) -> None:
    """In a CUDA build, megatron-core asks for GPUs during its import.

    Only an environment variable makes torch ask NVML, which leaves CUDA alone.
    """
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    command = [sys.executable, "-c", _RUN, str(tmp_path), *EVERYTHING]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=300)
    recorded = json.loads((tmp_path / "calls.json").read_text())
    assert recorded["preloaded"] == EVERYTHING
    assert set(recorded["calls"]) <= {"is_available", "device_count"}, recorded["calls"]
    assert recorded["asks_nvml"], "a build for CUDA would ask CUDA itself, and poison the fork"


_OPTIMISE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
from parallel.adamw import AdamW
before = set(sys.modules)
AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1, betas=(0.9, 0.99), eps=1e-8).step()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.world
def test_an_optimiser_imports_nothing_in_each_rank() -> None:
    """torch's optimisers import torch._dynamo, which takes longer than a rank's own start."""
    command = [sys.executable, "-c", _OPTIMISE, *PRELOAD, *modules_of("reference", False)]
    done = subprocess.run(
        command, check=True, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, timeout=300
    )
    assert len(json.loads(done.stdout)) < 10
