"""Engines by name; DeepSpeed is imported only when it is asked for."""

import importlib

from parallel.engines.names import ENGINES
from parallel.engines.protocol import Builder, Engine, EngineSettings, Program
from parallel.mesh import Mesh


def build_engine(program: Program, settings: EngineSettings, mesh: Mesh) -> Engine:
    """Build the engine that the config names."""
    module, name = ENGINES[settings.engine.name]
    builder: Builder = getattr(importlib.import_module(module), name)
    return builder(program, settings, mesh)
