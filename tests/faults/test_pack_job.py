"""Pack from and to a real object store: killed workers, and odd archives in a bucket."""

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bench.support.proxy import faulty_proxy
from cluster.object_server import ObjectServer
from core.errors import InputError
from core.files.atomic import sha256
from core.storage.s3 import S3Store
from core.storage.store import FolderStore, Store
from data_pipeline.config import PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.packing.pack import pack
from tests.faults.conftest import Record
from tests.harness import tapir
from tests.in_place import img2dataset, noise, tar_bytes, written
from tests.multiprocess.jobs.kills import Workers

BUCKET = "tapir-tests"
TARS, PAIRS = (int(n) for n in os.environ.get("TAPIR_PACK_TARS", "20x40").split("x"))
"""Archives and pairs in each, e.g. 40x500."""
WORKERS, KILLS = 4, 2


def _objects(place: str) -> dict[str, str]:
    store = S3Store(BUCKET, place)
    return {name: sha256(store.get(name)) for name in store.names() if name != "job.json"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["copied", "in-place"])
def test_workers_that_are_killed_twice_each_make_the_set_of_one(
    s3: ObjectServer, tmp_path: Path, how: str, fault: Record
) -> None:
    fault(40, f"pack {how}: {WORKERS} workers, each killed {KILLS} times, {TARS} x {PAIRS} pairs")
    with s3.credentials():
        for i in range(TARS):
            data = tar_bytes(img2dataset(i * PAIRS, PAIRS, side=16))
            S3Store(BUCKET, f"{how}-source").put(f"{i:05d}.tar", data)
    source, one, many = (f"s3://{BUCKET}/{how}-{name}" for name in ("source", "one", "many"))
    flags = ["--validation=0.2", "--block=8", "--lease-seconds=2"]
    flags += ["--in-place"] if how == "in-place" else ["--shard-pairs=150"]
    tapir("pack", source, one, *flags, **s3.environment)

    with Workers(["pack", source, many, *flags], WORKERS, tmp_path, s3.environment) as workers:
        for number in range(WORKERS):
            workers.start(number)
        with s3.credentials():
            store = S3Store(BUCKET, f"{how}-many")
            for _ in range(KILLS):
                workers.kill(range(WORKERS), store, ["units/"], again=True)
        workers.finish()
    with s3.credentials():
        expected = _objects(f"{how}-one")
        assert _objects(f"{how}-many") == expected
        sources = [RawSource(store, split) for split in SPLITS]
        keys = {r.key for s in sources for b in range(len(s.sizes)) for r in s.read(b)}
    assert len(keys) == TARS * PAIRS
    assert any(name.endswith(".tar") for name in expected) == (how == "copied")
    fault.outcome(f"{KILLS * WORKERS} kills, every object equal to one undisturbed worker's")


def _odd_tars(root: Path) -> None:
    """Archives as FAULTS has them: joined, cut, unsorted, doubled, compressed, from a Mac."""
    rows = img2dataset(0, 10)
    mac = [(f"./{part}{name}", data) for name, data in rows for part in ("._", "")]
    written(root, "mac.tar", mac)
    (root / "joined.tar").write_bytes(tar_bytes(rows) + tar_bytes(img2dataset(50, 5)))
    written(root, "apart.tar", sorted(rows, key=lambda row: row[0].rpartition(".")[2]))
    written(root, "double.tar", [*rows, *rows[:3]])
    written(root, "dots.tar", [(f"clip v1.5 {name}", data) for name, data in rows])
    long = [("é" * 70 + name, data) for name, data in rows]
    (root / "pax.tar").write_bytes(tar_bytes(long, tarfile.PAX_FORMAT))
    (root / "cut.tar").write_bytes(tar_bytes(rows)[:-6000])
    one = noise(60)
    written(root, "case.tar", [*rows, ("x.PNG", one), ("x.png", noise(61)), ("x.txt", b"which")])
    latin = [(os.fsdecode(b"\xe9.") + end, part) for end, part in (("png", one), ("txt", b"e"))]
    (root / "latin1.tar").write_bytes(tar_bytes([*rows, *latin], tarfile.GNU_FORMAT))
    written(root, "other.tar", [*rows, ("g.gif", b"GIF89a"), ("g.txt", b"another type")])
    notes = [None, ["one", "two"], 5, "", {"en": "x"}, float("nan"), "of a note"]
    bodies = [json.dumps({"caption": note}).encode() for note in notes]
    bodies += [b'["caption"]', b"\xef\xbb\xbf" + bodies[-1]]
    noted = [((f"j{i}.png", one), (f"j{i}.json", body)) for i, body in enumerate(bodies)]
    noted += [(("e.png", one), ("e.json", bodies[6])), (("e.txt", b""),)]
    written(root, "notes.tar", [member for group in noted for member in group])
    (root / "empty.tar").write_bytes(b"")
    (root / "sub").mkdir()
    (root / "sub" / "zipped.tar.gz").write_bytes(gzip.compress(tar_bytes(rows), mtime=0))
    (root / "sub" / "escape.tar").write_bytes(tar_bytes([("../x.png", noise(1)), *rows]))
    (root / "loose.png").write_bytes(noise(3))
    (root / "00000_stats.json").write_text("{}")
    (root / ".DS_Store").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._a.tar").write_bytes(b"x")


def _folder(root: Path) -> None:
    """Loose pictures with captions, and what may be among them."""
    for i in range(20):
        written_to = root / ("deep/er" if i % 3 else "")
        written_to.mkdir(parents=True, exist_ok=True)
        (written_to / f"{i:02d}.PNG").write_bytes(noise(i))
        (written_to / f"{i:02d}.txt").write_text(f"picture {i}\nanother caption {i}")
    (root / "noted.png").write_bytes(noise(90))
    (root / "noted.json").write_text('{"caption": "of a note"}')
    for name in ("alone.png", "gif.gif", "bad.png", "._00.PNG", "Thumbs.db", "more.zip", "x.txt"):
        (root / name).write_bytes(noise(91) if name == "alone.png" else b"x")
    (root / "bad.txt").write_text("a broken picture")


def _tables(root: Path) -> None:
    """A table of paths beside pictures, with rows that leave it; and one of picture bytes."""
    for i in range(8):
        (root / f"{i}.png").write_bytes(noise(i))
    places = [*(f"{i}.png" for i in range(8)), "../up.png", "http://x/a.png", "none.png", None]
    places += ["x" * 3000, "a\0b", "C:\\x.png", "/etc/passwd"]
    rows = {"path": places, "caption": [f"row {i}" for i in range(len(places))]}
    parquet.write_table(pyarrow.table(rows), root / "a.parquet")
    pictures = [{"bytes": noise(100 + i), "path": f"{i}.png"} for i in range(70)]
    pictures += [{"bytes": None, "path": "3.png"}, {"bytes": b"x", "path": None}]
    captions = [["one", "two"]] * 72
    table = pyarrow.table({"image": pictures, "text": captions})
    parquet.write_table(table, root / "hub.parquet", row_group_size=9)
    (root / "torn.parquet").write_bytes((root / "hub.parquet").read_bytes()[:-500])


@pytest.mark.seconds
@pytest.mark.parametrize("make", [_odd_tars, _folder, _tables])
def test_a_bucket_ends_in_the_same_pairs_and_rejects_as_a_folder(
    s3: ObjectServer, tmp_path: Path, make: Callable[[Path], None], fault: Record
) -> None:
    fault(41, f"{make.__name__} in a bucket")
    root, name = tmp_path / "in", make.__name__.strip("_")
    root.mkdir()
    make(root)
    config = PackConfig(validation=0.3, max_rejects=0.9, shard_pairs=9, block=4)
    with s3.credentials():
        bucket = S3Store(BUCKET, f"odd-{name}")
        for path in filter(Path.is_file, root.rglob("*")):
            bucket.put(path.relative_to(root).as_posix(), path.read_bytes())
        pack(str(root), FolderStore(tmp_path / "local"), config)
        pack(bucket.url, S3Store(BUCKET, f"odd-{name}-out"), config)
        ends = [_end(FolderStore(tmp_path / "local"), str(root))]
        ends.append(_end(S3Store(BUCKET, f"odd-{name}-out"), bucket.url))
        config = replace(config, in_place=True)
        pack(str(root), FolderStore(tmp_path / "in-place"), config)
        pack(bucket.url, S3Store(BUCKET, f"odd-{name}-in-place"), config)
        ends.append(_end(FolderStore(tmp_path / "in-place"), str(root)))
        ends.append(_end(S3Store(BUCKET, f"odd-{name}-in-place"), bucket.url))
    assert ends[0] == ends[1] and len(ends[0][0]) > 15 and ends[0][1]
    copied, local, stored = (sorted(row for row in end[0] if row[2]) for end in ends[1:])
    assert copied == local == stored and ends[1][1] == ends[2][1] == ends[3][1]
    fault.outcome(f"{len(ends[0][0])} pairs and {len(ends[0][1])} rejects, as from a folder")


def _end(store: Store, source: str) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Shards with their digests and pairs, and the rejects, without the source's place."""
    sources = [RawSource(store, split) for split in SPLITS]
    shards = [(shard.name, shard.sha256) for s in sources for shard in s.manifest.shards]
    pairs = [
        (r.key, sha256(r.image), "|".join(r.captions))
        for s in sources
        for block in range(len(s.sizes))
        for r in s.read(block)
    ]
    names = store.names("rejects/")
    lines = [line for name in names for line in store.get(name).decode().splitlines()]
    rows = [json.loads(line.replace(source, "SRC")) for line in lines]
    rejects = [(row["key"], row["kind"]) for row in rows]
    return [*pairs, *((name, digest, "") for name, digest in shards)], rejects


@pytest.mark.seconds
def test_a_destination_in_a_bucket_is_a_prefix_that_no_source_lists(s3: ObjectServer) -> None:
    with s3.credentials():
        bucket = S3Store(BUCKET, "dest")
        for i in range(2):
            bucket.put(f"{i}.tar", tar_bytes(img2dataset(10 * i, 10)))
        before = bucket.names()
        for sources, dest, message in (
            (["0.tar"], "1.tar", "is an object, and DEST must be a prefix"),
            (["*"], "out", r"DEST .* is inside SRC s3://tapir-tests/dest/\*"),
            ([""], "out/deep", "is inside SRC"),
            (["0.tar"], "{2..3}.tar", "is a pattern"),
            (["0.tar", "?.tar"], "out", "0.tar is in two SRC"),
        ):
            with pytest.raises(InputError, match=message):
                places = [f"{bucket.url}/{name}" for name in sources]
                pack(places, S3Store(BUCKET, f"dest/{dest}"), PackConfig(validation=0.3))
        assert bucket.names() == before


@pytest.mark.seconds
def test_an_archive_is_read_on_where_a_body_was_cut(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Record
) -> None:
    fault(42, "S3 cuts bodies and answers 503 while an archive is read")
    data = tar_bytes(img2dataset(0, 300, side=40))
    with s3.credentials():
        S3Store(BUCKET, "cut-source").put("a.tar", data)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(data)
    config = PackConfig(validation=0.3)
    pack(str(tmp_path / "in"), FolderStore(tmp_path / "local"), config)
    cut: list[int] = []

    def plan(number: int, method: str, path: str) -> str:
        if method != "GET" or not path.partition("?")[0].endswith("a.tar") or len(cut) > 6:
            return ""
        cut.append(number)
        return "503" if len(cut) % 3 == 0 else "cut"

    with faulty_proxy(s3.endpoint, plan) as address:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        pack(f"s3://{BUCKET}/cut-source/a.tar", FolderStore(tmp_path / "out"), config)
    one, two = (FolderStore(tmp_path / name) for name in ("local", "out"))
    shard = "train/shard-000000.tar"
    assert len(cut) == 7 and one.get(shard) == two.get(shard)
    fault.outcome("resumed by range, the same shards")


@pytest.mark.seconds
def test_a_whole_bucket_and_one_object_are_sources(s3: ObjectServer, tmp_path: Path) -> None:
    with s3.credentials():
        bucket = S3Store("pack-whole", "")
        bucket.make_bucket()
        bucket.put("below/a.tar", tar_bytes(img2dataset(0, 20)))
        keys = []
        for number, source in enumerate(
            (bucket.url, f"{bucket.url}/below", f"{bucket.url}/below/a.tar")
        ):
            out = FolderStore(tmp_path / str(number))
            pack(source, out, PackConfig(validation=0.3))
            keys.append([pair[0] for pair in _end(out, source)[0][:20]])
    assert [{key.rpartition("__")[0] for key in row} for row in keys] == [
        {"below__a"},
        {"a"},
        {"a"},
    ]
