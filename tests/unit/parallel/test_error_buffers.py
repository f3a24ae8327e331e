"""What is owed after a resume on any number of replicas: the mean of the stored buffers."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.config import CheckpointConfig, ErrorBuffers, averages_errors
from checkpoint.format import StateSlice
from checkpoint.reader import CheckpointReader, open_checkpoint
from checkpoint.writer import write_checkpoint
from core.storage.store import FolderStore
from parallel.compress.powersgd import MatrixShard
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.error_buffers import Piece, pieces, read_errors
from parallel.engines.modules import Compressor
from parallel.engines.protocol import EngineSettings
from parallel.mesh import Group
from parallel.placement import Placement
from tests.forked import forked_ranks

PLACES = {
    "flat": Placement(shape=(2, 4), first=0, rows=2, split=False),
    "tall": Placement(shape=(6, 1), first=1, rows=5, split=True),
}
"""8 elements, and 5 of 6; `tall` is stored transposed in PowerSGD."""
RAMPS = {"flat": torch.arange(8.0).view(2, 4), "tall": 10 + torch.arange(5.0).view(5, 1)}


def compressor(errors: ErrorBuffers, group: Group) -> Compressor:
    settings = EngineSettings(
        optim=OptimConfig(),
        engine=EngineConfig(),
        compress=CompressConfig(rank=1),
        seed=0,
        errors=errors,
    )
    shards = [MatrixShard(name=n, rows=p.rows, columns=p.shape[1]) for n, p in PLACES.items()]
    return Compressor(PLACES, shards, 1, settings, group, Group(), CPU)


def with_buffers(one: Compressor, factor: float) -> Compressor:
    errors = {name: factor * ramp for name, ramp in RAMPS.items()}
    one._powersgd.load(errors, one._powersgd.bases())
    return one


def owed(one: Compressor) -> dict[str, list[float]]:
    return {name: error.flatten().tolist() for name, error in one._powersgd.errors().items()}


def ramps(factor: float) -> dict[str, list[float]]:
    return {name: (factor * ramp).flatten().tolist() for name, ramp in RAMPS.items()}


def save(folder: Path, slices: list[StateSlice]) -> CheckpointReader:
    """Write from one process, and open."""
    write_checkpoint(FolderStore(folder), "step-1", slices, {}, 0, lambda text: [text])
    return open_checkpoint(f"{folder}/step-1")


def test_every_number_of_replicas_gets_the_mean_of_the_stored_buffers(tmp_path: Path) -> None:
    """Buffers 1, 2 and 6 times a ramp: the mean is 3 ramps, on 1, 2, 4 and 30 replicas."""
    slices = [
        part
        for replica, factor in enumerate((1.0, 2.0, 6.0))
        for part in with_buffers(compressor("own", Group(None, replica, 3)), factor).slices()
    ]
    reader = save(tmp_path, slices)
    assert reader.kinds("flat") == ["error@0", "error@1", "error@2"]
    for size in (1, 2, 4, 30):
        one = compressor("own", Group(None, size - 1, size))
        one.load(reader)
        assert owed(one) == ramps(3.0), size
    for replica, factor in enumerate((1.0, 2.0, 6.0)):
        one = compressor("mean", Group(None, replica, 3))
        one.load(reader)
        assert owed(one) == ramps(factor)


def test_a_checkpoint_without_buffers_owes_nothing(tmp_path: Path) -> None:
    reader = save(tmp_path, [PLACES["flat"].slice("flat", "master", 0, torch.ones(8))])  # type: ignore[list-item]
    one = with_buffers(compressor("own", Group(None, 0, 2)), 1.0)
    one.load(reader)
    assert owed(one) == ramps(0.0)


def test_runs_are_of_equal_length_and_may_cut_a_matrix() -> None:
    """13 elements over 4 replicas: runs of 4, 4, 4 and 1."""
    assert list(pieces(PLACES, 4)) == [
        Piece("flat", 0, 4, 0),
        Piece("flat", 4, 8, 1),
        Piece("tall", 0, 4, 2),
        Piece("tall", 4, 5, 3),
    ]
    assert list(pieces(PLACES, 2)) == [
        Piece("flat", 0, 7, 0),
        Piece("flat", 7, 8, 1),
        Piece("tall", 0, 5, 1),
    ]
    assert [piece.owner for piece in pieces(PLACES, 30)] == list(range(13))
    assert list(pieces({}, 3)) == []


@pytest.mark.world
def test_the_mean_is_shared_out_at_a_save_and_at_a_load(tmp_path: Path) -> None:
    """Three replicas with 1, 2 and 6 times a ramp store 5, 5 and 3 elements of 3 ramps."""

    def work(rank: int) -> list[Any]:
        group = Group(dist.group.WORLD, rank, 3)
        one = with_buffers(compressor("mean", group), (1.0, 2.0, 6.0)[rank])
        slices = list(one.slices())
        assert owed(one) == ramps((1.0, 2.0, 6.0)[rank])  # its own stays as it is
        write_checkpoint(FolderStore(tmp_path), "step-1", slices, {}, rank, gather)
        other, noted = compressor("own", group), _Noted(open_checkpoint(f"{tmp_path}/step-1"))
        other.load(cast(Any, noted))
        saved = [(part.name, part.kind, part.start, part.data.tolist()) for part in slices]
        return [saved, noted.ranges, owed(other)]

    def gather(text: str) -> list[str]:
        texts = [""] * 3
        dist.all_gather_object(texts, text)
        return texts

    answers = forked_ranks(tmp_path, 3, work)
    assert [saved for saved, _, _ in answers] == [
        [("flat", "error", 0, [0.0, 3.0, 6.0, 9.0, 12.0])],
        [("flat", "error", 5, [15.0, 18.0, 21.0]), ("tall", "error", 1, [30.0, 33.0])],
        [("tall", "error", 3, [36.0, 39.0, 42.0])],
    ]
    assert [ranges for _, ranges, _ in answers] == [
        [("flat", 0, 5)],
        [("flat", 5, 8), ("tall", 1, 3)],
        [("tall", 3, 6)],
    ]
    assert all(result == ramps(3.0) for _, _, result in answers)
    reader = open_checkpoint(f"{tmp_path}/step-1")
    alone = read_errors(reader, PLACES, Group(), CPU)
    assert {name: flat.tolist() for name, flat in alone.items()} == ramps(3.0)


class _Noted:
    """A reader that notes the ranges it is asked for."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.ranges: list[tuple[str, int, int]] = []

    def kinds(self, name: str) -> list[str]:
        return self._reader.kinds(name)

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        self.ranges.append((name, start, stop))
        return self._reader.flat(name, kind, start, stop)


def test_auto_is_own_up_to_8_replicas() -> None:
    assert [averages_errors("auto", n) for n in (1, 8, 9)] == [False, False, True]
    assert averages_errors("mean", 2) and not averages_errors("own", 1024)
    assert CheckpointConfig().errors == "auto"
    assert not list(compressor("auto", Group(None, 9, 10)).slices())  # the mean's last run is empty
    kinds = {part.kind for part in compressor("auto", Group(None, 7, 8)).slices()}
    assert kinds == {"error@7"}


def test_a_version_of_its_own_tells_older_readers_of_means(tmp_path: Path) -> None:
    """A reader of version 2 would find no `error@R`, and take it that nothing is owed."""
    for errors, version in (("own", 2), ("mean", 3)):
        one = with_buffers(compressor(cast(Any, errors), Group()), 1.0)
        save(tmp_path / errors, list(one.slices()))
        text = (tmp_path / errors / "step-1" / "manifest.json").read_text()
        assert f'"version": {version}' in text
