"""The dVAE as a program of one layer: its network, optional losses, and their sum.

A discriminator is a part of the same layer. One backward pass trains both: its scores of
reconstructions enter once with constant weights, for the dVAE, and once with constant pictures, for
itself. So every engine reduces, saves and resumes it like all other weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.config import DVAEConfig
from models.critics.discriminator import Discriminator, hinge_loss
from models.critics.perceptual import Perceptual
from models.dvae import DVAE, DVAETerms, negative_bound
from models.logit_laplace import unsqueeze_pixels
from parallel.engines.protocol import Batch, Layer, Losses, Program
from training.config import DVAETrain
from training.tasks.dvae_config import DiscriminatorConfig, PerceptualConfig


@dataclass(frozen=True, kw_only=True)
class ExtraLosses:
    """The optional losses of a run."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    seed: int = 0
    """Of the discriminator's initial weights."""

    @staticmethod
    def of(settings: DVAETrain) -> "ExtraLosses":
        """Those that a run's settings ask for."""
        return ExtraLosses(
            perceptual=settings.perceptual,
            discriminator=settings.discriminator,
            seed=settings.loop.seed,
        )


class DVAELayer(nn.Module):
    """A dVAE with the networks of its optional losses."""

    def __init__(self, dvae: DVAE, extra: ExtraLosses) -> None:
        super().__init__()
        self.dvae = dvae
        self.perceptual = Perceptual() if extra.perceptual.weight else None
        chosen = extra.discriminator
        self.discriminator = None
        if chosen.weight:
            self.discriminator = Discriminator(chosen.width, chosen.layers, extra.seed)

    def forward(self, batch: Batch) -> Any:
        """The dVAE's terms, and the mean of each optional loss by name."""
        pixels = batch["pixels"]
        terms, _ = self.dvae(pixels, batch["tau"], batch["keys"])
        extra: dict[str, Tensor] = {}
        if self.perceptual is None and self.discriminator is None:
            return terms, extra
        again = unsqueeze_pixels(terms.location, self.dvae.config.epsilon)
        if self.perceptual is not None:
            extra["perceptual"] = self.perceptual(again, pixels).mean()
        if self.discriminator is not None:
            extra["adversarial"] = -self.discriminator(again, fixed=True).mean()
            both = self.discriminator(torch.cat([pixels, again.detach()]))
            extra["discriminator"] = hinge_loss(*both.chunk(2))
        return terms, extra


def dvae_program(dvae: DVAE, config: DVAEConfig, extra: ExtraLosses | None = None) -> Program:
    """A dVAE as one layer, with its loss.

    `loss` counts neither adversarial loss: it stays comparable over a run, and they have rows of
    their own. Their gradients count.
    """
    extra = extra or ExtraLosses()
    layer = DVAELayer(dvae, extra)
    penalty = dvae.quantizer.penalty

    def loss(state: Any, batch: Batch) -> Losses:
        terms: DVAETerms
        terms, more = state
        total = negative_bound(terms, batch["beta"], config)
        if "perceptual" in more:
            total = total + extra.perceptual.weight * more["perceptual"]
        losses = {"log_likelihood": terms.log_likelihood}
        if penalty:
            losses[penalty] = terms.penalty
        if "discriminator" in more:
            weight = extra.discriminator.weight * batch["adversarial"]
            adversarial = more["discriminator"] + weight * more["adversarial"]
            total = total + (adversarial - adversarial.detach())
        return {"loss": total, **losses, **more}

    names = ["loss", "log_likelihood", *([penalty] if penalty else [])]
    names += ["perceptual"] if layer.perceptual is not None else []
    names += ["adversarial", "discriminator"] if layer.discriminator is not None else []
    return Program(layers=[Layer(name="dvae", build=lambda: layer)], loss=loss, losses=tuple(names))
