"""The captions of a raw data set, a shard at a time."""

from collections.abc import Iterator

from data_pipeline.formats.raw import RawSource


def shard_captions(source: RawSource, shard: int) -> Iterator[str]:
    """All captions of a shard's pairs, in stored order; holds one block in memory.

    Raises: CorruptError, naming the shard, the offset and both digests.
    """
    shards = source.manifest.shards
    first = sum(each.blocks for each in shards[:shard])
    for block in range(first, first + shards[shard].blocks):
        for record in source.read(block):
            yield from record.captions
