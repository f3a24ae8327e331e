"""Presets: functions that return a stage's settings; flags override each field."""

from collections.abc import Callable
from typing import Any

from checkpoint.config import CheckpointConfig
from data_pipeline.config import OrderConfig
from models.config import ClipConfig, DVAEConfig, PriorConfig
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from training.config import (
    BPETrain,
    ClipTrain,
    DVAETrain,
    LoopConfig,
    PriorTrain,
)


def dvae_tiny() -> DVAETrain:
    """32x32 pixels to 8x8 tokens of 64 codes: minutes on 2 cores."""
    return DVAETrain(
        model=DVAEConfig(width=16, bottleneck=1, codebook=64),
        loop=LoopConfig(steps=1800, global_batch_size=32, validate_every=300),
        checkpoint=CheckpointConfig(every=300),
        optim=OptimConfig(lr=3e-3, final_lr=5e-5, weight_decay=1e-4, beta2=0.999, warmup=60),
        mesh=MeshConfig(data=2),
        augment=False,
        beta_first=1.2,
        beta=0.05,
        beta_fraction=0.2,
        tau_last=0.25,
        tau_fraction=0.65,
    )


def bpe_tiny() -> BPETrain:
    """512 entries: enough for generated captions and emoji names."""
    return BPETrain(vocabulary=512, spaces="joined")


def bpe_paper() -> BPETrain:
    """The paper's 16,384 entries."""
    return BPETrain(vocabulary=16_384, max_captions=10_000_000)


def prior_tiny() -> PriorTrain:
    """About 2 million parameters over 8x8 image tokens: minutes on 2 cores."""
    return PriorTrain(
        model=PriorConfig(dim=192, heads=6, layers=4, text_length=24),
        loop=LoopConfig(steps=1000, global_batch_size=32, validate_every=250),
        checkpoint=CheckpointConfig(every=250),
        optim=OptimConfig(lr=2e-3, final_lr=5e-5, warmup=50),
        mesh=MeshConfig(data=2),
        engine=EngineConfig(name="deepspeed_zero", precision="auto"),
    )


def clip_tiny() -> ClipTrain:
    """Two 3-layer towers of width 128; patches of 8 take half the time of 4 and rank better."""
    return ClipTrain(
        model=ClipConfig(patch=8),
        loop=LoopConfig(steps=480, global_batch_size=128, validate_every=160),
        checkpoint=CheckpointConfig(every=160),
        optim=OptimConfig(lr=1e-3, final_lr=1e-5, warmup=50, beta2=0.98, clip_norm=1.0),
        mesh=MeshConfig(data=2),
    )


def dvae_small() -> DVAETrain:
    """64x64 pixels to 16x16 tokens of 1024 codes: hours on a workstation."""
    tiny = dvae_tiny()
    return DVAETrain(
        model=DVAEConfig(pixels=64, width=64, blocks=2, codebook=1024, code_width=64),
        loop=LoopConfig(steps=50_000, global_batch_size=128, validate_every=1000),
        checkpoint=CheckpointConfig(every=1000),
        optim=tiny.optim,
        order=OrderConfig(lanes=64),
    )


def dvae_paper() -> DVAETrain:
    """The paper's dVAE of 97.6M parameters on 64 GPUs: 256x256 pixels to 32x32 tokens of 8192."""
    steps = 3_000_000
    return DVAETrain(
        model=DVAEConfig(
            pixels=256,
            width=256,
            groups=4,
            blocks=2,
            bottleneck=4,
            gain=0.0,
            codebook=8192,
            code_width=128,
            min_log_scale=-20.0,
            init="paper",
        ),
        loop=LoopConfig(steps=steps, global_batch_size=512, validate_every=5000),
        checkpoint=CheckpointConfig(every=2000),
        optim=OptimConfig(
            lr=1e-4,
            final_lr=1.25e-6,
            decay_fraction=1_200_000 / steps,
            warmup=0,
            beta2=0.999,
            weight_decay=1e-4,
            clip_norm=1e9,
            ema=0.999,
            ema_every=1,
        ),
        mesh=MeshConfig(data=64),
        engine=EngineConfig(name="deepspeed_zero", precision="bf16"),
        order=OrderConfig(lanes=512),
        tau_fraction=150_000 / steps,
        beta_fraction=5_000 / steps,
    )


def prior_small() -> PriorTrain:
    """About 40 million parameters over 16x16 image tokens."""
    return PriorTrain(
        model=PriorConfig(dim=512, heads=8, layers=12, text_length=64),
        loop=LoopConfig(steps=100_000, global_batch_size=256, validate_every=1000),
        checkpoint=CheckpointConfig(every=1000),
        optim=OptimConfig(lr=4.5e-4, warmup=5000),
        order=OrderConfig(lanes=64),
    )


def _paper_prior(dim: int, rank: int, mesh: MeshConfig) -> PriorTrain:
    """64 layers, head width 64, 256 text and 32x32 image tokens, 430,000 updates.

    There is one lane per sample of the batch, and a validation reads as many: 1.05M image tokens.
    """
    lanes = 1024
    return PriorTrain(
        model=PriorConfig(dim=dim, heads=dim // 64, layers=64, text_length=256),
        loop=LoopConfig(
            steps=430_000, global_batch_size=lanes, validate_every=5000, validation_samples=lanes
        ),
        checkpoint=CheckpointConfig(every=500),
        optim=OptimConfig(lr=4.5e-4, warmup=5000, halvings=5, max_variance=5.0, ema=0.99),
        mesh=mesh,
        engine=EngineConfig(
            name="deepspeed_pipe",
            gradient_accumulation_steps=lanes // mesh.data,
            recompute=True,
            precision="bf16",
        ),
        compress=CompressConfig(rank=rank),
        order=OrderConfig(lanes=lanes),
        bpe_dropout=0.1,
    )


def prior_paper_2_8b() -> PriorTrain:
    """The paper's 2.8B prior on 128 GPUs: TP 2 x PP 2 x DP 32."""
    return _paper_prior(1920, 512, MeshConfig(tensor=2, pipeline=2, data=32))


def prior_paper_5_6b() -> PriorTrain:
    """The paper's 5.6B prior on 256 GPUs: TP 2 x PP 4 x DP 32."""
    return _paper_prior(2688, 640, MeshConfig(tensor=2, pipeline=4, data=32))


def prior_paper_12b() -> PriorTrain:
    """The paper's 12B prior on 1024 GPUs: TP 2 x PP 8 x DP 64."""
    return _paper_prior(3968, 896, MeshConfig(tensor=2, pipeline=8, data=64))


PRESETS: dict[str, dict[str, Callable[[], Any]]] = {
    "dvae": {"tiny": dvae_tiny, "small": dvae_small, "paper_dvae": dvae_paper},
    "bpe": {"tiny": bpe_tiny, "paper_bpe": bpe_paper},
    "prior": {
        "tiny": prior_tiny,
        "small": prior_small,
        "paper_2_8b": prior_paper_2_8b,
        "paper_5_6b": prior_paper_5_6b,
        "paper_12b": prior_paper_12b,
    },
    "clip": {"tiny": clip_tiny},
}
