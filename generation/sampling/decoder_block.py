"""One layer of a decoder: attention over the caches, and the MLP, with weights for few rows."""

from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.sampling.kv_cache import CachePosition, LayerCache, Reads, RowPositions
from generation.sampling.packed_linear import PackedLinear
from models.attention.masks import full_mask, layer_kind
from models.attention.rotary import Turns, rotary_table_on, rotate
from models.config import PriorConfig
from models.prior import PriorBlock
from parallel.tensor.ops import TensorParallel


class DecoderBlock:
    """One attention resblock and one MLP resblock."""

    def __init__(
        self,
        block: PriorBlock,
        number: int,
        config: PriorConfig,
        tensor: TensorParallel,
        *,
        dtype: torch.dtype,
        one_row: bool,
        eight: bool = False,
    ) -> None:
        """`number` counts the prior's layers from 1; `tensor`: the ranks that share the block."""
        self.kind = layer_kind(number, config.layers)
        self._tensor = tensor
        self._dtype = torch.float32 if one_row else dtype
        self._width = config.dim // config.heads
        self._norms = block.attention_norm, block.mlp_norm
        q, k, v = block.q, block.k, block.v
        assert q.bias is not None and v.bias is not None
        weight = torch.cat([q.weight, k.weight, v.weight])
        bias = torch.cat([q.bias, torch.zeros_like(q.bias), v.bias])
        packed = partial(PackedLinear, dtype=dtype, one_row=one_row, eight=eight)
        self._qkv = packed(weight, bias)
        self._head_norms = block.q_norm, block.k_norm
        self._gated = block.gate is not None
        if block.gate is None:
            self._up = packed(block.up.weight, block.up.bias, gelu=True)
        else:
            self._up = packed(torch.cat([block.gate.weight, block.up.weight]), None)
        alone = tensor.size == 1
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
        self,
        x: Tensor,
        cache: LayerCache,
        place: CachePosition | RowPositions,
        turns: Turns | None,
    ) -> Tensor:
        """Run one image position, or some consecutive ones, of every candidate.

        `turns` are those of the position or of each row's, (1 or rows, 1, D / 2) each, if queries
        and keys are rotated.
        Shapes: x is (rows, dim), a row for each position of a candidate.
        """
        rows, captions, width = len(x), len(cache.text_keys), self._width
        heads = cache.text_keys.shape[1]
        candidates = len(cache.keys) // heads
        shape = candidates, rows // candidates, heads, width
        q, k, v = self._qkv(self._normalized(x, 0)).view(rows, 3, heads, width).unbind(1)
        q, k = self._positioned(q, k, turns)

        def by_head(each: Tensor) -> Tensor:
            return each.reshape(shape).transpose(1, 2).flatten(0, 1)

        for store, new in ((cache.keys, k), (cache.values, v)):
            place.write(store, by_head(new))
        keys, values = (place.read(store) for store in (cache.keys, cache.values))
        image_logits = torch.bmm(by_head(q), keys.transpose(1, 2))
        image_logits = image_logits.view(candidates, heads, -1, keys.shape[1]).transpose(1, 2)
        shared = q.view(captions, -1, heads, width).transpose(1, 2)
        text_logits = torch.matmul(shared, cache.text_keys.transpose(2, 3))
        text = text_logits.shape[3]
        text_logits = text_logits.transpose(1, 2).reshape(rows, heads, text)
        logits = torch.cat([text_logits, image_logits.reshape(rows, heads, -1)], 2)
        logits = logits.float() * width**-0.5
        if place.bias is not None:
            logits[..., text:] += place.bias
        probs = torch.softmax(logits, 2).to(q.dtype)
        text_probs = probs[..., :text].reshape(captions, -1, heads, text).transpose(1, 2)
        out = torch.matmul(text_probs, cache.text_values).transpose(1, 2)
        out = out.reshape(rows, heads, width)
        image_probs = probs[..., text:].reshape(*shape[:3], -1).transpose(1, 2).flatten(0, 1)
        seen = torch.bmm(image_probs, values).view(candidates, heads, -1, width).transpose(1, 2)
        out = out + seen.reshape(rows, heads, width)
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
