"""CPU per record of the loader against others, on the same 204,800 token records (2,560 B each).

Every contender runs in its own process, other projects in their own virtual environments, which the
benchmark makes; rounds are interleaved. The figure is user and system time of the process, its
threads and its children, from before the data set is opened to after the last record. Fairness:
Tapir checks a crc of every block and gives batches of 512 as arrays in its lane order; the others
give single records, as bytes or (litdata) as two arrays, are not asked to batch them, and check
nothing. webdataset shuffles shards and a buffer of 5,000 records, litdata and mosaicml-streaming
(which runs with stubs of torchvision and transformers) their chunks and the records in them, Tapir
windows of 8 blocks of 512 in 4 lanes. From S3 (SeaweedFS on loopback) webdataset reads by
`pipe:curl` and pre-signed addresses. Every contender's files are read once right before its turn,
so that the file system's cache is warm.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.support.children import child_environment, module_command
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized, tiny
from bench.support.synthetic import records_of, write_tokens
from cluster.object_server import ObjectServer, object_server
from core.storage.s3 import S3Store
from core.storage.store import FolderStore, Store

FOLDER = cache("loader")
SHARDS, RECORDS, BLOCK = sized(20, 4), sized(10_240, 1024), 512
ROUNDS = sized(5, 1)
BUCKET = "bench-loader"
CHILD = "bench.support.loader_child"
CONSTRAINTS = Path(__file__).parents[1] / "constraints" / "cpu.txt"
PACKAGES = {
    "webdataset": ["webdataset", "numpy"],
    "litdata": ["litdata", "torch", "numpy"],
    "mosaic": [
        *("numpy", "torch", "tqdm", "xxhash", "zstd", "Brotli", "python-snappy", "boto3"),
        *("pillow", "catalogue"),
    ],
}
ALONE = {"mosaic": "mosaicml-streaming"}
"""Installed without dependencies: clients of three clouds, which reading records does not need."""
LOCAL = {
    "raw": "",
    "webdataset_plain": "webdataset",
    "webdataset_one": "webdataset",
    "webdataset_two": "webdataset",
    "litdata": "litdata",
    "mosaic": "mosaic",
}
"""Contenders beside Tapir, and whose environment they need."""
TARGETS = {"webdataset_two": 10.0, "webdataset_one": 5.0, "litdata": 2.0, "webdataset from S3": 4.0}


def run() -> list[dict[str, Any]]:
    """Rows: microseconds of CPU a record of each contender; ratio = theirs over Tapir's."""
    pythons = {"": sys.executable, **{name: _environment(name) for name in _packages()}}
    _write(pythons)
    local = {name: owner for name, owner in LOCAL.items() if owner in pythons}
    places = {name: FOLDER / name.replace("_", "-") for name in local}
    places |= {"raw": FOLDER / "tapir", "webdataset_plain": FOLDER / "webdataset-one"}
    used: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        _warm(FOLDER / "tapir")
        _note(used, "tapir", _measure(sys.executable, "tapir", str(FOLDER / "tapir")))
        for name, owner in local.items():
            _warm(places[name])
            _note(used, name, _measure(pythons[owner], name, str(places[name])))
    rows = [_row(name, used[name], used["tapir"], "tapir local") for name in local]
    rows.insert(0, _row("tapir", used["tapir"], used["raw"], "raw read"))
    return rows + _from_s3(pythons["webdataset"])


def _packages() -> list[str]:
    """The other projects; a miniature installs none and runs those that this Python has."""
    return [name for name in PACKAGES if not tiny() or find_spec(name) is not None]


def _from_s3(python: str) -> list[dict[str, Any]]:
    used: dict[str, list[float]] = {}
    with object_server(FOLDER / "weed", BUCKET) as server:
        with server.credentials():
            store = S3Store(BUCKET, "tapir")
            _copy(FolderStore(FOLDER / "tapir"), store)
            _copy(FolderStore(FOLDER / "webdataset-one"), S3Store(BUCKET, "webdataset"))
            signed = _signed(server)
        folder = FOLDER / "webdataset-s3"
        folder.mkdir(exist_ok=True)
        (folder / "urls.json").write_text(json.dumps(signed))
        for _ in range(ROUNDS):
            here = {**os.environ, **server.environment}
            place = f"s3://{BUCKET}/tapir"
            _note(used, "tapir", _measure(sys.executable, "tapir", place, here))
            _note(used, "other", _measure(python, "webdataset_one", str(folder)))
    return [
        _row("tapir from S3", used["tapir"], used["tapir"], "tapir from S3"),
        _row("webdataset from S3", used["other"], used["tapir"], "tapir from S3"),
    ]


def _signed(server: ObjectServer) -> list[str]:
    import boto3  # noqa: PLC0415 - reads the credentials of the moment

    client = boto3.client("s3", endpoint_url=server.endpoint)
    urls = []
    for name in S3Store(BUCKET, "webdataset").names():
        if name.endswith(".tar"):
            where = {"Bucket": BUCKET, "Key": f"webdataset/{name}"}
            url = client.generate_presigned_url("get_object", Params=where, ExpiresIn=3600)
            urls.append(f"pipe:curl -s '{url}'")
    return urls


def _copy(source: Store, target: Store) -> None:
    for name in source.names():
        if not target.exists(name):
            target.put(name, source.get(name))


def _environment(name: str) -> str:
    """The Python of a contender's virtual environment, which is made if it is missing."""
    if tiny():
        return sys.executable
    venv = FOLDER / f"venv-{name}"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        print(f"making a virtual environment for {name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *PACKAGES[name], "-c", str(CONSTRAINTS)], check=True)
        if name in ALONE:
            subprocess.run([*pip, "--no-deps", ALONE[name]], check=True)
        (venv / "ready").touch()
    return str(python)


def _write(pythons: dict[str, str]) -> None:
    """The same records in every contender's own format."""
    done = FOLDER / "written"
    if done.exists():
        return
    for name in ("tapir", "litdata", "mosaic", "webdataset-one", "webdataset-two"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)  # of a run that was cut off
    write_tokens(FolderStore(FOLDER / "tapir"), SHARDS, RECORDS, BLOCK)
    parts = [records_of(shard, RECORDS, 1024, 256) for shard in range(SHARDS)]
    rows = [np.concatenate([part.image, part.text.reshape(RECORDS, 256)], 1) for part in parts]
    np.save(FOLDER / "records.npy", np.concatenate(rows))
    for name in filter(None, pythons):
        command = module_command(CHILD, f"write_{name}", str(FOLDER), python=pythons[name])
        subprocess.run(command, check=True, env=child_environment())
    done.touch()


def _warm(folder: Path) -> None:
    """Read a contender's files into the page cache, which may have dropped them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass


def _measure(
    python: str, name: str, place: str, environment: dict[str, str] | None = None
) -> float:
    command = module_command(CHILD, name, place, python=python)
    inherited = child_environment(environment or os.environ)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=inherited)
    result = json.loads(done.stdout.splitlines()[-1])
    assert name == "raw" or result["records"] == SHARDS * RECORDS, (name, result)
    print(f"{name}: {result}", file=sys.stderr)
    return float(result["cpu"])


def _note(used: dict[str, list[float]], name: str, value: float) -> None:
    used.setdefault(name, []).append(value)


def _row(name: str, used: list[float], base: list[float], baseline: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(used, base, strict=True)]
    target = TARGETS.get(name, 0.0)
    text = f"{baseline}, target {target:g}x" if target else baseline
    return bench_row(
        f"{name}, CPU a record",
        statistics.median(used),
        "us",
        text,
        ratios,
        ratio=statistics.median(used) / statistics.median(base),
    )
