"""`tapir plan --data`: its requests are those that the jobs make."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.support.counted import CountedStore
from cli.plan import plan
from core.errors import ConfigError
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import FilterConfig, PackConfig, TokenizeConfig
from data_pipeline.packing.pack import pack
from data_pipeline.tokenize.worker import Worker
from planning.data_jobs import DataFlags, pack_requests, pairs_of, plan_data, token_requests
from tests.in_place import img2dataset, noise, written
from tests.unit.data_pipeline.growing.test_tokens import encoders

PAIRS = 8
"""Of an archive: one block."""


def _made(root: Path, archives: int, in_place: bool) -> tuple[CountedStore, ...]:
    """Counted requests to DEST of a pack job, and to RAW and TOKENS of a token job."""
    for i in range(archives):
        lone = [(f"lone{i}.png", noise(90_000 + i))]
        written(root / "src", f"{i:05d}.tar", [*img2dataset(100 * i, PAIRS), *lone])
    config = PackConfig(
        validation=0.5,
        in_place=in_place,
        max_rejects=0.5,
        filters=FilterConfig(duplicates=True),
    )
    store = FolderStore(root / "raw")
    packed, raw = CountedStore(store), CountedStore(store)
    made = pack(str(root / "src"), packed, config)
    packed.requests["shards"] = sum(len(manifest.shards) for manifest in made.values())
    tokens = CountedStore(FolderStore(root / "tokens"))
    member = JobWorker(number=0, count=1)
    Worker(raw, tokens, encoders(), TokenizeConfig(), member).run()
    return packed, raw, tokens


@pytest.mark.seconds
@pytest.mark.parametrize("in_place", [False, True])
def test_each_further_archive_costs_the_requests_of_the_plan(
    in_place: bool, tmp_path: Path
) -> None:
    few, many = (_made(tmp_path / str(n), n, in_place) for n in (3, 11))
    packed, raw, tokens = (
        Counter({k: b.requests[k] - a.requests[k] for k in b.requests})
        for a, b in zip(few, many, strict=True)
    )
    flags = DataFlags(in_place=in_place, archive_pairs=PAIRS, pair_bytes=2000)
    shards = packed["shards"]
    expected = pack_requests(8, shards / 8, flags)
    assert packed["PUT"] == expected["PUT"]
    assert packed["HEAD"] == expected["HEAD"] - 2 * 8  # the archives are files here
    assert abs(packed["GET"] - (expected["GET"] - 8)) <= 1
    expected = token_requests(shards, 8 * PAIRS, flags)
    assert tokens["PUT"] == expected["PUT"]
    first = 3 * shards  # of the first 2,000 blocks: marker, index and tar, for their entropy
    assert raw["HEAD"] + tokens["HEAD"] <= expected["HEAD"]
    assert raw["GET"] + tokens["GET"] - first <= expected["GET"] + 1


def test_workers_share_the_time_and_nothing_else() -> None:
    one, many = (plan_data(10**7, DataFlags(workers=n)) for n in (1, 50))
    for alone, shared in zip(one, many, strict=True):
        assert shared == replace(alone, hours=shared.hours)
        assert shared.hours == pytest.approx(alone.hours / 50)
    assert one[0].hours == pytest.approx(10**7 / 600 / 3600)
    assert one[0].written_bytes == 10**7 * (30_000 + 90)
    placed = plan_data(10**7, DataFlags(in_place=True))[0]
    assert placed.written_bytes == 10**7 * 90
    assert placed.requests["PUT"] < one[0].requests["PUT"]


def test_numbers_are_read_and_wrong_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert [pairs_of(text) for text in ("250M", "2.5k", "7", "1B")] == [
        250_000_000,
        2500,
        7,
        10**9,
    ]
    for text in ("", "M", "-3", "0", "3e5", "5m"):
        with pytest.raises(ConfigError, match="must be a number of pairs"):
            pairs_of(text)
    with pytest.raises(ConfigError, match=r"--workers 0 must be .*\n- --pack-rate nan must be"):
        plan_data(10, DataFlags(workers=0, pack_rate=float("nan")))
    with pytest.raises(ConfigError, match="--workers, --in-place: for data jobs; add --data N"):
        plan(["tiny", "--world", "4", "--workers", "64", "--in-place"])
    plan(["--data", "250M", "--workers", "64", "--in-place", "--json"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["pairs"] == 250_000_000 and body["flags"]["workers"] == 64
    assert body["jobs"]["pack"]["tasks"] == 25_000 and body["jobs"]["tokenize"]["hours"] > 0
