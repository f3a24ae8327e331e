"""How long a checkpoint blocks training: written in the background against in the foreground.

A prior of 90 million parameters (1.1 GB of weights and moments) after one real step; the two modes
take turns, and their files are compared byte for byte.
"""

import shutil
import statistics
import time
from typing import Any

import torch

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from checkpoint.reader import open_checkpoint
from checkpoint.saver import Saver
from core.storage.store import FolderStore
from models.config import PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh

ROUNDS, LEAST = sized(5, 1), sized(2**30, 2**20)
FOLDER = cache("saving")


def run() -> list[dict[str, Any]]:
    """One row; ratio = seconds held up in front over those in the background."""
    engine = trained_engine()
    size = sum(part.data.numel() * part.data.element_size() for part in engine.state_slices())
    assert size >= LEAST, f"the state has only {size} bytes"
    seconds: dict[bool, list[float]] = {True: [], False: []}
    shutil.rmtree(FOLDER, ignore_errors=True)
    store = FolderStore(FOLDER)
    savers = {mode: Saver(store, 0, lambda text: [text], mode) for mode in (True, False)}
    for i in range(ROUNDS + 1):
        for mode, saver in savers.items():
            held_up = saver.save(f"step-{int(mode)}", engine.state_slices(), {}, lambda: None)
            saver.wait()
            if i:  # the first round allocates the buffers
                seconds[mode].append(held_up)
    digests = [open_checkpoint(f"{FOLDER}/step-{n}").files[0]["sha256"] for n in (0, 1)]
    assert digests[0] == digests[1], "the two modes wrote different bytes"
    shutil.rmtree(FOLDER)
    front, background = (statistics.median(seconds[mode]) for mode in (False, True))
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    return [
        bench_row(
            f"save of {size / 1e9:.2f} GB, held up in the background",
            background,
            "s",
            f"in front {front:.3f} s ({size / front / 1e9:.2f} GB/s)",
            ratios,
            ratio=front / background,
        )
    ]


def trained_engine() -> ReferenceEngine:
    """The reference engine after one step."""
    config = PriorConfig(
        dim=sized(768, 96),
        heads=12,
        layers=sized(13, 1),
        text_length=8,
        text_vocabulary=512,
        image_vocabulary=512,
        grid=8,
    )
    program = prior_program(config, 0)
    settings = EngineSettings(
        optim=OptimConfig(), engine=EngineConfig(), compress=CompressConfig(), seed=0
    )
    engine = ReferenceEngine(program, settings, Mesh())
    began = time.perf_counter()
    text = torch.zeros(1, config.text_length, dtype=torch.int64)
    image = torch.zeros(1, config.image_length, dtype=torch.int64)
    engine.step([{"text": text, "image": image}], 1e-4)
    print(f"one step: {time.perf_counter() - began:.1f} s")
    return engine
