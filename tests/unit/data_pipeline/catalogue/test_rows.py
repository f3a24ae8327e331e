"""The rows of a catalogue."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from core.keys import key_int
from data_pipeline.catalogue.schema import SCHEMA, CatalogueWriter, Row, reject_row, row_of
from data_pipeline.images.decode import inspect
from data_pipeline.sources.pair import Unusable, make_pair
from data_pipeline.text.language import guess_language


def _jpeg(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _part() -> CatalogueWriter:
    image = _jpeg()
    pair = make_pair("k", image, ".JPEG", b"", "a.tar, member k.jpeg")
    writer = CatalogueWriter(7)
    writer.add(row_of(pair, ("two dogs", "a dog"), inspect(image, "x"), "train"))
    writer.add(row_of(pair, ("two dogs",), inspect(image, "x"), "train"))
    small = Unusable(key="k", kind="small", reason="30x20")
    writer.add(row_of(pair, ("two dogs", "a dog"), inspect(image, "x"), None, small))
    writer.add(reject_row(Unusable(key="b\udcff", kind="file", reason="b\udcff is a link")))
    return writer


def test_rows_hold_the_facts_of_pairs_and_rejects() -> None:
    data = _part().finish()
    table = pq.read_table(pa.BufferReader(data))
    assert table.schema.equals(SCHEMA) and data == _part().finish()
    first, second, third, fourth = table.to_pylist()
    expected = {
        "key": "k",
        "id": key_int("k"),
        "unit": 7,
        "place": 0,
        "source": "a.tar, member k.jpeg",
        "width": 30,
        "height": 20,
        "bytes": len(_jpeg()),
        "format": "jpg",
        "captions": ["two dogs", "a dog"],
        "words": 2,
        "language": "en",
        "perceptual_hash": bytes(16),
        "split": "train",
        "reject": None,
        "reason": None,
    }
    assert {name: first[name] for name in expected} == expected
    assert first["image_digest"] == second["image_digest"] == third["image_digest"]
    assert first["pair_digest"] == third["pair_digest"] != second["pair_digest"]
    assert (third["split"], third["reject"], third["reason"]) == (None, "small", "30x20")
    assert (fourth["key"], fourth["source"]) == ("b\\xff", "b\\xff")
    assert fourth["reason"] == "b\\xff is a link"
    assert [row["place"] for row in table.to_pylist()] == [0, 1, 2, 3]
    assert all(fourth[name] is None for name in ("width", "pair_digest", "words", "language"))
    assert fourth["captions"] == []


def test_captions_are_not_joined_ambiguously() -> None:
    """Captions have no line ends: cleaned ones of one picture never spell those of another."""
    pair = make_pair("k", b"picture", ".png", b"", "x")
    rows = [row_of(pair, texts, None, None) for texts in (("a", "b"), ("ab",), ("a b",))]
    assert len({row.pair_digest for row in rows}) == 3


def test_an_empty_part_is_written() -> None:
    assert pq.read_table(pa.BufferReader(CatalogueWriter(1).finish())).num_rows == 0


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("two small dogs", "en"),
        ("a dog in the snow on a sunny day", "en"),
        ("ein hund liegt im tiefen schnee herum", "latin"),
        ("一只狗在雪地里", "han"),
        ("雪の中の犬", "kana"),
        ("собака в снегу", "cyrillic"),
        ("σκύλος στο χιόνι", "greek"),
        ("كلب في الثلج", "arabic"),
        ("눈 속의 개", "hangul"),
        ("बर्फ में कुत्ता", "devanagari"),
        ("สุนัขในหิมะ", "thai"),
        ("ძაღლი", "georgian"),
        ("ጥቁር", "other"),
        ("12 34 🐕", "none"),
    ],
)
def test_languages_are_guessed(caption: str, language: str) -> None:
    assert guess_language(caption) == language


def test_a_row_without_a_picture_has_no_hash() -> None:
    row = row_of(make_pair("k", b"no picture", ".png", b"", "x"), ("a",), None, None)
    assert row.perceptual_hash is None and row.width is None and row.size == 10
    assert Row(key="k", source="x").captions == ()
