"""Cached decoding of priors with other options than the paper's equals the whole stream."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from data_pipeline.formats.tokens import codes_per_image
from data_pipeline.images.crops import encode_png
from generation.config import DrawSettings, PromptConfig
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.kv_cache import reads_of
from generation.sampling.prompts import kept_tokens, prompt_of
from generation.sampling.sampler import Sampler
from models.attention.masks import Kind, image_mask
from models.config import PriorConfig
from tests.unit.models.test_models import CONFIG, prior_logits, trained_like
from tests.unit.models.test_pins_modern import ALL, OPTIONS
from training.data_requirements import model_size_problems

CASES = [*OPTIONS.values(), ALL, {**ALL, "grid": 5, "columns": 2}]


def _batch(config: PriorConfig) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    text = torch.randint(0, 30, (3, 6), generator=draws)
    text[0, 3:] = -1
    return {
        "text": text,
        "image": torch.randint(0, 20, (3, config.image_length), generator=draws),
    }


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_logits_with_the_cache_equal_the_whole_stream(
    options: dict[str, Any], one_row: bool
) -> None:
    """By the plain step, by the step of CUDA graphs, and without the cache."""
    config = replace(CONFIG, **options)
    layers, batch, length = trained_like(config), _batch(config), config.image_length
    with torch.no_grad():
        expected = prior_logits(layers, batch)
    for graphed in (False, True):
        decoder = Decoder(LocalPrior(layers=layers, config=config), one_row=one_row)
        decoder._compiled = decoder._run if graphed else None
        for given in (0, 5):
            lane = decoder.start(batch["text"], batch["image"][:, :given], 1)
            for position in range(given, length):
                logits = decoder.next(lane, position, batch["image"][:, max(position - 1, 0)])
                assert logits is not None
                assert float((logits - expected[:, position]).abs().max()) < 1e-4
        canonical = decoder.canonical_logits(batch["text"], batch["image"])
        assert canonical is not None
        assert float((canonical - expected[:, -1]).abs().max()) < 1e-4


def test_a_key_gives_one_picture_in_any_batch_and_layout() -> None:
    config = replace(CONFIG, **ALL)
    layers, keys = (
        trained_like(config),
        [[(7, f"caption {i}", j) for j in range(4)] for i in (0, 1)],
    )
    drawn = []
    for one_row, batch in ((False, 128), (True, 1), (False, 3)):
        decoder = Decoder(LocalPrior(layers=layers, config=config), one_row=one_row)
        codes = torch.full((2, 4, config.image_length), -1)
        sampler = Sampler(decoder, batch=batch)
        for part in sampler.draw(_batch(config)["text"][:2], keys, DrawSettings()):
            codes[part.captions, part.candidates] = part.codes
        drawn.append(codes)
    assert drawn[0].equal(drawn[1]) and drawn[0].equal(drawn[2]) and int(drawn[0].min()) >= 0


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2), (1, 4), (4, 1)])
def test_slots_of_any_grid_hold_what_is_read(kind: Kind, rows: int, columns: int) -> None:
    mask, reads = image_mask(kind, rows, 3, columns), reads_of(kind, rows, 3, columns)
    held = torch.full((reads.slots,), -1)
    for position in range(rows * columns):
        exact = reads.cache_position(position)
        held[exact.slot] = position
        assert held[exact.reads].equal(mask[position].nonzero().flatten())


def test_prompts_of_a_wide_grid() -> None:
    """2 rows of 3: --keep-rows keeps 3 codes, a rectangle is within rows and columns."""
    assert kept_tokens(PromptConfig(keep_rows=1), 2, 3).tolist() == [True] * 3 + [False] * 3
    kept = prompt_of(torch.arange(6), PromptConfig(keep=(":,2:3",)), 2, 3).kept
    assert kept.tolist() == [False, False, True] * 2
    with pytest.raises(ConfigError, match="not within the 2x3 tokens"):
        kept_tokens(PromptConfig(keep=("0:3,:",)), 2, 3)
    with pytest.raises(ConfigError, match="keeps none of the 2x3 tokens"):
        kept_tokens(PromptConfig(), 2, 3)


MASK = """
......
......
......
....#.
#.....
......
"""
"""The bright parts of a mask, each a square of `scale` pixels."""
MASKED = {
    (2, 3): ["###", ".#."],
    (3, 2): ["##", "#.", ".#"],
    (6, 1): list("###..#"),
    (5, 2): ["##", "##", "#.", "..", ".#"],
}
"""Rows and columns of tokens -> those that are kept."""


@pytest.mark.parametrize(("grid", "kept"), MASKED.items())
@pytest.mark.parametrize("scale", [7, 50])
def test_a_mask_of_a_grid_that_is_not_square(
    tmp_path: Path, grid: tuple[int, int], kept: list[str], scale: int
) -> None:
    bright = np.array([[x == "#" for x in row] for row in MASK.split()], np.uint8)
    pixels = np.kron(bright, np.full((scale, scale), 255, np.uint8))
    wide = np.pad(pixels, ((0, 0), (2 * scale, 2 * scale)), constant_values=255)  # cut off
    path = tmp_path / "mask.png"
    path.write_bytes(encode_png(np.stack([wide] * 3, 2)))
    made = kept_tokens(PromptConfig(image=path, mask=path), *grid).view(grid)
    assert ["".join(".#"[int(x)] for x in row) for row in made] == kept


def test_columns_are_those_of_the_data() -> None:
    """A manifest names the columns only of a grid that is not square."""
    assert codes_per_image({"grid": 4}) == 16 and codes_per_image({"grid": 4, "columns": 6}) == 24
    wide, square = {"grid": 4, "columns": 6}, {"grid": 4}
    for model in (PriorConfig(), PriorConfig(grid=4, columns=6)):
        assert not model_size_problems(model, wide, "tokens")
    for model in (PriorConfig(grid=4), PriorConfig(columns=4)):
        assert not model_size_problems(model, square, "tokens")
    (problem,) = model_size_problems(PriorConfig(columns=5), wide, "tokens")
    assert problem == "model.columns=5 is not that of tokens, 6; leave it out"
    (problem,) = model_size_problems(PriorConfig(columns=6), square, "tokens")
    assert "model.columns=6 is not that of tokens, 4" in problem
