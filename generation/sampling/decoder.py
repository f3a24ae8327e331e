"""Decode image tokens with KV caches on a prior, or on one pipeline stage of it.

The layers are those of models/prior.py with weights packed for few rows; attention reads only the
cache slots that the masks allow. `start` prefills the text and the given image tokens, then `next`
runs one token at a time. With tensor parallelism each rank holds its heads and channels; with a
pipeline each rank holds its layers, and hidden states are sent to the next stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from generation.sampling.decoder_block import DecoderBlock, turns_of
from generation.sampling.kv_cache import (
    CachePosition,
    CacheShape,
    Lane,
    LayerCache,
    RowPositions,
)
from generation.sampling.packed_linear import PackedLinear
from generation.sampling.pipeline import Leader, Neighbours
from models.attention.masks import Kind
from models.attention.rotary import Turns
from models.config import PriorConfig
from models.prior import PriorBlock, PriorEmbedding, PriorHead
from parallel.tensor.ops import TensorParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
"""Of a decoder's activations, by its precision."""


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
    lead: Leader = field(default_factory=Leader)
    """Rank 0, which decides what the ranks decode together."""


class Decoder:
    """This rank's layers, packed; all ranks of a model call the same methods together."""

    def __init__(
        self, part: LocalPrior, precision: str = "fp32", one_row: bool = False, together: int = 1
    ) -> None:
        """`one_row`: lay out a CPU's weights and caches for one candidate at a time.

        `together`: most positions of a candidate that `next` decodes in one pass.
        """
        self.config, self.neighbours, self._tensor = part.config, part.neighbours, part.tensor
        self.least, self.lead = part.least, part.lead
        modules, config = list(part.layers.values()), part.config
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
            DecoderBlock(
                module,
                int(name.removeprefix("block")) + 1,
                config,
                part.tensor,
                dtype=dtype,
                one_row=one_row,
                eight=precision == "int8",
            )
            for name, module in blocks
        ]
        self.caches = CacheShape(
            config=config,
            kinds=tuple(block.kind for block in self._blocks),
            heads=self._blocks[0].heads if self._blocks else 0,
            dtype=torch.float32 if one_row else dtype,
            together=together,
        )
        kinds = self.caches.kinds
        self._reads = {kind: self.caches.reads(kind).to(self.device) for kind in kinds}
        self._positions = torch.arange(config.image_length, device=self.device)
        self._turns = turns_of(config, self.device)
        self._compiled: Any = None
        if self.device.type == "cuda":
            self.compile("reduce-overhead")

    def compile(self, mode: str | None = None) -> None:
        """Compile the step; with mode reduce-overhead, it becomes one CUDA graph."""
        self._compiled = torch.compile(self._run, mode=mode, dynamic=False)

    @property
    def compiled(self) -> bool:
        """True if all steps of a lane must have the same number of rows."""
        return self._compiled is not None

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
        self.prefill(lane, text, given)
        return lane

    @torch.no_grad()
    def prefill(self, lane: Lane, text: Tensor, given: Tensor) -> None:
        """Fill a lane's caches with its captions and given codes; shapes as of `start`."""
        x = self._entrance(text, given)
        for block, cache in zip(self._blocks, lane.blocks, strict=True):
            x = block.start(x, cache, self._reads[block.kind])
        if self._head is None:
            self.neighbours.send(x)

    @torch.no_grad()
    def next(self, lane: Lane, position: int | Tensor, before: Tensor) -> Tensor | None:
        """Logits of the code at an image position, on the last stage; None on the others.

        `position`: of all rows, or (rows,) int64 on the device, of each in a lane with one
        candidate a caption, or (rows, n): n consecutive ones of each.
        Shapes: before (rows,) or (rows, n), the codes one position earlier (unused at position 0)
        -> (rows, codes) or (rows * n, codes).
        """
        if self._embedding is not None:
            x = self._embed(position, before)
        else:
            x = self.neighbours.receive((before.numel(), self.config.dim), self.device)
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

    def _embed(self, position: int | Tensor, before: Tensor) -> Tensor:
        embedding, before = self._embedding, before.flatten()
        assert embedding is not None
        position = position.flatten() if isinstance(position, Tensor) else position
        start = embedding.start.weight[1].expand(len(before), -1)
        token: Tensor = start
        if isinstance(position, Tensor):
            token = torch.where(position[:, None] > 0, embedding.image(before), start)
        elif position:
            token = embedding.image(before)
        if not embedding.learned:
            return token
        columns = self.config.grid_columns
        row, column = position // columns, position % columns
        place: Tensor = embedding.row.weight[row] + embedding.column.weight[column]
        return token + place

    def _step(self, x: Tensor, lane: Lane, position: int | Tensor) -> Tensor:
        if isinstance(position, Tensor):
            of_rows: Tensor = (self._compiled or self._run)(x, lane.blocks, position)
            return of_rows
        at = self._positions[position : position + 1]
        if self._compiled is None:
            places = {kind: reads.cache_position(position) for kind, reads in self._reads.items()}
            return self._through(x, lane.blocks, places, self._turns_at(at))
        states: Tensor = self._compiled(x, lane.blocks, at)
        return states

    def _run(self, x: Tensor, caches: Sequence[LayerCache], at: Tensor) -> Tensor:
        """One step with the same shapes at every position; `at` is (1,), (rows,) or (rows, n).

        As a CUDA graph needs, only x and `at` change their address between steps of a lane.
        """
        places: dict[Kind, CachePosition | RowPositions] = {}
        for kind, reads in self._reads.items():
            shared = at.numel() < len(x) or len(x) == 1
            places[kind] = (
                reads.cache_position_at(at)
                if shared
                else reads.row_positions(at, self.caches.heads)
            )
        return self._through(x, caches, places, self._turns_at(at.flatten()))

    def _through(
        self,
        x: Tensor,
        caches: Sequence[LayerCache],
        places: Mapping[Kind, CachePosition | RowPositions],
        turns: Turns | None,
    ) -> Tensor:
        for block, cache in zip(self._blocks, caches, strict=True):
            x = block.next(x, cache, places[block.kind], turns)
        return x

    def _turns_at(self, at: Tensor) -> Turns | None:
        """The turns of image positions, (n, 1, D / 2) each; `at` is (n,)."""
        if self._turns is None:
            return None
        place = at + self.config.text_length
        return self._turns[0].index_select(0, place), self._turns[1].index_select(0, place)
