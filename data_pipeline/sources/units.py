"""A unit of a pack job: an archive, a table or some row groups of one, or a slice of a listing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.config import PackConfig
from data_pipeline.formats.fetch import fetched
from data_pipeline.images.crops import encode_png
from data_pipeline.sources.drawn.panels import CAPTIONS, draw_panels, render_pair
from data_pipeline.sources.drawn.shapes import draw_scene, render
from data_pipeline.sources.emoji import emoji_pairs
from data_pipeline.sources.files import FilePair, file_pair
from data_pipeline.sources.pair import Pair, Unusable, unusable
from data_pipeline.sources.places import Files
from data_pipeline.sources.table import TablePart, table_pairs
from data_pipeline.sources.tars import archive_pairs

FileRow = FilePair | Unusable


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one task reads."""

    kind: Literal["tar", "table", "files", "shapes", "panels", "emoji"]
    source: int = 0
    """Number of the SRC."""
    name: str = ""
    """The archive or table; of `files`, the listing of the slice in DEST."""
    archive: str = ""
    """With which keys begin."""
    first: int = 0
    """First generated picture, or row group of a table."""
    count: int = 0
    """Generated pictures or row groups; 0 = all of the table's."""
    row: int = 0
    """The table's number of the first row."""
    size: int = 0
    """Bytes to read, to judge progress; of `files` and generated pictures, their number."""
    tag: str = ""
    """The ETag or time of the archive when it was listed."""

    @property
    def shown(self) -> str:
        """For logs."""
        return self.name or f"{self.kind} {self.first} to {self.first + self.count}"


def unit_pairs(
    unit: Unit, files: Files | None, rows: Sequence[FileRow], config: PackConfig
) -> Iterator[Pair | Unusable]:
    """Read a unit; every file, member and row yields a pair or a reject.

    `files`: those of its source; `rows`: the slice of a listing.
    """
    if unit.kind == "shapes":
        yield from shapes_pairs(unit.first, unit.count, config.pixels, config.seed)
    elif unit.kind == "panels":
        yield from panels_pairs(unit.first, unit.count, config.pixels, config.seed)
    elif unit.kind == "emoji":
        yield from emoji_pairs(config.cache)
    elif files is not None and unit.kind == "tar":
        yield from _tar(unit, files)
    elif files is not None and unit.kind == "table":
        part = TablePart(unit.name, unit.archive, unit.first, unit.count, unit.row)
        yield from table_pairs(files, part)
    elif files is not None:
        yield from fetched(lambda row: file_pair(files, row, unit.archive), rows)


def _tar(unit: Unit, files: Files) -> Iterator[Pair | Unusable]:
    where = files.where(unit.name)
    try:
        file = files.open(unit.name)
    except OSError as error:
        yield unusable(where, f"cannot be read: {error.strerror}", "archive")
        return
    with file:
        yield from archive_pairs(file, where, unit.archive)


def shapes_pairs(first: int, count: int, pixels: int, seed: int) -> Iterator[Pair]:
    """Yield pictures of the shapes generator; equal captions share a split."""
    for index in range(first, first + count):
        scene = draw_scene(seed, index)
        yield Pair(
            key=f"shapes-{index:09d}",
            image=encode_png(render(scene, pixels, seed, index)),
            extension="png",
            caption=scene.caption.encode(),
            split_key=scene.caption,
            where=f"shapes #{index}",
        )


def panels_pairs(first: int, count: int, pixels: int, seed: int) -> Iterator[Pair]:
    """Yield pictures of the panels generator; equal upper panels share a split."""
    for index in range(first, first + count):
        operation, top = draw_panels(seed, index)
        yield Pair(
            key=f"panels-{index:09d}",
            image=encode_png(render_pair(operation, top, pixels)),
            extension="png",
            caption=CAPTIONS[operation].encode(),
            split_key=str(top),
            where=f"panels #{index}",
        )
