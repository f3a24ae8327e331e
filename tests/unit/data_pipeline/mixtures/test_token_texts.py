"""Token blocks of one and of several texts a record."""

from collections import Counter

import numpy as np
import pytest

from core.errors import CorruptError
from core.keys import key_int
from data_pipeline.formats.tokens import (
    TokenRecord,
    TokenRecords,
    decode_block,
    encode_block,
)


def _record(number: int, *texts: list[int]) -> TokenRecord:
    text, *others = (np.array(ids, np.uint16) for ids in texts)
    image = np.array([number, 7], np.uint16)
    return TokenRecord(id=number, image=image, text=text, others=tuple(others))


def _rows(records: TokenRecords) -> list[tuple[int, list[int], list[list[int]]]]:
    return [(r.id, r.image.tolist(), [text.tolist() for text in r.texts]) for r in records]


ONE = [_record(3, [1, 2]), _record(4, [])]
SEVERAL = [_record(3, [1, 2], [5], []), _record(4, []), _record(5, [6], [8, 9])]

GOLDEN_ONE = bytes.fromhex(
    "54505242 01000000"  # TPRB, version 1
    "02000000 02000000"  # records, codes of an image
    "0300000000000000 0400000000000000"  # ids
    "00000000 02000000 02000000"  # ends of the texts
    "0300 0700 0400 0700"  # codes
    "0100 0200"  # texts
)
GOLDEN_SEVERAL = bytes.fromhex(
    "54505242 02000000"  # TPRB, version 2
    "03000000 02000000"
    "0300000000000000 0400000000000000 0500000000000000"
    "00000000 03000000 04000000 06000000"  # the first text of each record
    "00000000 02000000 03000000 03000000 03000000 04000000 06000000"
    "0300 0700 0400 0700 0500 0700"
    "0100 0200 0500 0600 0800 0900"
)


def test_blocks_by_hand() -> None:
    for records, golden in ((ONE, GOLDEN_ONE), (SEVERAL, GOLDEN_SEVERAL)):
        stacked = TokenRecords.of(records)
        assert encode_block(stacked) == golden
        assert _rows(decode_block(golden)) == _rows(stacked)
        assert encode_block(decode_block(golden)) == golden
    with pytest.raises(CorruptError, match="not a block"):
        decode_block(GOLDEN_ONE.replace(b"TPRB\x01", b"TPRB\x03"))


def test_parts_of_blocks_keep_their_texts() -> None:
    stacked = decode_block(GOLDEN_SEVERAL)
    assert _rows(stacked[1:3]) == _rows(stacked)[1:]
    assert _rows(decode_block(encode_block(stacked[1:3]))) == _rows(stacked)[1:]
    with pytest.raises(ValueError, match="after one text is drawn"):
        stacked[::2]
    assert [r.id for r in stacked.drawn(0)[::2]] == [3, 5]
    single = encode_block(stacked[1:2])
    assert single[4] == 1 and _rows(decode_block(single)) == _rows(stacked)[1:2]


def test_one_text_is_drawn_by_key_and_id() -> None:
    stacked = TokenRecords.of(SEVERAL)
    for epoch in range(20):
        drawn = stacked.drawn(7, epoch)
        for record, one in zip(SEVERAL, drawn, strict=True):
            chosen = key_int(7, epoch, record.id, "caption") % len(record.texts)
            assert one.text.tolist() == record.texts[chosen].tolist() and not one.others
            assert one.id == record.id and one.image.tolist() == record.image.tolist()
    single = TokenRecords.of(ONE)
    assert single.drawn(7, 0) is single


def test_texts_are_drawn_evenly_over_records_and_over_epochs() -> None:
    stacked = TokenRecords.of([_record(i, [0], [1], [2]) for i in range(1500)])
    over_records = Counter(stacked.drawn(0, 0).text.tolist())
    over_epochs = Counter(int(stacked[5:6].drawn(0, epoch).text[0]) for epoch in range(1500))
    for counts in (over_records, over_epochs):
        assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 13.8, "p = 0.001, 2 degrees"
        assert len(counts) == 3
