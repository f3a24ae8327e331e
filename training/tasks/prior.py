"""The prior, a transformer over text and image tokens, as a task of the training loop."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from core.errors import InputError
from core.keys import key_fraction, key_int
from data_pipeline.formats.manifest import TOKENS
from data_pipeline.formats.tokens import TokenRecord, TokenRecords, TokenSource
from data_pipeline.streaming.cache import open_cache
from data_pipeline.streaming.mixed_source import open_source, parts_of
from data_pipeline.text.bpe import load_tokenizer
from data_pipeline.text.dropout import DropoutEncoder
from data_pipeline.tokenize.figures import ENTROPY, per_position_entropy
from models.adapters import adapted
from models.config import PriorConfig
from models.prior import prior_program
from parallel.engines.protocol import Batch
from parallel.mesh import Mesh
from parallel.tensor.ops import TensorParallel
from parallel.world import ALONE, World
from training.config import PriorTrain
from training.data_requirements import refuse_unfit
from training.tasks.splits import UNREAD, Splits, open_splits
from training.tasks.task import Beat, Means, Pictures, no_beat, pad_text


def token_batch(records: Sequence[TokenRecord], text_length: int) -> Batch:
    """Text ids and image codes of token records, int64."""
    rows = records if isinstance(records, TokenRecords) else TokenRecords.of(records)
    image = torch.from_numpy(rows.image.astype(np.int64))
    return {"text": pad_text([row.text for row in rows], text_length), "image": image}


class PriorTask:
    """Training of the prior on token records."""

    unreadable = 0

    def __init__(
        self,
        settings: PriorTrain,
        tensor: TensorParallel,
        splits: Splits = UNREAD,
        world: World = ALONE,
    ) -> None:
        self._world = world
        data, cache = settings.data, open_cache(settings.loader)
        self.train = open_source(TokenSource, data, "train", splits["train"], cache)
        self.held_out = open_source(TokenSource, data, "validation", splits["validation"])
        refuse_unfit(settings, self.train, self.held_out)
        facts = self.train.manifest.facts
        self._settings, self._facts = settings, facts
        self._dropout = self._open_dropout()
        config = PriorConfig(
            **{
                **vars(settings.model),
                "text_vocabulary": facts["text_vocabulary"],
                "image_vocabulary": facts["image_vocabulary"],
                "grid": facts["grid"],
                "columns": facts.get("columns", 0),
            }
        )
        self._set_model(config, settings.loop.seed, tensor)

    def _set_model(self, config: PriorConfig, seed: int, tensor: TensorParallel) -> None:
        """Set the model's program; rehearsals call it with other sizes."""
        self.model_config, self.units = config, config.length
        program = prior_program(config, seed, tensor)
        self.program = adapted(program, self._settings.lora, seed)

    def batch(self, records: Sequence[TokenRecord], step: int, training: bool = True) -> Batch:
        if self._dropout and training:
            seed, again = self._settings.loop.seed, self._dropout.encode
            records = [replace(r, text=again(r.text, seed, step, r.id)) for r in records]
        if self._settings.caption_dropout and training:
            records = [self._maybe_empty(r, step) for r in records]
        return token_batch(records, self.model_config.text_length)

    def note_used(self, records: Sequence[TokenRecord]) -> None:
        """Token records hold no pictures that could be unreadable."""

    def text_lengths(self, records: Sequence[TokenRecord]) -> list[int]:
        """Tokens of each caption, before dropout."""
        return [len(text) for record in records for text in record.texts]

    def _maybe_empty(self, record: TokenRecord, step: int) -> TokenRecord:
        """Caption dropout: the record, or the same picture with an empty caption, by key."""
        drawn = key_fraction(self._settings.loop.seed, step, record.id, "caption drop")
        kept = drawn >= self._settings.caption_dropout
        return record if kept else replace(record, text=record.text[:0])

    def _open_dropout(self) -> DropoutEncoder | None:
        """Raises: InputError if the tokens were made with another tokenizer."""
        rate, folder = self._settings.bpe_dropout, self._settings.bpe
        if rate == 0 or not self.train.has_index:
            return None
        tokenizer, digest = load_tokenizer(folder)
        if digest != self._facts["tokenizer"]:
            raise InputError(
                f"{folder} is not the tokenizer that {self._settings.data} was made with; give "
                "that one's folder as --bpe, or --bpe-dropout 0"
            )
        return DropoutEncoder(tokenizer, rate)

    def facts(self) -> dict[str, Any]:
        names = ("dvae", "tokenizer", "grid", "columns")
        known = {key: self._facts[key] for key in names if key in self._facts}
        return {**known, "caption_dropout": self._settings.caption_dropout}

    def figures(
        self,
        means: Means,
        mine: Sequence[TokenRecord],
        records: Sequence[TokenRecord],
        beat: Beat = no_beat,
    ) -> tuple[dict[str, float], Pictures]:
        """Two baselines that the loss of a prior on held-out images must beat.

        shuffled_caption_loss: the image loss with permuted captions.
        per_position_entropy: mean over positions of the training codes' entropy; nats per token.
        """
        shift = 1 + key_int(self._settings.loop.seed, "shuffle") % max(len(records) - 1, 1)
        places = {id(record): i for i, record in enumerate(records)}

        def swap_captions(batch: Batch, start: int) -> Batch:
            part = mine[start : start + len(batch["text"])]
            others = [records[places[id(record)] - shift] for record in part]
            text = self.batch(others, 0, False)["text"]
            return {**batch, "text": text.to(batch["text"].device)}

        return {
            "shuffled_caption_loss": means(mine, swap_captions)["image_loss"],
            "per_position_entropy": self._entropy(),
        }, {}

    def _entropy(self) -> float:
        """The mean over the data sets by share: the entropy if each record's set is known."""
        parts = parts_of(self.train)
        return sum(float(part.share) * self._entropy_of(part.source) for part in parts)

    def _entropy_of(self, source: TokenSource) -> float:
        """The manifest's figure; of token sets without one, computed once a run by rank 0."""
        figures = source.manifest.figures
        if ENTROPY not in figures:
            entropy = 0.0
            if self._world.rank == 0:
                model, blocks = self.model_config, len(source.sizes)
                entropy = per_position_entropy(
                    source.read, blocks, model.image_length, model.image_vocabulary
                )
            figures[ENTROPY] = self._world.of_rank_0(entropy)
        return figures[ENTROPY]


def build(settings: PriorTrain, mesh: Mesh) -> PriorTask:
    """The task of `tapir train prior`."""
    splits = open_splits(settings.data, TOKENS, mesh)
    return PriorTask(settings, mesh.shared, splits, mesh.world)
