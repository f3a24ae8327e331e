"""Warnings about slow problems of a run, each logged once with a remedy."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from core.errors import TrainingError
from core.log import LOG
from core.memory import size_text
from core.storage.store import Store, free_space
from parallel.config import OptimConfig
from parallel.mesh import Mesh
from training.config import StageConfig
from training.profiling.plan import read_plan

FEW_CODES = 0.1
"""Codebook usage below which there is a warning, independent of guard.min_codebook_usage."""
SLOWER = 2.0
"""Ratio of the median step time to a plan's above which there is a warning."""
WARM, WINDOW = 10, 50
"""Warm-up steps that are ignored, and steps in the median."""
CHECKPOINTS_FREE = 2
"""There is a warning if the disk has space for fewer checkpoints."""


class Alarms:
    """Alarms of one run; rank 0 logs, and all ranks stop together."""

    def __init__(self, settings: StageConfig, mesh: Mesh, shapes: Iterable[Iterable[int]]) -> None:
        """`shapes` of the parameters of this rank's pipeline stage; stages are about equal in size.

        Raises: InputError if profile.plan is not a plan of this run.
        """
        self._settings, self._world = settings, mesh.world
        self._bytes = mesh.pipeline.size * weight_bytes(shapes, settings.optim)
        self._more = " and its error buffers" if settings.compress.on else ""
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._steps, self._warned = 0, set[str]()
        plan = settings.profile.plan
        times = read_plan(plan, settings, mesh.world.device.type == "cuda").seconds if plan else {}
        self._planned = sum(times.values())

    def codes(self, row: Mapping[str, float], step: int) -> None:
        """Check a validation's codebook usage; collective over all ranks.

        Raises: TrainingError below guard.min_codebook_usage, while there are steps left.
        """
        if "codebook_usage" not in row:
            return
        guard, steps = self._settings.guard, self._settings.loop.steps
        share, used = row["codebook_usage"], row["codes_used"]
        least = max(guard.min_codebook_usage, FEW_CODES)
        dead = step >= guard.codebook_usage_after * steps and share < least
        text = (
            f"step {step}: the dVAE uses {used:.0f} of its codes ({share:.1%} of what these "
            f"held-out pictures could, below {least:.0%}): its codebook is dead, and tokens made "
            "with it tell little; start again with another --loop.seed, a lower --optim.lr, a "
            "higher --tau-last or a smaller --model.codebook"
        )
        stop = dead and share < guard.min_codebook_usage and step < steps
        if self._world.gather_text("stop" if stop else "")[0]:
            raise TrainingError(
                f"{text} (stopped by guard.min_codebook_usage={guard.min_codebook_usage:g})"
            )
        if step >= steps:  # told again at the end, where it is seen
            self._warned.discard("codes")
        self._say("codes", dead, text)

    def disk(self, store: Store, step: int) -> None:
        """Check the free space before a save, and before the first step."""
        if self._world.rank:
            return
        free = free_space(store)
        text = (
            f"step {step}: {store.url} has {size_text(free or 0)} free, and a checkpoint takes "
            f"{size_text(self._bytes)}{self._more}: free space, lower --checkpoint.keep, or give "
            "another --checkpoint.to; a save that does not fit is tried again at the next one, and "
            "older checkpoints stay whole"
        )
        self._say("disk", free is not None and free < CHECKPOINTS_FREE * self._bytes, text)

    def pace(self, step: int, seconds: float) -> None:
        """Compare a step's time with profile.plan."""
        self._steps += 1
        if not self._planned or self._steps <= WARM:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < WINDOW:
            return
        median = statistics.median(self._seconds)
        text = (
            f"step {step}: a step takes {median:.3g} s, {median / self._planned:.1f} times the "
            f"{self._planned:.3g} s of {self._settings.profile.plan}: `tapir profile "
            f"{self._settings.out} --plan FILE` shows where the time goes; look for other work on "
            "these nodes, slow storage, or a slow rank (slowest_rank in metrics.jsonl)"
        )
        self._say("pace", median > SLOWER * self._planned, text)

    def _say(self, what: str, wrong: bool, text: str) -> None:
        """Warn when a problem appears, but not again while it persists."""
        if wrong and what not in self._warned and self._world.rank == 0:
            LOG.warning("%s", text)
        (self._warned.add if wrong else self._warned.discard)(what)


def weight_bytes(shapes: Iterable[Iterable[int]], optim: OptimConfig) -> int:
    """Bytes of a checkpoint: fp32 weights, two moments, and the EMA if there is one; excludes the
    error buffers of compression."""
    each = 4 + 2 * (4 if optim.moments == "fp32" else 2) + (4 if optim.ema else 0)
    return each * sum(math.prod(shape) for shape in shapes)


_BLOCKS = 16
"""Maximum blocks of the train split that are sampled, evenly spaced."""


def tell_cut_captions(task: Any) -> float:
    """Warn about captions longer than `model.text_length`; returns their share.

    0 for a task without captions. A large data set is sampled by blocks.
    """
    context = getattr(task.model_config, "text_length", 0)
    if not context:
        return 0.0
    count = len(task.train.sizes)
    blocks = np.unique(np.linspace(0, count - 1, min(count, _BLOCKS)).astype(int)).tolist()
    lengths: list[int] = [n for block in blocks for n in task.text_lengths(task.train.read(block))]
    cut = sum(length > context for length in lengths)
    if cut:
        LOG.warning(
            "%.3g%% of the captions are cut: of %d looked at, %d have more than model.text_length="
            "%d tokens, the longest %d; raise model.text_length, or pack shorter captions",
            *(100 * cut / len(lengths), len(lengths), cut, context, max(lengths)),
        )
    return cut / max(1, len(lengths))
