"""Byte-pair encoding of captions with the `tokenizers` library.

Merges are confined to runs of a-z and to the bytes of one character; digits and punctuation never
merge, and every byte has a symbol, so that decoding is lossless. Spaces never merge (the paper), or
a space merges with the letters after it (GPT-2), which halves the tokens of a caption.
Source: the paper's author, openai/DALL-E issue 22.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import CorruptError, InputError
from core.files.atomic import sha256, write_atomic
from data_pipeline.text.captions import lowered

FILE = "tokenizer.json"
Spaces = Literal["alone", "joined"]
_PIECES: dict[Spaces, str] = {"alone": "[a-z]+|[^a-z]", "joined": " ?[a-z]+|[^a-z]"}
"""Pre-tokenization pattern: merges never cross its matches."""
_WORDS: dict[Spaces, str] = {
    "alone": "[a-z]{2,}|[^\x00-\x7f]",
    "joined": " [a-z]+|[a-z]{2,}|[^\x00-\x7f]",
}
"""The matches of more than one byte."""
_LINE = 1000
"""Words in a line that the library reads."""


def train_bpe(captions: Iterable[str], vocabulary: int, spaces: Spaces = "alone") -> Tokenizer:
    """Learn merges from captions; `spaces` joined = a word merges with the space before it.

    Raises: InputError if the vocabulary is not larger than the 256 bytes, or above 65536.
    """
    return learn_merges(count_words(captions, spaces), vocabulary, spaces)


def count_words(captions: Iterable[str], spaces: Spaces = "alone") -> Counter[str]:
    """How often each piece occurs; without pieces of one byte, in which nothing merges."""
    counts, words = Counter[str](), re.compile(_WORDS[spaces])
    for caption in captions:
        counts.update(words.findall(caption))
    return counts


def learn_merges(counts: Mapping[str, int], vocabulary: int, spaces: Spaces = "alone") -> Tokenizer:
    """Learn merges from the counts of `count_words`.

    Raises: InputError if the vocabulary is not larger than the 256 bytes, or above 65536.
    """
    if not 256 < vocabulary <= 65536:
        raise InputError(f"vocabulary={vocabulary} must be 257 to 65536 (256 of them are bytes)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(counts), trainer)
    runs = pre_tokenizers.Split(Regex(_PIECES[spaces]), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([runs, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _lines(counts: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it was counted, as symbols of its bytes, in lines of many words.

    The library counts words itself; a space is no symbol of a byte, so that it can divide them.
    """
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    line, free = list[str](), _LINE
    for word, count in sorted(counts.items()):
        ((text, _),) = symbols.pre_tokenize_str(word)
        while count:
            taken = min(count, free)
            line += [text] * taken
            count, free = count - taken, free - taken
            if not free:
                yield " ".join(line)
                line, free = [], _LINE
    yield " ".join(line)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json."""
    write_atomic(folder / FILE, tokenizer.to_str(pretty=True).encode())


def load_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """Read tokenizer.json; returns the tokenizer and the file's sha256.

    Raises: InputError if there is none; CorruptError if it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"there is no {path}; make it with `tapir train bpe`")
    data = path.read_bytes()
    try:
        return Tokenizer.from_str(data.decode()), sha256(data)
    except Exception as error:  # the library raises nothing more precise
        raise CorruptError(
            f"{path} is not a tokenizer ({error}); make it again with `tapir train bpe`"
        ) from error


def encode(tokenizer: Tokenizer, caption: str) -> list[int]:
    """Text ids of a cleaned caption."""
    return list(tokenizer.encode(lowered(caption)).ids)
