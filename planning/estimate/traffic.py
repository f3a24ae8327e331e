"""Predict calls and bytes of all collectives of one step, by group and operation, as the ledger.

A closed form of the engines' traffic in any step but the first, which also sends shapes and, under
ZeRO-3, gathers once more. Bytes are those of the larger side of an operation.
"""

from collections.abc import Iterator, Mapping

from models.config import PriorConfig
from models.prior import BRANCHES, LOSSES, TABLES
from parallel.config import MeshConfig
from parallel.control import FIELDS
from parallel.ledger import Counts
from parallel.mesh import RankCoordinates, rank_at
from planning.estimate.fsdp.layout import (
    real_elements,
    shard_elements,
    units_of,
    uses_fsdp,
    vectors_of,
)
from planning.estimate.layers import Held, Marks, RankLayer
from planning.estimate.memory import Loads, marks_of
from planning.estimate.zero_layout import (
    BUCKET,
    LIVE,
    PERSISTENT,
    factored,
    groups_of,
    padded,
    shard_numel,
    stage_of_zero,
)

FLOAT, DOUBLE = 4, 8


class Tally:
    """Counts under the ledger's labels; of groups with equal ranks, the last one is the label."""

    def __init__(self, mesh: MeshConfig, at: RankCoordinates) -> None:
        self.counts: Counts = {}
        self._labels: dict[tuple[int, ...], str] = {}
        self._ranks = dict(_groups(mesh, at))
        for name, ranks in self._ranks.items():
            self._labels[ranks] = name

    def add(self, group: str, operation: str, count: float, calls: int = 1) -> None:
        """Count `calls` operations of `count` bytes in total."""
        if group not in self._ranks:
            return
        label = self._labels[self._ranks[group]]
        row = self.counts.setdefault(label, {}).setdefault(operation, {"calls": 0, "bytes": 0})
        row["calls"] += calls
        row["bytes"] += int(count)

    def size(self, group: str) -> int:
        """Ranks of a group, 1 if there is none."""
        return len(self._ranks.get(group, (0,)))


def _groups(mesh: MeshConfig, at: RankCoordinates) -> Iterator[tuple[str, tuple[int, ...]]]:
    """This rank's groups of the mesh in the ledger's order, as in parallel/mesh.py."""
    if mesh.world == 1:
        return
    data = tuple(rank_at(mesh, at._replace(replica=d)) for d in range(mesh.data))
    yield "world", tuple(range(mesh.world))
    if mesh.nodes > 1:
        machine = at.replica // mesh.local
        yield "machine", data[machine * mesh.local : (machine + 1) * mesh.local]
        yield "between", data[at.replica % mesh.local :: mesh.local]
    else:
        yield "machine", data
    yield "data", data
    if mesh.data < mesh.world:
        yield "tensor", tuple(rank_at(mesh, at._replace(shard=t)) for t in range(mesh.tensor))
        if mesh.pipeline > 1 and at.stage in (0, mesh.pipeline - 1):
            yield "ends", tuple(rank_at(mesh, at._replace(stage=s)) for s in (0, mesh.pipeline - 1))
        yield "pipeline", tuple(rank_at(mesh, at._replace(stage=s)) for s in range(mesh.pipeline))


def step_traffic(loads: Loads) -> Counts:
    """Calls and bytes of one training step on this rank."""
    settings = loads.settings
    tally = Tally(settings.mesh, loads.at)
    if settings.mesh.world == 1:
        return tally.counts
    _layers(loads, tally)
    if settings.mesh.pipeline > 1:
        _stages(loads, tally)
    _gradients(loads, tally)
    _results(loads, tally)
    return tally.counts


def _layers(loads: Loads, tally: Tally) -> None:
    """The tensor group's all-reduces of hidden states, in fp32, in every micro-batch.

    Recomputing a branch ends at its last saved tensor, before the all-reduce of its output.
    """
    settings, config = loads.settings, loads.settings.model
    if settings.mesh.tensor == 1:
        return
    micro, times = loads.micro, settings.engine.gradient_accumulation_steps
    state = FLOAT * micro * config.length * config.dim
    for part, marks in marks_of(loads):
        if part.name.startswith("block"):  # a sum of each branch forward, and of its gradients
            sums = len(BRANCHES) + branches_with_gradients(part, marks)
            tally.add("tensor", "all_reduce", sums * state * times, sums * times)
            whole = [h.numel for h in part.parameters.values() if _is_whole_adapter(h)]
            tally.add("tensor", "all_reduce", FLOAT * sum(whole) * times, len(whole) * times)
        elif part.name == "embedding":  # all words, and all codes but the last
            positions = config.text_length + config.image_length - 1
            count = FLOAT * micro * positions * config.dim
            tally.add("tensor", "all_reduce", count * times, 2 * times)
        else:  # gradients of the states; largest logit, target's logit and sum of each position
            tally.add("tensor", "all_reduce", state * times, times)
            each = 3 * FLOAT * micro * config.length
            tally.add("tensor", "all_reduce", each * times, 6 * times)


def branches_with_gradients(part: RankLayer, marks: Marks) -> int:
    """Branches of a block whose input has a gradient, which tensor ranks add up."""
    if not marks.input_too:
        return len(BRANCHES)
    trained = part.parameters.keys() - part.frozen
    attention = any(name.startswith("attention_norm") for name in trained)
    before_mlp = any(not name.startswith(_MLP) for name in trained)
    mlp = before_mlp or any(name.startswith("mlp_norm") for name in trained)
    return attention + mlp


_MLP = ("mlp_norm.", "up.", "down.", "gate.")
"""Names of the parameters of the MLP branch begin with one of these."""


def _is_whole_adapter(h: Held) -> bool:
    """True for the matrix of an adapter that tensor ranks hold whole, and add up gradients of."""
    return h.trained and h.matrix and not h.placement.split


def _stages(loads: Loads, tally: Tally) -> None:
    """Hidden states forward and gradients back; tensor ranks send a part each and gather it."""
    settings, config, at = loads.settings, loads.settings.model, loads.at
    mesh, times = settings.mesh, settings.engine.gradient_accumulation_steps
    numel = loads.micro * config.length * config.dim
    if uses_fsdp(settings):
        count = mesh.pipeline * settings.engine.virtual_stages
        chunks = range(at.stage, count, mesh.pipeline)
        calls = times * sum((i > 0) + (i < count - 1) for i in chunks)
        for operation in ("isend", "irecv"):
            tally.add("pipeline", operation, FLOAT * numel * calls, calls)
        return
    first, last = at.stage == 0, at.stage == mesh.pipeline - 1
    neighbours = (not first) + (not last)
    part, calls = numel, 1
    if mesh.tensor > 1:
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
    if uses_fsdp(settings):
        _fsdp(loads, tally)
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
        tally.add("data", "all_reduce", FLOAT * sum(order) * rounds, _buckets(order) * rounds)
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


def _buckets(sizes: list[int]) -> int:
    """Number of gradient buckets in this order; a gradient larger than a bucket has its own."""
    calls, filled = 0, 0
    for size in sizes:
        if filled and filled + size > BUCKET:
            calls, filled = calls + 1, 0
        filled += size
    return calls + (filled > 0)


def _prefetches(sizes: list[int]) -> int:
    """Number of prefetching gathers: each takes parameters until a bucket is full."""
    calls, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= BUCKET:
            calls, filled = calls + 1, 0
    return calls + (filled > 0)


def _factors(loads: Loads, tally: Tally, group: str, sizes: Mapping[str, int], rounds: int) -> None:
    """P, Q, and everything that is not factored, with the flag for non-finite values."""
    settings = loads.settings
    shards = list(factored(settings, loads.held, loads.at))
    for side in (min, max):
        count = sum(s.rank * side(s.rows, s.columns) for s in shards)
        if shards:
            tally.add(group, "all_reduce", FLOAT * count * rounds, rounds)
    names = {name for name, _ in factored_names(loads)}
    rest = sum(size for name, size in sizes.items() if name not in names)
    tally.add(group, "all_reduce", FLOAT * (rest + 1) * rounds, rounds)


def factored_names(loads: Loads) -> Iterator[tuple[str, Held]]:
    """Parameters of which this rank compresses a gradient."""
    for name, h in loads.held.items():
        if list(factored(loads.settings, {name: h}, loads.at)):
            yield name, h


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
        calls = _prefetches(large)
        tally.add(
            "machine", "all_gather_into_tensor", count * passes * times, calls * passes * times
        )
    order = [h.numel for h in reversed(list(held.values())) if h.trained]
    trained = [name for name, h in held.items() if h.trained]
    count = FLOAT * sum(whole[name] for name in trained) * times
    tally.add("machine", "reduce_scatter_tensor", count, _buckets(order) * times)
    if mesh.nodes == 1:
        return
    mine = {name: shard_numel(held[name], shards) for name in trained}
    if settings.compress.on:
        _factors(loads, tally, "between", mine, 1)
    else:
        tally.add("between", "all_reduce", FLOAT * sum(mine.values()))


def _fsdp(loads: Loads, tally: Tally) -> None:
    """Engine torch: units gathered forward and backward, their gradients scattered and reduced."""
    settings, mesh = loads.settings, loads.settings.mesh
    times, shards = settings.engine.gradient_accumulation_steps, mesh.local
    once = mesh.pipeline > 1  # gathered for all micro-batches, and scattered after them
    times = 1 if once else times
    names = {name for name, _ in factored_names(loads)}
    for unit in units_of(settings, loads.layers):
        if shards > 1:
            passes = times * (2 if unit.goes_back and not once else 1)
            count = unit.width * unit.padded(shards) * passes
            tally.add("machine", "all_gather_into_tensor", count, passes)
        trained = {name: h for name, h in unit.matrices.items() if h.trained}
        if trained and shards > 1:
            count = FLOAT * unit.padded(shards, trained=True) * times
            tally.add("machine", "reduce_scatter_tensor", count, times)
        if trained and mesh.nodes > 1:
            _between(loads, tally, trained, names)
    if mesh.data > 1 and vectors_of(loads.held):
        tally.add("data", "all_reduce", FLOAT * vectors_of(loads.held))


def _between(loads: Loads, tally: Tally, trained: Mapping[str, Held], names: set[str]) -> None:
    """A unit's reduction between machines: P and Q, and what is not factored."""
    settings = loads.settings
    shards = list(factored(settings, trained, loads.at))
    for side in (min, max) if shards else ():
        count = sum(s.rank * side(s.rows, s.columns) for s in shards)
        tally.add("between", "all_reduce", FLOAT * count)
    rank, local = loads.at.replica % settings.mesh.local, settings.mesh.local
    plain = {name: h for name, h in trained.items() if name not in names}
    if len(plain) == len(trained):
        count = sum(shard_elements(h, local) for h in plain.values())
        tally.add("between", "all_reduce", FLOAT * count)
        return
    for count in (real_elements(h, local, rank) for h in plain.values()):
        if count:
            tally.add("between", "all_reduce", FLOAT * count)


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
