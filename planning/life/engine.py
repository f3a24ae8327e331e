"""An engine without a model: it takes part in all that the engines of a run's ranks do together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.format import Reader, StateSlice
from parallel.control import Vote, decide
from parallel.engines.protocol import Batch, EngineSettings, Losses, StepResult
from parallel.mesh import Group, Mesh

WIDTH = 16
"""Elements of a rank's block of weights."""


def block_name(rank: int) -> str:
    """The global name of a rank's weights."""
    return f"block.{rank:05d}"


def weight_after(rank: int, steps: int) -> float:
    """Each element of a rank's block: rank + 1 + 2 + ... + steps."""
    return rank + steps * (steps + 1) / 2


@dataclass
class LightEngine:
    """Each rank owns a block of weights, to which step s adds s; all keep the count of steps."""

    settings: EngineSettings
    mesh: Mesh
    before_step: Callable[[int], None]
    """Called with the number of steps done."""
    before_save: Callable[[int], None]
    name: str = "light"
    _done: Tensor = field(default_factory=lambda: torch.zeros(WIDTH))
    """The number of steps, in each element: equal on all replicas."""

    def __post_init__(self) -> None:
        self._weight = torch.full((WIDTH,), float(self.mesh.world.rank))

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        """One reduction, as of the gradients' norm and the votes."""
        self.before_step(int(self._done[0]))
        vote = Vote(losses=[{"loss": torch.tensor(1.0)}], wants_stop=wants_stop)
        sums = torch.cat([torch.ones(1, dtype=torch.float64), vote.share(torch.device("cpu"))])
        dist.all_reduce(sums, group=self.mesh.world.group)
        decision = decide(float(sums[0].sqrt()), sums[1:], self.settings.judge)
        if not decision.skipped:
            self._done += 1
            self._weight += self._done
        return StepResult(
            losses={"loss": decision.loss},
            grad_norm=decision.norm,
            skipped=decision.skipped,
            stopping=decision.stopping,
        )

    def evaluate(self, batch: Batch) -> Losses:
        """The losses of a prior."""
        return {name: torch.tensor(1.0) for name in ("loss", "text_loss", "image_loss")}

    def state_slices(self) -> Iterator[StateSlice]:
        """This rank's block, with the count in place of a moment."""
        self.before_save(int(self._done[0]))
        name = block_name(self.mesh.world.rank)
        for kind, data in (("master", self._weight), ("exp_avg", self._done)):
            yield StateSlice(name=name, kind=kind, shape=(WIDTH,), start=0, data=data)

    def error_slices(self) -> Iterator[StateSlice]:
        """There is no compression."""
        return iter(())

    def load_slices(self, reader: Reader) -> None:
        """Take this rank's block."""
        name = block_name(self.mesh.world.rank)
        self._weight.copy_(reader.flat(name, "master", 0, WIDTH))
        self._done.copy_(reader.flat(name, "exp_avg", 0, WIDTH))

    def load_frozen(self, reader: Reader) -> None:
        """Nothing is frozen."""

    def frozen(self) -> frozenset[str]:
        """Nothing is frozen."""
        return frozenset()

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """The count, on all ranks."""
        return [([self._done], self.mesh.data)]

    def layers(self) -> dict[str, nn.Module]:
        """There are none."""
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """This rank's block."""
        return {block_name(self.mesh.world.rank): (WIDTH,)}

    def memory(self) -> dict[str, int]:
        """Nothing worth counting."""
        return {}

    def close(self) -> None:
        """Nothing is held."""
