"""Pictures of a prior while it trains: which checkpoints to draw from, and TensorBoard."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from core.errors import InputError
from core.log import LOG
from generation.pictures import Candidates, picture_grid
from training.export import CONFIG, DESCRIPTION, saved_steps

BOARD = Path("tensorboard", "samples")
"""In the prior's run folder: a run of its own, beside the one that training writes."""
_PAUSE = 5.0


def steps_to_draw(prior: Path, pause: float = _PAUSE) -> Iterator[int]:
    """Steps of a prior's checkpoints, oldest first, and of those to come until it is finished.

    `pause` is how many seconds lie between two looks.
    Raises: InputError if there is no run of a prior, or a finished one without checkpoints.
    """
    done: set[int] = set()
    told = -1
    while True:
        ended = (prior / DESCRIPTION).is_file()  # first: then the last checkpoint is listed below
        imported = ended and not (prior / CONFIG).is_file()
        steps = [] if imported else saved_steps(prior, "prior")
        new = [step for step in steps if step not in done]
        if new:
            done.add(new[0])
            yield new[0]
        elif not ended:
            if told < len(done):
                LOG.info("%s: waiting for a checkpoint after step %d", prior, max(done, default=0))
            told = len(done)
            time.sleep(pause)
        elif done:
            return
        else:
            raise InputError(f"{prior} has no checkpoints to follow; leave out --follow")


def show(prior: Path, step: int, rows: Sequence[Candidates], most: int) -> None:
    """Put the best `most` pictures of each caption into TensorBoard, in the place of older ones
    of this step and later."""
    with SummaryWriter(str(prior / BOARD), purge_step=step) as board:
        for i, row in enumerate(rows):
            grid = picture_grid([row.pictures[:most]], 4)
            board.add_image(f"samples/{i:03d}_{row.caption}", grid, step, dataformats="HWC")
    LOG.info("step %d: samples are in %s", step, prior / BOARD)
