"""The model of an export, in this process: what it computes is what Tapir does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config import to_json
from core.keys import key_int
from data_pipeline.text.bpe import encode, train_bpe
from generation.sampling.decoder import Decoder, LocalPrior
from models.config import DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.logit_laplace import squeeze_pixels
from models.third_party import foreign_module
from tests.unit.models.test_models import CONFIG, prior_logits, trained_like

pytestmark = pytest.mark.seconds
PRIOR = replace(CONFIG, image_vocabulary=32, conv_kernel=3)
IMAGES = DVAEConfig(pixels=16, width=8, codebook=32, code_width=8, epsilon=0.2)
TEXT, CODES = PRIOR.text_length, PRIOR.image_length


@pytest.fixture(scope="module")
def modeling() -> Any:
    return foreign_module("training.export.custom_code.modeling_tapir")


def _model(modeling: Any, prior: PriorConfig | None, dvae: DVAEConfig | None) -> Any:
    """A model with the weights of `_networks`."""
    sizes = {"prior": prior and to_json(prior), "dvae": dvae and to_json(dvae)}
    model = modeling.TapirModel(modeling.TapirConfig(**sizes)).eval()
    layers, network = _networks()
    named = {**dict(layers.named_parameters()), **dict(network.named_parameters())}
    model.load_state_dict({name: named[name].detach() for name, _ in model.named_parameters()})
    return model


def _networks() -> tuple[nn.ModuleDict, DVAE]:
    """Tapir's prior and dVAE."""
    network, draws = DVAE(IMAGES, 3), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return trained_like(PRIOR), network


@pytest.fixture(scope="module")
def model(modeling: Any) -> Any:
    return _model(modeling, PRIOR, IMAGES)


def _ids() -> Tensor:
    draws = torch.Generator().manual_seed(1)
    text = torch.randint(0, 30, (3, TEXT), generator=draws)
    text[0, 3:] = -1
    return torch.cat([text, torch.randint(0, 32, (3, CODES), generator=draws)], 1)


@torch.no_grad()
def test_logits_of_a_whole_stream_and_of_its_last_positions(model: Any) -> None:
    ids, (layers, _) = _ids(), _networks()
    expected = prior_logits(layers, {"text": ids[:, :TEXT], "image": ids[:, TEXT:]})
    out = model(ids, text_logits=True)
    assert out.logits.shape == (3, CODES, 32) and out.text_logits.shape == (3, TEXT, 30)
    near = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(out.logits, expected, **near)
    assert model(ids).text_logits is None
    for count in (0, 1, 5, CODES - 1):
        part = model(ids[:, : TEXT + count])
        assert part.logits.shape == (3, count + 1, 32)
        torch.testing.assert_close(part.logits, expected[:, : count + 1], **near)
        last = model(ids[:, : TEXT + count], logits_to_keep=1).logits
        torch.testing.assert_close(last, expected[:, count : count + 1], **near)


@torch.no_grad()
def test_only_canonical_logits_are_computed_in_the_canonical_layout(model: Any) -> None:
    asked: list[Any] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[-1]))
    model(_ids())
    model.canonical_logits(_ids()[:, :-1])
    handle.remove()
    assert asked == [False, True]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_goes_on_where_it_ended(name: str, model: Any) -> None:
    from transformers import DynamicCache

    ids, whole = _ids(), model(_ids()).logits
    cache = DynamicCache()
    for count in (0, 1, 2, 7):  # several codes at once, too
        given = {name: cache}
        out = model(ids[:, : TEXT + count], logits_to_keep=1, **given).logits
        torch.testing.assert_close(out[:, 0], whole[:, count], rtol=0.0, atol=1e-5)
        assert cache.get_seq_length() == TEXT + count + 1
    with_text = model(ids[:, : TEXT + 8], text_logits=True, **{name: cache})
    assert with_text.text_logits.shape[1] == 0 and with_text.logits.shape[1] == 1


@torch.no_grad()
def test_canonical_logits_are_those_of_tapir_bit_for_bit(model: Any) -> None:
    ids, (layers, _) = _ids(), _networks()
    decoder = Decoder(LocalPrior(layers=layers, config=PRIOR))
    for count in range(CODES):
        expected = decoder.canonical_logits(ids[:, :TEXT], ids[:, TEXT : TEXT + count + 1])
        assert model.canonical_logits(ids[:, : TEXT + count]).equal(expected), count


def test_generated_codes_are_the_most_likely_ones_of_each_position(model: Any) -> None:
    from transformers import GenerationConfig

    text, ids = _ids()[:, :TEXT], _ids()[:, :TEXT]
    for _ in range(CODES):
        code = model.canonical_logits(ids).argmax(1, keepdim=True)
        ids = torch.cat([ids, code], 1)
    settings = {"do_sample": False, "max_length": TEXT + CODES}
    assert model.generate(text, **settings).equal(ids)
    assert model.generate(ids[:, : TEXT + 4], **settings).equal(ids), "an image prompt"
    with pytest.raises(ValueError, match="all 16 codes"):
        model.generate(ids, do_sample=False, max_new_tokens=1)
    with pytest.raises(ValueError, match="computes no guidance; leave it out"):
        model.generate(text, guidance_scale=1.5, **settings)
    assert model.generate(text, guidance_scale=1, **settings).equal(ids)
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0"):
        model.generate(text, generation_config=GenerationConfig(guidance_scale=2.0, **settings))
    step = {"input_ids": text, "cache": "cache", "logits_to_keep": 1}
    assert model.prepare_inputs_for_generation(text, cache="cache") == step
    assert model.prepare_inputs_for_generation(text, past_key_values="cache") == step


def test_pictures_and_codes_are_those_of_tapir_bit_for_bit(model: Any) -> None:
    _, network = _networks()
    codes = _ids()[:, TEXT:]
    with torch.no_grad():
        pictures = network.picture(codes)
        read = network.tokens(pictures)
    assert model.pictures(_ids()).equal(pictures) and model.pictures(codes).equal(pictures)
    assert pictures.shape == (3, 3, 16, 16) and pictures.min() == 0 and pictures.max() == 1
    given: list[Tensor] = []
    handle = model.encoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    assert model.encode(pictures).equal(read) and len(read.unique()) > 2
    handle.remove()
    assert given[0].equal(squeeze_pixels(pictures, 0.2))
    assert given[0].is_contiguous(memory_format=torch.channels_last)


class _Plain:
    """A tokenizer that gives a list, as those of transformers do."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(c) for c in text]


def test_captions_become_ids_as_in_training(model: Any) -> None:
    captions = ["a Small RED circle", "İstanbul Σ", ""]
    tokenizer = train_bpe(["a small red circle"], 270)
    rows = [encode(tokenizer, caption)[:TEXT] for caption in captions]
    expected = torch.tensor([row + [-1] * (TEXT - len(row)) for row in rows], device="cpu")
    assert model.text_ids(tokenizer, captions).equal(expected)
    assert model.text_ids(tokenizer, captions, 2).equal(expected.repeat_interleave(2, 0))
    assert {len(row) for row in rows} >= {0, TEXT}, "one is cut, one is padding alone"
    with torch.device("meta"):  # ids are where the model is
        assert model.text_ids(tokenizer, captions).equal(expected)
    assert model.text_ids(_Plain(), ["AB"]).tolist() == [[97, 98, -1, -1, -1, -1]]


def test_each_row_has_the_noise_of_its_caption_and_candidate(model: Any) -> None:
    noise = model.keyed_noise(["a", "b"], candidates=2, seed=5, temperature=0.5)
    keys = [key_int(5, text, i, "sample") for text in ("a", "b") for i in range(2)]
    logits = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    ids = _ids()[[0, 0, 1, 2], : TEXT + 3]
    expected = foreign_module("training.export.custom_code.keyed_noise_tapir").KeyedNoise(
        keys, TEXT, 0.5, model.canonical_logits
    )
    assert noise(ids, logits).equal(expected(ids, logits))
    usual = model.keyed_noise(["a"])(ids[:1], logits[:1])
    first = [key_int(0, "a", 0, "sample")]
    assert usual.equal(type(noise)(first, TEXT, 1.0, model.canonical_logits)(ids[:1], logits[:1]))
    tied = torch.zeros_like(logits)  # of a row whose codes rounding could swap
    cold = model.keyed_noise(["a", "b"], candidates=2, temperature=0.0)
    assert cold(ids, tied).equal(torch.cat([model.canonical_logits(row[None]) for row in ids]))


def test_what_a_folder_lacks_is_named(modeling: Any, model: Any) -> None:
    alone, images = _model(modeling, PRIOR, None), _model(modeling, None, IMAGES)
    assert (alone.text_length, alone.image_length) == (TEXT, CODES)
    assert (images.text_length, images.image_length, images.grid) == (0, 16, 4)
    for call in (lambda: alone.pictures(_ids()), lambda: alone.encode(torch.zeros(1, 3, 16, 16))):
        with pytest.raises(ValueError, match="no dVAE of Tapir's; decode codes by the image"):
            call()
    with pytest.raises(ValueError, match="holds no prior"):
        images(_ids())
    for columns in (TEXT - 1, TEXT + CODES + 1):
        ids = torch.zeros(1, columns, dtype=torch.int64)
        with pytest.raises(ValueError, match=rf"have {columns} columns, and need {TEXT} of text"):
            model(ids)
    config = model.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert (*sizes, config.vocab_size) == (4, 48, 3, 32)
    none = modeling.TapirConfig()
    sizes = (none.num_hidden_layers, none.hidden_size, none.num_attention_heads, none.vocab_size)
    assert sizes == (0, 0, 0, 0)
    empty = modeling.TapirModel(none)
    assert (empty.text_length, empty.image_length) == (0, 0)
