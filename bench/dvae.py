"""Speed of the paper's encoder, and agreement of its bf16 codes with fp32.

Speed: 256x256 pictures on one thread, against the encoder run as it is written (eager, fp32);
each has a process of its own, and rounds take turns.
Agreement: on held-out pictures of a dVAE that is trained here (dead leaves of 32x32 pixels), whose
codebook must be in use for the figure to mean anything; the trained dVAE is kept in .cache.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.support.leaves import dead_leaves, write_leaves
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import run_tapir
from bench.support.workers import TurnWorker
from core.memory import keep_freed_memory
from data_pipeline.tokenize.encode import to_tensor
from models.code_encoder import CodeReader, Precision
from models.dvae import DVAE
from models.logit_laplace import squeeze_pixels
from training.export.weights import load_dvae
from training.presets import dvae_paper
from training.tasks.task import perplexity

FOLDER = cache("dvae")
PICTURES, SIDE, TRAINED = sized(4, 1), sized(256, 32), sized(8000, 300)
ROUNDS = sized(3, 1)
HELD_OUT = range(1_000_000, 1_000_000 + sized(512, 16))
TARGET_SPEEDUP, TARGET_AGREEMENT, TARGET_PERPLEXITY = 2.6, 0.99, 100.0
FLAGS = [
    "--model.codebook=512",
    f"--loop.steps={sized(1500, 2)}",
    f"--loop.global-batch-size={sized(32, 16)}",
    "--loop.validate-every=500",
    "--mesh.data=1",
]


def run() -> list[dict[str, Any]]:
    """Rows of pictures a second and of agreement."""
    torch.set_num_threads(1)
    return [*_speed(), *_agreement()]


def _speed() -> list[dict[str, Any]]:
    workers = {name: TurnWorker(make) for name, make in WORKERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WORKERS}
    try:
        for turn in range(-1, ROUNDS):
            for name, worker in workers.items():
                spent, _ = worker.turn()
                if turn >= 0:
                    seconds[name].append(spent)
    finally:
        for worker in workers.values():
            worker.end()
    rows = []
    for name in ("fp32", "bf16"):
        ratios = [a / b for a, b in zip(seconds["eager"], seconds[name], strict=True)]
        target = f", target {TARGET_SPEEDUP:g}x" if name == "bf16" else ""
        median = statistics.median(seconds["eager"])
        rows.append(
            bench_row(
                f"paper encoder, codes in {name}",
                PICTURES / statistics.median(seconds[name]),
                "pictures/s",
                f"eager fp32 {PICTURES / median:.2f}{target}",
                ratios,
            )
        )
    return rows


def _eager() -> Callable[[], object]:
    """The encoder as it is written."""
    torch.set_num_threads(1)
    model = DVAE(dvae_paper().model).eval()
    encoder = model.encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    image = _image()

    @torch.no_grad()
    def work() -> None:
        encoder(squeeze_pixels(image, 0.1)).argmax(1)

    return work


def _reader(precision: Precision) -> Callable[[], object]:
    """Encode as a worker of `tapir tokenize` does."""
    torch.set_num_threads(1)
    keep_freed_memory()
    reader, image = CodeReader(DVAE(dvae_paper().model), precision), _image()

    def work() -> None:
        reader.codes(image)

    return work


WORKERS: dict[str, Callable[[], Callable[[], object]]] = {
    "eager": _eager,
    "fp32": partial(_reader, "fp32"),
    "bf16": partial(_reader, "bf16"),
}


def _image() -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.rand(PICTURES, 3, SIDE, SIDE, generator=draws)


def _agreement() -> list[dict[str, Any]]:
    model, _ = load_dvae(_trained())
    pictures = to_tensor(torch.stack([torch.from_numpy(dead_leaves(i)) for i in HELD_OUT]).numpy())
    whole, half = (CodeReader(model, name).codes(pictures) for name in ("fp32", "bf16"))  # type: ignore[arg-type]
    agreed = float((whole == half).float().mean())
    used = perplexity(whole)
    return [
        _exactly("codes that bf16 and fp32 agree on", agreed, "", TARGET_AGREEMENT),
        _exactly("codebook perplexity of that dVAE", used, "codes", TARGET_PERPLEXITY),
    ]


def _exactly(name: str, value: float, unit: str, target: float) -> dict[str, Any]:
    ratio = value / target
    baseline = f"target {target:g}"
    return bench_row(name, value, unit, baseline, [ratio])


def _trained() -> Path:
    """The run folder of a dVAE of dead leaves; made once."""
    run, raw, pictures = (FOLDER / name for name in ("dvae", "raw", "pictures"))
    if not (pictures / "done.json").exists():
        write_leaves(pictures, TRAINED)
        (pictures / "done.json").write_text(json.dumps({"pictures": TRAINED}))
    run_tapir("pack", str(pictures), str(raw), "--validation=0.1", *sized([], ["--block=8"]))
    run_tapir("train", "dvae", "tiny", f"--data={raw}", f"--out={run}", *FLAGS)
    return run
