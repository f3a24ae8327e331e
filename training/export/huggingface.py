"""Exports all models of a run to one folder in the layout of the Hugging Face hub, and imports it.

    model_index.json         its parts with their digests; sealed with its own digest
    README.md                the model card
    prior/config.json        sizes, facts, digest; likewise for dvae/ (or another image tokenizer)
                             and clip/
    prior/model.safetensors  fp32 weights by parameter name; large models in several files, listed
                             in model.safetensors.index.json
    tokenizer/tokenizer.json and words.json
    config.json, ...         files for `transformers` (transformers.py), which an import ignores

A prior names its dVAE and tokenizer by the digests of the run folders; an import reproduces those
files byte for byte.
"""

import importlib.metadata
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.tensors import Read, Shapes, file_parts
from core.config import check, from_json, with_new_names, wrong_types
from core.errors import CorruptError, InputError
from core.files.atomic import (
    Json,
    new_folder,
    seal,
    unseal,
    write_atomic,
    write_parts,
)
from core.log import LOG
from data_pipeline.text.bpe import FILE, load_tokenizer
from data_pipeline.text.words import copy_words
from models.tokenizers.registry import size_problems
from training.export.files import (
    CONFIG,
    SHARDS,
    WEIGHTS,
    facts_with_new_names,
    shard_names,
    write_index,
)
from training.export.misfits import misfits
from training.export.model_card import model_card
from training.export.tokenizers import open_weights_of
from training.export.transformers import (
    TOKENIZER_CONFIG,
    own_shapes,
    tokenizer_config,
    write_transformers,
)
from training.export.weights import (
    KINDS,
    Weights,
    open_model,
    write_model,
)
from training.export.weights import TOKENIZER as STAGE

INDEX = "model_index.json"
TOKENIZER, BPE = "tokenizer", "bpe"
VERSION = 1
ROLES = ("dvae", "prior", "clip")
"""Parts that are models; an imported image tokenizer has the role of the dVAE."""
TIES = {"dvae": (), "prior": ("dvae", "tokenizer"), "clip": ("tokenizer",)}
"""Facts with the digests of the parts that a model was trained with."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Models that were trained with one another."""

    models: dict[str, Weights]
    tokenizer: Path | None
    """Folder of tokenizer.json."""


def find_parts(folder: Path, given: Mapping[str, Path | None]) -> Parts:
    """Open the models of a folder of runs (dvae, prior, clip, bpe), or of one run.

    `given` has the folders of runs that are elsewhere.
    Raises: InputError if there are none, or two were not trained with one another.
    """
    places = {name: given.get(name) or _place(folder, name) for name in (*ROLES, BPE)}
    models = {
        name: open_weights_of(place) if name == "dvae" else open_model(place, name)
        for name in ROLES
        if (place := places[name])
    }
    if not models:
        raise InputError(
            f"{folder} holds no run: give the folder of a run (--out of `tapir train`), or the one "
            "above dvae, prior, clip and bpe"
        )
    bpe = places[BPE]
    digests = {"dvae": models["dvae"].digest if "dvae" in models else None}
    digests["tokenizer"] = load_tokenizer(bpe)[1] if bpe else None
    for stage, model in models.items():
        for name in TIES[stage]:
            if digests[name] not in (None, model.facts[name]):
                raise InputError(
                    f"the {stage} of {model.where} was trained with another {name}; give the one "
                    f"that it was trained with as --{BPE if name == 'tokenizer' else name}"
                )
    left_out = [name for name in (*ROLES, BPE) if not places[name]]
    if left_out:
        LOG.info("left out, for they are not in %s: %s", folder, ", ".join(left_out))
    return Parts(models=models, tokenizer=bpe)


def _place(folder: Path, name: str) -> Path | None:
    """The folder of a part: `folder` if it is that run, else its subfolder; None if absent."""
    if name == BPE:
        return next((p for p in (folder, folder / BPE) if (p / FILE).is_file()), None)
    for path in (folder / "model.json", folder / CONFIG):
        if path.is_file():
            try:
                stage = json.loads(path.read_bytes()).get("stage")
            except (ValueError, AttributeError) as error:
                raise InputError(f"{path} is damaged: {error}") from error
            is_it = stage == name or (stage == STAGE and name == "dvae")
            return folder if is_it else None
    return folder / name if (folder / name).is_dir() else None


def digests_of(parts: Parts) -> dict[str, str]:
    """sha256 of each part, as an exported folder's index has them."""
    models = {stage: model.digest for stage, model in parts.models.items()}
    return models | ({TOKENIZER: load_tokenizer(parts.tokenizer)[1]} if parts.tokenizer else {})


def export_parts(parts: Parts, out: Path, most_bytes: int) -> None:
    """Write the folder atomically.

    Units: most_bytes is the maximum size of a weights file; larger models are split.
    Raises: InputError if `out` is not empty, or a weight is not finite.
    """
    index: Json = {
        "model_type": "tapir",
        "format_version": VERSION,
        "tapir_version": importlib.metadata.version("tapir"),
        "torch_version": torch.__version__,
        "parts": {},
    }
    with new_folder(out) as folder:
        cuts = {
            stage: _write_part(model, folder / stage, most_bytes)
            for stage, model in parts.models.items()
        }
        for stage, model in parts.models.items():
            index["parts"][stage] = {
                "sha256": model.digest,
                "parameters": sum(map(math.prod, model.shapes.values())),
                "files": list(cuts[stage]),
            }
        if parts.tokenizer:
            tokenizer, digest = load_tokenizer(parts.tokenizer)
            write_atomic(folder / TOKENIZER / FILE, (parts.tokenizer / FILE).read_bytes())
            copy_words(parts.tokenizer, folder / TOKENIZER)
            entries = tokenizer.get_vocab_size()
            write_atomic(folder / TOKENIZER / TOKENIZER_CONFIG, tokenizer_config())
            index["parts"][TOKENIZER] = {"sha256": digest, "entries": entries}
        write_transformers(folder, parts.models, cuts)
        card = model_card(out.absolute().name, index, parts.models)
        write_atomic(folder / "README.md", card.encode())
        write_atomic(folder / INDEX, seal(index))


def _write_part(model: Weights, folder: Path, most_bytes: int) -> dict[str, list[str]]:
    """Write a model; returns the tensors of each file."""
    prefix, shapes = KINDS[model.stage].prefix, own_shapes(model)

    def read(name: str) -> Tensor:
        return _finite(model.read(prefix + name), name, model.where)

    cut = _cut(shapes, most_bytes)
    for file, names in cut.items():
        inside = {name: shapes[name] for name in names}
        write_parts(folder / file, file_parts(inside, read, {"format": "pt"}))
    count = sum(math.prod(shape) for shape in shapes.values())
    if len(cut) > 1:
        write_index(folder, cut, shapes)
    body = {
        "model_type": f"tapir-{model.stage}",
        "dtype": "float32",
        "sizes": model.config,
        "facts": model.facts,
        "sha256": model.digest,
    }
    write_atomic(folder / CONFIG, seal(json.loads(json.dumps(body))))
    LOG.info("%s: %d parameters in %d file(s)", model.stage, count, len(cut))
    return cut


def _cut(shapes: Shapes, most_bytes: int) -> dict[str, list[str]]:
    """Split the tensors into files: file name -> tensor names, at least one each."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes):
        more = 4 * math.prod(shapes[name])
        if groups[-1] and size + more > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def import_parts(folder: Path, out: Path) -> list[str]:
    """Restore the run folders of finished models, OUT/prior and so on; returns their names.

    Raises: InputError if a file is missing, damaged or of another kind, or `out` is not empty.
    """
    index = _unsealed(folder / INDEX, {"parts": dict})
    if index.get("model_type") != "tapir" or index.get("format_version") != VERSION:
        raise InputError(f"{folder / INDEX} is of another format; this Tapir reads {VERSION}")
    rows = index["parts"].items()
    digests = {n: str(row.get("sha256")) if isinstance(row, dict) else "" for n, row in rows}
    with new_folder(out) as made:
        for name, digest in digests.items():
            if name == TOKENIZER:
                _import_tokenizer(folder / TOKENIZER, made / BPE, digest)
            elif name in ROLES:
                _import_part(name, folder / name, made / name, digest)
            else:
                raise InputError(f"{folder / INDEX} names a part {name!r} that Tapir does not know")
    return [BPE if name == TOKENIZER else name for name in digests]


def _import_tokenizer(folder: Path, out: Path, digest: str) -> None:
    try:
        actual = load_tokenizer(folder)[1]
        copy_words(folder, out)
    except CorruptError as error:
        raise InputError(str(error)) from error
    if actual != digest:
        raise InputError(f"{folder / FILE} is not the one that {INDEX} names; copy it again")
    write_atomic(out / FILE, (folder / FILE).read_bytes())


def _import_part(role: str, folder: Path, out: Path, digest: str) -> None:
    body = _unsealed(folder / CONFIG, {"sizes": dict, "facts": dict})
    is_foreign = role == "dvae" and body.get("model_type") == f"tapir-{STAGE}"
    stage = STAGE if is_foreign else role
    kind = KINDS[stage]
    if body.get("model_type") != f"tapir-{stage}" or body.get("sha256") != digest:
        raise InputError(f"{folder / CONFIG} is not of the {stage} that {INDEX} names")
    if missing := [fact for fact in TIES[role] if fact not in body["facts"]]:
        raise InputError(f"{folder / CONFIG} does not name the {missing[0]} of its {stage}")
    sizes = with_new_names(kind.config, body["sizes"], str(folder / CONFIG))
    check(wrong_types(kind.config, sizes, str(folder / CONFIG)))
    config: Any = from_json(kind.config, sizes)
    check(size_problems(config) if is_foreign else config.problems())
    shapes, read = _weights(folder)
    named = {f"{kind.prefix}{name}": shape for name, shape in shapes.items()}
    if wrong := misfits(stage, config, named):
        raise InputError(
            f"{folder} does not hold a {stage} of the sizes in its {CONFIG}: {len(wrong)} tensors "
            f"do not fit, such as {wrong[0]}; copy the folder again"
        )

    def global_read(name: str) -> Tensor:
        return read(name.removeprefix(kind.prefix))

    made = write_model(out, stage, sizes, facts_with_new_names(body["facts"]), named, global_read)
    if made != digest:
        raise InputError(
            f"the weights in {folder} are damaged or changed: their sha256 is {made}, {INDEX} says "
            f"{digest}; copy them again"
        )


def _weights(folder: Path) -> tuple[Shapes, Read]:
    """Shapes of all tensors, and a function that reads one by its name."""
    files = {}
    for file in _files(folder):
        try:
            files[file] = safe_open(str(folder / file), "pt")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{folder / file} is missing or not a whole safetensors file ({error}); copy it "
                "again"
            ) from error
    where = {name: file for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        value = files[where[name]].get_tensor(name)
        if value.dtype != torch.float32:
            raise InputError(f"{folder / where[name]}: {name} is {value.dtype}, not float32")
        return _finite(value, name, str(folder / where[name]))

    slices = {name: files[file].get_slice(name) for name, file in where.items()}
    return {name: tuple(part.get_shape()) for name, part in slices.items()}, read


def _files(folder: Path) -> Iterator[str]:
    """File names of the weights."""
    if not (folder / SHARDS).is_file():
        yield WEIGHTS
        return
    try:
        names = set(json.loads((folder / SHARDS).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / SHARDS} is damaged: {error}; copy it again") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name:
            raise InputError(f"{folder / SHARDS} names the file {name!r}, outside of its folder")
        yield name


def _finite(value: Tensor, name: str, where: str) -> Tensor:
    if not value.isfinite().all():
        raise InputError(f"{where}: {name} holds values like NaN; the model is of no use")
    return value


def _unsealed(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """Read a sealed file, and check that it has these fields."""
    if not path.is_file():
        raise InputError(f"there is no {path}; give a folder that `tapir export` wrote")
    try:
        body = unseal(path.read_bytes(), str(path))
    except CorruptError as error:
        raise InputError(
            f"{path} is damaged, or `tapir export` did not write it; copy it again"
        ) from error
    if wrong := [name for name, kind in fields.items() if not isinstance(body.get(name), kind)]:
        raise InputError(f"{path} has no {wrong[0]!r}: `tapir export` did not write it")
    return body
