"""Bytes of one rank by category, as the engines allocate them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from models.config import PriorConfig
from models.prior import BRANCHES
from parallel.mesh import RankCoordinates
from parallel.pipelines.balance import stage_layers
from planning.estimate.fsdp.flight import Kept, most_kept
from planning.estimate.fsdp.layout import (
    FLOAT,
    HALF,
    real_elements,
    shard_elements,
    units_of,
    uses_fsdp,
)
from planning.estimate.layers import (
    Held,
    Keeps,
    Marks,
    RankLayer,
    Run,
    Training,
    keeps_of,
    named,
    rank_layers,
    training_of,
)
from planning.estimate.zero_layout import (
    LIVE,
    PERSISTENT,
    bucket_of,
    factored,
    groups_of,
    padded,
    shard_numel,
    stage_of_zero,
    touched,
)
from training.config import PriorTrain

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "compression",
    "buckets",
    "temporary",
)
Bytes = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Layers and parameters of one rank, and the settings it runs them with."""

    settings: PriorTrain
    at: RankCoordinates
    chunks: tuple[tuple[RankLayer, ...], ...]
    """Its layers: consecutive ones together, several times with virtual stages."""
    held: Mapping[str, Held]
    emulates: bool = False
    """fp16 is emulated, as on CPUs: 16-bit values are gathered and sent in fp32."""

    @property
    def layers(self) -> tuple[RankLayer, ...]:
        """Those of all chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)

    @property
    def micro(self) -> int:
        """Samples of a micro-batch."""
        settings = self.settings
        return (
            settings.loop.global_batch_size
            // settings.mesh.data
            // settings.engine.gradient_accumulation_steps
        )


def loads_of(settings: PriorTrain, at: RankCoordinates, emulates: bool = False) -> Loads:
    """The layers and parameters of the rank at some coordinates.

    `emulates`: fp16 is emulated, as on CPUs.
    """
    mesh, count = settings.mesh, settings.mesh.pipeline * settings.engine.virtual_stages
    mine = tuple(range(at.stage, count, mesh.pipeline))
    training = training_of(settings)
    chunks, held = _held(settings.model, mesh.tensor, count, at.shard, mine, training)
    return Loads(settings=settings, at=at, chunks=chunks, held=held, emulates=emulates)


@lru_cache(maxsize=512)
def _held(
    config: PriorConfig,
    tensor: int,
    count: int,
    shard: int,
    mine: tuple[int, ...],
    training: Training,
) -> tuple[tuple[tuple[RankLayer, ...], ...], dict[str, Held]]:
    """The layers of some chunks of `count`."""
    whole = rank_layers(config, shard, tensor, training)
    chunks = tuple(tuple(stage_layers(whole, i, count)) for i in mine)
    return chunks, named([layer for chunk in chunks for layer in chunk])


def rank_bytes(loads: Loads) -> Bytes:
    """Peak bytes of every category in a step."""
    settings = loads.settings
    run, engine = run_of(settings), settings.engine
    plain = {
        part.name: keeps_of(settings.model, settings.mesh.tensor, run, marks)
        for part, marks in marks_of(loads)
    }
    keeps = plain
    if engine.recompute and engine.selective:
        keeps = {
            part.name: keeps_of(
                settings.model, settings.mesh.tensor, replace(run, selective=True), marks
            )
            for part, marks in marks_of(loads)
        }
    sizes = model_bytes(loads)
    sizes["activations"] = activation_bytes(loads, keeps)
    sizes["temporary"] += sum(part.buffers for part in loads.layers) + _transient(loads, keeps)
    sizes["temporary"] += _rebuilt_bytes(loads, plain, keeps)
    sizes |= _compression_bytes(loads)
    return {name: sizes[name] for name in CATEGORIES}


def run_of(settings: PriorTrain) -> Run:
    """How its tensor ranks run a layer, without recomputing."""
    return Run(
        precision=settings.engine.precision,
        sequence=settings.mesh.sequence_parallel,
        cast=uses_fsdp(settings),
    )


def _rebuilt_bytes(loads: Loads, plain: Mapping[str, Keeps], keeps: Mapping[str, Keeps]) -> int:
    """Bytes that selective recompute holds of one branch while its backward pass runs."""
    saved = [
        [plain[name][branch][i] - keeps[name][branch][i] for i in range(2)]
        for name in keeps
        if name.startswith("block")
        for branch in BRANCHES
    ]
    return max((each * loads.micro + once for each, once in saved), default=0)


def marks_of(loads: Loads) -> Iterator[tuple[RankLayer, Marks]]:
    """Each layer of a rank, with what has no gradients in it.

    A later stage's inputs have gradients, which it sends back.
    """
    lora = loads.settings.lora
    for i, chunk in enumerate(loads.chunks):
        none_before = loads.at.stage == 0 and i == 0
        for part in chunk:
            alone = none_before and part.name != "embedding"  # whose input is numbers
            yield part, Marks(lora=lora, frozen=part.frozen, input_too=alone)
            none_before = none_before and len(part.frozen) == len(part.parameters)


def model_bytes(loads: Loads) -> Bytes:
    """Weights, gradients, masters and moments, buckets and their copies."""
    settings, held = loads.settings, loads.held
    mesh, stage = settings.mesh, stage_of_zero(settings)
    moment = 2 if settings.optim.moments == "bf16" else 4
    total = sum(h.numel for h in held.values() if h.trained)
    frozen = sum(h.numel for h in held.values() if not h.trained)
    if stage == 0:
        flat = mesh.data > 1 and not settings.compress.on
        return {
            "parameters": 4 * (total + frozen),
            "gradients": 4 * total,
            "optimizer": 2 * moment * total,
            "buckets": 0,
            "temporary": 4 * total if flat else 0,
        }
    if uses_fsdp(settings):
        return _fsdp(loads, moment)
    if stage == 3:
        return _third_stage(loads, total + frozen, moment)
    groups = groups_of(held)
    whole = sum(padded(group, mesh.data) for group in groups)
    mine = whole // mesh.data
    partial = sum(touched(group, mesh.data, loads.at.replica) for group in groups)
    bucket = max(total if settings.compress.on else 0, bucket_of(settings))
    again = settings.engine.gradient_accumulation_steps > 1  # beside the accumulated ones
    copied = partial if stage == 1 or again else 0
    return {
        "parameters": 4 * (whole + frozen),
        "gradients": 4 * (total if stage == 1 else partial),
        "optimizer": (4 + 2 * moment) * mine,
        "buckets": 4 * bucket,
        "temporary": 4 * (mine + copied),
    }


def _third_stage(loads: Loads, total: int, moment: int) -> Bytes:
    shards = loads.settings.mesh.local
    trained = sum(shard_numel(h, shards) for h in loads.held.values() if h.trained)
    mine = sum(shard_numel(h, shards) for h in loads.held.values())
    kept = sum(shards * shard_numel(h, shards) for h in loads.held.values() if h.numel < PERSISTENT)
    largest = max(
        sum(h.numel for h in part.parameters.values() if h.numel >= PERSISTENT)
        for part in loads.layers
    )
    gathered = min(total - kept, LIVE + largest)
    plain = loads.settings.mesh.nodes > 1 and not loads.settings.compress.on
    flat = 4 * trained if plain else 0  # one flat gradient between nodes
    return {
        "parameters": 4 * (mine + kept),  # the shards are the masters as well
        "gradients": 4 * trained,
        "optimizer": 2 * moment * trained,
        "buckets": 4 * bucket_of(loads.settings),
        "temporary": 4 * gathered + flat,
    }


def _fsdp(loads: Loads, moment: int) -> Bytes:
    """Engine torch: two units gathered at a time, one's gradient on its way to the shards."""
    mesh, held = loads.settings.mesh, loads.held.values()
    units = units_of(loads.settings, loads.layers, loads.emulates)
    trained = sum(shard_elements(h, mesh.local) for h in held if h.trained)
    rank = loads.at.replica % mesh.local
    own = sum(real_elements(h, mesh.local, rank) for h in held if h.trained)
    gathered = [unit.width * unit.padded(mesh.local) for unit in units]
    sums = 0
    if mesh.pipeline > 1:  # all micro-batches' gradients add up on whole weights, all gathered
        sums = sum(gathered) + FLOAT * sum(u.padded(mesh.local, trained=True) for u in units)
    return {
        "parameters": FLOAT * sum(shard_elements(h, mesh.local) for h in held),
        "gradients": FLOAT * trained,
        "optimizer": 2 * moment * own,
        "buckets": FLOAT * max((u.padded(mesh.local, trained=True) for u in units), default=0),
        # of two units the weights, a message, and one's gradient
        "temporary": sums or 4 * max(gathered, default=0),
    }


def activation_bytes(loads: Loads, keeps: Mapping[str, Keeps]) -> int:
    """Peak bytes that autograd saves; with full recompute, two inputs per block and one branch.

    `keeps`: by layer.
    """
    settings, micro, stage = loads.settings, loads.micro, loads.at.stage
    config, engine = settings.model, settings.engine
    state = 4 * micro * config.length * config.dim
    state //= settings.mesh.tensor if settings.mesh.sequence_parallel else 1
    whole = engine.recompute and not engine.selective

    def kept(layer: str, name: str) -> int:
        each, once = keeps[layer][name]
        return each * micro + once

    def of(layers: Sequence[RankLayer]) -> Kept:
        names = [part.name for part in layers]
        blocks = [name for name in names if name.startswith("block")]
        ends = sum(kept(name, name) for name in names if name not in blocks)
        inside = 2 * len(blocks) * state if whole else sum(kept(n, "block") for n in blocks)
        return Kept(layers=inside + ends, loss=kept("head", "loss") if "head" in names else 0)

    branches = [
        kept(part.name, branch)
        for part in loads.layers
        if whole and part.name.startswith("block")
        for branch in BRANCHES
    ]
    again = max(branches) - state if branches else 0
    times, chunks = engine.gradient_accumulation_steps, [of(chunk) for chunk in loads.chunks]
    if settings.mesh.pipeline == 1:
        return chunks[0].layers + chunks[0].loss + again
    return most_kept(engine.schedule, stage, settings.mesh.pipeline, times, chunks) + again


def _transient(loads: Loads, keeps: Mapping[str, Keeps]) -> int:
    """Bytes of hidden states and their gradients in flight between layers, stages and ranks."""
    settings, micro = loads.settings, loads.micro
    config, mesh = settings.model, settings.mesh
    whole = 4 * micro * config.length * config.dim
    state = whole // (mesh.tensor if mesh.sequence_parallel else 1)
    wide = config.hidden * micro * config.length // mesh.tensor
    inner = 2 if config.mlp == "gelu" else 3
    branch = 3 * state + inner * 4 * wide  # gradients of a branch's input, output, hidden states
    branch += whole if mesh.sequence_parallel else 0  # gathered, and summed apart
    logits = 0
    if any(part.name == "head" for part in loads.layers):
        logits = 2 * keeps["head"]["loss"][0] * micro
    between = _between_stages(loads, whole) if mesh.pipeline > 1 else 0
    return max(branch, logits) + between + _waiting_halves(loads, logits // 2)


def _waiting_halves(loads: Loads, logits: int) -> int:
    """Bytes of gradients of linears' outputs that a zero bubble keeps for the weights' half."""
    settings, config = loads.settings, loads.settings.model
    if settings.engine.schedule != "zero-bubble":
        return 0
    inner = config.hidden * (1 if config.mlp == "gelu" else 2)
    each = (FLOAT if settings.engine.precision == "fp32" else HALF) * (5 * config.dim + inner)
    rows = loads.micro * config.length // settings.mesh.tensor
    chunks = [sum(part.name.startswith("block") for part in chunk) for chunk in loads.chunks]
    return (loads.at.stage + 1) * (max(chunks) * rows * each + logits)


def _between_stages(loads: Loads, state: int) -> int:
    """Bytes of states that stages exchange; `state`: of one micro-batch, on all tensor ranks."""
    mesh, engine = loads.settings.mesh, loads.settings.engine
    times = engine.gradient_accumulation_steps
    if not uses_fsdp(loads.settings):
        return (2 + min(mesh.pipeline - loads.at.stage, times)) * state // mesh.tensor
    # torch has a buffer for each micro-batch's input and gradient; inputs are saved, too
    ends = (loads.at.stage == 0) + (loads.at.stage == mesh.pipeline - 1)
    received = times * (2 * len(loads.chunks) - ends)
    return (2 + received) * (state // mesh.tensor if mesh.sequence_parallel else state)


def _compression_bytes(loads: Loads) -> Bytes:
    shards = list(factored(loads.settings, loads.held, loads.at))
    if not shards:
        return {"compression": 0}
    errors = sum(s.rows * s.columns for s in shards)
    long_sides = sum(s.rank * max(s.rows, s.columns) for s in shards)
    factors = sum(s.sent for s in shards)
    means = errors  # gradients are handed out whole before the optimiser runs
    if uses_fsdp(loads.settings):  # in place; two buckets' gradients with their errors
        units = units_of(loads.settings, loads.layers, loads.emulates)
        means = 2 * max(unit.padded(loads.settings.mesh.local) for unit in units)
        means //= loads.settings.mesh.local
    return {"compression": 4 * (errors + long_sides + 2 * factors + means)}


def published_schemes(parameters: int, shards: int) -> dict[str, int]:
    """Bytes per rank of published layouts that shard the parameters over a node.

    mixed_fp32_adam: 16-bit weights and gradients, fp32 masters and moments (ZeRO's 16 bytes).
    paper_16_bit: 16-bit weights and moments, gradients in the 16-bit error buffer (8 bytes;
    arXiv 2102.12092, appendix D and E).
    """
    return {
        "mixed_fp32_adam": 16 * parameters // shards,
        "paper_16_bit": 8 * parameters // shards,
    }
