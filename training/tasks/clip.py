"""The CLIP reranker as a task of the training loop."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from core.config import check
from data_pipeline.formats.manifest import RAW
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import square
from data_pipeline.streaming.cache import open_cache
from data_pipeline.streaming.mixed_source import open_source
from data_pipeline.streaming.readable import ReadablePairs
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.tokenize.encode import to_tensor
from models.clip import Clip, caption_keys, contrastive_loss
from models.config import ClipConfig
from parallel.engines.protocol import Batch, Layer, Losses, Program
from parallel.mesh import Mesh
from parallel.world import World
from training.config import ClipTrain
from training.data_requirements import model_size_problems, refuse_unfit
from training.tasks.splits import UNREAD, Splits, open_splits
from training.tasks.task import Beat, Means, Pictures, no_beat, pad_text


class ClipTask:
    """Contrastive training on pictures and captions."""

    def __init__(self, settings: ClipTrain, world: World, splits: Splits = UNREAD) -> None:
        data, cache = settings.data, open_cache(settings.loader)
        self.train = open_source(RawSource, data, "train", splits["train"], cache)
        self.held_out = open_source(RawSource, data, "validation", splits["validation"])
        refuse_unfit(settings, self.train, self.held_out)
        self._settings, self._readable = settings, ReadablePairs()
        self._tokenizer, self._tokenizer_hash = load_tokenizer(settings.bpe)
        entries = self._tokenizer.get_vocab_size()
        check(model_size_problems(settings.model, {"text_vocabulary": entries}, "the tokenizer"))
        config = ClipConfig(**{**vars(settings.model), "text_vocabulary": entries})
        self._set_model(config, settings.loop.seed, world)

    def _set_model(self, config: ClipConfig, seed: int, world: World) -> None:
        """Set the model's program; rehearsals call it with other sizes."""
        self.model_config, self.units = config, config.text_length
        self.program = clip_program(Clip(config, seed), world)

    def batch(self, records: Sequence[RawRecord], step: int, training: bool = True) -> Batch:
        source, pixels = self.train if training else self.held_out, self.model_config.pixels
        pairs = self._readable.decoded(records, source, lambda _, picture: square(picture, pixels))
        seed = self._settings.loop.seed
        captions = [r.drawn_caption(seed, step) if training else r.caption for r, _ in pairs]
        texts = [encode(self._tokenizer, caption) for caption in captions]
        return {
            "pixels": to_tensor(np.stack([picture for _, picture in pairs])),
            "text": pad_text(texts, self.model_config.text_length),
        }

    def text_lengths(self, records: Sequence[RawRecord]) -> list[int]:
        """Tokens of each caption."""
        captions = (caption for record in records for caption in record.captions)
        return [len(encode(self._tokenizer, caption)) for caption in captions]

    @property
    def unreadable(self) -> int:
        return self._readable.passed_over

    def note_used(self, records: Sequence[RawRecord]) -> None:
        self._readable.note_used(records)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer_hash, "raw": self.train.fingerprint}

    def figures(
        self,
        means: Means,
        mine: Sequence[RawRecord],
        records: Sequence[RawRecord],
        beat: Beat = no_beat,
    ) -> tuple[dict[str, float], Pictures]:
        return {}, {}


def clip_program(clip: Clip, world: World) -> Program:
    """CLIP as one layer; in training the contrastive loss is over the pairs of all ranks."""

    def everywhere(rows: Tensor) -> Tensor:
        out: Tensor = _GatherRows.apply(rows, world)
        return out

    def loss(output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Losses:
        together = world.group is not None and torch.is_grad_enabled()
        offset = world.rank * len(output[0]) if together else 0
        gather = everywhere if together else _alone
        return contrastive_loss(*output, caption_keys(batch["text"]), gather, offset)

    return Program(
        layers=[Layer(name="clip", build=lambda: clip)],
        loss=loss,
        losses=("loss", "accuracy"),
    )


class _GatherRows(Function):
    """All-gather rows; the backward pass all-reduces the gradient and takes this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(parts, rows.contiguous(), group=world.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.world.group)
        start = ctx.world.rank * ctx.count
        return total[start : start + ctx.count], None


def _alone(rows: Tensor) -> Tensor:
    return rows


def build(settings: ClipTrain, mesh: Mesh) -> ClipTask:
    """The task of `tapir train clip`."""
    return ClipTask(settings, mesh.world, open_splits(settings.data, RAW, mesh))
