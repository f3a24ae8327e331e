"""Two-panel pictures are read back exactly, and whatever is wrong in one is noticed."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.errors import InputError
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.pack import pack
from data_pipeline.sources.drawn.panels import (
    CAPTIONS,
    COLUMNS,
    EXTENT,
    FILLS,
    FORMS,
    OPERATIONS,
    ROWS,
    Panel,
    blank_below,
    draw_panels,
    operation_of,
    panel_json,
    panel_of,
    render_pair,
    render_panel,
)
from data_pipeline.sources.drawn.read_panels import follows, read_pair, read_panel
from data_pipeline.sources.drawn.shapes import COLOURS
from data_pipeline.streaming.stream import stored_records

TOP = Panel(form="triangle", colour="blue", row=3, column=6)
TEE = Panel(form="T", colour="red", row=4, column=12)
EXPECTED = {
    "same": (TOP, TEE),
    "red": (replace(TOP, colour="red"), TEE),
    "flipped": (
        replace(TOP, form="triangle upside-down", row=4),
        replace(TEE, form="T upside-down", row=3),
    ),
    "larger": (replace(TOP, style="large"), replace(TEE, style="large")),
    "outline": (replace(TOP, style="outlined"), replace(TEE, style="outlined")),
    "stamp": (replace(TOP, style="stamp"), replace(TEE, style="stamp")),
}


@pytest.mark.parametrize("pixels", [16, 32])
def test_each_form_and_style_is_read_in_every_corner(pixels: int) -> None:
    places = product((ROWS[0], ROWS[-1]), (COLUMNS[0], COLUMNS[-1]))
    for number, (form, style, (row, column)) in enumerate(product(FORMS, EXTENT, places)):
        colour = FILLS[number % len(FILLS)]
        panel = Panel(form=form, colour=colour, row=row, column=column, style=style)
        assert read_panel(render_panel(panel, pixels)) == panel


def test_operations_by_hand() -> None:
    assert {name: (change(TOP), change(TEE)) for name, change in OPERATIONS.items()} == EXPECTED


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_pair_follows_its_own_operation_alone(operation: str) -> None:
    image = render_pair(operation, TOP, 32)
    seen = read_pair(image)
    assert image.shape == (64, 64, 3) and seen.top == TOP
    assert [name for name in OPERATIONS if follows(name, TOP, seen.bottom)] == [operation]
    others = [replace(TOP, form="T"), replace(TOP, row=4), replace(TOP, column=7)]
    others += [replace(TOP, colour="green")] if operation != "red" else []
    assert not any(follows(operation, other, seen.bottom) for other in others)
    blank = read_pair(blank_below(image))
    assert blank.top == TOP and blank.bottom is None


@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_pictures_are_read_after_noise_and_blur(blur: float) -> None:
    """Noise of 8 levels and blur of 0.8 pixels."""
    rng, right = np.random.default_rng(0), []
    for index in range(60):
        operation, top = draw_panels(3, index)
        image = render_pair(operation, top, 32)
        soft = np.asarray(cv2.GaussianBlur(image, (0, 0), blur)) if blur else image
        noisy = np.clip(soft + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        seen = read_pair(noisy)
        right.append(seen.top == top and follows(operation, top, seen.bottom))
    assert np.mean(right) >= 0.95


def test_what_is_no_figure_or_not_alone_is_not_read() -> None:
    image = render_panel(TOP, 32)
    half = image.copy()
    half[:, 28:] = half[0, 0]  # the figure's right half
    beside = image.copy()
    beside[12:20, 52:60] = image[15, 26]
    hole = image.copy()
    hole[14:22, 24:32] = (30, 160, 50)
    noise = np.random.default_rng(0).integers(0, 256, image.shape).astype(np.uint8)
    assert read_panel(image) == TOP
    for wrong in (half, beside, hole, noise, np.full_like(image, 240)):
        assert read_panel(wrong) != TOP
    for empty in (noise, np.full_like(image, 240)):
        assert read_panel(empty) is None
    black = image.copy()
    black[(image != image[0, 0]).any(-1)] = COLOURS["black"]  # no colour that fills figures
    assert read_panel(black) is None
    for odd in (image, np.full((40, 40, 3), 240, np.uint8)):
        with pytest.raises(InputError, match="has no two panels"):
            read_pair(odd)


def test_draws_are_keyed_and_cover_everything() -> None:
    drawn = [draw_panels(5, i) for i in range(3000)]
    assert draw_panels(5, 7) == drawn[7] and draw_panels(6, 7) != drawn[7]
    assert {operation for operation, _ in drawn} == set(OPERATIONS)
    assert len({top for _, top in drawn}) > 0.95 * len(FORMS) * len(FILLS) * 2 * len(COLUMNS)
    assert all(top.style == "plain" for _, top in drawn)
    changed = [OPERATIONS[name](top) != top for name, top in drawn if name != "same"]
    assert all(changed)


def test_captions_name_the_operation_and_nothing_of_the_figure() -> None:
    assert [operation_of(caption) for caption in CAPTIONS.values()] == list(OPERATIONS)
    words = " ".join(text for name, text in CAPTIONS.items() if name != "red").split()
    assert not {*FORMS, *FILLS} & set(words)
    with pytest.raises(InputError, match="not a caption of the panels"):
        operation_of("a small red circle")


def test_an_upper_panel_as_json() -> None:
    assert panel_of(panel_json(TOP)) == TOP
    odd = [{"form": "star"}, {"form": ["T"]}, {"style": "x"}, {"row": float(TOP.row)}]
    for wrong in ({}, 3, *({**panel_json(TOP), **each} for each in odd)):
        with pytest.raises(InputError, match="is no upper panel"):
            panel_of(wrong)


def test_packed_panels_are_whole_and_no_upper_panel_is_in_both_splits(tmp_path: Path) -> None:
    config = PackConfig(count=300, pixels=16, validation=0.2, shard_pairs=200)
    pack(["panels"], open_store(str(tmp_path)), config)
    tops: dict[str, set[Panel | None]] = {}
    for split in ("train", "validation"):
        records = list(stored_records(RawSource(open_store(str(tmp_path)), split)))
        seen = [read_pair(decode_rgb(record.image, record.key)) for record in records]
        assert all(
            read.top and follows(operation_of(record.caption), read.top, read.bottom)
            for record, read in zip(records, seen, strict=True)
        )
        tops[split] = {read.top for read in seen}
    assert min(map(len, tops.values())) > 30 and not tops["train"] & tops["validation"]
    with pytest.raises(InputError, match="multiple of 8; try 24"):
        pack(["panels"], open_store(str(tmp_path / "b")), replace(config, pixels=21))
