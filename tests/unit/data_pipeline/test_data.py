"""Pack, manifests, order and streams."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError, CorruptError, InputError
from core.storage.store import FolderStore, open_store
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.formats.manifest import RAW, read_manifest
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import (
    TokenRecord,
    TokenRecords,
    TokenSource,
    decode_block,
    encode_block,
)
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.stream import Stream
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.text.captions import clean_caption
from tests.harness import tapir

PICTURE = encode_png(np.full((20, 30, 3), 77, np.uint8))


def _folder(root: Path, captions: dict[str, bytes]) -> Path:
    root.mkdir()
    for name, caption in captions.items():
        (root / f"{name}.png").write_bytes(PICTURE)
        (root / f"{name}.txt").write_bytes(caption)
    return root


def test_shards_are_read_by_the_webdataset_library(raw: Path) -> None:
    names = sorted(str(path) for path in (raw / "train").glob("*.tar"))
    rows = list(webdataset.WebDataset(names, shardshuffle=False))
    manifest = read_manifest(FolderStore(raw), "train/", RAW)
    assert len(rows) == manifest.samples
    assert {"png", "txt", "json"} <= set(rows[0])


def test_our_own_and_foreign_tars_pack(raw: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    manifests = pack(str(raw / "train"), FolderStore(again), PackConfig(validation=0.2))
    count = read_manifest(FolderStore(raw), "train/", RAW).samples
    assert sum(manifest.samples for manifest in manifests.values()) == count


def test_no_caption_of_validation_is_trained_on(raw: Path) -> None:
    captions = [
        {record.caption for b in range(len(s.sizes)) for record in s.read(b)}
        for s in (RawSource(FolderStore(raw), split) for split in ("train", "validation"))
    ]
    assert captions[0] and captions[1] and not captions[0] & captions[1]


def test_a_folder_packs_and_the_same_command_again_changes_nothing(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", {f"p{i}": f"Picture {i}".encode() for i in range(40)})
    tapir("pack", str(source), str(tmp_path / "out"), "--validation", "0.3")
    before = (tmp_path / "out/train/manifest.json").read_bytes()
    assert "already holds" in tapir(
        "pack", str(source), str(tmp_path / "out"), "--validation", "0.3"
    )
    assert (tmp_path / "out/train/manifest.json").read_bytes() == before
    text = tapir("pack", str(source), str(tmp_path / "out"), "--validation", "0.4", code=2)
    assert "choose an empty DEST" in text


def test_bad_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    assert "holds no pairs: no tars" in tapir("pack", str(tmp_path / "empty"), out, code=2)
    bad = _folder(tmp_path / "bad", {"a": b"fine", "b": b"caf\xe9"})
    text = tapir("pack", str(bad), out, code=2)
    assert "b.png is not UTF-8 (byte 3)" in text
    (bad / "b.txt").unlink()
    assert "has no caption" in tapir("pack", str(bad), out, code=2)


def test_bad_pairs_are_left_out_and_counted_where_asked(tmp_path: Path) -> None:
    captions = {f"p{i}": f"picture {i}".encode() for i in range(30)}
    source = _folder(tmp_path / "in", {**captions, "zz": b"\xff"})
    (source / "p3.png").write_bytes(b"<html>")
    store = FolderStore(tmp_path / "out")
    manifests = pack(str(source), store, PackConfig(validation=0.3, max_rejects=0.1))
    assert sum(m.samples for m in manifests.values()) == 29
    assert manifests["train"].rejects == {"caption": 1, "image": 1}
    assert len(store.get("rejects/000000.jsonl").splitlines()) == 2


@pytest.mark.parametrize("name", ["../x.png", "/x.png"])
def test_archives_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(PICTURE)
        tar.addfile(member, io.BytesIO(PICTURE))
    with pytest.raises(InputError, match="leaves the archive"):
        pack(str(tmp_path / "bad.tar"), FolderStore(tmp_path / "out"), PackConfig())
    assert not (tmp_path / "x.png").exists()


def test_images_are_capped_and_checked_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="not a readable"):
        decode_rgb(PICTURE[:60], "half.png")
    assert decode_rgb(PICTURE, "x").shape == (20, 30, 3)


def test_captions_are_cleaned() -> None:
    assert clean_caption(b"  A\tRed \x00 Dog\n", "x") == "a red dog"
    with pytest.raises(InputError, match="empty"):
        clean_caption(b" \n", "x")


def test_a_damaged_shard_is_named(raw: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for name in FolderStore(raw).names("train/"):
        store.put(name, FolderStore(raw).get(name))
    source = RawSource(store, "train")
    shard = source.manifest.shards[0].name
    data = bytearray(store.get(f"train/{shard}"))
    data[5000] ^= 4
    store.put(f"train/{shard}", bytes(data))
    with pytest.raises(CorruptError, match=rf"{shard}.* offset \d+ has crc32 \w+"):
        source.read(0)
    assert shard in tapir("verify", str(tmp_path), code=1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=8, max_size=60),
    lanes=st.sampled_from([1, 2, 4]),
    per_lane=st.integers(1, 4),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_lane_order_reads_each_record_at_most_once_for_every_rank_count(
    sizes: list[int], lanes: int, per_lane: int, window: int, epoch: int
) -> None:
    config = OrderConfig(lanes=lanes, shuffle_buffer=window)
    try:
        order = LaneOrder(sizes, 5, lanes * per_lane, config)
    except ConfigError:
        return
    whole = [order.places(epoch, step, range(lanes)).tolist() for step in range(order.steps(epoch))]
    places = [(block, record) for batch in whole for block, record in batch]
    assert max(Counter(places).values(), default=1) == 1
    assert all(record < sizes[block] for block, record in places)
    longest = -(-len(sizes) // lanes) * 9
    assert sum(sizes) - len(places) <= lanes * longest
    for ranks in (r for r in (1, 2, 4) if lanes % r == 0):
        share = lanes // ranks
        for step, batch in enumerate(whole):
            owned = [range(r * share, (r + 1) * share) for r in range(ranks)]
            parts = [order.places(epoch, step, lanes_).tolist() for lanes_ in owned]
            assert [p for part in parts for p in part] == batch
    for step, batch in enumerate(whole):
        for slot, (block, record) in enumerate(batch):
            assert order.locate(epoch, block, record) == (step, slot)


def test_a_stream_resumes_exactly_and_refuses_other_data(tokens: Path) -> None:
    source = TokenSource(FolderStore(tokens), "train")
    order = OrderConfig(lanes=4, shuffle_buffer=2)

    def stream() -> Stream:
        return Stream(source, seed=3, batch=32, order=order)

    unbroken, seen = iter(stream()), []
    for _ in range(40):
        records, state = next(unbroken)
        seen.append(([r.id for r in records], state))
    assert seen[-1][1].epoch > 0
    for at in (0, 7, 20):
        resumed = stream()
        resumed.resume(seen[at][1])
        follows = iter(resumed)
        for ids, state in seen[at + 1 : at + 18]:
            records, again = next(follows)
            assert ([r.id for r in records], again) == (ids, state)
    other = Stream(source, seed=4, batch=32, order=order)
    with pytest.raises(ConfigError, match="seed was 3, now it is 4"):
        other.resume(seen[0][1])


def test_token_blocks_survive_a_round_trip(tokens: Path, bpe: Path, raw: Path) -> None:
    rng = np.random.default_rng(0)
    records = [
        TokenRecord(
            id=i * 2**40,
            image=rng.integers(0, 512, 64).astype(np.uint16),
            text=rng.integers(0, 300, i).astype(np.uint16),
        )
        for i in range(5)
    ]
    for a, b in zip(records, decode_block(encode_block(TokenRecords.of(records))), strict=True):
        assert a.id == b.id and (a.image == b.image).all() and (a.text == b.text).all()
    tokenizer, _ = load_tokenizer(bpe)
    source, stored = (
        RawSource(FolderStore(raw), "train"),
        TokenSource(FolderStore(tokens), "train"),
    )
    for pair, record in zip(source.read(0), stored.read(0), strict=True):
        assert tokenizer.decode(record.text.tolist()) == pair.caption


def test_bpe_is_lossless_and_merges_only_letters(bpe: Path) -> None:
    tokenizer, _ = load_tokenizer(bpe)
    text = "a small red circle, 42 über-große 日本 ok"
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert len(encode(tokenizer, "a circle")) == 2
    assert len(encode(tokenizer, "42 ")) == 3


def test_stores_refuse_what_leaves_them(tmp_path: Path) -> None:
    with pytest.raises(InputError.__mro__[1], match="outside"):
        FolderStore(tmp_path / "a").get("../b")
    with pytest.raises(ConfigError, match="not a store"):
        open_store("pipe:cat /etc/passwd")


def test_a_dest_belongs_to_one_request_and_again_mends_it(tmp_path: Path) -> None:
    command = ["pack", "shapes", str(tmp_path / "d"), "--count=60", "--validation=0.3"]
    tapir(*command)
    assert "is taken by another data set" in tapir(*command, "--seed=7", code=2)
    shard = tmp_path / "d" / "train" / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    assert "--again" in tapir("verify", str(tmp_path / "d"), code=1)
    assert "already holds" in tapir(*command)
    tapir(*command, "--again")
    assert shard.read_bytes() == whole


def test_a_changed_folder_is_another_data_set(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.png").write_bytes(encode_png(np.full((20, 20, 3), 9 * i, np.uint8)))
        (source / f"{i}.txt").write_text(f"number {i}")
    command = ["pack", str(source), str(tmp_path / "d"), "--validation=0.4"]
    tapir(*command)
    (source / "0.txt").write_text("another caption")
    assert "content); choose an empty DEST" in tapir(*command, code=2)
