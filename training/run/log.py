"""Logging of steps: a line on the terminal, and rows of metrics.jsonl."""

from dataclasses import dataclass
from typing import Any

from core.log import LOG, Meter
from parallel.engines.protocol import StepResult
from parallel.ledger import Traffic
from training.config import StageConfig
from training.profiling.accounts import Waits
from training.profiling.profile import Profile
from training.run.folder import RunFolder
from training.tasks.task import Pictures


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of one step on this rank."""

    seconds: float
    """Seconds of the whole step."""
    waited: float
    """Seconds of it that the rank waited for its batch."""
    traffic: Traffic


class RunLog:
    """The log of one run; collective over all ranks, and rank 0 writes."""

    def __init__(
        self, settings: StageConfig, units: int, folder: RunFolder, profile: Profile
    ) -> None:
        """`units` is the number of tokens per sample."""
        self._loop, self._units = settings.loop, units
        self._folder, self._profile, self._waits = folder, profile, Waits()
        self._notes: dict[str, Any] = {"precision": settings.engine.precision}

    def note(self, name: str, value: Any) -> None:
        """Add a figure to the next training row."""
        self._notes[name] = value

    def step(
        self, step: int, epochs: dict[str, int], result: StepResult, cost: StepCost, meter: Meter
    ) -> None:
        """Log a step to the terminal, and every loop.log_every steps to metrics.jsonl."""
        loop, seconds, traffic = self._loop, cost.seconds, cost.traffic
        self._waits.add(cost.waited, seconds)
        rate = loop.global_batch_size * self._units / seconds
        meter.update(step, f"loss {result.losses['loss']:.4f}, {rate:,.0f} tokens/s")
        if step % loop.log_every == 0 or step == loop.steps:
            row = {
                "step": step,
                **epochs,
                **result.losses,
                "grad_norm": result.grad_norm,
                **({"skipped": result.skipped} if result.skipped else {}),
                **result.facts,
                **self._waits.row(),
                "tokens_per_second": rate,
                "seconds": seconds,
                **self._profile.row(step, seconds, seconds - traffic.blocked),
                "comm_bytes": traffic.bytes,
                "comm": traffic.counts,
                **self._notes,
            }
            self._notes.clear()
            self._folder.log(row)

    def validation(self, step: int, row: dict[str, float], pictures: Pictures) -> None:
        """Write a row of split `validation`, and send its pictures to the trackers."""
        for name, image in pictures.items():
            self._folder.show(name, image, step)
        self._folder.log({"step": step, "split": "validation", **row})
        text = ", ".join(f"{name} {value:.4g}" for name, value in sorted(row.items()))
        LOG.info("validation at %d: %s", step, text)
