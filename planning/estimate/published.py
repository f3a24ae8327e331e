"""The cost model's predictions for published runs of Megatron-LM, row by row.

A dense GPT with full recompute on A100-80GB, as in Narayanan et al. 2021 (arXiv 2104.04473):
unfused attention, fused bias, GELU, softmax and dropout, interleaved schedule with each tensor rank
sending its part, gradients accumulated and all-reduced in fp32 after the last backward pass. The
table gives neither micro-batch nor layers per chunk: the best ones that fit are used. Constants are
the same for all rows. The first predictions were 12% too fast everywhere, so large kernels' shares
of the peaks were lowered and the fp32 accumulation of gradients was counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.config import MeshConfig
from planning.estimate.collectives import all_reduce, group_span, hand_on
from planning.estimate.hardware import KNOWN, Hardware
from planning.estimate.kernels import Kernels, Work, seconds

LENGTH, VOCABULARY = 2048, 51_200
HALF, FULL = 2, 4
STATE_BYTES = 18
"""Bytes per parameter: 16-bit weight, fp32 gradient, master and two moments."""
ADDED_BYTES = 10
"""Bytes per parameter and micro-batch: adding its 16-bit gradient to the fp32 one."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A published run."""

    name: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    measured: float
    """TFLOP/s per GPU, recompute included."""
    held_out: bool = False
    """Compared after the model was finished."""

    @property
    def mesh(self) -> MeshConfig:
        data = self.gpus // (self.tensor * self.pipeline)
        return MeshConfig(tensor=self.tensor, pipeline=self.pipeline, data=data)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step by the paper's formula."""
        h, rows = self.hidden, self.batch * LENGTH
        extra = 1 + LENGTH / (6 * h) + VOCABULARY / (16 * self.layers * h)
        return 96.0 * rows * self.layers * h * h * extra


def _run(name: str, *sizes: int, measured: float, held_out: bool = False) -> Dense:
    heads, hidden, layers, tensor, pipeline, gpus, batch = sizes
    return Dense(
        name=name,
        heads=heads,
        hidden=hidden,
        layers=layers,
        tensor=tensor,
        pipeline=pipeline,
        gpus=gpus,
        batch=batch,
        measured=measured,
        held_out=held_out,
    )


RUNS = (
    _run("1.7B", 24, 2304, 24, 1, 1, 32, 512, measured=137),
    _run("3.6B", 32, 3072, 30, 2, 1, 64, 512, measured=138, held_out=True),
    _run("7.5B", 32, 4096, 36, 4, 1, 128, 512, measured=142),
    _run("18.4B", 48, 6144, 40, 8, 1, 256, 1024, measured=135, held_out=True),
    _run("39.1B", 64, 8192, 48, 8, 2, 512, 1536, measured=138),
    _run("76.1B", 80, 10240, 60, 8, 4, 1024, 1792, measured=140, held_out=True),
    _run("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, measured=148),
    _run("310.1B", 128, 16384, 96, 8, 16, 1920, 2160, measured=155, held_out=True),
    _run("529.6B", 128, 20480, 105, 8, 35, 2520, 2520, measured=163, held_out=True),
    _run("1008B", 160, 25600, 128, 8, 64, 3072, 3072, measured=163),
)
"""Table 1 of arXiv 2104.04473."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A predicted configuration of a run."""

    micro: int
    chunks: int
    """Interleaved chunks of layers per stage."""
    seconds: float
    tflops: float


def predict(run: Dense, hardware: Hardware = KNOWN["a100-80gb"]) -> Predicted:
    """The fastest micro-batch and number of chunks that fit."""
    fitting = [
        Predicted(
            micro=micro, chunks=chunks, seconds=time, tflops=run.step_flops / time / run.gpus / 1e12
        )
        for micro, chunks in _choices(run, hardware)
        for time in [_step(run, micro, chunks, hardware)]
    ]
    return min(fitting, key=lambda row: row.seconds)


def _choices(run: Dense, hardware: Hardware) -> Iterator[tuple[int, int]]:
    samples, layers = run.batch // run.mesh.data, run.layers // run.pipeline
    for micro in (1, 2, 4, 8, 16):
        for chunks in range(1, layers + 1):
            whole = layers % chunks == 0 and (run.pipeline > 1 or chunks == 1)
            count = samples // micro
            if samples % micro or not whole or (chunks > 1 and count % run.pipeline):
                continue
            if _bytes(run, micro, chunks) < hardware.usable:
                yield micro, chunks


def _bytes(run: Dense, micro: int, chunks: int) -> float:
    """Bytes of model states, saved inputs of the layers in flight, and one layer's activations."""
    weights = 12 * run.hidden**2 * run.layers / run.pipeline + VOCABULARY * run.hidden
    state = HALF * micro * LENGTH * run.hidden
    waits = run.pipeline * (1 + (run.pipeline - 1) / (run.pipeline * chunks))
    kept = state * run.layers / run.pipeline * min(waits, run.batch // run.mesh.data // micro)
    scores = 5 * micro * run.heads * LENGTH**2 / run.tensor
    return STATE_BYTES * weights / run.tensor + kept + scores + 34 / HALF * state / run.tensor


def _step(run: Dense, micro: int, chunks: int, hardware: Hardware) -> float:
    mesh, layers = run.mesh, run.layers // run.pipeline
    count = run.batch // mesh.data // micro
    tensor = group_span(mesh, "tensor")
    state = HALF * micro * LENGTH * run.hidden
    forward = seconds(layer_forward(run, micro), hardware)
    forward += 2 * all_reduce(state, tensor, hardware)
    backward = seconds(layer_backward(run, micro), hardware)
    backward += 2 * all_reduce(state, tensor, hardware)
    added = ADDED_BYTES * 12 * run.hidden**2 / run.tensor
    backward += seconds((Kernels(moved=added),), hardware)
    stage = layers * (2 * forward + backward)  # forward again: full recompute
    head = 3 * seconds(_head(run, micro), hardware)
    busy = stage + (head if run.pipeline == 1 else 0.0)
    bubble = (run.pipeline - 1) / chunks * busy
    sends = 2 * chunks * count * hand_on(state / run.tensor, mesh, hardware)
    sends = sends if run.pipeline > 1 else 0.0
    late = head * count if run.pipeline > 1 else 0.0  # on the last stage alone
    weights = (12 * run.hidden**2 * layers + VOCABULARY * run.hidden) / run.tensor
    reduced = all_reduce(FULL * weights, group_span(mesh, "data"), hardware)
    update = seconds((Kernels(moved=32 * weights),), hardware)
    return count * busy + bubble + sends + late + reduced + update + hardware.step_overhead


def layer_forward(run: Dense, micro: int) -> Work:
    """Kernels of a layer's forward pass on one tensor rank."""
    h, t, rows = run.hidden, run.tensor, micro * LENGTH
    heads, each = run.heads // t * micro, h // run.heads
    scores = heads * LENGTH * LENGTH
    return (
        Kernels(rows=rows, columns=3 * h // t, inner=h),
        Kernels(rows=LENGTH, columns=LENGTH, inner=each, batch=heads),
        Kernels(rows=LENGTH, columns=each, inner=LENGTH, batch=heads),
        Kernels(rows=rows, columns=h, inner=h // t),
        Kernels(rows=rows, columns=4 * h // t, inner=h),
        Kernels(rows=rows, columns=h, inner=4 * h // t),
        Kernels(moved=4 * scores),  # softmax with its scale and mask
        Kernels(moved=5 * scores),  # dropout
        Kernels(moved=4.0 * rows * h, times=2),  # norms
        Kernels(moved=7.0 * rows * h, times=2),  # bias, dropout, residual
        Kernels(moved=16.0 * rows * h / t),  # bias, GELU
        Kernels(moved=16.0 * rows * h / t),  # heads apart, and together
    )


def layer_backward(run: Dense, micro: int) -> Work:
    """Kernels of a layer's backward pass: two gradients per matmul, elementwise work twice."""
    kernels = []
    for k in layer_forward(run, micro):
        if not k.rows:
            kernels.append(Kernels(moved=k.moved, times=2 * k.times))
            continue
        kernels.append(Kernels(rows=k.rows, columns=k.inner, inner=k.columns, batch=k.batch))
        kernels.append(Kernels(rows=k.inner, columns=k.columns, inner=k.rows, batch=k.batch))
    return tuple(kernels)


def _head(run: Dense, micro: int) -> Work:
    rows, columns = micro * LENGTH, VOCABULARY // run.tensor
    return (
        Kernels(rows=rows, columns=columns, inner=run.hidden),
        Kernels(moved=14.0 * rows * columns),  # to fp32, largest, exponentials, sum
    )
