"""What kernels reach inside of a step, card by card; imports no torch.

hardware.py has the rates of large kernels alone. Set once for a card, from data sheets and papers,
and where they are silent from the rows of published_h100.py that are not held out; never for
a row.
"""

from dataclasses import replace

from planning.estimate.hardware import Hardware

STEADY = {"h100": 0.88}
"""Fraction of its rate that a matmul keeps inside of a step, where the card stays at its power
limit: set from the rows, where it explains the whole bias of MPT 1b to 70b on 8 to 64 GPUs. A100s
keep theirs (Megatron-LM's rows). Of h100-500w it is part of `sustained`."""

ATTENTION = {
    "h100": {"flash": (0.6, 0.6, 1024), "triton": (0.43, 0.29, 128)},
    "a100": {"flash": (0.78, 0.7, 512), "triton": (0.56, 0.44, 128)},
}
"""Card -> kernel -> fractions of a matmul's rate that causal attention reaches forward and backward
over long sequences, and the length at which it reaches half of them. flash: FlashAttention-2, whose
paper (arXiv 2307.08691) has up to 335 TFLOP/s of an H100 and 190 of an A100 with heads of 128
channels, and two thirds of it at 2,048 positions; triton: llm-foundry's rows."""
OTHERS = (0.5, 0.5, 128)
"""The same of other cards and kernels, as in planning/estimate/layer_work.py."""


def steady(hardware: Hardware) -> Hardware:
    """The hardware as it runs inside of a step."""
    return replace(hardware, sustained=hardware.sustained * STEADY.get(hardware.name, 1.0))


def attention_rates(hardware: Hardware, kernel: str) -> tuple[float, float, int]:
    """Attention's fractions of a matmul's rate (forward, backward, half-length)."""
    return ATTENTION.get(hardware.name.partition("-")[0], {}).get(kernel, OTHERS)


def contention(hardware: Hardware) -> float:
    """Fraction of its rate that computation loses beside a collective.

    Its channels take multiprocessors: 24 of 132 are 18%. Measured on A100s and H100s: 18.9% on
    average (arXiv 2507.03114).
    """
    return min(0.5, hardware.channels / hardware.units)
