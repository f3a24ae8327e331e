"""Training and token jobs from a set in place, and its requests to a real object store."""

import json
import os
from pathlib import Path

import pytest

from bench.support.counted import CountedStore
from cluster.object_server import ObjectServer
from core.errors import CorruptError
from core.keys import key_fraction
from core.storage.s3 import S3Store
from core.storage.store import FolderStore, Store, open_store
from data_pipeline.config import PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.raw_set import Base, write_view
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.formats.views import places
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.stream import stored_records
from tests.harness import tapir
from tests.in_place import epoch, img2dataset, in_place_set, kept_by, records_of, written

BUCKET, SIDE = "tapir-tests", 40
TARS, PAIRS = (int(n) for n in os.environ.get("TAPIR_PACK_TARS", "5x100").split("x"))
"""Archives and pairs in each of an epoch, e.g. 40x500."""


def _tokens(place: Path) -> dict[int, tuple[list[int], list[int]]]:
    records = [r for s in SPLITS for r in stored_records(TokenSource(FolderStore(place), s))]
    return {record.id: (record.image.tolist(), record.text.tolist()) for record in records}


@pytest.mark.world
def test_a_set_in_place_trains_a_dvae_and_gives_the_tokens_of_a_copy(
    bpe: Path, dvae: Path, tmp_path: Path
) -> None:
    src = tmp_path / "src"
    tars = [written(src, f"{i:05d}.tar", img2dataset(100 * i, 24, SIDE)) for i in range(3)]
    copied, placed = tmp_path / "copied", tmp_path / "placed"
    pack(str(src), FolderStore(copied), PackConfig(block=4, validation=0.3))
    in_place_set(FolderStore(placed), tars, validation=0.3)
    flags = [f"--bpe={bpe}", f"--dvae={dvae}", "--block=8"]
    for store in (copied, placed):
        tapir("tokenize", str(store), f"{store}-tokens", *flags)
    assert _tokens(tmp_path / "copied-tokens") == _tokens(tmp_path / "placed-tokens")
    train = ["train", "dvae", "tiny", f"--data={placed}", f"--out={tmp_path / 'run'}"]
    train += ["--loop.steps=3", "--loop.global-batch-size=8", "--mesh.data=1"]
    train += ["--loop.validate-every=3", "--loop.validation-samples=8", "--order.lanes=4"]
    tapir(*train)
    run = f"--run={tmp_path / 'run'}"
    pairs = json.loads(tapir("batch", "2", run, "--json").splitlines()[0])["pairs"]
    assert pairs[0]["shard"] in {str(path) for path in tars}
    steps = json.loads(tapir("seen", pairs[0]["key"], run, "--json").splitlines()[0])["steps"]
    assert 2 in steps
    assert "validation" in tapir("verify", str(placed))
    tars[1].write_bytes(tars[1].read_bytes()[:-512])
    assert f"{tars[1]} has changed since it was packed" in tapir("verify", str(placed), code=1)


@pytest.mark.slow
def test_an_epoch_from_an_object_store_and_a_replaced_archive(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests and bytes of an epoch: copied, in place, and with a fifth left out by a mask."""
    with s3.credentials():
        src = S3Store(BUCKET, "in-place-src")
        names = [f"{i:05d}.tar" for i in range(TARS)]
        tars = [
            written(tmp_path / "src", name, img2dataset(2 * PAIRS * i, PAIRS))
            for i, name in enumerate(names)
        ]
        for path in tars:
            src.put(path.name, path.read_bytes())
        copied, placed, fewer = (S3Store(BUCKET, f"in-place-{name}") for name in "cpf")
        pack(str(tars[0].parent), copied, PackConfig(block=16, validation=0.1, shard_pairs=200))
        where = {path: (f"{src.url}/{path.name}", src.head(path.name)[1]) for path in tars}
        in_place_set(placed, tars, block=16, validation=0.1, where=where)
        assert records_of(placed) == records_of(copied)
        for split in SPLITS:
            keep = kept_by(placed, split, lambda key: key_fraction(key) < 0.8)
            write_view(fewer, f"{split}/", [Base(store=placed, split=split, keep=keep)], {}, {})
        opened: list[CountedStore] = []

        def counted(url: str) -> Store:
            opened.append(CountedStore(open_store(url)))
            return opened[-1]

        monkeypatch.setattr(places, "open_store", counted)
        (gets, read), *others = (epoch(store, opened) for store in (copied, placed, fewer))
        ratios = [(each[0] / gets, each[1] / read) for each in others]
        print(f"GETs and bytes a record over a copy's: {ratios}; of a copy: {gets}, {read}")
        assert others[0][0] <= 1.2 * gets and others[0][1] <= 1.1 * read
        assert others[1][0] <= 1.5 * gets and others[1][1] <= 1.5 * read
        data = bytearray(tars[2].read_bytes())
        data[700] ^= 1
        src.put(tars[2].name, bytes(data))
        source = RawSource(placed, "train")
        with pytest.raises(CorruptError, match=r"00002\.tar has changed since .* the ETag"):
            for block in range(len(source.sizes)):
                source.read(block)
