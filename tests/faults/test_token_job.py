"""The token job under all faults at once: the same bytes as one undisturbed worker."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from bench.support.proxy import faulty_proxy
from cluster.object_server import ObjectServer
from core.files.atomic import sha256
from core.keys import keyed_rng
from core.storage.s3 import S3Store
from data_pipeline.images.crops import encode_png
from tests.faults.conftest import Record
from tests.harness import tapir
from tests.multiprocess.jobs.kills import Workers

OUTAGE = float(os.environ.get("TAPIR_OUTAGE", "4"))
"""Seconds in which the store refuses every request; 20 in `make faults`."""
BUCKET, PAIRS, SMALL = "tapir-tests", 800, 3


def _pictures(folder: Path) -> None:
    """Pictures of many sizes, some of them too small for the dVAE."""
    folder.mkdir()
    for i in range(PAIRS):
        rng = keyed_rng(i, "picture")
        height, width = (int(side) for side in rng.integers(32, 80, 2))
        if i % (PAIRS // SMALL) == 7:
            height = 20
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
        (folder / f"{i:04d}.png").write_bytes(encode_png(picture))
        (folder / f"{i:04d}.txt").write_text(f"picture number {i}")


def _objects(place: str) -> dict[str, str]:
    store = S3Store(BUCKET, place)
    return {name: sha256(store.get(name)) for name in store.names()}


@pytest.mark.slow
def test_killed_doubled_and_cut_off_workers_lose_and_double_nothing(
    s3: ObjectServer, bpe: Path, dvae: Path, tmp_path: Path, fault: Record
) -> None:
    fault(30, f"token job: 2 of 4 workers killed, 2 started twice, {OUTAGE:g} s without S3")
    _pictures(tmp_path / "in")
    raw = f"s3://{BUCKET}/job-raw"
    pack = ["--validation=0.1", "--shard-pairs=40", "--block=8"]
    tapir("pack", str(tmp_path / "in"), raw, *pack, **s3.environment)
    flags = [f"--bpe={bpe}", f"--dvae={dvae}", "--block=8", "--variants=2", "--batch=16"]
    flags += ["--lease-seconds=3", "--max-rejects=0.05"]
    one = f"s3://{BUCKET}/job-one"
    tapir("tokenize", raw, one, *flags, **s3.environment)
    down = {"until": 0.0, "refused": 0}

    def plan(number: int, method: str, path: str) -> str:
        if time.monotonic() < down["until"]:
            down["refused"] += 1
            return "reset"
        return ""

    many = f"s3://{BUCKET}/job-many"
    with faulty_proxy(s3.endpoint, plan) as address:
        job = ["tokenize", raw, many, *flags]
        here = {**s3.environment, "AWS_ENDPOINT_URL": address}
        with Workers(job, 4, tmp_path, here) as workers, s3.credentials():
            for number in (0, 1, 2, 3, 2, 3):
                workers.start(number)
            store = S3Store(BUCKET, "job-many")
            workers.kill((0, 1), store, ["train/", "validation/"], again=False)
            down["until"] = time.monotonic() + OUTAGE
            workers.finish()
    assert down["refused"] > 0
    with s3.credentials():
        actual, expected = _objects("job-many"), _objects("job-one")
        store = S3Store(BUCKET, "job-many")
        manifests = [
            json.loads(store.get(f"{split}/manifest.json")) for split in ("train", "validation")
        ]
    assert actual == expected
    counts = [manifest["samples"] + sum(manifest["rejects"].values()) for manifest in manifests]
    assert sum(counts) == PAIRS and sum(sum(m["rejects"].values()) for m in manifests) == SMALL
    assert any("_rejects/" in name for name in actual) and not any("_leases/" in n for n in actual)
    shutil.rmtree(tmp_path / "in")
    fault.outcome("every object equal to those of one undisturbed worker, rejects too")
