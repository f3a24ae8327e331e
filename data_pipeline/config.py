"""Settings of the data jobs; imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DRAWN = {"shapes": 1, "panels": 2}
"""Sources that draw as many pairs as asked, and the side of their pictures as a multiple of
`pixels`."""
DRAWN_COUNT = 10_000
"""Pairs that they draw if no count is given."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Filters for readable pairs; each rejected pair is recorded with its reason."""

    min_words: int = 0
    """Minimum words of a caption."""
    english: bool = False
    """Leave out captions that are not English, judged by letters and common words."""
    boilerplate: bool = False
    """Leave out captions such as `photographed on 3 May`, stock photo notes and file names."""
    aspect: float = 0.0
    """Maximum ratio of the longer to the shorter side (the paper: 2); 0 = any."""
    min_side: int = 0
    """Minimum pixels of the shorter side (the paper: 256)."""
    duplicates: bool = False
    """Leave out exact duplicates: the same image with the same caption."""
    near: int = -1
    """Leave out near duplicates: pictures whose perceptual hash (128 bits) differs from that of an
    earlier, kept one in at most this many bits (0 to 3); -1 = keep them."""

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
    """Number of pairs to take; 0 = all (shapes and panels: 10000)."""
    pixels: int = 32
    """Side of the pictures that `shapes` draws, and half of those that `panels` draws: the height
    of a panel. Other sources keep their own size."""
    seed: int = 0
    """Seed of the generator and of the split."""
    validation: float = 0.05
    """Fraction of the pairs in the validation split, chosen by key."""
    shard_pairs: int = 2000
    """Maximum pairs per shard."""
    shard_megabytes: int = 256
    """Maximum size of a shard."""
    block: int = 64
    """Pairs per block, the unit that training reads in one request."""
    max_rejects: float = 0.0
    """Maximum fraction of unusable pairs of the whole set; they are left out and counted, and above
    it all workers stop. Pairs that a filter rejects do not count."""
    in_place: bool = False
    """Copy no plain tar: read it once, write an index and a catalogue, and let training read ranges
    of it. Compressed tars, tables and folders are copied."""
    threads: int = 2
    """Threads that decode and check pictures; the shards are the same for any number."""
    lease_seconds: float = 60.0
    """A unit whose worker does not renew its lease for this long is taken over by another one."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Filters."""
    cache: Path = Path(".cache")
    """Folder for packages that a source downloads."""

    def problems(self) -> list[str]:
        problems = self.filters.problems()
        if not 0 < self.validation < 1:
            problems.append(f"validation={self.validation} must be between 0 and 1; try 0.05")
        if min(self.shard_pairs, self.shard_megabytes, self.block, self.threads) < 1:
            problems.append("shard_pairs, shard_megabytes, block and threads must be at least 1")
        if not 0 <= self.max_rejects < 1:
            problems.append(f"max_rejects={self.max_rejects} is a fraction; it must be in [0, 1)")
        if not self.lease_seconds > 0:
            problems.append("lease_seconds must be positive")
        if self.in_place and self.count:
            problems.append("count is for copies; with in_place choose fewer archives by a pattern")
        if self.count < 0 or not 16 <= self.pixels <= 1024:
            problems.append("count must not be negative, and pixels be 16 to 1024")
        return problems


@dataclass(frozen=True, kw_only=True)
class CatalogueConfig:
    """How a catalogue is read."""

    memory_gigabytes: float = 4.0
    """Memory of a query; what needs more is written to TMPDIR."""
    threads: int = 2
    """Threads of a query."""
    cache: Path = Path(".cache/catalogue")
    """Folder of the files of a catalogue that is in an object store; they are fetched once."""

    def problems(self) -> list[str]:
        if self.memory_gigabytes < 0.1 or self.threads < 1:
            return ["memory_gigabytes must be at least 0.1 and threads at least 1"]
        return []


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Order of the records: determined by the seed, and the same for every number of ranks."""

    lanes: int = 8
    """Independent sub-streams; every data-parallel degree must divide it."""
    shuffle_buffer: int = 8
    """Blocks in a lane's shuffle window; each rank holds the windows of its lanes in memory."""

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
    """How a rank fetches its records; affects speed and memory, never the order."""

    readers: int = 4
    """Threads that fetch blocks from the store."""
    prefetch: int = 16
    """Steps that are fetched ahead."""
    workers: int = 4
    """Threads that make the batches of the next steps: decode and crop pictures, encode captions.
    Each holds one batch in host memory, and one more waits for the step."""
    cache: Path | None = None
    """Local folder that keeps fetched blocks; several ranks may share it."""
    cache_gigabytes: float = 10.0
    """Size of the cache; the least recently used blocks are evicted."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.readers, self.prefetch, self.workers) < 1:
            problems.append("loader.readers, prefetch and workers must be at least 1")
        if not self.cache_gigabytes > 0:
            problems.append("loader.cache_gigabytes must be positive")
        return problems


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """The token job: dVAE codes and text ids of every raw pair."""

    block: int = 64
    """Records per block of the token shards, read in one request (the paper's scale: 128)."""
    variants: int = 1
    """Random crops per picture; epoch e of the prior reads variant e % variants."""
    batch: int = 64
    """Pictures encoded together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder. bf16 is over twice as fast on hardware with bf16 matmuls, and
    changes about 1% of the codes."""
    threads: int = 1
    """Torch threads of a worker."""
    readers: int = 2
    """Threads that decode pictures while the encoder works."""
    lease_seconds: float = 60.0
    """A lease that is not renewed for this long is taken over by another worker."""
    max_rejects: float = 0.01
    """Maximum fraction of unusable pairs, such as pictures below the dVAE's size."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.block, self.batch, self.threads, self.readers, self.variants) < 1:
            problems.append("block, batch, threads, readers and variants must be at least 1")
        if not self.lease_seconds > 0:
            problems.append("lease_seconds must be positive")
        if not 0 <= self.max_rejects < 1:
            problems.append(f"max_rejects={self.max_rejects} is a fraction; it must be in [0, 1)")
        return problems
