"""The registry of engines; each is imported on demand. Imports no torch itself."""

import importlib
from typing import Any

ENGINES = {
    "reference": ("parallel.engines.reference", "ReferenceEngine"),
    "deepspeed_zero": ("parallel.engines.deepspeed.zero", "DeepSpeedZeroEngine"),
    "deepspeed_pipe": ("parallel.engines.deepspeed.pipe", "DeepSpeedPipeEngine"),
    "torch": ("parallel.engines.fsdp.engine", "TorchEngine"),
}
MEGATRON = "parallel.tensor.megatron"
"""Imported only for tensor or pipeline parallelism."""


def modules_of(engine: str, model_parallel: bool) -> list[str]:
    """Modules that a forkserver imports before ranks with this engine start."""
    return [ENGINES[engine][0], *([MEGATRON] if model_parallel else [])]


def import_engine(engine: str, model_parallel: bool) -> None:
    """Import an engine's modules, in a process that then forks the ranks."""
    for name in modules_of(engine, model_parallel):
        importlib.import_module(name)


def build_engine(program: Any, settings: Any, mesh: Any) -> Any:
    """Build the engine that the settings name; typed as parallel.engines.protocol.Builder."""
    module, name = ENGINES[settings.engine.name]
    builder = getattr(importlib.import_module(module), name)
    return builder(program, settings, mesh)
