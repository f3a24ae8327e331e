"""words.json: the words of training captions, and what is said of others."""

from pathlib import Path

import pytest

from core.errors import CorruptError
from data_pipeline.text import words as words_module
from data_pipeline.text.bpe import Spaces, count_words
from data_pipeline.text.words import FILE, known_words, load_words, save_words
from training.config import BPETrain
from training.tokenizer import train_tokenizer

CAPTIONS = ["a red circle, a red square", "the café 你好", "red"]


@pytest.mark.parametrize("spaces", ["alone", "joined"])
def test_words_are_counted_whole_in_both_spacings(spaces: Spaces) -> None:
    known = known_words(count_words(CAPTIONS, spaces))
    many = {word: count for word, count in known.counts.items() if len(word) > 1}
    assert many == {"red": 3, "circle": 1, "square": 1, "the": 1, "caf": 1}
    assert next(iter(known.counts)) == "red" and {"é", "你", "好"} <= set(known.counts)
    assert known.complete


def test_unknown_words_are_named_whole_and_once() -> None:
    known = known_words(count_words(CAPTIONS))
    assert known.unknown("A Red circle 7") == []
    assert known.unknown("purple red café thé purple naïve 你们") == [
        "purple",
        "thé",
        "naïve",
        "你们",
    ]
    assert known.known("a red purple circle red 7") == 2
    text = known.explain(["circles"])
    assert "'circles'" in text and "is close to circle" in text
    assert "They know" in text and "square" in text
    brief = known.brief(["circles"])
    assert "'circles'" in brief and "is close to" not in brief and "square" in brief
    named = known.brief([f"word{i}" for i in range(99)])
    assert "'word7', so" in named and "word8" not in named


def test_rare_words_are_left_out_and_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words_module, "MOST", 2)
    known = known_words({"red": 3, "blue": 2, "mauve": 1})
    assert list(known.counts) == ["red", "blue"] and not known.complete
    assert "not among the 2 most frequent training words" in known.explain(["mauve"])
    save_words(known, tmp_path)
    assert load_words(tmp_path) == known


def test_a_damaged_file_is_named_and_a_missing_one_is_none(tmp_path: Path) -> None:
    assert load_words(tmp_path) is None
    (tmp_path / FILE).write_text('{"words": 3}')
    with pytest.raises(CorruptError, match=FILE):
        load_words(tmp_path)


def test_the_tokenizer_s_folder_has_the_words_of_pairs_and_of_lines(
    raw: Path, tmp_path: Path
) -> None:
    train_tokenizer(BPETrain(data=str(raw), out=tmp_path / "pairs", vocabulary=300))
    known = load_words(tmp_path / "pairs")
    assert known is not None and {"red", "circle", "above"} <= set(known.counts)
    assert known.unknown("a small red circle above a large blue square") == []
    (tmp_path / "lines.txt").write_text("\n".join(CAPTIONS))
    train_tokenizer(BPETrain(texts=tmp_path / "lines.txt", out=tmp_path / "lines", vocabulary=300))
    assert load_words(tmp_path / "lines") == known_words(count_words(CAPTIONS))
