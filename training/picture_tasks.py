"""The two tasks that read raw pairs: the dVAE and CLIP."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from core.keys import key_int, keyed_rng
from core.settings import check
from core.store import open_store
from data_pipeline.bpe import encode, load_tokenizer
from data_pipeline.cache import open_cache
from data_pipeline.images import dvae_crop
from data_pipeline.raw import RawRecord, RawSource
from data_pipeline.readable import ReadablePairs
from data_pipeline.stream import first_records
from data_pipeline.tokenize.encode import squares_of, to_tensor
from models.clip import Clip, caption_keys, contrastive_loss
from models.config import ClipConfig, DVAEConfig
from models.dvae import DVAE, negative_bound
from parallel.engines.protocol import Batch, Layer, Losses, Program
from parallel.world import World
from training.config import ClipTrain, DVAETrain
from training.needs import model_size_problems, refuse_unfit
from training.schedules import cosine
from training.tasks import Means, Pictures, pad_text, perplexity

SHOWN = 8
CALIBRATED = 256
"""Pictures that the dVAE's first scales are fitted to."""
TOGETHER = 4096
"""Tokens of the pictures that are looked at together in a validation."""


class DVAELayer(nn.Module):
    def __init__(self, dvae: DVAE) -> None:
        super().__init__()
        self.dvae = dvae

    def forward(self, batch: Batch) -> Any:
        terms, _ = self.dvae(batch["pixels"], batch["tau"], batch["keys"])
        return terms


class DVAETask:
    """Pictures -> codes -> pictures."""

    def __init__(self, settings: DVAETrain) -> None:
        store = open_store(settings.data)
        self.train = RawSource(store, "train", open_cache(settings.loader))
        self.held_out = RawSource(store, "validation")
        refuse_unfit(settings, self.train.manifest, self.held_out.manifest)
        self._settings, self._readable = settings, ReadablePairs()
        self.model_config = settings.model
        self.dvae = DVAE(settings.model, settings.loop.seed)
        if settings.model.start == "calibrated":
            first = first_records(self.train, CALIBRATED)
            self.dvae.calibrate(self._squares(first, self.train))
        self.program = dvae_program(self.dvae, settings.model)
        self.units = settings.model.tokens

    def batch(self, records: Sequence[RawRecord], step: int, training: bool = True) -> Batch:
        settings, seed = self._settings, self._settings.loop.seed
        keys = [key_int(seed, step, record.key, "gumbel") for record in records]
        done = step / settings.loop.steps
        tau = cosine(settings.tau_first, settings.tau_last, done / settings.tau_share)
        beta = cosine(settings.beta_first, settings.beta, done / settings.beta_share)
        return {
            "pixels": self._views(records, step)
            if training
            else self._squares(records, self.held_out),
            "keys": torch.tensor(keys, device="cpu"),
            "tau": torch.tensor(tau, device="cpu"),
            "beta": torch.tensor(beta, device="cpu"),
        }

    @property
    def unreadable(self) -> int:
        return self._readable.passed_over

    def _squares(self, records: Sequence[RawRecord], source: RawSource) -> Tensor:
        pictures = [picture for _, picture in self._readable.decoded(records, source)]
        return squares_of(pictures, self.model_config.pixels)

    def _views(self, records: Sequence[RawRecord], step: int) -> Tensor:
        """What a training step sees of some pictures, (B, 3, S, S)."""
        if not self._settings.augment:
            return self._squares(records, self.train)
        pixels, seed = self.model_config.pixels, self._settings.loop.seed
        decoded = self._readable.decoded(records, self.train)
        views = [
            dvae_crop(picture, pixels, keyed_rng(seed, step, record.key, "augment"))
            for record, (_, picture) in zip(records, decoded, strict=True)
        ]
        return to_tensor(np.stack(views))

    def facts(self) -> dict[str, Any]:
        return {"raw": self.train.fingerprint}

    @torch.no_grad()
    def figures(
        self, means: Means, mine: Sequence[RawRecord], records: Sequence[RawRecord]
    ) -> tuple[dict[str, float], Pictures]:
        pixels = self._squares(records, self.held_out).to(next(self.dvae.parameters()).device)
        together = max(1, TOGETHER // self.model_config.tokens)
        codes = torch.cat([self.dvae.tokens(part) for part in pixels.split(together)])
        again = torch.cat([self.dvae.picture(part) for part in codes.split(together)])
        mse = float(((again - pixels) ** 2).mean())
        used = len(codes.unique())
        figures = {
            "perplexity": perplexity(codes),
            "codes_used": float(used),
            "codes_dead": float(self.model_config.codebook - used),
            "codes_share": used / min(self.model_config.codebook, codes.numel()),
            "psnr": -10 * float(np.log10(max(mse, 1e-10))),
        }
        pictures = {"reconstructions": _rows(pixels[:SHOWN].cpu(), again[:SHOWN].cpu())}
        return figures, {**pictures, "codebook": codes.flatten().cpu().numpy()}


def dvae_program(dvae: DVAE, config: DVAEConfig) -> Program:
    """A dVAE as one layer, with its loss."""
    layer = DVAELayer(dvae)

    def loss(terms: Any, batch: Batch) -> Losses:
        bound = negative_bound(terms, batch["beta"], config)
        return {"loss": bound, "log_likelihood": terms.log_likelihood, "kl": terms.kl}

    return Program(
        layers=[Layer(name="dvae", build=lambda: layer)],
        loss=loss,
        losses=("loss", "log_likelihood", "kl"),
    )


class ClipTask:
    """Pictures against captions."""

    def __init__(self, settings: ClipTrain, world: World) -> None:
        store = open_store(settings.data)
        self.train = RawSource(store, "train", open_cache(settings.loader))
        self.held_out = RawSource(store, "validation")
        refuse_unfit(settings, self.train.manifest, self.held_out.manifest)
        self._settings, self._readable = settings, ReadablePairs()
        self._tokenizer, self._tokenizer_hash = load_tokenizer(settings.bpe)
        entries = self._tokenizer.get_vocab_size()
        check(model_size_problems(settings.model, {"text_vocabulary": entries}, "the tokenizer"))
        self.model_config = ClipConfig(**{**vars(settings.model), "text_vocabulary": entries})
        self.program = clip_program(Clip(self.model_config, settings.loop.seed), world)
        self.units = self.model_config.text_length

    def batch(self, records: Sequence[RawRecord], step: int, training: bool = True) -> Batch:
        pairs = self._readable.decoded(records, self.train if training else self.held_out)
        seed = self._settings.loop.seed
        captions = [r.drawn_caption(seed, step) if training else r.caption for r, _ in pairs]
        texts = [encode(self._tokenizer, caption) for caption in captions]
        return {
            "pixels": squares_of([picture for _, picture in pairs], self.model_config.pixels),
            "text": pad_text(texts, self.model_config.text_length),
        }

    def text_lengths(self, records: Sequence[RawRecord]) -> list[int]:
        """Tokens of each caption."""
        captions = (caption for record in records for caption in record.captions)
        return [len(encode(self._tokenizer, caption)) for caption in captions]

    @property
    def unreadable(self) -> int:
        return self._readable.passed_over

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer_hash, "raw": self.train.fingerprint}

    def figures(
        self, means: Means, mine: Sequence[RawRecord], records: Sequence[RawRecord]
    ) -> tuple[dict[str, float], Pictures]:
        return {}, {}


def clip_program(clip: Clip, world: World) -> Program:
    """CLIP as one layer; in training each pair is compared with those of all ranks."""

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
    """All-gather rows; the gradient of a row is the sum of what all ranks made of it."""

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


def _rows(originals: Tensor, again: Tensor) -> np.ndarray:
    """Originals above their reconstructions, (2 * S, n * S, 3) uint8."""
    both = torch.stack([originals, again])
    grid = both.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return np.asarray((grid * 255).round().clamp(0, 255).byte().numpy())
