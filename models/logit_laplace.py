"""The logit-Laplace likelihood of pixels, whose support is the open unit interval."""

import math

import torch
from torch import Tensor

from core.errors import ConfigError


def squeeze_pixels(image: Tensor, epsilon: float) -> Tensor:
    """Map pixels in [0, 1] into (epsilon, 1 - epsilon).

    Source: arXiv 2102.12092, section 3.2 (phi).
    """
    return (1 - 2 * epsilon) * image + epsilon


def unsqueeze_pixels(mu: Tensor, epsilon: float) -> Tensor:
    """Turn the likelihood's location into pixels in [0, 1]; ln b is ignored."""
    return ((torch.sigmoid(mu) - epsilon) / (1 - 2 * epsilon)).clamp(0, 1)


def logit_laplace_log_prob(x: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """Log density of x under the logit-Laplace distribution.

    Shapes: all equal; x in (0, 1).
    Units: nats a value.
    Source: arXiv 2102.12092, equation 2.
    """
    logit = torch.logit(x)
    jacobian = torch.log(x * (1 - x))
    return -math.log(2) - log_scale - jacobian - (logit - mu).abs() * torch.exp(-log_scale)


def kl_to_uniform(logits: Tensor, dim: int = 1) -> Tensor:
    """KL divergence of the categorical distribution from the uniform one, never tempered.

    Shapes: (B, K, H, W) -> (B, H, W).
    Units: nats a position, between 0 and ln K.
    """
    log_q = torch.log_softmax(logits, dim)
    return (log_q.exp() * log_q).sum(dim) + math.log(logits.shape[dim])


def gumbel_codes(logits: Tensor, tau: Tensor | float, noise: Tensor) -> Tensor:
    """Relax one-hot codes: softmax((logits + gumbel noise) / tau) over the codebook.

    Shapes: (B, K, H, W) float32 twice -> the same; sums to 1 over K.
    Units: tau is a temperature, annealed 1 -> 1/16.
    Raises: ConfigError if tau <= 0.
    Source: arXiv 2102.12092, section 2.1.
    """
    if float(tau) <= 0:
        raise ConfigError(f"the Gumbel temperature is {float(tau)}; it must be positive")
    return torch.softmax((logits + noise) / tau, dim=1)
