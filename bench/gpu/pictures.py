"""Codes of the paper's dVAE: agreement with the CPU, and pictures a second."""

import io
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from bench.gpu.report import GpuReport, Target, at_least, rates, seconds, wall_seconds
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.raw import RawRecord, RawRecords
from data_pipeline.tokenize.encode import Encoders, encode_pairs, to_bytes
from models.code_encoder import CodeReader
from models.config import DVAEConfig
from models.dvae import DVAE
from models.tokenizers.protocol import DVAETokenizer
from parallel.device import CPU
from parallel.precision import set_numerics
from training.presets import dvae_paper

CLOSE = {"fp32": 0.9999, "bf16": 0.98}
"""Share of codes that must equal the CPU's in fp32."""
FLOPS = 0.29e12
"""Of a 256x256 picture."""


def pictures(report: GpuReport) -> None:
    """Agreement on some pictures, then speed with pictures on the device and from JPEGs."""
    device, tiny = report.device, report.tiny
    model = DVAE(DVAEConfig(codebook=64) if tiny else dvae_paper().model).eval()
    some = smooth(64 if tiny else 4, model.config.pixels)
    with torch.no_grad():
        model.calibrate(some)
    set_numerics(CPU)
    exact = CodeReader(model).codes(some)
    model.to(device)
    set_numerics(device)
    many, batch = (8, 4) if tiny else (512, 64)
    for precision, least in CLOSE.items():
        reader = DVAETokenizer(model, "", precision)  # type: ignore[arg-type]
        equal = float((reader.codes(some.to(device)).cpu() == exact).float().mean())
        report.row(f"{precision}: codes equal to the CPU's", equal, "", Target(least=least))
        x = smooth(batch, model.config.pixels).to(device)
        rate, every = rates(batch, seconds(partial(reader.codes, x), device, 2, 5))
        target = at_least(1000) if precision == "bf16" else None
        beside = "" if tiny else f"{rate * FLOPS / 1e12:.0f} TFLOP/s"
        report.row(
            f"{precision}: on the device", rate, "pictures/s", target, baseline=beside, spread=every
        )
    rate, every = _from_files(reader, many, device)
    report.row(
        "bf16: from JPEGs, as tokenize does", rate, "pictures/s", at_least(1000), spread=every
    )


def smooth(count: int, pixels: int) -> Tensor:
    """Random pictures whose neighbouring pixels are alike, (count, 3, pixels, pixels)."""
    draws = torch.Generator().manual_seed(count)
    return F.avg_pool2d(torch.rand(count, 3, pixels, pixels, generator=draws), 5, 1, 2)


def _from_files(
    reader: DVAETokenizer, count: int, device: torch.device
) -> tuple[float, list[float]]:
    """Decoding, cropping, encoding and packing, with a thread a core."""
    side, records = reader.facts.pixels, []
    for i, picture in enumerate(to_bytes(smooth(16, side + side // 8))):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "jpeg", quality=95)
        records.append((f"{i}", file.getvalue()))
    pairs = RawRecords(
        [
            RawRecord(
                key=f"{i}-{records[i % 16][0]}",
                image=records[i % 16][1],
                extension="jpg",
                caption="a",
            )
            for i in range(count)
        ]
    )
    words = Tokenizer(WordLevel({"a": 0}, "a"))
    numerics = set_numerics(device)
    encoders = Encoders(numerics=numerics, images=reader, tokenizer=words, tokenizer_hash="")
    config = TokenizeConfig(precision="bf16", readers=max(1, (os.cpu_count() or 2) - 1))
    spent = wall_seconds(lambda: encode_pairs(pairs, encoders, config, {}), device, 3)
    return rates(count, spent[1:])
