"""Read a checkpoint of any mesh: verify every byte once, then fetch only the requested ranges."""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from checkpoint.format import MANIFEST, MEANS_VERSION, VERSION
from checkpoint.writer import DTYPES
from core.errors import AbsentError, CheckpointError, CorruptError
from core.files.atomic import Json, unseal
from core.storage.store import Store, open_store

_CHUNK = 64 * 2**20


class CheckpointReader:
    """One checkpoint of a store."""

    def __init__(self, store: Store, name: str) -> None:
        """Read the manifest; call `verify` before the first tensor.

        Raises: CorruptError if the manifest is damaged; CheckpointError if there is none, or it
        has another format.
        """
        self._store, self.name = store, name
        self.url = f"{store.url}/{name}"
        path = f"{self.url}/{MANIFEST}"
        try:
            data = store.get(f"{name}/{MANIFEST}")
        except AbsentError as error:
            raise CheckpointError(
                f"{self.url} holds no finished checkpoint (no {MANIFEST})"
            ) from error
        try:
            manifest = unseal(data, path)
        except CorruptError as error:
            raise CorruptError(
                f"{path} is damaged: its digest does not match; an older checkpoint may be whole"
            ) from error
        if manifest["version"] not in (VERSION, MEANS_VERSION):
            raise CheckpointError(
                f"{path} has format version {manifest['version']}, this Tapir reads {VERSION} and "
                f"{MEANS_VERSION}"
            )
        self.facts: Json = manifest["facts"]
        self.files: list[Json] = manifest["files"]
        self._rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for file in self.files:
            for row in file["slices"]:
                kinds = self._rows.setdefault(row["name"], {})
                kinds.setdefault(row["kind"], []).append({**row, "file": file["file"]})

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Check the digests of this rank's share of the files: `rank`, `rank + ranks`, ...

        Raises: CorruptError naming the file that is missing or damaged.
        """
        for file in self.files[rank::ranks]:
            path = f"{self.url}/{file['file']}"
            if "/" in file["file"]:
                raise CorruptError(f"{path} is outside of its checkpoint")
            try:
                count, digest = digest_of(self._store, f"{self.name}/{file['file']}")
            except AbsentError as error:
                raise CorruptError(
                    f"{path} is missing; an older checkpoint may be whole"
                ) from error
            if count != file["bytes"] or digest != file["sha256"]:
                raise CorruptError(
                    f"{path} is damaged: {count} bytes with sha256 {digest}, its manifest says "
                    f"{file['bytes']} with {file['sha256']}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        named = [name for name, kinds in self._rows.items() if "master" in kinds]
        return {name: self.shape(name, "master") for name in named}

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The global tensor's shape."""
        return tuple(self._parts(name, kind)[0]["shape"])

    def kinds(self, name: str) -> list[str]:
        """Kinds that are stored for one parameter."""
        return sorted(self._rows.get(name, {}))

    def tensor(self, name: str, kind: str) -> Tensor:
        """The whole global tensor, float32.

        Raises: CheckpointError if there is no such tensor, or a part of it is missing.
        """
        shape = self.shape(name, kind)
        return self.flat(name, kind, 0, math.prod(shape)).view(shape)

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat global tensor, float32; reads no others.

        Raises: CheckpointError if there is no such tensor, or some of them are missing.
        """
        elements = torch.empty(max(stop - start, 0), device="cpu")
        covered = 0
        for row in self._parts(name, kind):
            first, last = max(start, row["start"]), min(stop, row["stop"])
            if first < last:
                elements[first - start : last - start] = self._fetch(row, first, last)
                covered += last - first
        if covered != elements.numel():
            raise CheckpointError(
                f"{self.url}: the slices of {name!r} ({kind}) hold {covered} of "
                f"{elements.numel()} elements"
            )
        return elements

    def _parts(self, name: str, kind: str) -> list[dict[str, Any]]:
        parts = self._rows.get(name, {}).get(kind)
        if not parts:
            raise CheckpointError(f"{self.url} has no {kind} of {name!r}")
        return parts

    def _fetch(self, row: dict[str, Any], first: int, last: int) -> Tensor:
        dtype = DTYPES[row["dtype"]]
        at = row["at"] + (first - row["start"]) * dtype.itemsize
        count = (last - first) * dtype.itemsize
        data = self._store.get(f"{self.name}/{row['file']}", at, count)
        if len(data) != count:
            raise CorruptError(f"{self.url}/{row['file']} ends before the slice of {row['name']!r}")
        return torch.frombuffer(bytearray(data), dtype=dtype).float()


def digest_of(store: Store, name: str) -> tuple[int, str]:
    """(bytes, sha256) of an object, read in chunks. Raises: AbsentError if there is none."""
    digest, count = hashlib.sha256(), 0
    while part := store.get(name, count, _CHUNK):
        digest.update(part)
        count += len(part)
    return count, digest.hexdigest()


def open_checkpoint(url: str) -> CheckpointReader:
    """Open and verify a checkpoint at s3://bucket/.../step-N or in a folder."""
    root, _, name = url.rstrip("/").rpartition("/")
    reader = CheckpointReader(open_store(root or "."), name)
    reader.verify()
    return reader


def finished_steps(store: Store) -> list[int]:
    """Steps of the finished checkpoints (with a manifest), oldest first."""
    names = (name.split("/") for name in store.names("step-"))
    steps = {parts[0][5:] for parts in names if len(parts) == 2 and parts[1] == MANIFEST}
    return sorted(int(step) for step in steps if step.isdigit())
