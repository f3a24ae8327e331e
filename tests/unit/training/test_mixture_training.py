"""Stages on mixtures: batches, validations, baselines and requirements."""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench.support.synthetic import write_tokens
from core.errors import ConfigError
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.state import position_of
from data_pipeline.streaming.stream import first_records
from data_pipeline.tokenize.figures import per_position_entropy
from parallel.device import CPU
from parallel.mesh import Mesh, own_mesh
from parallel.tensor.ops import TensorParallel
from training.config import PriorTrain
from training.data_requirements import mixture_problems
from training.presets import dvae_tiny, prior_tiny
from training.run.feed import Feed
from training.run.versions import DataVersions
from training.tasks.dvae import DVAETask
from training.tasks.prior import PriorTask
from training.trainer import _stream
from training.validation import Validation


@pytest.fixture(scope="module")
def token_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets: 2 shards of 32 records, and one."""
    root = tmp_path_factory.mktemp("sets")
    for name, shards in (("a", 2), ("b", 1)):
        for split in SPLITS:
            store = FolderStore(root / name)
            write_tokens(store, shards, 32, 4, grid=2, text=3, split=split, seed=name)
    return root


def _prior(root: Path, shares: str = "{0}/a:0.75,{0}/b:0.25") -> PriorTask:
    tiny = prior_tiny()
    settings = dataclasses.replace(
        tiny,
        data=shares.format(root),
        loop=dataclasses.replace(tiny.loop, global_batch_size=8, validation_samples=32),
        order=OrderConfig(lanes=4, shuffle_buffer=2),
        model=dataclasses.replace(tiny.model, dim=8, heads=1, layers=1, text_length=4),
    )
    return PriorTask(settings, TensorParallel())


class _Engine:
    """The loss of a batch is its mean image code."""

    def evaluate(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": batch["image"].double().mean()}


def test_a_validation_reports_each_set_and_all_together(token_sets: Path) -> None:
    task = _prior(token_sets)
    task.figures = lambda means, mine, records, beat: ({"read": float(len(records))}, {})  # type: ignore[method-assign, assignment, misc]
    heart = cast(Any, SimpleNamespace(beat=lambda *_: None))
    engine = cast(Any, _Engine())
    row, _ = Validation(task, engine, task._settings, Mesh(), heart).run(1)
    parts = [part.source for part in task.held_out.parts]
    means = [
        np.mean([record.image for record in first_records(source, count)])
        for source, count in zip(parts, (24, 8), strict=True)
    ]
    assert row["loss/a"] == pytest.approx(means[0]) and row["loss/b"] == pytest.approx(means[1])
    assert row["loss"] == pytest.approx(0.75 * means[0] + 0.25 * means[1])
    assert row["read"] == 32 and set(row) == {"loss", "loss/a", "loss/b", "read"}


def test_the_entropy_of_a_mixture_is_the_mean_by_share(token_sets: Path) -> None:
    task = _prior(token_sets)
    each = [
        per_position_entropy(part.source.read, len(part.source.sizes), 4, 8192)
        for part in task.train.parts
    ]
    assert task._entropy() == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    assert task.facts()["grid"] == 2 and task.model_config.image_vocabulary == 8192


def test_sets_that_do_not_fit_together_or_are_too_small_are_refused(
    token_sets: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the shares' sum is 2"):
        _refused(PriorTrain(data="a:1,b:1"))
    for split in SPLITS:
        write_tokens(FolderStore(tmp_path / "c"), 1, 8, 4, grid=3, text=3, split=split)
    with pytest.raises(ConfigError) as told:
        _prior(token_sets, f"{{0}}/a:0.5,{tmp_path}/c:0.5")
    text = str(told.value)
    assert f"{tmp_path}/c has grid=3, and {token_sets}/a has grid=2" in text
    assert f"the train split of {tmp_path}/c has 8 pairs in 2 blocks" in text
    (tmp_path / "copy").symlink_to(token_sets / "a")
    with pytest.raises(ConfigError, match=r"copy is a copy of .*a; give it once"):
        _prior(token_sets, f"{{0}}/a:0.5,{tmp_path}/copy:0.5")
    assert mixture_problems({}, {}) == []
    facts = {"a": {"dvae": "x", "tokenizer": "t"}, "b": {"dvae": "x", "tokenizer": "u"}}
    assert "b has tokenizer='u', and a has tokenizer='t'" in mixture_problems(facts, {})[0]


def _refused(settings: PriorTrain) -> None:
    raise ConfigError.from_problems(settings.problems())


def test_a_dvae_trains_on_pictures_of_all_sets(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        config = PackConfig(count=60, validation=0.2, seed=seed, shard_pairs=20, block=4)
        pack("shapes", FolderStore(tmp_path / name), config)
    tiny = dvae_tiny()
    small = OrderConfig(lanes=2, shuffle_buffer=2)
    loop = dataclasses.replace(tiny.loop, global_batch_size=4, validation_samples=8)
    settings = dataclasses.replace(tiny, order=small, loop=loop)
    places = [f"{tmp_path}/a", f"{tmp_path}/b"]
    mixed = DVAETask(dataclasses.replace(settings, data=f"{places[0]}:0.5,{places[1]}:0.5"))
    alone = [DVAETask(dataclasses.replace(settings, data=place)) for place in places]
    for task in alone:
        for training, name in ((True, "train"), (False, "held_out")):
            records = first_records(getattr(task, name), 3)
            expected = task.batch(records, 5, training)["pixels"]
            assert torch.equal(mixed.batch(records, 5, training)["pixels"], expected)
    key = first_records(alone[1].train, 1)[0].key
    where = mixed.train.member(key, f"{key}.png")
    assert where == alone[1].train.member(key, f"{key}.png")
    assert len({t.facts()["raw"] for t in (mixed, *alone)}) == 3


def test_a_mixture_keeps_the_versions_that_it_began_with(tmp_path: Path) -> None:
    """Set a grows while the run is stopped; a resumed run reads as if it had not."""
    made = {}
    for name in ("a", "b"):
        for split in SPLITS:
            store = FolderStore(tmp_path / name)
            made[name, split] = write_tokens(store, 2, 32, 4, 2, 3, split, seed=name)
    places = "{0}/a:0.75,{0}/b:0.25"
    feed = _feed(_prior(tmp_path, places))
    unbroken = [_ids(data) for data in islice(feed.steps(0), 12)]
    feed.close()
    feed = _feed(_prior(tmp_path, places))
    first = [_ids(data) for data in islice(feed.steps(0), 5)]
    state = json.loads(json.dumps(dataclasses.asdict(feed.state)))
    feed.close()
    for split in reversed(SPLITS):
        parent = made["a", split]
        write_tokens(FolderStore(tmp_path / "a"), 3, 32, 4, 2, 3, split, parent, seed="a")
    task = _prior(tmp_path, places)
    assert task.train.sources[0].manifest.version == 2
    feed = _feed(task)
    feed.resume(position_of(state))
    assert task.train.sources[0].manifest.version == 1
    assert [part.source.manifest.version for part in task.held_out.parts] == [1, 1]
    assert first + [_ids(data) for data in islice(feed.steps(5), 7)] == unbroken
    feed.close()
    problems = dataclasses.replace(task._settings, grow=True).problems()
    assert any("grow reads one data set" in text for text in problems)


def _feed(task: PriorTask) -> Feed:
    settings, mesh = task._settings, own_mesh()
    versions = DataVersions(task, settings.data, mesh)
    return Feed(task, _stream(task, settings, mesh), settings, CPU, versions)


def _ids(data: Any) -> list[int]:
    ids: list[int] = data.records.ids.tolist()
    return ids
