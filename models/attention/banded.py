"""Block-sparse attention on CPUs, which skips the masked positions.

Text attends to earlier text, an image position to all text and to a band of earlier image
positions. The text parts run on torch's flash kernel for CPUs, which returns each softmax's
log-sum-exp. The band is cut into tiles of one image row (or column, in a transposed image), whose
keys are a contiguous range of the raster. Both parts share one softmax: the text's log-sum-exp is
one more logit of the band. The backward pass needs only the common output and log-sum-exp, so that
no matrix of probabilities is saved. Short streams run on the dense kernel with the mask. Source of
the masks: arXiv 2102.12092, section 2.2, appendix B.1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from models.attention.masks import Kind, full_mask, image_mask
from parallel.precision import small_matmuls

CACHED = 64 * 1024
"""Logits computed in one call, or those of one head if they are more."""
SHORT = 128
"""Longest stream for which the dense kernel is faster (docs/LOG.md)."""
_DROPOUT = 0.0
"""The kernel supports no dropout."""
_HERE = "cpu"
"""Bands are built on the CPU even if the model is on the meta device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """The image-to-image mask, in tiles of the queries of a row, or of a column."""

    kind: Kind
    text: int
    grid: int
    """Rows of the image."""
    columns: int
    halo: int
    """Number of keys before a tile's first query that the tile attends to."""
    bias: Tensor
    """(tiles, queries, halo + queries): 0 where a tile's query may attend, else minus infinity."""
    dense: Tensor | None
    """The same for a whole short stream, (length, length); None = use tiles."""

    @property
    def together(self) -> int:
        """Heads per call, so that their logits fit in a core's cache."""
        return max(1, CACHED // self.bias.numel())

    def biases(self, heads: int, dtype: torch.dtype) -> Tensor:
        """The bias of some heads' tiles, (heads * tiles, queries, halo + queries)."""
        return _repeated(self, heads).to(dtype)


@lru_cache(maxsize=32)
def _repeated(band: Band, heads: int) -> Tensor:
    return band.bias if heads == 1 else band.bias.repeat(heads, 1, 1)


@lru_cache(maxsize=16)
def band_of(kind: Kind, text: int, grid: int, conv_kernel: int, columns: int = 0) -> Band:
    """The band of an image mask, cut into tiles; 0 columns: as many as rows (`grid`)."""
    mask, width = image_mask(kind, grid, conv_kernel, columns), columns or grid
    if kind == "column":  # equal for all columns: earlier rows of the same column
        halo, tiles = (
            0,
            torch.ones(grid, grid, dtype=torch.bool, device=_HERE).tril().expand(width, -1, -1),
        )
    else:
        places = torch.arange(grid * width, device=_HERE)
        halo = int((places[:, None] - places[None])[mask].amax())
        padded = torch.cat([mask.new_zeros(len(mask), halo), mask], 1)
        tiles = torch.stack(
            [
                padded[i * width : (i + 1) * width, i * width : (i + 1) * width + halo]
                for i in range(grid)
            ]
        )
    short = text + grid * width <= SHORT
    dense = _bias(full_mask(kind, text, grid, conv_kernel, columns)) if short else None
    return Band(
        kind=kind,
        text=text,
        grid=grid,
        columns=width,
        halo=halo,
        bias=_bias(tiles),
        dense=dense,
    )


def _bias(mask: Tensor) -> Tensor:
    """0 where a mask allows attention, minus infinity elsewhere."""
    return torch.zeros(mask.shape, device=_HERE).masked_fill(~mask, -math.inf)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, band: Band) -> Tensor:
    """Attention of the whole stream on a CPU; 16-bit inputs accumulate in fp32.

    Shapes: (B, heads, text + grid * columns, D) each -> the same.
    """
    with torch.autocast("cpu", enabled=False):
        out: Tensor = (_Banded if band.dense is None else _Masked).apply(q, k, v, band)
    return out


class _Masked(Function):
    """Dense kernel on a whole short stream."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band) -> Tensor:
        assert band.dense is not None
        mask = band.dense.to(q.dtype)
        out, sums = _flash(q, k, v, mask=mask)
        out = out.contiguous()  # like the tiled output, so that both have one memory layout
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = _flash_backward(*gradients, *ctx.saved_tensors, mask=ctx.mask)
        return (*dqkv, None)


class _Banded(Function):
    """Flash kernel on the text parts, tiles on the band."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band) -> Tensor:
        text = band.text
        out = q.new_empty(q.shape)
        earlier, among = _flash(q[:, :, :text], k[:, :, :text], v[:, :, :text], causal=True)
        out[:, :, :text] = earlier
        text_out, sums = _flash(q[:, :, text:], k[:, :, :text], v[:, :, :text])
        sums = sums.contiguous()
        for sample, heads in _chunks(q, band):
            at = sample, heads, slice(text, None)
            out[at] = _band_forward(
                q[at], k[at], v[at], text_out[sample, heads], sums[sample, heads], band
            )
        ctx.save_for_backward(q, k, v, out, among, sums)
        ctx.band = band
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, among, sums = ctx.saved_tensors
        band, text, (grad,) = ctx.band, ctx.band.text, gradients
        text_kv = k[:, :, :text], v[:, :, :text]
        first = _flash_backward(
            grad[:, :, :text], q[:, :, :text], *text_kv, out[:, :, :text], among, causal=True
        )
        second = _flash_backward(
            grad[:, :, text:], q[:, :, text:], *text_kv, out[:, :, text:], sums
        )
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        dq[:, :, :text], dq[:, :, text:] = first[0], second[0]
        torch.add(first[1], second[1], out=dk[:, :, :text])
        torch.add(first[2], second[2], out=dv[:, :, :text])
        inner = (_wide(grad[:, :, text:]) * _wide(out[:, :, text:])).sum(-1)
        for sample, heads in _chunks(q, band):
            at = sample, heads, slice(text, None)
            parts = _band_backward(
                q[at], k[at], v[at], grad[at], sums[sample, heads], inner[sample, heads], band
            )
            dq[sample, heads, text:] += parts[0]
            dk[sample, heads, text:], dv[sample, heads, text:] = parts[1], parts[2]
        return dq, dk, dv, None


def _flash(
    *given: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with small_matmuls():
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *given, _DROPOUT, causal, attn_mask=mask
        )
        return out, sums


def _flash_backward(
    *given: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    with small_matmuls():
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, _DROPOUT, causal, attn_mask=mask
        )
        return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    """In fp32, or unchanged in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _chunks(x: Tensor, band: Band) -> list[tuple[int, slice]]:
    """(sample, slice of heads) of each call of the band's kernels."""
    samples, heads = x.shape[:2]
    step = band.together
    return [(i, slice(j, j + step)) for i in range(samples) for j in range(0, heads, step)]


def _band_forward(
    q: Tensor, k: Tensor, v: Tensor, text_out: Tensor, sums: Tensor, band: Band
) -> Tensor:
    """Some heads' image outputs, (heads, image, D); `sums` becomes the common log-sum-exp."""
    queries = _tiles(q, band)
    keys, values = _stretches(k, band), _stretches(v, band)
    width = band.bias.shape[2]
    logits = queries.new_empty(*queries.shape[:2], width + 1)
    logits[..., width:] = _tiles(sums[..., None], band)
    torch.baddbmm(
        band.biases(len(q), queries.dtype),
        queries,
        keys.transpose(1, 2),
        alpha=q.shape[2] ** -0.5,
        out=logits[..., :width],
    )
    top = logits.amax(-1, keepdim=True)
    shares = torch.softmax(logits, -1)
    common = top - shares.amax(-1, keepdim=True).log()
    out = torch.bmm(shares[..., :width], values)
    out.addcmul_(_tiles(text_out, band), shares[..., width:])
    _untile(common, band, sums[..., None])
    return _untile(out, band, out.new_empty(q.shape))


def _band_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sums: Tensor, inner: Tensor, band: Band
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some heads' image queries, keys and values through the band."""
    queries, grads = _tiles(q, band), _tiles(grad, band)
    keys, values = _stretches(k, band), _stretches(v, band)
    scale = q.shape[2] ** -0.5
    offset = band.biases(len(q), queries.dtype) - _tiles(sums[..., None], band)
    shares = torch.baddbmm(offset, queries, keys.transpose(1, 2), alpha=scale).exp_()
    slopes = torch.bmm(grads, values.transpose(1, 2)).sub_(_tiles(inner[..., None], band))
    slopes.mul_(shares).mul_(scale)
    dq = _untile(torch.bmm(slopes, keys), band, queries.new_empty(q.shape))
    dk = _fold(torch.bmm(slopes.transpose(1, 2), queries), band)
    dv = _fold(torch.bmm(shares.transpose(1, 2), grads), band)
    return dq, dk, dv


def _tiles(x: Tensor, band: Band) -> Tensor:
    """(heads, image, D) -> (heads * tiles, queries, D) in fp32: tiles of a row, or a column."""
    tiles: Tensor = _wide(x).unflatten(1, (band.grid, band.columns))
    return (tiles.transpose(1, 2) if band.kind == "column" else tiles).flatten(0, 1)


def _untile(tiles: Tensor, band: Band, into: Tensor) -> Tensor:
    """Inverse of `_tiles`, written into (heads, image, D)."""
    shaped = into.unflatten(1, (band.grid, band.columns))
    by_head = tiles.unflatten(0, (-1, len(band.bias)))
    (shaped.transpose(1, 2) if band.kind == "column" else shaped).copy_(by_head)
    return into


def _stretches(x: Tensor, band: Band) -> Tensor:
    """(heads, image, D) -> (heads * tiles, halo + queries, D): each tile's keys.

    A single head is not copied.
    """
    if band.halo == 0:
        return _tiles(x, band)
    columns, (heads, length, width) = band.columns, x.shape
    padded = F.pad(_wide(x), (0, 0, band.halo, 0))
    strides = ((band.halo + length) * width, columns * width, width, 1)
    sizes = (heads, band.grid, band.halo + columns, width)
    return padded.as_strided(sizes, strides).flatten(0, 1)


def _fold(parts: Tensor, band: Band) -> Tensor:
    """Sum tiles' gradients of the same key: adjoint of `_stretches`, (heads, image, D)."""
    shape, columns, halo = (band.grid, band.columns), band.columns, band.halo
    tiles, image = parts.unflatten(0, (-1, len(band.bias))), band.grid * band.columns
    heads, width = len(tiles), parts.shape[2]
    if halo == 0:
        return _untile(parts, band, parts.new_empty(heads, image, width))
    total = parts.new_zeros(heads, halo + columns + image, width)
    for start in range(0, halo + columns, columns):
        piece = tiles[:, :, start : start + columns]
        target = total[:, start : start + image].unflatten(1, shape)
        target[:, :, : piece.shape[2]] += piece
    return total[:, halo : halo + image]
