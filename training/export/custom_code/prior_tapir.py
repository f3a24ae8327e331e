"""The prior of a Tapir export as layers; needs torch alone.

The stream is start-of-text, the text but its last token, start-of-image, the codes but the last;
position i predicts token i. Text attends to earlier text, an image position to all text and to
earlier image positions by its layer mask. Sources: arXiv 2102.12092, section 2.2 and appendix B.1;
rotary positions: arXiv 2104.09864.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = -1
"""Marks text positions after the caption."""
EPS = 1e-5
ROTARY_BASE = 10_000.0
HERE = "cpu"
"""Masks and tables are built on the CPU even if the model is on the meta device."""


class _Linear(nn.Module):
    """A linear layer, stored as (outputs, inputs), or as (inputs, outputs) if `by_inputs`.

    With `table`, the matrix is that of an embedding.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        by_inputs: bool = False,
        table: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device()
        self._by_inputs = by_inputs
        self._table = [] if table is None else [table]  # a list is no submodule
        if table is None:
            shape = (inputs, outputs) if by_inputs else (outputs, inputs)
            self.weight = nn.Parameter(torch.empty(shape, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else None

    def matrix(self) -> Tensor:
        """(outputs, inputs)."""
        weight: Tensor = self._table[0].weight if self._table else self.weight
        return weight.T if self._by_inputs else weight


def _linear(x: Tensor, layers: Sequence[_Linear], canonical: bool) -> Tensor:
    """The outputs of some layers side by side; `canonical`: in the one layout of Tapir's."""
    if not canonical:
        return torch.cat([F.linear(x, layer.matrix(), layer.bias) for layer in layers], -1)
    weight = torch.cat([layer.matrix() for layer in layers]).contiguous()
    if len(weight) > weight.shape[1]:
        weight = weight.T.contiguous().T
    if not any(layer.bias is not None for layer in layers):
        return F.linear(x, weight)
    biases = [
        x.new_zeros(len(each.matrix())) if each.bias is None else each.bias for each in layers
    ]
    return F.linear(x, weight, torch.cat(biases))


class _HeadNorm(nn.Module):
    """Each head divided by its root mean square, times a gain per channel."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self._head = head
        self.weight = nn.Parameter(torch.empty(width, device=torch.get_default_device()))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self._head,), eps=EPS) * self.weight.view(-1, self._head)


def _norm(sizes: dict[str, Any]) -> nn.Module:
    dim: int = sizes["dim"]
    return nn.RMSNorm(dim, eps=EPS) if sizes["norm"] == "rms" else nn.LayerNorm(dim)


@lru_cache(maxsize=16)
def _mask(kind: str, text: int, rows: int, columns: int, kernel: int) -> Tensor:
    """Where positions (rows of the mask) may attend, (length, length) bool."""
    length = text + rows * columns
    mask = torch.ones(length, length, dtype=torch.bool, device=HERE).tril()
    at = torch.arange(rows * columns, device=HERE)
    offset = at[:, None] - at
    if kind == "row":
        image = offset <= columns
    elif kind == "column":
        image = offset % columns == 0
    else:
        up, aside = min(kernel // 2, rows // 2), min(kernel // 2, columns // 2)
        reach = [columns * r + c for r in range(up + 1) for c in range(-aside, aside + 1)]
        image = torch.isin(offset, torch.tensor(reach, device=HERE))
    mask[text:, text:] &= image
    return mask


@lru_cache(maxsize=16)
def _turns(text: int, rows: int, columns: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, (length, 1, head / 2)."""
    words = torch.arange(text, device=HERE)
    down, across = torch.arange(rows, device=HERE), torch.arange(columns, device=HERE)
    by_row = torch.cat([words, text + down.repeat_interleave(columns)])
    by_column = torch.cat([words, text + across.repeat(rows)])
    pairs = head // 4
    rates = ROTARY_BASE ** (-torch.arange(pairs, dtype=torch.float64, device=HERE) / pairs)
    angles = torch.cat([by_row[:, None] * rates, by_column[:, None] * rates], 1)[:, None]
    return angles.cos().float(), angles.sin().float()


class PriorBlock(nn.Module):
    """A pre-norm attention resblock and a pre-norm MLP resblock."""

    def __init__(self, sizes: dict[str, Any], layer: int) -> None:
        super().__init__()
        dim, heads = sizes["dim"], sizes["heads"]
        self._index, self._head, gated = layer, dim // heads, sizes["mlp"] == "gated"
        self._rotary = sizes["positions"] == "rotary"
        grid = sizes["text_length"], sizes["grid"], sizes["columns"] or sizes["grid"]
        kind = "column" if layer % 4 == 1 else "row"
        self._kind = ("conv" if layer == sizes["layers"] - 1 else kind, *grid, sizes["conv_kernel"])
        self.attention_norm, self.mlp_norm = _norm(sizes), _norm(sizes)
        self.q, self.v = _Linear(dim, dim), _Linear(dim, dim)
        self.k = _Linear(dim, dim, bias=False)
        self.out = _Linear(dim, dim, by_inputs=True)
        self.q_norm = _HeadNorm(dim, self._head) if sizes["qk_norm"] else None
        self.k_norm = _HeadNorm(dim, self._head) if sizes["qk_norm"] else None
        hidden = 64 * -(-dim // 24) if gated else 4 * dim
        self.gate = _Linear(dim, hidden, bias=False) if gated else None
        self.up = _Linear(dim, hidden, bias=not gated)
        self.down = _Linear(hidden, dim, by_inputs=True)

    def forward(self, x: Tensor, first: int, cache: Any, canonical: bool) -> Tensor:
        """Run positions `first`, ... of the stream, (B, n, dim)."""
        last = first + x.shape[1]
        qkv = _linear(self.attention_norm(x), [self.q, self.k, self.v], canonical)
        q, k, v = qkv.view(*x.shape[:2], 3, -1, self._head).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._rotary:
            q, k = (self._rotated(each, first, last) for each in (q, k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self._index)
        mask = _mask(*self._kind)[first:last, :last].to(x.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + _linear(attended.transpose(1, 2).flatten(2), [self.out], canonical)
        normed = self.mlp_norm(x)
        if self.gate is None:
            wide = F.gelu(_linear(normed, [self.up], canonical), approximate="tanh")
        else:
            gate, wide = _linear(normed, [self.gate, self.up], canonical).chunk(2, -1)
            wide = F.silu(gate) * wide
        return x + _linear(wide, [self.down], canonical)

    def _rotated(self, x: Tensor, first: int, last: int) -> Tensor:
        cosines, sines = (t[first:last].to(x.device) for t in _turns(*self._kind[1:4], self._head))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1).to(x.dtype)


def _table(entries: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"table": nn.Embedding(entries, width)})


class PriorEmbedding(nn.Module):
    """Ids of a caption and codes -> the stream's inputs."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        dim, self._text = sizes["dim"], sizes["text_length"]
        rows, columns = sizes["grid"], sizes["columns"] or sizes["grid"]
        self._image, self._learned = rows * columns, sizes["positions"] == "learned"
        self.text, self.image = (_table(sizes[f"{n}_vocabulary"], dim) for n in ("text", "image"))
        self.pad, self.start = nn.Embedding(self._text, dim), nn.Embedding(2, dim)
        if self._learned:
            self.text_position = nn.Embedding(self._text, dim)
            self.row, self.column = nn.Embedding(rows, dim), nn.Embedding(columns, dim)

    def forward(self, ids: Tensor, first: int) -> Tensor:
        """Inputs of positions `first`, ... of the stream, (B, n, dim)."""
        text, codes = ids[:, : self._text], ids[:, self._text :]
        begin, end = max(first - self._text, 0), min(codes.shape[1] + 1, self._image)
        x = self.image["table"](codes[:, max(begin - 1, 0) : end - 1])
        if begin == 0:
            x = torch.cat([self.start.weight[1].expand(len(ids), 1, -1), x], 1)
        if self._learned:
            places = self.row.weight[:, None] + self.column.weight[None]
            x = x + places.flatten(0, 1)[begin:end]
        return x if first >= self._text else torch.cat([self._of_text(text)[:, first:], x], 1)

    def _of_text(self, text: Tensor) -> Tensor:
        words = self.text["table"](text.clamp_min(0))
        pads = self.pad.weight[None].expand_as(words)
        inputs = torch.where((text == PAD)[..., None], pads, words)
        shifted = torch.cat([self.start.weight[0].expand(len(text), 1, -1), inputs[:, :-1]], 1)
        return shifted + self.text_position.weight if self._learned else shifted


class PriorHead(nn.Module):
    """States -> logits of the text, and of codes."""

    def __init__(self, sizes: dict[str, Any], embedding: PriorEmbedding) -> None:
        super().__init__()
        self.norm = _norm(sizes)
        for name in ("text", "image"):
            table = getattr(embedding, name)["table"] if sizes["tied"] else None
            entries = sizes[f"{name}_vocabulary"]
            self.add_module(name, _Linear(sizes["dim"], entries, table=table))

    def forward(self, x: Tensor, name: str, canonical: bool) -> Tensor:
        return _linear(self.norm(x), [getattr(self, name)], canonical)
