"""The plan of a pack job: numbers by hand, and the requests of a real job."""

from pathlib import Path

import pytest

from bench.support.counted import CountedStore
from core.storage.store import FolderStore
from data_pipeline.config import PackConfig
from data_pipeline.packing import pack as packing
from data_pipeline.sources.places import StoredFiles
from planning.config import PlanFlags
from planning.data import DataFlags, pairs_of, plan_data
from tests.in_place import img2dataset, written


def test_a_plan_by_hand() -> None:
    """100 archives of 1,000 pairs of 50 kB: 5 GB; 10 workers of 2 cores, 4 ms a pair."""
    flags = DataFlags(
        workers=10, worker_cores=2, pair_kilobytes=50, pair_ms=4, archive_pairs=1000, core_hour=0.1
    )
    plan = plan_data(pairs_of("100k"), flags)
    assert (plan["archives"], plan["bytes_read"], plan["limit"]) == (100, 5 * 10**9, "cores")
    assert plan["hours"] == pytest.approx(100_000 * 0.004 / 20 / 3600)
    assert plan["dollars"]["machines"] == pytest.approx(plan["hours"] * 20 * 0.1)
    slow = DataFlags(**{**vars(flags), "link_megabytes": 1.0})
    assert plan_data(100_000, slow)["hours"] == pytest.approx(5.015e9 / 10 / 1e6 / 3600)
    assert plan_data(100_000, DataFlags(in_place=True))["bytes_written"] == 15_000_000


@pytest.mark.parametrize("text", ["", "many", "-3M", "0"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    assert not pairs_of(text)
    if text:
        assert "must be a number of pairs" in PlanFlags(data=text).problems()[0]


@pytest.mark.parametrize("in_place", [False, True])
def test_requests_are_those_of_a_job(
    tmp_path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, each = 40, 12
    for i in range(count):
        written(tmp_path / "in", f"{i:05d}.tar", img2dataset(each * i, each, side=8))
    source = CountedStore(FolderStore(tmp_path / "in"))
    dest = CountedStore(FolderStore(tmp_path / "out"))
    opened = packing.open_sources([str(tmp_path / "in")])
    files = StoredFiles(source)
    stored = [packing.Source(**{**vars(one), "files": files}) for one in opened]
    monkeypatch.setattr(packing, "open_sources", lambda texts: stored)
    settings = PackConfig(validation=0.5, block=4, shard_pairs=6, in_place=in_place)
    packing.pack("s", dest, settings)
    flags = DataFlags(archive_pairs=each, shard_pairs=6, in_place=in_place)
    plan = plan_data(count * each, flags)
    gets = sum(s.requests[kind] for s in (source, dest) for kind in ("GET", "HEAD"))
    puts = sum(s.requests[kind] for s in (source, dest) for kind in ("PUT", "LIST"))
    assert 0.7 < plan["gets"] / gets < 1.4, (plan, source.requests, dest.requests)
    assert 0.7 < plan["puts"] / puts < 1.4, (plan, source.requests, dest.requests)
