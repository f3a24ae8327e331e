"""LPIPS against numbers of its authors' code, and the discriminator's gradients."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.errors import InputError
from models.critics.discriminator import Discriminator, hinge_loss
from models.critics.perceptual import Perceptual, _unit, read_tensors
from models.initialization import generator
from tests.perceptual_weights import drawn_linear, drawn_pictures, drawn_vgg, write_weights

LPIPS = [0.763145692, 0.744215258]
UNWEIGHTED = [1.570145742, 1.530997904]
"""Of lpips 0.1.4, in float64, with net='vgg', normalize=True and these weights; lpips=False."""


@torch.no_grad()
def test_distances_are_those_of_lpips(tmp_path: Path) -> None:
    vgg, linear = write_weights(tmp_path)
    first, second = (picture.double() for picture in drawn_pictures())
    for file, expected in ((linear, LPIPS), (None, UNWEIGHTED)):
        network = Perceptual().fill(vgg, file).double()
        assert network(first, second).tolist() == pytest.approx(expected, abs=1e-8)
        assert network(first, first).tolist() == [0.0, 0.0]
    assert not list(network.parameters()) and not network.state_dict(), "nothing trains or saves it"


def test_gradients_reach_pictures_in_16_bits(tmp_path: Path) -> None:
    network = Perceptual().fill(*write_weights(tmp_path))
    first, second = drawn_pictures()
    first.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distances = network(first, second)
    assert distances.dtype == torch.float32
    assert distances.tolist() == pytest.approx(LPIPS, rel=0.05)
    distances.sum().backward()
    assert first.grad is not None and float(first.grad.abs().max()) > 0


def test_features_that_are_all_zero_have_finite_gradients() -> None:
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit = _unit(zeros)
    assert not unit.any()
    unit.sum().backward()
    assert zeros.grad is not None and bool(zeros.grad.isfinite().all())
    one = torch.tensor([[[[3.0]], [[4.0]]]], dtype=torch.float64)
    assert _unit(one).flatten().tolist() == [3 / (5 + 1e-10), 4 / (5 + 1e-10)]


def test_files_of_other_weights_are_refused(tmp_path: Path) -> None:
    """Nothing else is read than tensors: a pickle of an object is not run."""
    vgg, linear = write_weights(tmp_path)
    with pytest.raises(InputError, match=r"there are no weights at .*absent"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(InputError, match=r"lacks features\.0\.weight of 1728 values"):
        Perceptual().fill(linear, None)
    with pytest.raises(InputError, match=r"lacks lin0\.model\.1\.weight of 64 values"):
        Perceptual().fill(vgg, vgg)
    (tmp_path / "object.pth").write_bytes(pickle.dumps(Path("x")))
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("object.pth", "text.pth"):
        with pytest.raises(InputError, match="neither a safetensors file nor tensors"):
            read_tensors(tmp_path / name)
    assert read_tensors(linear).keys() == drawn_linear().keys()
    assert read_tensors(vgg).keys() == drawn_vgg().keys()


def test_scores_of_patches_by_torchs_own_layers() -> None:
    """Two halvings and two convolutions of stride 1; each picture is normalised alone."""
    network = Discriminator(4, 2, seed=3)
    image = torch.rand(2, 3, 16, 16, generator=generator(0, "image"))
    scores = network(image)
    assert scores.shape == (2, 1, 2, 2) and scores[1:].equal(network(image[1:]))
    x = image * 2 - 1
    for i, stride in enumerate((2, 2, 1)):
        conv = network.convs[i]
        x = F.conv2d(x, conv.weight, conv.bias, stride, 1)
        if i:
            flat = x.flatten(1)
            mean, variance = flat.mean(1), flat.var(1, unbiased=False)
            x = (x - mean.view(2, 1, 1, 1)) / (variance.view(2, 1, 1, 1) + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(scores, F.conv2d(x, network.output.weight, padding=1))
    widths = [conv.out_channels for conv in Discriminator(4, 5).convs]
    assert widths == [4, 8, 16, 32, 32, 32]
    matrices = torch.cat([p.flatten() for p in Discriminator(64, 3).parameters() if p.dim() > 1])
    assert float(matrices.detach().std()) == pytest.approx(0.02, rel=0.01)
    again = list(Discriminator(4, 2, seed=3).parameters())
    assert all(a.equal(b) for a, b in zip(again, network.parameters(), strict=True))


def test_fixed_weights_get_no_gradient_and_pictures_the_same() -> None:
    network = Discriminator(4, 1)
    images = [torch.rand(2, 3, 8, 8, generator=generator(0, "x")).requires_grad_() for _ in (0, 1)]
    network(images[0], fixed=True).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    network(images[1]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    torch.testing.assert_close(images[0].grad, images[1].grad)


def test_hinge_loss_by_hand() -> None:
    """Real: max(0, 1 - 3), max(0, 1 - 0.5); drawn: max(0, 1 - 2), max(0, 1 + 1)."""
    real, drawn = torch.tensor([3.0, 0.5]), torch.tensor([-2.0, 1.0])
    assert float(hinge_loss(real, drawn)) == ((0 + 0.5) / 2 + (0 + 2) / 2) / 2
