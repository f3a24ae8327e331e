"""The feed of a run: batches made ahead are bit by bit those of the step itself."""

import dataclasses
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import pytest
import torch

from core.errors import InputError
from core.storage.store import open_store
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.streaming.stream import Stream, first_records
from parallel.config import EngineConfig
from parallel.device import CPU
from parallel.mesh import Mesh
from parallel.world import World
from training.presets import clip_tiny, dvae_tiny
from training.run.feed import Feed, StepData
from training.run.versions import DataVersions
from training.tasks import dvae as dvae_module
from training.tasks.clip import ClipTask
from training.tasks.dvae import DVAETask
from training.trainer import _stream
from training.validation import Validation

FIRST = 5
"""Number of the first step."""


def _settings(stage: Any, raw: Path, workers: int, **more: Any) -> Any:
    return dataclasses.replace(
        stage,
        data=str(raw),
        loop=dataclasses.replace(stage.loop, global_batch_size=16, steps=40, seed=3),
        order=OrderConfig(lanes=4, shuffle_buffer=2),
        engine=EngineConfig(gradient_accumulation_steps=2),
        loader=LoaderConfig(workers=workers),
        **more,
    )


@pytest.fixture(params=["dvae", "plain dvae", "clip"])
def settings(request: pytest.FixtureRequest, raw: Path, bpe: Path) -> Any:
    if request.param == "clip":
        return _settings(clip_tiny(), raw, 3, bpe=bpe)
    stage = dataclasses.replace(dvae_tiny(), augment=request.param == "dvae")
    return _settings(stage, raw, 3)


def _task(settings: Any) -> Any:
    return ClipTask(settings, World()) if hasattr(settings, "bpe") else DVAETask(settings)


def _feed(settings: Any, task: Any) -> Feed:
    return Feed(task, _stream(task, settings, Mesh()), settings, CPU)


def _serial(settings: Any, task: Any, steps: int) -> list[tuple[list[Any], Any]]:
    """Micro-batches and positions as the step itself would make them, in this thread."""
    rows = []
    for i, (records, state) in enumerate(_stream(task, settings, Mesh())):
        if i == steps:
            return rows
        halves = (records[:8], records[8:])
        rows.append(([task.batch(half, FIRST + i) for half in halves], state))
    raise AssertionError


def _assert_same(data: StepData, micro: list[Any], state: Any) -> None:
    assert data.state == state and len(data.micro) == len(micro) == 2
    for mine, theirs in zip(data.micro, micro, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
            assert tensor.stride() == theirs[name].stride(), "convolutions depend on the layout"


def test_batches_made_ahead_are_those_of_the_step(settings: Any) -> None:
    task = _task(settings)
    rows = _serial(settings, task, 12)
    feed = _feed(settings, task)
    steps = feed.steps(FIRST)
    for micro, state in rows:
        _assert_same(next(steps), micro, state)
        assert feed.state == state, "the position is that of the step, not of the threads"
    feed.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("pull", "prepare", "fetch"))]


def test_what_was_made_ahead_is_made_again_after_a_resume(settings: Any) -> None:
    """Another feed, and the same one, from the state after two steps; with one worker and more."""
    task = _task(settings)
    rows = _serial(settings, task, 5)
    feed = _feed(settings, task)
    steps = feed.steps(FIRST)
    next(steps), next(steps)
    state = feed.state
    assert state == rows[1][1]
    next(steps)
    one = dataclasses.replace(settings, loader=LoaderConfig(workers=1))
    for again in (feed, _feed(one, task)):
        again.resume(state)
        assert again.state == state
        later = again.steps(FIRST + 2)
        for micro, position in rows[2:]:
            _assert_same(next(later), micro, position)
        again.close()


def test_batches_that_are_passed_over_do_not_count_as_steps(settings: Any) -> None:
    """After a rewind the batch of a skipped update is left out, and the next one has its step."""
    task = _task(settings)
    feed = _feed(settings, task)
    start = feed.state
    feed.resume(start.passing([(0, 1)]))
    steps = feed.steps(FIRST)
    assert [next(steps).state.step for _ in range(3)] == [1, 3, 4]
    records = list(_stream_records(settings, task, 3))
    feed.resume(start.passing([(0, 1)]))
    steps = feed.steps(FIRST)
    next(steps)
    micro = [task.batch(half, FIRST + 1) for half in (records[2][:8], records[2][8:])]
    _assert_same(next(steps), micro, feed.state)
    feed.close()


def test_steps_are_counted_on_over_the_pause_after_an_epoch(settings: Any) -> None:
    """Augmentation is drawn by step; a pause asks once for a newer version of the data."""
    settings = dataclasses.replace(settings, grow=True)
    task, asked = _task(settings), list[int]()

    class Asked(DataVersions):
        def newer(self, state: Any) -> Any:
            asked.append(state.epoch)
            return super().newer(state)

    versions = Asked(task, settings.data, Mesh())
    feed = Feed(task, _stream(task, settings, Mesh()), settings, CPU, versions)
    for step, data in zip(count(FIRST), feed.steps(FIRST), strict=False):
        halves = data.records[:8], data.records[8:]
        _assert_same(data, [task.batch(half, step) for half in halves], feed.state)
        if data.state.epoch == 2:
            break
    feed.close()
    assert asked == [0, 1]


def _stream_records(settings: Any, task: Any, count: int) -> Iterator[Any]:
    for i, (records, _) in enumerate(_stream(task, settings, Mesh())):
        if i == count:
            return
        yield records


def test_a_stage_that_needs_no_data_gets_empty_micro_batches(raw: Path) -> None:
    settings = _settings(dvae_tiny(), raw, 2)
    task = cast(Any, DVAETask(settings))
    stream = Stream(task.train, seed=0, batch=16, order=settings.order, reads=False)
    feed = Feed(task, stream, settings, CPU)
    assert next(feed.steps(0)).micro == [{}, {}]
    feed.close()


def test_unreadable_pairs_count_when_their_step_is_made(raw: Path) -> None:
    """Decoded ahead, the pairs of later steps are known to be unreadable, and not counted."""
    settings = _settings(dvae_tiny(), raw, 3)
    task = DVAETask(settings)
    batches = list(_stream_records(settings, task, 3))
    bad = {batches[0][3].key, batches[2][1].key}
    readable, made = task._readable, threading.Event()
    original = readable._cropped

    def cropped(record: Any, source: RawSource, crop: Any) -> Any:
        if record.key in bad:
            record = dataclasses.replace(record, image=b"broken")
            if record.key == batches[2][1].key:
                used = original(record, source, crop)
                made.set()
                return used
        return original(record, source, crop)

    readable._cropped = cropped  # type: ignore[method-assign]
    feed = _feed(settings, task)
    steps = feed.steps(0)
    counts = []
    for i in range(3):
        next(steps)
        assert i or made.wait(300)
        counts.append(task.unreadable)
    feed.close()
    assert counts == [1, 1, 2] and readable._unreadable == bad


def test_an_error_of_a_worker_names_shard_and_member(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(dvae_tiny(), raw, 3)
    task = DVAETask(dataclasses.replace(settings, augment=True))
    key = next(_stream_records(settings, task, 1))[2].key
    plain, draws = dvae_module.dvae_crop, dvae_module.keyed_rng

    def crop(picture: Any, pixels: int, rng: Any) -> Any:
        if rng == "the broken one":
            raise cv2.error("no picture of that shape")
        return plain(picture, pixels, rng)

    def rng(*parts: Any) -> Any:
        return "the broken one" if key in parts else draws(*parts)

    monkeypatch.setattr(dvae_module, "dvae_crop", crop)
    monkeypatch.setattr(dvae_module, "keyed_rng", rng)
    feed = _feed(settings, task)
    with pytest.raises(InputError, match=r"train/shard-.*tar, member .* cannot be cropped") as told:
        next(feed.steps(0))
    feed.close()
    text = str(told.value)
    assert f"member {key}.png," in text and "no picture of that shape" in text
    shard = text.split(" ")[0].removesuffix(",")
    assert open_store(str(raw)).url in shard and key.encode() in Path(shard).read_bytes()


class _Engine:
    """Keeps the batches that it evaluates."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def evaluate(self, batch: Any) -> dict[str, torch.Tensor]:
        self.batches.append(batch)
        return {"loss": batch["pixels"].double().mean()}


def test_a_validation_s_batches_are_made_ahead_and_the_same(settings: Any) -> None:
    """In parts of 64, of central squares and first captions; the mean is over all of them."""
    loop = dataclasses.replace(settings.loop, validation_samples=70)
    settings = dataclasses.replace(settings, loop=loop)
    task, engine, used = _task(settings), _Engine(), []
    task.figures = lambda means, mine, records, beat: ({}, {})
    note = task.note_used
    task.note_used = lambda records: (used.extend(records), note(records))
    heart = cast(Any, SimpleNamespace(beat=lambda *_: None))
    row, _ = Validation(task, cast(Any, engine), settings, Mesh(), heart).run(9)
    records = first_records(task.held_out, 68)
    parts = [records[:64], records[64:]]
    assert [r.key for r in used] == [r.key for r in records]
    serial = [task.batch(part, 9, training=False) for part in parts]
    for mine, theirs in zip(engine.batches, serial, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert mine["pixels"].stride() == theirs["pixels"].stride()
    whole = torch.cat([batch["pixels"] for batch in serial]).double().mean()
    assert row == {"loss": pytest.approx(float(whole), rel=1e-6)}


def test_figures_of_a_dvae_see_all_pictures_in_order(raw: Path) -> None:
    task = DVAETask(_settings(dvae_tiny(), raw, 3))
    records = first_records(task.held_out, 2 * dvae_module.DECODED + 3)
    pixels = task._held_out_squares(records)
    expected = task._squares(records, task.held_out)
    assert torch.equal(pixels, expected) and pixels.stride() == expected.stride()
