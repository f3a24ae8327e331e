"""Kernels of a prior's layers on one tensor rank, as autocast over fp32 weights runs them.

Every micro-batch casts the weights to 16 bits again and adds 16-bit gradients to fp32 ones, which
makes small micro-batches slow.
"""

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from models.adapters import A, B, is_adapter
from models.attention.masks import Kind, full_mask, layer_kind
from models.config import PriorConfig
from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, Work
from planning.estimate.layers import Held, RankLayer
from planning.estimate.memory import Loads
from planning.estimate.zero_layout import factored

BLOCK = 128
"""Queries and keys per tile of FlexAttention."""
FLASH = 0.5
"""Fraction of a matmul's rate that attention reaches, with a softmax between its two matmuls."""
CAST, CAST_BACK = 6, 18
"""Bytes per weight: read fp32 and write 16 bits; cast the gradient back and add it to the sum."""
UPDATE = 36
"""Bytes per element of AdamW: read and write weight, gradient, moments; read for the norm."""
QR_SHARE = 0.4
"""Fraction of a core's fp32 peak that Householder's QR of tall matrices reaches (docs/LOG.md)."""
WIDE = 2
"""fp32 operations in the time of one in fp64, in which CholeskyQR2 runs."""


@lru_cache(maxsize=64)
def pairs(config: PriorConfig, kind: Kind, tiled: bool) -> int:
    """Query-key pairs that a layer computes: the mask's, or those of all tiles that it touches."""
    mask = full_mask(kind, *config.mask)
    if not tiled:
        return int(mask.sum())
    if kind == "column":  # images are transposed first: each column is one stretch
        order = _transposed(config)
        mask = mask[order][:, order]
    side = -(-config.length // BLOCK) * BLOCK
    whole = mask.new_zeros(side, side)
    whole[: config.length, : config.length] = mask
    tiles = whole.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(3).any(1)
    return int(tiles.sum()) * BLOCK * BLOCK


def _transposed(config: PriorConfig) -> list[int]:
    text, rows, columns = config.text_length, config.grid, config.grid_columns
    image = [text + row * columns + column for column in range(columns) for row in range(rows)]
    return [*range(text), *image]


def forward_work(loads: Loads, part: RankLayer, hardware: Hardware) -> Work:
    """Kernels of a layer's forward pass over one micro-batch."""
    return _layer(loads, part, hardware) + _adapters(loads, part)


def _layer(loads: Loads, part: RankLayer, hardware: Hardware) -> Work:
    """The forward pass without adapters."""
    if part.name == "embedding":
        rows = loads.micro * loads.settings.model.length
        return (Kernels(moved=16.0 * rows * loads.settings.model.dim),)
    if part.name == "head":
        return _head(loads, part)
    return _block(loads, part, hardware)


def backward_work(loads: Loads, part: RankLayer, hardware: Hardware) -> Work:
    """Kernels of a layer's backward pass: two gradients per matmul, elementwise work twice.

    Frozen weights have none: their share of the elements is left out.
    """
    matrices = {name: h for name, h in part.parameters.items() if h.matrix}
    own = [h for name, h in matrices.items() if not is_adapter(name)]
    added = [h for name, h in matrices.items() if is_adapter(name)]
    layer, precision = _layer(loads, part, hardware), loads.settings.engine.precision
    if part.name == "head":  # its logits are fp32, their gradients only with fp16
        layer = tuple(replace(k, half=precision == "bf16") for k in layer)
    kernels = _gradients(layer, _trained(own)) + _gradients(_adapters(loads, part), _trained(added))
    numel = sum(h.numel for h in part.parameters.values() if h.trained)
    return (*kernels, Kernels(moved=float((CAST_BACK if precision != "fp32" else 12) * numel)))


def _trained(matrices: list[Held]) -> float:
    """Fraction of the elements that is trained."""
    return sum(h.numel for h in matrices if h.trained) / max(sum(h.numel for h in matrices), 1)


def _gradients(forward: Work, trained: float) -> Work:
    """Kernels of the backward pass of others; `trained`: fraction of the weights with gradients."""
    kernels: list[Kernels] = []
    for k in forward:
        if not k.rows:
            kernels.append(Kernels(moved=k.moved, times=2 * k.times))
        elif k.moved:  # attention: five matmuls for two
            again = {**vars(k), "times": 2.5 * k.times, "moved": 2 * k.moved}
            kernels.append(Kernels(**again))
        else:
            kernels.append(replace(k, columns=k.inner, inner=k.columns))
            kernels.append(replace(k, rows=k.inner, inner=k.rows, times=k.times * trained))
    return tuple(kernels)


def recomputed_work(loads: Loads, part: RankLayer, hardware: Hardware) -> Work:
    """Kernels of a block that selective recompute runs again: all but the weights' matmuls."""
    inside = [k for k in _block(loads, part, hardware)[1:-1] if not k.rows or k.moved]
    return tuple(inside)


def _block(loads: Loads, part: RankLayer, hardware: Hardware) -> Work:
    """A block's kernels: first the cast of the weights, last what adds to the residual stream."""
    config, mesh = loads.settings.model, loads.settings.mesh
    half = loads.settings.engine.precision != "fp32"
    size = 2 if half else 4
    rows, dim = loads.micro * config.length, config.dim
    held = part.parameters
    inner, wide = held["q.weight"].numel // dim, held["up.weight"].numel // dim
    head = dim // config.heads
    heads = loads.micro * inner // head
    layer = int(part.name.removeprefix("block")) + 1
    met = pairs(config, layer_kind(layer, config.layers), hardware.units > 1)
    matrices = sum(h.numel for h in held.values() if h.matrix)
    gated = config.mlp == "gated"
    # queries and keys are read and written again by each
    turned = 2 * (config.qk_norm + (config.positions == "rotary"))
    held_rows = rows // (mesh.tensor if mesh.sequence_parallel else 1)
    joined = 12 * held_rows * dim  # bias, residual
    return (
        Kernels(moved=float(CAST * matrices if half else 0), times=1),
        Kernels(rows=rows, columns=inner, inner=dim, half=half, times=3),
        Kernels(
            rows=config.length,
            columns=max(1, met // config.length),
            inner=round(2 * head / FLASH),
            batch=heads,
            half=half,
            moved=4.0 * size * rows * inner,
        ),
        Kernels(rows=rows, columns=dim, inner=inner, half=half),
        Kernels(rows=rows, columns=wide, inner=dim, half=half, times=2 if gated else 1),
        Kernels(rows=rows, columns=dim, inner=wide, half=half),
        Kernels(moved=8.0 * held_rows * dim, times=2),  # norms
        Kernels(moved=(4.0 + size) * held_rows * dim, times=2 if half else 0),  # to 16 bits
        Kernels(moved=2.0 * size * rows * inner),  # heads together
        Kernels(moved=(3.0 if gated else 2.0) * size * rows * wide),  # GELU, or silu(gate) * up
        Kernels(moved=2.0 * size * rows * inner, times=turned),
        Kernels(moved=float(joined), times=2),
    )


def _adapters(loads: Loads, part: RankLayer) -> Work:
    """Two narrow matmuls of each adapter of a block, and their sum with the linear's output."""
    half = loads.settings.engine.precision != "fp32"
    rows, rank = loads.micro * loads.settings.model.length, loads.settings.lora.rank
    sizes = {name: h.numel for name, h in part.parameters.items() if is_adapter(name)}
    kernels: list[Kernels] = []
    for name in (name for name in sizes if name.endswith(A)):
        inputs, outputs = sizes[name] // rank, sizes[name.removesuffix(A) + B] // rank
        kernels.append(Kernels(rows=rows, columns=rank, inner=inputs, half=half))
        kernels.append(Kernels(rows=rows, columns=outputs, inner=rank, half=half))
        kernels.append(Kernels(moved=(6.0 if half else 12.0) * rows * outputs))
    return tuple(kernels)


def _head(loads: Loads, part: RankLayer) -> Work:
    config, micro = loads.settings.model, loads.micro
    dim, held = config.dim, part.parameters
    text, image = micro * config.text_length, micro * config.image_length
    words, codes = held["text.weight"].numel // dim, held["image.weight"].numel // dim
    logits = text * words + image * codes
    return (
        Kernels(moved=8.0 * (text + image) * dim),
        Kernels(rows=text, columns=words, inner=dim, half=False),
        Kernels(rows=image, columns=codes, inner=dim, half=False),
        Kernels(moved=16.0 * logits),  # largest, exponentials, sum
    )


def update_work(elements: int) -> Work:
    """AdamW over this rank's part."""
    return (Kernels(moved=float(UPDATE * elements)),)


def compression_work(loads: Loads, hardware: Hardware) -> Work:
    """Kernels of PowerSGD: P, Q, the decompressed matrix and the basis of each factored shard."""
    kernels: list[Kernels] = []
    shards = factored(loads.settings, loads.held, loads.at)
    for shard, count in Counter(shards).items():
        short, long = sorted((shard.rows, shard.columns))
        products = Kernels(rows=short, columns=long, inner=shard.rank, half=False, times=3 * count)
        kernels += [products, Kernels(moved=28.0 * short * long, times=count)]
        kernels += _basis(short, shard.rank, count, hardware)
    return tuple(kernels)


def _basis(rows: int, rank: int, count: int, hardware: Hardware) -> list[Kernels]:
    """Orthogonalisation of `count` equal P, as parallel/compress/orthogonal.py chooses it.

    CholeskyQR2 in fp64: two Gram matrices and two triangular solves in two passes.
    """
    tall = 8.0 * rows * rank
    if not hardware.cores:
        gram = Kernels(rows=rank, columns=rank, inner=WIDE * rows, batch=count, half=False, times=2)
        solve = Kernels(
            rows=rows, columns=rank, inner=WIDE * rank, batch=count, half=False, times=2
        )
        return [gram, solve, Kernels(moved=8 * tall * count)]
    inner = round(2 * rank / QR_SHARE)
    return [Kernels(rows=rows, columns=rank, inner=inner, half=False, moved=tall, times=count)]
