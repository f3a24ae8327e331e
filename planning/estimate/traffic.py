"""Predict calls and bytes of all collectives of one step, by group and operation, as the ledger.

A closed form of the engines' traffic in any step but the first, which also sends shapes and, under
ZeRO-3, gathers once more. Bytes are those of the larger side of an operation.
"""

from collections.abc import Mapping

from models.config import PriorConfig
from models.prior import BRANCHES, LOSSES, TABLES
from parallel.control import FIELDS
from parallel.ledger import Counts
from planning.estimate.fsdp.layout import uses_fsdp
from planning.estimate.memory import Loads
from planning.estimate.tallies.fsdp import add_fsdp
from planning.estimate.tallies.tally import DOUBLE, FLOAT, Tally
from planning.estimate.tallies.tensor import add_layers, stream_elements
from planning.estimate.zero_layout import (
    LIVE,
    PERSISTENT,
    bucket_of,
    factored,
    factored_names,
    groups_of,
    padded,
    shard_numel,
    stage_of_zero,
)


def step_traffic(loads: Loads) -> Counts:
    """Calls and bytes of one training step on this rank."""
    settings = loads.settings
    tally = Tally(settings.mesh, loads.at)
    if settings.mesh.world == 1:
        return tally.counts
    add_layers(loads, tally)
    if settings.mesh.pipeline > 1:
        _stages(loads, tally)
    _gradients(loads, tally)
    _results(loads, tally)
    return tally.counts


def _stages(loads: Loads, tally: Tally) -> None:
    """Hidden states forward and gradients back; tensor ranks send a part each and gather it."""
    settings, config, at = loads.settings, loads.settings.model, loads.at
    mesh, times = settings.mesh, settings.engine.gradient_accumulation_steps
    numel = loads.micro * config.length * config.dim
    if uses_fsdp(settings):
        count = mesh.pipeline * settings.engine.virtual_stages
        chunks = range(at.stage, count, mesh.pipeline)
        calls = times * sum((i > 0) + (i < count - 1) for i in chunks)
        numel //= mesh.tensor if mesh.sequence_parallel else 1
        for operation in ("isend", "irecv"):
            tally.add("pipeline", operation, FLOAT * numel * calls, calls)
        return
    first, last = at.stage == 0, at.stage == mesh.pipeline - 1
    neighbours = (not first) + (not last)
    part, calls = numel, 1
    if mesh.sequence_parallel:
        part_bytes = FLOAT * numel // mesh.tensor
    elif mesh.tensor > 1:
        part, calls = numel // mesh.tensor + (at.shard < numel % mesh.tensor), 2
        meta = DOUBLE * (6 + mesh.tensor + 1)  # dims, shape, parts, mine, the parts' bounds
        part_bytes = FLOAT * part + meta
        gathers = (not first) + 2 * (not last)  # inputs; outputs and their gradients
        if numel % mesh.tensor:
            tally.add("tensor", "broadcast", FLOAT * numel * gathers * times)
            tally.counts["tensor"]["broadcast"]["calls"] += mesh.tensor * gathers * times - 1
        else:
            count = FLOAT * numel * gathers * times
            tally.add("tensor", "all_gather_into_tensor", count, gathers * times)
    else:
        part_bytes = FLOAT * part
    for operation in ("send", "recv"):
        count = neighbours * part_bytes * times
        tally.add("pipeline", operation, count, neighbours * calls * times)


def _gradients(loads: Loads, tally: Tally) -> None:
    """Gradients reduced over the replicas, and weights gathered where ZeRO shards them."""
    settings, held = loads.settings, loads.held
    stage = stage_of_zero(settings)
    times = settings.engine.gradient_accumulation_steps
    if stream := stream_elements(loads):
        tally.add("tensor", "all_reduce", FLOAT * stream)
    if uses_fsdp(settings):
        add_fsdp(loads, tally)
        return
    if stage == 3:
        _third_stage(loads, tally)
        return
    if tied := tied_elements(loads):
        for name in (name for name in ("data", "ends") if tally.size(name) > 1):
            tally.add(name, "all_reduce", FLOAT * sum(tied), len(tied))
    if settings.compress.on:
        rounds = times if stage == 2 else 1
        _factors(loads, tally, "data", {n: h.numel for n, h in held.items() if h.trained}, rounds)
    elif stage == 0:
        total = sum(h.numel for h in held.values() if h.trained)
        if settings.mesh.data > 1:
            tally.add("data", "all_reduce", FLOAT * total)
    else:
        groups = groups_of(held)
        order = [h.numel for group in groups for h in group]
        if stage == 2:
            order = [h.numel for h in held.values() if h.trained]
        rounds = times if stage == 2 else 1
        calls = _buckets(order, bucket_of(settings)) * rounds
        tally.add("data", "all_reduce", FLOAT * sum(order) * rounds, calls)
    if stage and settings.mesh.data > 1:
        for group in groups_of(held):
            count = FLOAT * padded(group, settings.mesh.data)
            tally.add("data", "all_gather_into_tensor", count)


def tied_elements(loads: Loads) -> list[int]:
    """Sizes of the gradients that the replicas and both ends add up before the average."""
    model = loads.settings.model
    if not isinstance(model, PriorConfig) or not model.tied or loads.settings.mesh.pipeline == 1:
        return []
    held = loads.held
    return [held[name].numel for name in TABLES if name in held and held[name].trained]


def _buckets(sizes: list[int], most: int) -> int:
    """Number of gradient buckets in this order; a gradient larger than a bucket has its own."""
    calls, filled = 0, 0
    for size in sizes:
        if filled and filled + size > most:
            calls, filled = calls + 1, 0
        filled += size
    return calls + (filled > 0)


def _prefetches(sizes: list[int], most: int) -> int:
    """Number of prefetching gathers: each takes parameters until a bucket is full."""
    calls, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= most:
            calls, filled = calls + 1, 0
    return calls + (filled > 0)


def _factors(loads: Loads, tally: Tally, group: str, sizes: Mapping[str, int], rounds: int) -> None:
    """P, Q, and everything that is not factored, with the flag for non-finite values."""
    settings = loads.settings
    shards = list(factored(settings, loads.held, loads.at))
    each = settings.compress.payload_bytes
    for side in (min, max):
        count = sum(s.rank * side(s.rows, s.columns) for s in shards)
        if shards:
            tally.add(group, "all_reduce", each * count * rounds, rounds)
    names = factored_names(settings, loads.held, loads.at)
    rest = sum(size for name, size in sizes.items() if name not in names)
    tally.add(group, "all_reduce", FLOAT * (rest + 1) * rounds, rounds)


def _third_stage(loads: Loads, tally: Tally) -> None:
    """ZeRO-3: weights are gathered before use and after the step, gradients scattered."""
    settings, held = loads.settings, loads.held
    mesh, times = settings.mesh, settings.engine.gradient_accumulation_steps
    shards = mesh.local
    whole = {name: shards * shard_numel(h, shards) for name, h in held.items()}
    small = [name for name, h in held.items() if h.numel < PERSISTENT]
    tally.add("machine", "all_gather_into_tensor", FLOAT * sum(whole[n] for n in small), len(small))
    uses = [h for part in loads.layers for h in part.parameters.values() if h.numel >= PERSISTENT]
    large = [h.numel for h in uses if not h.placement.tied_to]
    passes = 2 if sum(large) > LIVE else 1  # a small model stays gathered for backward
    if passes == 2:
        large = [h.numel for h in uses]
    if large:
        count = FLOAT * sum(shards * -(-numel // shards) for numel in large)
        calls = _prefetches(large, bucket_of(settings))
        tally.add(
            "machine", "all_gather_into_tensor", count * passes * times, calls * passes * times
        )
    order = [h.numel for h in reversed(list(held.values())) if h.trained]
    trained = [name for name, h in held.items() if h.trained]
    count = FLOAT * sum(whole[name] for name in trained) * times
    calls = _buckets(order, bucket_of(settings)) * times
    tally.add("machine", "reduce_scatter_tensor", count, calls)
    if mesh.nodes == 1:
        return
    mine = {name: shard_numel(held[name], shards) for name in trained}
    if settings.compress.on:
        _factors(loads, tally, "between", mine, 1)
    else:
        tally.add("between", "all_reduce", FLOAT * sum(mine.values()))


def _results(loads: Loads, tally: Tally) -> None:
    """Mean losses, broadcast to all stages, and the all-reduce by which all ranks decide."""
    settings, at = loads.settings, loads.at
    mesh = settings.mesh
    last = at.stage == mesh.pipeline - 1
    if last and mesh.data > 1:
        tally.add("data", "all_reduce", FLOAT * len(LOSSES))
        if settings.engine.name == "deepspeed_pipe":  # DeepSpeed's own mean
            tally.add("data", "all_reduce", FLOAT)
    if mesh.pipeline > 1:
        own = () if uses_fsdp(settings) else (2 * FLOAT,)  # DeepSpeed's mean loss
        counts = (*own, FLOAT * len(LOSSES))
        tally.add("pipeline", "broadcast", sum(counts), len(counts))
    half = settings.engine.precision == "fp16"
    branches = len(BRANCHES) * settings.model.layers if half else 0
    tally.add("world", "all_reduce", DOUBLE * (1 + FIELDS + branches))
