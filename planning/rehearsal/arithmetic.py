"""Skip long computations without communication in a rehearsal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

import models.initialization
import models.keyed_noise
import models.prior
import parallel.engines.modules
import parallel.replicas
from parallel.control import Decision, Judge, decide
from planning.rehearsal.patches import replaced


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Skip long computations without communication; patch modules for FakeTensor."""
    changes = [
        (models.initialization, "_runs", _no_draws),
        (models.keyed_noise, "draw_bits", _no_bits),
        (parallel.replicas, "fingerprint", _no_sums),
        (models.prior, "banded_attention", lambda q, k, v, *_: q + k + v),
        (models.prior, "flexible_attention", lambda q, k, v, *_: q + k + v),
        (nn.Module, "_apply", _apply),
        (parallel.engines.modules, "decide", _decide),
    ]
    with replaced(changes):
        yield


def _no_draws(*_: object) -> Iterator[tuple[int, Tensor]]:
    """Leave matrices as they were allocated."""
    return iter(())


def _no_bits(keys: Tensor, count: int, position: int = 0) -> Tensor:
    """Bits of zero."""
    return torch.zeros(len(keys), count, dtype=torch.int64, device=keys.device)


def _no_sums(tensors: Iterable[Tensor]) -> Tensor:
    """Fingerprints of zero."""
    devices = [x.device for x in tensors]
    return torch.zeros(len(devices), dtype=torch.int64, device=devices[0])


def _decide(norm: float, sums: Tensor, judge: Judge) -> Decision:
    """Ignore stop requests, since every fake value reads as one."""
    return replace(decide(norm, sums, judge), stopping=False)


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` for fake tensors, which do not support torch's swapping of parameters."""
    for owner in module.modules() if recurse else [module]:
        for name, held in owner._parameters.items():
            with torch.no_grad():
                changed = held if held is None else change(held)
            if held is None or changed is None or changed is held:
                continue
            made = nn.Parameter(changed, requires_grad=held.requires_grad)
            for noted, value in vars(held).items():
                vars(made).setdefault(noted, value)
            owner._parameters[name] = made
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else change(buffer)
    return module
