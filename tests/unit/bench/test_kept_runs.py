"""Runs that benchmarks keep belong to their data set."""

import shutil
from pathlib import Path

from bench.tokenizers.parent import run_folder
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.packing.pack import pack


def test_runs_of_tokenizers_are_kept_by_the_content_of_their_set(tmp_path: Path) -> None:
    sets = [str(tmp_path / name) for name in ("a", "b", "copy")]
    for place, seed in zip(sets, (0, 1), strict=False):
        pack(
            ["shapes"],
            open_store(place),
            PackConfig(count=40, pixels=16, validation=0.3, seed=seed),
        )
    shutil.copytree(sets[0], sets[2])
    first, other, same = (run_folder(place, "vq", 0) for place in sets)
    assert first == same != other
    assert first != run_folder(sets[0], "vq", 1) and first != run_folder(sets[0], "fsq", 0)
