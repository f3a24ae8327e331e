"""Captions are cleaned by a fixed table; several captions of one picture stay several."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InputError
from core.log import LOG
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import FilterConfig, OrderConfig, PackConfig
from data_pipeline.evaluation_sets import open_evaluation, packed_set
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.images.crops import encode_png
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.stream import Stream, stored_records
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.text.captions import (
    LONGEST,
    MOST_CAPTIONS,
    clean_caption,
    clean_captions,
    lowered,
)
from generation.config import OverlapConfig
from generation.evaluation.overlap import OverlapJob
from generation.text_to_image import open_studio
from models.clip import Clip
from models.config import ClipConfig
from parallel.world import World
from tests.harness import tapir
from tests.unit.finished import write_models
from tests.unit.layouts import write_coco
from training.config import BPETrain
from training.presets import clip_tiny
from training.run.alarms import tell_cut_captions
from training.tasks.clip import ClipTask
from training.tokenizer import train_tokenizer

CLEANED = {
    "a family \U0001f468\u200d\U0001f469\u200d\U0001f467": None,
    "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627\u06cc \u0645\u0646": None,
    "\u0e20\u0e32\u0e29\u0e32\u200b\u0e44\u0e17\u0e22": None,
    "\u05d0\u200f!": None,
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f flag": None,
    "\u2764\ufe0f": None,
    "\U0001fae8 a face of Unicode 15": "\U0001fae8 a face of unicode 15",
    "\U0001fadf and one of 16": None,
    "\U00010d50 a letter of 16": None,
    "\ue000 logo": None,
    "\ufffd": None,
    "won\u00adder\u00adful": "wonderful",
    "\ufeffA bom": "a bom",
    "\u202eevil\u202c \u2066ok\u2069": "evil ok",
    " a\0b\x1bc\x7fd\x85e\x9ff ": "a b c d e f",
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\tg": "a b c d e f g",
    "Tom &amp; Jerry <3": "tom &amp; jerry <3",
    "cafe\u0301 \uff21 \u0130": "cafe\u0301 \uff41 i\u0307",
    "\u039f\u0394\u039f\u03a3": "\u03bf\u03b4\u03bf\u03c2",
    "\u041a\u0440\u0430\u0441\u043d\u0430\u044f": "\u043a\u0440\u0430\u0441\u043d\u0430\u044f",
}
"""Captions, and what they become; None: nothing changes."""


def _picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3))
    return encode_png(noise.astype(np.uint8))


@pytest.mark.parametrize("text", CLEANED)
def test_captions_are_cleaned_by_a_fixed_table(text: str) -> None:
    assert clean_caption(text.encode(), "x") == (CLEANED[text] or text)


def test_only_the_table_decides_what_is_kept() -> None:
    """Each character between letters: 65 controls and 18 spaces become a space, 11 are removed."""
    changes: Counter[str] = Counter()
    some = (code for code in range(0x3400, 0x110000, 101) if not 0xD800 <= code < 0xE000)
    for code in (*range(0x3400), *some, 0xFEFF):
        word = f"a{chr(code)}a"
        changes[clean_caption(word.encode(), "x").replace(lowered(word), "kept")] += 1
    assert changes["a a"] == 65 + 18 and changes["aa"] == 11
    assert set(changes) == {"a a", "aa", "kept"}


@pytest.mark.parametrize("text", ["", " \n\t", "\u00ad", "\u200d\u200c", "\ufe0f\u2060", "\0\x1b"])
def test_what_nobody_sees_is_no_caption(text: str) -> None:
    for clean in (clean_caption, clean_captions):
        with pytest.raises(InputError, match="the caption of x is empty"):
            clean(text.encode(), "x")


SCRIPTS = """a red bird
|красная птица|ένα κόκκινο πουλί|կարմիր թռչուն|წითელი ჩიტი|ציפור אדומה|طائر أحمر
|لال پرندہ|लाल पक्षी|লাল পাখি|ਲਾਲ ਪੰਛੀ|લાલ પક્ષી|சிவப்பு பறவை|ఎర్ర పక్షి|ಕೆಂಪು ಹಕ್ಕಿ|ചുവന്ന പക്ഷി|රතු කුරුල්ලා
|นกสีแดง|ນົກສີແດງ|အနီရောင်ငှက်|បក្សីក្រហម|ቀይ ወፍ|红色的鸟|赤い鳥|빨간 새|བྱ་དམར་པོ།|улаан шувуу|ᏗᎦᎨ ᏥᏍᏆ"""


def test_captions_of_many_scripts_stay_as_they_are(bpe: Path) -> None:
    tokenizer, _ = load_tokenizer(bpe)
    texts = [text.strip() for text in SCRIPTS.split("|")]
    assert len(texts) > 20
    for text in texts:
        cleaned = clean_caption(text.encode(), "x")
        assert cleaned == text.lower()
        assert tokenizer.decode(encode(tokenizer, cleaned)) == cleaned


@given(st.one_of(st.text(), st.binary()))
def test_cleaning_twice_changes_nothing_and_raises_input_errors_alone(text: str | bytes) -> None:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        captions = clean_captions(raw, "x")
    except InputError:
        return
    assert clean_captions("\n".join(captions).encode(), "x") == captions
    assert all(clean_caption(caption.encode(), "x") == caption for caption in captions)
    assert len(set(captions)) == len(captions) and "" not in captions


def test_new_capitals_are_left_alone_on_every_python() -> None:
    assert lowered("\u1c89A\U00010d50B\ua7cbC") == "\u1c89a\U00010d50b\ua7cbc"
    assert lowered("\u00c9\u0416\u0391") == "\u00e9\u0436\u03b1"


def test_lines_are_captions_each_once_and_each_cut() -> None:
    assert clean_captions(b"A red bird\r\na bird\n\n a  red bird\rit sits", "x") == (
        *("a red bird", "a bird", "it sits"),
    )
    long = clean_captions(b"a" * 10_000 + b"\nshort", "x")
    assert [len(text) for text in long] == [LONGEST, 5]
    many = b"\n".join(f"caption {i}".encode() for i in range(500))
    assert len(clean_captions(many, "x")) == MOST_CAPTIONS
    with pytest.raises(InputError, match="not UTF-8"):
        clean_captions(b"fine\ncaf\xe9", "x")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """40 pictures; the even ones have four captions, in both file formats."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "in").mkdir()
    for i in range(40):
        texts = [f"view {letter} of {i}" for letter in "abcd"]
        (folder / "in" / f"p{i:02d}.png").write_bytes(_picture(i))
        path = folder / "in" / f"p{i:02d}"
        if i % 4 == 0:
            path.with_suffix(".json").write_text(json.dumps({"caption": texts}))
        else:
            path.with_suffix(".txt").write_text("\n".join(texts[: 1 if i % 2 else 4]))
    store = FolderStore(folder / "out")
    pack(str(folder / "in"), store, PackConfig(validation=0.3, block=4))
    return store


def _records(store: FolderStore) -> list[RawRecord]:
    sources = [RawSource(store, split) for split in SPLITS]
    return [record for source in sources for record in stored_records(source)]


def test_they_are_kept_as_several_that_any_reader_reads(several: FolderStore) -> None:
    for record in _records(several):
        number = int(record.key[1:])
        count = 1 if number % 2 else 4
        assert record.captions == tuple(f"view {c} of {number}" for c in "abcd"[:count])
    names = [str(path) for path in sorted(Path(several.root).rglob("*.tar"))]
    for row in webdataset.WebDataset(names, shardshuffle=False).decode():
        number = int(row["__key__"][1:])
        assert row["txt"] == f"view a of {number}"
        assert len(row["json"].get("captions", [""])) == (1 if number % 2 else 4)
    theirs = packed_set(several, SPLITS)
    assert len(theirs.captions) == 20 + 4 * 20 and len(theirs.pictures) == 40


def test_packing_again_keeps_them(several: FolderStore, tmp_path: Path) -> None:
    out = FolderStore(tmp_path / "out")
    pack(str(Path(several.root) / "train"), out, PackConfig(validation=0.3))
    kept = {r.caption: r.captions for r in stored_records(RawSource(several, "train"))}
    assert {r.caption: r.captions for r in _records(out)} == kept
    theirs = open_evaluation(f"coco:{write_coco(tmp_path / 'coco', 4)}")
    dest, config = FolderStore(tmp_path / "dest"), OverlapConfig(threshold=1.0)
    clip, alone = Clip(ClipConfig(), 0).eval(), JobWorker(number=0, count=1)
    OverlapJob(several, theirs, clip, "hash", config, tmp_path / "report", alone).run(dest)
    assert [r.captions for r in _records(dest)] == [r.captions for r in _records(several)]


def test_filters_judge_each_of_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.png").write_bytes(_picture(i))
        (tmp_path / "in" / f"{i}.txt").write_text(
            f"one\nthese are words {i}\ntwo" if i else "one\ntwo"
        )
    config = PackConfig(validation=0.4, filters=FilterConfig(min_words=3))
    manifests = pack(str(tmp_path / "in"), FolderStore(tmp_path / "out"), config)
    assert manifests["train"].rejects == {"short": 1}
    assert all(len(r.captions) == 1 for r in _records(FolderStore(tmp_path / "out")))


def _far_from_even(counts: Counter[str]) -> float:
    """Chi-square of 4,000 draws of four; above 25 once in 65,000 times."""
    return sum((count - 1000) ** 2 / 1000 for count in counts.values())


def test_one_is_drawn_by_key_and_each_as_often() -> None:
    texts = tuple("abcd")
    records = [
        RawRecord(key=f"k{i}", image=b"", extension="png", caption="a", others=texts[1:])
        for i in range(4000)
    ]
    drawn = [record.drawn_caption(0, 7) for record in records]
    assert drawn == [record.drawn_caption(0, 7) for record in records]
    assert drawn != [record.drawn_caption(0, 8) for record in records]
    assert _far_from_even(Counter(drawn)) < 25
    steps = Counter(records[0].drawn_caption(0, step) for step in range(4000))
    assert _far_from_even(steps) < 25


@pytest.mark.seconds
def test_clip_reads_a_drawn_one_and_tokens_and_the_tokenizer_have_all(
    several: FolderStore, dvae: Path, tmp_path: Path
) -> None:
    bpe = tmp_path / "bpe"
    train_tokenizer(BPETrain(data=str(several.root), out=bpe, vocabulary=300))
    tokenizer, _ = load_tokenizer(bpe)
    records = list(stored_records(RawSource(several, "train")))
    settings = dataclasses.replace(
        clip_tiny(),
        data=str(several.root),
        bpe=bpe,
        order=OrderConfig(lanes=2, shuffle_buffer=2),
        loop=dataclasses.replace(clip_tiny().loop, global_batch_size=4),
    )
    task = ClipTask(settings, World())
    batches = [task.batch(records, step)["text"] for step in (3, 4)]
    for step, batch in zip((3, 4), batches, strict=True):
        for record, row in zip(records, batch.tolist(), strict=True):
            assert record.drawn_caption(0, step) == tokenizer.decode([x for x in row if x >= 0])
    assert not torch.equal(*batches)
    flags = [f"--bpe={bpe}", f"--dvae={dvae}", "--variants=3", "--block=4"]
    tapir("tokenize", str(several.root), str(tmp_path / "tokens"), *flags)
    source = TokenSource(FolderStore(tmp_path / "tokens"), "train")
    for variant in range(3):
        rows = [row for block in range(len(source.sizes)) for row in source.read(block, variant)]
        for record, row in zip(records, rows, strict=True):
            expected = [encode(tokenizer, caption) for caption in record.captions]
            assert [text.tolist() for text in row.texts] == expected
    order = OrderConfig(lanes=2, shuffle_buffer=2)
    stream = iter(Stream(source, seed=9, batch=4, order=order))
    by_id = {record.id: record for record in records}
    for _ in range(12):
        drawn, state = next(stream)
        for row in drawn:
            caption = by_id[row.id].drawn_caption(9, state.epoch)
            assert row.text.tolist() == encode(tokenizer, caption)
    stream.close()


def test_the_share_of_captions_that_are_cut_is_logged_once(
    several: FolderStore,
    bpe: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`view a of 7` has at most 11 letters; its token count depends on the tokenizer."""
    monkeypatch.setattr(LOG, "propagate", True)
    tokenizer, _ = load_tokenizer(bpe)
    captions = [c for r in stored_records(RawSource(several, "train")) for c in r.captions]
    lengths = [len(encode(tokenizer, caption)) for caption in captions]
    context = min(lengths)
    assert context < max(lengths)
    for length in (context, max(lengths)):
        caplog.clear()
        settings = dataclasses.replace(
            clip_tiny(),
            data=str(several.root),
            bpe=bpe,
            model=dataclasses.replace(clip_tiny().model, text_length=length),
            order=OrderConfig(lanes=2, shuffle_buffer=2),
            loop=dataclasses.replace(clip_tiny().loop, global_batch_size=4),
        )
        share = tell_cut_captions(ClipTask(settings, World()))
        cut = sum(n > length for n in lengths)
        assert share == cut / len(lengths)
        message = f"of {len(lengths)} looked at, {cut} have more than model.text_length={length}"
        assert (message in caplog.text) == (cut > 0) == bool(caplog.records)


@pytest.mark.seconds
def test_a_run_and_a_prompt_say_what_is_cut(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    flags = ["--loop.steps=1", "--loop.global-batch-size=8", "--order.lanes=8", "--mesh.data=2"]
    flags += [f"--data={tokens}", f"--out={tmp_path / 'run'}", "--model.text-length=5"]
    text = tapir("train", "prior", "tiny", *flags, "--model.layers=1", "--engine.name=reference")
    assert text.count("of the captions are cut: of ") == 1 and "model.text_length=5" in text
    models = write_models(tmp_path, ["a red circle"])
    studio = open_studio(models)
    short, long = "a red circle", "a red circle and then a great many words more"
    studio.tell_cut([short])
    assert not caplog.records
    studio.tell_cut([short, long])
    assert [record.getMessage().partition(" reads")[0] for record in caplog.records] == [
        f"1 of 2 captions have more than the 8 tokens that the {model}"
        for model in ("prior", "CLIP")
    ]
    assert "it reads 'a red circle" in caplog.text and "words more" not in caplog.text
