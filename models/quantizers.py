"""How a dVAE turns encoder outputs into codes: Gumbel-softmax, nearest vector (VQ), or FSQ.

Each quantizer maps (B, C, h, w) encoder outputs to decoder inputs of the same shape. Its weights
are trained by gradients like all others, so that every engine saves, resumes and reduces them;
moving averages of codebooks would need buffers of their own.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DVAEConfig
from models.initialization import generator
from models.keyed_noise import gumbel_noise
from models.logit_laplace import gumbel_codes, kl_to_uniform

POSITIONS_TOGETHER = 1024
"""Positions whose distances to all codes are computed together."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Decoder inputs of a batch, with what the loss needs."""

    inputs: Tensor
    """(B, C, h, w)."""
    penalty: Tensor
    """gumbel: mean KL of a position to the uniform prior, in nats. vq: mean squared difference of
    encoder outputs and code vectors. fsq: zero."""


class Quantizer(nn.Module):
    """Encoder outputs <-> codes."""

    penalty = ""
    """Name of the penalty in metrics; empty if it has none."""
    spread = 1.0
    """Standard deviation of encoder outputs to begin with."""

    def forward(self, outputs: Tensor, tau: Tensor, keys: Tensor) -> Quantized:
        """Decoder inputs that gradients pass through, for one draw.

        Shapes: (B, C, h, w), scalar, (B,) int64 noise keys.
        """
        raise NotImplementedError

    def codes(self, outputs: Tensor) -> Tensor:
        """The codes, without noise: (B, C, h, w) -> (B, h, w) int64."""
        raise NotImplementedError

    def inputs(self, codes: Tensor) -> Tensor:
        """Decoder inputs of codes: (B, h, w) -> (B, C, h, w)."""
        raise NotImplementedError

    def calibrate(self, outputs: Tensor, seed: int) -> None:
        """Fit initial weights to the encoder outputs of a first batch."""


class Gumbel(Quantizer):
    """The paper's: encoder outputs are logits, relaxed by Gumbel noise.

    Source: arXiv 2102.12092, section 2.1.
    """

    penalty = "kl"

    def __init__(self, codebook: int) -> None:
        super().__init__()
        self._codebook = codebook

    def forward(self, outputs: Tensor, tau: Tensor, keys: Tensor) -> Quantized:
        noise = gumbel_noise(keys, tuple(outputs.shape[1:]))
        return Quantized(
            inputs=gumbel_codes(outputs, tau, noise), penalty=kl_to_uniform(outputs).mean()
        )

    def codes(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def inputs(self, codes: Tensor) -> Tensor:
        return F.one_hot(codes, self._codebook).permute(0, 3, 1, 2).float()


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The codes of smallest Euclidean distance, some positions at a time to bound memory.

    Shapes: (n, D) and (K, D) -> (n,) int64.
    """
    squares = codebook.square().sum(1)
    parts = vectors.split(POSITIONS_TOGETHER)
    return torch.cat([torch.addmm(squares, p, codebook.T, alpha=-2).argmin(1) for p in parts])


class Codebook(nn.Embedding):
    """The vectors of VQ's codes, (K, C)."""

    def forward(  # type: ignore[override]
        self, vectors: Tensor | None, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and their vectors: of the given codes, else the nearest of (n, C) vectors.

        One call does both, because ZeRO-3 holds the weight only during a call.
        """
        if codes is None:
            assert vectors is not None, "either vectors or codes"
            codes = nearest_codes(vectors.detach(), self.weight.detach())
        return codes, F.embedding(codes, self.weight)


class NearestVector(Quantizer):
    """VQ: the nearest vector of a learned codebook, with gradients by the rotation trick.

    Sources: arXiv 1711.00937, equation 3, with equal weights of its last two terms: AdamW does not
    see the scale of the codebook's; arXiv 2410.06424.
    """

    penalty = "commitment"

    def __init__(self, codebook: int, channels: int) -> None:
        super().__init__()
        self.codebook = Codebook(codebook, channels)

    def forward(self, outputs: Tensor, tau: Tensor, keys: Tensor) -> Quantized:
        from vector_quantize_pytorch.vector_quantize_pytorch import (  # noqa: PLC0415 - a second
            rotate_to,
        )

        x = outputs.permute(0, 2, 3, 1)
        flat = x.flatten(0, 2)
        _, vectors = self.codebook(flat)
        turned: Tensor = rotate_to(flat, vectors.detach())
        return Quantized(
            inputs=turned.view(x.shape).permute(0, 3, 1, 2), penalty=F.mse_loss(vectors, flat)
        )

    def codes(self, outputs: Tensor) -> Tensor:
        x = outputs.permute(0, 2, 3, 1)
        codes: Tensor = self.codebook(x.flatten(0, 2))[0]
        return codes.view(x.shape[:3])

    def inputs(self, codes: Tensor) -> Tensor:
        vectors: Tensor = self.codebook(None, codes)[1]
        return vectors.permute(0, 3, 1, 2)

    @torch.no_grad()
    def calibrate(self, outputs: Tensor, seed: int) -> None:
        """Start from encoder outputs, each drawn with odds of its squared distance to the others.

        Codes from a normal distribution would mostly be dead: no output is nearest to them, so that
        no gradient moves them.
        Source: k-means++.
        """
        rows, draws = outputs.permute(0, 2, 3, 1).flatten(0, 2), generator(seed, "codebook")
        weight = self.codebook.weight
        distance = torch.full((len(rows),), torch.inf, device=rows.device)
        odds = torch.ones(len(rows), device="cpu")
        for code in range(len(weight)):
            weight[code] = rows[int(torch.multinomial(odds, 1, generator=draws))]
            distance = distance.minimum((rows - weight[code]).square().sum(1))
            odds = distance.double().cpu() + torch.finfo(torch.float32).tiny


class FiniteScalar(Quantizer):
    """FSQ: each channel is bounded and rounded to one of a few levels; it learns no codebook.

    Bounds are those of outputs / `spread`. AdamW moves an output by up to the learning rate times
    its inputs a step, and what is beyond the bounds has no gradient to come back: at a spread of 1
    whole channels stayed there (docs/LOG.md).
    Source: arXiv 2309.15505; the layer of vector-quantize-pytorch.
    """

    spread = 32.0

    def __init__(self, levels: tuple[int, ...]) -> None:
        from vector_quantize_pytorch import FSQ  # noqa: PLC0415 - takes a second

        super().__init__()
        with torch.device("cpu"):  # it reads its constants, also while shapes alone are built
            self.layer: Any = FSQ(list(levels))

    def forward(self, outputs: Tensor, tau: Tensor, keys: Tensor) -> Quantized:
        return Quantized(inputs=self.layer(outputs / self.spread)[0], penalty=outputs.new_zeros(()))

    def codes(self, outputs: Tensor) -> Tensor:
        codes: Tensor = self.layer(outputs / self.spread)[1]
        return codes.long()

    def inputs(self, codes: Tensor) -> Tensor:
        inputs: Tensor = self.layer.indices_to_codes(codes)
        return inputs


def build_quantizer(config: DVAEConfig) -> Quantizer:
    """The quantizer of a dVAE; weights of its codebook are not set."""
    if config.quantizer == "vq":
        return NearestVector(config.codebook, config.code_channels)
    if config.quantizer == "fsq":
        assert prod(config.levels) == config.codebook, "config.problems() was not asked"
        return FiniteScalar(config.levels)
    return Gumbel(config.codebook)
