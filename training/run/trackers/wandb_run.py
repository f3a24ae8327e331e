"""Weights & Biases: one W&B run for a run folder, over all its starts.

W&B's variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY, ...) hold. Without a key it
writes an offline folder, RUN/wandb, which `wandb sync` sends later: nobody is asked for a password
in the middle of a job.
"""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from core.files.atomic import Json, write_atomic
from training.run.trackers.protocol import bin_edges

_MOST_BINS = 512
"""W&B's limit."""
_SECONDS = 60
"""Wait for W&B's servers at the start."""


class WandB:
    """A tracker. Steps are the metric `step`: W&B's own counts rows, and cannot go back.

    After a rewind, or a crash between two checkpoints, rows of the same steps follow; the last row
    of a step counts.
    """

    def __init__(self, root: Path, config: Json, step: int) -> None:
        import wandb  # noqa: PLC0415 - an optional library

        self._wandb = wandb
        given: dict[str, tuple[str, Any]] = {
            "project": ("WANDB_PROJECT", "tapir"),
            "name": ("WANDB_NAME", root.absolute().name),
            "group": ("WANDB_RUN_GROUP", root.absolute().parent.name),
            "dir": ("WANDB_DIR", str(root)),
            "id": ("WANDB_RUN_ID", _id_of(root)),
            "mode": ("WANDB_MODE", "online" if _has_key() else "offline"),
        }
        self._run = wandb.init(
            **{name: value for name, (key, value) in given.items() if key not in os.environ},
            config=config,
            resume="allow",
            save_code=False,
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, init_timeout=_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._wandb.Image(image), "step": step})

    def histogram(self, name: str, values: NDArray[Any], step: int) -> None:
        counts = np.histogram(values, bins=bin_edges(values, _MOST_BINS))
        self._run.log({name: self._wandb.Histogram(np_histogram=counts), "step": step})

    def close(self) -> None:
        self._run.finish()


def _id_of(root: Path) -> str:
    """The W&B run of this folder, drawn at its first start."""
    path = root / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid4().hex[:8].encode())
    return path.read_text().strip()


def _has_key() -> bool:
    """True if W&B can sign in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
