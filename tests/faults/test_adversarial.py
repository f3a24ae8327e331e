"""Hostile files: none crashes or runs, memory stays small, every one is accounted for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.storage.store import FolderStore
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.decode import decode_rgb
from data_pipeline.sources.pair import key_of
from tests.faults import corpus
from tests.faults.conftest import Record
from tests.harness import ENVIRONMENT

MOST_MEGABYTES = 400
MEASURED = """
import atexit, tapir
def say():
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
atexit.register(say)
tapir.main()
"""
"""`tapir`, with its largest resident size on the last line."""


def _pack(
    source: Path, out: Path, *flags: str
) -> tuple[list[RawRecord], list[dict[str, str]], int]:
    """Pack with rejects allowed; the pairs, the rejects and the largest resident size in MB."""
    arguments = ["pack", str(source), str(out), "--max-rejects=0.99", *flags]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    megabytes = int(done.stdout.split()[-2]) // 1024
    store = FolderStore(out)
    sources = [RawSource(store, split) for split in ("train", "validation")]
    pairs = [pair for s in sources for block in range(len(s.sizes)) for pair in s.read(block)]
    lines = [line for name in store.names("rejects/") for line in store.get(name).splitlines()]
    return pairs, [json.loads(line) for line in lines], megabytes


@pytest.mark.world
def test_a_corpus_of_harm_is_packed_and_accounted_for(tmp_path: Path, fault: Record) -> None:
    marker = tmp_path / "executed"
    expected = corpus.write_folder(tmp_path / "in", marker)
    fault(31, f"{len(expected)} files that mean harm, or are broken")
    assert len(expected) >= 40
    pairs, rejects, megabytes = _pack(tmp_path / "in", tmp_path / "out", "--validation=0.3")
    assert not marker.exists() and megabytes < MOST_MEGABYTES
    keys = {pair.key for pair in pairs}
    reasons = "\n".join(row["key"] + " " + row["reason"] for row in rejects)
    for name, good in expected.items():
        key = key_of(name.rpartition(".")[0])
        packed = key in keys
        assert packed == good, (name, reasons[-1500:])
        if not good:
            assert name in reasons or key in reasons, name
    files = sum(1 for _ in (tmp_path / "in").iterdir())
    alone = sum(row["kind"] in ("ignored",) for row in rejects)
    assert files == 2 * len(pairs) + alone + _files_of(rejects)
    assert all(len(pair.caption) <= 4096 and pair.caption.isprintable() for pair in pairs)
    for pair in pairs:
        assert decode_rgb(pair.image, pair.key).dtype == np.uint8
    fault.outcome(f"{len(pairs)} packed, {len(rejects)} refused, {megabytes} MB at most")


def _files_of(rejects: list[dict[str, str]]) -> int:
    """Number of files of rejected pairs: two each, one without a caption or for a folder."""
    single = ("no-caption", "folder-link", "-name.png")
    rows = [row for row in rejects if row["kind"] != "ignored"]
    return sum(1 if any(name in row["key"] for name in single) else 2 for row in rows)


@pytest.mark.world
def test_members_outside_the_folder_are_refused_and_the_other_pairs_packed(
    tmp_path: Path, fault: Record
) -> None:
    fault(31, "a tar of escapes, links, devices, pickles between good pairs")
    marker = tmp_path / "executed"
    good = corpus.write_tar(tmp_path / "in.tar", marker)
    before = sorted(tmp_path.parent.iterdir())
    pairs, rejects, megabytes = _pack(tmp_path / "in.tar", tmp_path / "out", "--validation=0.5")
    assert len(pairs) == good and megabytes < MOST_MEGABYTES
    assert not marker.exists() and sorted(tmp_path.parent.iterdir()) == before
    kinds = [row["kind"] for row in rejects]
    assert kinds.count("file") == 7 and kinds.count("ignored") == 3
    fault.outcome(f"{good} packed, {len(rejects)} refused")


def test_16_bits_become_8_and_rotation_is_applied() -> None:
    files = corpus.accepted()
    grey = corpus.png_of(2, 1, 16, 0, b"\0\xff\xff\x80\x00")
    assert decode_rgb(grey, "x")[0, :, 0].tolist() == [255, 128]
    assert decode_rgb(files["rgb16.png"], "x")[0, 0].tolist() == [0xAB] * 3
    assert decode_rgb(files["rotated.jpg"], "x").shape == (48, 40, 3)
