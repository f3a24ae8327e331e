"""`tapir data join`: one set over the shards of several."""

from pathlib import Path

import pytest

from core.errors import InputError
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.packing.join import join
from data_pipeline.streaming.stream import Stream
from tests.in_place import img2dataset, in_place_set, records_of, written


def _set(folder: Path, name: str, archive: str, validation: float = 0.25) -> FolderStore:
    """A set of 40 pairs, whose keys begin with the archive's name."""
    store = FolderStore(folder / name)
    tar = written(folder / f"{name}-src", f"{archive}.tar", img2dataset(0, 40))
    in_place_set(store, [tar], validation=validation)
    return store


def test_a_join_trains_on_the_pairs_of_all_sets_and_copies_none(tmp_path: Path) -> None:
    sets = [_set(tmp_path, name, name) for name in ("a", "b", "c")]
    dest = FolderStore(tmp_path / "dest")
    joined = join(sets, dest)
    assert not [name for name in dest.names() if name.endswith(".tar")]
    for split in SPLITS:
        expected = [key for store in sets for key in _keys(store, split)]
        assert sorted(_keys(dest, split)) == sorted(expected)
        assert joined[split].samples == len(expected)
    source = RawSource(dest, "train")
    order = OrderConfig(lanes=2, shuffle_buffer=2)
    stream = Stream(source, seed=0, batch=2, order=order)
    batches, read = iter(stream), []
    for _ in range(stream.order.steps(0)):
        read += [record.key for record in next(batches)[0]]
    batches.close()
    assert len(set(read)) == len(read) > 0.8 * joined["train"].samples
    assert join(sets, dest) == joined, "again: the same set"


def _keys(store: FolderStore, split: str) -> list[str]:
    return [record.key for record in records_of(store, [split])]


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    a, b = _set(tmp_path, "a", "a"), _set(tmp_path, "b", "b")
    copy, other = _set(tmp_path, "copy", "a"), _set(tmp_path, "other", "a", validation=0.6)
    dest = FolderStore(tmp_path / "dest")
    with pytest.raises(InputError, match=r"two pairs of the id .*mixed instead"):
        join([a, b, copy], dest)
    with pytest.raises(InputError, match=r"is in .*/other/train|is in .*/a/train"):
        join([a, b, other], dest)
    for sets, to in (([a, b], a), ([a, a], dest)):
        with pytest.raises(InputError, match="must all be different"):
            join(sets, to)
    join([a, b], dest)
    with pytest.raises(InputError, match="holds another data set"):
        join([b, a], dest)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\)"):
        join([a, b], FolderStore(tmp_path / "full"))
