"""These tests are collected only with CUDA, or for the device that the environment names."""

import os

import pytest
import torch

from parallel.diagnostics.flight_recorder import remember

DEVICE = os.environ.get("TAPIR_GPU_TESTS_DEVICE", "cuda")
remember()  # the recorders read the environment once
collect_ignore_glob = [] if DEVICE != "cuda" or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The tested device; the CPU in a dry run."""
    return torch.device(DEVICE)
