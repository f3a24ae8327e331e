"""What one rank does; the launcher preloads this module."""

from typing import Any

from core.errors import ConfigError
from parallel.world import World, join_world, leave_world
from training.loop import Run
from training.main import parse_payload
from training.picture_tasks import ClipTask, DVAETask
from training.tasks import PriorTask


def run(payload: str) -> None:
    """Train the stage of the payload on this rank."""
    stage, settings = parse_payload(payload)
    world = join_world()
    try:
        problems = settings.problems(world.size)
        if problems:
            raise ConfigError.from_problems(problems)
        active = Run(stage, _task(stage, settings, world), settings, world)
        try:
            active.train()
        finally:
            active.close()
    finally:
        leave_world(world)


def _task(stage: str, settings: Any, world: World) -> Any:
    if stage == "dvae":
        return DVAETask(settings)
    if stage == "clip":
        return ClipTask(settings, world)
    return PriorTask(settings)
