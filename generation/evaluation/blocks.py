"""Arrays about many pictures, one file per block, each array with its digest."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from core.errors import CorruptError
from core.files.atomic import sha256
from core.storage.store import FolderStore

Array = NDArray[np.float32]
BlockTask = tuple[str, int]
"""(kind of pictures, block number)."""

_DIGESTS = "sha256"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A folder of block files."""

    folder: Path
    size: int
    """Pictures a block."""
    rows: dict[str, int]
    """Pictures of each kind."""

    @property
    def tasks(self) -> list[BlockTask]:
        """All blocks of the finished job."""
        counts = {kind: -(-rows // self.size) for kind, rows in self.rows.items()}
        return [(kind, block) for kind, count in counts.items() for block in range(count)]

    def part(self, block: int) -> slice:
        """Range of a block's pictures among those of its kind."""
        return slice(block * self.size, (block + 1) * self.size)

    def name(self, task: BlockTask) -> str:
        """What a block is called."""
        return f"{task[0]}-{task[1]:06d}"

    def exists(self, task: BlockTask) -> bool:
        """True if a block has been written."""
        return self._path(task).exists()

    def write(self, task: BlockTask, arrays: dict[str, Array]) -> None:
        """Write the arrays of a block, whole or not at all; the first worker's count."""
        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        digests = {name: sha256(array.tobytes()) for name, array in plain.items()}
        # one entry: the order of several is not the same in every process
        body = save(plain, {_DIGESTS: json.dumps(digests)})
        FolderStore(self.folder).put(self._path(task).name, body, if_absent=True)

    def read(self, kind: str, name: str) -> Iterator[tuple[slice, Array]]:
        """One array of all blocks of a kind, in order, with the range of pictures of each block.

        Raises: CorruptError if a byte changed.
        """
        for each, block in self.tasks:
            if each == kind:
                yield self.part(block), _read(self._path((kind, block)), name)

    def read_if_there(self, kind: str, name: str, rows: int) -> Array:
        """One array of all blocks of a kind, with ones for the blocks that lack it."""
        values = np.ones(rows, np.float32)
        for each, block in self.tasks:
            path = self._path((kind, block))
            if each == kind and name in _names(path):
                values[self.part(block)] = _read(path, name)
        return values

    def _path(self, task: BlockTask) -> Path:
        return self.folder / f"{self.name(task)}.safetensors"


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys())
    except SafetensorError:
        return []


def _read(path: Path, name: str) -> Array:
    try:
        with safe_open(path, "numpy") as file:
            array: NDArray[Any] = file.get_tensor(name)
            digests = json.loads((file.metadata() or {}).get(_DIGESTS, "{}"))
            intact = digests.get(name) == sha256(array.tobytes())
    except (SafetensorError, ValueError):
        intact = False
    if not intact:
        raise CorruptError(f"{path} is damaged; delete it, and the same command makes it again")
    return array
