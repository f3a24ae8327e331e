"""Predict what the ranks of a tensor group send each other in a step."""

from models.adapters import A
from models.prior import BRANCHES
from planning.estimate.fsdp.layout import uses_fsdp
from planning.estimate.layers import Held, Marks, RankLayer
from planning.estimate.memory import Loads, marks_of
from planning.estimate.tallies.tally import FLOAT, Tally
from planning.estimate.zero_layout import groups_of, padded, shard_numel, stage_of_zero


def add_layers(loads: Loads, tally: Tally) -> None:
    """The tensor group's sums and gathers of hidden states in every micro-batch.

    Recomputing a branch ends at its last saved tensor, before the sum of its output.
    """
    settings, config = loads.settings, loads.settings.model
    if settings.mesh.tensor == 1:
        return
    micro, times = loads.micro, settings.engine.gradient_accumulation_steps
    state = FLOAT * micro * config.length * config.dim
    shared = settings.mesh.sequence_parallel
    for part, marks in marks_of(loads):
        if part.name.startswith("block"):
            _block(loads, part, marks, tally)
            whole = [h.numel for h in part.parameters.values() if _is_whole_adapter(h)]
            tally.add("tensor", "all_reduce", FLOAT * sum(whole) * times, len(whole) * times)
        elif part.name == "embedding" and shared:
            tally.add("tensor", "reduce_scatter_tensor", state * times, times)
            if len(part.frozen) < len(part.parameters):
                tally.add("tensor", "all_gather_into_tensor", state * times, times)
        elif part.name == "embedding":  # all words, and all codes but the last
            positions = config.text_length + config.image_length - 1
            count = FLOAT * micro * positions * config.dim
            tally.add("tensor", "all_reduce", count * times, 2 * times)
        else:  # gradients of the states; largest logit, target's logit and sum of each position
            if shared:
                tally.add("tensor", "all_gather_into_tensor", state * times, times)
            back = "reduce_scatter_tensor" if shared else "all_reduce"
            tally.add("tensor", back, state * times, times)
            each = 3 * FLOAT * micro * config.length
            tally.add("tensor", "all_reduce", each * times, 6 * times)


def wire_bytes(loads: Loads) -> int:
    """Bytes of a hidden value that tensor ranks send: the compute type's."""
    precision = loads.settings.engine.precision
    whole = precision == "fp32" or (precision == "fp16" and loads.emulates)
    return FLOAT if whole else 2


def _block(loads: Loads, part: RankLayer, marks: Marks, tally: Tally) -> None:
    """Sums of each branch's output and of the gradient of its input, or the halves of such sums.

    With sequence parallelism a branch gathers its input and scatters the sum of its output; the
    backward pass does the opposite, and gathers the input again to recompute what reads it.
    """
    settings, config = loads.settings, loads.settings.model
    times = settings.engine.gradient_accumulation_steps
    state = wire_bytes(loads) * loads.micro * config.length * config.dim
    inputs, outputs, readers = branches_with_gradients(part, marks)
    if not settings.mesh.sequence_parallel:
        sums = len(BRANCHES) + inputs
        tally.add("tensor", "all_reduce", sums * state * times, sums * times)
        return
    again = 0
    if settings.engine.recompute:
        again = readers if settings.engine.selective else outputs
    gathers, scatters = len(BRANCHES) + outputs + again, len(BRANCHES) + inputs
    tally.add("tensor", "all_gather_into_tensor", gathers * state * times, gathers * times)
    tally.add("tensor", "reduce_scatter_tensor", scatters * state * times, scatters * times)


def branches_with_gradients(part: RankLayer, marks: Marks) -> tuple[int, int, int]:
    """Branches of a block whose input has a gradient; whose output before the bias has one; whose
    first linears need their input for a gradient of their own."""
    trained = part.parameters.keys() - part.frozen
    inputs = outputs = readers = 0
    before = not marks.input_too
    for norm, first, last in _BRANCHES:
        inside = [name for name in trained if name.startswith((norm, *first, last))]
        own = before or any(name.startswith(norm) for name in inside)
        inputs += own
        outputs += own or any(name != f"{last}bias" for name in inside)
        readers += any(
            name.startswith(first) and name.endswith((".weight", A))
            for name in inside
            if "_norm" not in name
        )
        before = before or bool(inside)
    return inputs, outputs, readers


_BRANCHES = (
    ("attention_norm.", ("q.", "k.", "v.", "q_norm.", "k_norm."), "out."),
    ("mlp_norm.", ("up.", "gate."), "down."),
)
"""Of each branch: how the names of its norm, its first linears and its last one begin."""


def _is_whole_adapter(h: Held) -> bool:
    """True for the matrix of an adapter that tensor ranks hold whole, and add up gradients of."""
    return h.trained and h.matrix and not h.placement.split


def stream_elements(loads: Loads) -> int:
    """Elements of this rank's gradients of the residual stream's gains and biases, which tensor
    ranks add up once a step, each replica those of its partition."""
    settings, replica = loads.settings, loads.at.replica
    mesh = settings.mesh
    if not mesh.sequence_parallel:
        return 0
    if uses_fsdp(settings):
        return sum(h.numel for h in loads.held.values() if h.trained and h.placement.stream)
    if stage_of_zero(settings) == 3:
        mine = [h for h in loads.held.values() if h.trained and h.placement.stream]
        return sum(shard_numel(h, mesh.local) for h in mine)
    total = 0
    for group in groups_of(loads.held):
        size, at = padded(group, mesh.data) // mesh.data, 0
        for h in group:
            first, last = max(at, size * replica), min(at + h.numel, size * (replica + 1))
            total += max(0, last - first) if h.placement.stream else 0
            at += h.numel
    return total
