"""One self-contained html page about a set: its numbers, and pictures of it.

Captions, keys and reasons come from strangers: they are escaped, and the page may load nothing and
run nothing (its Content-Security-Policy).
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from core.errors import InputError
from core.files.atomic import write_atomic
from core.keys import key_int, keyed_rng
from core.storage.store import Store
from data_pipeline.catalogue.summary import Summary
from data_pipeline.formats.lookup import find_record
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.decode import decode_rgb

TEMPLATE = Path(__file__).with_name("page.html")
_SIDE, _QUALITY = 160, 75
_BLOCKS, _OF_BLOCK = 16, 3
"""Blocks that the wall of samples reads, and pictures that it shows of each."""
_SHORT = 200


def write_page(store: Store, summary: Summary, target: Path) -> None:
    """Write the page; reads some blocks of pictures.

    Raises: CorruptError if they cannot be read; OSError if the page cannot be written.
    """
    sources = {split: RawSource(store, split) for split in summary.kept}
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = loader.from_string(TEMPLATE.read_text()).render(
        place=store.url,
        summary=summary,
        bars={title: _bars(counts) for title, counts in summary.histograms.items()},
        cluster_bars=_bars(summary.cluster_sizes),
        clusters=[
            {"facts": row, "image": _first_picture(store, sources, row.split, row.key)}
            for row in summary.clusters
        ],
        samples=list(_samples(sources["train"])) if "train" in sources else [],
    )
    write_atomic(target, html.encode("utf-8", "backslashreplace"))


def _bars(counts: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of a histogram, with the width of each bar in percent and the share of all."""
    most, total = max(counts.values(), default=1), max(sum(counts.values()), 1)
    return [
        {"label": label, "count": n, "width": 100 * n / most, "share": 100 * n / total}
        for label, n in counts.items()
    ]


def _samples(source: RawSource) -> Iterator[dict[str, str]]:
    """Pictures of blocks that are drawn by the set's fingerprint."""
    draw = keyed_rng(source.fingerprint, "page")
    blocks = draw.permutation(len(source.sizes))[:_BLOCKS]
    for block in sorted(blocks.tolist()):
        records = source.read(block)
        for place in draw.permutation(len(records))[:_OF_BLOCK].tolist():
            record = records[place]
            if image := _thumbnail(record):
                yield {"image": image, "key": record.key, "caption": record.caption[:_SHORT]}


def _first_picture(store: Store, sources: dict[str, RawSource], split: str, key: str) -> str:
    """The picture of a pair that the set has kept; "" if it has not."""
    source = sources.get(split)
    place = find_record(store, split, source.blocks, key_int(key)) if source else None
    if source is None or place is None:
        return ""
    block, number = place
    return _thumbnail(source.read(block)[number])


def _thumbnail(record: RawRecord) -> str:
    """A small JPEG as a data URL; "" if the picture does not decode."""
    try:
        pixels = decode_rgb(record.image, record.key)
    except InputError:
        return ""
    height, width = pixels.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    return "data:image/jpeg;base64," + base64.b64encode(np.asarray(data).tobytes()).decode()
