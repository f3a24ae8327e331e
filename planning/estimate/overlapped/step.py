"""How a step of a dense decoder is run; imports no torch."""

from dataclasses import dataclass
from typing import Literal

Recompute = Literal["none", "selective", "full"]
Attention = Literal["flash", "triton", "flex", "unfused"]
Schedule = Literal["1f1b", "interleaved", "zero-bubble"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A dense decoder."""

    hidden: int
    heads: int
    layers: int
    groups: int
    """Heads of keys and values."""
    wide: int
    """Width of the MLP."""
    vocabulary: int
    gated: bool = False
    """Three matrices in the MLP, no biases, rotary positions, and an untied head."""
    qk_norm: bool = False

    @property
    def keys(self) -> int:
        """Channels of keys, and of values."""
        return self.groups * (self.hidden // self.heads)

    @property
    def matrices(self) -> int:
        """Parameters of a layer's matrices."""
        inner = 3 if self.gated else 2
        return 2 * self.hidden * (self.hidden + self.keys) + inner * self.hidden * self.wide


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model, its batch and its mesh, and what the program does to save time and memory."""

    sizes: Sizes
    length: int
    gpus: int
    micro: int
    """Samples of a micro-batch."""
    accumulate: int
    """Micro-batches a step; sharded weights are gathered, and gradients reduced, in each."""
    tensor: int = 1
    """Ranks that share each matmul, with sequence parallelism: norms and sums are shared too."""
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    chunks: int = 1
    """Chunks of layers on each stage (interleaved, zero-bubble)."""
    stage: int = 3
    """ZeRO's: 3 gathers weights for each pass; 2 keeps them gathered between the passes; 1 shards
    the optimiser alone."""
    recompute: Recompute = "none"
    """selective repeats every second matmul, and all that is no matmul or attention."""
    attention: Attention = "flash"
    compiled: bool = False
    """torch.compile of each block, or kernels that are fused by hand."""
    asynchronous: bool = False
    """Tensor parallelism whose collectives run in pieces beside the matmuls."""
    wide: bool = False
    """The residual stream is fp32."""
