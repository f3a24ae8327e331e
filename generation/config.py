"""Settings of the demo, of sampling and of the overlap pass; imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config import PackConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on this machine."""

    data: Literal["shapes", "emoji"] = "shapes"
    """Generated pictures with a checker, or real emoji (through npm)."""
    out: Path | None = None
    """Folder of the demo; default runs/demo (runs/demo-emoji for emoji)."""
    mesh: Literal["tp2pp2dp2", "1"] = "tp2pp2dp2"
    """How the prior trains: 8 ranks with tensor, pipeline and data parallelism and compressed
    gradients; 1 = every stage on one process."""
    size: Literal["tiny", "mini"] = "tiny"
    """tiny: minutes, pictures worth looking at. mini: a test of the plumbing."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/demo" if self.data == "shapes" else f"runs/demo-{self.data}")


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Pairs that an evaluation set has, too."""

    threshold: float = 0.98
    """Cosine of CLIP embeddings from which a picture counts as one of the evaluation set's."""
    batch: int = 64
    """Pictures embedded together."""
    shard_pairs: int = 2000
    """Pairs a shard that is written, at most."""
    shard_megabytes: int = 256
    """Size of a shard, at most."""
    block: int = 64
    """Pairs that are read by one request in training."""

    @property
    def shards(self) -> PackConfig:
        """How the shards are cut."""
        sizes = {"shard_pairs": self.shard_pairs, "shard_megabytes": self.shard_megabytes}
        return PackConfig(**sizes, block=self.block)

    def problems(self) -> list[str]:
        found = self.shards.problems()
        if not 0 < self.threshold <= 1 or self.batch < 1:
            found.append("threshold must lie in (0, 1], and batch be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How candidates are drawn."""

    candidates: int = 16
    """Pictures drawn for a caption, before reranking."""
    temperature: float = 1.0
    """Divides the logits; 0 = the most likely code."""
    top_k: int = 0
    """Codes that may be drawn, at each position; 0 = all."""
    seed: int = 0
    """Seed of the draws; candidate c of a caption is the same whatever the batch."""
    batch: int = 128
    """Candidates decoded together."""
    keep_rows: int = 0
    """Rows of tokens kept from an image prompt."""

    def problems(self, grid: int) -> list[str]:
        found = []
        if self.candidates < 1 or self.batch < 1:
            found.append("candidates and batch must be at least 1")
        if not 0 <= self.temperature < math.inf or self.top_k < 0:
            found.append("temperature and top_k must be numbers that are not negative")
        if not 0 <= self.keep_rows < grid:
            found.append(f"keep_rows={self.keep_rows} must leave rows to draw; try 0 to {grid - 1}")
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SampleConfig):
    """How a model is judged."""

    prompts: int = 256
    """Held-out captions, at most."""

    def problems(self, grid: int = 1) -> list[str]:
        found = super().problems(grid)
        return found if self.prompts > 0 else [*found, "prompts must be at least 1"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SampleConfig):
    """How pictures are drawn for a score, and compared."""

    captions: int = 0
    """Captions that are drawn, chosen by --seed; 0 = 30000 of MS-COCO, all of other sets."""
    radii: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """Gaussian blurs of both sets: standard deviations in pixels of the drawn pictures."""
    block: int = 64
    """Captions, or real pictures, that are done together and kept."""

    def problems(self, grid: int = 1) -> list[str]:
        found = super().problems(grid)
        if self.captions < 0 or self.block < 1:
            found.append("captions must not be negative, and block be at least 1")
        if not self.radii or not all(0 <= radius < math.inf for radius in self.radii):
            found.append("radii must be one or more numbers that are not negative")
        elif len(set(self.radii)) < len(self.radii):
            found.append("radii must differ from one another")
        if self.keep_rows:
            found.append("keep_rows belongs to image prompts; leave it out")
        return found
