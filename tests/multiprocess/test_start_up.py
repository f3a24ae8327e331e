"""The start of a world: who reads the data set, how many sockets ranks open, who is missed."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.support.synthetic import write_tokens
from core.errors import RankError
from core.storage.store import FolderStore
from data_pipeline.formats.manifest import read_manifest
from data_pipeline.formats.tokens import TOKENS, TokenSource
from tests.harness import run_world

pytestmark = pytest.mark.world
RANKS = "tests.multiprocess.starts"


def test_bytes_reach_the_ranks_of_a_list_and_no_others(tmp_path: Path) -> None:
    results = run_world(f"{RANKS}:hand_on", {"out": str(tmp_path)}, 6)
    for rank, rows in enumerate(results):
        assert all(all(row) for row in rows[::2]), rank
        outside = [rank not in ranks for ranks in (range(6), [0, 2, 3, 5], [0])]
        assert [all(row) for row in rows[1::2]] == outside, rank
        assert [any(row) for row in rows[1::2]] == outside, rank


@pytest.mark.parametrize("ranks", [2, 7, 8])
def test_texts_reach_rank_0_in_a_logarithm_of_messages(ranks: int, tmp_path: Path) -> None:
    """Up the tree and down again: a leaf sends and receives once, rank 0 for each of its levels."""
    results = run_world(f"{RANKS}:gather", {"out": str(tmp_path)}, ranks)
    for rank, row in enumerate(results):
        all_of = range(ranks) if rank == 0 else [0]
        assert row["short"] == [f"\udcff, rank {each}" for each in all_of]
        assert row["aside"] == [str(each) for each in all_of]
        for texts, length in zip(row["long"], (0, 503, 504, 505, 3000), strict=True):
            assert texts == [str(each) * length for each in all_of]
    counts = [row["messages"]["send"] + row["messages"]["recv"] for row in results]
    assert statistics.median_low(counts) == 2
    assert max(counts) == counts[0] == 2 * math.ceil(math.log2(ranks))


def _tokens(place: Path, seed: str = "", grid: int = 2) -> FolderStore:
    store = FolderStore(place)
    for split in ("train", "validation"):
        write_tokens(store, 2, count=24, block=8, grid=grid, text=4, split=split, seed=seed)
    return store


def _run(place: Path | str, out: Path, pipeline: int, data: int) -> list[Any]:
    out.mkdir()
    payload = {"out": str(out), "place": str(place), "pipeline": pipeline, "data": data}
    return run_world(f"{RANKS}:open_and_read", payload, pipeline * data)


def test_rank_0_alone_reads_manifests_and_indexes(tmp_path: Path) -> None:
    """Four stages of two replicas: stages 1 and 2 read no records, so ranks 2 to 5."""
    store = _tokens(tmp_path / "data")
    results = _run(tmp_path / "data", tmp_path / "out", pipeline=4, data=2)
    source = TokenSource(store, "train")
    manifest = read_manifest(store, "train/", TOKENS)
    once = {
        f"{what} {split}/{name}": 1
        for split in ("train", "validation")
        for what, name in (
            ("exists", "manifest.json"),
            ("get", "manifest.json"),
            ("get", "index.safetensors"),
        )
    }
    for rank, row in enumerate(results):
        reader = rank in (0, 1, 6, 7)
        assert row["ranks"] == [0, 1, 6, 7]
        assert row["needs"] == row["index"] == reader
        assert row["start"] == (once if rank == 0 else {}), rank
        facts = [manifest.fingerprint, source.sizes.tolist(), 1, manifest.facts]
        assert row["facts"] == facts
        assert row["shards"] == ([shard.sha256 for shard in manifest.shards] if reader else [])
        assert row["groups"] == (4 if reader else 3), "groups that nobody uses have threads of gloo"
        assert row["first"] == source.read(0).ids.tolist()


def test_each_set_of_a_mixture_is_read_by_rank_0_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _tokens(tmp_path / name, name)
    place = f"{tmp_path}/a:0.25,{tmp_path}/b:0.75"
    results = _run(place, tmp_path / "out", pipeline=3, data=1)
    sources = [TokenSource(FolderStore(tmp_path / name), "train") for name in ("a", "b")]
    for rank, row in enumerate(results):
        assert set(row["start"].values()) == ({2} if rank == 0 else set())
        assert row["facts"][1] == [*sources[0].sizes.tolist(), *sources[1].sizes.tolist()]
        assert row["needs"] == row["index"] == (rank != 1)
        assert row["first"] == sources[0].read(0).ids.tolist()
    _tokens(tmp_path / "c", "c", grid=3)
    for result in _run(f"{place[:-5]}:0.25,{tmp_path}/c:0.5", tmp_path / "no", pipeline=3, data=1):
        assert result[0] == "ConfigError"
        assert f"{tmp_path}/c has grid=3, and {tmp_path}/a has grid=2" in result[1]


def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    store = _tokens(tmp_path / "data")
    for result in _run(tmp_path / "nothing", tmp_path / "out", pipeline=3, data=1):
        assert result[0] == "InputError"
        assert "there is no data set at" in result[1] and "tapir tokenize" in result[1]
    store.put("validation/index.safetensors", b"damaged")
    for result in _run(tmp_path / "data", tmp_path / "again", pipeline=3, data=1):
        assert result[0] == "CorruptError"
        assert "validation/index.safetensors differs from its manifest" in result[1]


def test_ranks_connect_to_those_that_they_speak_with(tmp_path: Path) -> None:
    """A full mesh of 8 ranks is 7 sockets a rank in each of the two groups of all ranks."""
    for joined, after, mean in run_world(f"{RANKS}:count_sockets", {"out": str(tmp_path)}, 8):
        assert mean == 1.0
        assert joined <= 4, "a listener for each group, and what torch keeps"
        assert after - joined <= 4, "the neighbours in a ring"


def test_a_rank_that_dies_before_it_connects_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3 died \(SIGKILL\)"):
        run_world(f"{RANKS}:die_before_contact", {"out": str(tmp_path)}, 3)
