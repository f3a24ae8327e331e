"""Settings of the data jobs; imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SHAPES_COUNT = 10_000
"""Pairs that `shapes` draws if no count is given."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which readable pairs are left out on purpose; each reject is kept with its reason."""

    min_words: int = 0
    """Words that a caption must have."""
    english: bool = False
    """Leave out captions that are not English, by a rule of letters and common words."""
    boilerplate: bool = False
    """Leave out captions such as `photographed on 3 May`, stock photo notes and file names."""
    aspect: float = 0.0
    """Longer side over shorter side, at most (the paper: 2); 0 = any."""
    min_side: int = 0
    """Pixels of the shorter side, at least (the paper: 256)."""
    duplicates: bool = False
    """Leave out pairs whose image and caption were there before."""
    near: int = -1
    """Leave out pictures whose 64-bit perceptual hash differs in at most so many bits (0 to 3) from
    one before; -1 = keep them."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.min_words, self.min_side) < 0 or not (self.aspect == 0 or self.aspect >= 1):
            problems.append(
                "min_words and min_side must not be negative, aspect be 0 or at least 1"
            )
        if not -1 <= self.near <= 3:
            problems.append(f"near={self.near} must be 0 to 3, or -1 to keep near duplicates")
        return problems


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Write raw pairs as WebDataset shards, split into train and validation."""

    count: int = 0
    """How many pairs to take; 0 = all (shapes: 10000)."""
    pixels: int = 32
    """Side of the pictures that `shapes` draws; other sources keep their own size."""
    seed: int = 0
    """Seed of the generator and of the split."""
    validation: float = 0.05
    """Share of the pairs that is held out, chosen by key."""
    shard_pairs: int = 2000
    """Pairs a shard, at most."""
    shard_megabytes: int = 256
    """Size of a shard, at most."""
    block: int = 64
    """Pairs that are read by one request in training."""
    max_rejects: float = 0.0
    """Share of unusable pairs that may be left out (and counted) instead of stopping; what the
    filters leave out does not count."""
    threads: int = 2
    """Threads that decode and check pictures; the shards are the same for any number."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Pairs that are left out on purpose."""
    cache: Path = Path(".cache")
    """Where packages that a source downloads are kept."""

    def problems(self) -> list[str]:
        problems = self.filters.problems()
        if not 0 < self.validation < 1:
            problems.append(f"validation={self.validation} must lie between 0 and 1; try 0.05")
        if min(self.shard_pairs, self.shard_megabytes, self.block, self.threads) < 1:
            problems.append("shard_pairs, shard_megabytes, block and threads must be at least 1")
        if not 0 <= self.max_rejects < 1:
            problems.append(f"max_rejects={self.max_rejects} is a share; it must lie in [0, 1)")
        if self.count < 0 or not 16 <= self.pixels <= 1024:
            problems.append("count must not be negative, and pixels be 16 to 1024")
        return problems


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """The order in which records are read: exact, keyed, the same for every number of ranks."""

    lanes: int = 8
    """Independent sub-streams; every data-parallel degree must divide it."""
    shuffle_buffer: int = 8
    """Blocks of a lane that are shuffled together; each rank keeps its lanes' windows in memory."""

    def problems(self, global_batch: int, ranks: int) -> list[str]:
        if min(self.lanes, self.shuffle_buffer) < 1:
            return ["order.lanes and order.shuffle_buffer must be at least 1"]
        lanes = self.lanes if self.lanes % ranks == 0 else ranks * max(1, self.lanes // ranks)
        batch = max(lanes, round(global_batch / lanes) * lanes)
        advice = f"try --order.lanes {lanes} --loop.global-batch-size {batch}"
        problems = []
        if self.lanes % ranks:
            problems.append(
                f"{ranks} data-parallel ranks do not divide order.lanes={self.lanes}; {advice}"
            )
        elif global_batch % self.lanes:
            problems.append(
                f"order.lanes={self.lanes} does not divide loop.global_batch_size={global_batch}; "
                f"{advice}"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a rank fetches its records; changes speed and memory, never what is read."""

    readers: int = 4
    """Threads that fetch blocks from the store."""
    prefetch: int = 16
    """Steps whose batches are fetched before they are needed."""
    cache: Path | None = None
    """Local folder that keeps fetched blocks; several ranks may share it."""
    cache_gigabytes: float = 10.0
    """Size of the cache; the oldest blocks make room."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.readers, self.prefetch) < 1:
            problems.append("loader.readers and loader.prefetch must be at least 1")
        if not self.cache_gigabytes > 0:
            problems.append("loader.cache_gigabytes must be positive")
        return problems


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """The token job: dVAE codes and text ids of every raw pair."""

    block: int = 64
    """Records a block of the token shards, read by one request (the paper's scale: 128)."""
    variants: int = 1
    """Keyed crops of every picture; epoch e of the prior reads variant e % variants."""
    batch: int = 64
    """Pictures encoded together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder. bf16: over twice as fast where matmuls in bf16 are, and about 1% of other
    codes."""
    threads: int = 1
    """Threads of a worker's encoder."""
    readers: int = 2
    """Threads that decode pictures while the encoder works."""
    lease_seconds: float = 60.0
    """A shard whose worker has not been heard of for so long is taken over by another."""
    max_rejects: float = 0.01
    """Share of pairs that may be left out (and counted), such as pictures below the dVAE's size."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.block, self.batch, self.threads, self.readers, self.variants) < 1:
            problems.append("block, batch, threads, readers and variants must be at least 1")
        if not self.lease_seconds > 0:
            problems.append("lease_seconds must be positive")
        if not 0 <= self.max_rejects < 1:
            problems.append(f"max_rejects={self.max_rejects} is a share; it must lie in [0, 1)")
        return problems
