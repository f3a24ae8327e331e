"""A function that the ranks of test_places.py run: each has a folder of its own, as a node has."""

import json
import os
from functools import partial
from pathlib import Path

from core.errors import TapirError
from parallel.world import join_world, leave_world
from training.initial.source import open_source
from training.initial.weights import _open


def open_on_own_node(payload: str) -> None:
    """Open the prior at `init` of the folder of this rank; report its digest or the error."""
    out, world = Path(json.loads(payload)["out"]), join_world()
    os.chdir(out / f"node-{world.rank}")
    try:
        told = ["opened", _open(partial(open_source, "init", "prior"), "prior", world).digest]
    except TapirError as error:
        told = [type(error).__name__, str(error)]
    (out / f"result-{world.rank}.json").write_text(json.dumps(told))
    leave_world(world)
