"""How a run gets its first weights: as drawn, from another run, or as adapters of another run.

The base of adapters is loaded again whenever the run resumes, and has to stay the same.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from checkpoint.reader import CheckpointReader
from core.errors import ConfigError
from core.files.atomic import Json
from core.log import LOG
from models.adapters import is_adapter
from parallel.engines.protocol import Engine
from parallel.world import World
from training.ema import Average
from training.initial.source import ADAPTERS, WeightsSource, adapter_facts, base_of
from training.initial.weights import DrawnWeights, InitialReader, load_initial, remedy
from training.tasks.task import Task

_SHOWN = 3
_CHECKPOINT = re.compile(r"/step-\d+$")
"""The place of a checkpoint, and not of a run in a folder named like one."""


class Start:
    """The weights that a run starts from; made before the engine."""

    def __init__(self, stage: str, task: Task[Any], settings: Any, world: World) -> None:
        self._drawn = DrawnWeights(task.program) if settings.init else None
        self._run = (stage, task, settings, world)
        self._settings, self._adapts = settings, not task.program.saves_frozen
        self.facts: Json = {}
        """What is stored with adapters; empty for other runs."""

    def load(self, engine: Engine, average: Average) -> list[Json]:
        """Load the weights of settings.init at step 0, if it is set; collective.

        Returns the event for the run's history.
        """
        if self._drawn is None:
            return []
        reader, event = self._open(self._drawn, engine)
        engine.load_slices(reader)
        average.load(reader)
        return [event]

    def load_base(self, engine: Engine, checkpoint: CheckpointReader) -> None:
        """Load the base of adapters, before those of a checkpoint; collective.

        The run may have started from a checkpoint that is not the newest of `init` any more.
        Raises: InputError if the base is gone, or another one.
        """
        if self._drawn is not None and self._adapts and not self.facts:
            noted = checkpoint.facts["task"][ADAPTERS]["base"]
            moved = checkpoint.facts["config"]["init"] != self._settings.init
            base = partial(base_of, noted=noted, url=checkpoint.url, moved=moved)
            self._open(self._drawn, engine, base)

    def _open(
        self, drawn: DrawnWeights, engine: Engine, base: Callable[..., WeightsSource] | None = None
    ) -> tuple[InitialReader, Json]:
        reader, event = load_initial(drawn, *self._run, base)
        if self._adapts:
            self.facts = _facts(self._settings, event)
            engine.load_frozen(reader)
        return reader, event


def _facts(settings: Any, event: Json) -> Json:
    """The facts of a run's adapters, from the event that `load_initial` returns.

    Raises: ConfigError if the base is not this model: its file must be its weights.
    """
    drawn = [name for name in event["new"] if not is_adapter(name)]
    wrong = [*event["resized"], *drawn, *event["left"]]
    if wrong:
        raise ConfigError(
            f"init={settings.init!r} is not a base for adapters: {len(wrong)} of its tensors do "
            f"not fit as they are, such as {', '.join(wrong[:_SHOWN])}; adapters need a prior of "
            "the same sizes, dVAE and tokenizer; train one with --init and without --lora.rank "
            "first, e.g. with --freeze block"
        )
    if differs := event.get("differs"):
        name, (there, here) = next(iter(differs.items()))
        raise ConfigError(
            f"init={settings.init!r} is not a base for adapters: model.{name} is {there} there and "
            f"{here} here, so that its weights compute something else; {remedy(name, there)}"
        )
    if _CHECKPOINT.search(event["from"]):
        LOG.warning(
            "the adapters' base is %s, a checkpoint of an unfinished run: without it they are of "
            "no use, so keep it from being deleted",
            event["from"],
        )
    return {ADAPTERS: adapter_facts(settings.lora, event["from"], event["digest"], settings.out)}
