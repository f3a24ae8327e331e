"""Resblocks of the 12B prior, and steps of a 1.3B prior beside plan's figures and its peers."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

import models.prior
from bench.gpu.peers import PEERS
from bench.gpu.report import GpuReport, Target, at_least, rates, seconds
from bench.support.resblock import matmuls
from models.config import PriorConfig
from models.counts import prior_flops, prior_parameters
from models.prior import PriorBlock, prior_program
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh, RankCoordinates
from parallel.precision import set_numerics
from parallel.tensor.ops import TensorParallel
from parallel.world import World
from planning.estimate.hardware import hardware_of
from planning.estimate.memory import loads_of, rank_bytes
from planning.estimate.step_time import estimate
from planning.rehearsal.patches import replaced
from training.config import LoopConfig, PriorTrain

PEAK = 989e12
"""bf16 operations a second of an H100 or H200, by the data sheet."""
TINY = PriorConfig(
    dim=128, heads=2, layers=2, text_length=24, grid=8, text_vocabulary=64, image_vocabulary=48
)
LARGE = PriorConfig(
    dim=2048,
    heads=32,
    layers=24,
    text_length=256,
    grid=32,
    text_vocabulary=16_384,
    image_vocabulary=8192,
)
"""1.3B."""


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Draw initial weights on the device: keyed draws run on the host, a minute for 1.3B."""
    with replaced([(models.prior, "init_normal", _draw)]), device:
        yield


@torch.no_grad()
def _draw(module: nn.Module, *_: object) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def prior_of(report: GpuReport) -> tuple[PriorConfig, int]:
    """The prior of the training section, and its batch."""
    return (TINY, 2) if report.tiny else (LARGE, 8)


def resblocks(report: GpuReport) -> None:
    """A resblock pair of each mask in bf16 against its own matmuls alone."""
    dim = 128 if report.tiny else 3968
    config = PriorConfig(
        dim=dim,
        heads=dim // 64,
        layers=64,
        text_length=8 if report.tiny else 256,
        grid=8 if report.tiny else 32,
    )
    for batch in (1, 4):
        rows = batch * config.length
        flops = 3 * 2 * 12 * dim**2 * rows / 1e12
        alone = statistics.median(seconds(matmuls(dim, rows, report.device), report.device, 2, 5))
        name = f"batch {batch}"
        report.row(f"{name}: its matmuls alone", flops / alone, "TFLOP/s")
        for number, kind in ((1, "row"), (2, "column"), (64, "conv")):
            spent = seconds(_block(config, number, batch, report.device), report.device, 3, 5)
            share, every = rates(alone, spent)
            beside = f"{flops / statistics.median(spent):.0f} TFLOP/s"
            target = at_least(0.8) if batch > 1 else None
            report.row(
                f"{name}, {kind}: share of its matmuls",
                share,
                "",
                target,
                baseline=beside,
                spread=every,
            )


def _block(
    config: PriorConfig, number: int, batch: int, device: torch.device
) -> Callable[[], None]:
    with drawn_on(device):
        block = PriorBlock(config, number, TensorParallel())
        _draw(block)
        shape = (batch, config.length, config.dim)
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def work() -> None:
        block.zero_grad()
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            out = block(x)
        out.backward(grad)

    return work


def training(report: GpuReport) -> None:
    """Steps of the reference engine in bf16: rate, peak memory and time beside plan's; peers."""
    config, batch = prior_of(report)
    device = report.device
    settings = PriorTrain(
        model=config,
        mesh=MeshConfig(data=1),
        loop=LoopConfig(global_batch_size=batch),
        engine=EngineConfig(precision="bf16"),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = _engine_seconds(settings, device)
    name = f"{prior_parameters(config).total / 1e9:.1f}B, batch {batch}"
    tokens, every = rates(batch * config.length, spent)
    report.row(f"{name}: training", tokens, "tokens/s", spread=every)
    share, every = rates(batch * prior_flops(config) / PEAK, spent)
    target = at_least(0.4)
    report.row(
        f"{name}: MFU of 989 TFLOP/s",
        share,
        "",
        target,
        baseline="target 0.50; MegaScale 0.55",
        spread=every,
    )
    plan = estimate(settings, hardware_of("h100")).seconds
    step = statistics.median(spent)
    report.row(f"{name}: a step", step, "s", baseline=f"plan for an H100 {plan:.4g}")
    planned = sum(rank_bytes(loads_of(settings, RankCoordinates())).values())
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        beside = f"peak {peak / 1e9:.2f} GB, plan {planned / 1e9:.2f}"
        report.row(
            f"{name}: plan's memory off by",
            abs(planned / peak - 1),
            "",
            Target(most=0.05, speed=True),
            baseline=beside,
        )
    else:
        report.absent(f"{name}: plan's memory off by", f"no peak of a CPU; plan {planned} bytes")
    _peers(report, config, batch, tokens)


def _engine_seconds(settings: PriorTrain, device: torch.device) -> list[float]:
    config, batch = settings.model, settings.loop.global_batch_size
    with drawn_on(device):
        built = EngineSettings(
            optim=OptimConfig(), engine=settings.engine, compress=CompressConfig(), seed=0
        )
        program, mesh = prior_program(config, 0), Mesh(world=World(device=device))
        engine = ReferenceEngine(program, built, mesh)
        tokens = {
            "text": torch.randint(0, config.text_vocabulary, (batch, config.text_length)),
            "image": torch.randint(0, config.image_vocabulary, (batch, config.image_length)),
        }
    times = seconds(lambda: engine.step([tokens], 1e-4), device, 3, 5)
    engine.close()
    return times


def _peers(report: GpuReport, config: PriorConfig, batch: int, ours: float) -> None:
    """Peers run with their defaults, without the flags that make our steps deterministic."""
    set_numerics(report.device, deterministic=False)
    for name, build in PEERS.items():
        label = f"training over {name}"
        try:
            step = build(config, batch, report.device)
        except ImportError as error:
            report.absent(label, f"not installed ({error})")
            continue
        theirs, _ = rates(batch * config.length, seconds(step, report.device, 3, 5))
        beside = f"{theirs:.0f} tokens/s"
        report.row(label, ours / theirs, "x", at_least(1.0), baseline=beside)
        del step
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
