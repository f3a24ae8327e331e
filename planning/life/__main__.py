"""The job of a rehearsed life: `tapir train`'s supervisor, with light ranks."""

import json
import sys
from pathlib import Path

from cluster.supervisor import supervise
from core.errors import TapirError
from core.log import LOG, set_up_logging
from planning.life.config import STAGE
from training.stages import settings_from_json

TARGET = "planning.life.rank:start"
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "planning.life.rank"]


def main(path: str) -> None:
    """Supervise the ranks of a payload; the exit code is that of `tapir train`."""
    set_up_logging()
    payload = Path(path).read_text()
    settings = settings_from_json(STAGE, json.loads(payload)["settings"])
    try:
        supervise(
            *(TARGET, payload, settings.mesh.world, PRELOAD),
            *(settings.supervisor, settings.out / "hang"),
        )
    except TapirError as error:
        error.give_up()
        LOG.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1])
