"""Settings of the data jobs; imports no torch."""

from dataclasses import dataclass
from pathlib import Path


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
    max_rejects: float = 0.0
    """Share of unusable pairs that may be left out (and counted) instead of stopping."""
    cache: Path = Path(".cache")
    """Where packages that a source downloads are kept."""

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.validation < 1:
            found.append(f"validation={self.validation} must lie between 0 and 1; try 0.05")
        if self.shard_pairs < 1 or self.shard_megabytes < 1:
            found.append("shard_pairs and shard_megabytes must be at least 1")
        if not 0 <= self.max_rejects < 1:
            found.append(f"max_rejects={self.max_rejects} is a share; it must lie in [0, 1)")
        if self.count < 0 or not 16 <= self.pixels <= 1024:
            found.append("count must not be negative, and pixels be 16 to 1024")
        return found


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """The order in which records are read: exact, keyed, the same for every number of ranks."""

    lanes: int = 8
    """Independent sub-streams; every data-parallel degree must divide it."""
    window: int = 8
    """Blocks of a lane that are shuffled together."""
    block: int = 64
    """Records a block, read by one request."""

    def problems(self, global_batch: int, ranks: int) -> list[str]:
        if min(self.lanes, self.window, self.block) < 1:
            return ["order.lanes, order.window and order.block must be at least 1"]
        lanes = self.lanes if self.lanes % ranks == 0 else ranks * max(1, self.lanes // ranks)
        batch = max(lanes, round(global_batch / lanes) * lanes)
        advice = f"try --order.lanes {lanes} --loop.batch {batch}"
        found = []
        if self.lanes % ranks:
            found.append(
                f"{ranks} data-parallel ranks do not divide order.lanes={self.lanes}; {advice}"
            )
        elif global_batch % self.lanes:
            found.append(
                f"order.lanes={self.lanes} does not divide loop.batch={global_batch}; {advice}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """The token job: dVAE codes and text ids of every raw pair."""

    block: int = 64
    """Records a block of the token shards."""
    batch: int = 64
    """Pictures encoded together."""
    threads: int = 1
    """Threads of a worker's encoder."""

    def problems(self) -> list[str]:
        if min(self.block, self.batch, self.threads) < 1:
            return ["block, batch and threads must be at least 1"]
        return []
