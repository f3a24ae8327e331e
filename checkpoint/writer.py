"""Write a checkpoint: digest in memory, write, fsync, rename; the manifest comes last."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from checkpoint.format import (
    MANIFEST,
    MEAN_ERROR,
    MEANS_VERSION,
    VERSION,
    StateSlice,
    rank_file,
)
from core.errors import StoreError
from core.files.atomic import Json, seal
from core.storage.store import Store

Gather = Callable[[str], list[str]]
"""Collects one string of every rank; collective. All on rank 0, on the others rank 0's alone."""
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ERROR = "error"


def write_checkpoint(
    store: Store, name: str, slices: Iterable[StateSlice], facts: Json, rank: int, gather: Gather
) -> None:
    """Write this rank's slices; rank 0 adds the manifest when all ranks have written.

    A folder without a manifest is not a checkpoint, so that after a crash the previous one is still
    the newest. If any rank fails to write, no manifest is written.
    Raises: StoreError, on every rank, naming the rank that could not write and why.
    """
    try:
        mine = _write_slices(store, name, list(slices), rank)
    except StoreError as error:
        mine = {_ERROR: f"rank {rank}: {error}"}
    parts = [json.loads(text) for text in gather(json.dumps(mine))]
    errors = [part[_ERROR] for part in parts if _ERROR in part]
    if rank == 0 and not errors:
        files = [part for part in parts if part]
        means = any(row["kind"] == MEAN_ERROR for part in files for row in part["slices"])
        version = MEANS_VERSION if means else VERSION
        manifest = {"version": version, "facts": facts, "files": files}
        try:
            store.put(f"{name}/{MANIFEST}", seal(manifest))
        except StoreError as error:
            errors = [str(error)]
    if outcome := gather("; ".join(errors))[0]:
        raise StoreError(f"the checkpoint {store.url}/{name} was not written: {outcome}")


def _write_slices(store: Store, name: str, slices: list[StateSlice], rank: int) -> Json:
    """Write rank-R.safetensors; returns its row of the manifest, empty if there are no slices."""
    if not slices:
        return {}
    header, rows = _layout(slices)
    file = rank_file(rank)
    digest = hashlib.sha256()

    def parts() -> Iterator[bytes | memoryview]:
        digest.update(header)
        yield header
        for part in slices:
            view = bytes_of(part.data)
            digest.update(view)
            yield view

    store.put_parts(f"{name}/{file}", parts())
    count = rows[-1]["at"] + rows[-1]["bytes"]
    return {"file": file, "bytes": count, "sha256": digest.hexdigest(), "slices": rows}


def _layout(slices: list[StateSlice]) -> tuple[bytes, list[dict[str, Any]]]:
    """The safetensors header, and the manifest row of each slice with its offset in the file.

    The library is not used: it builds the whole file in memory, or writes it without a digest.
    """
    entries: dict[str, Any] = {}
    sizes: list[tuple[int, int, str]] = []
    at = 0
    for i, part in enumerate(slices):
        size = part.data.numel() * part.data.element_size()
        dtype, count = _NAMES[part.data.dtype], part.data.numel()
        place = [at, at + size]
        entries[f"{i:06d}"] = {"dtype": dtype, "shape": [count], "data_offsets": place}
        sizes.append((at, size, dtype))
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    rows = [
        {
            "name": part.name,
            "kind": part.kind,
            "shape": list(part.shape),
            "start": part.start,
            "stop": part.stop,
            "at": len(header) + at,
            "bytes": size,
            "dtype": dtype,
        }
        for part, (at, size, dtype) in zip(slices, sizes, strict=True)
    ]
    return header, rows


def bytes_of(data: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    flat: Any = data.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy()
    return memoryview(flat)
