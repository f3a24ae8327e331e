"""Opens and imports image tokenizers: a trained dVAE, or an imported one, both as run folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import check, from_json, to_json
from core.errors import InputError, TapirError
from core.log import LOG
from models.config import DVAEConfig
from models.tokenizers.config import ReadOptions, TokenizerConfig, TokenizerFacts, TokenizerSizes
from models.tokenizers.protocol import (
    DVAETokenizer,
    ImageTokenizer,
    NetworkTokenizer,
    Precision,
)
from models.tokenizers.registry import kind_of, recognised, size_problems, sizes_of
from parallel.device import CPU
from training.export.files import refuse_import_into
from training.export.misfits import misfits
from training.export.names import DESCRIPTION
from training.export.weights import (
    TOKENIZER,
    Weights,
    build_model,
    describe,
    open_model,
    write_model,
)

DVAE_STAGE = "dvae"


def stage_of(folder: Path) -> str:
    """The stage by which the tokenizer of a folder was made: a dVAE's training, or an import."""
    try:
        stage = json.loads((folder / DESCRIPTION).read_bytes())["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return DVAE_STAGE  # a run that still trains, or nothing: that reader tells
    return TOKENIZER if stage == TOKENIZER else DVAE_STAGE


def open_weights_of(folder: Path, step: int | None = None) -> Weights:
    """The weights of a folder's tokenizer. Raises: as `open_model`."""
    return open_model(folder, stage_of(folder), step)


def describe_tokenizer(folder: Path) -> None:
    """Verify the weights of a finished tokenizer. Raises: as `describe`."""
    describe(folder, stage_of(folder))


def facts_of(weights: Weights) -> TokenizerFacts:
    """The facts of a tokenizer, without building its network."""
    if weights.stage == TOKENIZER:
        config = from_json(TokenizerConfig, weights.config)
        return TokenizerFacts.of(config.kind, sizes_of(config), weights.digest)
    return TokenizerFacts.of_dvae(from_json(DVAEConfig, weights.config), weights.digest)


def facts_in(folder: Path) -> TokenizerFacts:
    """The facts of a folder's tokenizer, without building its network. Raises: as `open_model`."""
    return facts_of(open_weights_of(folder))


def open_tokenizer(
    folder: Path,
    device: torch.device = CPU,
    precision: Precision = "fp32",
    step: int | None = None,
) -> ImageTokenizer:
    """Load the tokenizer of a folder onto a device.

    `precision` is the encoder's; pictures are always decoded in fp32.
    Raises: InputError if there is none; CorruptError if a byte changed; ConfigError if the plug-in
    or package that it needs is missing.
    """
    weights = open_weights_of(folder, step)
    facts = facts_of(weights)
    check(facts.problems())
    network: Any = build_model(weights).to(device)
    if weights.stage == TOKENIZER:
        return NetworkTokenizer(network, facts, precision)
    return DVAETokenizer(network, weights.digest, precision)


def import_tokenizer(path: Path, out: Path, name: str, options: ReadOptions) -> TokenizerFacts:
    """Convert another project's tokenizer to a finished model in the folder `out`.

    `name` is its kind; empty: recognised by its files.
    Raises: InputError if the files are not of that kind or hold values like NaN, or `out` is not
    new; ConfigError if the sizes do not fit.
    """
    refuse_import_into(out, path)
    name = name or recognised(path)
    try:
        sizes, tensors = _read(path, name, options)
    except TapirError:
        raise
    except Exception as error:  # a plug-in's reader, or what no check foresees in a foreign file
        raise InputError(
            f"{path} cannot be read as a {name} tokenizer ({type(error).__name__}: {error}); give "
            "the whole files of one, or name another kind by --from"
        ) from error
    config = TokenizerConfig(kind=name, sizes=to_json(sizes))
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{path}: {broken[0]} holds values like NaN; the tokenizer is of no use")
    facts: dict[str, object] = {"imported": name}
    read = _contiguous(tensors)
    digest = write_model(out, TOKENIZER, vars(config), facts, shapes, read.__getitem__)
    made = TokenizerFacts.of(name, sizes, digest)
    LOG.info("%s: %d codes on %d x %d tokens", out, made.codebook, made.rows, made.columns)
    return made


def _read(
    path: Path, name: str, options: ReadOptions
) -> tuple[TokenizerSizes, Mapping[str, Tensor]]:
    """The sizes of a foreign tokenizer, and weights of the shapes that its network needs."""
    sizes, tensors = kind_of(name).read(path, options)
    config = TokenizerConfig(kind=name, sizes=to_json(sizes))
    check(size_problems(config))
    if wrong := misfits(TOKENIZER, config, {k: tuple(v.shape) for k, v in tensors.items()}):
        raise InputError(
            f"{path} is not one whole {name} tokenizer: {len(wrong)} tensors do not fit its sizes, "
            f"such as {wrong[0]}; give all weights of one model, with the sizes of the same"
        )
    return sizes, tensors


def _contiguous(tensors: Any) -> dict[str, Tensor]:
    return {key: value.float().contiguous() for key, value in tensors.items()}
