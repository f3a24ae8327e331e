"""How a step of a dense decoder is run; imports no torch."""

from dataclasses import dataclass
from typing import Literal

Recompute = Literal["none", "norms", "selective", "full"]
Attention = Literal["flash", "triton", "flex", "unfused"]


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
    head: int = 0
    """Channels of a head; 0 = hidden / heads. Heads that are padded for tensor parallelism have
    more of them together than the stream."""

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.head or self.hidden // self.heads

    @property
    def queries(self) -> int:
        """Channels of queries."""
        return self.heads * self.width

    @property
    def keys(self) -> int:
        """Channels of keys, and of values."""
        return self.groups * self.width

    @property
    def matrices(self) -> int:
        """Parameters of a layer's matrices."""
        inner = 3 if self.gated else 2
        return 2 * self.hidden * (self.queries + self.keys) + inner * self.hidden * self.wide


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
    stage: int = 3
    """ZeRO's: 3 gathers weights for each pass; 2 keeps them gathered between the passes; 1 shards
    the optimiser alone."""
    recompute: Recompute = "none"
    """norms repeats all that is no matmul: norms, GELU, attention. selective repeats every second
    matmul and all that is neither matmul nor attention, as torchtitan does. full repeats it all."""
    attention: Attention = "flash"
    compiled: bool = False
    """torch.compile of each block, or kernels that are fused by hand."""
    asynchronous: bool = False
    """Tensor parallelism whose collectives run in pieces beside the matmuls."""
    wide: bool = False
    """The residual stream is fp32."""
