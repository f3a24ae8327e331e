"""Which members of a WebDataset tar are a pair.

WebDataset's keys end at the first dot of a name, but users' names may contain dots
(`clip v1.5 0001.jpg`). Members with equal names up to the first dot form a group. Each picture with
a caption of the same name up to the last dot is a pair; other members of its group (`KEY.mask.png`,
`KEY.cls.txt`) are further fields of the sample.

A `Run` is a range of bytes that yields the same pairs when it is read by itself: between two runs
no sample is incomplete.
"""

from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.names import CAPTION, NOTE
from data_pipeline.sources.pair import (
    IGNORED,
    Pair,
    Unusable,
    captions_of,
    key_of,
    make_pair,
    unusable,
)

_NEIGHBOURS = (
    "members of a pair must be neighbours in the archive (a picture and a .txt of one name): make "
    "it with tar --sort=name"
)


class Run(NamedTuple):
    """A range of an archive whose pairs are complete; it follows its pairs."""

    start: int
    end: int


Item = Pair | Unusable | Run


class _Sample:
    """Members of one name, by extension; None for a member that is already rejected."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.parts: dict[str, bytes | None] = {}

    @property
    def pictures(self) -> list[str]:
        """Extensions of its supported pictures."""
        return [e for e, data in self.parts.items() if e in EXTENSIONS and data is not None]

    @property
    def caption(self) -> bytes | None:
        return captions_of(self.parts.get(CAPTION), self.parts.get(NOTE))


class Group:
    """Adjacent members with equal names up to the first dot.

    `_open` is a stack of incomplete samples: each name extends the one before, as `7.mask` extends
    `7`. A run ends where the stack becomes empty.
    """

    def __init__(self, where: str, archive: str, stem: str) -> None:
        self._where, self._archive, self._key = where, archive, _first_part(stem)
        self._open: list[_Sample] = []
        self._run: Run | None = None
        """The members of the open samples."""
        self._pairs: set[str] = set()
        self._left: list[tuple[str, str, bool]] = []
        """(name, extension, has a .json) of members without a pair."""

    def has(self, stem: str) -> bool:
        """True if a name belongs to this group."""
        return self._key == _first_part(stem)

    def add(
        self, stem: str, extension: str, data: bytes | None, reject: Unusable | None, place: Run
    ) -> Iterator[Item]:
        """Add a member; yields the pairs, rejects and runs that are complete."""
        while self._open and not f"{stem}.".startswith(f"{self._open[-1].stem}."):
            yield from self._close(self._open.pop())
        if not self._open or self._open[-1].stem != stem:
            self._open.append(_Sample(stem))
        if extension in self._open[-1].parts:  # the same name again
            yield from self._close(self._open.pop())
            self._open.append(_Sample(stem))
        self._open[-1].parts[extension] = data
        self._run = Run(self._run.start if self._run else place.start, place.end)
        if reject is not None:
            yield reject

    def end(self) -> Iterator[Item]:
        """Yield the remaining pairs, rejects and the last run."""
        while self._open:
            yield from self._close(self._open.pop())
        for stem, extension, noted in self._left:
            where = f"{self._where}:{stem}.{extension}"
            if extension == NOTE or self._is_field(stem):
                yield unusable(where, "is a further field, or a note without a pair", IGNORED)
            elif extension == CAPTION:
                yield unusable(where, f"is a caption without a picture; {_NEIGHBOURS}", "image")
            elif noted:
                yield unusable(where, "has no caption: no .txt, and its .json has none", "caption")
            else:
                yield unusable(where, f"has no caption; {_NEIGHBOURS}", "caption")

    def _is_field(self, stem: str) -> bool:
        """True if the name, cut at one of its dots, is the name of a pair of this group."""
        dots = (i for i, letter in enumerate(stem) if letter == ".")
        return any(stem[:i] in self._pairs for i in dots)

    def _close(self, sample: _Sample) -> Iterator[Item]:
        """Yield a sample as a pair, or record its members as without a pair."""
        pictures, caption = sample.pictures, sample.caption
        where = f"{self._where}:{sample.stem}"
        if pictures and caption is not None:
            self._pairs.add(sample.stem)
            key = key_of(f"{self._archive}/{sample.stem}")
            data = sample.parts[pictures[0]] or b""
            yield make_pair(key, data, pictures[0], caption, where)
            for extension in pictures[1:]:
                yield unusable(
                    f"{where}.{extension}", "is a second picture of one caption", "image"
                )
        elif None not in sample.parts.values():  # else its picture is a reject already
            noted = NOTE in sample.parts
            self._left += [(sample.stem, extension, noted) for extension in sample.parts]
        if not self._open and self._run is not None:
            yield self._run
            self._run = None


def _first_part(stem: str) -> str:
    """WebDataset's key: the path up to the first dot of the name."""
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.partition(".")[0]
