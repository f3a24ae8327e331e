"""Pack as a job of workers: the plan, equal bytes for any workers, kills, refusals, several SRC."""

import io
import json
import random
import threading
from pathlib import Path
from typing import Literal

import pytest
import webdataset

from core.errors import InputError
from core.files.atomic import sha256
from core.storage.ranged_file import RangedFile
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import FilterConfig, PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.shards import TarBuffer
from data_pipeline.packing.judge import Judge
from data_pipeline.packing.pack import pack
from data_pipeline.packing.place import REQUEST, claim
from data_pipeline.packing.unit import UnitTask
from data_pipeline.sources import plan as planning
from data_pipeline.sources.files import FilePair
from data_pipeline.sources.patterns import Pattern
from data_pipeline.sources.plan import open_sources, plan_units
from data_pipeline.sources.units import Unit
from tests.in_place import img2dataset, noise, tar_bytes, written

SMALL = PackConfig(validation=0.3, shard_pairs=7, block=4, max_rejects=0.5, lease_seconds=1)
IN_PLACE = PackConfig(validation=0.3, block=4, max_rejects=0.5, lease_seconds=1, in_place=True)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five archives, one of them cut, with a duplicate pair in two of them."""
    root = tmp_path_factory.mktemp("tars")
    for i in range(4):
        twice = [("twice.png", noise(7777)), ("twice.txt", b"Picture twice")] if i % 2 else []
        written(root, f"{i:05d}.tar", [*img2dataset(100 * i, 15 + i), *twice])
    (root / "cut.tar").write_bytes(tar_bytes(img2dataset(900, 12))[:-9000])
    return root


def _objects(root: Path) -> dict[str, str]:
    """Digests of the set's objects, without what only says who did what."""
    store = FolderStore(root)
    return {name: sha256(store.get(name)) for name in store.names() if name != "job.json"}


def _rejects(root: Path) -> list[dict[str, str]]:
    store = FolderStore(root)
    names = store.names("rejects/")
    return [json.loads(line) for name in names for line in store.get(name).splitlines()]


def _keys(root: Path) -> list[str]:
    sources = [RawSource(FolderStore(root), split) for split in SPLITS]
    return [r.key for s in sources for block in range(len(s.sizes)) for r in s.read(block)]


@pytest.mark.parametrize("config", [SMALL, IN_PLACE], ids=["copied", "in place"])
def test_the_set_is_the_same_for_any_worker_and_after_any_kill(
    tars: Path, tmp_path: Path, config: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(str(tars), FolderStore(tmp_path / "one"), config)
    expected = _objects(tmp_path / "one")
    pack(str(tars), FolderStore(tmp_path / "third"), config, member=JobWorker(number=2, count=3))
    assert _objects(tmp_path / "third") == expected
    rng, kills = random.Random(config.in_place), 0
    store, put = FolderStore(tmp_path / "killed"), FolderStore.put
    while True:
        left = rng.randint(1, 15)

        def dying(self: FolderStore, name: str, data: bytes, if_absent: bool = False) -> bool:
            nonlocal left
            left -= threading.current_thread() is threading.main_thread()  # not a lease's beat
            if left == 0:
                raise KeyboardInterrupt
            return put(self, name, data, if_absent)

        monkeypatch.setattr(FolderStore, "put", dying)
        try:
            pack(str(tars), store, config, member=JobWorker(number=kills % 2, count=2))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 1 and _objects(tmp_path / "killed") == expected
    assert not [name for name in expected if "_leases" in name or "_ledger" in name]
    copies = [name for name in expected if name.endswith(".tar")]
    assert not copies if config.in_place else len(copies) > 5


def test_a_set_in_place_and_its_copy_hold_the_same_pairs(tars: Path, tmp_path: Path) -> None:
    filters = FilterConfig(duplicates=True, near=0)
    both = {
        "copied": PackConfig(**{**vars(SMALL), "filters": filters}),
        "placed": PackConfig(**{**vars(IN_PLACE), "filters": filters}),
    }
    for name, config in both.items():
        manifests = pack(str(tars), FolderStore(tmp_path / name), config)
        assert manifests["train"].rejects == {"archive": 1, "duplicate": 1}
    keys = sorted(_keys(tmp_path / "copied"))
    assert keys == sorted(_keys(tmp_path / "placed")) and "00001__twice" in keys
    assert "00003__twice" not in keys and len(keys) == len(set(keys)) >= 15 + 17 + 17 + 19 - 1 + 8
    for name in both:
        reasons = {row["kind"]: row["reason"] for row in _rejects(tmp_path / name)}
        assert reasons["duplicate"] == "the same pair as 00001__twice"
        assert "cut.tar is not a whole tar archive" in reasons["archive"]


def test_compressed_archives_and_folders_are_copied_in_place(tars: Path, tmp_path: Path) -> None:
    import gzip

    packed = gzip.compress(tar_bytes(img2dataset(0, 20)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(packed)  # whatever its name says
    written(tmp_path / "in", "b.tar", img2dataset(50, 20))
    pack(str(tmp_path / "in"), FolderStore(tmp_path / "out"), IN_PLACE)
    assert len(_keys(tmp_path / "out")) == 40
    shards = [name for name in FolderStore(tmp_path / "out").names() if name.endswith(".tar")]
    assert {name.rpartition("/")[2] for name in shards} == {"shard-000000.tar"}


def test_a_refusal_ends_all_workers_and_says_why(tars: Path, tmp_path: Path) -> None:
    strict = PackConfig(**{**vars(SMALL), "max_rejects": 0.0})
    store, first = FolderStore(tmp_path / "out"), JobWorker(number=1, count=2)
    with pytest.raises(InputError, match=r"cut\.tar is not a whole tar archive.*--max-rejects"):
        pack(str(tars), store, strict, member=first)
    with pytest.raises(InputError, match=r"another worker has ended this job: .*cut\.tar"):
        pack(str(tars), store, strict, member=JobWorker(number=0, count=2))
    pack(str(tars), store, SMALL)  # another request has the place
    pack(str(tars), FolderStore(tmp_path / "fresh"), SMALL)
    assert _objects(tmp_path / "out") == _objects(tmp_path / "fresh")


def test_too_many_unusable_pairs_of_the_whole_set_end_the_job_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.packing.judge.LEAST", 10)
    bad = [(f"{i}.{e}", b"x") for i in range(20) for e in ("png", "txt")]
    for i in range(6):
        written(tmp_path / "in", f"{i}.tar", [*img2dataset(0, 6), *bad])
    store = FolderStore(tmp_path / "out")
    with pytest.raises(InputError, match=r"\d+ of \d+ pairs are unusable, more than max_rejects"):
        pack(str(tmp_path / "in"), store, PackConfig(validation=0.3, max_rejects=0.1))
    assert store.names() == []


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_sizes_in_bytes_and_in_files_are_not_added(
    kind: Literal["tar", "files"], tmp_path: Path
) -> None:
    sizes: list[tuple[Literal["tar", "files"], int]] = [("tar", 10**9), (kind, 10**6)]
    tasks = [
        UnitTask(name=str(i), shown="", number=i, units=(Unit(kind=k),), bytes=size)
        for i, (k, size) in enumerate(sizes)
    ]
    judge = Judge(FolderStore(tmp_path), tasks, most=0.01, alone=True)
    counts = {"unusable": 200, "pairs": 10_000, "first": "x"}
    if kind == "files":  # a million pairs to come: 200 are not too many
        judge.judge(tasks[0], counts)
        return
    with pytest.raises(InputError, match="200 of 10000 pairs are unusable"):
        judge.judge(tasks[0], counts)


def test_several_sources_and_patterns_keep_their_keys_apart(tmp_path: Path) -> None:
    for folder in "ab":
        for i in range(2):
            written(tmp_path / folder, f"{i}.tar", img2dataset(10 * i, 6))
    places = [str(tmp_path / folder) for folder in "ab"]
    pack(places, FolderStore(tmp_path / "out"), SMALL)
    keys = _keys(tmp_path / "out")
    assert len(keys) == len(set(keys)) == 24
    assert {key.rpartition("__")[0] for key in keys} == {"0", "1", "~1__0", "~1__1"}
    pack(str(tmp_path / "{a,b}" / "?.tar"), FolderStore(tmp_path / "glob"), SMALL)
    assert {key.rpartition("__")[0] for key in _keys(tmp_path / "glob")} == {
        *("a__0", "a__1", "b__0", "b__1")
    }
    with pytest.raises(InputError, match=r"no file matches .*b/2\.tar"):
        pack(str(tmp_path / "b" / "{0..2}.tar"), FolderStore(tmp_path / "none"), SMALL)


def test_a_source_is_packed_once_and_holds_something(tmp_path: Path) -> None:
    a, b = (written(tmp_path / name, "0.tar", img2dataset(0, 9)).parent for name in "ab")
    (b / "1.tar").symlink_to(a / "0.tar")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("no picture")
    (tmp_path / "empty").mkdir()
    for name, message in (
        (f"{tmp_path}/?/0.tar", "a/0.tar is in two SRC"),
        (f"{tmp_path}/notes", "holds no pairs: .*; its files are passed over: .*read.me"),
        (f"{tmp_path}/empty", "holds no pairs"),
    ):
        with pytest.raises(InputError, match=message):
            pack([str(a), name], FolderStore(tmp_path / "out"), SMALL)
    pack([str(a), str(b / "0.tar")], FolderStore(tmp_path / "out"), SMALL)
    assert len(_keys(tmp_path / "out")) == 18


@pytest.mark.parametrize(
    ("pattern", "dest", "is_inside"),
    [
        *(("*", "out", True), ("*.tar", "out", False), ("**/*.tar", "out", True)),
        *(("{0..1}.tar", "out", False), ("{0.tar,out}", "out/deep", True), ("?", "../out", False)),
    ],
)
def test_a_destination_that_a_pattern_would_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, dest: str, is_inside: bool
) -> None:
    for i in range(2):
        written(tmp_path / "in", f"{i}.tar", img2dataset(10 * i, 10))
    written(tmp_path / "in" / "out", "2.tar", img2dataset(50, 10))
    written(tmp_path / "in" / "x", "3.tar", img2dataset(60, 10))
    monkeypatch.chdir(tmp_path / "in")
    if is_inside:
        with pytest.raises(InputError, match=r"DEST .* is inside SRC"):
            pack(pattern, FolderStore(Path(dest)), SMALL)
        return
    pack(pattern, FolderStore(Path(dest)), SMALL)
    before = _objects(Path(dest))
    pack(pattern, FolderStore(Path(dest)), SMALL)
    assert _objects(Path(dest)) == before


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("data/{0..2}.tar", "0.tar 2.tar"),
        ("data/*.tar", "0.tar 2.tar 3.tar"),
        ("data/**/*.tar", "0.tar 2.tar 3.tar sub/4.tar sub/x/5.tar"),
        ("data/su?", "sub/4.tar sub/x/5.tar"),
        ("data/{su*/x,[!02].tar}", "3.tar sub/x/5.tar"),
    ],
)
def test_patterns_select_names_and_what_is_below(pattern: str, selected: str) -> None:
    names = ["0.tar", "2.tar", "3.tar", "3.txt", "sub/4.tar", "sub/x/5.tar"]
    made = Pattern(pattern)
    assert made.root == "data" and " ".join(filter(made.selects, names)) == selected
    chosen = [name for name in names if made.selects(name) and "/" in name]
    assert all(made.enters(name.rpartition("/")[0]) for name in chosen)


def test_a_malformed_range_is_no_pattern() -> None:
    with pytest.raises(InputError, match=r"is not a pattern: bad character range"):
        Pattern("data/[z-a].tar")


def test_pictures_of_one_name_are_in_one_slice(tmp_path: Path) -> None:
    names = [f"{i:02d}" for i in range(30)]
    rows = [FilePair(f"{name}.{e}", "", "") for name in names for e in ("jpg", "mask.png", "png")]
    slices = list(planning._slices(rows, 4))
    assert [row for part in slices for row in part] == rows
    assert {len(part) for part in slices} == {6}
    stems = [{row.picture.partition(".")[0] for row in part} for part in slices]
    assert sum(map(len, stems)) == len(set().union(*stems))


def test_a_changed_archive_is_refused_and_a_new_one_is_another_set(
    tars: Path, tmp_path: Path
) -> None:
    written(tmp_path / "in", "a.tar", img2dataset(0, 20))
    sources = open_sources([str(tmp_path / "in")])
    assert [unit.archive for unit in plan_units(sources, SMALL).units] == ["a"]
    store = FolderStore(tmp_path / "out")
    pack(str(tmp_path / "in"), store, SMALL)
    written(tmp_path / "in", "b.tar", img2dataset(0, 5))
    with pytest.raises(InputError, match="choose an empty DEST"):
        pack(str(tmp_path / "in"), store, SMALL)


def test_a_shard_has_the_bytes_that_webdataset_writes() -> None:
    rng = random.Random(3)
    samples = []
    for i in range(60):
        key = f"k{i}{'é' if i % 7 == 0 else ''}{'x' * (2 * i)}"
        samples.append({"__key__": key, "jpg": rng.randbytes(i * 37), "json": b"{}", "txt": b"a"})
    tar = TarBuffer()
    for sample in samples:
        for extension in ("jpg", "json", "txt"):
            tar.add(f"{sample['__key__']}.{extension}", bytes(sample[extension]))
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=0, user="tapir", group="tapir")
    for sample in samples:
        writer.write(sample)
    writer.close()
    assert tar.finish() == buffer.getvalue()


def test_a_stored_object_reads_like_a_file(tmp_path: Path) -> None:
    rng, store = random.Random(5), FolderStore(tmp_path)
    data = rng.randbytes(10_000)
    store.put("x", data)
    asked: list[tuple[int, int | None]] = []
    get = store.get

    def counted(name: str, start: int = 0, length: int | None = None) -> bytes:
        asked.append((start, length))
        return get(name, start, length)

    store.get = counted  # type: ignore[method-assign]
    with RangedFile(store, "x", len(data), part=1024) as file:
        assert b"".join(iter(lambda: file.read(777), b"")) == data
        assert sorted(asked) == [(i, min(1024, 10_000 - i)) for i in range(0, 10_000, 1024)]
        assert len(file._kept) <= 4
        for _ in range(200):
            start = rng.randint(0, 10_100)
            file.seek(start)
            size = rng.randint(0, 1500)
            part = file.read(size)
            assert data[start : start + size].startswith(part)
            assert part or size == 0 or start >= len(data)
        assert file.seek(-5, 2) == 9_995 and file.read() == data[-5:]


REQUESTED = {"source": "a"}


class _Raced(FolderStore):
    """A place that another worker claims and writes to, right after it was seen to be free."""

    def exists(self, name: str) -> bool:
        there = super().exists(name)
        if name == REQUEST and not there:
            other = FolderStore(self.root)
            claim(other, REQUESTED)
            other.put("train/shard-000000.tar", b"")
        return there


def test_a_place_that_others_claim_meanwhile_is_not_taken_for_a_foreign_one(tmp_path: Path) -> None:
    claim(_Raced(tmp_path / "same"), REQUESTED)
    with pytest.raises(InputError, match="is taken by another data set"):
        claim(_Raced(tmp_path / "other"), {"source": "b"})
