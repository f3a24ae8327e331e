"""What a stage needs of its data set, asked of what the manifests say; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.config import check
from data_pipeline.formats.manifest import Manifest
from training.config import StageConfig

MADE_FROM_DATA = ("text_vocabulary", "image_vocabulary", "grid")
"""Sizes of a model that its data decide; 0 in the settings = theirs."""


@dataclass(frozen=True, kw_only=True)
class DataSizes:
    """How much of a data set there is to read."""

    place: str
    """Where, as a message says it."""
    train: int
    """Pairs to train on."""
    blocks: int
    """Blocks that they are read in."""
    held_out: int
    """Pairs of the validation split."""
    about: str = ""
    """`about `, for what is not packed yet."""


def sizes_of(place: str, train: Manifest, held_out: Manifest) -> DataSizes:
    """The sizes of a data set that is there."""
    blocks = sum(shard.blocks for shard in train.shards) // train.variants
    return DataSizes(place=place, train=train.samples, blocks=blocks, held_out=held_out.samples)


def size_problems(settings: StageConfig, sizes: DataSizes) -> list[str]:
    """Why a stage could not train on so much data, or not validate."""
    lanes, batch, problems = settings.order.lanes, settings.loop.global_batch_size, []
    if sizes.held_out < lanes:
        problems.append(
            f"the validation split of {sizes.place} has {sizes.about}{sizes.held_out} pairs, and a "
            f"validation needs one for each of order.lanes={lanes} at least; pack more pairs or a "
            "larger --validation share, or lower order.lanes"
        )
    if sizes.train < batch or sizes.blocks < lanes:
        problems.append(
            f"the train split of {sizes.place} has {sizes.about}{sizes.train} pairs in "
            f"{sizes.blocks} blocks, which fill no batch of loop.global_batch_size={batch} over "
            f"order.lanes={lanes}: every lane needs a block; lower loop.global_batch_size or "
            "order.lanes, or make smaller blocks (--block of pack and tokenize)"
        )
    return problems


def model_size_problems(model: Any, facts: Mapping[str, Any], place: str) -> list[str]:
    """Which sizes of a model are not those of the data; `facts` are the data's."""
    return [
        f"model.{name}={asked} is not that of {place}, {facts[name]}; leave it out"
        for name in MADE_FROM_DATA
        if name in facts and (asked := getattr(model, name, 0)) not in (0, facts[name])
    ]


def refuse_unfit(settings: Any, train: Manifest, held_out: Manifest) -> None:
    """Raise ConfigError, before a model is built, if a stage cannot run to its end on its data."""
    problems = size_problems(settings, sizes_of(settings.data, train, held_out))
    check(problems + model_size_problems(settings.model, train.facts, settings.data))
