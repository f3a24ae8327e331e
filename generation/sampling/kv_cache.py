"""KV caches: the candidates of a caption share the text's part, each has an image part of its own.

A layer's sparse mask lets an image position read only some earlier ones; a row layer reads the last
columns + 1. So the image part has as few slots as the mask allows: a slot is reused once no later
position reads it. At the paper's sizes a row layer has 33 slots, a column layer 993, the
convolution 166.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention.masks import Kind, image_mask
from models.config import PriorConfig

_HERE = torch.device("cpu")
_META = torch.device("meta")
_DENSE = 2
"""All slots of a row are read in place if they are at most this many times those that it needs."""


class CachePosition(NamedTuple):
    """One image position of all rows: its slot, and the slots that it reads."""

    slot: Tensor
    """(1,) int64."""
    reads: Tensor
    """(w,) int64: slots."""
    bias: Tensor | None
    """(w,): 0, or minus infinity for padding; None: all slots are read."""

    def write(self, store: Tensor, new: Tensor) -> None:
        """Store the position's keys or values: (rows * heads, slots, D), (rows * heads, 1, D)."""
        store.index_copy_(1, self.slot, new)

    def read(self, store: Tensor) -> Tensor:
        """(rows * heads, w, D)."""
        return store.index_select(1, self.reads)


class RowPositions(NamedTuple):
    """`CachePosition` with an image position of each row's own, or several consecutive ones."""

    slot: Tensor
    """(rows * heads * n,) int64: in the flat store; n positions a row."""
    reads: Tensor | None
    """(rows * heads * w,) int64: slots in the flat store; None: all slots of the row."""
    bias: Tensor
    """(rows * n, 1, w): 0, or minus infinity for slots that a position does not read."""

    def write(self, store: Tensor, new: Tensor) -> None:
        """As `CachePosition.write`."""
        store.view(-1, store.shape[2]).index_copy_(0, self.slot, new.flatten(0, 1))

    def read(self, store: Tensor) -> Tensor:
        """As `CachePosition.read`."""
        if self.reads is None:
            return store
        flat = store.view(-1, store.shape[2])
        return flat.index_select(0, self.reads).view(len(store), -1, store.shape[2])


@dataclass(frozen=True, kw_only=True, eq=False)
class Reads:
    """The slot of each image position, and the slots that it reads, its own included."""

    slots: int
    """Fewest slots that hold every position until its last read."""
    slot: Tensor
    """(image_length,) int64."""
    until: Tensor
    """(image_length,) int64: the last position that reads each."""
    index: Tensor
    """(image_length, widest) int64: the slots that each reads, in the order of their positions."""
    counts: list[int]
    """Valid entries of each row of `index`."""
    bias: Tensor
    """(image_length, widest): 0 where `index` is valid, minus infinity elsewhere."""
    slot_bias: Tensor | None
    """(image_length, slots): 0 for slots that a position reads, minus infinity for others. None if
    most positions read few of them."""

    def to(self, device: torch.device) -> "Reads":
        """The tables on a device, so that no step copies them there."""
        return Reads(
            slots=self.slots,
            slot=self.slot.to(device),
            until=self.until,
            index=self.index.to(device),
            counts=self.counts,
            bias=self.bias.to(device),
            slot_bias=None if self.slot_bias is None else self.slot_bias.to(device),
        )

    def cache_position(self, position: int) -> CachePosition:
        """The slot of a position, and the slots that it reads."""
        index = self.index[position, : self.counts[position]]
        return CachePosition(self.slot[position : position + 1], index, None)

    def cache_position_at(self, at: Tensor) -> CachePosition:
        """`cache_position` with one shape for all positions; `at` is (1,), on the device."""
        index, bias = (table.index_select(0, at)[0] for table in (self.index, self.bias))
        return CachePosition(self.slot.index_select(0, at), index, bias)

    def row_positions(self, at: Tensor, heads: int) -> RowPositions:
        """The slots of rows at different positions, with one shape for all positions.

        Slots are gathered, unless a position reads so many of them that a copy costs more, or each
        row has several positions.
        Shapes: at (rows,) or (rows, n) int64, on the device.
        """
        first = torch.arange(len(at) * heads, device=at.device) * self.slots
        if at.dim() > 1:
            assert self.slot_bias is not None, "slots for one position at a time"
            own = self.slot[at].repeat_interleave(heads, 0)
            bias = self.slot_bias.index_select(0, at.flatten())[:, None]
            return RowPositions((first[:, None] + own).flatten(), None, bias)
        slot = first + self.slot.index_select(0, at).repeat_interleave(heads)
        if self.slot_bias is not None:
            return RowPositions(slot, None, self.slot_bias.index_select(0, at)[:, None])
        index, bias = (table.index_select(0, at)[:, None] for table in (self.index, self.bias))
        return RowPositions(slot, (first.view(-1, heads, 1) + index).flatten(), bias)

    def read_from(self, position: int) -> Tensor:
        """The earlier positions that this one or a later one reads, (n,) int64."""
        return (self.until[:position] >= position).nonzero().flatten()


@lru_cache(maxsize=16)
def reads_of(kind: Kind, grid: int, conv_kernel: int, columns: int = 0, together: int = 1) -> Reads:
    """Assign slots to the positions of a mask.

    `together`: consecutive positions that are written before the first of them reads.
    """
    mask = image_mask(kind, grid, conv_kernel, columns)
    until = [int(column.nonzero()[-1]) for column in mask.T]
    slots = _slots([last + together - 1 for last in until])
    slot = torch.tensor(slots, device=_HERE)
    counts = mask.sum(1).tolist()
    index = torch.zeros(len(mask), max(counts), dtype=torch.int64, device=_HERE)
    bias = torch.full(index.shape, -torch.inf, device=_HERE)
    slot_bias = torch.full((len(mask), max(slots) + 1), -torch.inf, device=_HERE)
    for i, (row, count) in enumerate(zip(mask, counts, strict=True)):
        index[i, :count] = slot[row]
        bias[i, :count] = 0
        slot_bias[i, slot[row]] = 0
    return Reads(
        slots=max(slots) + 1,
        slot=slot,
        until=torch.tensor(until, device=_HERE),
        index=index,
        counts=counts,
        bias=bias,
        slot_bias=slot_bias if together > 1 or max(slots) < _DENSE * max(counts) else None,
    )


def _slots(until: list[int]) -> list[int]:
    """Reuse a free slot for each position; add a slot only if none is free.

    A position holds its slot until its last read, so that the number of slots is the largest number
    of positions held at once, which is the minimum.
    """
    slots: list[int] = []
    free: list[int] = []
    ending: defaultdict[int, list[int]] = defaultdict(list)
    for position, end in enumerate(until):
        free += ending.pop(position - 1, [])
        slots.append(free.pop() if free else max(slots, default=-1) + 1)
        ending[end].append(slots[-1])
    return slots


@dataclass(kw_only=True)
class LayerCache:
    """Keys and values of one block, in buffers that are allocated once and written in place."""

    text_keys: Tensor
    """(captions, heads, text_length, D)."""
    text_values: Tensor
    keys: Tensor
    """(captions * each * heads, slots, D)."""
    values: Tensor

    def part(self, rows: slice) -> "LayerCache":
        """The same memory of some captions, each with its only candidate."""
        captions, heads = self.text_keys.shape[:2]
        keys, values = (
            store.view(captions, heads, *store.shape[1:])[rows].flatten(0, 1)
            for store in (self.keys, self.values)
        )
        return LayerCache(
            text_keys=self.text_keys[rows],
            text_values=self.text_values[rows],
            keys=keys,
            values=values,
        )

    def fill(self, keys: Tensor, values: Tensor, reads: Reads) -> None:
        """Store the text's keys and values, and those of given image tokens that are read later.

        Shapes: (captions, heads, text_length + given, D).
        """
        captions, heads, text, width = self.text_keys.shape
        kept = reads.read_from(keys.shape[2] - text).to(keys.device)
        pairs = (self.text_keys, self.keys, keys), (self.text_values, self.values, values)
        for shared, store, new in pairs:
            shared.copy_(new[:, :, :text])
            each = store.view(captions, -1, heads, reads.slots, width)
            each[:, :, :, reads.slot[kept]] = new[:, None, :, text + kept]


@dataclass(kw_only=True)
class Lane:
    """Candidates that are decoded together: `each` per caption, in the order of the captions."""

    captions: int
    each: int
    blocks: list[LayerCache] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Candidates in all."""
        return self.captions * self.each

    def part(self, first: int, end: int) -> "Lane":
        """The same memory of some captions, each with its only candidate."""
        blocks = [block.part(slice(first, end)) for block in self.blocks]
        return Lane(captions=end - first, each=1, blocks=blocks)

    def copy_text(self, source: int, target: int) -> None:
        """Copy a caption's keys and values of the text to another caption's."""
        for block in self.blocks:
            for store in (block.text_keys, block.text_values):
                store[target].copy_(store[source])

    @property
    def text_bytes(self) -> int:
        """Memory of the text's keys and values, which the candidates of a caption share."""
        return sum(_bytes(block.text_keys, block.text_values) for block in self.blocks)

    @property
    def image_bytes(self) -> int:
        """Memory of the candidates' own keys and values."""
        return sum(_bytes(block.keys, block.values) for block in self.blocks)

    @property
    def bytes(self) -> int:
        """Memory of the caches."""
        return self.text_bytes + self.image_bytes


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Shapes of one rank's caches, known from the config without weights."""

    config: PriorConfig
    kinds: tuple[Kind, ...]
    """The masks of this rank's layers."""
    heads: int
    """Attention heads of this rank."""
    dtype: torch.dtype
    together: int = 1
    """Most consecutive positions of a row that are decoded in one pass."""

    def reads(self, kind: Kind) -> Reads:
        """The slots of a kind of layer."""
        return reads_of(kind, *self.config.mask[1:], together=self.together)

    def lane(self, captions: int, each: int, device: torch.device) -> Lane:
        """Allocate empty caches for `each` candidates of every caption."""
        config, heads = self.config, self.heads
        width = config.dim // config.heads
        lane = Lane(captions=captions, each=each)

        def new(*shape: int) -> Tensor:
            return torch.zeros(*shape, width, dtype=self.dtype, device=device)

        for kind in self.kinds:
            slots = self.reads(kind).slots
            text, image = (captions, heads, config.text_length), (lane.rows * heads, slots)
            block = LayerCache(
                text_keys=new(*text), text_values=new(*text), keys=new(*image), values=new(*image)
            )
            lane.blocks.append(block)
        return lane

    def of_one(self) -> Lane:
        """The caches of one candidate on the meta device: sizes without memory."""
        return self.lane(1, 1, _META)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
