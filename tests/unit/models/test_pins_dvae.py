"""The dVAE's and CLIP's numbers, computed by hand and by torch.distributions."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Laplace, TransformedDistribution, kl_divergence
from torch.distributions.transforms import SigmoidTransform

from core.errors import ConfigError
from core.keys import key_int
from models.clip import Clip, caption_keys, contrastive_loss
from models.code_encoder import CodeReader
from models.config import ClipConfig, DVAEConfig
from models.dvae import DVAE, DVAETerms, ResidualBlock, negative_bound
from models.initialization import draw_normal, init_fan_in, init_normal
from models.keyed_noise import gumbel_noise
from models.logit_laplace import (
    gumbel_codes,
    kl_to_uniform,
    logit_laplace_log_prob,
    squeeze_pixels,
    unsqueeze_pixels,
)
from parallel.placement import Placement

DRAWS = torch.Generator().manual_seed(0)


def _terms(log_likelihood: float, penalty: float) -> DVAETerms:
    return DVAETerms(
        log_likelihood=torch.tensor(log_likelihood),
        penalty=torch.tensor(penalty),
        location=torch.zeros(()),
    )


def test_the_likelihood_is_that_of_torchs_transformed_laplace() -> None:
    x = torch.rand(4, 5, generator=DRAWS).clamp(0.01, 0.99).double()
    mu, log_scale = torch.randn(2, 4, 5, generator=DRAWS).double()
    law = TransformedDistribution(Laplace(mu, log_scale.exp()), [SigmoidTransform()])
    torch.testing.assert_close(logit_laplace_log_prob(x, mu, log_scale), law.log_prob(x))


def test_the_divergence_is_torchs_and_in_nats_a_position() -> None:
    logits = 2 * torch.randn(2, 6, 3, 2, generator=DRAWS)
    ours = Categorical(logits=logits.permute(0, 2, 3, 1))
    uniform = Categorical(logits=torch.zeros(2, 3, 2, 6))
    torch.testing.assert_close(kl_to_uniform(logits), kl_divergence(ours, uniform))
    three = torch.tensor([math.log(3), 0.0])
    assert float(kl_to_uniform(three, 0)) == pytest.approx(0.1308120)  # ln 2 - H(3/4)


@pytest.mark.parametrize(("pixels", "groups", "loss"), [(32, 3, 2.03125), (256, 4, 2.0078125)])
def test_a_kl_of_a_position_is_spread_over_its_pixel_values(
    pixels: int, groups: int, loss: float
) -> None:
    """3 * 32^2 / 8^2 = 48 values a token; the paper's 3 * 256^2 / 32^2 = 192: 2 + 0.5 * 3 / 48."""
    terms = _terms(-2.0, 3.0)
    config = DVAEConfig(pixels=pixels, groups=groups)
    assert float(negative_bound(terms, 0.5, config)) == loss


def test_codes_are_relaxed_by_hand() -> None:
    """exp(2 ln 3) = 9 against exp(2 ln 2) = 4."""
    logits = torch.tensor([0.0, math.log(2)]).view(1, 2, 1, 1)
    noise = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    codes = gumbel_codes(logits, 0.5, noise).flatten().tolist()
    assert codes == pytest.approx([9 / 13, 4 / 13])
    for bad in (0.0, -1.0):
        with pytest.raises(ConfigError, match="must be positive"):
            gumbel_codes(logits, bad, noise)


def test_pixels_are_squeezed_by_hand() -> None:
    assert squeeze_pixels(torch.tensor([0.0, 0.5, 1.0]), 0.2).tolist() == pytest.approx(
        [0.2, 0.5, 0.8]
    )
    mu = torch.tensor([0.1, 0.25, 0.5, 0.9]).logit()
    assert unsqueeze_pixels(mu, 0.25).tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_the_bound_of_a_picture_is_made_of_its_parts() -> None:
    """The forward pass against the definition: noise by key, relaxed codes, likelihood, KL."""
    config = DVAEConfig(pixels=8, width=4, groups=2, codebook=6, code_width=3)
    dvae = DVAE(config, 1)
    image, keys = torch.rand(2, 3, 8, 8, generator=DRAWS), torch.tensor([3, 4])
    terms, logits = dvae(image, torch.tensor(0.3), keys)
    assert logits.shape == (2, 6, 4, 4)
    states = 0.8 * image + 0.1
    torch.testing.assert_close(logits, dvae.encoder(states))
    relaxed = torch.softmax((logits + gumbel_noise(keys, (6, 4, 4))) / 0.3, 1)
    mu, log_scale = dvae.decoder(relaxed).chunk(2, 1)
    law = TransformedDistribution(
        Laplace(mu, log_scale.clamp_min(-1.5).exp()), [SigmoidTransform()]
    )
    torch.testing.assert_close(terms.log_likelihood, law.log_prob(states).mean())
    uniform = Categorical(logits=torch.zeros(2, 4, 4, 6))
    exact = kl_divergence(Categorical(logits=logits.permute(0, 2, 3, 1)), uniform).mean()
    torch.testing.assert_close(terms.penalty, exact)
    assert dvae.tokens(image).equal(logits.argmax(1).flatten(1))
    one_hot = torch.zeros(2, 6, 4, 4).scatter_(1, dvae.tokens(image).view(2, 1, 4, 4), 1.0)
    again = ((dvae.decoder(one_hot)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(dvae.picture(dvae.tokens(image)), again)


def test_a_residual_block_by_torchs_convolutions() -> None:
    config = DVAEConfig(width=8, blocks=3, groups=2, bottleneck=4, gain=0.0)
    block = ResidualBlock(4, 8, config, (3, 3, 3, 1))
    assert block.gain == 1 / 36 and isinstance(block.identity, nn.Conv2d)
    assert ResidualBlock(8, 8, DVAEConfig(gain=0.5), (1, 3, 3, 3)).gain == 0.5
    kernels = [(c.in_channels, c.out_channels, *c.kernel_size) for c in block.convs]  # type: ignore
    assert kernels == [(4, 2, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3), (2, 8, 1, 1)]
    x = torch.randn(1, 4, 5, 5, generator=DRAWS)
    h = x
    for conv in block.convs:
        h = torch.nn.functional.conv2d(h.relu(), conv.weight, conv.bias, padding="same")  # type: ignore
    torch.testing.assert_close(block(x), block.identity(x) + h / 36)
    assert ResidualBlock(8, 8, config, (3, 3, 3, 1)).identity(x) is x
    assert ResidualBlock(1, 2, config, (3, 3, 3, 1)).convs[0].out_channels == 1


@pytest.mark.parametrize("blocks", [1, 2])
def test_layers_and_widths_of_both_halves(blocks: int) -> None:
    dvae = DVAE(DVAEConfig(width=4, groups=3, blocks=blocks, code_width=5, codebook=7))
    numbers = range(blocks)
    group = {g: [f"g{g}b{b}" for b in numbers] for g in range(3)}
    names = [*group[0], "g0pool", *group[1], "g1pool", *group[2]]
    assert [n for n, _ in dvae.encoder.named_children()] == ["input", *names, "relu", "output"]
    ups = [name.replace("pool", "up") for name in names]
    assert [n for n, _ in dvae.decoder.named_children()] == ["input", *ups, "relu", "output"]
    first = {n: (m.convs[0].in_channels, m.convs[-1].out_channels)
             for n, m in dvae.encoder.named_children() if isinstance(m, ResidualBlock)}  # fmt: skip
    assert [first[f"g{g}b0"] for g in range(3)] == [(4, 4), (4, 8), (8, 16)]
    back = {n: (m.convs[0].in_channels, m.convs[-1].out_channels)
            for n, m in dvae.decoder.named_children() if isinstance(m, ResidualBlock)}  # fmt: skip
    assert [back[f"g{g}b0"] for g in range(3)] == [(5, 16), (16, 8), (8, 4)]
    if blocks == 2:
        assert first["g1b1"] == (8, 8) and back["g1b1"] == (8, 8)
    assert dvae.encoder.input.kernel_size == (7, 7) and dvae.encoder.output.kernel_size == (1, 1)
    assert dvae.decoder.output.out_channels == 6 and dvae.decoder.input.kernel_size == (1, 1)
    kernels = [c.kernel_size[0] for c in dvae.decoder.g0b0.convs]
    assert kernels == [1, 3, 3, 3] and dvae.decoder.output.kernel_size == (1, 1)
    assert dvae.encoder.output.in_channels == 16 and dvae.decoder.output.in_channels == 4
    codes = dvae.decoder.g0up(torch.tensor([[[[1.0, 2.0]]]]))
    assert codes.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@torch.no_grad()
def test_a_first_batch_calibrates_both_ends() -> None:
    """Code logits have mean 0 and deviation 1; the output starts at each channel's median."""
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=5), 2)
    image = torch.rand(6, 3, 8, 8, generator=DRAWS)
    image[:, 0] = 0.25
    before = dvae.decoder.output.weight.clone()
    dvae.calibrate(image)
    logits = dvae.logits(image)
    torch.testing.assert_close(logits.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std((0, 2, 3)), torch.ones(5))
    torch.testing.assert_close(dvae.decoder.output.weight, 0.3 * before)
    location, log_scale = dvae.decoder.output.bias.view(2, 3)
    assert float(location[0]) == pytest.approx(math.log(0.3 / 0.7)) == -0.8472978603872034
    assert float(log_scale[0]) == pytest.approx(math.log(1e-3))
    spread = torch.logit(0.8 * image[:, 2].flatten() + 0.1)
    middle = spread.sort().values[(len(spread) - 1) // 2]
    assert float(location[2]) == pytest.approx(float(middle))
    assert float(log_scale[2]) == pytest.approx(float((spread - middle).abs().mean().log()))


@torch.no_grad()
def test_a_code_that_hardly_varies_is_made_at_most_a_million_times_as_strong() -> None:
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=5), 2)
    weight = dvae.encoder.output.weight
    weight[1] *= 1e-9
    before = weight[1].clone()
    dvae.calibrate(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(weight[1], before * 1e6)


@torch.no_grad()
def test_convolutions_read_pictures_channels_last() -> None:
    dvae = DVAE(DVAEConfig(pixels=8, width=8, groups=2, codebook=5))
    reader, seen = CodeReader(dvae), []

    def look(_: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0].is_contiguous(memory_format=torch.channels_last))

    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for read, convolution in (
        (dvae.tokens, dvae.encoder.input),
        (reader.codes, reader._body.input),
    ):
        convolution.register_forward_pre_hook(look)  # type: ignore[union-attr, arg-type]
        read(image)
    assert seen == [True, True]


@torch.no_grad()
def test_a_reader_compares_its_best_candidates_in_fp32() -> None:
    """Two nearly equal codes: bf16 alone cannot tell them apart, fp32 can."""
    draws = torch.Generator().manual_seed(0)
    config = DVAEConfig(pixels=4, width=8, groups=1, codebook=6, gain=0.7)
    dvae = DVAE(config, 5)
    weight = dvae.encoder.output.weight
    weight[1:] = weight[:1] + 1e-4 * torch.randn(5, *weight.shape[1:], generator=draws)
    dvae.encoder.output.bias[3] = 1e-5
    image = torch.rand(8, 3, 4, 4, generator=draws)
    reader = CodeReader(dvae, "bf16")
    states = reader._states((0.8 * image + 0.1).contiguous(memory_format=torch.channels_last))
    expected = dvae.encoder.output(states.float()).argmax(1).flatten(1)
    assert len(expected.unique()) > 2
    assert reader.codes(image).equal(expected)
    assert reader.device.type == "cpu"


def test_without_a_one_hot_layer_every_fan_in_counts() -> None:
    """Regardless of a layer's name."""
    for name in ("_", "line"):
        layers = nn.Sequential(OrderedDict([(name, nn.Linear(16, 2))]))
        init_fan_in(layers, 7)
        own = torch.Generator().manual_seed(key_int(7, f"{name}.weight", "init"))
        assert layers[0].weight.equal(torch.randn(2, 16, generator=own) / 4)


def test_a_layer_of_one_output_has_the_fan_in_of_its_row() -> None:
    layers = nn.Sequential(nn.Linear(16, 1))
    init_fan_in(layers, 7)
    own = torch.Generator().manual_seed(key_int(7, "0.weight", "init"))
    assert layers[0].weight.equal(torch.randn(1, 16, generator=own) / 4)


def test_first_weights_are_drawn_in_blocks_of_64_rows_by_name() -> None:
    """Rows 60..70 of a matrix; each block has its own Mersenne Twister."""
    part = Placement(shape=(130, 3), first=60, rows=10, split=True)
    weights = torch.empty(12, 3)
    draw_normal(7, {"a": 9.0, "w": 0.5}, "block.", "w", part, 0, weights.view(-1))
    blocks = [
        torch.empty(192).normal_(
            generator=torch.Generator().manual_seed(key_int(7, "block.w", number, "init"))
        )
        for number in (0, 1)
    ]
    expected = 0.5 * torch.cat(blocks).view(128, 3)[60:70]
    assert weights[:10].equal(expected) and not weights[10:].any()
    some = torch.empty(7)
    draw_normal(7, {"w": 0.5}, "block.", "w", part, 5, some)
    assert some.equal(expected.flatten()[5:12])
    with pytest.raises(KeyError, match="no initial scale"):
        draw_normal(7, {"v": 1.0}, "", "w", part, 0, torch.empty(3))
    odd = Placement(shape=(4,), first=0, rows=4, split=False)
    with pytest.raises(KeyError, match="neither a matrix"):
        draw_normal(7, {}, "", "odd", odd, 0, torch.empty(4))
    out = torch.full((6,), 5.0)
    draw_normal(7, {}, "", "x.bias", odd, 0, out)
    assert out.tolist() == [0] * 6
    out.fill_(5.0)
    draw_normal(7, {}, "", "final_norm.weight", odd, 2, out)
    assert out.tolist() == [1, 1, 0, 0, 0, 0]
    for name in ("norm1.weight", "norm.weight"):
        draw_normal(7, {}, "", name, odd, 0, out)
        assert out[:4].tolist() == [1] * 4


def test_scalars_and_what_nobody_knows_are_left_alone() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(3.0))
    module.weight = nn.Parameter(torch.zeros(4, 4))
    init_normal(module, 0, {"weight": 2.0})
    assert module.scale.item() == 3.0
    assert module.weight.detach().std() > 1.0


def test_a_clip_s_parts() -> None:
    config = ClipConfig(pixels=8, patch=4, dim=32, heads=2, layers=1, text_vocabulary=9)
    clip = Clip(config, 3)
    assert clip.place.num_embeddings == 4 and clip.patch.stride == (4, 4)
    assert float(clip.log_scale) == pytest.approx(2.6592600, rel=1e-6)  # ln(1 / 0.07)
    for name in (
        "words.weight",
        "patch.weight",
        "text_tower.layers.layers.0.self_attn.in_proj_weight",
    ):
        assert float(clip.state_dict()[name].std()) == pytest.approx(0.06, rel=0.12), name
    layer = clip.image_tower.layers.layers[0]
    assert layer.linear1.out_features == 128 and layer.norm_first and layer.dropout.p == 0
    grey, white = torch.full((1, 3, 8, 8), 0.5), torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        clip.patch.bias.fill_(0.3)
        bias_alone = clip.image_tower(clip.patch.bias.expand(1, 4, 32) + clip.place.weight)
        torch.testing.assert_close(clip.embed_image(grey), bias_alone)
        whole = clip.patch(white).flatten(2).transpose(1, 2)
        torch.testing.assert_close(
            clip.embed_image(white), clip.image_tower(whole + clip.place.weight)
        )
        text = torch.full((2, 24), -1)
        text[0, :2], text[1, :2] = torch.tensor([3, 4]), torch.tensor([4, 3])
        vectors = clip.embed_text(text)
        assert vectors.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
        assert float((vectors[0] - vectors[1]).norm()) > 1e-3, "order is heard"
        clip.words.weight[0] += 1.0
        torch.testing.assert_close(clip.embed_text(text), vectors)  # pads are not read as id 0
        batch = {"pixels": white, "text": text}
        clip.log_scale.fill_(9.0)
        assert float(clip(batch)[2]) == pytest.approx(100.0)
        clip.log_scale.fill_(1.0)
        assert float(clip(batch)[2]) == pytest.approx(math.e)
    assert not clip.image_tower.project.bias
    assert clip.image_tower.layers.enable_nested_tensor is False


@torch.no_grad()
def test_both_towers_by_torchs_functions() -> None:
    """Pre-norm blocks with GELU; the vector is the state of the summary token."""
    config = ClipConfig(
        pixels=4, patch=2, dim=8, heads=2, layers=2, text_length=3, text_vocabulary=5
    )
    clip, draws = Clip(config), torch.Generator().manual_seed(0)
    for p in clip.parameters():
        p.copy_(0.4 * torch.randn(p.shape, generator=draws))

    def tower(name: str, x: Tensor, real: Tensor) -> Tensor:
        w = {n.removeprefix(name): p for n, p in clip.named_parameters() if n.startswith(name)}

        def line(x: Tensor, name: str) -> Tensor:
            return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, (8,), w[f"{name}.weight"], w[f"{name}.bias"])

        for layer in ("layers.layers.0", "layers.layers.1"):
            into = f"{layer}.self_attn.in_proj_"
            all_three = F.linear(norm(x, f"{layer}.norm1"), w[into + "weight"], w[into + "bias"])
            q, k, v = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in all_three.chunk(3, 2))
            logits = (q @ k.mT / 2).masked_fill(~real[:, None, None], -torch.inf)
            heard = (logits.softmax(3) @ v).transpose(1, 2).flatten(2)
            x = x + line(heard, f"{layer}.self_attn.out_proj")
            wide = F.gelu(line(norm(x, f"{layer}.norm2"), f"{layer}.linear1"))
            x = x + line(wide, f"{layer}.linear2")
        out = norm(x[:, 0], "norm") @ w["project.weight"].T
        return out / out.norm(dim=1, keepdim=True)

    text = torch.tensor([[3, 1, -1], [2, -1, -1]])
    first = clip.text_tower.summary.weight.expand(2, 1, 8)
    words = clip.words.weight[text.clamp_min(0)] + clip.word_place.weight
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    expected = tower("text_tower.", torch.cat([first, words], 1), real)
    torch.testing.assert_close(clip.embed_text(text), expected)
    image = torch.rand(2, 3, 4, 4, generator=draws)
    first = clip.image_tower.summary.weight.expand(2, 1, 8)
    cut = F.unfold(2 * image - 1, 2, stride=2).transpose(1, 2)
    patches = F.linear(cut, clip.patch.weight.flatten(1), clip.patch.bias) + clip.place.weight
    expected = tower("image_tower.", torch.cat([first, patches], 1), torch.ones(2, 5).bool())
    torch.testing.assert_close(clip.embed_image(image), expected)


def test_a_contrastive_loss_by_hand() -> None:
    """Two pairs of unit vectors at scale ln 3: odds (3, 1) and (1, 3), thus ln 4/3 in both."""
    eye = torch.eye(2)
    keys = torch.tensor([1, 2])
    scale = torch.tensor(math.log(3))
    losses = contrastive_loss(eye, eye, scale, keys, lambda rows: rows, 0)
    assert float(losses["loss"]) == pytest.approx(0.2876821) and float(losses["accuracy"]) == 1.0
    turned = contrastive_loss(eye, eye.flip(0), scale, keys, lambda rows: rows, 0)
    assert float(turned["loss"]) == pytest.approx(1.3862944) and float(turned["accuracy"]) == 0.0
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # by picture ln 2 and ln 2; by text ln 4/3, ln 4
    mixed = contrastive_loss(eye, texts, scale, keys, lambda rows: rows, 0)
    assert float(mixed["loss"]) == pytest.approx((0.6931472 + 0.8369882) / 2)


def test_a_rank_finds_its_own_rows_among_all() -> None:
    """The second of two ranks: its rows are 2 and 3 of four."""
    draws = torch.Generator().manual_seed(4)
    images, texts = torch.randn(2, 4, 3, generator=draws)
    captions = torch.tensor([5, 6, 7, 5])
    rows = iter([captions, texts, images])
    losses = contrastive_loss(
        images[2:], texts[2:], torch.tensor(1.5), captions[2:], lambda _: next(rows), 2
    )
    by_image, by_text = 1.5 * images[2:] @ texts.T, 1.5 * texts[2:] @ images.T
    by_image[1, 0] = by_text[1, 0] = -torch.inf
    each = [x.log_softmax(1)[[0, 1], [2, 3]] for x in (by_image, by_text)]
    assert float(losses["loss"]) == pytest.approx(float(-(each[0] + each[1]).mean() / 2))


def test_keys_of_captions_as_a_congruential_generator_gives_them() -> None:
    """((0 + 3 + 2) * M + 1 + 2) * M modulo 2^64 with Knuth's M = 6364136223846793005."""
    m = 6364136223846793005
    expected = ((5 * m + 3) * m) % 2**64
    key = int(caption_keys(torch.tensor([[3, 1]]))[0]) % 2**64
    assert key == expected
