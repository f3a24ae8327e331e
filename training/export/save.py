"""Write the finished model of a run from its last checkpoint, by all ranks if it is large."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader
from checkpoint.tensors import Shapes
from checkpoint.together import together
from checkpoint.writer import Gather
from core.errors import CorruptError, InputError, StoreError, TapirError
from core.files.atomic import Json
from core.log import LOG
from core.storage.store import Store
from training.export.files import (
    SHARDS,
    WEIGHTS,
    WeightsFile,
    cut_evenly,
    write_index,
    write_weights,
)
from training.export.names import DESCRIPTION
from training.export.weights import (
    averaged_weight,
    network_shapes,
    read_description,
    write_description,
)


@dataclass(frozen=True, kw_only=True)
class Writers:
    """The ranks that write a model together."""

    rank: int
    size: int
    gather: Gather

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's part of some work; returns the results as JSON: on rank 0 of all ranks, on
        the others rank 0's alone.

        Raises: StoreError, on every rank, naming each that failed and why.
        """
        try:
            return together(self.gather, work)
        except TapirError as error:
            raise StoreError(f"the finished model was not written: {error}") from error


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """What a finished model says about itself."""

    stage: str
    config: Json
    """The network's sizes."""
    facts: Json
    """Facts about its training."""


def save_model(
    folder: Path,
    model: FinishedModel,
    checkpoint: tuple[Store, str],
    most_bytes: float,
    writers: Writers,
) -> None:
    """Write a finished model: EMA weights if the checkpoint has them, else the weights; collective.

    A model above `most_bytes` is cut into files of about equal size, each written by another rank,
    which reads only its own tensors. The description is removed first and written last: in between,
    and after a crash, readers find the checkpoint instead.
    Raises: StoreError, on every rank, if one could not write.
    """
    first = writers.rank == 0

    def shapes() -> Shapes:
        return network_shapes(model.stage, CheckpointReader(*checkpoint).shapes())

    def begin() -> dict[str, list[str]] | None:
        return _begin(folder, shapes(), most_bytes, writers.size)

    files = writers.together(lambda: begin() if first else None)[0]

    def write(names: list[str]) -> list[WeightsFile]:
        """Write these files; ranks without files read no manifest."""
        reader = CheckpointReader(*checkpoint) if names else None
        return [_write(folder, name, files, reader) for name in names if reader]

    mine = _share(list(files), writers)
    rows = writers.together(lambda: [asdict(row) for row in write(mine)])
    written = {row["file"]: WeightsFile(**row) for share in rows for row in share}

    def describe() -> None:
        for file in files:
            if _is_absent(folder / file, written[file]):
                LOG.warning(
                    "%s is not seen on rank 0's node: is --out on a file system of all nodes? rank "
                    "0 writes it, too",
                    folder / file,
                )
                write([file])
        if len(files) > 1:
            write_index(folder, files, shapes())
        order = [written[file] for file in files]
        write_description(folder, model.stage, model.config, model.facts, order)

    writers.together(lambda: describe() if first else None)


def _share(files: list[str], writers: Writers) -> list[str]:
    """The files that this rank writes, spread evenly over the ranks, and so over the nodes."""
    count = len(files)
    return [f for i, f in enumerate(files) if i * writers.size // count == writers.rank]


def _begin(folder: Path, shapes: Shapes, most_bytes: float, ranks: int) -> dict[str, list[str]]:
    """Remove an older model, its description first; returns the new one's files.

    An older file with the name of a new one would pass for what another node has written.
    """
    _remove(folder)
    large = 4 * sum(prod(shape) for shape in shapes.values()) > most_bytes
    return cut_evenly(shapes, ranks if large else 1)


def remove_other_model(folder: Path, stage: str, step: int) -> None:
    """Remove a finished model of another step than `step`, at which a run that goes on will end.

    Readers find the run's newest checkpoint instead. A damaged model stays until the run's end.
    """
    try:
        before = read_description(folder, stage)["facts"].get("step")
    except (CorruptError, InputError):
        return
    if before != step:
        LOG.info("the run goes on to step %d: removing its finished model of step %s", step, before)
        _remove(folder)


def _remove(folder: Path) -> None:
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for path in (folder / WEIGHTS, folder / SHARDS, *folder.glob("model-*-of-*.safetensors")):
        path.unlink(missing_ok=True)


def _write(
    folder: Path, file: str, files: Mapping[str, list[str]], reader: CheckpointReader
) -> WeightsFile:
    shapes, read = reader.shapes(), partial(averaged_weight, reader)
    inside = {name: shapes[name] for name in files[file]}
    return write_weights(folder / file, inside, read, {"format": "pt"} if len(files) > 1 else None)


def _is_absent(path: Path, written: WeightsFile) -> bool:
    return not path.is_file() or path.stat().st_size != written.bytes
