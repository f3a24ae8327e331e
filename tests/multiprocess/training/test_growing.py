"""Training on a set that grows: killed and resumed around a switch, at other numbers of ranks."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.keys import key_int
from core.storage.store import FolderStore
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.manifest import TOKENS, read_manifest
from data_pipeline.formats.split import splits_at
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.order import LaneOrder
from models.config import PriorConfig
from parallel.config import EngineConfig, MeshConfig
from tests.harness import run_world
from tests.multiprocess.training.growing import RECORDS, write_version
from training.config import CheckpointConfig, LoopConfig, PriorTrain
from training.run.folder import read_metrics
from training.run.history import History
from training.stages import to_payload

BATCH, ORDER = 8, OrderConfig(lanes=4, shuffle_buffer=2)
ENDS = (12, 32, 52, 76)
"""The last steps of epochs 0 to 3: of 3, 5, 5 and 6 shards of 32 records."""


def _settings(data: Path, out: Path, mesh: MeshConfig, **more: Any) -> PriorTrain:
    every = {"log_every": 1, "validate_every": 0, "validation_samples": 8}
    return PriorTrain(
        data=str(data),
        out=out / "run",
        loop=LoopConfig(steps=ENDS[3], global_batch_size=BATCH, seed=7, **every),
        checkpoint=CheckpointConfig(every=8, async_save=False),
        order=ORDER,
        loader=LoaderConfig(readers=1, prefetch=5),
        engine=EngineConfig(name="reference", precision="fp32", matmul_precision="highest"),
        mesh=mesh,
        model=PriorConfig(dim=16, heads=2, layers=3, text_length=8),
        **more,
    )


def _read(out: Path) -> dict[int, list[int]]:
    """The global batch of each step; every attempt that made a step read the same."""
    rows: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
    for path in out.glob("read-*.jsonl"):
        _, attempt, rank = path.stem.split("-")
        for row in map(json.loads, path.read_text().splitlines()):
            rows[row["step"], int(attempt)][int(rank)] = row["ids"]
    batches: dict[int, list[int]] = {}
    for (step, attempt), ranks in rows.items():
        copies = [ids for _, ids in sorted(ranks.items()) if ids]
        if attempt == 3:  # its first and last pipeline stage read the same records
            assert len(copies) == 2 and copies[0] == copies[1] and not ranks[1]
            copies = copies[:1]
        batch = [i for ids in copies for i in ids]
        assert batches.setdefault(step, batch) == batch
    return batches


def _definition(data: Path) -> list[list[int]]:
    """The batches of each epoch, from the lane order of its version alone."""
    store, batches = FolderStore(data), []
    newest = read_manifest(store, "train/", TOKENS)
    versions = [*newest.earlier, newest.fingerprint]
    for epoch, number in enumerate((0, 1, 1, 2)):
        opened = splits_at(store, TOKENS, versions[number])["train"]
        source = TokenSource(store, "train", opened=opened)
        order = LaneOrder(source.sizes, 7, BATCH, ORDER)
        for step in range(order.steps(epoch)):
            rows = order.places(epoch, step, range(ORDER.lanes)).tolist()
            batches.append([int(source.read(block)[record].id) for block, record in rows])
    return batches


@pytest.mark.slow
def test_a_run_takes_up_versions_at_the_ends_of_epochs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_version(data, 3)

    def attempt(number: int, settings: PriorTrain, dies: int, grow: dict[int, int]) -> None:
        body = {"train": to_payload("prior", settings), "out": str(tmp_path), "data": str(data)}
        body |= {"attempt": number, "dies": dies, "grow": grow}
        mesh = settings.mesh
        target = "tests.multiprocess.training.growing:train"
        run_world(target, body, mesh.data * mesh.pipeline)

    two = _settings(data, tmp_path, MeshConfig(data=2), grow=True)
    attempt(0, two, 11, {5: 5})
    # goes over to version 2 after step 12, is killed, and version 3 comes before it is resumed
    seldom = CheckpointConfig(every=1000, async_save=False)
    attempt(1, replace(two, mesh=MeshConfig(data=4), checkpoint=seldom), 17, {15: 6})
    # the first step of version 2 has a checkpoint; without the flag version 3 is not read
    alone = replace(two, mesh=MeshConfig(), grow=False, loop=replace(two.loop, stop_at=40))
    attempt(2, alone, 0, {})
    pipes = EngineConfig(name="deepspeed_pipe", precision="fp32", matmul_precision="highest")
    attempt(3, replace(two, mesh=MeshConfig(pipeline=3), engine=pipes), 0, {})

    read, expected = _read(tmp_path), _definition(data)
    assert [read[step] for step in sorted(read)] == expected and len(expected) == ENDS[3]
    assert json.loads((tmp_path / "read-2-0.jsonl").read_text().splitlines()[0])["step"] == 14
    for first, last, shards in ((0, 12, 3), (12, 32, 5), (52, 76, 6)):
        ids = [i for batch in expected[first:last] for i in batch]
        every = [key_int(shard, place) for shard in range(shards) for place in range(RECORDS)]
        assert sorted(ids) == sorted(every)

    history = History(tmp_path / "run")
    for step in (1, 12, 13, 32, 33, 52, 53, 76):
        assert [pair.id for pair in history.batch(step)] == expected[step - 1]
    for shard in (0, 4, 5):
        text = str(key_int(shard, 3))
        assert history.seen(text) == [
            step for step, batch in enumerate(expected, 1) if int(text) in batch
        ]
    rows = read_metrics(tmp_path / "run")
    assert {r["step"]: r["data_version"] for r in rows if "data_version" in r} == {
        13: 2,
        14: 2,
        53: 3,
    }
