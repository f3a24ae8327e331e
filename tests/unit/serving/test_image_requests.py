"""Fields of the images API, and uploaded pictures and masks."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from generation.config import PromptConfig
from generation.sampling.prompts import kept_tokens
from serving.config import Limits
from serving.pictures import Pictures, enlarged
from serving.ranks.group import JobError
from serving.ranks.messages import Draw, ModelFacts
from serving.requests import checked, make_draw, parse_request, side_of
from serving.uploads import Uploads
from tests.multiprocess.serving.served import mask_png, png

FACTS = ModelFacts(
    pixels=16, rows=4, columns=4, text_length=8, guidance=True, ranker="CLIP", step=None
)


def draw_of(**fields: object) -> Draw:
    request = checked(parse_request({"prompt": "A  Red\ncat", **fields}), Limits(), FACTS)
    return make_draw(request, 7, FACTS)


def test_captions_are_cleaned_as_tapir_sample_does() -> None:
    draw = draw_of(seed=3, n=2)
    assert (draw.caption, draw.seed, draw.candidates, draw.job) == ("a red cat", 3, 2, 7)


def test_without_a_key_each_request_has_another() -> None:
    seeds = {draw_of().seed for _ in range(8)}
    assert len(seeds) > 1


def test_text_of_forms_is_read_as_numbers() -> None:
    draw = draw_of(n="3", temperature="0.5", seed="4", stream="true", partial_images="1")
    assert (draw.candidates, draw.temperature, draw.seed) == (3, 0.5, 4)
    assert draw.partials == (2,)


@pytest.mark.parametrize(
    ("asked", "partials"), [(0, ()), (1, (2,)), (3, (1, 2, 3)), (9, (1, 2, 3))]
)
def test_partial_images_are_spread_over_the_rows(asked: int, partials: tuple[int, ...]) -> None:
    assert draw_of(stream=True, partial_images=asked).partials == partials
    assert draw_of(partial_images=asked).partials == ()


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(JobError) as raised:
        draw_of(n=99, temperature=-1, top_p=0, size="3x4")
    assert all(name in raised.value.message for name in ("n:", "temperature", "top_p", "size:"))
    with pytest.raises(JobError, match="guidance"):
        draw_of(guidanze=2)


def test_guidance_needs_a_prior_that_learned_it() -> None:
    facts = ModelFacts(
        pixels=16, rows=4, columns=4, text_length=8, guidance=False, ranker="", step=None
    )
    request = parse_request({"prompt": "a", "guidance": 2})
    with pytest.raises(JobError, match="caption-dropout"):
        checked(request, Limits(), facts)
    assert checked(parse_request({"prompt": "a", "guidance": 1}), Limits(), facts)


@pytest.mark.parametrize(("size", "side"), [(None, 16), ("auto", 16), ("", 16), ("512x512", 512)])
def test_sizes_are_squares(size: str | None, side: int) -> None:
    assert side_of(size, 16) == side
    for wrong in ("512", "512x256", "1025x1025", "8x8", "-16x-16", "16x16x16", "²x²"):
        with pytest.raises(JobError):
            side_of(wrong, 16)


def test_pictures_are_enlarged() -> None:
    original = encode_png(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    assert decode_rgb(enlarged(original, 64), "a").shape == (64, 64, 3)


def test_only_the_newest_pictures_are_kept() -> None:
    kept = Pictures(2)
    names = [kept.add(bytes([i])) for i in range(3)]
    assert [kept.get(name) for name in names] == [None, b"\1", b"\2"]
    assert len(set(names)) == 3 and all(len(name) == 24 for name in names)


def test_a_transparent_mask_redraws_what_a_bright_one_does(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = mask_png(16, slice(4, 8), slice(8, 16))
    prompt = asyncio.run(Uploads(1).prompt(encode_png(picture), mask, FACTS))
    assert prompt.pixels == picture.tobytes()
    bright = np.zeros((16, 16, 3), np.uint8)
    bright[4:8, 8:16] = 255
    (tmp_path / "image.png").write_bytes(encode_png(picture))
    (tmp_path / "mask.png").write_bytes(encode_png(bright))
    config = PromptConfig(image=tmp_path / "image.png", mask=tmp_path / "mask.png")
    assert torch.equal(torch.tensor(prompt.kept, device="cpu").bool(), kept_tokens(config, 4))


def test_a_picture_s_own_transparency_is_its_mask() -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:16, :, 3] = 0
    prompt = asyncio.run(Uploads(1).prompt(png(pixels), None, FACTS))
    assert prompt.kept == (0,) * 8 + (1,) * 8


def test_pictures_beyond_the_limit_are_refused_by_their_header() -> None:
    large = encode_png(np.zeros((200, 200, 3), np.uint8))
    with pytest.raises(JobError) as raised:
        asyncio.run(Uploads(0.03).prompt(large, mask_png(16, slice(8), slice(8)), FACTS))
    assert raised.value.status == 413
