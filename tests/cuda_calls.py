"""Counts calls to torch.cuda while the launcher's forkserver imports what it preloads."""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

WATCHED = (
    *("is_available", "device_count", "current_device", "init", "_lazy_init", "set_device"),
    *("get_device_properties", "get_device_capability", "get_device_name", "synchronize"),
)
CALLS: list[str] = []
ASKS_NVML = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1"
"""What torch.cuda.is_available() reads, as this process had it when it began to preload."""


def _watch() -> None:
    import torch

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            CALLS.append(name)
            return function(*arguments, **named)

        return call

    for name in WATCHED:
        setattr(torch.cuda, name, counted(name, getattr(torch.cuda, name)))


if "TAPIR_TEST_WATCH_CUDA" in os.environ:
    _watch()


def launch_and_report(out: str, preload: list[str]) -> None:
    """Launch one rank with these preloads; it writes the CUDA calls of its forkserver."""
    from cluster.launcher import launch

    os.environ["TAPIR_TEST_WATCH_CUDA"] = "1"
    body = json.dumps({"out": out, "preload": preload})
    launch("tests.cuda_calls:report", body, 1, ["tests.cuda_calls", *preload])


def report(payload: str) -> None:
    """On the rank: the calls that its forkserver made before the fork."""
    body = json.loads(payload)
    there = [name for name in body["preload"] if name in sys.modules]
    facts = {"preloaded": there, "calls": CALLS, "asks_nvml": ASKS_NVML}
    Path(body["out"], "calls.json").write_text(json.dumps(facts))
