"""Sampling against no cache, and against the memory bandwidth, on one thread.

Dim 1024, 4 layers, 16 heads, 64 text + 16x16 image tokens, 8192 codes. Both sides have the same
precision and draw with the same noise. No cache: for each token the layers of models/prior.py with
dense masks, over the text and the codes so far (the growing prefix; running the whole stream every
time, as a forward pass in training does, costs more and has a row of its own). The bound is
the bytes of the weights that a token reads, at the rate at which this machine reads memory.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.support.rows import bench_row
from bench.support.sizes import sized
from generation.config import DrawSettings
from generation.sampling.decoder import DTYPES, Decoder, LocalPrior
from generation.sampling.sampler import Keys, Sampler
from models.attention.masks import full_mask, layer_kind
from models.config import PriorConfig
from models.prior import PriorBlock, PriorEmbedding, PriorHead, build_prior

CONFIG = PriorConfig(
    dim=sized(1024, 64),
    heads=16,
    layers=4,
    text_length=64,
    text_vocabulary=16_384,
    image_vocabulary=8192,
    grid=sized(16, 4),
)
BATCHES = sized((1, 8, 64), (1, 2))
PRECISIONS = ("fp32", "bf16", "int8")
ROUNDS = sized(3, 1)
PLAIN_AT = sized((0, 63, 127, 191, 255), (0, 15))
"""Positions at which the plain definition is timed: its cost grows evenly between them."""
SIDE = sized(2048, 128)
READ = sized(64 * 2**20, 2**20)


def run() -> list[dict[str, Any]]:
    """Rows of tokens/s; ratio = over no cache at batch 1, else the share of the bound, or MFU."""
    torch.set_num_threads(1)
    layers = build_prior(CONFIG)
    rows = []
    for precision in PRECISIONS:
        part = LocalPrior(layers=dict(layers.items()), config=CONFIG)
        one, many = (Decoder(part, precision, one_row) for one_row in (True, False))
        rows += _rows(layers, {batch: one if batch == 1 else many for batch in BATCHES}, precision)
    return rows


def _rows(
    layers: nn.ModuleDict, decoders: dict[int, Decoder], precision: str
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        seconds.setdefault("read", []).append(_read_seconds())
        seconds.setdefault("plain", []).append(_plain(layers, precision, growing=True))
        seconds.setdefault("whole", []).append(_plain(layers, precision, growing=False))
        for batch in BATCHES:
            seconds.setdefault(str(batch), []).append(_sample(decoders[batch], batch))
        seconds.setdefault("matmul", []).append(_matmul_seconds(precision))
    tokens = CONFIG.image_length
    bound = [decoders[1].bytes / READ / 4 * read * tokens for read in seconds["read"]]
    one = seconds["1"]
    at = f"{precision}, batch 1"
    rows = [
        _row(f"{at}: cache over growing prefix", 1, one, seconds["plain"], "no cache, target 20x"),
        _row(f"{at}: cache over whole stream", 1, one, seconds["whole"], "the whole stream"),
        _row(f"{at}: share of the read rate", 1, one, bound, "reading the weights, target 0.4"),
    ]
    for batch in BATCHES[1:]:
        flops = [_flops(batch) * s for s in seconds["matmul"]]
        rows.append(
            _row(
                f"{precision}, batch {batch}: MFU",
                batch,
                seconds[str(batch)],
                flops,
                f"matmul of {SIDE}",
            )
        )
    return rows


def _row(
    name: str, batch: int, mine: list[float], theirs: list[float], baseline: str
) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    made = batch * CONFIG.image_length
    other = made / statistics.median(theirs)
    return bench_row(
        name,
        made / statistics.median(mine),
        "tokens/s",
        f"{baseline} ({other:.3g} tokens/s)",
        ratios,
    )


def _sample(decoder: Decoder, batch: int) -> float:
    """Seconds for all tokens of a batch of candidates of one caption, text and noise included."""
    sampler = Sampler(decoder, batch=batch)
    text = _text(1)
    keys: Keys = [[("bench", i) for i in range(batch)]]
    return _seconds(lambda: list(sampler.draw(text, keys, DrawSettings())))


def _text(rows: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, CONFIG.text_vocabulary, (rows, CONFIG.text_length), generator=draws)


@torch.no_grad()
def _plain(layers: nn.ModuleDict, precision: str, growing: bool) -> float:
    """Seconds for all tokens of one candidate without a cache."""
    text, total = _text(1), CONFIG.image_length
    image = torch.zeros(1, total, dtype=torch.int64)
    kinds = [layer_kind(i + 1, CONFIG.layers) for i in range(CONFIG.layers)]
    masks = [full_mask(kind, CONFIG.text_length, CONFIG.grid, CONFIG.conv_kernel) for kind in kinds]

    def logits(position: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            if not growing:
                state: Any = {"text": text, "image": image}
                for layer in layers.values():
                    state = layer(state)
                codes: Tensor = state.image[:, position]
                return codes
            embedding, *blocks, head = layers.values()
            assert isinstance(embedding, PriorEmbedding) and isinstance(head, PriorHead)
            x = torch.cat(
                [embedding.embed_text(text), embedding.embed_image(image[:, : position + 1])], 1
            )
            for block, mask in zip(blocks, masks, strict=True):
                x = _dense(block, x, mask)
        last: Tensor = head.image(head.norm(x[:, -1].float()))
        return last

    logits(0)
    if not growing:
        return _seconds(lambda: logits(0)) * total
    points = [(p, _seconds(partial(logits, p))) for p in PLAIN_AT]
    rises = ((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return points[0][1] + sum(rises)


def _dense(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    assert isinstance(block, PriorBlock)
    q, k, v = block._heads(x)
    length = x.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:length, :length])
    x = x + block._join(attended)
    return x + block._mlp(x)


def _read_seconds() -> float:
    """Seconds to read READ numbers of 32 bits that are in no cache."""
    numbers = torch.ones(READ)
    return min(_seconds(numbers.sum) for _ in range(3))


def _flops(batch: int) -> float:
    """Multiply-adds twice of a batch's tokens: the weights' matmuls and the attention's."""
    weights = 12 * CONFIG.dim**2 * CONFIG.layers + CONFIG.dim * CONFIG.image_vocabulary
    kinds = [layer_kind(i + 1, CONFIG.layers) for i in range(CONFIG.layers)]
    text, tokens = CONFIG.text_length, CONFIG.image_length
    pairs = sum(int(full_mask(k, text, CONFIG.grid)[text:].sum()) for k in kinds)
    return batch * (2 * weights * tokens + 4 * CONFIG.dim * pairs)


def _matmul_seconds(precision: str) -> float:
    """Seconds of a floating-point operation in a large matmul."""
    side = SIDE
    x = torch.ones(side, side, dtype=DTYPES[precision])
    return min(_seconds(lambda: x @ x) for _ in range(3)) / (2 * side**3)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
