"""The generator and its checker agree, and the checker rejects wrong pictures."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import InputError
from data_pipeline.sources.drawn.shapes import (
    BACKGROUND,
    COLOURS,
    EXTENT,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    matches,
    parse_caption,
    read_picture,
    render,
)


@pytest.mark.parametrize("pixels", [32, 48, 64])
def test_checker_reads_true_pictures(pixels: int) -> None:
    scenes = [draw_scene(7, i) for i in range(400)]
    right = [matches(s.caption, render(s, pixels, 7, i)) for i, s in enumerate(scenes)]
    assert np.mean(right) >= 0.99


def test_checker_refuses_each_wrong_attribute() -> None:
    first = Thing(size="small", colour="red", shape="circle")
    second = Thing(size="large", colour="blue", shape="square")
    image = render(Scene(first=first, relation="above", second=second), 32, 0, 0)
    assert matches("a small red circle above a large blue square", image)
    assert matches("a large blue square below a small red circle", image)
    for wrong in (
        "a large red circle above a large blue square",
        "a small green circle above a large blue square",
        "a small red triangle above a large blue square",
        "a small red circle below a large blue square",
        "a small red circle left of a large blue square",
        "a small red circle",
    ):
        assert not matches(wrong, image), wrong


@pytest.mark.parametrize("size", EXTENT)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_uneven_outline_is_read_as_the_nearest_shape(shape: str, size: str) -> None:
    """Corners, or points of the circle, are moved by up to a tenth of the width."""
    thing = Thing(size=size, colour="blue", shape=shape)
    readings = [read_picture(_uneven(thing, 32, i)) for i in range(200)]
    assert np.mean([[seen.thing.shape for seen in row] == [shape] for row in readings]) >= 0.95


def _uneven(thing: Thing, pixels: int, index: int) -> NDArray[np.uint8]:
    rng, fine = np.random.default_rng(index), 8
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "circle": [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 8, endpoint=False)],
    }[thing.shape]
    moved = np.array(corners) + rng.uniform(-0.2, 0.2, (len(corners), 2))
    if thing.shape == "circle":  # a smooth line through the places
        spectrum = np.fft.fft(moved @ (1, 1j))
        longer = np.concatenate([spectrum[:4], np.zeros(56), spectrum[4:]])
        line = np.fft.ifft(longer) * 8
        moved = np.stack([line.real, line.imag], 1)
    points = (rng.uniform(0.4, 0.6, 2) + moved * EXTENT[thing.size] / 2) * pixels * fine
    canvas = np.full((pixels * fine, pixels * fine, 3), BACKGROUND, np.uint8)
    cv2.fillPoly(canvas, [points.round().astype(np.int32)], COLOURS[thing.colour])
    return np.asarray(cv2.resize(canvas, (pixels, pixels), interpolation=cv2.INTER_AREA), np.uint8)


def test_every_word_occurs_and_captions_parse() -> None:
    captions = [draw_scene(0, i).caption for i in range(600)]
    text = " ".join(captions)
    assert all(word in text for word in (*COLOURS, *SHAPES, *RELATIONS))
    assert all(parse_caption(caption).caption == caption for caption in captions)
    with pytest.raises(InputError, match="not a caption of the shapes"):
        parse_caption("a dog")


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    scene = draw_scene(1, 5)
    assert (render(scene, 32, 1, 5) == render(scene, 32, 1, 5)).all()
    assert (render(scene, 32, 1, 5) != render(scene, 32, 1, 6)).any()


def test_noise_is_no_picture() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not any(matches(draw_scene(0, i).caption, noise) for i in range(50))
