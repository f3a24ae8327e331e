"""The words that training captions hold, so that a caption's unknown ones can be named.

words.json beside tokenizer.json: {"complete": ..., "words": {word: occurrences}}, the most frequent
first. Words are those that the tokenizer's merges are learned from: runs of two or more letters
a-z, and single characters of other scripts.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import CorruptError
from core.files.atomic import write_atomic
from data_pipeline.text.captions import lowered

FILE = "words.json"
MOST = 100_000
"""Words of a file; rarer ones are left out."""
_WHOLE = re.compile(r"[^\W_]+")
_PIECE = re.compile("[a-z]{2,}|[^\x00-\x7f]")
_LISTED, _CLOSE, _NAMED = 30, 3, 8
"""Known words, similar ones for each unknown word, and unknown ones that a message lists."""


@dataclass(frozen=True, kw_only=True)
class KnownWords:
    """Words of a model's training captions."""

    counts: Mapping[str, int]
    """Word -> occurrences, the most frequent first."""
    complete: bool
    """False if rarer words were left out."""

    def unknown(self, caption: str) -> list[str]:
        """The distinct words of a caption of which a part is in no training caption."""
        words = _WHOLE.findall(lowered(caption))
        return list(dict.fromkeys(word for word in words if not self._holds(word)))

    def known(self, caption: str) -> int:
        """Number of distinct words of a caption that are in training captions."""
        words = set(_WHOLE.findall(lowered(caption)))
        return sum(bool(_PIECE.search(word)) and self._holds(word) for word in words)

    def explain(self, unknown: list[str]) -> str:
        """A sentence for people: the unknown words, similar ones, and what is known."""
        close = {word: difflib.get_close_matches(word, self.counts, _CLOSE) for word in unknown}
        similar = [
            f"{word!r} is close to {', '.join(near)}" for word, near in close.items() if near
        ]
        return ". ".join([self._named(unknown), *similar, self._listing()])

    def brief(self, unknown: list[str]) -> str:
        """`explain` in microseconds, for captions of strangers: it looks for no similar words."""
        return f"{self._named(unknown[:_NAMED])}. {self._listing()}"

    def _named(self, unknown: list[str]) -> str:
        named = ", ".join(repr(word) for word in unknown)
        if self.complete:
            start = f"no training caption of these models has {named}"
        else:
            start = f"not among the {len(self.counts):,} most frequent training words: {named}"
        return f"{start}, so the picture may not show it"

    def _listing(self) -> str:
        words = list(self.counts)
        if len(words) <= _LISTED:
            return f"They know {', '.join(sorted(words))}"
        often = ", ".join(words[:_LISTED])
        return f"They know {len(words):,} words; the most frequent are {often}"

    def _holds(self, word: str) -> bool:
        return all(piece in self.counts for piece in _PIECE.findall(word))


def known_words(pieces: Mapping[str, int]) -> KnownWords:
    """The words among the pieces that `data_pipeline.text.bpe.count_words` counts."""
    counts = Counter[str]()
    for piece, count in pieces.items():
        if _PIECE.fullmatch(word := piece.strip(" ")):
            counts[word] += count
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    return KnownWords(counts=dict(rows[:MOST]), complete=len(rows) <= MOST)


def save_words(words: KnownWords, folder: Path) -> None:
    """Write words.json; its order is that of the words."""
    body = {"complete": words.complete, "words": dict(words.counts)}
    write_atomic(folder / FILE, (json.dumps(body, ensure_ascii=False, indent=0) + "\n").encode())


def copy_words(source: Path, target: Path) -> None:
    """Copy words.json to another folder, if there is one. Raises: CorruptError if it is damaged."""
    if (words := load_words(source)) is not None:
        save_words(words, target)


def load_words(folder: Path) -> KnownWords | None:
    """Read words.json; None if an older Tapir learned the tokenizer.

    Raises: CorruptError if it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_bytes())
        counts = {str(word): int(count) for word, count in body["words"].items()}
        return KnownWords(counts=counts, complete=bool(body["complete"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{path} is damaged: {error!r}; delete it, and `tapir train bpe` writes it again"
        ) from error
