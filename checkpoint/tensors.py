"""Safetensors files: written with one tensor in memory at a time, read by ranges from any store."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoint.writer import DTYPES, bytes_of
from core.errors import CorruptError
from core.storage.store import Store

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
"""Tensor name -> tensor."""


def file_parts(
    shapes: Shapes, read: Read, metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes that `safetensors.torch.save` would write: header, then tensors.

    The bytes must be equal, because tokens and priors refer to a dVAE by its file's digest.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        place = [at, at + size]
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": place}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(shapes):
        yield bytes_of(read(name).float())


_LONGEST_HEADER = 10**8
"""Bytes; the safetensors library refuses longer ones."""


class TensorFiles:
    """The tensors of some safetensors files in a store."""

    def __init__(self, store: Store, files: Sequence[str]) -> None:
        """Read the headers.

        Raises: CorruptError if one is damaged; AbsentError if it is missing.
        """
        self._store = store
        self._rows: dict[str, tuple[str, int, dict[str, Any]]] = {}
        for file in files:
            try:
                self._rows |= {name: (file, *row) for name, row in self._header(file)}
            except (ValueError, KeyError, TypeError) as error:
                reason = f"its header lacks {error}" if isinstance(error, KeyError) else error
                raise CorruptError(
                    f"{store.url}/{file} is not a whole safetensors file: {reason}; copy or write "
                    "it again"
                ) from error
        self.shapes: Shapes = {name: tuple(row["shape"]) for name, (*_, row) in self._rows.items()}

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat tensor, float32; reads no others.

        Raises: CorruptError if the file ends before them.
        """
        file, data, row = self._rows[name]
        dtype = DTYPES[row["dtype"]]
        first = data + row["data_offsets"][0] + start * dtype.itemsize
        count = (stop - start) * dtype.itemsize
        held = self._store.get(file, first, count)
        if len(held) != count:
            raise CorruptError(
                f"{self._store.url}/{file} ends inside {name!r}: {len(held)} of {count} bytes from "
                f"byte {first}; copy or write it again"
            )
        if not held:  # no elements: torch refuses an empty buffer
            return torch.empty(0, device="cpu")
        return torch.frombuffer(bytearray(held), dtype=dtype).float()

    def _header(self, file: str) -> list[tuple[str, tuple[int, dict[str, Any]]]]:
        """(name, (first byte of the file's data, row of the header)) of each tensor."""
        size = int.from_bytes(self._store.get(file, 0, 8), "little")
        if not 0 < size <= _LONGEST_HEADER:
            raise ValueError(
                f"its first 8 bytes tell of a header of {size:,} bytes, not of 1 to "
                f"{_LONGEST_HEADER:,}"
            )
        rows = json.loads(self._store.get(file, 8, size))
        if not isinstance(rows, dict):
            raise ValueError("its header is not a mapping of names to rows")
        rows.pop("__metadata__", None)
        for name, row in rows.items():
            first, last = row["data_offsets"]
            if row["dtype"] not in DTYPES:
                raise ValueError(f"{name!r} has dtype {row['dtype']}, of {', '.join(DTYPES)}")
            size_of_row = DTYPES[row["dtype"]].itemsize * math.prod(row["shape"])
            if last - first != size_of_row:
                raise ValueError(
                    f"{name!r} has {last - first:,} bytes, and its shape {row['shape']} needs "
                    f"{size_of_row:,}"
                )
        return [(name, (8 + size, row)) for name, row in rows.items()]
