"""The generator and its checker agree, and the checker can say no."""

import numpy as np
import pytest

from core.errors import InputError
from data_pipeline.sources.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    matches,
    parse_caption,
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


def test_every_word_occurs_and_captions_parse() -> None:
    captions = [draw_scene(0, i).caption for i in range(600)]
    text = " ".join(captions)
    assert all(word in text for word in (*COLOURS, *SHAPES, *RELATIONS))
    assert all(parse_caption(caption).caption == caption for caption in captions)
    with pytest.raises(InputError, match="no caption of the shapes"):
        parse_caption("a dog")


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    scene = draw_scene(1, 5)
    assert (render(scene, 32, 1, 5) == render(scene, 32, 1, 5)).all()
    assert (render(scene, 32, 1, 5) != render(scene, 32, 1, 6)).any()


def test_noise_is_no_picture() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not any(matches(draw_scene(0, i).caption, noise) for i in range(50))
