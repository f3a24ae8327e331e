"""Examines pairs in threads: captions are cleaned, pictures decoded, hashed and filtered."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from core.errors import InputError
from core.keys import key_fraction
from data_pipeline.catalogue.schema import Row, reject_row, row_of
from data_pipeline.config import PackConfig
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.images.decode import Inspected, inspect
from data_pipeline.packing.filters import Reject, caption_reject, image_reject
from data_pipeline.sources.pair import Pair, Unusable
from data_pipeline.text.captions import clean_captions

Placed = tuple[Pair | Unusable, str]
"""An item of a source, and the split of the block that holds it; "" if it is to be copied."""
_HELD = 64 * 2**20
"""Bytes of pictures that wait for a thread, or for the ones before them."""
_BATCH, _MOST = 2**19, 64
"""A thread takes pictures of at least so many bytes, or so many of them: to hand over one alone
costs 0.1 ms, a tenth of what a picture of 30 kB takes."""
_WAITING = 32
"""Batches a thread: 0.6 s of work, so that no thread waits while a shard is written."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """An item of a source, and what it is worth."""

    row: Row
    """Of the catalogue; its split is that of the pair."""
    pair: Pair | None = None
    captions: tuple[str, ...] = ()
    """Cleaned, without those that a filter rejects."""
    reject: Unusable | None = None
    """Why it is left out."""
    asked: bool = False
    """True if a filter rejects it."""


def examined(items: Iterable[Placed], config: PackConfig) -> Iterator[Examined]:
    """Examine items in threads; yields them in their order."""
    with ThreadPoolExecutor(config.threads, "examine") as pool:
        waiting: deque[tuple[int, Future[list[Examined]]]] = deque()
        held = 0
        try:
            for size, batch in _batches(items):
                waiting.append((size, pool.submit(_examine_batch, batch, config)))
                held += size
                most = _WAITING * config.threads
                while len(waiting) > most or (held > _HELD and len(waiting) > 1):
                    size, future = waiting.popleft()
                    held -= size
                    yield from future.result()
            while waiting:
                yield from waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[Placed]) -> Iterator[tuple[int, list[Placed]]]:
    """Some items at a time, with the bytes of their pictures."""
    size, batch = 0, []
    for item in items:
        batch.append(item)
        size += len(item[0].image) if isinstance(item[0], Pair) else 0
        if size >= _BATCH or len(batch) == _MOST:
            yield size, batch
            size, batch = 0, []
    if batch:
        yield size, batch


def _examine_batch(batch: list[Placed], config: PackConfig) -> list[Examined]:
    return [_examine(item, split, config) for item, split in batch]


def split_of(pair: Pair, config: PackConfig) -> str:
    """The split of a pair that is copied, by its split key."""
    held_out = key_fraction(config.seed, pair.split_key, "split") < config.validation
    return SPLITS[1] if held_out else SPLITS[0]


def _examine(item: Pair | Unusable, split: str, config: PackConfig) -> Examined:
    if isinstance(item, Unusable):
        return Examined(row=reject_row(item), reject=item)
    captions: tuple[str, ...] = ()
    image: Inspected | None = None
    kind = "caption"
    try:
        captions = tuple(clean_captions(item.caption, item.where))
        kind = "image"
        image = inspect(item.image, item.where)
    except InputError as error:
        reject = Unusable(key=item.key, kind=kind, reason=str(error))
        row = row_of(item, captions, image, split or None, reject)
        return Examined(row=row, pair=item, captions=captions, reject=reject)
    kept, refused = _filtered(captions, image, config)
    if refused:
        reject = Unusable(key=item.key, **vars(refused))
        row = row_of(item, kept or captions, image, split or None, reject)
        return Examined(row=row, pair=item, captions=kept, reject=reject, asked=True)
    row = row_of(item, kept, image, split or split_of(item, config))
    return Examined(row=row, pair=item, captions=kept)


def _filtered(
    captions: tuple[str, ...], image: Inspected, config: PackConfig
) -> tuple[tuple[str, ...], Reject | None]:
    """The captions that no filter rejects, and why the pair is rejected."""
    refused = [caption_reject(caption, config.filters) for caption in captions]
    kept = tuple(c for c, reject in zip(captions, refused, strict=True) if reject is None)
    return kept, image_reject(image, config.filters) if kept else refused[0]
