"""Entry point of the training stages: decide who the ranks are, then run the loop.

Imports no torch: a process that only starts ranks has no use for it.
"""

import importlib
import json
from typing import Any

from cluster.supervisor import supervise
from core.settings import check, from_json, to_json
from core.stop import heed_stop_signals
from parallel.engines.names import modules_of
from parallel.launched import ranks_given
from training.config import ClipTrain, DVAETrain, PriorTrain, StageConfig

SETTINGS: dict[str, type[StageConfig]] = {
    "dvae": DVAETrain,
    "prior": PriorTrain,
    "clip": ClipTrain,
}
PRELOAD = ["torch", "torch.distributed", "training.rank"]


def train_stage(stage: str, settings: StageConfig) -> None:
    """Train a stage: join the ranks that are there, or spawn the mesh's own.

    Raises: ConfigError with every problem of the settings; RankError if a rank dies.
    """
    started = ranks_given()
    check(settings.problems(started))
    heed_stop_signals()
    payload = json.dumps({"stage": stage, "settings": to_json(settings)})
    if started is None and settings.mesh.world > 1:
        model_parallel = settings.mesh.world > settings.mesh.data
        preload = [*PRELOAD, *modules_of(settings.engine.name, model_parallel)]
        supervisor, reports = settings.supervisor, settings.out / "hang"
        supervise("training.rank:run", payload, settings.mesh.world, preload, supervisor, reports)
        return
    importlib.import_module("training.rank").run(payload)


def parse_payload(payload: str) -> tuple[str, Any]:
    """The stage and its settings, as a rank receives them."""
    body = json.loads(payload)
    return body["stage"], from_json(SETTINGS[body["stage"]], body["settings"])
