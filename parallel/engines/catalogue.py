"""Engines by name; DeepSpeed is imported only when it is asked for."""

import importlib

from parallel.engines.protocol import Builder, Engine, EngineSettings, Program
from parallel.mesh import MEGATRON, Mesh

_ENGINES = {
    "reference": ("parallel.engines.reference", "ReferenceEngine"),
    "deepspeed_zero": ("parallel.engines.deepspeed_zero", "DeepSpeedZeroEngine"),
    "deepspeed_pipe": ("parallel.engines.deepspeed_pipe", "DeepSpeedPipeEngine"),
}


def build_engine(program: Program, settings: EngineSettings, mesh: Mesh) -> Engine:
    """Build the engine that the config names."""
    module, name = _ENGINES[settings.engine.name]
    builder: Builder = getattr(importlib.import_module(module), name)
    return builder(program, settings, mesh)


def modules_of(engine: str, model_parallel: bool) -> list[str]:
    """What a forkserver should import before ranks with this engine start."""
    return [_ENGINES[engine][0], *([MEGATRON] if model_parallel else [])]
