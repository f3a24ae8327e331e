"""What happens in the rehearsed life of a run; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from checkpoint.config import CheckpointConfig
from cluster.config import SupervisorConfig
from core.keys import key_int
from data_pipeline.config import OrderConfig
from models.config import PriorConfig
from parallel.config import EngineConfig, MeshConfig, OptimConfig
from training.config import LoopConfig, PriorTrain
from training.profiling.categories import ProfileConfig

WORLDS = (8, 32, 128, 256)
LEAST, MOST = 2, 1024
"""Ranks of a world that one machine can start."""
STAGE = "prior"
RUN, LEASES, ROWS, MARKS = "run", "leases", "rows", "marks.jsonl"
"""In the job's folder: the run, its leases, a row of each rank, rank 0's marks with their times."""
_MODEL = PriorConfig(
    dim=48, heads=6, layers=1, text_length=4, text_vocabulary=8, image_vocabulary=8, grid=4
)
"""Sizes for the log; no weights of them are made."""
_SILENT = 500.0
"""Seconds that several hundred ranks on a core may need for a start, or for a step and a save."""


def lease_of(rank: int) -> str:
    """The task whose lease a rank holds."""
    return f"rank-{rank:05d}"


def due(event: int) -> str:
    """A file in the job's folder: rank 0 waits for this event."""
    return f"due-{event}"


def done(event: int) -> str:
    """A file in the job's folder: this event has begun."""
    return f"done-{event}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens to the run."""

    step: int
    """When this many steps are done."""
    rank: int | None
    """The rank that is killed; None = the job is preempted."""


@dataclass(frozen=True, kw_only=True)
class LifePlan:
    """The life of one world."""

    world: int
    checkpoints: int = 20
    every: int = 1
    """Steps between checkpoints."""
    losses: int = 5
    """Ranks that are killed; all restart from the last checkpoint."""

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.checkpoints * self.every

    def problems(self) -> list[str]:
        problems = []
        if not LEAST <= self.world <= MOST:
            problems.append(f"--life starts {LEAST} to {MOST} ranks on this machine")
        if self.every < 1 or self.losses < 0:
            problems.append("every must be at least 1, and losses must not be negative")
        if self._last_event < self.losses + 1:
            least = -(-(self.losses + 3 + 3 * self.every) // max(self.every, 1))
            problems.append(
                f"{self.checkpoints} checkpoints are too few for {self.losses} losses and a "
                f"preemption; give {least}"
            )
        return problems

    @property
    def _last_event(self) -> int:
        """The latest step of an event: two steps later the run stops, then come three saves."""
        return self.steps - 2 - 3 * self.every

    def events(self) -> list[Event]:
        """The losses, evenly spread, then the preemption; rank 0, which serves the store and holds
        the run's lock, is lost first."""
        places = [self._last_event * i // (self.losses + 1) for i in range(1, self.losses + 2)]
        victims = [key_int("life", i) % self.world if i else 0 for i in range(self.losses)]
        return [Event(step=s, rank=r) for s, r in zip(places, [*victims, None], strict=True)]

    def settings(self, out: Path) -> PriorTrain:
        """Settings of a run with these ranks as replicas."""
        world = self.world
        return PriorTrain(
            out=out,
            data=str(out),
            model=_MODEL,
            mesh=MeshConfig(data=world),
            engine=EngineConfig(name="deepspeed_zero", matmul_precision="highest"),
            optim=OptimConfig(ema=0.0, warmup=0),
            order=OrderConfig(lanes=world),
            loop=LoopConfig(
                steps=self.steps,
                global_batch_size=world,
                log_every=1,
                validate_every=0,
                validation_samples=world,
            ),
            checkpoint=CheckpointConfig(every=self.every, shard_gigabytes=0.0),
            profile=ProfileConfig(peak_tflops=1.0),
            supervisor=SupervisorConfig(hang_seconds=_SILENT, grace_seconds=_SILENT),
        )
