"""Pairs whose pictures are also in an evaluation set are listed and removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.keys import keyed_rng
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import PackConfig
from data_pipeline.evaluation_sets import open_evaluation, packed_set
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.images.crops import encode_png
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.stream import first_records
from generation.config import OverlapConfig
from generation.evaluation.overlap import OverlapJob
from generation.evaluation.overlap_report import read_overlap
from models.clip import Clip
from models.config import ClipConfig
from tests.unit.layouts import write_coco

SHARED = (3, 4, 11)
ALONE = JobWorker(number=0, count=1)


def _picture(number: int, noise: int = 0) -> bytes:
    rng = keyed_rng(number, "overlap")
    coarse = rng.integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    return encode_png((coarse + noise * rng.integers(-1, 2, coarse.shape)).clip(0, 255))


def _set(folder: Path, numbers: list[int], noise: int = 0) -> FolderStore:
    source = folder / "in"
    source.mkdir(parents=True)
    for number in numbers:
        (source / f"p{number:03d}.png").write_bytes(_picture(number, noise))
        (source / f"p{number:03d}.txt").write_text(f"picture {number}")
    store = FolderStore(folder / "out")
    pack(str(source), store, PackConfig(validation=0.3, block=4))
    return store


def test_overlapping_pairs_are_shown_and_removed(tmp_path: Path) -> None:
    raw = _set(tmp_path / "raw", list(range(24)))
    theirs = _set(tmp_path / "eval", [*SHARED, *range(100, 110)], noise=1)
    clip = Clip(ClipConfig(), 0).eval()
    dest = FolderStore(tmp_path / "dest")
    config = OverlapConfig(threshold=0.999, batch=5)
    given, out = packed_set(theirs, SPLITS), tmp_path / "report"
    body = OverlapJob(raw, given, clip, "hash", config, out, ALONE).run(dest)
    sources = [RawSource(dest, split) for split in ("train", "validation")]
    keys = {r.key for s in sources for block in range(len(s.sizes)) for r in s.read(block)}
    assert keys == {f"p{i:03d}" for i in range(24) if i not in SHARED}
    rows = [json.loads(line) for line in dest.get("rejects/000000.jsonl").splitlines()]
    assert [row["key"] for row in rows if row["kind"] == "overlap"]
    assert sorted(row["key"] for row in rows) == [f"p{i:03d}" for i in SHARED]
    assert body["pairs"] == 24 and sum(row["pairs"] for row in body["rows"][-2:]) >= len(SHARED)
    assert list((tmp_path / "report").glob("overlap-*.png"))
    assert sources[0].manifest.facts["overlap"]["clip"] == "hash"


def test_without_a_place_nothing_is_written(tmp_path: Path) -> None:
    raw = _set(tmp_path / "raw", list(range(24)))
    clip = Clip(ClipConfig(), 0).eval()
    given = packed_set(raw, SPLITS)
    job = OverlapJob(raw, given, clip, "hash", OverlapConfig(), tmp_path / "report", ALONE)
    body = job.run()
    assert sum(row["pairs"] for row in body["rows"][-2:]) == body["pairs"] == 24
    assert not (tmp_path / "dest").exists()
    trained = {r.key for r in first_records(RawSource(raw, "train"), 24)}
    assert 0 < len(trained) < 24 and set(body["evaluation"]["ids"]) == trained


def test_the_pictures_of_coco_that_were_trained_on_are_named(tmp_path: Path) -> None:
    raw = _set(tmp_path / "raw", list(range(24)))
    trained = sorted(r.key for r in first_records(RawSource(raw, "train"), 24))[:3]
    coco = write_coco(tmp_path / "coco", 8)
    names = sorted(path.name for path in (coco / "val2014").iterdir())
    for key, name in zip(trained, names[2:5], strict=True):
        (coco / "val2014" / name).write_bytes(_picture(int(key[1:]), 1))
    theirs = open_evaluation(f"coco:{coco}")
    clip = Clip(ClipConfig(), 0).eval()
    config, out = OverlapConfig(threshold=0.999), tmp_path / "report"
    body = OverlapJob(raw, theirs, clip, "hash", config, out, ALONE).run()
    assert body["evaluation"]["overlapping"] == 3
    overlap = read_overlap(tmp_path / "report" / "overlap.json", theirs)
    assert overlap.pictures == set(names[2:5])
    assert overlap.share == 3 / 8 and overlap.threshold == 0.999


def test_another_threshold_embeds_nothing_again_and_copies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = _set(tmp_path / "raw", list(range(24)))
    given = packed_set(_set(tmp_path / "eval", [*SHARED, *range(100, 110)], noise=1), SPLITS)
    clip = Clip(ClipConfig(), 0).eval()

    def run(threshold: float) -> dict[str, Any]:
        config = OverlapConfig(threshold=threshold)
        dest = FolderStore(tmp_path / f"dest-{threshold}")
        body = OverlapJob(raw, given, clip, "hash", config, tmp_path / "report", ALONE).run(dest)
        assert not any(name.endswith(".tar") for name in dest.names())
        stored = json.loads((tmp_path / "report" / "overlap.json").read_text())
        assert stored == body and body["evaluation"]["threshold"] == threshold
        return body

    first = run(0.999)
    monkeypatch.setattr(Clip, "embed_image", None)
    most = run(1.0)
    assert most["rows"] == first["rows"] and most["evaluation"]["overlapping"] == 0
    assert first["evaluation"]["overlapping"] > 0 and run(0.999) == first
    monkeypatch.undo()  # the records name pairs from 0.9 on only
    with pytest.raises(InputError, match=r"no pair of the train split is left; raise the thresh"):
        run(0.01)
    assert not FolderStore(tmp_path / "dest-0.01").names()


def test_a_wrong_threshold_is_refused() -> None:
    assert OverlapConfig(threshold=1.5).problems() and not OverlapConfig().problems()
