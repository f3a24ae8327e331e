"""Time of a prior's step under engine torch."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import cast

from models.attention.masks import Kind, layer_kind
from models.config import PriorConfig
from models.counts import prior_flops
from models.prior import COMPRESSED
from parallel.compress.powersgd import shard_rank
from planning.estimate.collectives import all_reduce
from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, Work, seconds
from planning.estimate.layer_work import UPDATE, pairs
from planning.estimate.layers import RankLayer, rank_layers
from planning.estimate.overlapped import decoder
from planning.estimate.overlapped.layout import Layout, sizes_of
from planning.estimate.overlapped.rates import contention, steady
from planning.estimate.overlapped.schedules import pipelined
from planning.estimate.overlapped.sharded import Unit, ring_seconds, sharded_step
from planning.estimate.overlapped.step import Step
from planning.estimate.overlapped.tensor import tensor_seconds
from training.config import PriorTrain

HALF = 2
COPY_OUT, COPY_IN = 4, 4
"""Bytes a parameter that FSDP2 copies out of a gathered buffer, and into a reduction's: 16 bits."""
ADDED = 10
"""Bytes a parameter and micro-batch of adding a 16-bit gradient to the fp32 one."""
CAST = 6
"""Bytes a parameter of the shard: read in fp32, written in 16 bits, once a step."""
FACTORED = 28
"""Bytes an element of a compressed matrix: gradient, error and approximation, read and written."""
CHOLESKY = 1e-4
"""Seconds of the two Cholesky factors of a stack of equal shapes, which are latency alone."""


@dataclass(frozen=True, kw_only=True)
class TorchEstimate:
    """A step under engine torch."""

    layout: Layout
    seconds: float
    mfu: float
    bare_seconds: float
    """Without what only a GPU can show: gathers and reduce-scatters hide behind nothing, blocks are
    not compiled, tensor parallelism blocks."""
    bare_mfu: float
    bubble: float
    parts: dict[str, float]
    """Seconds of the step by what the busiest stage's rank does."""


def estimate_torch(settings: PriorTrain, layout: Layout, hardware: Hardware) -> TorchEstimate:
    """Estimate a step, and the same step without what is assumed."""
    parts, bubble = _parts(settings, layout, hardware, assumed=True)
    bare, _ = _parts(settings, replace(layout, asynchronous=False), hardware, assumed=False)
    work = prior_flops(settings.model) * settings.loop.global_batch_size
    peak = layout.world * hardware.half_flops
    total, without = sum(parts.values()), sum(bare.values())
    return TorchEstimate(
        layout=layout,
        seconds=total,
        mfu=work / (total * peak),
        bare_seconds=without,
        bare_mfu=work / (without * peak),
        bubble=bubble,
        parts=parts,
    )


def rough_torch(settings: PriorTrain, layout: Layout, hardware: Hardware) -> float:
    """Seconds of a step without playing it: links and computation take turns, or hide wholly."""
    run = Rank(settings.model, layout, steady(hardware), True)
    return run.rough_pipeline() if layout.pipeline > 1 else run.rough_sharded()


def _parts(
    settings: PriorTrain, layout: Layout, hardware: Hardware, *, assumed: bool
) -> tuple[dict[str, float], float]:
    held = steady(hardware)
    if not assumed:
        held = replace(held, channels=0)  # nothing runs beside the computation
    run = Rank(settings.model, layout, held, assumed)
    parts, bubble = run.pipeline() if layout.pipeline > 1 else run.sharded()
    world = (layout.world, 1)
    parts["results"] = 4 * all_reduce(64.0, world, held) if layout.world > 1 else 0.0
    parts["overhead"] = held.step_overhead
    return parts, bubble


@dataclass(frozen=True)
class Rank:
    """One rank's work in a step."""

    model: PriorConfig
    layout: Layout
    hardware: Hardware
    """As it runs inside of a step."""
    assumed: bool
    """Collectives run beside the passes, and blocks are compiled."""

    @cached_property
    def step(self) -> Step:
        """The blocks' step, without what leaves the passes as they are."""
        layout = self.layout
        return Step(
            sizes=sizes_of(self.model, layout.tensor),
            length=self.model.length,
            gpus=1,
            micro=layout.micro,
            accumulate=1,
            tensor=layout.tensor,
            recompute=layout.recompute,
            attention="flex",
            compiled=self.assumed and not layout.eager,
            asynchronous=layout.asynchronous,
            wide=True,
        )

    def layers(self) -> tuple[RankLayer, ...]:
        """All layers of the model, as one tensor rank holds them."""
        return rank_layers(self.model, 0, self.layout.tensor)

    def sharded(self) -> tuple[dict[str, float], float]:
        """Parts of a step with sharded weights."""
        layout, hw = self.layout, self.hardware
        units = [self._unit(part) for part in self.layers()]
        own = sum(_numel(part) for part in self.layers()) / layout.shards
        update = seconds((Kernels(moved=(UPDATE + CAST) * own),), hw)
        played = sharded_step(
            units, layout.accumulate, keeps=False, update=0.0, hardware=hw, beside=self.assumed
        )
        passes = layout.accumulate * sum(unit.forward + unit.backward for unit in units)
        tensor = layout.accumulate * self.model.layers * sum(tensor_seconds(self.step, hw))
        factors = sum(unit.factors for unit in units)
        return {
            "compute": passes - tensor,
            "tensor": tensor,
            "factors": factors,
            "slowed": played.slowed,
            "exposed": played.seconds - passes - factors - played.slowed,
            "update": update,
        }, 0.0

    def rough_sharded(self) -> float:
        """The longer of the passes and the links, and what slows the passes beside them."""
        layout, hw = self.layout, self.hardware
        parts = self.layers()
        kinds = {part.name.rstrip("0123456789"): part for part in parts}
        passes = links = between = 0.0
        for name, part in kinds.items():
            unit = self._unit(part)
            times = self.model.layers if name == "block" else 1
            passes += times * (unit.forward + unit.backward)
            links += times * (2 * unit.gather + unit.scatter)
            between += times * unit.between
            passes += times * unit.factors / layout.accumulate
        passes, links = layout.accumulate * passes, layout.accumulate * links
        return max(passes + contention(hw) * min(passes, links + between), links, between)

    def rough_pipeline(self) -> float:
        """All passes of the last stage, and the schedule's bubble."""
        layout, hw = self.layout, self.hardware
        stage = self._stages()[-1]
        both = [self.passes(part) for part in stage]
        numel = sum(_numel(part) for part in stage)
        added = seconds((Kernels(moved=ADDED * numel),), hw) if layout.accumulate > 1 else 0.0
        forward, backward = sum(row[0] for row in both), sum(row[1] for row in both) + added
        bubble = (layout.pipeline - 1) * (forward + backward) / layout.chunks
        if layout.schedule == "zero-bubble":
            bubble = (layout.pipeline - 1) * forward
        reduce = self._data(HALF * numel)
        late = max(0.0, reduce - backward) + max(0.0, reduce - forward)
        return layout.accumulate * (forward + backward) + bubble + late

    def _unit(self, part: RankLayer) -> Unit:
        layout, hw, numel = self.layout, self.hardware, _numel(part)
        there, back = self.passes(part)
        copies = [(Kernels(moved=each * numel),) for each in (COPY_OUT, COPY_IN)]
        factors, between = self._between(part)
        return Unit(
            forward=there + seconds(copies[0], hw),
            backward=back + seconds(copies[0] + copies[1], hw),
            gather=ring_seconds(HALF * numel, layout.shards, hw, layout.tensor),
            scatter=ring_seconds(HALF * numel, layout.shards, hw, layout.tensor),
            factors=factors,
            between=between,
        )

    def _between(self, part: RankLayer) -> tuple[float, float]:
        """(computation, traffic) of reducing a layer's shards between machines."""
        layout = self.layout
        if layout.nodes == 1:
            return 0.0, 0.0
        stride = layout.shards * layout.tensor

        def reduced(count: float) -> float:
            return 2 * ring_seconds(count, layout.nodes, self.hardware, stride)

        shards = {n: h.numel / layout.shards for n, h in part.parameters.items()}
        factored = {n for n in shards if layout.rank and n.endswith(COMPRESSED)}
        rest = sum(count for n, count in shards.items() if n not in factored)
        rank = shard_rank(layout.rank, layout.shards)
        work: list[Kernels] = []
        sides = [0, 0]
        shapes: Counter[tuple[int, int]] = Counter()
        for n in factored:
            rows, columns = part.parameters[n].placement.shape
            short, long = sorted((-(-rows // layout.shards), columns))
            shapes[short, long] += 1
            sides[0] += rank * short
            sides[1] += rank * long
            work += factor_work(short, long, rank)
        latency = CHOLESKY * len(shapes)
        traffic = reduced(HALF * rest) + sum(reduced(HALF * side) for side in sides if side)
        return seconds(work, self.hardware) + latency, traffic

    def passes(self, part: RankLayer) -> tuple[float, float]:
        """Seconds of a layer's (forward, backward) over a micro-batch, tensor collectives too."""
        kind = part.name.rstrip("0123456789")
        if kind == "block":
            layer = int(part.name.removeprefix("block")) + 1
            kind = layer_kind(layer, self.model.layers)
        return _layer_seconds(self.model, self.step, kind, self.layout.eager, self.hardware)

    def pipeline(self) -> tuple[dict[str, float], float]:
        """Parts of a step of a pipeline with ZeRO-1, whose gradients go behind the last pass."""
        layout, hw = self.layout, self.hardware
        stages = self._stages()
        numels = [sum(_numel(part) for part in stage) for stage in stages]
        forward, backward = [], []
        for stage, numel in zip(stages, numels, strict=True):
            both = [self.passes(part) for part in stage]
            added = seconds((Kernels(moved=ADDED * numel),), hw) if layout.accumulate > 1 else 0.0
            forward.append(sum(there for there, _ in both))
            backward.append(sum(back for _, back in both) + added)
        played = pipelined(
            layout.schedule,
            forward,
            backward,
            layout.accumulate,
            chunks=layout.chunks,
            transfer=self._transfer(),
        )
        reduce = [self._data(HALF * numel) for numel in numels]
        part = 1 / len(stages[0])  # the last layer's gradients, the first layer's weights
        hidden = [max(part * r, r - b) for r, b in zip(reduce, backward, strict=True)]
        gathered = max(part * reduce[0], reduce[0] - forward[0])
        exposed = max(hidden) + gathered if self.assumed else 2 * max(reduce)
        beside = contention(hw) * (2 * max(reduce) - exposed)
        update = seconds((Kernels(moved=(UPDATE + CAST) * max(numels) / layout.replicas),), hw)
        tensor = layout.accumulate * len(stages[0]) * sum(tensor_seconds(self.step, hw))
        return {
            "compute": played.busy - tensor,
            "tensor": tensor,
            "bubble": played.seconds - played.busy,
            "slowed": beside,
            "exposed": exposed,
            "update": update,
        }, played.bubble

    def _stages(self) -> list[list[RankLayer]]:
        """Layers of each stage: as many blocks each, the ends beside theirs."""
        parts = self.layers()
        blocks = [part for part in parts if part.name.startswith("block")]
        each = len(blocks) // self.layout.pipeline
        stages = [blocks[i : i + each] for i in range(0, len(blocks), each)]
        return [[parts[0], *stages[0]], *stages[1:-1], [*stages[-1], parts[-1]]]

    def _transfer(self) -> float:
        """Seconds to hand 16-bit states to the next stage; tensor ranks send a part each."""
        layout, hw = self.layout, self.hardware
        state = HALF * layout.micro * self.model.length * self.model.dim / layout.tensor
        stride = layout.replicas * layout.tensor
        inside = layout.pipeline * stride <= hw.gpus_per_node
        share = hw.network / min(stride, hw.gpus_per_node)
        rate = hw.link if inside else min(hw.link, share)
        return state / (rate * hw.joined) + (hw.link_latency if inside else hw.network_latency)

    def _data(self, count: float) -> float:
        """Seconds of a reduce-scatter over a stage's replicas."""
        layout = self.layout
        return ring_seconds(count, layout.replicas, self.hardware, layout.tensor)


def factor_work(short: int, long: int, rank: int) -> Work:
    """P, Q, the approximation, and two rounds of CholeskyQR, of one shard."""
    return (
        Kernels(rows=short, columns=rank, inner=long),
        Kernels(rows=long, columns=rank, inner=short),
        Kernels(rows=short, columns=long, inner=rank),
        Kernels(rows=short, columns=rank, inner=rank, half=False, times=2),
        Kernels(rows=rank, columns=rank, inner=short, half=False, times=2),
        Kernels(moved=float(FACTORED * short * long)),
    )


@lru_cache(maxsize=4096)
def _layer_seconds(
    model: PriorConfig, step: Step, kind: str, eager: bool, hw: Hardware
) -> tuple[float, float]:
    if kind == "embedding":
        rows = step.micro * model.length / step.tensor
        moved = Kernels(moved=16.0 * rows * model.dim)
        return seconds((moved,), hw), 2 * seconds((moved,), hw)
    if kind == "head":
        forward, backward = _head(model, step, hw)
        return seconds(forward, hw), seconds(backward, hw)
    met = model.length**2 if eager else pairs(model, cast(Kind, kind), True)
    passes = decoder.layer(step, hw, met)
    there, back = tensor_seconds(step, hw)
    both = seconds(passes.again, hw) + seconds(passes.backward, hw)
    return seconds(passes.forward, hw) + there, both + back


def _head(model: PriorConfig, step: Step, hardware: Hardware) -> tuple[Work, Work]:
    """Logits in fp32, text and image apart, and their loss."""
    forward, logits = [], 0.0
    for length, entries in (
        (model.text_length, model.text_vocabulary),
        (model.image_length, model.image_vocabulary),
    ):
        rows, columns = step.micro * length, entries // step.tensor
        forward.append(Kernels(rows=rows, columns=columns, inner=model.dim, half=False))
        logits += rows * columns
    half = hardware.bf16  # gradients of logits are 16 bits
    back = [replace(k, half=half) for k in decoder.gradients(tuple(forward))]
    moved = Kernels(moved=16.0 * logits)
    return (*forward, moved), (*back, Kernels(moved=32.0 * logits))


def _numel(part: RankLayer) -> int:
    return sum(h.numel for h in part.parameters.values())
