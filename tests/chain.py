"""All stages in this process on any device: seconds, no subprocess."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoint.config import CheckpointConfig
from core.heartbeat import Heart
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.config import LoaderConfig, OrderConfig, PackConfig, TokenizeConfig
from data_pipeline.packing.pack import pack
from data_pipeline.text.bpe import load_tokenizer
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.worker import Worker
from models.config import ClipConfig, DVAEConfig, PriorConfig
from parallel.config import EngineConfig
from parallel.ledger import recorded
from parallel.mesh import Mesh
from parallel.precision import set_numerics
from parallel.world import World
from training.auto_precision import settle_precision
from training.config import (
    BPETrain,
    ClipTrain,
    DVAETrain,
    LoopConfig,
    PriorTrain,
    StageConfig,
)
from training.export.tokenizers import open_tokenizer
from training.run.folder import read_metrics
from training.stages import make_task
from training.tokenizer import train_tokenizer
from training.trainer import Run

LOOP = LoopConfig(steps=4, global_batch_size=8, log_every=1, validate_every=0, validation_samples=8)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The stages in a folder."""

    folder: Path
    device: torch.device

    def pack(self) -> None:
        """Shapes as raw pairs, and their tokenizer."""
        config = PackConfig(count=160, validation=0.2, shard_pairs=40, block=4, threads=1)
        pack("shapes", FolderStore(self.folder / "raw"), config)
        train_tokenizer(BPETrain(data=f"{self.folder}/raw", out=self.folder / "bpe"))

    def settings(self, stage: str, **changes: Any) -> StageConfig:
        """A few steps of a small model, saved after every second one."""
        raw, bpe = str(self.folder / "raw"), self.folder / "bpe"
        shared: dict[str, Any] = {
            "out": self.folder / stage,
            "loop": LOOP,
            "checkpoint": CheckpointConfig(every=2, keep=9, async_save=False),
            "order": OrderConfig(lanes=2, shuffle_buffer=2),
            "loader": LoaderConfig(readers=1, prefetch=2),
            "engine": EngineConfig(),
        }
        if stage == "dvae":
            model = DVAEConfig(width=8, bottleneck=1, codebook=32)
            made: StageConfig = DVAETrain(data=raw, model=model, **shared)
        elif stage == "clip":
            small = ClipConfig(dim=32, heads=2, layers=2, text_length=16)
            made = ClipTrain(data=raw, bpe=bpe, model=small, **shared)
        else:
            sizes = PriorConfig(dim=64, heads=2, layers=4, text_length=16)
            made = PriorTrain(data=str(self.folder / "tokens"), model=sizes, **shared)
        return replace(made, **changes)

    def train(self, stage: str, **changes: Any) -> list[dict[str, Any]]:
        """Train, or resume; returns the rows of metrics.jsonl."""
        mesh = Mesh(world=World(device=self.device))
        settings = settle_precision(self.settings(stage, **changes), mesh.world)
        with recorded(mesh) as ledger:
            run = Run(stage, make_task(stage, settings, mesh), settings, mesh, ledger, Heart(0))
            try:
                run.train()
            finally:
                run.close()
        return [row for row in read_metrics(settings.out) if "split" not in row]

    def forget(self, stage: str, step: int) -> None:
        """Remove everything that a stage wrote after a step."""
        out = self.folder / stage
        for path in (out / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        for name in ("model.json", "model.safetensors"):
            (out / name).unlink()

    def tokenize(self, precision: Literal["fp32", "bf16"] = "fp32", place: str = "tokens") -> int:
        """Run the token job on the device; returns how many shards it made."""
        config = TokenizeConfig(block=4, precision=precision)
        tokenizer, tokenizer_digest = load_tokenizer(self.folder / "bpe")
        encoders = Encoders(
            numerics=set_numerics(self.device),
            images=open_tokenizer(self.folder / "dvae", self.device, config.precision),
            tokenizer=tokenizer,
            tokenizer_hash=tokenizer_digest,
        )
        raw, tokens = FolderStore(self.folder / "raw"), FolderStore(self.folder / place)
        return Worker(raw, tokens, encoders, config, JobWorker(number=0, count=1)).run()
