"""One training step of a small prior against the plain definition, on one thread.

Width 512, 8 heads, depth 4, 64 text + 16x16 image tokens, batch 2, vocabularies 16,384 + 8,192.
Plain is a first implementation: attention with a dense boolean mask, one head over both
vocabularies at every position, torch's default precision, AdamW in a loop over the parameters;
it starts with our weights, and its first loss must equal ours. Plain in bf16 has autocast, the
fused AdamW and the better matmul precision as well. MFU counts the real masks and the split head,
against the best bf16 matmul of the same run. Each has a process of its own; rounds take turns.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.support import resblock
from bench.support.rows import bench_row
from bench.support.sizes import sized
from bench.support.workers import TurnWorker
from core.memory import keep_freed_memory
from models.attention.masks import full_mask, layer_kind
from models.config import PriorConfig
from models.counts import prior_flops
from models.prior import PriorBlock, PriorEmbedding, PriorHead, prior_program
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.protocol import EngineSettings, Program
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh
from parallel.precision import set_numerics
from parallel.world import World

CONFIG = PriorConfig(
    dim=sized(512, 64),
    heads=8,
    layers=sized(4, 2),
    text_length=sized(64, 8),
    grid=sized(16, 4),
    text_vocabulary=16_384,
    image_vocabulary=8_192,
)
BATCH, WARM, ROUNDS, LR = 2, sized(2, 1), sized(7, 1), 4.5e-4
PEAK_SIZES = sized((1024, 2048), (128,))
TARGET_RATIO, TARGET_MFU = 4.0, 0.5


class PlainPrior(nn.Module):
    """The model in its plainest form, with our weights."""

    def __init__(self, config: PriorConfig, ours: nn.ModuleDict) -> None:
        super().__init__()
        dim, self.config = config.dim, config
        self.text = nn.Embedding(config.text_vocabulary, dim)
        self.image = nn.Embedding(config.image_vocabulary, dim)
        self.text_place = nn.Embedding(config.text_length, dim)
        self.row, self.column = nn.Embedding(config.grid, dim), nn.Embedding(config.grid, dim)
        self.start = nn.Embedding(2, dim)
        self.blocks = nn.ModuleList(
            _PlainBlock(config, layer + 1, ours[f"block{layer:03d}"])
            for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.text_vocabulary + config.image_vocabulary)
        is_text = torch.arange(config.length) < config.text_length
        is_word = torch.arange(self.head.out_features) < config.text_vocabulary
        self.foreign = is_text[:, None] != is_word[None]
        embedding, head = ours["embedding"], ours["head"]
        assert isinstance(embedding, PriorEmbedding) and isinstance(head, PriorHead)
        with torch.no_grad():
            self.text.weight.copy_(embedding.text.table.get_parameter("weight"))
            self.image.weight.copy_(embedding.image.table.get_parameter("weight"))
            self.text_place.weight.copy_(embedding.text_position.weight)
            for name in ("row", "column", "start"):
                getattr(self, name).weight.copy_(getattr(embedding, name).weight)
            self.head.weight.copy_(torch.cat([head.text.weight, head.image.weight]))
            self.head.bias.zero_()

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        config, count = self.config, len(text)
        starts = self.start.weight[:, None, None].expand(-1, count, 1, -1)
        words = torch.cat([starts[0], self.text(text)[:, :-1]], 1) + self.text_place.weight
        places = (self.row.weight[:, None] + self.column.weight[None]).flatten(0, 1)
        codes = torch.cat([starts[1], self.image(image)[:, :-1]], 1) + places
        x = torch.cat([words, codes], 1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float().masked_fill(self.foreign, -torch.inf)
        targets = torch.cat([text, image + config.text_vocabulary], 1)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        cut = config.text_length
        return losses[:, :cut].mean() / 8 + losses[:, cut:].mean() * 7 / 8


class _PlainBlock(nn.Module):
    def __init__(self, config: PriorConfig, layer: int, ours: nn.Module) -> None:
        super().__init__()
        assert isinstance(ours, PriorBlock)
        dim, self.heads = config.dim, config.heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        kind = layer_kind(layer, config.layers)
        self.mask = full_mask(kind, config.text_length, config.grid, config.conv_kernel)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
            self.out.weight.copy_(ours.out.weight.T)
            self.up.weight.copy_(ours.up.weight)
            self.down.weight.copy_(ours.down.weight.T)
            for linear in (self.qkv, self.out, self.up, self.down):
                linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return out


def run() -> list[dict[str, Any]]:
    """Rows of tokens a second; ratio = ours over plain's, or the MFU."""
    workers = {name: TurnWorker(make) for name, make in WORKERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WORKERS}
    losses: dict[str, float] = {}
    try:
        for turn in range(-WARM, ROUNDS):
            for name, worker in workers.items():
                spent, value = worker.turn()
                losses.setdefault(name, value)
                if turn >= 0:
                    seconds[name].append(spent if name != "peak" else value)
    finally:
        for worker in workers.values():
            worker.end()
    assert abs(losses["tapir fp32"] - losses["plain fp32"]) < 1e-5 * losses["plain fp32"], losses
    return _rows(seconds) + resblock.rows()


def _rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    tokens, flops = BATCH * CONFIG.length, BATCH * prior_flops(CONFIG)
    peaks = [1 / spent for spent in seconds.pop("peak")]
    rows = []
    for name, baseline in (
        ("tapir fp32", "plain fp32"),
        ("tapir bf16", "plain fp32"),
        ("tapir bf16", "plain bf16, fused AdamW"),
    ):
        mine, theirs = seconds[name], seconds[baseline]
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        gated = (name, baseline) == ("tapir bf16", "plain fp32")
        target = f", target {TARGET_RATIO:g}x" if gated else ""
        rows.append(
            bench_row(
                f"train step, {name}",
                tokens / statistics.median(mine),
                "tokens/s",
                f"{baseline}: {tokens / statistics.median(theirs):.0f}{target}",
                ratios,
            )
        )
    mine = seconds["tapir bf16"]
    shares = [flops / spent / peak for spent, peak in zip(mine, peaks, strict=True)]
    peak = statistics.median(peaks) / 1e9
    rows.append(
        bench_row(
            "MFU, tapir bf16",
            flops / statistics.median(mine) / 1e9,
            "GFLOP/s",
            f"bf16 matmul {peak:.0f} GFLOP/s, target {TARGET_MFU:g}",
            shares,
        )
    )
    return rows


def _batch() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, CONFIG.text_vocabulary, (BATCH, CONFIG.text_length), generator=draws)
    shape = (BATCH, CONFIG.image_length)
    image = torch.randint(0, CONFIG.image_vocabulary, shape, generator=draws)
    return {"text": text, "image": image}


def _program() -> Program:
    return prior_program(CONFIG, 0)


def _tapir(precision: Any) -> Callable[[], float]:
    """The step of `tapir train` on a rank."""
    torch.set_num_threads(1)
    keep_freed_memory()
    set_numerics(CPU, "auto")
    settings = EngineSettings(
        optim=OptimConfig(lr=LR),
        engine=EngineConfig(precision=precision),
        compress=CompressConfig(),
        seed=0,
    )
    engine, batch = ReferenceEngine(_program(), settings, Mesh(world=World())), _batch()
    return lambda: engine.step([batch], LR).losses["loss"]


def _plain(half: bool) -> Callable[[], float]:
    torch.set_num_threads(1)
    whole, batch = nn.ModuleDict({x.name: x.build() for x in _program().layers}), _batch()
    model = PlainPrior(CONFIG, whole)
    if half:
        set_numerics(CPU, "auto")
    kind: dict[str, Any] = {"fused": True} if half else {"foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.96), weight_decay=0.045, **kind)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(batch["text"], batch["image"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _peak() -> Callable[[], float]:
    """Seconds of one floating-point operation in the best of some bf16 matmuls."""
    torch.set_num_threads(1)
    pairs = [[torch.randn(n, n, dtype=torch.bfloat16) for _ in range(2)] for n in PEAK_SIZES]

    def best() -> float:
        per_operation = []
        for a, b in pairs:
            a @ b
            began = time.perf_counter()
            a @ b
            per_operation.append((time.perf_counter() - began) / (2 * len(a) ** 3))
        return min(per_operation)

    return best


WORKERS: dict[str, Callable[[], Callable[[], Any]]] = {
    "plain fp32": partial(_plain, False),
    "plain bf16, fused AdamW": partial(_plain, True),
    "tapir fp32": partial(_tapir, "fp32"),
    "tapir bf16": partial(_tapir, "bf16"),
    "peak": _peak,
}
