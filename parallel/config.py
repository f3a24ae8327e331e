"""Settings of the mesh, the engine and the optimiser; imports no torch."""

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["reference", "deepspeed_zero"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How ranks are arranged: world = data * pipeline * tensor."""

    data: int = 1
    """Replicas that each read their own part of the global batch."""
    tensor: int = 1
    """Ranks that share each matmul (degrees above 1 are not built yet)."""
    pipeline: int = 1
    """Stages that the layers are cut into (degrees above 1 are not built yet)."""

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    def problems(self, world: int | None = None) -> list[str]:
        """What is impossible about this mesh; `world` is the number of ranks that were given."""
        found = []
        if min(self.data, self.tensor, self.pipeline) < 1:
            found.append("mesh.data, mesh.tensor and mesh.pipeline must be at least 1")
        if self.tensor > 1 or self.pipeline > 1:
            found.append("mesh.tensor and mesh.pipeline must be 1: only data parallelism is built")
        block = max(1, self.tensor * self.pipeline)
        if world is not None and world != self.world:
            hint = (
                f"try --mesh.data {world // block}"
                if world % block == 0
                else f"start a multiple of {block} ranks"
            )
            found.append(
                f"the mesh data={self.data} x tensor={self.tensor} x pipeline={self.pipeline} "
                f"needs {self.world} ranks, but {world} were started; {hint}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 0.0
    """Learning rate at the last step; the way down is a cosine."""
    warmup: int = 50
    """Steps of the linear rise from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.96
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.045
    """Decoupled weight decay of matrices; gains and biases have none."""
    clip_norm: float = 4.0
    """Global gradient norm above which gradients are scaled down."""

    def problems(self) -> list[str]:
        found = []
        if self.lr <= 0 or self.clip_norm <= 0:
            found.append("optim.lr and optim.clip_norm must be positive")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            found.append("optim.beta1 and optim.beta2 must lie in [0, 1)")
        return found


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine owns the training step."""

    name: EngineName = "reference"
    """reference (plain torch) or deepspeed_zero."""
    zero_stage: int = 1
    """What deepspeed_zero shards over the data-parallel ranks: 1 = optimiser state."""
    accumulate: int = 1
    """Micro-batches a step, on each rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matmuls in bf16 with fp32 accumulation; weights, moments, norms, logits and all-reduces
    stay fp32."""
    matmul_precision: Literal["auto", "highest", "medium"] = "auto"
    """fp32 matmuls: auto = medium where a start-up probe finds it as accurate as highest."""

    def problems(self, batch_per_rank: int) -> list[str]:
        found = []
        if self.zero_stage != 1:
            found.append(f"engine.zero_stage={self.zero_stage} is not built yet; use 1")
        if self.accumulate < 1 or batch_per_rank % max(self.accumulate, 1):
            found.append(
                f"engine.accumulate={self.accumulate} does not divide the {batch_per_rank} samples "
                "of a rank; try 1"
            )
        return found
