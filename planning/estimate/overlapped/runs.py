"""Steps of published programs: FSDP, with tensor parallelism."""

from collections.abc import Iterator

from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, seconds
from planning.estimate.overlapped import decoder
from planning.estimate.overlapped.rates import steady
from planning.estimate.overlapped.sharded import Unit, ring_seconds, sharded_step
from planning.estimate.overlapped.step import Step
from planning.estimate.overlapped.streams import Played
from planning.estimate.overlapped.tensor import tensor_seconds

UPDATE, EAGER_UPDATE = 40, 104
"""Bytes a parameter of AdamW and clipping: one kernel (torch), or one an operation (Composer)."""
COPIES = {"fsdp1": (0, 10), "fsdp2": (4, 10)}
"""Bytes a parameter that the passes copy: out of the gathered buffer, which FSDP1 has no need of;
and gradients into the reduction's buffer, in fp32."""
HALF, FULL = 2, 4


def play_run(step: Step, hardware: Hardware) -> Played:
    """Play a step with fp32 reduce-scatters; programs of gated models are torch's FSDP2."""
    held = steady(hardware)
    numel = step.sizes.layers * step.sizes.matrices + sum(_ends(step))
    each = UPDATE if step.sizes.gated else EAGER_UPDATE
    return sharded_step(
        tuple(_units(step, held)),
        step.accumulate,
        keeps=step.stage == 2,
        update=seconds((Kernels(moved=each * numel / step.gpus),), held) + held.step_overhead,
        hardware=held,
    )


def tokens_a_second(step: Step, hardware: Hardware) -> float:
    """Tokens a second and GPU."""
    tokens = step.micro * step.length * step.accumulate / step.tensor
    return tokens / play_run(step, hardware).seconds


def _ends(step: Step) -> tuple[int, int]:
    """Parameters of the embedding and of the head, which are one matrix if they are tied."""
    table = step.sizes.vocabulary * step.sizes.hidden
    return table, table if step.sizes.gated else 0


def _units(step: Step, hardware: Hardware) -> Iterator[Unit]:
    state = float(step.micro * step.length * step.sizes.hidden // step.tensor)
    embedding, head = _ends(step)
    looked_up = decoder.Passes((Kernels(moved=4 * state),), (), (Kernels(moved=8 * state),))
    block = _unit(step, decoder.layer(step, hardware), step.sizes.matrices, hardware)
    there, back = tensor_seconds(step, hardware)
    block = Unit(
        **{**vars(block), "forward": block.forward + there, "backward": block.backward + back}
    )
    yield _unit(step, looked_up, embedding, hardware)
    for _ in range(step.sizes.layers):
        yield block
    yield _unit(step, decoder.head(step), head, hardware)


def _unit(step: Step, passes: decoder.Passes, numel: int, hardware: Hardware) -> Unit:
    own, ranks = numel / step.tensor, step.gpus // step.tensor
    out, into = COPIES["fsdp2" if step.sizes.gated else "fsdp1"]
    copies = [(Kernels(moved=each * own),) if each * own else () for each in (out, into)]
    return Unit(
        forward=seconds(passes.forward + copies[0], hardware),
        backward=seconds(passes.again + passes.backward + copies[1], hardware),
        gather=ring_seconds(HALF * own, ranks, hardware, step.tensor),
        scatter=ring_seconds(FULL * own, ranks, hardware, step.tensor),
    )
