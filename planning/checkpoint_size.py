"""The bytes of a checkpoint by part, as the engines store them."""

from collections.abc import Iterator
from math import prod

from checkpoint.config import averages_errors
from models.prior import BRANCHES
from parallel.mesh import RankCoordinates
from planning.estimate.layers import named, rank_layers, training_of
from planning.estimate.zero_layout import Factored, factored, stage_of_zero
from training.config import PriorTrain

PARTS = {
    "masters": ("master",),
    "moments": ("exp_avg", "exp_avg_sq"),
    "average": ("ema",),
    "errors": ("error",),
    "rest": ("step", "basis", "scale"),
}
"""Part -> kinds of its slices; those of `error@R` belong to `errors`."""
_STEP, _SCALE = 4, 8
"""Bytes of a parameter's step count, and of a branch's gradient scale with its age."""


def checkpoint_bytes(settings: PriorTrain) -> dict[str, int]:
    """Bytes of the tensors of a checkpoint, by PARTS; without the headers and the manifest.

    Each element is stored once, without padding; error buffers once, or once a replica. A run of
    adapters stores them alone.
    """
    held = named(rank_layers(settings.model, 0, 1, training_of(settings))).values()
    shapes = [h.placement.shape for h in held if h.trained]
    elements = sum(prod(shape) for shape in shapes)
    frozen = 0 if settings.lora.rank else sum(h.numel for h in held if not h.trained)
    moment = 2 if settings.optim.moments == "bf16" else 4
    factors = list(_factored_everywhere(settings))
    errors = sum(each.rows * each.columns for each in factors)
    replicas = replicas_that_compress(settings)
    if not averages_errors(settings.checkpoint.errors, replicas):
        errors *= replicas
    rest = _STEP * len(shapes)
    if settings.compress.warm_start:
        rest += 4 * sum(each.rank * max(each.rows, each.columns) for each in factors)
    if settings.engine.precision == "fp16":
        rest += _SCALE * settings.model.layers * len(BRANCHES)
    return {
        "masters": 4 * (elements + frozen),
        "moments": 2 * moment * elements,
        "average": 4 * elements if settings.optim.ema else 0,
        "errors": 4 * errors,
        "rest": rest,
    }


def replicas_that_compress(settings: PriorTrain) -> int:
    """Ranks between which a gradient is compressed: nodes under ZeRO-3, else all replicas."""
    return settings.mesh.nodes if stage_of_zero(settings) == 3 else settings.mesh.data


def _factored_everywhere(settings: PriorTrain) -> Iterator[Factored]:
    """The shards of all matrices that one replica compresses, of all stages and tensor ranks."""
    mesh = settings.mesh
    parts = mesh.local if stage_of_zero(settings) == 3 else 1
    for shard in range(mesh.tensor):
        held = named(rank_layers(settings.model, shard, mesh.tensor, training_of(settings)))
        for replica in range(parts):
            yield from factored(settings, held, RankCoordinates(replica=replica, shard=shard))
