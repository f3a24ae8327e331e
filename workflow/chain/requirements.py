"""Check that the stages of a run fit one another, before the first one runs."""

from dataclasses import replace
from typing import Any

from cluster.chain import Scheduler
from core.errors import StoreError, TapirError
from core.log import LOG
from core.storage.mixture import data_sets
from core.storage.store import open_store
from data_pipeline.config import DRAWN, DRAWN_COUNT, PackConfig
from data_pipeline.formats.manifest import NAME, RAW, SPLITS, TOKENS, Manifest, read_manifest
from data_pipeline.sources.emoji import PIXELS as EMOJI_PIXELS
from training.data_requirements import (
    DataSizes,
    mixture_problems,
    model_size_problems,
    size_problems,
    sizes_of,
)
from workflow.run_file import RunFile

_OF_RAW = ("dvae", "clip")
"""Stages that are trained on raw pairs."""
_MODEL = "model.json"
"""The file of a finished model."""
Splits = tuple[Manifest, Manifest]
"""The manifests of train and validation."""


def chain_problems(run: RunFile, settings: dict[str, Any], to: Scheduler) -> list[str]:
    """Problems that a stage would have with an earlier one's output, as far as the file tells.

    `settings`: settings of each stage. For Kubernetes, a dVAE that no stage makes is not read,
    since this machine need not see its volumes.
    """
    problems = _model_problems(run, settings, to)
    if "pack" not in settings:
        return problems
    source, pack = run.stages["pack"].source, settings["pack"]
    if {"dvae", "tokenize"} <= settings.keys():
        problems += _picture_problems(source, pack, settings)
    for name in (*_OF_RAW, "prior"):
        if name not in settings or (name == "prior" and "tokenize" not in settings):
            continue
        block = settings["tokenize"].block if name == "prior" else pack.block
        sizes = planned_sizes(source, pack, block)
        sets = [each.place for each in data_sets(settings[name].data)]
        own = run.tokens if name == "prior" else run.raw
        if sizes is not None and (own in sets or len(sets) == 1):
            sizes = replace(sizes, alone=len(sets) == 1)
            problems += [f"stages.{name}: {text}" for text in size_problems(settings[name], sizes)]
    return problems


def planned_sizes(source: str, pack: PackConfig, block: int) -> DataSizes | None:
    """Expected sizes of what `pack` writes; None if they depend on the source."""
    count = pack.count or (DRAWN_COUNT if source in DRAWN else 0)
    if not count:
        return None
    held_out = round(count * pack.validation)
    train = count - held_out
    units, rest = divmod(count, pack.shard_pairs)  # each has a shard of either split
    blocks = units * _blocks(pack.shard_pairs, pack, block) + _blocks(rest, pack, block)
    return DataSizes(
        place=f"pack's {count} pairs",
        train=train,
        blocks=blocks,
        held_out=held_out,
        about="about ",
    )


def _blocks(pairs: int, pack: PackConfig, block: int) -> int:
    """Expected blocks of the train split of a unit."""
    return -(-round(pairs * (1 - pack.validation)) // block)


def packed_problems(run: RunFile, settings: dict[str, Any]) -> list[str]:
    """Problems that stages would have with existing data sets.

    Stores that cannot be reached from here, or that hold no data set yet, have none.
    Raises: InputError for a data set of another kind; CorruptError for a damaged manifest.
    """
    problems, seen = [], {}
    try:
        for name in (*_OF_RAW, "prior"):
            if name not in settings:
                continue
            kind, texts = TOKENS if name == "prior" else RAW, []
            sets = [each.place for each in data_sets(settings[name].data)]
            for place in sets:
                if (place, kind) not in seen:
                    seen[place, kind] = _splits(place, kind)
                splits = seen[place, kind]
                texts += _unfit(settings[name], place, splits, len(sets) == 1)
                if (
                    name == "prior"
                    and splits is None
                    and place == run.tokens
                    and "tokenize" in settings
                ):
                    texts += _unfit_before_tokens(run, settings, len(sets) == 1)
            texts += _unlike({place: seen[place, kind] for place in sets})
            problems += [f"stages.{name}: {text}" for text in texts]
    except (StoreError, OSError) as error:
        LOG.info("what is packed is not looked at: %s", error)
    return problems


def _splits(place: str, kind: str) -> Splits | None:
    """The manifests of a data set; None if one is missing."""
    store = open_store(place)
    if not all(store.exists(f"{split}/{NAME}") for split in SPLITS):
        return None
    train, held_out = (read_manifest(store, f"{split}/", kind) for split in SPLITS)
    return train, held_out


def _unfit(stage: Any, place: str, splits: Splits | None, alone: bool) -> list[str]:
    if splits is None:
        return []
    problems = size_problems(stage, sizes_of(place, *splits, alone))
    return problems + model_size_problems(stage.model, splits[0].facts, place)


def _unlike(sets: dict[str, Splits | None]) -> list[str]:
    """Problems of the existing sets of a mixture with one another."""
    trains = {place: splits[0] for place, splits in sets.items() if splits is not None}
    return mixture_problems(
        {place: train.facts for place, train in trains.items()},
        {place: train.fingerprint for place, train in trains.items()},
    )


def _unfit_before_tokens(run: RunFile, settings: dict[str, Any], alone: bool) -> list[str]:
    """Problems of a prior with tokens that are not made yet, from the number of existing pairs."""
    raw, block = _splits(run.raw, RAW), settings["tokenize"].block
    if raw is None:
        return []
    blocks = sum(-(-shard.samples // block) for shard in raw[0].shards)
    sizes = replace(sizes_of(run.raw, *raw, alone), blocks=blocks)
    return size_problems(settings["prior"], sizes)


def _picture_problems(source: str, pack: PackConfig, settings: dict[str, Any]) -> list[str]:
    """Problems of packed pictures smaller than the dVAE's, which the token job leaves out."""
    pixels, most = settings["dvae"].model.pixels, settings["tokenize"].max_rejects
    known = {name: times * pack.pixels for name, times in DRAWN.items()} | {"emoji": EMOJI_PIXELS}
    if max(known.get(source, 0), pack.filters.min_side) >= pixels:
        return []
    refused = (
        f"and the token job leaves out what is smaller than the dVAE's {pixels} (at its end it "
        f"refuses more than max_rejects={most} of that)"
    )
    if source in known:
        mend = "choose a smaller dVAE"
        if source in DRAWN:
            mend = f"set its flag pixels to {-(-pixels // DRAWN[source])}"
        return [f"stages.pack: {source} has {known[source]} pixels a side, {refused}; {mend}"]
    return [
        f"stages.pack: min_side={pack.filters.min_side} lets smaller pictures in, {refused}; set "
        f"its flag min_side to {pixels}"
    ]


def _model_problems(run: RunFile, settings: dict[str, Any], to: Scheduler) -> list[str]:
    """Problems of sizes that the image tokenizer and another model must share."""
    problems = []
    dvae, clip, prior = (settings.get(name) for name in ("dvae", "clip", "prior"))
    if dvae:
        place, pixels = "the dVAE", dvae.model.pixels
        facts = {"image_vocabulary": dvae.model.codebook, "grid": dvae.model.grid}
    elif (clip or prior) and to != "kubernetes" and (run.folder("dvae") / _MODEL).is_file():
        from training.export.tokenizers import facts_in  # noqa: PLC0415 - imports torch

        place = str(run.folder("dvae"))
        try:
            made = facts_in(run.folder("dvae"))
        except TapirError as error:
            return [f"stages: {error}"]
        pixels, facts = made.pixels, made.manifest()
    else:
        return []
    if prior and "tokenize" in settings:
        texts = model_size_problems(prior.model, facts, place)
        problems += [f"stages.prior: {text}" for text in texts]
    if clip and pixels != clip.model.pixels:
        problems.append(
            f"stages.clip: model.pixels={clip.model.pixels} cannot rank {place}'s pictures of "
            f"{pixels}; set its flag model.pixels to {pixels}"
        )
    return problems
