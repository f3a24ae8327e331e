"""Which files a plan has listed already, so that none is packed twice."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from core.config import S3
from core.errors import InputError
from data_pipeline.sources.files import FilePair
from data_pipeline.sources.pair import printable
from data_pipeline.sources.patterns import Pattern, is_pattern
from data_pipeline.sources.places import Files
from data_pipeline.sources.units import FileRow, Unit


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What the earlier versions of a set were made of."""

    sources: int = 0
    """Number of their SRC."""
    archives: frozenset[tuple[str, str]] = frozenset()
    """(place, tag) of their archives and tables."""
    files: frozenset[str] = frozenset()
    """Places of their other files."""
    names: frozenset[str] = frozenset()
    """With which their keys begin."""


NOTHING = Packed()
"""Of a set's first version."""


class Listed:
    """The files of earlier versions, and of the sources so far."""

    def __init__(self, earlier: Packed, several: bool) -> None:
        """`several`: there are other sources in which a file may be, too."""
        self._earlier, self._several = earlier, several
        self._places = {place for place, _ in earlier.archives}
        self._texts: dict[str, str] = {}
        """Place -> the SRC that has it."""

    def new(
        self, text: str, files: Files, units: Iterable[Unit], rows: Iterable[FileRow]
    ) -> tuple[list[Unit], list[FileRow]]:
        """What the earlier versions do not have of a source.

        Raises: InputError if another source has one of the files, or an archive has changed since
        it was packed.
        """
        new_units = [unit for unit in units if self._is_new(files, unit)]
        new_rows = [row for row in rows if self._place(files, row) not in self._earlier.files]
        if self._several:
            pictures = (row.picture for row in new_rows if isinstance(row, FilePair))
            for name in dict.fromkeys([*(unit.name for unit in new_units), *pictures]):
                self._add(printable(files.place(name)), text)
        return new_units, new_rows

    def _is_new(self, files: Files, unit: Unit) -> bool:
        place = printable(files.place(unit.name))
        if (place, unit.tag) in self._earlier.archives:
            return False
        if place in self._places:
            raise InputError(
                f"{place} has changed since it was packed (another time or ETag), and appending it "
                "would repeat its pairs; give a SRC with the new archives alone, or pack all of it "
                "into another DEST"
            )
        return True

    def _place(self, files: Files, row: FileRow) -> str:
        return printable(files.place(row.picture)) if isinstance(row, FilePair) else row.key

    def _add(self, place: str, text: str) -> None:
        if place in self._texts:
            raise InputError(
                f"{place} is in two SRC, {self._texts[place]!r} and {text!r}; its pairs would be "
                "packed twice: give it once"
            )
        self._texts[place] = text


def place_of(text: str, name: str) -> str:
    """The place of a file of a SRC, as its `Files.place` gives it."""
    place = text.rstrip("/")
    if is_pattern(text) and not Path(text).exists():
        place = f"{Pattern(text).root}/{name}"
    elif place != name and not place.endswith(f"/{name}"):
        place = f"{place}/{name}"
    return place if place.startswith(S3) else Path(place).absolute().as_posix()
