"""VQ and FSQ: codes, gradients and initial codebooks, by hand and by vector-quantize-pytorch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from models.code_encoder import CodeReader
from models.config import DVAEConfig
from models.dvae import DVAE, DVAETerms, negative_bound
from models.initialization import generator
from models.quantizers import FiniteScalar, Gumbel, NearestVector, build_quantizer

ONE, KEYS = torch.tensor(1.0), torch.arange(2)


def _config(quantizer: Any, **sizes: Any) -> DVAEConfig:
    small = {"pixels": 16, "width": 8, "groups": 2, "code_width": 8, "codebook": 30, "vector": 3}
    return DVAEConfig(quantizer=quantizer, levels=(5, 6), **{**small, **sizes})


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, *shape))


def test_vq_is_that_of_the_library() -> None:
    """With a codebook that learns by gradients: codes, values, loss, and both gradients."""
    theirs = VectorQuantize(
        3, 7, learnable_codebook=True, ema_update=False, rotation_trick=True,
        accept_image_fmap=True, commitment_weight=1.0,
    )  # fmt: skip
    mine = NearestVector(7, 3)
    theirs._codebook.embed.data[0] = _drawn(7, 3)
    mine.codebook.weight.data = _drawn(7, 3)
    xs = [_drawn(2, 3, 4, 5).requires_grad_() for _ in range(2)]
    out, codes, loss = theirs(xs[0])
    got = mine(xs[1], ONE, KEYS)
    pull = _drawn(2, 3, 4, 5).flip(0)
    ((out * pull).sum() + loss).backward()
    ((got.inputs * pull).sum() + got.penalty).backward()
    assert mine.codes(xs[1]).equal(codes) and len(codes.unique()) > 3
    torch.testing.assert_close(got.inputs, out)
    torch.testing.assert_close(got.penalty, loss)
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    torch.testing.assert_close(mine.codebook.weight.grad, theirs._codebook.embed.grad[0])
    torch.testing.assert_close(mine.inputs(codes), out)


def test_vq_by_hand() -> None:
    """(0, 0) is nearest to the first code, (3, 4) to the second: 0, 1, 0 and 4 off, of 4 values."""
    quantizer = NearestVector(3, 2)
    quantizer.codebook.weight.data = torch.tensor([[0.0, 1.0], [3.0, 2.0], [-9.0, 0.0]])
    outputs = torch.tensor([[0.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    assert quantizer.codes(outputs).tolist() == [[[0, 1]]]
    assert float(quantizer(outputs, ONE, KEYS).penalty.detach()) == (0 + 1 + 0 + 4) / 4
    rows = quantizer.inputs(torch.tensor([[[2, 0]]])).tolist()
    assert rows == [[[[-9.0, 0.0]], [[0.0, 1.0]]]]


def test_fsq_counts_its_first_level_fastest() -> None:
    quantizer = FiniteScalar((3, 5))
    outputs = 288 * torch.tensor([[-1.0, 1, -1, 0, 1], [-1, -1, 1, 0, 1]]).view(1, 2, 1, 5)
    assert quantizer.codes(outputs).flatten().tolist() == [0, 2, 12, 7, 14]
    inputs = quantizer.inputs(torch.tensor([[[0, 2, 12, 7, 14]]]))
    assert inputs[0, :, 0].tolist() == [[-1.0, 1.0, -1.0, 0.0, 1.0], [-1.0, -1.0, 1.0, 0.0, 1.0]]
    x = (32 * _drawn(2, 2, 3, 3)).requires_grad_()
    got = quantizer(x, ONE, KEYS)
    assert got.inputs.equal(quantizer.inputs(quantizer.codes(x))) and float(got.penalty) == 0
    got.inputs.sum().backward()
    slopes = (
        torch.tensor([1.001, 1.001]).view(1, 2, 1, 1) * (1 - (x.detach() / 32).tanh() ** 2) / 32
    )
    torch.testing.assert_close(x.grad, slopes)  # the rounding passes gradients


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fsq_reads_its_constants_where_only_shapes_are_built(device: str) -> None:
    with torch.device(device):
        quantizer = build_quantizer(_config("fsq"))
    assert quantizer.codes(_drawn(1, 2, 1, 1)).shape == (1, 1, 1)
    assert not quantizer.state_dict()


@torch.no_grad()
def test_a_codebook_starts_from_distant_outputs() -> None:
    """Of two far clusters each gives a code; a third one is the only other output."""
    quantizer = NearestVector(3, 2)
    outputs = torch.tensor([[0.0] * 9 + [50.0] + [50.0] * 9 + [0.0]] * 2)
    outputs[1, -1] = 7
    quantizer.calibrate(outputs.view(1, 2, 4, 5), 0)
    rows = sorted(quantizer.codebook.weight.tolist())
    assert rows == [[0.0, 0.0], [0.0, 7.0], [50.0, 50.0]]
    kept, x = quantizer.codebook.weight.clone(), _drawn(2, 2, 8, 8)
    starts = []
    for seed in (3, 3, 4):
        quantizer.calibrate(x, seed)
        starts.append(quantizer.codebook.weight.clone())
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])
    flat = x.permute(0, 2, 3, 1).flatten(0, 2).tolist()
    assert all(row in flat for row in starts[0].tolist()) and not kept.equal(starts[0])


@torch.no_grad()
def test_more_codes_than_outputs_are_drawn_twice() -> None:
    quantizer = NearestVector(5, 2)
    quantizer.calibrate(torch.ones(1, 2, 1, 2), 0)
    assert quantizer.codebook.weight.equal(torch.ones(5, 2))


@torch.no_grad()
@pytest.mark.parametrize(("quantizer", "spread"), [("gumbel", 1.0), ("vq", 1.0), ("fsq", 32.0)])
def test_a_dvae_of_each_quantizer(quantizer: Any, spread: float) -> None:
    """Codes of the reader are the model's; a picture decodes the codes' own inputs."""
    model = DVAE(_config(quantizer), 1)
    image = torch.rand(4, 3, 16, 16, generator=generator(0, "image"))
    model.calibrate(image, 1)
    outputs = model.logits(image)
    assert outputs.std((0, 2, 3)).tolist() == pytest.approx([spread] * outputs.shape[1], rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # codes and the penalty are of 32 bits
        penalty = model(image, ONE, torch.arange(4))[0].penalty
    assert penalty.dtype == torch.float32
    codes = model.tokens(image)
    assert codes.shape == (4, 64) and codes.dtype == torch.int64 and int(codes.max()) < 30
    assert codes.equal(model.quantizer.codes(outputs).flatten(1)) and len(codes.unique()) > 9
    for precision in ("fp32", "bf16"):
        read = CodeReader(model, precision).codes(image)  # type: ignore[arg-type]
        assert float((read == codes).float().mean()) > (0.95 if precision == "bf16" else 0.999)
    terms, _ = model(image, ONE, torch.arange(4))
    if quantizer != "gumbel":
        again = ((terms.location.sigmoid() - 0.1) / 0.8).clamp(0, 1)
        torch.testing.assert_close(model.picture(codes), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("quantizer", "init", "fan_in"),
    [("gumbel", "calibrated", 1), ("gumbel", "paper", 64), ("vq", "calibrated", 16),
     ("vq", "paper", 16), ("fsq", "calibrated", 3), ("fsq", "paper", 3)],
)  # fmt: skip
def test_a_decoder_starts_by_its_inputs_that_are_not_zero(
    quantizer: Any, init: Any, fan_in: int
) -> None:
    """One of a one-hot code, unless the start is the paper's; all of a vector."""
    config = DVAEConfig(
        pixels=4, width=4, groups=1, code_width=256, codebook=64, vector=16, levels=(4, 4, 4),
        quantizer=quantizer, init=init,
    )  # fmt: skip
    drawn = DVAE(config, 1).get_parameter("decoder.input.weight").detach()
    assert float(drawn.square().mean()) * fan_in == pytest.approx(1, abs=0.15)


def test_a_codebook_of_vq_is_saved_as_one_matrix() -> None:
    names = {n: tuple(p.shape) for n, p in DVAE(_config("vq")).named_parameters()}
    assert names["quantizer.codebook.weight"] == (30, 3)
    assert DVAEConfig(quantizer="vq").code_channels == 8
    assert names["encoder.output.weight"] == (3, 16, 1, 1)
    assert names["decoder.input.weight"] == (8, 3, 1, 1)
    assert isinstance(build_quantizer(_config("gumbel")), Gumbel)


@pytest.mark.parametrize(("quantizer", "loss"), [("gumbel", 2.25), ("vq", 5.0), ("fsq", 5.0)])
def test_only_a_kl_is_spread_over_pixel_values(quantizer: Any, loss: float) -> None:
    """3 * 16^2 / 8^2 = 12 values a token: 2 + 1.5 * 2 / 12, or 2 + 1.5 * 2."""
    terms = DVAETerms(
        log_likelihood=torch.tensor(-2.0), penalty=torch.tensor(2.0), location=torch.zeros(())
    )
    assert float(negative_bound(terms, 1.5, _config(quantizer))) == loss


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"quantizer": "vq", "vector": 0}, "model.vector=0 must be at least 1"),
        ({"quantizer": "gumbel", "vector": 0}, ""),
        ({"quantizer": "vq", "vector": 1, "codebook": 9}, ""),
        ({"quantizer": "fsq"}, ""),
        ({"quantizer": "fsq", "levels": ()}, "must each be at least 3"),
        ({"quantizer": "fsq", "levels": (2, 256)}, "must each be at least 3"),
        ({"quantizer": "fsq", "levels": (3, 5)}, "make 15 codes, not model.codebook=512"),
        ({"quantizer": "fsq", "levels": (3, 5), "codebook": 15}, ""),
    ],
)
def test_problems_of_quantizers(sizes: dict[str, Any], message: str) -> None:
    problems = DVAEConfig(**sizes).problems()
    assert len(problems) == bool(message) and message in "".join(problems)
