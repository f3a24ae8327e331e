"""Archives, folders and tables in the wild: each file ends in a pair or a named reject."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from core.errors import InputError
from core.storage.store import FolderStore
from data_pipeline.config import PackConfig
from data_pipeline.images.crops import encode_png
from data_pipeline.packing.pack import pack
from data_pipeline.sources.pair import Pair, Unusable, key_of
from data_pipeline.sources.places import LocalFiles, StoredFiles
from data_pipeline.sources.plan import open_sources, plan_units
from data_pipeline.sources.table import TablePart, table_pairs
from data_pipeline.sources.units import unit_pairs
from tests.faults.corpus import picture

APPLE_DOUBLE = b"\0\5\26\7" + b"\0" * 200
Members = Iterable[tuple[str, bytes]]


def _picture(shade: int) -> bytes:
    return encode_png(np.full((20, 24, 3), shade, np.uint8))


def _pairs(prefix: str, count: int) -> list[tuple[str, bytes]]:
    rows = []
    for i in range(count):
        rows += [(f"{prefix}{i:03d}.png", _picture(i)), (f"{prefix}{i:03d}.txt", b"words")]
    return rows


def _tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _folder(path: Path, members: Members) -> Path:
    for name, data in members:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def packed_items(*texts: str) -> list[Pair | Unusable]:
    """What the units of some sources yield, in order."""
    sources = open_sources(texts)
    plan = plan_units(sources, PackConfig())
    return [
        item
        for unit in plan.units
        for item in unit_pairs(
            unit, sources[unit.source].files, plan.listings.get(unit.name, []), PackConfig()
        )
    ]


def _read(source: Path) -> tuple[list[Pair], list[Unusable]]:
    items = packed_items(str(source))
    pairs = [item for item in items if isinstance(item, Pair)]
    return pairs, [item for item in items if isinstance(item, Unusable)]


def _captions(pairs: list[Pair]) -> dict[str, str]:
    return {pair.key: pair.caption.decode() for pair in pairs}


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_metadata_of_file_systems_is_passed_over_and_named(tmp_path: Path, kind: str) -> None:
    names = ["._000.png", "._000.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "below/._x.jpg"]
    names += ["__MACOSX/._001.png", "__MACOSX/001.png", "@eaDir/001.png/thumb.jpg"]
    odd = [(name, APPLE_DOUBLE) for name in names]
    members = odd + _pairs("", 3)
    if kind == "tar":
        source = _tar(tmp_path / "a.tar", [(f"./{name}", data) for name, data in members])
    else:
        source = _folder(tmp_path / "in", members)
    pairs, rejects = _read(source)
    assert len(pairs) == 3 and {reject.kind for reject in rejects} == {"metadata"}
    whole_folders = 2 if kind == "folder" else 3
    assert len(rejects) == 6 + whole_folders
    assert all("metadata of a file system" in reject.reason for reject in rejects)
    manifests = pack(str(source), FolderStore(tmp_path / "out"), PackConfig(validation=0.4))
    assert manifests["train"].rejects == {"metadata": len(rejects)}


def test_metadata_among_tars_is_no_tar(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _tar(source / "a.tar", _pairs("", 2))
    (source / "._a.tar").write_bytes(APPLE_DOUBLE)
    pairs, rejects = _read(source)
    assert len(pairs) == 2 and [reject.kind for reject in rejects] == ["metadata"]


@pytest.mark.parametrize("packed", ["plain", "gzip", "gzip parts", "bz2 parts", "xz parts"])
def test_joined_archives_are_read_past_each_end_mark(tmp_path: Path, packed: str) -> None:
    parts = [
        _tar(tmp_path / f"{n}.tar", _pairs(n, 4), tarfile.GNU_FORMAT).read_bytes() for n in "abc"
    ]
    opener = {"gzip parts": gzip, "bz2 parts": bz2, "xz parts": lzma}.get(packed)
    whole = b"".join(opener.compress(part) if opener else part for part in parts)
    ending = {"bz2 parts": "tar.bz2", "xz parts": "tar.xz", "plain": "tar"}.get(packed, "tar.gz")
    source = tmp_path / f"joined.{ending}"
    source.write_bytes(gzip.compress(whole) if packed == "gzip" else whole)
    pairs, rejects = _read(source)
    assert not rejects
    assert [pair.where.rpartition(":")[2][0] for pair in pairs] == list("aaaabbbbcccc")


@pytest.mark.parametrize("damage", ["second header", "no second end", "noise"])
def test_what_is_lost_after_an_end_mark_is_a_reject(tmp_path: Path, damage: str) -> None:
    first = _tar(tmp_path / "a.tar", _pairs("a", 3)).read_bytes()
    second = bytearray(_tar(tmp_path / "b.tar", _pairs("b", 3)).read_bytes())
    if damage == "second header":
        second[5] ^= 1
    elif damage == "no second end":
        del second[6 * 1024 :]
    else:
        second[:] = os.urandom(2048)
    source = tmp_path / "joined.tar"
    source.write_bytes(first + second)
    pairs, rejects = _read(source)
    assert len(pairs) == (6 if damage == "no second end" else 3)
    assert [reject.kind for reject in rejects] == ["archive"]
    assert "joined.tar is not a whole tar archive" in rejects[0].reason


def test_names_may_have_dots(tmp_path: Path) -> None:
    """A pair's name ends at the last dot; other files of that name become further fields."""
    members = [*_pairs("clip v1.5 ", 3), *_pairs("set.v1/", 2), ("7.cls.txt", b"3")]
    members += [("7.mask.png", _picture(9)), ("7.png", _picture(7)), ("7.txt", b"seven")]
    members += [("7.v2.png", _picture(8)), ("7.v2.txt", b"seven again"), ("8.b.png", _picture(1))]
    members += [("9.jpg", picture("JPEG")), ("9.mask.png", _picture(9)), ("9.txt", b"nine")]
    pairs, rejects = _read(_tar(tmp_path / "a.tar", members))
    assert len(pairs) == 3 + 2 + 3 and len({pair.key for pair in pairs}) == 8
    assert {"seven", "seven again", "nine"} < set(_captions(pairs).values())
    fields = ("7.cls.txt", "7.mask.png", "9.mask.png")
    kinds = sorted((r.kind, r.key.rpartition(":")[2]) for r in rejects)
    assert kinds == [("caption", "8.b.png"), *(("ignored", name) for name in fields)]
    folder = _folder(tmp_path / "in", [*_pairs("clip v1.5 ", 3), *_pairs("set.v1/", 2)])
    pairs, rejects = _read(folder)
    assert len({pair.key for pair in pairs}) == 5 and not rejects


def test_frames_of_one_name_are_no_fields_without_a_pair(tmp_path: Path) -> None:
    members = [("film.txt", b"a film"), *((f"film.{i}.png", _picture(i)) for i in range(4))]
    pairs, rejects = _read(_tar(tmp_path / "a.tar", members))
    assert not pairs and sorted(r.kind for r in rejects) == ["caption"] * 4 + ["image"]


def test_no_member_is_lost_where_a_name_comes_twice(tmp_path: Path) -> None:
    first, second = [("x.png", _picture(1)), ("x.txt", b"one")], [("x.png", _picture(2))]
    good = _pairs("ok", 9)
    doubled = _tar(tmp_path / "a.tar", [*good, *first, *second, ("x.txt", b"two")])
    store = FolderStore(tmp_path / "out")
    config = PackConfig(validation=0.4, max_rejects=0.5)
    manifests = pack(str(doubled), store, config)
    assert manifests["train"].rejects == {"key": 1}
    reason = json.loads(store.get("rejects/000000.jsonl"))["reason"]
    assert "the key 'a__x'" in reason and "occurs twice" in reason
    with pytest.raises(InputError, match="occurs twice; give it another name"):
        pack(str(doubled), FolderStore(tmp_path / "strict"), PackConfig(validation=0.4))
    capitals = [("x.PNG", _picture(1)), ("x.png", _picture(2)), ("x.txt", b"which")]
    pairs, rejects = _read(_tar(tmp_path / "b.tar", good + capitals))
    assert len(pairs) == 10 and [r.kind for r in rejects] == ["caption"]
    later = pack(
        str(_tar(tmp_path / "c.tar", good + good[:2])), FolderStore(tmp_path / "c"), config
    )
    assert later["train"].rejects == {"key": 1}


def test_separated_members_are_rejects_that_ask_for_neighbours(tmp_path: Path) -> None:
    rows = _pairs("", 4)
    apart = sorted(rows, key=lambda row: row[0].rpartition(".")[2])
    pairs, rejects = _read(_tar(tmp_path / "a.tar", apart))
    assert not pairs and len(rejects) == 8
    assert all("must be neighbours in the archive" in r.reason for r in rejects)
    assert all("tar --sort=name" in r.reason for r in rejects)


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_pictures_of_other_types_are_rejects_with_their_captions(tmp_path: Path, kind: str) -> None:
    odd = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "TIFF": "TIFF", "avif": "", "heic": ""}
    members = _pairs("", 3)
    for extension, form in odd.items():
        data = picture(form) if form else b"\0\0\0\x1cftypheic"
        members += [(f"odd-{extension}.{extension}", data), (f"odd-{extension}.txt", b"odd")]
    members += [("shards.zip", b"PK\3\4")]
    source = tmp_path / "in"
    source = _folder(source, members) if kind == "folder" else _tar(tmp_path / "a.tar", members)
    pairs, rejects = _read(source)
    assert len(pairs) == 3
    assert sorted(r.kind for r in rejects) == ["archive", *["image"] * len(odd)]
    assert all("convert it to PNG, JPEG or WebP" in r.reason for r in rejects if r.kind == "image")


def test_the_captions_of_a_picture_in_txt_and_json(tmp_path: Path) -> None:
    notes = {"list": ["one", "two\nlines"], "one": "just one", "bom": "marked", "none": None}
    notes |= {"number": 5, "dict": {"en": "x"}, "blank": "", "both": "of the note"}
    members = []
    for name, value in notes.items():
        text = json.dumps({"caption": value}).encode()
        text = b"\xef\xbb\xbf" + text if name == "bom" else text
        members += [(f"{name}.jpg", picture("JPEG")), (f"{name}.json", text)]
    members += [("both.txt", b" \n"), ("text.PNG", _picture(1)), ("text.TXT", b"a\r\nb\n\nc\n")]
    members += [("top.png", _picture(1)), ("top.json", b'["caption"]')]
    expected = {"list": "one\ntwo lines", "one": "just one", "bom": "marked", "blank": ""}
    expected |= {"both": "of the note", "text": "a\r\nb\n\nc\n"}
    members.sort()
    for source in (_folder(tmp_path / "in", members), _tar(tmp_path / "a.tar", members)):
        pairs, rejects = _read(source)
        assert {key.removeprefix("a__"): text for key, text in _captions(pairs).items()} == expected
        kinds = sorted(r.kind for r in rejects if r.kind != "ignored")
        assert kinds == ["caption"] * 4, rejects


def test_different_names_have_different_keys(tmp_path: Path) -> None:
    names = ["a_b", "a.b", "d__x", "d/x", "d_/x", "d/_x", "d___x", "\u202ea", "\x01a", "_a"]
    assert len({key_of(name) for name in names}) == len(names)
    assert key_of("00000/000000012") == "00000__000000012" and key_of("a_b") == "a_b"
    members = []
    for name in ("a_b", "a.b", "d__x", "d/x"):
        members += [(f"{name}.png", _picture(len(members))), (f"{name}.txt", b"words")]
    manifests = pack(
        str(_folder(tmp_path / "in", members)),
        FolderStore(tmp_path / "o"),
        PackConfig(validation=0.4),
    )
    assert sum(manifest.samples for manifest in manifests.values()) == 4


@given(st.lists(st.text("ab_./\x02\u00e9", min_size=1, max_size=6), unique=True, max_size=40))
def test_keys_are_injective_and_plain(names: list[str]) -> None:
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == len(names)
    assert not any(set("./\x02") & set(key) for key in keys)


def test_names_that_are_no_utf8_have_keys_of_their_own(tmp_path: Path) -> None:
    members = []
    for code in (b"\xe9", b"\xe8"):
        members += [(os.fsdecode(code) + ".png", _picture(1)), (os.fsdecode(code) + ".txt", b"x")]
    pairs, rejects = _read(_tar(tmp_path / "a.tar", members, tarfile.GNU_FORMAT))
    assert len({pair.key for pair in pairs}) == 2 and not rejects
    assert all(pair.key.isascii() for pair in pairs)


def test_one_row_of_a_table_is_one_reject(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(_picture(i))
    for name in ("a:b.png", "a#b.png", "a b.png"):
        (tmp_path / name).write_bytes(_picture(9))
    (tmp_path / "shut.png").mkdir()
    good = [*(f"{i}.png" for i in range(5)), "a:b.png", "a#b.png", "a b.png"]
    good.append((tmp_path / "5.png").as_uri())
    bad = [
        "http://[bad/x.png",
        "file://[x",
        "https://x/a.png",
        "s3://b/k.png",
        "C:\\x\\1.png",
        None,
    ]
    bad += ["shut.png", "x" * 5000, "a\0b", "data:image/png;base64,AAAA", "../up.png", ""]
    captions = [f"row {i}" for i in range(len(good))] + ["bad"] * len(bad)
    table = pyarrow.table({"url": [*good, *bad], "caption": captions})
    parquet.write_table(table, tmp_path / "t.parquet")
    pairs, rejects = _read(tmp_path / "t.parquet")
    assert len(pairs) == len(good)
    assert [r.kind for r in rejects] == ["row"] * len(bad)
    assert [r.key for r in rejects] == [f"t__{i + len(good):09d}" for i in range(len(bad))]
    assert "is not on this machine; fetch it first" in rejects[2].reason


def test_a_row_without_its_file_has_one_reason_in_a_folder_and_in_a_store(tmp_path: Path) -> None:
    rows = {"path": ["none.png", "C:\\x.png", "sub/none.jpg"], "caption": ["words"] * 3}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    part = TablePart("t.parquet", "t")
    local = list(table_pairs(LocalFiles(tmp_path), part))
    assert local == list(table_pairs(StoredFiles(FolderStore(tmp_path)), part))
    assert [row.reason.endswith("is not a file") for row in local] == [True] * 3  # type: ignore[union-attr]


def test_a_caption_that_is_no_text_is_one_reject(tmp_path: Path) -> None:
    """Some writers allow bytes that are not UTF-8 in a text column."""
    (tmp_path / "1.png").write_bytes(_picture(1))
    raw = pyarrow.array([b"good", b"caf\xe9", b"fine"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    table = pyarrow.table({"path": ["1.png"] * 3, "caption": texts})
    parquet.write_table(table, tmp_path / "t.parquet")
    pairs, rejects = _read(tmp_path / "t.parquet")
    assert [pair.caption for pair in pairs] == [b"good", b"fine"]
    assert [r.kind for r in rejects] == ["row"]


def test_a_damaged_table_is_one_reject_among_others(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(_picture(1))
    for name in ("a", "b", "c"):
        table = pyarrow.table({"path": ["1.png"], "caption": [name]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 broken")
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "d.parquet")
    pairs, rejects = _read(tmp_path)
    assert [pair.caption for pair in pairs] == [b"a", b"c"]
    assert [r.kind for r in rejects] == ["table", "table"] and "no column" in rejects[1].reason


@pytest.mark.parametrize("kind", ["hub", "img2dataset", "pandas"])
def test_tables_that_hold_their_pictures(tmp_path: Path, kind: str) -> None:
    data = [_picture(i) for i in range(3)]
    texts = ["zero", ["one", "uno"], None] if kind == "hub" else ["zero", "one", None]
    if kind == "hub":
        texts = [["zero"], ["one", "uno"], None]
        columns = {"image": [{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)]}
        columns["captions"] = texts
    elif kind == "img2dataset":
        columns = {"URL": ["http://x/1.jpg"] * 3, "jpg": data, "TEXT": texts}
    else:
        columns = {"__index_level_0__": [0, 1, 2], "image": data}
        columns["text"] = pyarrow.array(texts, pyarrow.large_string()).dictionary_encode()
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    pairs, rejects = _read(tmp_path / "t.parquet")
    assert [pair.image for pair in pairs] == data[:2] and [pair.extension for pair in pairs] == [
        *("png", "png")
    ]
    assert pairs[1].caption == (b"one\nuno" if kind == "hub" else b"one")
    assert [r.kind for r in rejects] == ["row"]


def test_a_file_that_may_not_be_read_is_one_reject(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", _pairs("", 3))
    (source / "000.txt").unlink()
    (source / "000.txt").mkdir()
    (source / "notes.csv").write_text("x")
    pairs, rejects = _read(source)
    assert len(pairs) == 2 and sorted(r.kind for r in rejects) == ["caption", "ignored"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_no_pair_of_a_corrupt_archive_is_lost_silently(tmp_path: Path, form: int) -> None:
    """If pairs are missing there is a reject, and no other exception is raised."""
    name = "x" * (90 if form == tarfile.USTAR_FORMAT else 150)
    whole = _tar(tmp_path / "a.tar", [*_pairs("", 3), *_pairs(name, 1)], form).read_bytes()
    rng = np.random.default_rng(form)
    for turn in range(250):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] ^= rng.integers(1, 256)
        if turn % 10 == 0:
            del data[rng.integers(len(data)) :]
        if turn % 2:
            seal(data)
        (tmp_path / "a.tar").write_bytes(data)
        pairs, rejects = _read(tmp_path / "a.tar")
        assert len(pairs) == 4 or rejects, turn


def seal(data: bytearray) -> None:
    """Gives headers valid checksums, so that a reader trusts them."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            header = data[at : at + 512]
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            data[at + 148 : at + 156] = b"%06o\0 " % total


def test_a_folder_may_have_any_name_and_other_files_are_no_source(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    manifests = pack(
        str(_folder(folder, _pairs("", 12))),
        FolderStore(tmp_path / "o"),
        PackConfig(validation=0.4),
    )
    assert sum(manifest.samples for manifest in manifests.values()) == 12
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="unpack other archives"):
        pack(str(tmp_path / "a.zip"), FolderStore(tmp_path / "z"), PackConfig())
