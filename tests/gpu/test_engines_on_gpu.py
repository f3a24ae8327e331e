"""A step on a GPU equals the CPU's; checkpoints move in both directions; resuming is exact."""

import pytest
import torch

from bench.gpu.numerics import STEPS, engine_on, largest_difference, moved, train
from bench.parity import BOUND
from parallel.device import CPU


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_equal_the_cpus(precision: str, device: torch.device) -> None:
    exact = train(engine_on(CPU, precision), CPU, range(STEPS))
    results = train(engine_on(device, precision), device, range(STEPS))
    assert max(result.grad_norm for result in exact) > 1.0, "clipping never acted"
    assert largest_difference(results, exact) < BOUND[precision]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_checkpoint_keeps_every_bit_between_cpu_and_gpu(
    direction: str, background: bool, device: torch.device
) -> None:
    source, target = (CPU, device) if direction == "to" else (device, CPU)
    figures = moved(source, target, background)
    assert figures["lost"] == 0
    assert figures["repeated"] == 0
    assert figures["drift"] < BOUND["fp32"]


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(device: torch.device) -> None:
    figures = moved(device, device, background=True)
    assert (figures["lost"], figures["unbroken"]) == (0, 0)


def test_the_same_steps_give_the_same_bits(device: torch.device) -> None:
    first, second = (train(engine_on(device), device, range(STEPS)) for _ in range(2))
    assert [result.losses for result in first] == [result.losses for result in second]
