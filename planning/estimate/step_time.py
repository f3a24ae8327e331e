"""Estimate the time of a step, and its parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.attention.masks import layer_kind
from models.counts import prior_flops
from parallel.ledger import Counts
from parallel.mesh import RankCoordinates
from planning.decode import Decoding
from planning.estimate.collectives import all_reduce, gather, group_span, hand_on
from planning.estimate.fsdp.layout import uses_fsdp
from planning.estimate.hardware import Hardware
from planning.estimate.kernels import seconds
from planning.estimate.layer_work import (
    backward_work,
    compression_work,
    forward_work,
    recomputed_work,
    update_work,
)
from planning.estimate.layers import RankLayer
from planning.estimate.memory import Loads, loads_of
from planning.estimate.pipeline_schedule import Played, Span, crowded, play
from planning.estimate.tallies.tensor import stream_elements, wire_bytes
from planning.estimate.traffic import step_traffic, tied_elements
from planning.estimate.zero_layout import (
    factored,
    groups_of,
    padded,
    shard_numel,
    stage_of_zero,
)
from training.config import PriorTrain

HOURS = 3600.0
PASSES = ("compute", "tensor", "bubble")
"""Parts of a step up to the last backward pass; `crowding` is added if ranks share cores."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step's time, and figures derived from it."""

    seconds: float
    compute: float
    """Seconds of kernels on the busiest stage, recompute included."""
    bubble: float
    """Fraction of the pipeline's time in which stages wait for each other."""
    exposed: float
    """Seconds of collectives not overlapped with computation, on the busiest stage."""
    parts: dict[str, float]
    """Seconds of the step by activity of a rank of the busiest stage."""
    mfu: float
    """Model FLOPs (real masks, no recompute) over the peak of 16-bit matmuls."""
    tokens_per_second: float
    days: float
    """For loop.steps updates."""
    cost: float
    """Dollars of all of them; 0 = unknown."""
    traffic: Counts
    """Calls and bytes per step of a rank of the busiest stage."""
    spans: list[Span]
    decoding: Decoding | None = None
    """Pictures that are made beside the step; None for a prior."""


@dataclass(frozen=True)
class _StageSeconds:
    """Seconds of one stage per micro-batch."""

    forward: float
    backward: float
    tensor: float
    """Part of both that the tensor group's collectives take."""


def estimate(settings: PriorTrain, hardware: Hardware) -> Estimate:
    """Estimate the step of the first replica, stage by stage.

    Ranks that share cores slow each other down while they compute at the same time.
    """
    mesh, times = settings.mesh, settings.engine.gradient_accumulation_steps
    stages_at = map(RankCoordinates, range(mesh.pipeline))
    loads = [loads_of(settings, at, hardware.cores > 0) for at in stages_at]
    stages = [_stage(one, hardware) for one in loads]
    played = _played(settings, stages, hardware)
    slowest = max(range(len(stages)), key=lambda i: stages[i].forward + stages[i].backward)
    ends = [ending_seconds(one, hardware) for one in loads]
    crowd = hardware.crowd(mesh.world)
    end = max(ends, key=lambda row: sum(row.values()))
    end = {name: value * crowd for name, value in end.items()}
    overhead = crowd * _overhead(settings, hardware)
    passes = crowded(played, mesh.data * mesh.tensor, hardware)
    total = passes + sum(end.values()) + overhead
    tensor = times * stages[slowest].tensor
    parts = {
        "compute": played.busy[slowest] - tensor,
        "tensor": tensor,
        "bubble": played.seconds - played.busy[slowest],
        **({"crowding": passes - played.seconds} if hardware.cores else {}),
        **end,
        "overhead": overhead,
    }
    samples = settings.loop.global_batch_size
    work = prior_flops(settings.model) * samples
    hours = total * settings.loop.steps / HOURS
    return Estimate(
        seconds=total,
        compute=parts["compute"],
        bubble=played.bubble,
        exposed=tensor + end["gradients"] + end["weights"] + end["results"],
        parts=parts,
        mfu=work / (total * mesh.world * hardware.half_flops),
        tokens_per_second=samples * settings.model.length / total,
        days=hours / 24,
        cost=hours * mesh.world * hardware.cost_per_hour,
        traffic=step_traffic(loads[slowest]),
        spans=played.spans,
    )


def rough_seconds(settings: PriorTrain, hardware: Hardware) -> float:
    """Estimate a step without simulating the pipeline: every stage as slow as the slowest."""
    mesh, times = settings.mesh, settings.engine.gradient_accumulation_steps
    ends = sorted({0, mesh.pipeline - 1})
    loads = [loads_of(settings, RankCoordinates(stage), hardware.cores > 0) for stage in ends]
    stages = [_stage(one, hardware) for one in loads]
    slowest = max(stage.forward + stage.backward for stage in stages)
    return (times + mesh.pipeline - 1) * slowest + sum(ending_seconds(loads[0], hardware).values())


def _overhead(settings: PriorTrain, hardware: Hardware) -> float:
    own = settings.engine.name != "reference"
    return hardware.step_overhead + (hardware.engine_overhead if own else 0.0)


def _stage(loads: Loads, hardware: Hardware) -> _StageSeconds:
    by_kind: dict[str, tuple[float, float, float]] = {}
    forward = backward = tensor = 0.0
    for part in loads.layers:
        key = _alike(loads, part)
        if key not in by_kind:
            by_kind[key] = _layer(loads, part, hardware)
        there, back, shared = by_kind[key]
        forward, backward, tensor = forward + there, backward + back, tensor + shared
    return _StageSeconds(forward, backward, tensor)


def _alike(loads: Loads, part: RankLayer) -> str:
    """Key of layers that take equally long: blocks with the same mask, and the same ones frozen."""
    if not part.name.startswith("block"):
        return part.name
    kind = layer_kind(int(part.name.removeprefix("block")) + 1, loads.settings.model.layers)
    return " ".join([kind, *sorted(part.frozen)])


def _layer(loads: Loads, part: RankLayer, hardware: Hardware) -> tuple[float, float, float]:
    """(forward, backward, collectives in both) of one micro-batch, in seconds."""
    settings = loads.settings
    config, micro = settings.model, loads.micro
    block = part.name.startswith("block")
    state = float(wire_bytes(loads) if block else 4) * micro * config.length * config.dim
    span = group_span(settings.mesh, "tensor")
    each = all_reduce(state, span, hardware) if settings.mesh.tensor > 1 else 0.0
    there = back = 0.0
    if block:
        there, back = 2 * each, 2 * each
        if settings.mesh.sequence_parallel and settings.engine.recompute:
            back += each  # both inputs are gathered again
    elif part.name == "embedding":
        there = 2 * each  # words, and codes: no more bytes than one state, twice the hops
    else:
        there, back = 0.5 * each, each
    forward = seconds(forward_work(loads, part, hardware), hardware) + hardware.overhead / 3
    backward = seconds(backward_work(loads, part, hardware), hardware) + hardware.overhead / 1.5
    if block and settings.engine.recompute:
        again = recomputed_work(loads, part, hardware) if settings.engine.selective else ()
        backward += seconds(again, hardware) if again else forward
    weights, gradients = _third_stage(loads, part, hardware)
    third = weights + gradients
    sent = there + back + weights + third
    return forward + there + weights, backward + back + third, sent


def _third_stage(loads: Loads, part: RankLayer, hardware: Hardware) -> tuple[float, float]:
    """Seconds to gather a layer's weights once, and to scatter its gradients, under ZeRO-3."""
    if stage_of_zero(loads.settings) != 3:
        return 0.0, 0.0
    settings, span = loads.settings, group_span(loads.settings.mesh, "machine")
    numel = sum(h.numel for h in part.parameters.values())
    half = uses_fsdp(settings) and part.name.startswith("block")
    narrow = half and settings.engine.reduce_precision != "fp32"
    weights = gather(float(wire_bytes(loads) if half else 4) * numel, span, hardware)
    return weights, gather((2.0 if narrow else 4.0) * numel, span, hardware)


def _played(settings: PriorTrain, stages: Sequence[_StageSeconds], hardware: Hardware) -> Played:
    times, mesh = settings.engine.gradient_accumulation_steps, settings.mesh
    forward = [stage.forward for stage in stages]
    backward = [stage.backward for stage in stages]
    transfer = 0.0
    if mesh.pipeline > 1:
        micro = settings.loop.global_batch_size // mesh.data // times
        state = 4.0 * micro * settings.model.length * settings.model.dim
        transfer = hand_on(state / mesh.tensor, mesh, hardware)
        if mesh.tensor > 1 and not mesh.sequence_parallel:
            transfer += gather(state, group_span(mesh, "tensor"), hardware)
    return play(forward, backward, times, transfer)


def ending_seconds(loads: Loads, hardware: Hardware) -> dict[str, float]:
    """Seconds after the last backward pass: gradients, update, weights, and results."""
    settings, held = loads.settings, loads.held
    mesh, stage = settings.mesh, stage_of_zero(settings)
    data = group_span(mesh, "data")
    total = sum(h.numel for h in held.values() if h.trained)
    mine, weights, rounds = total, 0.0, 1
    if stage in (1, 2):
        whole = sum(padded(group, mesh.data) for group in groups_of(held))
        mine = whole // mesh.data
        weights = gather(4.0 * whole, data, hardware)
        rounds = settings.engine.gradient_accumulation_steps if stage == 2 else 1
    elif stage == 3:
        mine = sum(shard_numel(h, mesh.local) for h in held.values() if h.trained)
        data = group_span(mesh, "between")
    update = seconds(update_work(mine), hardware)
    sent = _sent_bytes(loads, mine if stage == 3 else total)
    gradients = rounds * all_reduce(sent, data, hardware)
    if tied := tied_elements(loads):
        for span in (data, group_span(mesh, "ends")):
            gradients += all_reduce(4.0 * sum(tied), span, hardware)
    if stream := stream_elements(loads):
        gradients += all_reduce(4.0 * stream, group_span(mesh, "tensor"), hardware)
    compress = rounds * seconds(compression_work(loads, hardware), hardware)
    results = 4 * all_reduce(64.0, group_span(mesh, "world"), hardware) if mesh.world > 1 else 0.0
    return {
        "gradients": gradients,
        "compress": compress,
        "update": update,
        "weights": weights,
        "results": results,
    }


def _sent_bytes(loads: Loads, elements: int) -> float:
    """Bytes of gradients that are reduced over the replicas."""
    shards = list(factored(loads.settings, loads.held, loads.at))
    whole = elements - sum(s.rows * s.columns for s in shards)
    return 4.0 * whole + loads.settings.compress.payload_bytes * sum(s.sent for s in shards)
