"""The layers that travel with an export compute, bit for bit, what Tapir's models do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config import to_json
from generation.sampling.decoder import Decoder, LocalPrior
from models.config import DVAEConfig, PriorConfig
from models.dvae import DVAE
from tests.unit.models.test_models import CONFIG, trained_like
from tests.unit.models.test_pins_modern import ALL, OPTIONS
from training.export.custom_code.dvae_tapir import Quantizer, coder
from training.export.custom_code.prior_tapir import PriorBlock, PriorEmbedding, PriorHead

CASES: dict[str, dict[str, Any]] = {
    **{"paper": {}, **OPTIONS, "all": ALL},
    "narrow": {**ALL, "grid": 5, "columns": 2},
    "one layer": {"layers": 1, "conv_kernel": 3},
    "six layers": {**ALL, "layers": 6, "conv_kernel": 5, "columns": 7},
}


class Prior(nn.Module):
    """The layers as TapirModel has them."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        sizes = to_json(config)
        self.embedding = PriorEmbedding(sizes)
        for layer in range(config.layers):
            self.add_module(f"block{layer:03d}", PriorBlock(sizes, layer))
        self.head = PriorHead(sizes, self.embedding)
        self.blocks: list[Any] = [m for n, m in self.named_children() if n.startswith("block")]

    def forward(
        self, ids: Tensor, first: int = 0, cache: Any = None, canonical: bool = False
    ) -> Tensor:
        x = self.embedding(ids, first)
        for block in self.blocks:
            x = block(x, first, cache, canonical)
        return x


class Cache:
    """What `update` of transformers' DynamicCache does."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


def models(options: dict[str, Any]) -> tuple[PriorConfig, nn.ModuleDict, Prior, Tensor]:
    """Tapir's prior, that of the export with its weights, and ids of text and codes."""
    config = replace(CONFIG, **options)
    layers, mine = trained_like(config), Prior(config)
    mine.load_state_dict({name: p.detach() for name, p in layers.named_parameters()})
    draws = torch.Generator().manual_seed(1)
    text = torch.randint(0, 30, (3, config.text_length), generator=draws)
    text[0, 3:] = -1
    codes = torch.randint(0, 20, (3, config.image_length), generator=draws)
    return config, layers, mine, torch.cat([text, codes], 1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_canonical_logits_are_those_of_tapir_bit_for_bit(case: str) -> None:
    config, layers, mine, ids = models(CASES[case])
    decoder, text = Decoder(LocalPrior(layers=layers, config=config)), config.text_length
    for count in range(1, config.image_length + 1):
        expected = decoder.canonical_logits(ids[:, :text], ids[:, text : text + count])
        assert expected is not None
        x = mine(ids[:, : text + count - 1], canonical=True)
        assert mine.head(x[:, -1:], "image", True)[:, 0].equal(expected), count


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_of_text_and_codes_are_those_of_the_training_prior(case: str) -> None:
    config, layers, mine, ids = models(CASES[case])
    text = config.text_length
    state: Any = {"text": ids[:, :text], "image": ids[:, text:]}
    for layer in layers.values():
        state = layer(state)
    x = mine(ids)
    assert x.shape[1] == config.length
    near = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(mine.head(x[:, :text], "text", False), state.text, **near)
    torch.testing.assert_close(mine.head(x[:, text:], "image", False), state.image, **near)


@pytest.mark.parametrize("prompt", [0, 1, 9])
@pytest.mark.parametrize("case", ["paper", "all", "narrow"])
@torch.no_grad()
def test_steps_with_a_cache_compute_what_the_whole_stream_does(case: str, prompt: int) -> None:
    config, _, mine, ids = models(CASES[case])
    text, whole, cache, first = config.text_length, mine.double()(ids), Cache(), 0
    for count in range(prompt, config.image_length):
        x = mine(ids[:, : text + count], first, cache)
        assert x.shape[1] == text + count + 1 - first
        torch.testing.assert_close(x, whole[:, first : text + count + 1], rtol=0.0, atol=1e-12)
        first = text + count + 1


QUANTIZERS: dict[str, dict[str, Any]] = {
    "gumbel": {},
    "gain of the paper": {"gain": 0.0, "groups": 2, "blocks": 2, "bottleneck": 4},
    "vq": {"quantizer": "vq", "vector": 3},
    "fsq": {"quantizer": "fsq", "levels": (4, 3, 5), "codebook": 60},
}


@pytest.mark.parametrize("case", QUANTIZERS)
@torch.no_grad()
def test_a_dvae_encodes_and_decodes_as_tapirs(case: str) -> None:
    small = DVAEConfig(pixels=16, width=8, codebook=32, code_width=8, epsilon=0.2)
    config = replace(small, **QUANTIZERS[case])
    network, sizes = DVAE(config, 3), to_json(config)
    draws = torch.Generator().manual_seed(2)
    for p in network.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=draws))
    mine = nn.ModuleDict(
        {
            "encoder": coder(sizes, False),
            "decoder": coder(sizes, True),
            "quantizer": Quantizer(sizes),
        }
    )
    mine.load_state_dict({name: p.detach() for name, p in network.named_parameters()})
    pictures = torch.rand(5, 3, 16, 16, generator=draws)
    quantizer: Any = mine["quantizer"]
    outputs = 40 * network.logits(pictures)  # FSQ at its bounds, too
    codes = network.quantizer.codes(outputs)
    assert quantizer.codes(outputs).equal(codes) and len(codes.unique()) > 4
    drawn = torch.randint(0, config.codebook, codes.shape, generator=draws)
    assert quantizer.inputs(drawn).equal(network.quantizer.inputs(drawn))
    squeezed = (0.6 * pictures + 0.2).contiguous(memory_format=torch.channels_last)
    assert mine["encoder"](squeezed).equal(network.logits(pictures))
    location = mine["decoder"](quantizer.inputs(drawn)).chunk(2, 1)[0]
    assert location.equal(network.decode(network.quantizer.inputs(drawn))[0])
