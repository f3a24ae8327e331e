"""A tokenizer of the paper's 16,384 entries on a real English corpus, and its dropout.

Statistics and speed of the dropout are compared with subword-nmt, the published implementation, on
the same merges and words; without dropout both must equal the `tokenizers` library.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from bench.support.glosses import INSTALL, glosses, glosses_are_there
from bench.support.rows import bench_row
from bench.support.sizes import sized
from data_pipeline.text.bpe import encode, train_bpe
from data_pipeline.text.dropout import DropoutEncoder

ENTRIES = sized(16_384, 1024)
GLOSSES = sized(10**6, 4000)
WORDS, TEXTS, ROUNDS, RATE = sized(20_000, 500), sized(3000, 50), sized(7, 2), 0.1


def run() -> list[dict[str, Any]]:
    """Rows of entries, pieces a word and words a second."""
    if not glosses_are_there():
        raise SystemExit(INSTALL)
    corpus = list(islice(glosses(), GLOSSES))
    began = time.perf_counter()
    tokenizer = train_bpe(corpus, ENTRIES)
    trained = time.perf_counter() - began
    entries = tokenizer.get_vocab_size()
    assert entries == ENTRIES, entries
    words = some_words(corpus, WORDS)
    rows = [
        bench_row(
            f"entries learnt from {len(corpus):,} glosses in {trained:.1f} s",
            entries,
            "entries",
            f"exactly {ENTRIES}",
            [entries / ENTRIES],
        )
    ]
    return [*rows, *_dropout_rows(tokenizer, words), _speed_row(tokenizer, corpus)]


def some_words(corpus: list[str], count: int) -> list[str]:
    """Words of a-z in the corpus' own frequencies, of two letters or more."""
    words = [word for line in corpus for word in runs_of_letters(line) if len(word) > 1]
    return random.Random(0).sample(words, count)


def runs_of_letters(text: str) -> list[str]:
    """The parts of a text that merges can happen in."""
    return "".join(c if "a" <= c <= "z" else " " for c in text).split()


def pieces_of_subword_nmt(tokenizer: Tokenizer, rate: float) -> Callable[[str], tuple[str, ...]]:
    """The published implementation on this tokenizer's merges."""
    from subword_nmt.apply_bpe import encode as subword_nmt  # noqa: PLC0415 - for developers alone

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    codes = {tuple(pair): rank for rank, pair in enumerate(merges)}

    def pieces(word: str) -> tuple[str, ...]:
        parts: tuple[str, ...] = subword_nmt(word, codes, {}, None, "", (0, 1), {}, None, rate)
        return parts

    return pieces


def _dropout_rows(tokenizer: Tokenizer, words: list[str]) -> list[dict[str, Any]]:
    ids = [encode(tokenizer, word) for word in words]
    plain, published = DropoutEncoder(tokenizer, 0.0), pieces_of_subword_nmt(tokenizer, 0.0)
    for word, whole in zip(words, ids, strict=True):
        assert plain.encode(whole).tolist() == whole
        assert len(published(word)) == len(whole)
    ours, theirs = DropoutEncoder(tokenizer, RATE), pieces_of_subword_nmt(tokenizer, RATE)
    random.seed(0)
    counts = [
        [
            sum(len(ours.encode(row, turn, i)) for i, row in enumerate(ids))
            for turn in range(ROUNDS)
        ],
        [sum(len(theirs(word)) for word in words) for _ in range(ROUNDS)],
    ]
    pieces = [statistics.fmean(row) / len(words) for row in counts]
    same = [a / b for a, b in zip(*counts, strict=True)]
    without = sum(map(len, ids)) / len(words)
    return [
        bench_row(
            f"pieces a word at dropout {RATE} ({without:.3f} without)",
            pieces[0],
            "pieces",
            f"subword-nmt {pieces[1]:.4f}, target within 2%",
            same,
            ratio=pieces[0] / pieces[1],
        )
    ]


def _speed_row(tokenizer: Tokenizer, corpus: list[str]) -> dict[str, Any]:
    """Whole glosses: ours from their ids, with a key each; subword-nmt from their words."""
    texts = random.Random(0).sample(corpus, TEXTS)
    ids = [encode(tokenizer, text) for text in texts]
    words = [runs_of_letters(text) for text in texts]
    ours, theirs = DropoutEncoder(tokenizer, RATE), pieces_of_subword_nmt(tokenizer, RATE)
    mine, published = [], []
    for turn in range(ROUNDS):
        began = time.process_time()
        for i, row in enumerate(ids):
            ours.encode(row, turn, i)
        between = time.process_time()
        for several in words:
            for word in several:
                theirs(word)
        mine.append(between - began)
        published.append(time.process_time() - between)
    ratios = [b / a for a, b in zip(mine, published, strict=True)]
    return bench_row(
        "glosses a second with dropout, keyed",
        TEXTS / statistics.median(mine),
        "glosses/s",
        f"subword-nmt {TEXTS / statistics.median(published):.0f}, words alone, no keys",
        ratios,
    )
