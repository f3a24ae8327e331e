"""Read a checkpoint of any mesh, after checking every byte of it."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from checkpoint.format import MANIFEST, VERSION
from core.errors import CheckpointError, CorruptError
from core.files import Json, sha256, unseal


class CheckpointReader:
    """One verified checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read and verify all files.

        Raises: CorruptError naming the file that is damaged; CheckpointError if it is too new.
        """
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no finished checkpoint (no {MANIFEST})")
        manifest = unseal(path.read_bytes(), str(path))
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path} has format version {manifest['version']}, this Tapir reads {VERSION}"
            )
        self.facts: Json = manifest["facts"]
        self._parts: dict[tuple[str, str], list[tuple[dict[str, Any], Tensor]]] = {}
        for file in manifest["files"]:
            self._read(file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        return {
            name: tuple(parts[0][0]["shape"])
            for (name, kind), parts in self._parts.items()
            if kind == "master"
        }

    def kinds(self, name: str) -> list[str]:
        """What is stored of one parameter."""
        return sorted(kind for known, kind in self._parts if known == name)

    def tensor(self, name: str, kind: str) -> Tensor:
        """Put the slices of one global tensor together.

        Raises: CheckpointError if there is no such tensor, or a part of it is missing.
        """
        parts = self._parts.get((name, kind))
        if not parts:
            raise CheckpointError(f"{self.folder} has no {kind} of {name!r}")
        shape = tuple(parts[0][0]["shape"])
        whole = torch.empty(shape)
        covered = 0
        for row, data in parts:
            box = tuple(slice(*axis) for axis in row["box"])
            target = whole[box]
            flat = target.contiguous().view(-1)
            flat[row["start"] : row["stop"]] = data
            whole[box] = flat.view(target.shape)
            covered += data.numel()
        if covered != math.prod(shape):
            raise CheckpointError(
                f"{self.folder}: the slices of {name!r} ({kind}) hold {covered} of "
                f"{math.prod(shape)} elements"
            )
        return whole

    def _read(self, file: dict[str, Any]) -> None:
        path = self.folder / file["file"]
        if path.parent != self.folder:
            raise CorruptError(f"{path} lies outside of its checkpoint")
        if not path.is_file():
            raise CorruptError(f"{path} is missing; an older checkpoint may be whole")
        data = path.read_bytes()
        if len(data) != file["bytes"] or sha256(data) != file["sha256"]:
            raise CorruptError(
                f"{path} is damaged: {len(data)} bytes with sha256 {sha256(data)}, its manifest "
                f"says {file['bytes']} with {file['sha256']}"
            )
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise CorruptError(f"{path} is no safetensors file: {error}") from error
        for row in file["slices"]:
            self._parts.setdefault((row["name"], row["kind"]), []).append(
                (row, tensors[row["key"]])
            )


def list_checkpoints(root: Path) -> list[Path]:
    """Folders step-N, oldest first, finished or not."""
    found = [p for p in root.glob("step-*") if p.name[5:].isdigit()] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))
