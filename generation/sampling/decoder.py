"""Decode image tokens with KV caches on a prior, or on one pipeline stage of it.

The layers are those of models/prior.py with weights packed for few rows; attention reads only the
cache slots that the masks allow. `start` prefills the text and the given image tokens, then `next`
runs one token at a time. With tensor parallelism each rank holds its heads and channels; with a
pipeline each rank holds its layers, and hidden states are sent to the next stage.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.sampling.kv_cache import (
    CachePosition,
    CacheShape,
    Lane,
    LayerCache,
    Reads,
    reads_of,
)
from generation.sampling.packed_linear import PackedLinear
from generation.sampling.pipeline import Neighbours
from models.attention.masks import Kind, full_mask, layer_kind
from models.attention.rotary import Turns, rotary_table_on, rotate
from models.config import PriorConfig
from models.prior import PriorBlock, PriorEmbedding, PriorHead
from parallel.tensor.ops import TensorParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LocalPrior:
    """The layers of a prior that this rank decodes with, and its links to the other ranks."""

    layers: Mapping[str, nn.Module]
    """Some consecutive layers of a prior, by name."""
    config: PriorConfig
    tensor: TensorParallel = field(default_factory=TensorParallel)
    neighbours: Neighbours = field(default_factory=Neighbours)
    least: Callable[[int], int] = int
    """Minimum of a number over all ranks that decode together."""


class _DecoderBlock:
    """One attention resblock and one MLP resblock."""

    def __init__(
        self, block: PriorBlock, number: int, part: LocalPrior, dtype: torch.dtype, one_row: bool
    ) -> None:
        config = part.config
        self.kind = layer_kind(number, config.layers)
        self._tensor = part.tensor
        self._dtype = torch.float32 if one_row else dtype
        self._width = config.dim // config.heads
        self._norms = block.attention_norm, block.mlp_norm
        q, k, v = block.q, block.k, block.v
        assert q.bias is not None and v.bias is not None
        weight = torch.cat([q.weight, k.weight, v.weight])
        bias = torch.cat([q.bias, torch.zeros_like(q.bias), v.bias])
        packed = partial(PackedLinear, dtype=dtype, one_row=one_row)
        self._qkv = packed(weight, bias)
        self._head_norms = block.q_norm, block.k_norm
        self._gated = block.gate is not None
        if block.gate is None:
            self._up = packed(block.up.weight, block.up.bias, gelu=True)
        else:
            self._up = packed(torch.cat([block.gate.weight, block.up.weight]), None)
        alone = part.tensor.size == 1
        ends = block.out, block.down
        self._out, self._down = (packed(end.weight.T, end.bias if alone else None) for end in ends)
        self._reduced_biases = [None if alone else end.bias.detach() for end in ends]
        self._turns = turns_of(config, weight.device)
        self._mask = full_mask(self.kind, *config.mask).to(weight.device)
        self.heads = len(q.weight) // self._width

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in (self._qkv, self._out, self._up, self._down))

    def start(self, x: Tensor, cache: LayerCache, reads: Reads) -> Tensor:
        """Prefill: run the text and the given image tokens, and fill the cache.

        Shapes: x is (captions, text_length + given, dim).
        """
        states, k, v = self._whole(x)
        cache.fill(k, v, reads)
        return states

    def canonical(self, x: Tensor) -> Tensor:
        """Run text and image tokens without the cache, with the weights in one fixed layout."""
        one = copy(self)
        one._qkv, one._out = self._qkv.in_order(), self._out.in_order()
        one._up, one._down = self._up.in_order(), self._down.in_order()
        return one._whole(x)[0]

    def next(
        self, x: Tensor, cache: LayerCache, place: CachePosition, turns: Turns | None
    ) -> Tensor:
        """Run one image position of every candidate; x is (rows, dim).

        `turns` are the position's, (1, 1, D / 2) each, if queries and keys are rotated.
        """
        rows, captions, width = len(x), len(cache.text_keys), self._width
        heads = cache.text_keys.shape[1]
        q, k, v = self._qkv(self._normalized(x, 0)).view(rows, 3, heads, width).unbind(1)
        q, k = self._positioned(q, k, turns)
        for store, new in ((cache.keys, k), (cache.values, v)):
            store.index_copy_(1, place.slot, new.reshape(rows * heads, 1, width))
        keys, values = (store.index_select(1, place.reads) for store in (cache.keys, cache.values))
        image_logits = torch.bmm(q.reshape(rows * heads, 1, width), keys.transpose(1, 2))
        shared = q.view(captions, -1, heads, width).transpose(1, 2)
        text_logits = torch.matmul(shared, cache.text_keys.transpose(2, 3))
        text = text_logits.shape[3]
        text_logits = text_logits.transpose(1, 2).reshape(rows, heads, text)
        logits = torch.cat([text_logits, image_logits.view(rows, heads, -1)], 2)
        logits = logits.float() * width**-0.5
        if place.bias is not None:
            logits[..., text:] += place.bias
        probs = torch.softmax(logits, 2).to(q.dtype)
        text_probs = probs[..., :text].reshape(captions, -1, heads, text).transpose(1, 2)
        out = torch.matmul(text_probs, cache.text_values).transpose(1, 2)
        out = out.reshape(rows, heads, width)
        image_probs = probs[..., text:].reshape(rows * heads, 1, -1)
        out = out + torch.bmm(image_probs, values).view(rows, heads, width)
        return self._after(x, out.flatten(1))

    def _whole(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states after this block, and its keys and values, (captions, heads, length, D)."""
        q, k, v = self._heads(x)
        length = x.shape[1]
        mask = self._mask[:length, :length]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._after(x, attended.transpose(1, 2).flatten(2)), k, v

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        shape = (*x.shape[:2], 3, -1, self._width)
        q, k, v = self._qkv(self._normalized(x, 0)).view(shape).unbind(2)
        turns = self._turns
        if turns is not None:
            turns = turns[0][: x.shape[1]], turns[1][: x.shape[1]]
        return tuple(each.transpose(1, 2) for each in (*self._positioned(q, k, turns), v))

    def _positioned(self, q: Tensor, k: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        """Normalise and rotate queries and keys, (..., heads, D), if the model does."""
        of_queries, of_keys = self._head_norms
        if of_queries is not None and of_keys is not None:
            q, k = of_queries(q), of_keys(k)
        return (q, k) if turns is None else (rotate(q, turns), rotate(k, turns))

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: its output matrix, and the MLP resblock."""
        x = x + self._reduced(self._out(attended), 0)
        wide = self._up(self._normalized(x, 1))
        if self._gated:
            gate, wide = wide.chunk(2, -1)
            wide = F.silu(gate) * wide
        return x + self._reduced(self._down(wide), 1)

    def _normalized(self, x: Tensor, which: int) -> Tensor:
        return self._norms[which](x).to(self._dtype)  # type: ignore[no-any-return]

    def _reduced(self, partial: Tensor, which: int) -> Tensor:
        bias = self._reduced_biases[which]
        return partial if bias is None else self._tensor.leave(partial.float()) + bias


def turns_of(config: PriorConfig, device: torch.device) -> Turns | None:
    """Turns of all positions; None if positions are learned."""
    if config.positions == "learned":
        return None
    shape = config.text_length, config.grid, config.grid_columns, config.dim // config.heads
    return rotary_table_on(device, *shape)


class Decoder:
    """This rank's layers, packed; all ranks of a model call the same methods together."""

    def __init__(self, part: LocalPrior, precision: str = "fp32", one_row: bool = False) -> None:
        """`one_row`: lay out a CPU's weights and caches for one candidate at a time."""
        self.config, self.neighbours, self._tensor = part.config, part.neighbours, part.tensor
        self.least = part.least
        modules = list(part.layers.values())
        dtype = DTYPES[precision]
        self.exact = dtype == torch.float32
        """True in fp32, in which a key gives the same picture in every batch."""
        self.device = next(modules[0].parameters()).device
        one_row = one_row and self.device.type == "cpu"
        first, last = modules[0], modules[-1]
        self._embedding = first if isinstance(first, PriorEmbedding) else None
        self._head: PackedLinear | None = None
        if isinstance(last, PriorHead):
            self._norm = last.norm
            self._head = PackedLinear(
                last.image.weight, last.image.bias, torch.float32, one_row=one_row
            )
        blocks = [(n, m) for n, m in part.layers.items() if isinstance(m, PriorBlock)]
        self._blocks = [
            _DecoderBlock(module, int(name.removeprefix("block")) + 1, part, dtype, one_row)
            for name, module in blocks
        ]
        config = part.config
        self.caches = CacheShape(
            config=config,
            kinds=tuple(block.kind for block in self._blocks),
            heads=self._blocks[0].heads if self._blocks else 0,
            dtype=torch.float32 if one_row else dtype,
        )
        self._reads = {
            kind: reads_of(kind, *config.mask[1:]).to(self.device) for kind in self.caches.kinds
        }
        self._positions = torch.arange(config.image_length, device=self.device)
        self._turns = turns_of(config, self.device)
        self._compiled: Any = None
        if self.device.type == "cuda":
            self.compile("reduce-overhead")

    def compile(self, mode: str | None = None) -> None:
        """Compile the step; with mode reduce-overhead, it becomes one CUDA graph."""
        self._compiled = torch.compile(self._run, mode=mode, dynamic=False)

    @property
    def alone(self) -> bool:
        """True if no other rank decodes with this one."""
        return self.neighbours.size == self._tensor.size == 1

    @property
    def bytes(self) -> int:
        """Bytes of weights that one token reads on this rank."""
        return sum(block.bytes for block in self._blocks) + (self._head.bytes if self._head else 0)

    @torch.no_grad()
    def start(self, text: Tensor, given: Tensor, each: int) -> Lane:
        """Prefill captions and given codes, for `each` candidates of every caption.

        Shapes: text (captions, text_length) int64; given (captions, n) int64, n < image_length.
        """
        lane = self.caches.lane(len(text), each, self.device)
        x = self._entrance(text, given)
        for block, cache in zip(self._blocks, lane.blocks, strict=True):
            x = block.start(x, cache, self._reads[block.kind])
        if self._head is None:
            self.neighbours.send(x)
        return lane

    @torch.no_grad()
    def next(self, lane: Lane, position: int, before: Tensor) -> Tensor | None:
        """Logits of the code at an image position, on the last stage; None on the others.

        Shapes: before (rows,) the codes one position earlier (unused at position 0) ->
        (rows, codes).
        """
        if self._embedding is not None:
            x = self._embed(position, before)
        else:
            x = self.neighbours.receive((lane.rows, self.config.dim), self.device)
        return self._exit(self._step(x, lane, position), self._head)

    @torch.no_grad()
    def canonical_logits(self, text: Tensor, image: Tensor) -> Tensor | None:
        """Recompute the logits of the last code of `image` without the KV cache.

        The weights are used in one fixed layout, so that in fp32 the logits are bitwise equal for
        every batch and layout of the decoder. The last code itself is not read. Slow.
        Shapes: text (captions, text_length) int64; image (captions, n) int64 -> (captions, codes).
        """
        x = self._entrance(text, image)
        for block in self._blocks:
            x = block.canonical(x)
        if self._head is None:
            return self._exit(x, None)
        return self._exit(x[:, -1], self._head.in_order())

    def _entrance(self, text: Tensor, image: Tensor) -> Tensor:
        """Hidden states before this rank's first block, (captions, text_length + n, dim)."""
        if self._embedding is None:
            length = self.config.text_length + image.shape[1]
            return self.neighbours.receive((len(text), length, self.config.dim), self.device)
        x = self._embedding.embed_text(text)
        return torch.cat([x, self._embedding.embed_image(image)], 1) if image.shape[1] else x

    def _exit(self, x: Tensor, head: PackedLinear | None) -> Tensor | None:
        if head is None:
            self.neighbours.send(x)
            return None
        logits = self._tensor.gather(head(self._norm(x.float())))
        return logits[:, : self.config.image_vocabulary]

    def _embed(self, position: int, before: Tensor) -> Tensor:
        embedding = self._embedding
        assert embedding is not None
        start = embedding.start.weight[1].expand(len(before), -1)
        token: Tensor = embedding.image(before) if position else start
        if not embedding.learned:
            return token
        row, column = divmod(position, self.config.grid_columns)
        place: Tensor = embedding.row.weight[row] + embedding.column.weight[column]
        return token + place

    def _step(self, x: Tensor, lane: Lane, position: int) -> Tensor:
        at = self._positions[position : position + 1]
        if self._compiled is None:
            places = {kind: reads.cache_position(position) for kind, reads in self._reads.items()}
            return self._through(x, lane.blocks, places, self._turns_at(at))
        states: Tensor = self._compiled(x, lane.blocks, at)
        return states

    def _run(self, x: Tensor, caches: Sequence[LayerCache], at: Tensor) -> Tensor:
        """One step with the same shapes at every position; `at` is (1,), on the device.

        As a CUDA graph needs, only x and `at` change their address between steps of a lane.
        """
        places = {kind: reads.cache_position_at(at) for kind, reads in self._reads.items()}
        return self._through(x, caches, places, self._turns_at(at))

    def _through(
        self,
        x: Tensor,
        caches: Sequence[LayerCache],
        places: Mapping[Kind, CachePosition],
        turns: Turns | None,
    ) -> Tensor:
        for block, cache in zip(self._blocks, caches, strict=True):
            x = block.next(x, cache, places[block.kind], turns)
        return x

    def _turns_at(self, at: Tensor) -> Turns | None:
        """The turns of an image position, (1, 1, D / 2) each; `at` is (1,)."""
        if self._turns is None:
            return None
        place = at + self.config.text_length
        return self._turns[0].index_select(0, place), self._turns[1].index_select(0, place)
