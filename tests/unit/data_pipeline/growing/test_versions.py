"""Growing data sets: a chain of manifests, and streams that go over to a newer version."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.support.synthetic import write_tokens
from core.errors import CorruptError, InputError
from core.keys import key_int
from core.storage.store import FolderStore
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.manifest import SPLITS, TOKENS, Manifest, read_manifest
from data_pipeline.formats.split import newer_split, newest_splits, splits_at
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.formats.verify import verify_split
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.state import StreamState
from data_pipeline.streaming.stream import Stream
from tests.unit.data_pipeline.test_order import NumberedSource, flat

SEED, LANES = 5, 4
ORDER = OrderConfig(lanes=LANES, shuffle_buffer=2)


class Version(NumberedSource):
    """A version of a growing source: the first blocks of one list of sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.fingerprint = f"{len(sizes)} blocks"


def _epoch(version: Version, epoch: int, batch: int) -> list[list[int]]:
    """The definition: the batches of an epoch, from the lane order of that version alone."""
    order = LaneOrder(version.sizes, SEED, batch, ORDER)
    starts = np.cumsum([0, *version.sizes])
    places = (order.places(epoch, step, range(LANES)) for step in range(order.steps(epoch)))
    return [(starts[rows[:, 0]] + rows[:, 1]).tolist() for rows in places]


class Reader:
    """One rank of a run that takes up versions by a plan: epoch -> version."""

    def __init__(self, plan: list[Version], batch: int, rank: int, ranks: int) -> None:
        self._plan = plan
        loader = LoaderConfig(readers=2, prefetch=3)
        self.stream = Stream(
            *(plan[0],), seed=SEED, batch=batch, order=ORDER, loader=loader, rank=rank, ranks=ranks,
            pauses=True,
        )  # fmt: skip

    def resume(self, state: StreamState) -> None:
        sources = {each.fingerprint: each for each in self._plan}
        self.stream.resume(state, sources[state.fingerprint])

    def take(self, count: int) -> list[tuple[list[int], StreamState]]:
        taken: list[tuple[list[int], StreamState]] = []
        while True:
            batches = iter(self.stream)
            for records, state in itertools.islice(batches, count - len(taken)):
                taken.append((records.ids.tolist(), state))
            batches.close()
            if len(taken) == count:
                return taken
            self.stream.next_epoch(self._plan[self.stream.state.epoch + 1])


@pytest.mark.seconds
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=40, max_size=60),
    ends=st.lists(st.integers(20, 40), min_size=4, max_size=4),
    per_lane=st.integers(1, 3),
    data=st.data(),
)
def test_a_growing_stream_killed_anywhere_reads_each_epoch_of_its_version(
    sizes: list[int], ends: list[int], per_lane: int, data: st.DataObject
) -> None:
    plan = [Version(sizes[:end]) for end in sorted(ends)]
    batch = LANES * per_lane
    epochs = [_epoch(version, epoch, batch) for epoch, version in enumerate(plan)]
    expected = list(itertools.chain.from_iterable(epochs))
    for version, read in zip(plan, epochs, strict=True):
        assert max(Counter(flat(read)).values()) == 1
        assert max(flat(read)) < version.sizes.sum()
    done: list[list[int]] = []
    state: StreamState | None = None
    while len(done) < len(expected):
        ranks = data.draw(st.sampled_from([1, 2, 4]))
        count = data.draw(st.integers(1, min(40, len(expected) - len(done))))
        readers = [Reader(plan, batch, rank, ranks) for rank in range(ranks)]
        for reader in readers if state else ():
            reader.resume(state)  # type: ignore[arg-type]
        parts = [reader.take(count) for reader in readers]
        done += [flat(part[i][0] for part in parts) for i in range(count)]
        state = parts[0][-1][1]
        assert all(part[-1][1] == state for part in parts)
        assert state.fingerprint == plan[state.epoch].fingerprint == state.version_at(state.epoch)
    assert done == expected
    starts = [e for e in range(1, 4) if len(plan[e].sizes) != len(plan[e - 1].sizes)]
    assert state is not None and [epoch for epoch, _ in state.versions[1:]] == starts


def test_an_epoch_of_whole_lanes_reads_every_record_of_the_new_version_once() -> None:
    plan = [Version([4] * 16), Version([4] * 24)]
    reader = Reader(plan, 8, 0, 1)
    read = [ids for ids, _ in reader.take(8 + 12)]
    assert sorted(flat(read[:8])) == list(range(64))
    assert sorted(flat(read[8:])) == list(range(96))


def test_states_of_older_checkpoints_resume() -> None:
    stream = Reader([Version([4] * 16)], 8, 0, 1).stream
    body = {**vars(stream.state), "step": 3, "passed": [[0, 5]]}
    del body["versions"]
    stream.resume(StreamState(**body))
    assert (stream.state.step, stream.state.passed, stream.state.versions) == (3, ((0, 5),), ())


def _grown(store: FolderStore, *shards: int) -> list[Manifest]:
    """Versions of a token set with so many shards of 48 records; returns those of train."""
    versions: list[Manifest] = []
    parents: dict[str, Manifest] = {}
    for count in shards:
        for split, few in (("validation", 1), ("train", count)):
            made = write_tokens(store, few, 48, 8, 4, 5, split, parents.get(split))
            parents[split] = made
        versions.append(parents["train"])
    return versions


def test_every_version_stays_readable(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    one = _grown(store, 2)[0]
    files = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    manifest = files.pop("manifest.json")
    versions = _grown(store, 2, 3, 5)
    assert versions[0].fingerprint == one.fingerprint and [v.version for v in versions] == [1, 2, 3]
    assert versions[2].earlier == [v.fingerprint for v in versions[:2]]
    assert all((tmp_path / "train" / name).read_bytes() == data for name, data in files.items())
    assert (tmp_path / "train/manifest-000001.json").read_bytes() == manifest
    for number, made in enumerate(versions, 1):
        assert read_manifest(store, "train/", TOKENS, number).fingerprint == made.fingerprint
        opened = splits_at(store, TOKENS, made.fingerprint)["train"]
        source = TokenSource(store, "train", opened=opened)
        ids = [int(i) for block in range(len(source.sizes)) for i in source.read(block).ids]
        shards = len(made.shards)
        assert ids == [key_int(shard, place) for shard in range(shards) for place in range(48)]
        assert find_pair(store, "train", source.blocks, str(key_int(1, 7))) == (6, 7)
        text = str(key_int(shards, 0))
        with pytest.raises(InputError, match="no pair of the key or id"):
            find_pair(store, "train", source.blocks, text)
    verify_split(store, "train")
    (tmp_path / "train/ids-000002.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"ids-000002\.bin has sha256"):
        verify_split(store, "train")
    with pytest.raises(InputError, match="has no version 4; the newest is 3"):
        read_manifest(store, "train/", TOKENS, 4)


def test_a_set_written_again_keeps_its_chain(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    _, second = _grown(store, 2, 3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    write_tokens(store, 3, 48, 8, 4, 5, parent=read_manifest(store, "train/", TOKENS, 1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "train").iterdir()} == before
    assert read_manifest(store, "train/", TOKENS).fingerprint == second.fingerprint


@pytest.mark.parametrize("ahead", SPLITS)
def test_a_version_counts_when_both_splits_have_it(ahead: str, tmp_path: Path) -> None:
    """A writer that dies between the manifests leaves one split ahead of the other."""
    store = FolderStore(tmp_path)
    first, second = _grown(store, 2, 3)
    expected = {s: opened.fingerprint for s, opened in newest_splits(store, TOKENS).items()}
    parent = read_manifest(store, f"{ahead}/", TOKENS)
    write_tokens(store, 4, 48, 8, 4, 5, ahead, parent)
    opened = newest_splits(store, TOKENS)
    assert {split: each.fingerprint for split, each in opened.items()} == expected
    assert {each.manifest.version for each in opened.values()} == {2}
    assert newer_split(store, TOKENS, second.fingerprint) == {}
    both = splits_at(store, TOKENS, second.fingerprint, first.fingerprint)
    assert (both["train"].manifest.version, both["validation"].manifest.version) == (2, 1)


def test_a_newer_version_must_continue_the_one_of_the_run(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "a")
    first, second = _grown(store, 2, 3)
    assert newer_split(store, TOKENS, second.fingerprint) == {}
    newer = newer_split(store, TOKENS, first.fingerprint)
    assert newer["train"].fingerprint == second.fingerprint
    other = FolderStore(tmp_path / "b")
    for split in SPLITS:
        write_tokens(other, 4, 48, 8, 4, 5, split)
    for ask in (newer_split, splits_at):
        with pytest.raises(InputError, match=r"is another one.*as --data, or start a new run"):
            ask(other, TOKENS, first.fingerprint)
    (store.root / "train/manifest-000001.json").write_bytes(b'{\n "digest": "0"}\n')
    with pytest.raises(CorruptError, match=r"manifest-000001\.json"):
        splits_at(store, TOKENS, first.fingerprint)
