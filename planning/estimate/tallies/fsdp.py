"""Predict what the ranks of engine `torch` send each other for weights and gradients in a step."""

from collections.abc import Mapping

from models.prior import TABLES
from planning.estimate.fsdp.layout import real_elements, shard_elements, units_of, vectors_of
from planning.estimate.layers import Held
from planning.estimate.memory import Loads
from planning.estimate.tallies.tally import FLOAT, Tally
from planning.estimate.zero_layout import factored, factored_names


def add_fsdp(loads: Loads, tally: Tally) -> None:
    """Engine torch: units gathered forward and backward, their gradients scattered and reduced."""
    settings, mesh = loads.settings, loads.settings.mesh
    times, shards = settings.engine.gradient_accumulation_steps, mesh.local
    once = mesh.pipeline > 1  # gathered for all micro-batches, and scattered after them
    times = 1 if once else times
    names = factored_names(settings, loads.held, loads.at)
    for unit in units_of(settings, loads.layers, loads.emulates):
        if shards > 1:
            passes = times * (2 if unit.goes_back and not once else 1)
            count = unit.width * unit.padded(shards) * passes
            tally.add("machine", "all_gather_into_tensor", count, passes)
        trained = {name: h for name, h in unit.matrices.items() if h.trained}
        if trained and shards > 1:
            count = unit.reduced * unit.padded(shards, trained=True) * times
            tally.add("machine", "reduce_scatter_tensor", count, times)
        if mesh.pipeline > 1:
            _ends(loads, tally, trained)
        if trained and mesh.nodes > 1:
            _between(loads, tally, trained, names, unit.reduced)
    if mesh.data > 1 and vectors_of(loads.held):
        tally.add("data", "all_reduce", FLOAT * vectors_of(loads.held))


def _ends(loads: Loads, tally: Tally, trained: Mapping[str, Held]) -> None:
    """Shards of tied weights, which the first and the last stage add up."""
    model, mesh = loads.settings.model, loads.settings.mesh
    for name in TABLES if model.tied else ():
        if name in trained:
            count = real_elements(trained[name], mesh.local, loads.at.replica % mesh.local)
            tally.add("ends", "all_reduce", FLOAT * count)


def _between(
    loads: Loads, tally: Tally, trained: Mapping[str, Held], names: set[str], width: int
) -> None:
    """A unit's reduction between machines: P and Q, and what is not factored.

    `width`: bytes of an element, if nothing is.
    """
    settings = loads.settings
    shards = list(factored(settings, trained, loads.at))
    for side in (min, max) if shards else ():
        count = sum(s.rank * side(s.rows, s.columns) for s in shards)
        tally.add("between", "all_reduce", settings.compress.payload_bytes * count)
    rank, local = loads.at.replica % settings.mesh.local, settings.mesh.local
    plain = {name: h for name, h in trained.items() if name not in names}
    if len(plain) == len(trained):
        count = sum(shard_elements(h, local) for h in plain.values())
        tally.add("between", "all_reduce", width * count)
        return
    for count in (real_elements(h, local, rank) for h in plain.values()):
        if count:
            tally.add("between", "all_reduce", FLOAT * count)
