"""Image tokenizers side by side: PSNR, SSIM, rFID, codes used, pictures/s, and minutes of training.

By default the tiny dVAE with each quantizer is trained here on shapes and on emoji, or on `--data`
alone, with three seeds; runs are kept in .cache under the set's fingerprint, so that an interrupted
benchmark goes on. `--folders A,B` compares finished tokenizers of any kind instead (`tapir import`
brings others'), on `--data`, whose pictures are cropped to each one's size.
`--inception` gives the weights of the FID's network; without it, the proxy's features are those of
an untrained encoder.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.support.rows import Row, bench_row
from bench.support.sizes import cache, sized
from bench.support.ssim import ssim
from bench.support.tokens import run_tapir
from data_pipeline.formats.raw import RawSource
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.streaming.mixed_source import open_source
from data_pipeline.streaming.stream import first_records
from data_pipeline.tokenize.encode import to_bytes, to_tensor
from models.config import DVAEConfig
from models.critics.fid import frechet_distance_of_sets
from models.critics.inception import Inception
from models.dvae import DVAE
from models.tokenizers.protocol import ImageTokenizer
from training.export.tokenizers import open_tokenizer
from training.tasks.task import perplexity

FOLDER = cache("tokenizers")
SETS = {"shapes": sized(6000, 300), "emoji": sized(3600, 300)}
"""Pairs of each set."""
SEEDS = sized((0, 1, 2), (0,))
PICTURES, TOGETHER = sized(512, 24), 32
CODES = 64
SLOWER = "--optim.lr=1e-3"
"""The preset's rate is Gumbel's; with it, one of two runs of VQ ended by the guard."""
QUANTIZERS = {
    "gumbel": (),
    "vq": ("--model.quantizer=vq", SLOWER),
    "fsq": ("--model.quantizer=fsq", "--model.levels", "4", "4", "4", SLOWER),
}
FLAGS = [
    f"--model.codebook={CODES}",
    f"--loop.steps={sized(1200, 2)}",
    f"--loop.global-batch-size={sized(32, 16)}",
    f"--loop.validation-samples={sized(512, 16)}",
    "--mesh.data=1",
    "--engine.precision=fp32",
]
UNITS = {
    "PSNR": "dB",
    "SSIM": "",
    "rFID": "",
    "codes used": "codes",
    "perplexity": "codes",
    "pictures/s": "1/s",
    "minutes": "min",
}
LOWER = ("rFID", "minutes")
"""Figures that are better when they are lower."""

Figures = dict[str, float]
Extract = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def run(folders: str = "", data: str = "", inception: str = "") -> list[Row]:
    """A row a figure, tokenizer and set; its spread is over the seeds."""
    torch.set_num_threads(1)
    extract = _inception(Path(inception)) if inception else _untrained()
    label = "rFID" if inception else "proxy rFID"
    if folders:
        source = data or _packed("shapes")
        given = {folder: [measure(Path(folder), source, extract)] for folder in folders.split(",")}
        return list(_rows("", given, label))
    rows: list[Row] = []
    for name, raw in [(data, data)] if data else ((name, _packed(name)) for name in SETS):
        trained = {kind: [_trained(raw, kind, seed) for seed in SEEDS] for kind in QUANTIZERS}
        figures = {
            kind: [measure(run, raw, extract) | {"minutes": _minutes(run)} for run in runs]
            for kind, runs in trained.items()
        }
        rows += _rows(f"{name}, ", figures, label)
    return rows


def measure(folder: Path, raw: str, extract: Extract) -> Figures:
    """Figures of a tokenizer on the held-out pictures of a packed set."""
    tokenizer = open_tokenizer(folder)
    source = open_source(RawSource, raw, "validation")
    records = first_records(source, min(PICTURES, int(source.sizes.sum())))
    side = tokenizer.facts.pixels
    pictures = np.stack([square(decode_rgb(r.image, r.key), side) for r in records])
    codes, again, seconds = _round_trip(tokenizer, to_tensor(pictures))
    error = float(((again - to_tensor(pictures)) ** 2).mean())
    drawn = to_bytes(again)
    return {
        "PSNR": -10 * float(np.log10(max(error, 1e-10))),
        "SSIM": ssim(pictures, drawn),
        "rFID": frechet_distance_of_sets(extract(pictures), extract(drawn)),
        "codes used": float(len(codes.unique())),
        "perplexity": perplexity(codes),
        "pictures/s": len(records) / seconds,
    }


def _round_trip(tokenizer: ImageTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Codes, pictures in [0, 1], and seconds of encoding and decoding on one thread."""
    parts = pixels.split(TOGETHER)
    tokenizer.pictures(tokenizer.codes(parts[0]))  # first calls allocate
    began = time.process_time()
    codes = [tokenizer.codes(part) for part in parts]
    again = [tokenizer.pictures(part) for part in codes]
    return torch.cat(codes), torch.cat(again), time.process_time() - began


def _rows(prefix: str, measured: dict[str, list[Figures]], label: str) -> Iterator[Row]:
    """Each figure beside that of the first tokenizer."""
    first = next(iter(measured))
    for figure in measured[first][0]:
        base = [row[figure] for row in measured[first]]
        for name, seeds in measured.items():
            values = [row[figure] for row in seeds]
            pairs = [(a, b) for a, b in zip(values, base, strict=True)]
            ratios = [b / a if figure in LOWER else a / b for a, b in pairs]
            shown = label if figure == "rFID" else figure
            median = statistics.median(base)
            yield bench_row(
                f"{prefix}{name}: {shown}",
                statistics.median(values),
                UNITS[figure],
                f"{first} {median:.4g}; seeds {', '.join(f'{v:.4g}' for v in values)}",
                ratios,
            )


def _packed(name: str) -> str:
    raw = FOLDER / name
    small = sized([], ["--block=8"])
    count = [f"--count={SETS[name]}"]
    run_tapir("pack", name, str(raw), *count, "--validation=0.15", *small)
    return str(raw)


def run_folder(raw: str, kind: str, seed: int) -> Path:
    """Folder of a run, named by its set's fingerprint: a set of another place may be the same."""
    fingerprint = open_source(RawSource, raw, "train").fingerprint
    return FOLDER / f"{fingerprint[:12]}-{kind}-{seed}"


def _trained(raw: str, kind: str, seed: int) -> Path:
    out = run_folder(raw, kind, seed)
    flags = [*FLAGS, *QUANTIZERS[kind], f"--loop.seed={seed}", f"--data={raw}", f"--out={out}"]
    run_tapir("train", "dvae", "tiny", *flags)
    return out


def _minutes(run: Path) -> float:
    """Minutes of all steps of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "split" not in row and "seconds" in row]
    each = statistics.median(row["seconds"] for row in steps)
    return float(each * max(row["step"] for row in steps) / 60)


def _inception(path: Path) -> Extract:
    network = Inception(path)
    return lambda pictures: network(pictures)[0]


def _untrained() -> Extract:
    """Means and deviations over the positions of an untrained encoder's last states."""
    encoder = DVAE(DVAEConfig(width=32, init="paper"), seed=0).encoder[:-1].eval()

    @torch.no_grad()
    def extract(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        states = torch.cat([encoder(part) for part in to_tensor(pictures).split(TOGETHER)])
        flat = states.flatten(2)
        return np.asarray(torch.cat([flat.mean(2), flat.std(2)], 1).numpy())

    return extract
