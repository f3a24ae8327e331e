"""Checks of a stage's settings against the manifests of its data set; imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.config import check
from core.storage.mixture import data_sets
from data_pipeline.formats.manifest import Manifest
from data_pipeline.streaming.mixed_source import parts_of
from training.config import StageConfig

MADE_FROM_DATA = ("text_vocabulary", "image_vocabulary", "grid", "columns")
"""Model sizes that the data determine; 0 in the settings = taken from the data."""
_OF_TOKENS = ("dvae", "tokenizer", *MADE_FROM_DATA)
"""Facts in which the token sets of a mixture must agree."""


@dataclass(frozen=True, kw_only=True)
class DataSizes:
    """The sizes of a data set."""

    place: str
    """The place of the data set, for messages."""
    train: int
    """Pairs to train on."""
    blocks: int
    """Blocks of the train split."""
    held_out: int
    """Pairs of the validation split."""
    about: str = ""
    """`about ` if the data set is not packed yet, for messages."""
    alone: bool = True
    """False for a set of a mixture, which need not fill a batch."""


def sizes_of(place: str, train: Manifest, held_out: Manifest, alone: bool = True) -> DataSizes:
    """The sizes of an existing data set."""
    blocks = sum(shard.blocks for shard in train.shards) // train.variants
    return DataSizes(
        place=place,
        train=train.samples,
        blocks=blocks,
        held_out=held_out.samples,
        alone=alone,
    )


def size_problems(settings: StageConfig, sizes: DataSizes) -> list[str]:
    """Reasons why a stage cannot train or validate on a data set of these sizes."""
    lanes, batch, problems = settings.order.lanes, settings.loop.global_batch_size, []
    if sizes.held_out < lanes:
        problems.append(
            f"the validation split of {sizes.place} has {sizes.about}{sizes.held_out} pairs, and a "
            f"validation needs one for each of order.lanes={lanes} at least; pack more pairs or a "
            "larger --validation, or lower order.lanes"
        )
    if sizes.alone and sizes.train < batch:
        problems.append(
            f"the train split of {sizes.place} has {sizes.about}{sizes.train} pairs, which fill no "
            f"batch of loop.global_batch_size={batch}; pack more pairs, or lower it"
        )
    elif sizes.blocks < lanes:
        problems.append(_few_blocks(settings, sizes))
    return problems


def _few_blocks(settings: StageConfig, sizes: DataSizes) -> str:
    lanes, replicas = settings.order.lanes, settings.mesh.data
    block = 2 ** int(math.log2(max(1, sizes.train // (2 * lanes))))
    fit = [n for n in range(sizes.blocks, 0, -1) if lanes % n == 0 and n % replicas == 0]
    fewer = f"--order.lanes {fit[0]}, or " if fit else ""
    return (
        f"the train split of {sizes.place} has {sizes.about}{sizes.train} pairs in {sizes.blocks} "
        f"blocks, and each of order.lanes={lanes} needs one; give {fewer}smaller blocks: pack and "
        f"tokenize with --block {block} into a new folder"
    )


def model_size_problems(model: Any, facts: Mapping[str, Any], place: str) -> list[str]:
    """Model sizes that differ from the data's; `facts` are those of its manifest."""
    if "grid" in facts:  # which names the columns only of grids that are not square
        facts = {"columns": facts["grid"], **facts}
    return [
        f"model.{name}={asked} is not that of {place}, {facts[name]}; leave it out"
        for name in MADE_FROM_DATA
        if name in facts and (asked := getattr(model, name, 0)) not in (0, facts[name])
    ]


def mixture_problems(
    facts: Mapping[str, Mapping[str, Any]], fingerprints: Mapping[str, str]
) -> list[str]:
    """Reasons why data sets cannot be mixed; `facts` and `fingerprints`: of each, by place."""
    first = next(iter(facts), "")
    expected, others = facts.get(first, {}), list(facts.items())[1:]
    problems = [
        f"{place} has {name}={own.get(name)!r}, and {first} has {name}={expected.get(name)!r}; "
        "sets of a mixture must be tokenized with the same dVAE and tokenizer"
        for place, own in others
        for name in _OF_TOKENS
        if (name in expected or name == "columns") and own.get(name) != expected.get(name)
    ]
    places = {fingerprint: place for place, fingerprint in reversed([*fingerprints.items()])}
    return problems + [
        f"{place} is a copy of {places[fingerprint]}; give it once, with both shares' sum"
        for place, fingerprint in fingerprints.items()
        if places[fingerprint] != place
    ]


def refuse_unfit(settings: Any, train: Any, held_out: Any) -> None:
    """Raise ConfigError if a stage cannot train and validate on its data; needs no model.

    `train` and `held_out` are the sources of its splits: SplitSource or MixedSource.
    """
    sets, problems = data_sets(settings.data), []
    trains, others = ([part.source for part in parts_of(each)] for each in (train, held_out))
    for each, source, other in zip(sets, trains, others, strict=True):
        sizes = DataSizes(
            place=each.place,
            train=source.manifest.samples,
            blocks=len(source.sizes),
            held_out=other.manifest.samples,
            alone=len(sets) == 1,
        )
        problems += size_problems(settings, sizes)
        problems += model_size_problems(settings.model, source.manifest.facts, each.place)
    facts = {s.place: source.manifest.facts for s, source in zip(sets, trains, strict=True)}
    prints = {s.place: source.fingerprint for s, source in zip(sets, trains, strict=True)}
    check(problems + mixture_problems(facts, prints))
