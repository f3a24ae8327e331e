"""Engines by name; DeepSpeed is imported only when it is asked for."""

import importlib

from parallel.config import EngineConfig, OptimConfig
from parallel.engines.protocol import Builder, Engine, Program
from parallel.world import World

_ENGINES = {
    "reference": ("parallel.engines.reference", "ReferenceEngine"),
    "deepspeed_zero": ("parallel.engines.deepspeed_zero", "DeepSpeedZeroEngine"),
}


def build_engine(
    program: Program, optim: OptimConfig, engine: EngineConfig, world: World
) -> Engine:
    """Build the engine that the config names."""
    module, name = _ENGINES[engine.name]
    builder: Builder = getattr(importlib.import_module(module), name)
    return builder(program, optim, engine, world)
