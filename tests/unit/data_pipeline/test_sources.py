"""What `tapir pack` reads, and what its filters leave out."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from core.errors import InputError
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import FilterConfig, PackConfig
from data_pipeline.formats.manifest import Manifest
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import encode_png
from data_pipeline.packing.filters import caption_reject, is_english
from data_pipeline.packing.pack import pack

HALF = PackConfig(validation=0.4)


def _picture(seed: int, size: tuple[int, int] = (40, 40)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return encode_png(noise.astype(np.uint8))


def _numbered(folder: Path, count: int, extension: str = "png") -> None:
    """Make a folder of pairs."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02d}.{extension}").write_bytes(_picture(i))
        (folder / f"{i:02d}.txt").write_text(f"number {i}")


def _pairs(out: Path) -> dict[str, RawRecord]:
    sources = [RawSource(FolderStore(out), split) for split in ("train", "validation")]
    return {r.key: r for s in sources for block in range(len(s.sizes)) for r in s.read(block)}


def _rejects(out: Path) -> dict[str, dict[str, str]]:
    store = FolderStore(out)
    lines = [line for name in store.names("rejects/") for line in store.get(name).splitlines()]
    return {row["key"]: row for row in map(json.loads, lines)}


def _total(manifests: dict[str, Manifest]) -> int:
    return sum(manifest.samples for manifest in manifests.values())


def test_a_tar_of_the_webdataset_library_packs_and_reads_back_with_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pictures = {}
    for shard in range(2):
        with webdataset.TarWriter(open(tmp_path / "in" / f"{shard}.tar", "wb")) as sink:
            for i in range(10 * shard, 10 * shard + 10):
                picture = np.full((30, 20, 3), 10 * i, np.uint8)
                sink.write({"__key__": f"s{i:03d}", "png": picture, "txt": f"Number {i}", "cls": i})
                pictures[f"number {i}"] = picture
    pack(str(tmp_path / "in"), FolderStore(tmp_path / "out"), HALF)
    names = [str(path) for path in sorted((tmp_path / "out").rglob("*.tar"))]
    rows = list(webdataset.WebDataset(names, shardshuffle=False).decode("rgb8"))
    assert {row["txt"] for row in rows} == set(pictures)
    assert all((row["png"] == pictures[row["txt"]]).all() for row in rows)


def test_the_layouts_of_img2dataset_pack(tmp_path: Path) -> None:
    """Its tars of .jpg, .txt and .json beside a table and statistics, and its plain files."""
    for kind in ("webdataset", "files"):
        root = tmp_path / kind
        (root / "00000").mkdir(parents=True)
        with tarfile.open(root / "00000.tar", "w") as tar:
            for i in range(12):
                note = json.dumps({"caption": f"photo {i}", "key": f"{i:09d}", "status": "success"})
                parts = {"jpg": _picture(i), "txt": f"photo {i}".encode(), "json": note.encode()}
                if i == 5:
                    del parts["txt"]  # the caption is in the .json, too
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{i:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    if i != 5:
                        (root / "00000" / member.name).write_bytes(data)
        table = pyarrow.table({"url": ["http://x/1.jpg"], "caption": ["photo"], "status": ["ok"]})
        parquet.write_table(table, root / "00000.parquet")
        (root / "00000_stats.json").write_text("{}")
        if kind == "files":
            (root / "00000.tar").unlink()
        else:
            for path in (root / "00000").iterdir():
                path.unlink()
        manifests = pack(str(root), FolderStore(tmp_path / f"{kind}-out"), HALF)
        assert _total(manifests) == (12 if kind == "webdataset" else 11)


def test_a_table_of_local_paths_packs_and_rows_that_leave_it_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "table").mkdir()
    for i in range(8):
        (tmp_path / "table" / f"{i}.png").write_bytes(_picture(i))
    (tmp_path / "outside.png").write_bytes(_picture(9))
    places = [f"{i}.png" for i in range(7)] + [(tmp_path / "table" / "7.png").as_uri()]
    places += ["../outside.png", "http://example.org/a.png", "missing.png", None]
    rows = {"path": places, "caption": [f"row {i}" for i in range(12)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "table" / "t.parquet")
    config = PackConfig(validation=0.4, max_rejects=0.5)
    table = str(tmp_path / "table" / "t.parquet")
    manifests = pack(table, FolderStore(tmp_path / "out"), config)
    assert _total(manifests) == 8 and manifests["train"].rejects == {"row": 4}
    with pytest.raises(InputError, match="leaves the table's folder"):
        pack(table, FolderStore(tmp_path / "strict"), HALF)
    with pytest.raises(InputError, match="no column"):
        parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "table" / "t.parquet")
        pack(table, FolderStore(tmp_path / "other"), HALF)


def test_filters_leave_out_what_they_are_for_and_say_why(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    captions = {f"good{i}": f"a red bird number {i} on the roof" for i in range(10)}
    captions |= {
        "short": "bird",
        "german": "ein roter Vogel sitzt heute ganz allein da",
        "cyrillic": "красная птица на крыше",
        "date": "roof photographed on 3 May 2012 by me",
        "file": "IMG_0231",
        "wide": "a very wide picture of the sea",
        "tiny": "a tiny picture of the sea",
    }
    sizes = {"wide": (40, 100), "tiny": (20, 20)}
    for i, (name, caption) in enumerate(captions.items()):
        (source / f"{name}.png").write_bytes(_picture(i, sizes.get(name, (40, 40))))
        (source / f"{name}.txt").write_text(caption)
    for name, of in (("same", "good0"), ("near", "good1")):
        (source / f"{name}.txt").write_text(captions[of])
    (source / "same.png").write_bytes((source / "good0.png").read_bytes())
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    noise[3, 3] ^= 1
    (source / "near.png").write_bytes(encode_png(noise))
    filters = FilterConfig(
        min_words=2,
        english=True,
        boilerplate=True,
        aspect=2,
        min_side=32,
        duplicates=True,
        near=1,
    )
    config = PackConfig(validation=0.4, filters=filters)
    manifests = pack(str(source), FolderStore(tmp_path / "out"), config)
    kinds = {key: row["kind"] for key, row in _rejects(tmp_path / "out").items()}
    assert kinds == {
        "short": "short",
        "german": "language",
        "cyrillic": "language",
        "date": "boilerplate",
        "file": "short",
        "wide": "aspect",
        "tiny": "small",
        "same": "duplicate",
        "near": "near-duplicate",
    }
    assert _total(manifests) == 10 and sum(manifests["train"].rejects.values()) == 9
    threads = PackConfig(validation=0.4, filters=filters, threads=5)
    assert pack(str(source), FolderStore(tmp_path / "again"), threads) == manifests
    assert caption_reject("img_0231", FilterConfig(boilerplate=True)) is not None


def test_english_is_told_by_letters_and_common_words() -> None:
    assert is_english("two small dogs") and is_english("a dog in the snow on a sunny day")
    assert not is_english("ein hund liegt im tiefen schnee herum") and not is_english("12 34")


def test_keys_that_occur_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        (tmp_path / "in" / name).write_bytes(_picture(1))
    (tmp_path / "in" / "a.txt").write_text("twice")
    with pytest.raises(InputError, match="occurs twice"):
        pack(str(tmp_path / "in"), FolderStore(tmp_path / "out"), HALF)


def test_an_archive_that_breaks_off_is_a_reject_of_its_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            for extension, data in (("png", _picture(i)), ("txt", b"words")):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match="not a whole tar archive"):
        pack(str(tmp_path / "a.tar"), FolderStore(tmp_path / "strict"), HALF)
    config = PackConfig(validation=0.4, max_rejects=0.5)
    manifests = pack(str(tmp_path / "a.tar"), FolderStore(tmp_path / "out"), config)
    assert manifests["train"].rejects == {"archive": 1} and 4 <= _total(manifests) < 12


@pytest.mark.parametrize("damage", ["header", "boundary", "inside a header", "data"])
def test_a_tar_that_is_damaged_or_cut_is_never_taken_for_a_short_one(
    tmp_path: Path, damage: str
) -> None:
    path = _tar(tmp_path / "a.tar", [f"{i}.{e}" for i in range(20) for e in ("png", "txt")])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[22]
    if damage == "header":
        data[member.offset + 3] ^= 0x11
    cuts = {"boundary": member.offset, "inside a header": member.offset + 100}
    cuts["data"] = member.offset_data + 5
    path.write_bytes(data[: cuts.get(damage, len(data))])
    with pytest.raises(InputError, match="not a whole tar archive"):
        pack(str(path), FolderStore(tmp_path / "strict"), HALF)
    config = PackConfig(validation=0.4, max_rejects=0.5)
    manifests = pack(str(path), FolderStore(tmp_path / "out"), config)
    assert manifests["train"].rejects["archive"] == 1 and 8 <= _total(manifests) <= 11


def test_nothing_in_a_folder_of_tars_is_passed_over_in_silence(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "below").mkdir(parents=True)
    names = [f"{i}.{e}" for i in range(6) for e in ("png", "txt")]
    _tar(root / "a.tar", names)
    _tar(root / "b.tar.gz", names, "w:gz")
    _tar(root / "below" / "a.tar", [*names, "5.jpg"])
    (root / "loose.png").write_bytes(_picture(1))
    (root / "loose.txt").write_text("loose")
    with pytest.raises(InputError, match=r"second picture|is among tars"):
        pack(str(root), FolderStore(tmp_path / "strict"), HALF)
    config = PackConfig(validation=0.4, max_rejects=0.5)
    manifests = pack(str(root), FolderStore(tmp_path / "out"), config)
    assert _total(manifests) == 18
    assert manifests["train"].rejects == {"image": 1, "file": 1, "ignored": 1}


def test_capitals_are_pictures_too_and_count_counts_pairs(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _numbered(source, 12, "JPEG")
    for i in range(12):
        (source / f"{i:02d}.note").write_text("x")
    manifests = pack(
        str(source), FolderStore(tmp_path / "out"), PackConfig(validation=0.4, count=10)
    )
    assert _total(manifests) == 10 and set(manifests["train"].rejects) == {"ignored"}


def test_links_to_nothing_are_rejects(tmp_path: Path) -> None:
    pictures, tars = tmp_path / "pictures", tmp_path / "tars"
    _numbered(pictures, 12)
    tars.mkdir()
    (pictures / "gone.png").symlink_to(tmp_path / "nothing")
    _tar(tars / "a.tar", [f"{i}.{e}" for i in range(12) for e in ("png", "txt")])
    (tars / "gone.tar").symlink_to(tmp_path / "nothing")
    for number, source in enumerate((pictures, pictures / "*", tars, tars / "*.tar")):
        with pytest.raises(InputError, match=r"gone\.(png|tar) "):
            pack(str(source), FolderStore(tmp_path / f"strict-{number}"), HALF)
        config = PackConfig(validation=0.4, max_rejects=0.5)
        manifests = pack(str(source), FolderStore(tmp_path / f"out-{number}"), config)
        assert _total(manifests) == 12 and sum(manifests["train"].rejects.values()) == 1


def test_a_failed_mend_deletes_nothing_of_a_finished_set(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _numbered(source, 30)
    config, out = PackConfig(validation=0.4, shard_pairs=10), FolderStore(tmp_path / "out")
    pack(str(source), out, config)
    before = {name: out.get(name) for name in out.names()}
    damaged = next(name for name in before if name.startswith("train/shard-000001"))
    (tmp_path / "out" / damaged).write_bytes(b"damaged")
    picture = source / "12.png"
    whole, stat = picture.read_bytes(), picture.stat()
    for data in (bytes(len(whole)), whole):  # damaged, too, then mended, with the size and time
        picture.write_bytes(data)
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for member in (JobWorker(number=0, count=1), JobWorker(number=0, count=2)):
            if data == whole:
                pack(str(source), out, config, again=True, member=member)
                continue
            with pytest.raises(InputError, match=r"12\.png"):
                pack(str(source), out, config, again=True, member=member)
            left = set(out.names())
            assert {n for n in before if "shard-00000" in n} - left <= {
                n for n in before if "shard-000001" in n
            }
            assert "request.json" in left and "train/manifest.json" in left
    assert {name: out.get(name) for name in out.names()} == before


def test_a_refused_pack_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _numbered(source, 12)
    (source / "zz.png").write_bytes(b"broken")
    (source / "zz.txt").write_text("broken")
    out = FolderStore(tmp_path / "out")
    small = PackConfig(validation=0.4, shard_pairs=2)
    with pytest.raises(InputError, match="zz"):
        pack(str(source), out, small)
    assert out.names() == []
    (source / "zz.png").unlink()
    (source / "zz.txt").unlink()
    pack(str(source), out, HALF)
    assert len([name for name in out.names("train/") if name.endswith(".tar")]) == 1
    out.delete("request.json")
    with pytest.raises(InputError, match="holds other files"):
        pack(str(source), out, small)
    with pytest.raises(InputError, match="is inside SRC"):
        pack(str(source), FolderStore(source / "inside"), HALF)


def _tar(path: Path, names: list[str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name in names:
            data = b"a caption" if name.endswith("txt") else _picture(int(name.split(".")[0]))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
