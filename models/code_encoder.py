"""The dVAE's encoder for inference on many pictures: channels last, bf16, no autograd graph.

In bf16, residual branches run in 16 bits. The identity path and the first convolution stay in fp32
(like the transformer in the paper, appendix D), because bf16 resolves fewer levels than a pixel
has. The last convolution runs in 16 bits to find each position's best candidates; their logits are
then recomputed in fp32.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from models.dvae import DVAE, ResidualBlock
from models.logit_laplace import squeeze_pixels

Precision = Literal["fp32", "bf16"]
CANDIDATES = 8
"""Codes per position that are recomputed; the error of bf16 logits is below their spread."""


class CodeReader:
    """Turns pictures into a dVAE's codes."""

    def __init__(self, dvae: DVAE, precision: Precision = "fp32") -> None:
        self.config, self._half = dvae.config, precision == "bf16"
        encoder = copy.deepcopy(dvae.encoder).eval().requires_grad_(False)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        body, output = encoder[:-1], encoder[-1]
        assert isinstance(body, nn.Sequential) and isinstance(output, nn.Conv2d)
        self._body, self._output = body, output
        self._quantizer = copy.deepcopy(dvae.quantizer).eval()
        for block in self._body:
            if isinstance(block, ResidualBlock):
                for parameter in block.convs[-1].parameters():
                    parameter.mul_(block.gain)
        self._weight = self._output.weight.flatten(1)
        if self._half:
            for block in self._body:
                if isinstance(block, ResidualBlock):
                    block.convs.to(torch.bfloat16)
            self._weight16 = self._weight.to(torch.bfloat16)

    @property
    def device(self) -> torch.device:
        """Device that the pictures must be on."""
        return self._weight.device

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """The most likely codes, without noise: (B, 3, S, S) in [0, 1] -> (B, grid * grid)."""
        x = squeeze_pixels(image, self.config.epsilon)
        x = x.contiguous(memory_format=torch.channels_last)
        if not self._half or self.config.quantizer != "gumbel":
            return self._quantizer.codes(self._output(self._states(x))).flatten(1)
        states = self._states(x).permute(0, 2, 3, 1).flatten(0, 2)
        assert self._output.bias is not None
        bias = self._output.bias.to(torch.bfloat16)
        rough = torch.addmm(bias, states.to(torch.bfloat16), self._weight16.T)
        count = min(CANDIDATES, rough.shape[1])
        best = rough.topk(count, 1).indices
        logits: Tensor = torch.einsum("pd,pkd->pk", states, self._weight[best])
        logits += self._output.bias[best]
        chosen = best.gather(1, logits.argmax(1, keepdim=True))
        return chosen.view(len(image), -1)

    def _states(self, x: Tensor) -> Tensor:
        """Inputs of the last convolution; reuses buffers in place."""
        for layer in self._body:
            x = _residual(x, layer) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def _residual(x: Tensor, block: ResidualBlock) -> Tensor:
    """The block, whose gain is folded into its last convolution."""
    *inner, last = block.convs
    h = x.to(next(block.convs.parameters()).dtype, copy=True).relu_()
    for conv in inner:
        h = conv(h).relu_()
    out: Tensor = block.identity(x)
    out = out.add_(last(h))
    return out
