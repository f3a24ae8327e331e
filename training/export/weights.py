"""Reads and writes models of run folders: finished models as safetensors + JSON, or checkpoints."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.format import Reader
from checkpoint.reader import CheckpointReader, finished_steps
from checkpoint.tensors import Read, Shapes, file_parts
from core.config import from_json, with_new_names
from core.errors import CorruptError, InputError, joined
from core.files.atomic import Json, seal, unseal, write_atomic
from core.log import LOG
from core.storage.store import Store, open_store
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import build_prior
from models.tokenizers.config import TokenizerConfig
from models.tokenizers.registry import build_tokenizer
from parallel.placement import placement_of
from training.ema import EMA
from training.export.files import (
    CONFIG,
    SHARDS,
    WEIGHTS,
    WeightsFile,
    facts_with_new_names,
    open_weights,
    verify_index,
    verify_weights,
    with_article,
    write_weights,
)
from training.export.names import DESCRIPTION
from training.initial.source import ADAPTERS, merge
from training.run.config import config_of
from training.stages import config_with_new_names

TOKENIZER = "image_tokenizer"
"""Stage of an imported image tokenizer, which takes the place of a dVAE."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How models of a stage are built."""

    config: type
    build: Callable[[Any], nn.Module]
    prefix: str
    """Prefix of the global names before the network's own."""


KINDS = {
    "dvae": Kind(config=DVAEConfig, build=DVAE, prefix="dvae.dvae."),
    "prior": Kind(config=PriorConfig, build=build_prior, prefix=""),
    "clip": Kind(config=ClipConfig, build=Clip, prefix="clip."),
    TOKENIZER: Kind(config=TokenizerConfig, build=build_tokenizer, prefix=""),
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model of a run folder: its description, and its fp32 weights, read one at a time."""

    stage: str
    where: str
    """Path of its file or checkpoint, for messages."""
    config: Json
    """The network's sizes."""
    facts: Json
    """Facts about its training: data, step, numerics."""
    shapes: Shapes
    """Shapes by global name."""
    read: Read
    stated: str = ""
    """Digest in its description; empty for a checkpoint, and for a model in several files."""
    run: Json = field(default_factory=dict)
    """Settings of its run; empty if unknown."""

    @cached_property
    def digest(self) -> str:
        """sha256 of the model as one file; computed where it is stored otherwise."""
        if self.stated:
            return self.stated
        sha = hashlib.sha256()
        for part in file_parts(self.shapes, self.read):
            sha.update(part)
        return sha.hexdigest()


def write_model(
    folder: Path, stage: str, config: Json, facts: Json, shapes: Shapes, read: Read
) -> str:
    """Write a finished model (weights by global name, sizes, facts); returns its digest."""
    written = write_weights(folder / WEIGHTS, shapes, read, None)
    write_description(folder, stage, config, facts, [written])
    return written.sha256


def write_description(
    folder: Path, stage: str, config: Json, facts: Json, files: Sequence[WeightsFile]
) -> None:
    """Describe a model whose weights are written; before this, there is no finished model."""
    body: Json = {"stage": stage, "config": config, "facts": facts}
    if len(files) == 1:
        body["sha256"] = files[0].sha256
    else:
        body["files"] = [asdict(file) for file in files]
    write_atomic(folder / DESCRIPTION, seal(json.loads(json.dumps(body))))


def open_model(folder: Path, stage: str, step: int | None = None) -> Weights:
    """Open the finished model of a run folder, else its newest whole checkpoint; or that of `step`.

    Adapters are merged into their base.

    Raises: InputError if there is none; CorruptError if a byte changed.
    """
    if step is None and (folder / DESCRIPTION).is_file():
        return _whole(_finished(folder, stage), folder)
    return _whole(_unfinished(folder, stage, step), folder)


def describe(folder: Path, stage: str) -> Json:
    """Read the description of a finished model, and verify its weights.

    Raises: InputError if there is none; CorruptError if a byte changed.
    """
    body = read_description(folder, stage)
    files = _files(body)
    verify_weights(folder, files)
    if len(files) > 1:
        verify_index(folder, [name for name, _ in files])
    return body


def read_model(folder: Path, stage: str) -> tuple[Json, dict[str, Tensor]]:
    """Read a finished model: description and all weights."""
    weights = _whole(_finished(folder, stage), folder)
    body = {
        "stage": stage,
        "config": weights.config,
        "facts": weights.facts,
        "sha256": weights.digest,
    }
    return body, {name: weights.read(name) for name in weights.shapes}


def read_description(folder: Path, stage: str) -> dict[str, Any]:
    """Read a finished model's sizes, facts and digests; does not read its weights.

    `sha256` is that of a model in one file; one in several files has a row for each in `files`.

    Raises: InputError if there is none; CorruptError if a byte changed.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"there is no finished {stage} in {folder}; run `tapir train {stage}`")
    body = unseal(path.read_bytes(), str(path))
    if body["stage"] != stage:
        raise InputError(f"{folder} holds {with_article(body['stage'])}, not a {stage}")
    config = with_new_names(KINDS[stage].config, body["config"], str(path))
    return {**body, "config": config, "facts": facts_with_new_names(body["facts"])}


def model_is_whole(folder: Path, stage: str, step: int | None = None) -> bool:
    """True if a finished model (of `step`, if given) exists and is undamaged."""
    try:
        facts = describe(folder, stage)["facts"]
    except (CorruptError, InputError):
        return False
    return step in (None, facts.get("step"))


def load_dvae(folder: Path, step: int | None = None) -> tuple[DVAE, str]:
    """Load a dVAE; returns it with the sha256 of its weights."""
    weights = open_model(folder, "dvae", step)
    dvae: Any = build_model(weights)
    return dvae, weights.digest


def load_prior(
    folder: Path, step: int | None = None
) -> tuple[nn.ModuleDict, PriorConfig, dict[str, Any]]:
    """Load a prior; returns its layers, sizes and facts."""
    weights = open_model(folder, "prior", step)
    layers: Any = build_model(weights)
    return layers, from_json(PriorConfig, weights.config), weights.facts


def load_clip(folder: Path, step: int | None = None) -> tuple[Clip, dict[str, Any]]:
    """Load a CLIP reranker; returns it with its facts."""
    weights = open_model(folder, "clip", step)
    clip: Any = build_model(weights)
    return clip, weights.facts


@torch.no_grad()
def build_model(weights: Weights) -> nn.Module:
    """Build a network with its weights. Raises: CorruptError if some are missing or do not fit."""
    kind = KINDS[weights.stage]
    network = kind.build(from_json(kind.config, weights.config))
    fill(network, weights)
    return network.eval()


@torch.no_grad()
def fill(network: nn.Module, weights: Weights) -> None:
    """Load the parameters of a network, or of a rank's shard of one, by their placements.

    Raises: CorruptError if some are missing or do not fit.
    """
    prefix = KINDS[weights.stage].prefix
    named = network.named_parameters()
    parameters = {placement_of(p).tied_to or f"{prefix}{name}": p for name, p in named}
    wrong = sorted(
        n for n, p in parameters.items() if weights.shapes.get(n) != placement_of(p).shape
    )
    if wrong:
        raise CorruptError(f"{weights.where} lacks {wrong[:3]}, or holds them in another shape")
    for name, parameter in parameters.items():
        part, value = placement_of(parameter), weights.read(name)
        if part.split:
            parameter.zero_()
            parameter[: part.rows] = value[part.first : part.first + part.rows]
        else:
            parameter.copy_(value)


def network_shapes(stage: str, shapes: Shapes) -> Shapes:
    """The tensors of a checkpoint that belong to the network; a discriminator's do not."""
    prefix = KINDS[stage].prefix
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _files(body: Json) -> list[tuple[str, str]]:
    """(name, sha256) of the files of a described model."""
    if "files" in body:
        return [(row["file"], row["sha256"]) for row in body["files"]]
    return [(WEIGHTS, body["sha256"])]


def _finished(folder: Path, stage: str) -> Weights:
    body = describe(folder, stage)
    names = [name for name, _ in _files(body)]
    shapes, read = open_weights(folder, names)
    return Weights(
        stage=stage,
        where=str(folder / (WEIGHTS if len(names) == 1 else SHARDS)),
        config=body["config"],
        facts=body["facts"],
        shapes=shapes,
        read=read,
        stated=body.get("sha256", ""),
        run=config_of(folder) if (folder / CONFIG).is_file() else {},
    )


def _whole(weights: Weights, folder: Path) -> Weights:
    """Adapters merged into their base; any other model as it is.

    Raises: InputError if the base is gone or another one; CorruptError if a byte of it changed.
    """
    if ADAPTERS not in weights.facts:
        return weights
    merged = merge(weights.stage, weights.facts, (weights.shapes, weights.read), str(folder))
    if problems := merged.base.verify(0, 1):
        raise CorruptError(joined(problems))
    facts, shapes = merged.facts, merged.base.shapes
    return replace(weights, facts=facts, shapes=shapes, read=merged.tensor, stated="")


def _unfinished(folder: Path, stage: str, step: int | None) -> Weights:
    """Raises: InputError if there is no checkpoint, or it is of another stage."""
    reader = _whole_checkpoint(folder, stage, step)
    facts = reader.facts
    if facts["stage"] != stage:
        raise InputError(f"{folder} holds {with_article(facts['stage'])}, not a {stage}")
    if "task" not in facts:
        raise InputError(
            f"{reader.url} does not tell what it was trained on: an older Tapir wrote it; train "
            "on to the next checkpoint"
        )
    LOG.info("%s of %s: the weights of %s", stage, folder, reader.url)
    config = config_with_new_names(facts["config"], reader.url)
    told: Json = {name: facts[name] for name in ("numerics", "history") if name in facts}
    return Weights(
        stage=stage,
        where=reader.url,
        config=config["model"],
        facts={**facts_with_new_names(facts["task"]), **told, "step": facts["step"]},
        shapes=network_shapes(stage, reader.shapes()),
        read=partial(averaged_weight, reader),
        run=config,
    )


def saved_steps(folder: Path, stage: str) -> list[int]:
    """Steps of a run's checkpoints, oldest first. Raises: InputError if there is no run."""
    return finished_steps(_checkpoints(folder, stage))


def _checkpoints(folder: Path, stage: str) -> Store:
    if not (folder / CONFIG).is_file():
        raise InputError(f"there is no {stage} in {folder}; run `tapir train {stage}`")
    place = config_of(folder).get("checkpoint", {}).get("to") or str(folder / "checkpoints")
    return open_store(place)


def _whole_checkpoint(folder: Path, stage: str, step: int | None) -> CheckpointReader:
    """The newest undamaged checkpoint, or that of `step`."""
    store = _checkpoints(folder, stage)
    steps = finished_steps(store)
    if step is not None and step not in steps:
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
        raise InputError(f"{store.url} has no checkpoint of step {step}; {there}")
    for one in reversed(steps) if step is None else [step]:
        reader = CheckpointReader(store, f"step-{one}")
        try:
            reader.verify()
            return reader
        except CorruptError as error:
            if step is not None:
                raise
            LOG.warning("%s; trying an older checkpoint", error)
    raise InputError(
        f"there is neither a finished {stage} in {folder} nor a whole checkpoint in {store.url}; "
        f"run `tapir train {stage}`"
    )


def averaged_weight(reader: Reader, name: str) -> Tensor:
    """The EMA of a weight in a checkpoint, or the weight if there is none."""
    return reader.tensor(name, EMA if EMA in reader.kinds(name) else "master")
