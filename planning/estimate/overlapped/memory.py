"""Bytes of a rank under engine torch."""

from models.config import PriorConfig
from planning.estimate.hardware import Hardware
from planning.estimate.layers import RankLayer, rank_layers
from planning.estimate.overlapped.layout import Layout
from planning.estimate.overlapped.sharded import AHEAD
from planning.estimate.reserve import RING, TREES
from training.config import PriorTrain

HALF, FULL = 2, 4
COMMUNICATORS = {"sharded": 3, "pipeline": 5}
"""Groups with NCCL buffers of their own: the world, shards or stages, replicas, tensor ranks."""


def torch_bytes(settings: PriorTrain, layout: Layout, hardware: Hardware) -> dict[str, int]:
    """Peak bytes of the fullest rank by category."""
    parts = rank_layers(settings.model, 0, layout.tensor)
    stages = _stages(parts, layout.pipeline)
    sizes = [_stage(settings, layout, stage, s) for s, stage in stages]
    most = max(sizes, key=lambda row: sum(row.values()))
    groups = COMMUNICATORS["pipeline" if layout.pipeline > 1 else "sharded"]
    groups += layout.tensor > 1
    return most | {"nccl": hardware.channels * groups * (RING + TREES)}


def _stages(parts: tuple[RankLayer, ...], pipeline: int) -> list[tuple[int, tuple[RankLayer, ...]]]:
    """The first and the last stage, with their layers."""
    blocks = parts[1:-1]
    each = len(blocks) // pipeline
    if pipeline == 1:
        return [(0, parts)]
    return [(0, parts[: 1 + each]), (pipeline - 1, parts[-1 - each :])]


def _stage(
    settings: PriorTrain, layout: Layout, parts: tuple[RankLayer, ...], stage: int
) -> dict[str, int]:
    numels = [sum(h.numel for h in part.parameters.values()) for part in parts]
    total, largest = sum(numels), max(numels)
    moment = HALF if settings.optim.moments == "bf16" else FULL
    piped = layout.pipeline > 1
    shards = layout.replicas if piped else layout.shards
    own = -(-total // shards)
    buffers = largest * HALF if piped else (AHEAD + 2) * largest * HALF
    return {
        "parameters": (total if piped else own) * HALF,
        "gradients": (total if piped else own) * FULL,
        "optimizer": own * (FULL + 2 * moment),
        "activations": _activations(settings.model, layout, parts, stage),
        "compression": own * FULL if layout.rank else 0,
        "buffers": buffers,
    }


def _activations(
    model: PriorConfig, layout: Layout, parts: tuple[RankLayer, ...], stage: int
) -> int:
    """Saved activations in 16 bits, the residual stream in 32, of all micro-batches in flight."""
    blocks = sum(part.name.startswith("block") for part in parts)
    rows = layout.micro * model.length
    each = rows * position_bytes(model, layout) / layout.tensor
    flight = in_flight(layout, stage)
    saved = flight * blocks * each
    if layout.recompute == "full":
        saved += rows * 36 * model.dim / layout.tensor  # one block, computed again
    logits = 0.0
    if parts[-1].name == "head":
        entries = model.text_length * model.text_vocabulary
        entries += model.image_length * model.image_vocabulary
        logits = 3.0 * FULL * layout.micro * entries / layout.tensor  # softmax, and gradients
    return int(saved + logits + 4 * FULL * rows * model.dim)


def position_bytes(model: PriorConfig, layout: Layout) -> float:
    """Bytes that a block saves a position, before they are split over tensor ranks."""
    d, w = model.dim, model.hidden
    if layout.recompute == "full":
        return 2.0 * FULL * d
    gated = model.mlp == "gated"
    if not layout.eager:  # the compiler saves no norm, GELU or product: it computes them again
        looked = 4 if layout.recompute == "none" else 3
        return float(2 * FULL * d + looked * HALF * d + (2 if gated else 1) * HALF * w)
    inner = (3 if gated else 2) * HALF * w
    return float(2 * FULL * d + 2 * FULL * d + 2 * HALF * d + 4 * HALF * d + inner)


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at a time, in whole stages."""
    if layout.pipeline == 1:
        return 1.0
    stages, chunks = layout.pipeline, layout.chunks
    total = layout.accumulate * chunks
    if layout.schedule == "interleaved":
        ahead = (chunks - 1) * stages + 2 * (stages - 1 - stage) + 1
    elif layout.schedule == "zero-bubble":
        ahead = stages  # weights' gradients come later
    else:
        ahead = stages - stage
    return min(ahead, total) / chunks
