"""Which version of a growing data set a feed reads; ranks: tests/multiprocess/training."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench.support.synthetic import write_tokens
from core.errors import InputError
from core.keys import key_int
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig
from data_pipeline.formats.manifest import Manifest
from models.config import PriorConfig
from parallel.device import CPU
from parallel.mesh import own_mesh
from parallel.tensor.ops import TensorParallel
from training.config import LoopConfig, PriorTrain
from training.run.feed import Feed
from training.run.versions import DataVersions
from training.tasks.prior import PriorTask
from training.trainer import _stream

BATCH = 8
"""Each shard has 16 records: 2 steps."""


def _write(folder: Path, *shards: int) -> list[str]:
    """Versions with so many train shards; returns their fingerprints."""
    store, names, parents = FolderStore(folder), list[str](), dict[str, Manifest | None]()
    for count in shards:
        for split, few in (("validation", count), ("train", count)):
            made = write_tokens(store, few, 16, 4, 2, 3, split, parents.get(split))
            parents[split] = made
        names.append(made.fingerprint)
    return names


def _feed(folder: Path, grow: bool) -> tuple[Feed, Any]:
    settings = PriorTrain(
        data=str(folder),
        grow=grow,
        loop=LoopConfig(global_batch_size=BATCH, validation_samples=4),
        order=OrderConfig(lanes=2, shuffle_buffer=2),
        model=PriorConfig(dim=16, heads=2, layers=1, text_length=8),
    )
    task: Any = PriorTask(settings, TensorParallel())
    mesh = own_mesh()
    stream = _stream(task, settings, mesh)
    return Feed(task, stream, settings, CPU, DataVersions(task, str(folder), mesh)), task


def _shards_read(feed: Feed, steps: int) -> int:
    """Number of shards whose records the next steps read."""
    owner = {key_int(shard, place): shard for shard in range(9) for place in range(16)}
    read = [owner[int(i)] for data in islice(feed.steps(0), steps) for i in data.records.ids]
    feed.close()
    return len(set(read))


def test_a_run_keeps_its_version_and_its_held_out_pairs(tmp_path: Path) -> None:
    first, _, _ = _write(tmp_path, 2, 3, 4)
    feed, task = _feed(tmp_path, grow=False)
    state = replace(feed.state, fingerprint=first)
    feed.resume(state)
    assert (task.train.manifest.version, task.held_out.manifest.version) == (1, 1)
    assert _shards_read(feed, 3 * 4) == 2 and feed.state.versions == ()


def test_a_run_that_grows_takes_the_newest_version_after_its_epoch(tmp_path: Path) -> None:
    first, _, third = _write(tmp_path, 2, 3, 4)
    feed, task = _feed(tmp_path, grow=True)
    feed.resume(replace(feed.state, fingerprint=first))
    assert _shards_read(feed, 4) == 2 and feed.state.versions == ()
    assert _shards_read(feed, 8) == 4
    assert feed.state.versions == ((0, first), (1, third))
    assert (task.train.manifest.version, task.held_out.manifest.version) == (3, 1)
    again, task = _feed(tmp_path, grow=False)
    again.resume(feed.state)
    assert (task.train.manifest.version, task.held_out.manifest.version) == (3, 1)


def test_a_planned_version_is_taken_up_though_there_is_a_newer_one(tmp_path: Path) -> None:
    """A replay from a checkpoint before the switch reads what the run read after it."""
    first, second, third = _write(tmp_path, 2, 3, 4)
    feed, _ = _feed(tmp_path, grow=True)
    start = replace(feed.state, fingerprint=first)
    feed.resume(start.reading([(0, first), (1, second)]))
    assert _shards_read(feed, 4) == 2
    assert _shards_read(feed, 6) == 3
    assert _shards_read(feed, 8) == 4
    assert feed.state.versions == ((0, first), (1, second), (2, third))


@pytest.mark.parametrize("grow", [False, True])
def test_other_data_in_the_place_is_refused(grow: bool, tmp_path: Path) -> None:
    _write(tmp_path / "a", 4)
    (other,) = _write(tmp_path / "b", 2)
    feed, _ = _feed(tmp_path / "a", grow)
    with pytest.raises(InputError, match=r"is another one.*as --data, or start a new run folder"):
        feed.resume(replace(feed.state, fingerprint=other))
