"""Were the pairs enough? Losses of held-out pictures by caption, and copies among drawn pictures.

    OUT/verdict.json     the answer, findings in plain words, figures
    OUT/nearest.png      drawn pictures above their nearest training pictures, the nearest first

A prior that understood captions gives held-out pictures a lower loss with their own caption than
with another's: the difference is a mean over pairs with its 95% interval. A prior that learned its
pairs by heart draws them: a drawn picture counts as a copy if it is nearer to a training picture
than 95% of the held-out pictures are. Of a model without copies that is 5% of what it draws. All
pictures go through the same image tokenizer, so that blur brings none nearer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from core.files.atomic import Json, canonical_json, write_atomic
from core.storage.store import Store
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenRecord, TokenSource
from data_pipeline.images.crops import encode_png
from data_pipeline.streaming.stream import first_records
from data_pipeline.tokenize.encode import to_bytes
from generation.config import DrawSettings, ModelPaths
from generation.evaluation.accuracy import wilson_low
from generation.evaluation.findings import findings_of
from generation.text_to_image import Studio, open_studio, picture_grid
from parallel.mesh import own_mesh
from training.export.weights import load_prior
from training.tasks.prior import token_batch

COPY = 0.05
"""Share of held-out pictures that are as near to a training picture as a copy."""
_PAIRS, _TRAINED = 512, 20_000
"""Pairs whose losses are measured, and training pictures that are compared, at most."""
_SHUFFLES = 4
_TOGETHER, _DECODED = 16, 256
"""Pairs in a forward pass of the prior, and of the image tokenizer."""
_SIDE = 16
"""Pixels of the pictures that are compared."""
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Image losses of some pairs, in nats per image token."""

    own: NDArray[np.float64]
    """With their own captions, (n,)."""
    shuffled: NDArray[np.float64]
    """With captions of other pairs, the mean of several, (n,); NaN if all others are equal."""


def judge(
    models: ModelPaths, raw: Store, tokens: Store, out: Path, settings: DrawSettings, captions: int
) -> Json:
    """Measure a run and write its verdict; returns the content of verdict.json.

    `captions`: held-out, and as many training captions, for which `settings.candidates` are drawn.
    """
    studio = open_studio(models, mesh=own_mesh(), rerank=False)
    records = {
        split: first_records(TokenSource(tokens, split), count)
        for split, count in (("train", _TRAINED), ("validation", _PAIRS))
    }
    losses = {split: caption_losses(models.prior, rows[:_PAIRS]) for split, rows in records.items()}
    texts = {
        split: [row.caption for row in first_records(RawSource(raw, split), captions)]
        for split in records
    }
    copies = _copies(studio, records, texts, settings, out)
    figures = {**_caption_figures(losses), **copies, "pairs": len(records["train"])}
    enough, findings = findings_of(figures)
    body: Json = {"enough": enough, "findings": findings, "figures": figures}
    write_atomic(out / "verdict.json", canonical_json(body))
    return body


@torch.no_grad()
def caption_losses(prior: Path, records: Sequence[TokenRecord]) -> Losses:
    """Image losses of pairs with their own and with other pairs' captions."""
    layers, config, _ = load_prior(prior)
    count = len(records)
    shifts = dict.fromkeys(1 + i * (count - 1) // _SHUFFLES for i in range(_SHUFFLES))

    def losses(rows: Sequence[TokenRecord]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, count, _TOGETHER):
            batch = token_batch(rows[start : start + _TOGETHER], config.text_length)
            state: Any = dict(batch)
            for layer in layers.values():
                state = layer(state)
            each = F.cross_entropy(state.image.transpose(1, 2), batch["image"], reduction="none")
            parts.append(each.double().mean(1).numpy())
        return np.concatenate(parts)

    columns = []
    for shift in shifts if count > 1 else ():
        texts = [records[(i + shift) % count].text for i in range(count)]
        same = [np.array_equal(text, row.text) for text, row in zip(texts, records, strict=True)]
        rows = [replace(row, text=t, others=()) for row, t in zip(records, texts, strict=True)]
        columns.append(np.where(same, np.nan, losses(rows)))
    shuffled = np.full((1, count), np.nan) if not columns else np.stack(columns)
    known = ~np.isnan(shuffled)
    means = np.where(known, shuffled, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    return Losses(own=losses(records), shuffled=means)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval, by the normal approximation; NaN if unknown."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def nearest(
    looks: NDArray[np.float64], others: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and place of, the nearest of `others` for each picture of `looks_of`.

    Units: root mean square of the differences of averaged pixels, whose range is 1.
    Shapes: (n, D), (m, D) -> (n,), (n,).
    """
    squares = (others * others).sum(1)[None] - 2 * looks @ others.T  # plus the same for a row
    places = squares.argmin(1)
    difference = looks - others[places]
    return np.sqrt((difference * difference).mean(1)), places


def looks_of(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Pixels averaged over a grid of at most _SIDE x _SIDE, (n, S, S, 3) -> (n, D) in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).double() / 255
    side = min(_SIDE, pictures.shape[1])
    return np.asarray(F.adaptive_avg_pool2d(pixels, side).flatten(1).numpy())


def _caption_figures(losses: dict[str, Losses]) -> dict[str, Any]:
    held_out, trained = losses["validation"], float(losses["train"].own.mean())
    figures: dict[str, Any] = {
        "held_out": len(held_out.own),
        "loss": float(held_out.own.mean()),
        "train_loss": trained,
        "caption_gain": None,
    }
    gaps = held_out.shuffled - held_out.own
    gap, half = mean_interval(gaps[~np.isnan(gaps)])
    if math.isnan(gap):
        return figures
    return {
        **figures,
        "shuffled_caption_loss": figures["loss"] + gap,
        "caption_gain": gap,
        "caption_gain_low95": gap - half,
        "caption_gain_high95": gap + half,
    }


def _copies(
    studio: Studio,
    records: dict[str, list[TokenRecord]],
    captions: dict[str, list[str]],
    settings: DrawSettings,
    out: Path,
) -> dict[str, Any]:
    """Shares of drawn pictures that are copies, by the split of their captions."""
    trained, held_out = (_looks(studio, records[split]) for split in ("train", "validation"))
    usual, _ = nearest(held_out, trained)
    limit = float(np.quantile(usual, COPY))
    figures: dict[str, Any] = {"copy_distance": limit, "held_out_distance": float(np.median(usual))}
    figures["held_out_twins"] = int((usual == 0).sum())
    shown: list[tuple[float, NDArray[np.uint8], int, str]] = []
    for split, texts in captions.items():
        rows = studio.draw(list(dict.fromkeys(texts)), settings)
        drawn = np.concatenate([row.pictures for row in rows])
        distances, places = nearest(looks_of(drawn), trained)
        copies, count = int((distances < limit).sum()), len(drawn)
        figures[f"drawn_{split}"] = count
        figures[f"copies_{split}"] = copies
        figures[f"copies_{split}_low95"] = wilson_low(copies / count, count)
        own = [row.caption for row in rows for _ in row.pictures]
        shown += zip(distances.tolist(), drawn, places.tolist(), own, strict=True)
    closest = sorted(shown, key=lambda row: row[0])[:_SHOWN]
    below = _pictures(studio, [records["train"][row[2]] for row in closest])
    grid = picture_grid([np.stack([row[1] for row in closest]), below], 2)
    write_atomic(out / "nearest.png", encode_png(grid))
    figures["nearest"] = [{"distance": row[0], "caption": row[3]} for row in closest]
    return figures


def _looks(studio: Studio, records: Sequence[TokenRecord]) -> NDArray[np.float64]:
    parts = range(0, len(records), _DECODED)
    return np.concatenate(
        [looks_of(_pictures(studio, records[start : start + _DECODED])) for start in parts]
    )


def _pictures(studio: Studio, records: Sequence[TokenRecord]) -> NDArray[np.uint8]:
    """Pictures as the image tokenizer shows them, (n, S, S, 3)."""
    codes = torch.from_numpy(np.stack([row.image for row in records]).astype(np.int64))
    return to_bytes(studio.decode(codes))
