"""Engines by name, and what a forkserver imports for them; imports no torch."""

ENGINES = {
    "reference": ("parallel.engines.reference", "ReferenceEngine"),
    "deepspeed_zero": ("parallel.engines.deepspeed_zero", "DeepSpeedZeroEngine"),
    "deepspeed_pipe": ("parallel.engines.deepspeed_pipe", "DeepSpeedPipeEngine"),
}
MEGATRON = "parallel.tensor.megatron"
"""Imported only where there are tensor or pipeline ranks."""


def modules_of(engine: str, model_parallel: bool) -> list[str]:
    """What a forkserver should import before ranks with this engine start."""
    return [ENGINES[engine][0], *([MEGATRON] if model_parallel else [])]
