"""Entry point of the training stages: start or join the ranks, then run the loop.

Imports no torch: the launcher process does not need it.
"""

import os

from cluster.launcher import call_target
from cluster.supervisor import supervise
from core.config import check
from core.errors import ConfigError, TapirError
from core.files.out_folder import refuse_others_folder
from core.gpus import gpu_problems, usable_gpus
from core.launch_environment import ranks_given
from core.stop import heed_stop_signals
from parallel.engines.registry import modules_of
from training.config import StageConfig
from training.run.resume_with import with_changes
from training.run.trackers.config import missing_libraries
from training.stages import to_payload

RANKS_A_CORE = 16
TARGET = "training.worker:run"
"""Function that each rank runs."""
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "training.worker"]
"""torch's optimisers import torch._dynamo, which takes 2 s in each rank unless preloaded."""


def train_stage(stage: str, settings: StageConfig) -> None:
    """Train a stage: join the launcher's ranks, or spawn the ranks of the mesh.

    Raises: ConfigError with every problem of the settings; RankError if a rank dies. An error that
    no other start mends has the exit code EXIT_GAVE_UP.
    """
    try:
        _train(stage, settings)
    except TapirError as error:
        error.give_up()
        raise


def _train(stage: str, settings: StageConfig) -> None:
    started = ranks_given()
    settings = with_changes(settings)
    on_gpus = settings.gpu_problems() if usable_gpus() else []
    check(settings.problems(started) + on_gpus + missing_libraries(settings.track))
    refuse_others_folder(settings.out, f"train {stage}")
    heed_stop_signals()
    payload = to_payload(stage, settings)
    if started is None and settings.mesh.world > 1:
        _refuse_too_many(settings.mesh.world)
        model_parallel = settings.mesh.world > settings.mesh.data
        preload = [*PRELOAD, *modules_of(settings.engine.name, model_parallel)]
        supervisor, reports = settings.supervisor, settings.out / "hang"
        supervise(TARGET, payload, settings.mesh.world, preload, supervisor, reports)
        return
    call_target(TARGET, payload)


def _refuse_too_many(world: int) -> None:
    """Raise ConfigError for a mesh that is too large for this machine."""
    check(gpu_problems(world, usable_gpus()))
    cores = os.cpu_count() or 1
    if world > RANKS_A_CORE * cores:
        raise ConfigError(
            f"the mesh needs {world} ranks, too many for the {cores} cores of this machine; "
            "start them with srun, mpirun or torchrun on a cluster, or give a smaller mesh, e.g. "
            "--mesh.data 1 --mesh.tensor 1 --mesh.pipeline 1 --engine.name reference"
        )
