"""Pins of the critics and of initial codebooks: by hand, by definition, on another device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import InputError
from models.config import DVAEConfig
from models.critics import inception
from models.critics.discriminator import Discriminator
from models.critics.fid import frechet_distance_of_few
from models.critics.inception import Inception
from models.critics.perceptual import Perceptual, _unit, read_tensors
from models.dvae import DVAE
from models.initialization import generator
from models.quantizers import POSITIONS_TOGETHER, NearestVector, nearest_codes
from parallel.device import CPU

META = torch.device("meta")


def test_the_smallest_length_is_added_to_that_of_the_features() -> None:
    """1e-10 is added: features 3e-10 and 4e-10 have the length 5e-10, and become 1/2 and 2/3."""
    features = torch.tensor([3e-10, 4e-10], dtype=torch.float64).view(1, 2, 1, 1)
    assert _unit(features).flatten().tolist() == pytest.approx([3 / 6, 4 / 6], rel=1e-9)
    assert _unit(torch.ones(1, 4, 2, 2)).flatten().tolist() == [0.5] * 16


def test_features_shorter_than_the_smallest_length_count_as_that_long() -> None:
    """A length of 1e-12 is raised to 1e-10, to which 1e-10 is added."""
    assert _unit(torch.tensor([[[[1e-12]]]], dtype=torch.float64)).item() == pytest.approx(0.005)
    x = torch.zeros(1, 1, 1, 1, requires_grad=True)
    _unit(x).sum().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(5e9)


def test_no_object_is_read_from_a_file_of_weights(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3), "object": SimpleNamespace()}, tmp_path / "object.pth")
    with pytest.raises(InputError, match="neither a safetensors file nor tensors"):
        read_tensors(tmp_path / "object.pth")


@torch.no_grad()
def test_a_perceptual_loss_is_made_on_the_cpu_and_compares_where_pictures_are() -> None:
    with META:
        network = Perceptual()
        assert {buffer.device for buffer in network.buffers()} == {CPU}
        for buffer in network.buffers():
            buffer.zero_()
        network.get_buffer("scale").fill_(1.0)
        picture = torch.ones(2, 3, 16, 16, device=CPU)
        assert network(picture, picture).tolist() == [0.0, 0.0]


def test_weights_of_a_gpu_are_read_on_a_machine_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vgg.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save({"w": torch.ones(3)}, path)
    assert read_tensors(path)["w"].tolist() == [1.0, 1.0, 1.0]


@torch.no_grad()
def test_scores_are_in_32_bits_or_in_64() -> None:
    network = Discriminator(4, 1)
    image = torch.rand(1, 3, 8, 8, generator=generator(0, "image"))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(image).dtype == torch.float32
    assert network.double()(image.double()).dtype == torch.float64


def test_a_discriminator_starts_from_seed_0() -> None:
    first, again = (list(Discriminator(4, 1, *seed).parameters()) for seed in ((), (0,)))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("default", [CPU, META])
def test_a_codebook_starts_by_k_means_plus_plus(default: torch.device) -> None:
    """Against the definition in float64, by the same keyed draws; any default device."""
    outputs = torch.randn(2, 3, 4, 5, generator=generator(0, "outputs"))
    quantizer = NearestVector(6, 3)
    with default:
        quantizer.calibrate(outputs, 7)
    rows = [outputs[b, :, i, j] for b in range(2) for i in range(4) for j in range(5)]
    odds, codes, draws = [1.0] * 40, [], generator(7, "codebook")
    for _ in range(6):
        row = int(torch.tensor(odds, dtype=torch.float64).multinomial(1, generator=draws))
        codes.append(rows[row])
        odds = [min(float((x - code).square().sum()) for code in codes) for x in rows]
    assert quantizer.codebook.weight.equal(torch.stack(codes))


@torch.no_grad()
def test_a_dvae_is_calibrated_by_seed_0_if_none_is_given() -> None:
    config = DVAEConfig(
        pixels=8, width=4, groups=1, quantizer="vq", codebook=6, vector=3, code_width=4
    )
    image, starts = torch.rand(3, 3, 8, 8, generator=generator(0, "image")), []
    for seed in ((), (0,), (1,)):
        model = DVAE(config, 2)
        model.calibrate(image, *seed)
        starts.append(model.quantizer.get_parameter("codebook.weight").clone())
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])


def test_the_nearest_code_is_taken_of_codes_of_any_length() -> None:
    """-2 x.c + |c|^2: of (2, 0), the codes (1, 0), (3.5, 0) and (9, 0) have -3, -1.75 and 45."""
    quantizer = NearestVector(3, 2)
    quantizer.codebook.weight.data = torch.tensor([[9.0, 0.0], [1.0, 0.0], [3.5, 0.0]])
    assert quantizer.codes(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)).item() == 1


def test_nearest_codes_are_the_dense_definition() -> None:
    """Also in a last part that is not full; the dense definition is argmin |x - c|^2."""
    draws = generator(0, "codes")
    vectors = torch.randn(2 * POSITIONS_TOGETHER + 7, 5, generator=draws)
    codebook = 2 * torch.randn(40, 5, generator=draws)
    dense = (vectors[:, None] - codebook[None]).square().sum(2).argmin(1)
    assert nearest_codes(vectors, codebook).equal(dense)


def test_the_distance_of_two_sets_by_hand() -> None:
    """Means 1 and 6 are 25 apart; variances 2 and 18 add 2 + 18 - 2 * 6 = 8."""
    first, second = np.array([[0.0], [2.0]]), np.array([[3.0], [9.0]])
    assert frechet_distance_of_few(first, second) == pytest.approx(33.0)
    for few in (first[:1], first[:0]):
        with pytest.raises(InputError, match="at least two"):
            frechet_distance_of_few(few, second)
        with pytest.raises(InputError, match="at least two"):
            frechet_distance_of_few(second, few)


class _Small(nn.Module):
    """For torch-fidelity's network: features are sums of channels, logits their negatives."""

    def __init__(self, name: str, outputs: list[str]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        assert (name, outputs) == ("inception", ["2048", "logits_unbiased"])
        self.load_state_dict(SMALL.load_state_dict_from_url("https://example.org"))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        sums = pixels.float().sum((2, 3)) * self.weight + self.bias
        return sums, -sums


def _download(url: str) -> Any:
    raise AssertionError(url)


SMALL = SimpleNamespace(load_state_dict_from_url=_download, FeatureExtractorInceptionV3=_Small)


def test_features_are_in_the_order_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """67 pictures of 2 x 1 pixels are three calls; nothing is downloaded, no draw of torch's."""
    monkeypatch.setattr(inception, "foreign_module", lambda name: SMALL)
    path, before = tmp_path / "weights.safetensors", torch.get_rng_state()
    save_file({"weight": torch.tensor([1.0, 10.0, 100.0]), "bias": torch.ones(3)}, path)
    fork, kept = torch.random.fork_rng, list[Any]()
    monkeypatch.setattr(torch.random, "fork_rng", lambda **d: kept.append(d) or fork(devices=[]))
    network = Inception(path)
    assert kept == [{"devices": []}], "a GPU's generator need not be kept: nothing is drawn on it"
    assert not network.proxy and network.label == "FID and IS (Inception features)"
    assert torch.get_rng_state().equal(before) and SMALL.load_state_dict_from_url is _download
    ramp = np.arange(67, dtype=np.uint8)[:, None, None, None]
    features, logits = network(np.broadcast_to(ramp + np.array([0, 1, 2]), (67, 2, 1, 3)).copy())
    expected = [[2 * i + 1, 20 * (i + 1) + 1, 200 * (i + 2) + 1] for i in range(67)]
    assert features.tolist() == expected and (-logits).tolist() == expected


def test_the_first_difference_of_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "foreign_module", lambda name: SMALL)
    path = tmp_path / "weights.safetensors"
    save_file({"bias": torch.ones(2)}, path)
    with pytest.raises(InputError) as caught:
        Inception(path)
    text = str(caught.value)
    assert f"{path} holds other weights than this Inception's (Missing key(s) in state_d" in text
    assert "size mismatch" not in text
    monkeypatch.setattr(SMALL, "FeatureExtractorInceptionV3", _raise)
    with pytest.raises(InputError, match=r"Inception's \(one line\)"):
        Inception(path)


def _raise(*_: Any) -> None:
    raise RuntimeError("one line")
