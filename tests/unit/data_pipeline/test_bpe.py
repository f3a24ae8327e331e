"""A tokenizer of the paper's size on real English; its dropout against the published one."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.bpe import pieces_of_subword_nmt, some_words
from bench.support.glosses import INSTALL, glosses, glosses_are_there
from data_pipeline.text.bpe import encode, train_bpe
from data_pipeline.text.dropout import DropoutEncoder
from tests.harness import DEVELOPERS, tapir

pytestmark = pytest.mark.skipif(not glosses_are_there(), reason=INSTALL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(glosses(), 16_384)


@pytest.fixture(scope="module")
def joined() -> Tokenizer:
    return train_bpe(glosses(), 16_384, "joined")


def test_joined_a_word_and_the_space_before_it_merge(joined: Tokenizer) -> None:
    model = json.loads(joined.to_str())["model"]
    assert joined.get_vocab_size() == 16_384 == 256 + len(model["merges"])
    merged = {"".join(pair) for pair in model["merges"]}
    assert all(re.fullmatch("Ġ[a-z]+|[a-z]{2,}", word) for word in merged)
    assert {"Ġthe", "Ġwater"} <= merged
    tokenizer = train_bpe(["a small red circle", "2 small  circles, red"], 400, "joined")
    pieces = [tokenizer.id_to_token(i) for i in encode(tokenizer, "a small red circle")]
    assert pieces == ["a", "Ġsmall", "Ġred", "Ġcircle"]
    pieces = [tokenizer.id_to_token(i) for i in encode(tokenizer, "2 small  circles, red")]
    assert pieces == ["2", "Ġsmall", "Ġ", "Ġcircles", ",", "Ġred"]


def test_joined_captions_come_back_also_from_dropout(joined: Tokenizer) -> None:
    plain, dropout = DropoutEncoder(joined, 0.0), DropoutEncoder(joined, 0.5)
    odd = ["a big-ish  cat, 3 dogs", " red", "red ", "x  y", "é è a", "1 a2b c"]
    changed = 0
    for number, text in enumerate([*odd, *list(glosses())[::500]]):
        ids = encode(joined, text)
        again = dropout.encode(ids, number).tolist()
        assert plain.encode(ids).tolist() == ids and joined.decode(ids) == text
        assert joined.decode(again) == text
        changed += again != ids
    assert changed > 0.9 * len(list(glosses())[::500])


def test_it_has_exactly_the_papers_entries(tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    assert tokenizer.get_vocab_size() == 16_384 == 256 + len(model["merges"])
    merged = {"".join(pair) for pair in model["merges"]}
    assert all(re.fullmatch("[a-z]{2,}", word) for word in merged), "merges inside runs of a-z"


def test_every_gloss_comes_back(tokenizer: Tokenizer) -> None:
    for text in list(glosses())[::50]:
        assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.seconds
def test_without_dropout_all_three_agree(tokenizer: Tokenizer) -> None:
    pytest.importorskip("subword_nmt", reason=DEVELOPERS)
    plain, published = DropoutEncoder(tokenizer, 0.0), pieces_of_subword_nmt(tokenizer, 0.0)
    for word in some_words(list(glosses()), 3000):
        ids = encode(tokenizer, word)
        assert plain.encode(ids).tolist() == ids
        assert tuple(tokenizer.id_to_token(i) for i in ids) == published(word)


@pytest.mark.seconds
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropouts_statistics_are_the_published_ones(tokenizer: Tokenizer, rate: float) -> None:
    """Mean pieces a word, and how many words have 1, 2, 3 and more pieces."""
    pytest.importorskip("subword_nmt", reason=DEVELOPERS)
    words = some_words(list(glosses()), 40_000)
    ours, theirs = DropoutEncoder(tokenizer, rate), pieces_of_subword_nmt(tokenizer, rate)
    random.seed(0)
    counts = [
        Counter(len(ours.encode(encode(tokenizer, word), i)) for i, word in enumerate(words)),
        Counter(len(theirs(word)) for word in words),
    ]
    means = [sum(n * times for n, times in row.items()) / len(words) for row in counts]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    assert means[0] > 1.02 * sum(len(encode(tokenizer, word)) for word in words) / len(words)
    for n in range(1, 8):
        assert counts[0][n] / len(words) == pytest.approx(counts[1][n] / len(words), abs=0.01)


def test_a_text_file_can_be_learnt_from(tmp_path: Path) -> None:
    texts = tmp_path / "captions.txt"
    texts.write_bytes("A red circle\n\nÜber the red circles\n".encode() * 9)
    out = tmp_path / "bpe"
    text = tapir("train", "bpe", "tiny", f"--texts={texts}", f"--out={out}", "--vocabulary=300")
    assert "have merges for" in text and (out / "tokenizer.json").exists()
    texts.write_bytes(b"a red circle\n\xff\xfe\n")
    text = tapir("train", "bpe", "tiny", f"--texts={texts}", f"--out={out}", code=2)
    assert "line 2 is not UTF-8" in text
    texts.write_bytes(b"\n \n")
    text = tapir("train", "bpe", "tiny", f"--texts={texts}", f"--out={out}", code=2)
    assert "holds no caption" in text
