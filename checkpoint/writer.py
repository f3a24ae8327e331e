"""Write a checkpoint: digest in memory, write, fsync, rename; the manifest comes last."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save

from checkpoint.format import MANIFEST, VERSION, StateSlice
from core.files import Json, seal, sha256, write_atomic


def save_checkpoint(
    folder: Path,
    slices: Iterable[StateSlice],
    facts: Json,
    rank: int,
    gather: Callable[[str], list[str]],
) -> None:
    """Write this rank's slices; rank 0 adds the manifest when all ranks have written.

    `gather` collects one string of every rank on every rank. A folder without a manifest is no
    checkpoint, so a crash at any moment leaves the previous one as the newest.
    Raises: OSError if the disk is full or cannot be written.
    """
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)
    gather("")
    tensors, rows = {}, []
    for i, part in enumerate(slices):
        key = f"{i:06d}"
        tensors[key] = part.data.detach().float().clone()
        rows.append(
            {
                "key": key,
                "name": part.name,
                "kind": part.kind,
                "shape": list(part.shape),
                "box": [list(axis) for axis in part.box],
                "start": part.start,
                "stop": part.stop,
            }
        )
    mine: dict[str, Any] = {}
    if rows:
        data = save(tensors)
        name = f"rank-{rank:05d}.safetensors"
        write_atomic(folder / name, data)
        mine = {"file": name, "bytes": len(data), "sha256": sha256(data), "slices": rows}
    parts = [json.loads(text) for text in gather(json.dumps(mine))]
    if rank == 0:
        manifest = {"version": VERSION, "facts": facts, "files": [part for part in parts if part]}
        write_atomic(folder / MANIFEST, seal(manifest))
    gather("")
