"""`tapir pack SRC DEST --append`: the next version of a set is that of a pack of everything."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import CorruptError, InputError
from core.storage.store import FolderStore, Store
from core.workers import JobWorker
from data_pipeline.config import FilterConfig, PackConfig
from data_pipeline.formats.manifest import RAW, SPLITS, read_manifest
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.formats.split import splits_at
from data_pipeline.formats.verify import verify_split
from data_pipeline.jobs.status import job_status
from data_pipeline.packing.pack import pack
from data_pipeline.packing.versions import tasks_of
from tests.harness import json_of, tapir
from tests.in_place import img2dataset, noise, written

CONFIG = PackConfig(
    validation=0.3,
    shard_pairs=7,
    block=4,
    max_rejects=0.5,
    lease_seconds=1,
    filters=FilterConfig(duplicates=True),
)
CONFIGS = pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, in_place=True)], ids=["copied", "in place"]
)


def _archives(root: Path, numbers: range) -> Path:
    """Archives of 15 pairs and one that is in every archive."""
    for i in numbers:
        twice = [("twice.png", noise(7777)), ("twice.txt", b"Picture twice")]
        written(root, f"{i:05d}.tar", [*img2dataset(100 * i, 15), *twice])
    return root


def _records(store: Store, split: str, fingerprint: str = "") -> list[RawRecord]:
    opened = splits_at(store, RAW, fingerprint)["train"] if fingerprint else None
    source = RawSource(store, split, opened=opened)
    return [record for block in range(len(source.sizes)) for record in source.read(block)]


def _files(store: FolderStore) -> dict[str, bytes]:
    return {name: store.get(name) for name in store.names() if name != "job.json"}


@CONFIGS
def test_the_next_version_has_the_pairs_of_a_pack_of_everything(
    config: PackConfig, tmp_path: Path
) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    first = pack(str(source), store, config)["train"]
    before, records = _files(store), _records(store, "train")
    for version, numbers in ((2, range(2, 4)), (3, range(4, 5))):
        _archives(source, numbers)
        made = pack(str(source), store, config, append=True)
        assert made["train"].version == made["validation"].version == version
    fresh = FolderStore(tmp_path / "fresh")
    expected = pack(str(source), fresh, config)
    for split in SPLITS:
        assert _records(store, split) == _records(fresh, split)
        assert made[split].rejects == expected[split].rejects == {"duplicate": 4}
        assert verify_split(store, split)
    assert _records(store, "train", first.fingerprint) == records
    after = _files(store)
    changed = {name for name, data in before.items() if after.get(name) != data}
    assert changed == {*(f"{split}/manifest.json" for split in SPLITS), "rejects/set.jsonl"} - (
        {"rejects/set.jsonl"} - set(before)
    )
    again = pack(str(source), store, config, append=True)
    assert again["train"].fingerprint == made["train"].fingerprint and _files(store) == after


def test_any_workers_and_kills_append_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    pack(str(source), store, CONFIG)
    _archives(source, range(2, 5))
    shutil.copytree(store.root, tmp_path / "undisturbed")
    alone = FolderStore(tmp_path / "undisturbed")
    pack(str(source), alone, CONFIG, append=True)
    put: Callable[..., bool] = FolderStore.put
    draw, left = random.Random(1), [0]

    def dying(self: FolderStore, *arguments: object, **more: object) -> bool:
        if self.root == store.root:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return put(self, *arguments, **more)

    monkeypatch.setattr(FolderStore, "put", dying)
    for attempt in range(20):
        left[0] = draw.randint(1, 12) if attempt < 8 else 10**6
        member = JobWorker(number=attempt % 2, count=2)
        try:
            pack(str(source), store, CONFIG, member=member, append=True)
            break
        except KeyboardInterrupt:
            continue
    assert attempt >= 3
    names = {name for name in store.names() if "/_leases/" not in name} - {"job.json"}
    assert names == set(_files(alone))
    assert all(store.get(name) == alone.get(name) for name in names)


def test_a_damaged_shard_of_an_earlier_version_is_mended(tmp_path: Path) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    pack(str(source), store, CONFIG)
    kept = shutil.copytree(source, tmp_path / "first")
    _archives(source, range(2, 4))
    pack(str(source), store, CONFIG, append=True)
    before = _files(store)
    shutil.rmtree(source)
    shutil.move(kept, source)
    name = read_manifest(store, "train/", RAW, 1).shards[0].name
    (store.root / "train" / name).write_bytes(b"damaged")
    pack(str(source), store, CONFIG, again=True)
    assert _files(store) == before
    with pytest.raises(InputError, match=r"SRC holds nothing that .* does not have already"):
        pack(str(source), store, CONFIG, append=True)
    assert _files(store) == before


def test_a_missing_marker_of_an_earlier_version_is_an_error(tmp_path: Path) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    pack(str(source), store, CONFIG)
    marker = store.names("units/_done/")[0]
    store.delete(marker)
    more = _archives(tmp_path / "more", range(7, 8))
    with pytest.raises(CorruptError, match=f"{marker} is missing; run the `tapir pack` of that"):
        pack(str(more), store, CONFIG, append=True)


def test_status_of_a_version_counts_the_units_of_those_before(tmp_path: Path) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    pack(str(source), store, CONFIG)
    more = _archives(tmp_path / "more", range(7, 10))
    made = pack(str(more), store, CONFIG, append=True)
    (row,) = job_status(store)
    assert row.finished and row.rejects == made["train"].rejects
    assert row.pairs == row.pairs_done == sum(manifest.samples for manifest in made.values()) > 0
    store.delete("validation/manifest-000002.json")
    (row,) = job_status(store)
    assert (row.tasks_done, row.tasks, row.finished) == (5, 5, False)
    store.delete(tasks_of(store, 2)[0].marker)
    (row,) = job_status(store)
    assert (row.tasks_done, row.tasks) == (4, 5)
    assert row.pairs == round(row.pairs_done / 4 * 5)


def test_what_cannot_be_appended_is_refused(tmp_path: Path) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    with pytest.raises(InputError, match=r"no data set at .* to append to"):
        pack(str(source), store, CONFIG, append=True)
    pack(str(source), store, CONFIG)
    before = _files(store)
    other = replace(CONFIG, block=8, seed=3)
    more = _archives(tmp_path / "more", range(7, 8))
    with pytest.raises(InputError, match=r"packed with other settings \(block, seed\)"):
        pack(str(more), store, other, append=True)
    with pytest.raises(InputError, match="--append adds archives, tables and folders"):
        pack("shapes", store, CONFIG, append=True)
    pack(str(source), store, CONFIG, append=True)
    assert _files(store) == before
    (more / "00008.tar").write_bytes(b"no tar")
    strict = replace(CONFIG, max_rejects=0.0)
    apart = FolderStore(tmp_path / "strict")
    pack(str(source), apart, strict)
    clean = _files(apart)
    with pytest.raises(InputError, match="to leave unusable pairs out"):
        pack(str(more), apart, strict, append=True)
    assert _files(apart) == clean
    (more / "00008.tar").unlink()
    assert pack(str(more), apart, strict, append=True)["train"].version == 2


def test_only_what_is_new_is_appended_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = _archives(tmp_path / "tars", range(2)), FolderStore(tmp_path / "set")
    config = replace(CONFIG, filters=FilterConfig())
    pack(str(source), store, config)
    _archives(source, range(2, 3))
    monkeypatch.chdir(tmp_path)
    pack(f"{source}/*", store, config, append=True)
    for name in ("tars", f"{source}/{{00000..00002}}.tar"):
        with pytest.raises(InputError, match="SRC holds nothing that"):
            pack(name, store, config, append=True)
    pack(f"{source}/00001.tar", FolderStore(tmp_path / "one"), config)
    made = pack("tars/0000[12].tar", FolderStore(tmp_path / "one"), config, append=True)
    assert sum(manifest.samples for manifest in made.values()) == 32
    keys = [r.key for split in SPLITS for r in _records(store, split)]
    assert len(keys) == len(set(keys)) == 3 * 16
    before = _files(store)
    _archives(source, range(1, 2))
    with pytest.raises(InputError, match=r"00001.tar has changed since it was packed"):
        pack(f"{source}/*", store, config, append=True)
    assert _files(store) == before


def test_equal_names_in_another_source_are_other_pairs(tmp_path: Path) -> None:
    first = written(tmp_path / "a", "00000.tar", img2dataset(0, 15)).parent
    second = written(tmp_path / "b", "00000.tar", img2dataset(500, 15)).parent
    store = FolderStore(tmp_path / "set")
    config = replace(CONFIG, filters=FilterConfig())
    pack(str(first), store, config)
    made = pack(str(second), store, config, append=True)
    assert sum(manifest.samples for manifest in made.values()) == 30
    assert all(manifest.rejects == {} for manifest in made.values())


@pytest.mark.seconds
def test_the_verb_appends(tmp_path: Path) -> None:
    source, dest = _archives(tmp_path / "tars", range(2)), tmp_path / "set"
    flags = ["--validation=0.3", "--block=4"]
    tapir("pack", str(source), str(dest), *flags)
    _archives(source, range(2, 3))
    counts = json_of("pack", str(source), str(dest), *flags, "--append")
    assert counts["train"] + counts["validation"] == 3 * 16
    assert read_manifest(FolderStore(dest), "train/", RAW).version == 2
