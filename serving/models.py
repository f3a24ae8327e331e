"""Which models a server has, and whether their folders hold what they should, before it listens.

Reads descriptions alone, not weights; what it cannot see, the ranks tell when they load. Imports no
torch.
"""

from pathlib import Path
from typing import Any

from core.config import check
from core.errors import InputError, TapirError
from core.files.atomic import sha256, unseal
from core.log import LOG
from core.renamed import FACTS, renamed
from data_pipeline.text.bpe import FILE as TOKENIZER
from generation.choose_models import own_set
from generation.config import ModelPaths
from generation.shipped import paths_of, shipped_models, shipped_names
from serving.config import DEFAULT_MODEL, ServeConfig
from training.export.names import CHECKPOINTS, DESCRIPTION, OPEN_CLIP_CONFIG

_STAGES = {"prior": ("prior",), "dvae": ("dvae", "image_tokenizer"), "clip": ("clip",)}
"""Stages by which the model of a folder may have been made."""


def served_models(config: ServeConfig) -> dict[str, ModelPaths]:
    """Run folders by the models' names; the first one is the default.

    Without any in the settings: the newest own set, else all shipped ones.
    Raises: ConfigError with every problem of their folders; InputError if there are no models.
    """
    models = config.paths() or _unnamed(config.rerank)
    check([x for name, paths in models.items() for x in folder_problems(name, paths, config)])
    return models


def folder_problems(name: str, paths: ModelPaths, config: ServeConfig) -> list[str]:
    """What the folders of a model lack, and what in them does not fit together or the settings."""
    whole = paths.prior.parent
    if not whole.is_dir():
        return [f"{name}: there is no folder {whole}; give one with prior, dvae, clip and bpe"]
    problems, described = [], dict[str, dict[str, Any]]()
    for part in ("prior", "dvae", *(["clip"] if config.rerank else [])):
        folder: Path = getattr(paths, part)
        try:
            described[part] = _description(folder, part)
        except TapirError as error:
            problems.append(f"{name}: {error}")
    if not (paths.bpe / TOKENIZER).is_file():
        problems.append(f"{name}: there is no {paths.bpe / TOKENIZER}; `tapir train bpe` makes it")
    return problems or [f"{name}: {x}" for x in _misfits(paths, described, config.rows)]


def _unnamed(rerank: bool) -> dict[str, ModelPaths]:
    if (own := own_set(rerank)) is not None:
        LOG.info("models: your own in %s (others: NAME=FOLDER)", own)
        return {DEFAULT_MODEL: paths_of(own)}
    shipped = {name: shipped_models(name) for name in shipped_names()}
    if not shipped:
        raise InputError(
            "there are no models in runs/, and this installation has no shipped ones: run "
            "`tapir demo`, or name a folder with prior, dvae, clip and bpe as NAME=FOLDER"
        )
    LOG.info("models: shipped with Tapir: %s", ", ".join(shipped))
    return shipped


def _description(folder: Path, part: str) -> dict[str, Any]:
    """A finished model's description; empty if it is read from a checkpoint or by open_clip.

    Raises: InputError if the folder has no such model; CorruptError if a byte changed.
    """
    path = folder / DESCRIPTION
    if part == "clip" and (folder / OPEN_CLIP_CONFIG).is_file():
        return {}
    if path.is_file():
        body = unseal(path.read_bytes(), str(path))
        if body["stage"] not in _STAGES[part]:
            raise InputError(f"{folder} holds a {body['stage']}, not a {part}")
        return {**body, "facts": renamed(FACTS, body["facts"])}
    if next(folder.glob(CHECKPOINTS), None) is None:
        more = "; or serve without ranking: --no-rerank" if part == "clip" else ""
        raise InputError(
            f"there is no {part} in {folder}, neither finished ({DESCRIPTION}) nor a checkpoint; "
            f"`tapir train {part}` makes it{more}"
        )
    return {}


def _misfits(paths: ModelPaths, described: dict[str, dict[str, Any]], rows: int) -> list[str]:
    """What finished models say of each other, and the rows that a prior needs."""
    problems = []
    facts = {part: body["facts"] for part, body in described.items() if body}
    dvae = described["dvae"].get("sha256")
    prior = {} if paths.step is not None else facts.get("prior", {})
    if dvae and prior.get("dvae", dvae) != dvae:
        problems.append(f"the prior in {paths.prior} was trained on another dVAE than {paths.dvae}")
    tokenizer = sha256((paths.bpe / TOKENIZER).read_bytes())
    problems += [
        f"the {name} in {folder} was trained with another tokenizer than {paths.bpe}"
        for name, folder, known in (
            ("prior", paths.prior, prior),
            ("CLIP", paths.clip, facts.get("clip", {})),
        )
        if known.get("tokenizer", tokenizer) != tokenizer
    ]
    return problems + rows_problems(rows, float(prior.get("caption_dropout", 0.0)))


def rows_problems(rows: int, caption_dropout: float) -> list[str]:
    """Check that a prior which knows the empty caption can be guided: that takes two rows."""
    if rows > 1 or not caption_dropout:
        return []
    return [
        "the prior was trained for guidance (--caption-dropout), which takes two rows: give "
        "--rows 2 or more"
    ]
