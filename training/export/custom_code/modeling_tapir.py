"""Tapir's text-to-image models for the `transformers` library, without Tapir.

`tapir export` writes this file, and those that it imports, beside the weights:

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    captions = ["a small red circle"]
    text = model.text_ids(tokenizer, captions, candidates=4)
    noise = model.keyed_noise(captions, candidates=4, seed=0)
    pictures = model.pictures(model.generate(text, logits_processor=[noise]))

Without a processor, `generate` takes the most likely codes. `model.encode(pictures)` gives codes;
some of their first ones after the text are an image prompt.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .dvae_tapir import Quantizer, coder
from .keyed_noise_tapir import KeyedNoise, candidate_key
from .prior_tapir import PAD, PriorBlock, PriorEmbedding, PriorHead


class TapirConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the prior and of the dVAE, by Tapir's names; None where the folder has none."""

    model_type = "tapir"

    def __init__(
        self, prior: dict[str, Any] | None = None, dvae: dict[str, Any] | None = None, **others: Any
    ) -> None:
        self.prior, self.dvae = prior, dvae
        sizes = prior or {}
        self.num_hidden_layers = sizes.get("layers", 0)
        self.hidden_size = sizes.get("dim", 0)
        self.num_attention_heads = sizes.get("heads", 0)
        self.vocab_size = sizes.get("image_vocabulary", 0)
        super().__init__(**others)


@dataclass
class TapirOutput(ModelOutput):  # type: ignore[misc]
    """What the prior computes."""

    logits: Tensor | None = None
    """(B, n, codes): of each code in `input_ids` and of the next one, or of the last ones."""
    text_logits: Tensor | None = None
    """(B, text_length, text vocabulary), if asked for."""


class TapirModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A prior and the dVAE whose codes it draws.

    `input_ids` are (B, text_length + n): `text_ids` of captions, then n codes.
    """

    config_class = TapirConfig
    main_input_name = "input_ids"

    def __init__(self, config: TapirConfig) -> None:
        super().__init__(config)
        prior, dvae = config.prior, config.dvae
        self.text_length = prior["text_length"] if prior else 0
        self.image_length = 0
        self._blocks: list[str] = []
        if dvae:
            self.grid = dvae["pixels"] >> (dvae["groups"] - 1)
            self.image_length = self.grid**2
            self.encoder, self.decoder = coder(dvae, False), coder(dvae, True)
            self.quantizer = Quantizer(dvae)
        if prior:
            self.image_length = prior["grid"] * (prior["columns"] or prior["grid"])
            self.embedding = PriorEmbedding(prior)
            for layer in range(prior["layers"]):
                self._blocks.append(f"block{layer:03d}")
                self.add_module(self._blocks[-1], PriorBlock(prior, layer))
            self.head = PriorHead(prior, self.embedding)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        text_logits: bool = False,
        canonical: bool = False,
        **_: Any,
    ) -> TapirOutput:
        """Logits of codes; the last code of a whole picture is not read.

        `cache`, or `past_key_values` of older releases, holds what was computed before;
        `logits_to_keep`: of the last positions alone, 0 = all; `canonical`: in the one layout of
        the weights in which Tapir computes again what rounding could change, slow.
        """
        self._check(input_ids)
        cache = past_key_values if cache is None else cache
        first = 0 if cache is None else int(cache.get_seq_length())
        x = self.embedding(input_ids, first)
        for name in self._blocks:
            x = getattr(self, name)(x, first, cache, canonical)
        text = max(self.text_length - first, 0)
        image = x[:, text:]
        return TapirOutput(
            logits=self.head(image[:, -logits_to_keep:], "image", canonical),
            text_logits=self.head(x[:, :text], "text", canonical) if text_logits else None,
        )

    def _check(self, input_ids: Tensor) -> None:
        if not self._blocks:
            raise ValueError("this folder holds no prior, which draws codes; export one with it")
        least, most = self.text_length, self.text_length + self.image_length
        if not least <= input_ids.shape[1] <= most:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} columns, and need {least} of text, by "
                f"model.text_ids(tokenizer, captions), and at most {self.image_length} codes"
            )

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        """As `GenerationMixin.generate`. Raises: ValueError for guidance."""
        config = settings.get("generation_config") or self.generation_config
        scale = settings.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={scale}: this code computes no guidance; leave it out, or draw by "
                "`tapir sample --guidance`"
            )
        return super().generate(*arguments, **settings)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **_: Any
    ) -> dict[str, Any]:
        """All ids: `forward` computes those that the cache has not."""
        if input_ids.shape[1] >= self.text_length + self.image_length:
            raise ValueError(
                f"all {self.image_length} codes of a picture are there; leave out max_new_tokens "
                "and max_length, which generation_config.json sets"
            )
        cache = past_key_values if cache is None else cache
        return {"input_ids": input_ids, "cache": cache, "logits_to_keep": 1}

    @torch.no_grad()
    def canonical_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the next code without the cache, (B, codes).

        In fp32 on a CPU of one kind, with one torch, those of Tapir bit for bit.
        """
        logits: Tensor = self(input_ids, logits_to_keep=1, canonical=True).logits[:, 0]
        return logits

    def text_ids(self, tokenizer: Any, captions: Sequence[str], candidates: int = 1) -> Tensor:
        """Ids of captions, cut and padded to the prior's text length, of each `candidates` rows.

        Shapes: -> (B * candidates, text_length) int64. `tokenizer`: of AutoTokenizer, or of the
        tokenizers library.
        """
        rows = []
        for caption in captions:
            encoded = tokenizer.encode(_lowered(caption), add_special_tokens=False)
            read = list(getattr(encoded, "ids", encoded))[: self.text_length]
            rows.append(read + [PAD] * (self.text_length - len(read)))
        ids = torch.tensor(rows, device=self.device)
        return ids.repeat_interleave(candidates, 0)

    def keyed_noise(
        self, captions: Sequence[str], candidates: int = 1, seed: int = 0, temperature: float = 1.0
    ) -> KeyedNoise:
        """The noise of `tapir sample --seed SEED` for the rows of `text_ids`."""
        keys = [candidate_key(seed, text, i) for text in captions for i in range(candidates)]
        exact = self.canonical_logits if self.dtype == torch.float32 else None
        return KeyedNoise(keys, self.text_length, temperature, exact)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures of codes, or of what `generate` returns: (B, ...) -> (B, 3, S, S) in [0, 1].

        In fp32 those of Tapir to 1e-6: convolutions choose their kernels by threads and batch.
        """
        dvae = self._dvae()
        grid = codes[:, -self.image_length :].reshape(-1, self.grid, self.grid)
        inputs = self.quantizer.inputs(grid).to(self.dtype)
        location: Tensor = self.decoder(inputs).chunk(2, 1)[0].float()
        epsilon: float = dvae["epsilon"]
        pictures: Tensor = (location.sigmoid() - epsilon) / (1 - 2 * epsilon)
        return pictures.clamp(0, 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Codes of pictures in [0, 1]: (B, 3, S, S) -> (B, image_length) int64."""
        epsilon: float = self._dvae()["epsilon"]
        squeezed = (1 - 2 * epsilon) * pictures.to(self.dtype) + epsilon
        outputs = self.encoder(squeezed.contiguous(memory_format=torch.channels_last))
        return self.quantizer.codes(outputs.float()).flatten(1)

    def _dvae(self) -> dict[str, Any]:
        sizes: dict[str, Any] | None = self.config.dvae
        if not sizes:
            raise ValueError(
                "this folder holds no dVAE of Tapir's; decode codes by the image tokenizer that "
                "the prior was trained with"
            )
        return sizes

    def _init_weights(self, module: Any) -> None:
        """Nothing: all weights are in the folder."""


def _lowered(text: str) -> str:
    """Lower-case the letters of Unicode 3.2, as in training."""
    runs = groupby(text, lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
    return "".join("".join(run).lower() if known else "".join(run) for known, run in runs)
