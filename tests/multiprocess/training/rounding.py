"""What bf16 itself rounds in a training run, by its unit roundoff, and ranks that tell what
compression adds to that.

bf16 has 8 significant bits: a rounded x is off by up to 2^-8 |x|. The error spreads evenly over one
place of x, whose half is between 2^-9 |x| (mantissa near 2) and 2^-8 |x| (mantissa 1), so its root
mean square is between 2^-9 |x| / sqrt(3) and 2^-8 |x| / sqrt(3). Both are facts of the format: no
kernel, and so no CPU, has a part in them.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.parity import SEED, Case, batch_of, train_rank
from cluster.launcher import launch
from models.config import PriorConfig
from models.prior import build_prior, prior_loss
from parallel.compress.powersgd import PowerSGD, Reduced
from parallel.engines.registry import modules_of
from parallel.tensor.layers import ColumnLinear, RowLinear

LEAST, MOST = 2**-9 / math.sqrt(3), 2**-8 / math.sqrt(3)
"""Root mean square of a rounding's error, over the value rounded."""
SIGMAS = 4


def least_of_gradients(case: Case) -> float:
    """What bf16 at least rounds off a matrix's mean gradient, over that gradient (in norms).

    Each replica's gradient g_i of a micro-batch is the result of a bf16 product, rounded once more
    than any arithmetic could avoid; all that follows is in fp32. The errors of n gradients are
    independent, so their mean has sqrt(sum LEAST^2 |g_i|^2) / n, and as |mean| is at most
    sum |g_i| / n <= sqrt(n sum |g_i|^2) / n, that is at least LEAST |mean| / sqrt(n).

    Compression rounds in fp32 (2^-24): an orthonormal basis of s reflections and two sums of s
    terms. Such errors add up as roots, sqrt(s) in a sum and s in the basis: 64 * 2^-24 = 4e-6, a
    hundredth of this, times |error buffers| / |mean|, a few in 20 steps.
    """
    return LEAST / math.sqrt(case.mesh.data * case.engine.gradient_accumulation_steps)


def most_of_losses(config: PriorConfig) -> float:
    """How far the losses of two bf16 runs, equal but for last bits, may differ, over the loss.

    To first order a rounding of x moves the loss by its error times dL/dx; independent ones add up
    to MOST sqrt(sum (x dL/dx)^2), over all that the blocks round: inputs, weights and results of
    their products (the head's are in fp32). Two runs: sqrt(2) of that, and SIGMAS of it for the
    largest of some steps. Taken in fp32 at the first step: trained weights make it less.
    """
    layers, batch = build_prior(config, SEED), batch_of(0, config)
    by_input: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def rounded(x: Tensor) -> None:
        if id(x) not in by_input:  # q, k and v share their input
            squares: list[Tensor] = []
            by_input[id(x)] = x, squares
            x.register_hook(lambda slope: squares.append((x.detach() * slope).square().sum()))

    for module in layers.modules():
        if type(module) in (ColumnLinear, RowLinear):
            rounded(module.weight)  # type: ignore[arg-type]
            module.register_forward_pre_hook(lambda _module, inputs: rounded(inputs[0]))
            module.register_forward_hook(lambda _module, _inputs, output: rounded(output))
    state: Any = batch
    for layer in layers.values():
        state = layer(state)
    loss = prior_loss(state, batch, config.text_weight)["loss"]
    loss.backward()
    square = sum(float(one) for _, squares in by_input.values() for one in squares)
    assert len(by_input) == (6 + 4 + 6) * config.layers, "six products a block, three of one input"
    return SIGMAS * math.sqrt(2 * square) * MOST / float(loss.detach())


def train_beside_exact(case: Case, out: Path) -> tuple[list[dict[str, Any]], float]:
    """Rows as of `bench.parity.train`, and how far compression was off at its worst.

    Off by: |reduced - exact| / |exact| (Frobenius norms), largest over ranks, steps and compressed
    matrices; exact is the float64 mean of the very gradients that the ranks handed in.
    """
    payload = json.dumps({**asdict(case), "out": str(out)})
    split = case.mesh.world > case.mesh.data
    preload = ["torch", "torch.distributed", *modules_of(case.engine.name, split), __name__]
    launch(f"{__name__}:run", payload, case.mesh.world, preload)
    off = [json.loads(path.read_text()) for path in out.glob("off-*.json")]
    assert len(off) == case.mesh.world and all(len(steps) >= case.steps for steps in off)
    return json.loads((out / "rows.json").read_text()), float(torch.tensor(off).max())


def run(payload: str) -> None:
    """Train on this rank; how far each reduction was off goes to off-RANK.json."""
    off: list[float] = []
    compressed = PowerSGD.reduce

    def reduce(self: PowerSGD, gradients: Mapping[str, Tensor]) -> Reduced:
        exact = {name: _mean(gradients[name], self._group) for name in sorted(self.names)}
        compressed_step = compressed(self, gradients)
        ratios = [
            (compressed_step.gradients[n].double() - m).norm() / m.norm() for n, m in exact.items()
        ]
        off.append(float(torch.stack(ratios).max()))
        return compressed_step

    PowerSGD.reduce = reduce  # type: ignore[method-assign]
    train_rank(payload)
    Path(json.loads(payload)["out"], f"off-{os.environ['RANK']}.json").write_text(json.dumps(off))


def _mean(gradient: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    mean = gradient.double()
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)
