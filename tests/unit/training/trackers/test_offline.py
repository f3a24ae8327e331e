"""W&B's offline folder and trackio's database hold what metrics.jsonl holds."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import installed, rows_of, tapir

pytestmark = pytest.mark.slow
_BLOCK, _HEADER = 32768, 7
"""W&B's file is a log of LevelDB: records of (crc, length, kind), which do not cross blocks."""


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(body)
            yield record
            body = b""


def _history(path: Path) -> list[dict[str, Any]]:
    """The rows of a W&B file; parts of pictures and histograms as name/part."""
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in _records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as figures, written apart from protocol.py."""
    figures, left = {}, [(row.get("split", "train"), row)]
    while left:
        prefix, values = left.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                left.append((name if values is row else f"{prefix}/{name}", value))
            elif isinstance(value, float | int) and name != "step":
                figures[f"{prefix}/{name}"] = value
    return figures


@pytest.fixture(scope="module")
def run(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE of 6 steps that stopped after 4 and was resumed."""
    pytest.importorskip("wandb")
    out = tmp_path_factory.mktemp("tracked") / "dvae"
    train = ["train", "dvae", "tiny", f"--data={raw}", f"--out={out}", "--mesh.data=1"]
    train += ["--loop.steps=6", "--loop.global-batch-size=16", "--loop.log-every=1"]
    train += ["--track=tensorboard,wandb" + (",trackio" if installed("trackio") else "")]
    offline = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    offline["TRACKIO_DIR"] = str(out.parent / "trackio")
    tapir(*train, "--loop.stop-at=4", **offline)
    log = tapir(*train, **offline)
    assert "failed" not in log
    return out


def test_wandb_s_offline_folders_hold_the_scalars_of_metrics_jsonl(run: Path) -> None:
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {each.name.rpartition("-")[2] for each in folders} == {
        (run / "wandb" / "id").read_text()
    }
    history = [row for each in folders for row in _history(next(each.glob("*.wandb")))]
    rows = [row for row in history if any(n.startswith(("train/", "valid")) for n in row)]
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if "split" not in row] == [1, 2, 3, 4, 5, 6]
    assert kept == [{**_scalars(row), "step": row["step"]} for row in written]


def test_wandb_has_the_pictures_and_histograms(run: Path) -> None:
    (last,) = [f for f in (run / "wandb").glob("offline-run-*") if list(f.glob("files/media/*/*"))]
    history = _history(next(last.glob("*.wandb")))
    picture = next(row for row in history if "reconstructions/path" in row)
    assert picture["step"] == 6
    assert (last / "files" / picture["reconstructions/path"]).read_bytes().startswith(b"\x89PNG")
    codes = next(row for row in history if "codebook/values" in row)
    assert sum(codes["codebook/values"]) > 0 and codes["step"] == 6


@pytest.mark.skipif(not installed("trackio"), reason="needs trackio")
def test_trackio_holds_them_too(run: Path) -> None:
    database = sqlite3.connect(run.parent / "trackio" / "tapir.db")
    rows = database.execute("select step, metrics from metrics order by id").fetchall()
    read = [(step, json.loads(values)) for step, values in rows]
    assert [(s, v) for s, v in read if any(n.startswith(("train/", "valid")) for n in v)] == [
        (row["step"], _scalars(row))
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]
    kinds = {v["_type"] for _, values in read for v in values.values() if isinstance(v, dict)}
    assert kinds == {"trackio.image", "trackio.histogram"}
    assert len(rows_of(run)) == 6
