"""A packed picture that fails to decode stops no stage: it is skipped and counted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.formats.raw_set import write_split
from data_pipeline.images.crops import encode_png
from data_pipeline.packing.writer import RawWriter
from data_pipeline.sources.drawn.shapes import draw_scene, render
from data_pipeline.sources.pair import make_pair
from data_pipeline.streaming.stream import stored_records
from generation.config import EvaluateConfig, OverlapConfig, ScoreConfig
from generation.evaluation.evaluate import evaluate
from generation.evaluation.open_score import open_job
from generation.evaluation.overlap import OverlapJob
from generation.text_to_image import open_studio
from models.clip import Clip
from models.config import ClipConfig
from parallel.world import World
from tests.harness import rows_of, tapir
from tests.unit.finished import write_models
from tests.unit.layouts import write_coco
from training.presets import clip_tiny, dvae_tiny
from training.tasks.clip import ClipTask
from training.tasks.dvae import DVAETask

BROKEN = {"train": (0, 5), "validation": (3,)}
"""Places of the pairs of each split whose picture is cut in half."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """A data set as written by a version with weaker checks of pictures."""
    store = FolderStore(tmp_path_factory.mktemp("packed"))
    for split, count in (("train", 32), ("validation", 8)):
        writer = RawWriter(store, split, PackConfig(block=4))
        for i in range(count):
            scene = draw_scene(len(split), i)
            data = encode_png(render(scene, 32, 0, i))
            data = data[: len(data) // 2] if i in BROKEN[split] else data
            key = f"{split}-{i:03d}"
            writer.add(make_pair(key, data, ".png", scene.caption.encode(), key), scene.caption)
        writer.flush()
        write_split(store, f"{split}/", [writer.shards], {"request": {"source": "x"}}, {})
    return store


def _settings(stage: Any, packed: FolderStore) -> Any:
    return dataclasses.replace(
        stage,
        data=str(packed.root),
        order=OrderConfig(lanes=2, shuffle_buffer=2),
        loop=dataclasses.replace(stage.loop, global_batch_size=8, steps=4),
    )


def _records(packed: FolderStore, split: str) -> list[RawRecord]:
    return list(stored_records(RawSource(packed, split)))


def test_a_training_reads_the_first_readable_pair_in_its_place(
    packed: FolderStore, bpe: Path
) -> None:
    """In every batch the same substitute, with its own caption."""
    dvae = DVAETask(_settings(dvae_tiny(), packed))
    clip = dataclasses.replace(clip_tiny(), bpe=bpe)
    tasks = [dvae, ClipTask(_settings(clip, packed), World())]
    train, held_out = (_records(packed, split) for split in SPLITS)
    for task in tasks:
        first, second = task.batch(train[:4], 1), task.batch(train[4:8], 2)
        for batch, place in ((first, 0), (second, 1)):
            assert torch.equal(batch["pixels"][place], first["pixels"][1])
        assert not torch.equal(first["pixels"][1], first["pixels"][2])
        pixels = task.batch(held_out, 0, training=False)["pixels"]
        assert torch.equal(pixels[3], pixels[0]) and not torch.equal(pixels[3], pixels[1])
        assert task.unreadable == 0, "a batch that is made ahead is not used yet"
        task.note_used(train[:4])
        assert task.unreadable == 1
        task.note_used([*train[:8], *held_out])
        assert task.unreadable == 3
        if "text" in first:
            assert torch.equal(second["text"][1], first["text"][1])


@pytest.mark.seconds
def test_a_run_counts_them_and_ends_well(packed: FolderStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [
        "--order.lanes=2",
        "--loop.global-batch-size=8",
        "--loop.steps=8",
        "--loop.validate-every=4",
    ]
    data = f"--data={packed.root}"
    text = tapir("train", "dvae", "tiny", data, f"--out={run}", "--mesh.data=2", *flags)
    assert "train-001 is read in its place: pack again" in text
    counts = [row["pairs_unreadable"] for row in rows_of(run, "validation")]
    assert counts[-1] >= 3 and counts == sorted(counts)


def test_nothing_readable_is_an_error(packed: FolderStore, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for split in SPLITS:
        writer = RawWriter(store, split, PackConfig(block=2))
        for i in range(8):
            writer.add(make_pair(f"{split}{i}", b"broken", ".png", b"x", ""), "x")
        writer.flush()
        write_split(store, f"{split}/", [writer.shards], {"request": {"source": "x"}}, {})
    with pytest.raises(InputError, match="no picture of a split can be decoded"):
        DVAETask(_settings(dvae_tiny(), store))


@pytest.mark.seconds
def test_the_token_job_rejects_them(
    packed: FolderStore, bpe: Path, dvae: Path, tmp_path: Path
) -> None:
    job = ["tokenize", str(packed.root), str(tmp_path), f"--bpe={bpe}", f"--dvae={dvae}"]
    tapir(*job, "--block=4", "--max-rejects=0.2")
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert manifest["samples"] == 30 and manifest["rejects"] == {"image": 2}


def test_overlap_leaves_them_out_and_compares_with_the_others(
    packed: FolderStore, tmp_path: Path
) -> None:
    dest, clip = FolderStore(tmp_path / "dest"), Clip(ClipConfig(), 0).eval()
    coco = write_coco(tmp_path / "coco", 8)
    sorted((coco / "val2014").iterdir())[2].write_bytes(b"<html>")
    theirs = open_evaluation(f"coco:{coco}")
    config = OverlapConfig(threshold=1.0, batch=4)
    alone = JobWorker(number=0, count=1)
    job = OverlapJob(packed, theirs, clip, "hash", config, tmp_path / "report", alone)
    overlap = job.run(dest)
    assert overlap["unreadable"] == 3 and overlap["pairs"] == 37
    evaluation = overlap["evaluation"]
    assert evaluation["unreadable"] == 1 and evaluation["pictures"] == 8
    rows = [json.loads(line) for line in dest.get("rejects/000000.jsonl").splitlines()]
    left_out = sorted(row["key"] for row in rows if row["kind"] == "image")
    assert left_out == ["train-000", "train-005", "validation-003"]


@pytest.mark.seconds
def test_scores_skip_unreadable_pictures(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco", 16)
    captions = [caption.text for caption in open_evaluation(f"coco:{coco}").captions]
    models = write_models(tmp_path, captions)
    config = ScoreConfig(candidates=1, captions=32, block=5, radii=(0.0,))

    def scores(out: str) -> Any:
        job = open_job(f"coco:{coco}", models, None, None, config, tmp_path / out)
        return job.run(lambda: open_studio(models), JobWorker(number=0, count=1))

    assert scores("whole")["pictures_unreadable"] == 0
    pictures = sorted((coco / "val2014").iterdir())
    pictures[2].write_bytes(b"<html>")
    pictures[7].write_bytes(pictures[7].read_bytes()[:100])
    result = scores("damaged")
    assert result["pictures"] == 16 and result["pictures_unreadable"] == 2
    assert [row["pictures"] for row in result["rows"]] == [14]


def test_samples_of_held_out_captions_are_drawn_without_them(
    packed: FolderStore, tmp_path: Path
) -> None:
    models = write_models(tmp_path, ["a small red circle above a large blue square"])
    settings = EvaluateConfig(prompts=8, candidates=1)
    evaluate(open_studio(models), str(packed.root), tmp_path / "out", settings)
    assert len(json.loads((tmp_path / "out" / "candidates.json").read_text())["rows"]) == 7
