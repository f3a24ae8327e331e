"""The entry point of a rank; the launcher preloads this module."""

from core.errors import ConfigError
from core.heartbeat import Heart
from core.memory import keep_freed_memory
from core.stop import heed_stop_signals
from parallel.diagnostics.flight_recorder import record_flight
from parallel.ledger import recorded
from parallel.mesh import build_mesh
from parallel.world import join_world, leave_world
from training.auto_precision import settle_precision
from training.run.alarms import tell_cut_captions
from training.stages import make_task, parse_payload
from training.trainer import Run


def run(payload: str) -> None:
    """Train the stage of the payload on this rank."""
    stage, settings = parse_payload(payload)
    heed_stop_signals()
    record_flight()
    world = join_world()
    if world.device.type == "cpu":
        keep_freed_memory()
    heart = Heart(world.rank)
    try:
        problems = settings.problems(world.size)
        problems += settings.gpu_problems() if world.device.type == "cuda" else []
        if problems:
            raise ConfigError.from_problems(problems)
        settings = settle_precision(settings, world)
        mesh = build_mesh(settings.mesh, world)
        with recorded(mesh, heart) as ledger:
            task = make_task(stage, settings, mesh)
            if world.rank == 0:
                tell_cut_captions(task)
            active = Run(stage, task, settings, mesh, ledger, heart)
            try:
                active.train()
            finally:
                active.close()
    finally:
        leave_world(world)
