"""The fastest mesh that fits, and why the others do not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from core.memory import size_text
from parallel.compress.advisor import PAPER_SHARE
from parallel.config import LEAST_GAIN, CompressConfig, EngineConfig, MeshConfig
from parallel.engines.frozen import stage_problem
from parallel.mesh import RankCoordinates
from planning.decode import buffer_bytes
from planning.estimate.collectives import group_span, ring
from planning.estimate.hardware import Hardware
from planning.estimate.layers import rank_layers, training_of
from planning.estimate.memory import Bytes, Loads, loads_of, published_schemes, rank_bytes
from planning.estimate.reserve import StartUp, nccl_bytes, start_up
from planning.estimate.step_time import Estimate, estimate, rough_seconds
from planning.estimate.zero_layout import stage_of_zero
from training.config import PriorTrain

MOST_TENSOR = 8
"""Maximum tensor-parallel ranks: beyond a node, links are too slow to share each matmul."""
SHORTLIST = 3
"""Candidates of a layout whose pipeline is simulated, after a rough estimate of all."""
MOST_MICRO = 4096
"""Maximum micro-batches per step that are simulated."""
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute": False},
    {"recompute": True, "recompute_granularity": "selective"},
    {"recompute": True, "recompute_granularity": "full"},
)
"""What a candidate recomputes."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of a run, with the memory they take."""

    settings: PriorTrain
    bytes_: Bytes
    """Bytes of the fullest rank."""
    start: StartUp | None = None
    """Peaks before the first step; None for impossible settings, and on CPUs, where ranks use the
    host's memory and a step takes more of it."""
    why: str = ""
    """Why it cannot run; empty if it fits."""

    @property
    def total(self) -> int:
        return sum(self.bytes_.values())


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A candidate that fits, with its time."""

    candidate: Candidate
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Candidates of a search, one per layout."""

    timed: list[Timed]
    """The fastest candidate of each layout that fits, fastest first."""
    rejected: list[Candidate]
    """The candidate that needs least memory of each layout that does not fit."""


def layout_name(settings: PriorTrain) -> str:
    """Usual name of a layout."""
    mesh, engine = settings.mesh, settings.engine
    if mesh.nodes > 1:
        return f"paper: ZeRO-3 in {mesh.nodes} nodes of {mesh.local}"
    if engine.name == "reference":
        return "plain data parallelism"
    if engine.name == "deepspeed_pipe":
        return "TP x PP x DP, ZeRO-1"
    joined = "TP x DP" if mesh.tensor > 1 else "DP"
    return f"{joined}, ZeRO-{stage_of_zero(settings)}"


def search(settings: PriorTrain, world: int, hardware: Hardware) -> SearchResult:
    """Estimate all layouts of the preset on `world` ranks."""
    timed, rejected = [], []
    for layout in layouts(settings, world, hardware):
        candidates = _weighed(layout, world, hardware)
        fitting = [candidate for candidate in candidates if not candidate.why]
        if not fitting:
            rejected.append(
                min(candidates, key=lambda candidate: (candidate.total == 0, candidate.total))
            )
            continue
        fitting.sort(key=lambda candidate: rough_seconds(candidate.settings, hardware))
        best = fitting[:SHORTLIST]
        rows = [Timed(candidate=w, estimate=estimate(w.settings, hardware)) for w in best]
        timed.append(min(rows, key=lambda row: row.estimate.seconds))
    timed.sort(key=lambda row: row.estimate.seconds)
    rejected.sort(key=lambda candidate: candidate.total)
    return SearchResult(timed=timed, rejected=rejected)


def _weighed(layout: PriorTrain, world: int, hardware: Hardware) -> list[Candidate]:
    """The variants of a layout, without those that recompute more than has to be."""
    candidates, fitting = [], set()
    for settings in variants_of(layout):
        alike = settings.engine.gradient_accumulation_steps, settings.compress
        if alike not in fitting:
            candidates.append(weigh(settings, world, hardware))
            fitting |= set() if candidates[-1].why else {alike}
    return candidates


def layouts(settings: PriorTrain, world: int, hardware: Hardware) -> Iterator[PriorTrain]:
    """Every mesh and engine for `world` ranks."""
    fast = precision_of(settings, hardware)
    most = min(MOST_TENSOR, hardware.gpus_per_node, settings.model.heads)
    tensors = [t for t in (1, 2, 4, 8) if world % t == 0 and t <= most]

    def layout(mesh: MeshConfig, name: str, stage: int = 1) -> PriorTrain:
        if mesh.tensor > 1 and settings.model.length % mesh.tensor == 0:
            mesh = replace(mesh, sequence_parallel=True)  # less memory at equal traffic
        engine = EngineConfig(
            name=name,  # type: ignore[arg-type]
            zero_stage=stage,
            precision=fast,  # type: ignore[arg-type]
            reduce_bucket_size=0 if name == "reference" else link_bucket(mesh, stage, hardware),
        )
        return replace(settings, mesh=mesh, engine=engine, compress=_off(settings))

    yield layout(MeshConfig(data=world), "reference")
    if world == 1:
        return
    for stage in (1, 2, 3):
        for t in tensors:
            yield layout(MeshConfig(data=world // t, tensor=t), "deepspeed_zero", stage)
    if world > hardware.gpus_per_node > 1 and world % hardware.gpus_per_node == 0:
        mesh = MeshConfig(data=world, nodes=world // hardware.gpus_per_node)
        yield layout(mesh, "deepspeed_zero", 3)
    for p in range(2, min(settings.model.layers, world) + 1):
        for t in tensors:
            if world % (t * p) == 0:
                mesh = MeshConfig(data=world // (t * p), tensor=t, pipeline=p)
                yield layout(mesh, "deepspeed_pipe")


def _off(settings: PriorTrain) -> CompressConfig:
    """No compression; variants have the preset's payload."""
    return CompressConfig(payload=settings.compress.payload)


def link_bucket(mesh: MeshConfig, stage: int, hardware: Hardware) -> int:
    """Elements of a gradient bucket, a power of two, whose latency is 5% of its time on the link.

    0 on CPUs, which keep their default.
    """
    size, stride = group_span(mesh, "machine" if stage == 3 else "data")
    if hardware.cores or size == 1:
        return 0
    rate, latency = ring(size, stride, hardware)
    elements = 20 * rate * latency * math.ceil(math.log2(size)) / 4
    return int(2 ** min(max(round(math.log2(elements)), 20), 26))


def precision_of(settings: PriorTrain, hardware: Hardware) -> str:
    """Precision of a run on this hardware: `auto` is resolved as in training, fp16 without bf16."""
    asked = settings.engine.precision
    gains = hardware.half_flops >= LEAST_GAIN * hardware.full_flops
    if asked == "fp32" or (asked == "auto" and not gains):
        return "fp32"
    return "bf16" if hardware.bf16 else "fp16"


def variants_of(layout: PriorTrain) -> Iterator[PriorTrain]:
    """Every micro-batch size, recompute and compression of a layout."""
    samples = max(layout.loop.global_batch_size // layout.mesh.data, 1)
    papers = replace(layout.compress, rank=round(PAPER_SHARE * layout.model.dim))
    powers = (2**i for i in range(samples.bit_length()))
    for micro in (n for n in powers if samples % n == 0):
        for recompute in RECOMPUTE:
            engine = replace(
                layout.engine, gradient_accumulation_steps=samples // micro, **recompute
            )
            yield replace(layout, engine=engine)
            if _sends_gradients(layout):
                yield replace(layout, engine=engine, compress=papers)


def _sends_gradients(layout: PriorTrain) -> bool:
    """True if compression could save traffic."""
    third = stage_of_zero(layout) == 3
    if layout.lora.rank:
        return False  # adapters are sent whole
    return layout.mesh.nodes > 1 if third else layout.mesh.data > 1


def weigh(settings: PriorTrain, world: int, hardware: Hardware) -> Candidate:
    """Compute the bytes of the fullest rank, and why the settings cannot run, if so."""
    problems = _problems(settings, world)
    if problems:
        return Candidate(settings=settings, bytes_={}, why="; ".join(problems))
    bytes_ = fullest(settings) | nccl_bytes(settings, hardware)
    if hardware.cores:  # ranks hold their batches in the same memory
        bytes_["temporary"] += buffer_bytes(settings)
    total = sum(bytes_.values())
    start = None if hardware.cores else hungriest(settings, hardware)
    share = hardware.cores and settings.mesh.world  # ranks of one machine share its memory
    most = hardware.usable / share if share else hardware.usable
    why = start.problem(hardware) if start else ""
    if total > most:
        most_of_it = max(bytes_, key=lambda name: bytes_[name])
        why = (
            f"needs {size_text(total)} a rank, {size_text(most)} of {hardware.name} can be used; "
            f"{size_text(bytes_[most_of_it])} of it are {most_of_it}"
        )
    return Candidate(settings=settings, bytes_=bytes_, start=start, why=why)


def _problems(settings: PriorTrain, world: int) -> list[str]:
    """Problems of the settings, in terms of the flags of a plan: its ranks and its batch."""
    data, lanes, batch = settings.mesh.data, settings.order.lanes, settings.loop.global_batch_size
    if lanes % data:
        return [
            f"the preset's order.lanes={lanes} and batch of {batch} give {data} replicas no "
            "equal part"
        ]
    micro_batches = settings.engine.gradient_accumulation_steps
    if micro_batches > MOST_MICRO:
        return [
            f"{micro_batches:,} micro-batches a step are more than the {MOST_MICRO:,} that a plan "
            "looks at; give a smaller --batch"
        ]
    problems = settings.problems(world)
    mesh = settings.mesh
    if not problems and (settings.freeze or settings.lora.rank):
        layers = rank_layers(settings.model, 0, 1, training_of(settings))
        trains = [len(part.frozen) < len(part.parameters) for part in layers]
        problem = stage_problem(trains, [part.cost for part in layers], mesh.pipeline)
        problems += [problem] if problem else []
    return problems


def fullest(settings: PriorTrain) -> Bytes:
    """Bytes of the stage that needs most memory."""
    sizes = [rank_bytes(loads) for loads in _stages(settings)]
    return max(sizes, key=lambda bytes_: sum(bytes_.values()))


def hungriest(settings: PriorTrain, hardware: Hardware) -> StartUp:
    """Start-up peaks of the stage that needs most host memory."""
    starts = [start_up(loads, hardware) for loads in _stages(settings)]
    start = max(starts, key=lambda start: (start.host, start.device))
    return replace(start, loader=buffer_bytes(settings))


def _stages(settings: PriorTrain) -> list[Loads]:
    """The first, a middle and the last stage."""
    last = settings.mesh.pipeline - 1
    return [loads_of(settings, RankCoordinates(stage=s)) for s in sorted({0, min(1, last), last})]


def beside(candidate: Candidate, parameters: int) -> dict[str, int]:
    """Bytes of the published schemes for a layout that shards within a node, for comparison."""
    mesh = candidate.settings.mesh
    return published_schemes(parameters, mesh.local) if mesh.nodes > 1 else {}
