"""Ranks are forked from a process that has imported torch, DeepSpeed and Megatron.

CUDA must still work in them.

A CPU build cannot test this: its `torch.cuda._is_in_bad_fork()` is always false.
"""

import json
import subprocess
import sys
from pathlib import Path

from parallel.engines.registry import MEGATRON
from tests.harness import ENVIRONMENT, ROOT
from tests.unit.repository.test_fork import EVERYTHING

NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
FIRST = "tests.cuda_build.nvml"
_LAUNCH = """
import sys
from cluster.launcher import launch
launch("tests.cuda_build.test_fork:report", sys.argv[1], 1, sys.argv[2:])
"""


def report(out: str) -> None:
    """On the rank: report whether CUDA works and whether its parent had imported torch."""
    preloaded = "torch" in sys.modules
    import torch

    facts = {"preloaded": preloaded, "bad": torch.cuda._is_in_bad_fork()}
    Path(out).write_text(json.dumps(facts))


def _forked(preload: list[str], out: Path, **extra: str) -> dict[str, bool]:
    environment = {name: text for name, text in ENVIRONMENT.items() if name != NVML}
    command = [sys.executable, "-c", _LAUNCH, str(out), FIRST, *preload]
    subprocess.run(command, check=True, cwd=ROOT, env={**environment, **extra}, timeout=300)
    facts: dict[str, bool] = json.loads(out.read_text())
    return facts


def test_ranks_can_use_cuda_after_the_preloads(tmp_path: Path) -> None:
    assert _forked(EVERYTHING, tmp_path / "facts") == {"preloaded": True, "bad": False}


def test_without_nvml_the_same_imports_start_cuda(tmp_path: Path) -> None:
    """The failure that the launcher prevents: torch asks the driver, then no fork can use CUDA."""
    preload = ["torch", "torch.distributed", MEGATRON]
    facts = _forked(preload, tmp_path / "facts", **{NVML: "0"})
    assert facts == {"preloaded": True, "bad": True}
