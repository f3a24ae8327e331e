"""Pictures a second of a running batch with many rows against one row, on one thread.

Dim 512, 8 layers, 8 heads, 64 text + 16x16 image tokens, 8192 codes, fp32. Both sides draw requests
of one picture, each of a caption of its own, in turns. Candidates join as soon as a row is free,
first one a step, so that the rows are at different positions. One row has the weights laid out for
one row, as `tapir sample` with one candidate. The codes of both sides are compared: bit by bit.
Seconds are those of the core, so that other work on the machine adds little to them.
"""

import statistics
import time
from typing import Any

import torch

from bench.support.rows import bench_row
from bench.support.sizes import sized
from generation.config import DrawSettings
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.running import Candidate, RunningBatch
from models.config import PriorConfig
from models.prior import build_prior

CONFIG = PriorConfig(
    dim=sized(512, 64),
    heads=8,
    layers=sized(8, 2),
    text_length=64,
    text_vocabulary=16_384,
    image_vocabulary=8192,
    grid=sized(16, 4),
)
ROWS = sized((1, 16), (1, 2))
FEW, MANY = sized(2, 2), sized(32, 3)
"""Pictures a round with one row, and with more."""
ROUNDS = sized(3, 1)


def run() -> list[dict[str, Any]]:
    """Rows of pictures a second; ratio = over one row, of the same round."""
    torch.set_num_threads(1)
    part = LocalPrior(layers=dict(build_prior(CONFIG).items()), config=CONFIG)
    one, many = (Decoder(part, one_row=alone) for alone in (True, False))
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    drawn: dict[int, dict[int, Any]] = {}
    for _ in range(ROUNDS):
        for rows in ROWS:
            began = time.process_time()
            count = FEW if rows == 1 else MANY
            drawn[rows] = _pictures(RunningBatch(one if rows == 1 else many, rows), count)
            seconds[rows].append((time.process_time() - began) / count)
    same = all(drawn[rows][i].equal(drawn[1][i]) for rows in ROWS for i in range(FEW))
    alone = seconds[1]
    result = [
        bench_row(
            f"{rows} rows",
            1 / statistics.median(seconds[rows]),
            "pictures/s",
            f"1 row ({1 / statistics.median(alone):.3g} pictures/s)",
            [a / b for a, b in zip(alone, seconds[rows], strict=True)],
        )
        for rows in ROWS[1:]
    ]
    return [*result, bench_row("equal pictures", float(same), "of 1", "one row", [float(same)])]


def _pictures(batch: RunningBatch, count: int) -> dict[int, Any]:
    """Codes of the first requests, by number; one joins a step while a row is free."""
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, 16_384, (count, CONFIG.text_length), generator=draws)
    settings, waiting = DrawSettings(), list(range(count))
    running, done = dict[int, int](), dict[int, Any]()
    while waiting or running:
        if waiting and batch.fits(settings):
            number = waiting.pop(0)
            candidate = Candidate(text=text[number], key=("bench", number), settings=settings)
            running[batch.join(candidate)] = number
        for each in batch.step():
            if each.finished:
                done[running.pop(each.row)] = each.codes
    return done
