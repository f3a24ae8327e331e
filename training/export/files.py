"""The files of a model: description, and weights in one or several with Hugging Face's index."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from checkpoint.tensors import Read, Shapes, file_parts
from core.errors import CorruptError, InputError
from core.files.atomic import Json, canonical_json, write_atomic, write_parts
from core.files.out_folder import refuse_others_folder
from core.renamed import FACTS, ROW, renamed
from training.export.names import DESCRIPTION

CONFIG = "config.json"
"""The settings of a finished model's run."""
WEIGHTS = "model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
UNEVEN = 1.5
"""Largest file of `cut_evenly` over their mean."""


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights."""

    file: str
    """Its name in the model's folder."""
    bytes: int
    sha256: str


def facts_with_new_names(facts: Json) -> Json:
    """A model's facts, with renamed fields under their new names."""
    now = renamed(FACTS, facts)
    if isinstance(now.get("validation"), dict):
        now["validation"] = renamed(ROW, now["validation"])
    return now


def with_article(stage: str) -> str:
    """A stage's model in a sentence."""
    return f"an {stage.replace('_', ' ')}" if stage[0] in "aeiou" else f"a {stage}"


def refuse_import_into(out: Path, source: Path) -> None:
    """Check that a foreign model may become a run folder at `out`.

    Raises: InputError if another command writes there, it holds a finished model, or the foreign
    model's own files.
    """
    if (out / DESCRIPTION).exists():
        raise InputError(f"{out} holds a finished model already; give another folder")
    refuse_others_folder(out, "import")
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise InputError(f"{out} holds the files to import; give a new folder, e.g. runs/vqgan")


def shard_names(count: int) -> list[str]:
    """Hugging Face's names of `count` files; one file has no number."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def cut_evenly(shapes: Shapes, most: int) -> dict[str, list[str]]:
    """Split the tensors into at most `most` files of about equal size: file -> tensor names.

    There are fewer files where one tensor would be larger than a file's share.
    """
    sizes = {name: 4 * prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    count = max(1, min(most, total // max(max(sizes.values(), default=1), 1)))
    groups = _balanced(sizes, count)
    while max(_loads(groups, sizes)) * count > UNEVEN * total:
        count -= 1
        groups = _balanced(sizes, count)
    return {file: sorted(group) for file, group in zip(shard_names(count), groups, strict=True)}


def _balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Hand out the tensors, the largest first, each to the group with least bytes."""
    groups: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        groups[least].append(name)
        loads[least] += sizes[name]
    return groups


def _loads(groups: list[list[str]], sizes: Mapping[str, int]) -> list[int]:
    return [sum(sizes[name] for name in group) for group in groups]


def write_weights(
    path: Path, shapes: Shapes, read: Read, metadata: dict[str, str] | None
) -> WeightsFile:
    """Write a file atomically, with one tensor in memory at a time."""
    digest, count = hashlib.sha256(), 0

    def parts() -> Iterator[bytes | memoryview]:
        nonlocal count
        for part in file_parts(shapes, read, metadata):
            digest.update(part)
            count += len(part)
            yield part

    write_parts(path, parts())
    return WeightsFile(file=path.name, bytes=count, sha256=digest.hexdigest())


def write_index(folder: Path, files: Mapping[str, list[str]], shapes: Shapes) -> None:
    """Write Hugging Face's index of several files."""
    where = {name: file for file, names in files.items() for name in names}
    count = sum(prod(shape) for shape in shapes.values())
    sizes = {"total_size": 4 * count, "total_parameters": count}
    write_atomic(folder / SHARDS, canonical_json({"metadata": sizes, "weight_map": where}))


def verify_weights(folder: Path, files: Iterable[tuple[str, str]]) -> None:
    """Check the sha256 of files, given as (name, sha256).

    Raises: CorruptError naming the first that is missing or damaged.
    """
    for name, expected in files:
        path, digest = folder / name, ""
        if Path(name).name == name and path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise CorruptError(
                f"{path} is damaged or missing; the same `tapir train` makes it again"
            )


def verify_index(folder: Path, files: Iterable[str]) -> None:
    """Check that Hugging Face's index of several files names the tensors of each.

    Raises: CorruptError if it is missing or does not.
    """
    path = folder / SHARDS
    opened = {file: safe_open(str(folder / file), "pt") for file in files}
    where = {name: file for file, tensors in opened.items() for name in tensors.keys()}  # noqa: SIM118
    try:
        named = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if named != where:
        raise CorruptError(f"{path} is damaged or missing; the same `tapir train` makes it again")


def open_weights(folder: Path, files: Iterable[str]) -> tuple[Shapes, Read]:
    """Shapes of all tensors of some files, and a function that reads one by its name, in fp32."""
    opened = [safe_open(str(folder / file), "pt") for file in files]
    holds = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in holds.items()}
    return shapes, lambda name: holds[name].get_tensor(name).float()
