"""The last collectives of all backends of a world are dumped in the order of their calls."""

import json
from typing import Any

import pytest
import torch._C._distributed_c10d as c10d

from parallel.diagnostics.flight_recorder import joined, last_collectives


def _recorder(library: str, *entries: tuple[str, int]) -> dict[str, Any]:
    """A shortened dump of torch's flight recorders."""
    rows = [
        {"record_id": i, "profiling_name": name, "time_created_ns": when}
        for i, (name, when) in enumerate(entries)
    ]
    return {"comm_lib_version": library, "entries": rows}


def test_entries_of_two_recorders_are_joined_by_time_each_once() -> None:
    gloo = _recorder("", ("gloo:gather", 3), ("gloo:barrier", 9))
    nccl = _recorder("2.28", ("nccl:all_reduce", 1), ("nccl:all_reduce", 5))
    both = {"entries": gloo["entries"] + nccl["entries"]}
    for first in (gloo, both):  # in newer versions the general recorder has NCCL's, too
        merged = joined({"all": first, "nccl": nccl})
        times = [entry["time_created_ns"] for entry in merged["entries"]]
        assert times == [1, 3, 5, 9] and merged["entries"][-1]["profiling_name"] == "gloo:barrier"
        assert merged["recorders"]["nccl"] == {"comm_lib_version": "2.28"}


def test_nccls_recorder_is_asked_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build has none: the test substitutes what a CUDA build returns."""
    nccl = _recorder("2.28", ("nccl:broadcast", 1))
    dump = json.dumps(nccl).encode
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: dump(), raising=False)
    names = [entry["profiling_name"] for entry in last_collectives()["entries"]]
    assert "nccl:broadcast" in names
