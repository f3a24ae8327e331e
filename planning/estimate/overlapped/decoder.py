"""Kernels of a dense decoder's layer as today's programs run it; imports no torch.

Bytes of kernels that are no matmul are counted per position, in 16 bits unless said otherwise:
eager programs have one kernel an operation; compiled ones read and write each tensor once. Weights
are 16 bits: they are cast once a step, on their shard.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, Work
from planning.estimate.overlapped.rates import attention_rates
from planning.estimate.overlapped.step import Step

BACKWARD = 2.5
"""Matmuls of attention's backward pass over those of its forward pass."""
REPEATED = ("k", "out", "up")
"""Matmuls that selective recompute repeats: torchtitan's saves every other one of a block."""


@dataclass(frozen=True)
class Passes:
    """Kernels of a layer."""

    forward: Work
    again: Work
    """What the backward pass computes again."""
    backward: Work
    """Gradients of the inputs, and of the weights: halves of the matmuls each."""


@lru_cache(maxsize=512)
def layer(step: Step, hardware: Hardware, pairs: int = 0) -> Passes:
    """The passes of a layer on one rank; `pairs`: of queries and keys a head, 0 = causal."""
    products = matmuls(step)
    rows = step.micro * step.length / step.tensor  # sequence parallelism shares norms and sums
    there, back = (Kernels(moved=each * rows) for each in elementwise(step))
    every = tuple(products.values())
    look = _attention(step, hardware, pairs, back=False)
    again: Work = ()
    if step.recompute == "full":  # ends at the last saved tensor, before the last matmul
        again = (*every[:-1], *look, there)
    elif step.recompute == "norms":
        again = (*look, there)
    elif step.recompute == "selective":
        again = (*(k for name, k in products.items() if name in REPEATED), there)
    backward = (*gradients(every), *_attention(step, hardware, pairs, back=True), back)
    return Passes((*every, *look, there), again, backward)


def matmuls(step: Step) -> dict[str, Kernels]:
    """A layer's matmuls on one rank, in the order in which they run."""
    s, t = step.sizes, step.tensor

    def product(columns: int, inner: int) -> Kernels:
        return Kernels(rows=step.micro * step.length, columns=columns, inner=inner)

    wide, narrow = s.wide // t, s.queries // t
    if not s.gated:
        return {
            "qkv": product(3 * narrow, s.hidden),
            "out": product(s.hidden, narrow),
            "up": product(wide, s.hidden),
            "down": product(s.hidden, wide),
        }
    return {
        "q": product(narrow, s.hidden),
        "k": product(s.keys // t, s.hidden),
        "v": product(s.keys // t, s.hidden),
        "out": product(s.hidden, narrow),
        "gate": product(wide, s.hidden),
        "up": product(wide, s.hidden),
        "down": product(s.hidden, wide),
    }


def gradients(forward: Work) -> Work:
    """The two matmuls of each matmul's backward pass: of its input, and of its weights."""
    kernels: list[Kernels] = []
    for k in forward:
        kernels.append(replace(k, columns=k.inner, inner=k.columns))
        kernels.append(replace(k, rows=k.inner, inner=k.rows))
    return tuple(kernels)


def _attention(step: Step, hardware: Hardware, pairs: int, *, back: bool) -> Work:
    s, rows = step.sizes, step.micro * step.length
    heads, width = step.micro * s.heads // step.tensor, s.width
    moved = 8.0 * rows * s.hidden / step.tensor
    if step.attention == "unfused":
        return _unfused(step, heads, width, back=back)
    there, then, half = attention_rates(hardware, step.attention)
    share, times = (then, BACKWARD) if back else (there, 1.0)
    keys = pairs // step.length if pairs else (step.length + half) // 2
    kernel = Kernels(
        rows=step.length,
        columns=max(keys, 1),
        inner=round(2 * width * times / share),
        batch=heads,
        moved=moved * times,
    )
    # gradients of queries are added up in fp32, and cast
    return (kernel, Kernels(moved=20.0 * rows * s.hidden / step.tensor)) if back else (kernel,)


def _unfused(step: Step, heads: int, width: int, *, back: bool) -> Work:
    """Two matmuls with a softmax and a dropout between them, as Megatron-LM's of 2021."""
    square, scores = step.length, float(heads * step.length**2)
    forward = (
        Kernels(rows=square, columns=square, inner=width, batch=heads),
        Kernels(rows=square, columns=width, inner=square, batch=heads),
    )
    moved = Kernels(moved=9 * scores, times=2 if back else 1)
    return (*(gradients(forward) if back else forward), moved)


def elementwise(step: Step) -> tuple[float, float]:
    """Bytes a position of a layer's (forward, backward) kernels that are no matmul or attention."""
    s = step.sizes
    d, w, turned = float(s.hidden), float(s.wide), float(s.hidden + s.keys)
    if step.compiled:
        wide = 8 * d if step.wide else 0.0  # the stream is read and written in fp32
        normed = 4 * turned if s.qk_norm else 0.0
        if not s.gated:
            # norms and GELU are computed again where the weights' gradients read them
            return 16 * d + wide + 4 * w, 28 * d + wide + 8 * w
        return (
            16 * d + wide + 4 * turned + normed + 6 * w,
            24 * d + wide + 4 * turned + 2 * normed + 12 * w,
        )
    if not s.gated:
        # norms, sums, GELU; sums over rows, of the gradients of gains and biases, take twice as
        # long as their bytes; queries, keys and values are one tensor
        rows = 2 * (2 * 4 * d + 2 * (5 * d + w))
        return 2 * 4 * d + 2 * 6 * d + 4 * w, 2 * 6 * d + 2 * 6 * d + 6 * w + rows + 20 * d
    # a norm is six kernels in fp32, a rotation complex fp32; keys and values are copied to heads
    expand = 2 * (2 * d + 2 * s.keys)
    return (
        2 * 40 * d + 20 * turned + 10 * w + expand + 2 * 6 * d + 4 * d,
        2 * 80 * d + 20 * turned + 18 * w + expand + 2 * 6 * d + 4 * d,
    )


def head(step: Step) -> Passes:
    """Logits and the loss; rows of the vocabulary are split over the tensor group."""
    rows, columns = step.micro * step.length, step.sizes.vocabulary // step.tensor
    product = Kernels(rows=rows, columns=columns, inner=step.sizes.hidden)
    there, back = (Kernels(moved=each * rows * columns) for each in _loss_bytes(step))
    return Passes((product, there), (), (*gradients((product,)), back))


def _loss_bytes(step: Step) -> tuple[float, float]:
    """Bytes a logit of the loss (forward, backward)."""
    if step.compiled:
        return 4.0, 6.0  # largest and sum, then the gradient, in 16 bits
    if not step.sizes.gated:
        return 4.0, 4.0  # one kernel, in place
    return 18.0, 18.0  # to fp32, log-softmax; their gradients
