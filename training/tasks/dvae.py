"""The dVAE as a task of the training loop."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.together import by_all
from core.keys import key_int, keyed_rng
from data_pipeline.formats.manifest import RAW
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import dvae_crop, square
from data_pipeline.images.decode import Rgb
from data_pipeline.streaming.ahead import depth_of, prepared_ahead
from data_pipeline.streaming.cache import open_cache
from data_pipeline.streaming.mixed_source import first_of_each, open_source
from data_pipeline.streaming.readable import Crop, ReadablePairs
from data_pipeline.tokenize.encode import to_bytes, to_tensor
from models.config import DVAEConfig
from models.critics.fid import frechet_distance_of_sets
from models.critics.inception import Inception
from models.dvae import DVAE
from parallel.engines.protocol import Batch
from parallel.mesh import Mesh
from parallel.world import ALONE, World
from training.config import DVAETrain
from training.data_requirements import refuse_unfit
from training.schedules import cosine
from training.tasks.dvae_program import DVAELayer, ExtraLosses, dvae_program
from training.tasks.splits import UNREAD, Splits, open_splits
from training.tasks.task import Beat, Means, Pictures, no_beat, perplexity

SHOWN = 8
CALIBRATED = 256
"""Number of pictures for the calibrated initialisation."""
DECODED = 16
"""Pictures of a validation that a worker decodes together."""
TOGETHER = 4096
"""Maximum tokens per batch of a validation's figures."""
EXTRACTED = 32
"""Pictures of a validation between two signs of life of its FID."""


class DVAETask:
    """Training of the dVAE on pictures."""

    _inception: Inception | None = None
    """On rank 0, if validations report the reconstruction FID."""
    _world: World = ALONE

    def __init__(self, settings: DVAETrain, splits: Splits = UNREAD, world: World = ALONE) -> None:
        """Collective. Raises: InputError, e.g. for files that validations could not use."""
        self._world = world
        if settings.rfid is not None:
            self._set_inception(settings.rfid)
        data, cache = settings.data, open_cache(settings.loader)
        self.train = open_source(RawSource, data, "train", splits["train"], cache)
        self.held_out = open_source(RawSource, data, "validation", splits["validation"])
        refuse_unfit(settings, self.train, self.held_out)
        self._settings, self._readable = settings, ReadablePairs()
        layer = self._set_model(settings.model, settings.loop.seed, ExtraLosses.of(settings))
        if layer.perceptual is not None and settings.perceptual.vgg is not None:
            layer.perceptual.fill(settings.perceptual.vgg, settings.perceptual.linear)
        if settings.model.init == "calibrated":
            first = first_of_each(self.train, CALIBRATED)
            self.dvae.calibrate(self._squares(first, self.train), settings.loop.seed)

    def _set_model(self, config: DVAEConfig, seed: int, extra: ExtraLosses) -> DVAELayer:
        """Set the model and its program; rehearsals call it without reading any file."""
        self.model_config, self.units = config, config.tokens
        self.dvae = DVAE(config, seed)
        self.program = dvae_program(self.dvae, config, extra)
        layer = self.program.layers[0].build()
        assert isinstance(layer, DVAELayer), "the only layer"
        return layer

    def _set_inception(self, path: Path) -> None:
        """Read the whole network: wrong weights would end the run at its first validation."""
        world = self._world
        self._inception = by_all(
            world.gather_text, lambda: None if world.rank else Inception(path, world.device)
        )

    def batch(self, records: Sequence[RawRecord], step: int, training: bool = True) -> Batch:
        settings, seed = self._settings, self._settings.loop.seed
        keys = [key_int(seed, step, record.key, "gumbel") for record in records]
        done = step / settings.loop.steps
        tau = cosine(settings.tau_first, settings.tau_last, done / settings.tau_fraction)
        beta = cosine(settings.beta_first, settings.beta, done / settings.beta_fraction)
        if settings.model.quantizer != "gumbel":
            beta = settings.commitment
        batch = {
            "pixels": self._views(records, step)
            if training
            else self._squares(records, self.held_out),
            "keys": torch.tensor(keys, device="cpu"),
            "tau": torch.tensor(tau, device="cpu"),
            "beta": torch.tensor(beta, device="cpu"),
        }
        if settings.discriminator.weight:
            begun = float(done >= settings.discriminator.start)
            batch["adversarial"] = torch.tensor(begun, device="cpu")
        return batch

    @property
    def unreadable(self) -> int:
        return self._readable.passed_over

    def note_used(self, records: Sequence[RawRecord]) -> None:
        self._readable.note_used(records)

    def _squares(self, records: Sequence[RawRecord], source: RawSource) -> Tensor:
        return to_tensor(self._square_pixels(records, source))

    def _square_pixels(self, records: Sequence[RawRecord], source: RawSource) -> Any:
        """Central squares, (B, S, S, 3) uint8."""
        pixels = self.model_config.pixels
        return self._stacked(records, source, lambda _, picture: square(picture, pixels))

    def _views(self, records: Sequence[RawRecord], step: int) -> Tensor:
        """The augmented pictures of a training step, (B, 3, S, S)."""
        if not self._settings.augment:
            return self._squares(records, self.train)
        pixels, seed = self.model_config.pixels, self._settings.loop.seed

        def view(record: RawRecord, picture: Rgb) -> Rgb:
            return dvae_crop(picture, pixels, keyed_rng(seed, step, record.key, "augment"))

        return to_tensor(self._stacked(records, self.train, view))

    def _stacked(self, records: Sequence[RawRecord], source: RawSource, crop: Crop) -> Any:
        return np.stack([picture for _, picture in self._readable.decoded(records, source, crop)])

    def _held_out_squares(self, records: Sequence[RawRecord]) -> Tensor:
        """Central squares of held-out pictures, decoded by all of the loader's workers."""
        workers = self._settings.loader.workers
        parts = (records[i : i + DECODED] for i in range(0, len(records), DECODED))
        squares = prepared_ahead(
            parts,
            lambda part: [partial(self._square_pixels, part, self.held_out)],
            workers,
            depth_of(workers),
        )
        return to_tensor(np.concatenate([part for _, (part,) in squares]))

    def facts(self) -> dict[str, Any]:
        return {"raw": self.train.fingerprint}

    @torch.no_grad()
    def figures(
        self,
        means: Means,
        mine: Sequence[RawRecord],
        records: Sequence[RawRecord],
        beat: Beat = no_beat,
    ) -> tuple[dict[str, float], Pictures]:
        pixels = self._held_out_squares(records).to(next(self.dvae.parameters()).device)
        together = max(1, TOGETHER // self.model_config.tokens)
        codes = torch.cat([self.dvae.tokens(part) for part in pixels.split(together)])
        again = torch.cat([self.dvae.picture(part) for part in codes.split(together)])
        mse = float(((again - pixels) ** 2).mean())
        used = len(codes.unique())
        figures = {
            "perplexity": perplexity(codes),
            "codes_used": float(used),
            "codes_dead": float(self.model_config.codebook - used),
            "codebook_usage": used / min(self.model_config.codebook, codes.numel()),
            "psnr": -10 * float(np.log10(max(mse, 1e-10))),
        }
        if self._settings.rfid is not None:
            figures["rfid"] = self._rfid(pixels, again, beat)
        pictures = {"reconstructions": _rows(pixels[:SHOWN].cpu(), again[:SHOWN].cpu())}
        return figures, {**pictures, "codebook": codes.flatten().cpu().numpy()}

    def _rfid(self, pixels: Tensor, again: Tensor, beat: Beat) -> float:
        """The FID of reconstructions, which are the same on all ranks: rank 0 computes it."""
        distance = 0.0
        if self._inception is not None:
            distance = frechet_distance_of_sets(
                _features(self._inception, pixels, beat), _features(self._inception, again, beat)
            )
        return self._world.of_rank_0(distance)


def _features(network: Inception, pictures: Tensor, beat: Beat) -> np.ndarray:
    """(n, D) features of (n, 3, S, S) in [0, 1], in 8 bits; with a beat for every few."""
    rows: list[np.ndarray] = []
    for part in pictures.split(EXTRACTED):
        beat("rfid")
        rows.append(network(to_bytes(part))[0])
    return np.asarray(np.concatenate(rows))


def _rows(originals: Tensor, again: Tensor) -> np.ndarray:
    """Originals above their reconstructions, (2 * S, n * S, 3) uint8."""
    both = torch.stack([originals, again])
    grid = both.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return np.asarray(to_bytes(grid[None])[0])


def build(settings: DVAETrain, mesh: Mesh) -> DVAETask:
    """The task of `tapir train dvae`."""
    return DVAETask(settings, open_splits(settings.data, RAW, mesh), mesh.world)
