"""Gradients of sharded layers: unscaled on the shard, and reduced between machines.

FSDP2 hands over each unit's flat gradient, summed over the ranks of the machine, while the backward
pass goes on with the layers before it. The last micro-batch's hand-over starts the reduction
between the machines; the step waits for all of them before it decides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compress.powersgd import Reduced
from parallel.engines.fsdp.units import Unit, hook
from parallel.engines.modules import Compressor, add_stream_gradients
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.replicas import copy_parts
from parallel.scales import Scale

FLOAT = 4
"""Bytes of an element of a gradient."""


@dataclass
class _Sum:
    """One unit's flat gradient: the sum of the micro-batches so far."""

    flat: Tensor
    views: dict[str, Tensor]
    """The shards' gradients by name, in it."""
    work: "dist.Work | None" = None
    sent: Tensor | None = None
    """What the work adds up, if not `flat`."""

    def wait(self) -> None:
        """Wait for the reduction between machines."""
        if self.work is not None:
            self.work.wait()
        if self.sent is not None:
            self.flat.copy_(self.sent)


@dataclass(kw_only=True)
class Reduction:
    """A step's reduced gradients, when all works have ended on this rank."""

    squares: dict[str, Tensor]
    """Sum of squares of each mean gradient by name, of shards and of vectors."""
    finite: Tensor
    """0-dim, the same on all ranks that hold the same shards: were all their gradients finite."""
    facts: dict[str, float]
    """Metrics of compression."""


@dataclass
class Buckets:
    """The gradients of a rank's units during a step."""

    units: Sequence[Unit]
    scale_of: Mapping[str, Scale]
    """Parameter -> the gradient scale of its branch, in fp16."""
    places: Mapping[str, Placement]
    """Where each parameter is in the global one."""
    mesh: Mesh
    compressor: Compressor | None
    on_both_ends: frozenset[str] = frozenset()
    """Weights that the first and the last stage of a pipeline share."""
    last: bool = False
    """The next backward pass is the step's last one."""
    _here: list[Tensor] = field(default_factory=list)
    """0-dim flags of what this rank hands on: was it finite."""
    _sums: dict[str, _Sum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit in self.units:
            hook(unit, partial(self._receive, unit))

    def gradients(self) -> dict[str, Tensor]:
        """Mean gradients by name, once `finish` has returned."""
        return {name: view for each in self._sums.values() for name, view in each.views.items()}

    def forget(self) -> None:
        """Drop a step's gradients."""
        self._sums.clear()
        self._here.clear()

    @torch.no_grad()
    def _receive(self, unit: Unit, flat: Tensor) -> None:
        known = self._sums.get(unit.name)
        if known is None:
            flat = flat.float()
            known = self._sums[unit.name] = _Sum(flat, unit.gradients(flat))
        else:
            known.flat += flat
        if self.last:
            self._unscale(known)
            self._start(unit, known)

    def _unscale(self, known: _Sum) -> None:
        """Average over the machine, and divide by the scales; scaled gradients show overflows."""
        factors = []
        for name, view in known.views.items():
            scale = self.scale_of.get(name)
            if scale is not None:
                scale.note(view)
            factors.append(1.0 / (self.mesh.machine.size * (scale.value if scale else 1.0)))
        torch._foreach_mul_(list(known.views.values()), factors)
        if self.compressor is not None:
            self._here.append(torch.isfinite(known.flat).all())

    def _start(self, unit: Unit, known: _Sum) -> None:
        """Begin the reduction between machines; the buffer is held until the step ends."""
        if self.mesh.between.size == 1:
            return
        plain = list(known.views)
        if self.compressor is not None:
            plain = [name for name in plain if name not in self.compressor.names]
            self.compressor.start(unit.name, known.views)
        if len(plain) == len(known.views):
            known.sent = known.flat.bfloat16() if unit.narrow else None
            added = known.flat if known.sent is None else known.sent
            known.work = dist.all_reduce(added, group=self.mesh.between.handle, async_op=True)
            return
        for name in plain:  # next to compressed matrices
            if known.views[name].numel():
                dist.all_reduce(known.views[name], group=self.mesh.between.handle)

    def _add_ends(self) -> None:
        """Sum the gradients of shared weights; after all passes, which would wait for each other.

        An interleaved last stage has its own long before the first one has.
        """
        mine = self.gradients()
        for name in sorted(self.on_both_ends & mine.keys()):
            dist.all_reduce(mine[name], group=self.mesh.ends.handle)

    @torch.no_grad()
    def finish(self, vectors: Mapping[str, Tensor]) -> Reduction:
        """Wait for all reductions of a step, and average the gradients of vectors in place."""
        device = self.mesh.world.device
        self._add_ends()
        self._here.append(_all_finite(vectors.values(), device))
        works = self._average_vectors(list(vectors.values()))
        squares: dict[str, Tensor] = {}
        flags, sent = [], 0
        if self.compressor is not None:
            squares, flag, sent = self.compressor.finish()
            flags.append(flag)
        plain = {n: g for n, g in self.gradients().items() if n not in squares}
        for known in self._sums.values():
            known.wait()
        if plain and self.mesh.between.size > 1:
            torch._foreach_div_(list(plain.values()), self.mesh.between.size)
        works()
        add_stream_gradients(vectors, self.places, self.mesh)
        plain |= vectors
        norms = torch._foreach_norm(list(plain.values())) if plain else ()
        squares |= {n: norm.double().square() for n, norm in zip(plain, norms, strict=True)}
        flags.append(_all_finite(squares.values(), device))
        sent += FLOAT * sum(gradient.numel() for gradient in plain.values())
        raw = sum(g.numel() for g in (*self.gradients().values(), *vectors.values()))
        facts = {}
        if self.compressor is not None:
            reduced = Reduced(gradients={}, squares={}, raw_bytes=FLOAT * raw, sent_bytes=sent)
            facts = self.compressor.facts([reduced])
        return Reduction(squares=squares, finite=torch.stack(flags).all(), facts=facts)

    def settle(self, reduction: Reduction, refused: bool) -> None:
        """Update the error buffers, and put mean gradients in the place of compressed ones.

        `refused`: a gradient of some rank of the world was not finite.
        """
        if self.compressor is None:
            return
        everywhere = not refused or bool(reduction.finite)
        here = everywhere or bool(torch.stack(self._here).all())
        self.compressor.settle(self.gradients(), everywhere, here)

    def _average_vectors(self, gradients: list[Tensor]) -> Callable[[], None]:
        """Begin to average gradients over all replicas; returns what waits for it."""
        if not gradients or self.mesh.data.size == 1:
            return lambda: None
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        work = dist.all_reduce(flat, group=self.mesh.data.handle, async_op=True)

        def wait() -> None:
            work.wait()
            copy_parts(flat.div_(self.mesh.data.size), gradients)

        return wait


def _all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """0-dim flag: is every value of some tensors finite."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return torch.stack([torch.ones((), dtype=torch.bool, device=device), *flags]).all()
