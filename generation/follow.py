"""Draw from a prior while it trains: choose checkpoints, and show pictures in TensorBoard."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.writer import SummaryWriter

from core.errors import InputError
from core.log import LOG
from generation.text_to_image import Candidates, picture_grid
from training.export.files import CONFIG
from training.export.names import DESCRIPTION
from training.export.weights import saved_steps

BOARD = Path("tensorboard", "samples")
"""In the prior's run folder: a TensorBoard run of its own, beside that of training."""
_PAUSE, _TAG = 5.0, "samples/"


def steps_to_draw(prior: Path, pause: float = _PAUSE) -> Iterator[int]:
    """Yield the steps of a prior's checkpoints, oldest first, and new ones until training ends.

    `pause`: seconds between two looks at the folder.
    Raises: InputError if there is no run of a prior, or a finished one without checkpoints.
    """
    done: set[int] = set()
    told, last = -1, None
    while True:
        ended = (prior / DESCRIPTION).is_file()  # first: then the last checkpoint is listed below
        imported = ended and not (prior / CONFIG).is_file()
        steps = [] if imported else saved_steps(prior, "prior")
        if last is not None and last not in steps:
            done.update(steps[:-1])  # deleted while it was drawn: the next ones would be, too
        new = [step for step in steps if step not in done]
        if new:
            last = new[0]
            done.add(last)
            yield last
        elif not ended:
            if told < len(done):
                LOG.info("%s: waiting for a checkpoint after step %d", prior, max(done, default=0))
            told = len(done)
            time.sleep(pause)
        elif done:
            return
        else:
            raise InputError(f"{prior} has no checkpoints to follow; leave out --follow")


def shown_steps(prior: Path, captions: Sequence[str]) -> set[int]:
    """Steps for which TensorBoard has pictures of all these captions."""
    if not (prior / BOARD).is_dir():
        return set()
    events = EventAccumulator(str(prior / BOARD), {"images": 0}).Reload()
    tags, names = set(events.Tags()["images"]), [_TAG + caption for caption in captions]
    steps = [{event.step for event in events.Images(tag)} for tag in names if tag in tags]
    return set.intersection(*steps) if len(steps) == len(captions) else set()


def show(prior: Path, step: int, rows: Sequence[Candidates], most: int) -> None:
    """Put the best `most` pictures of each caption into TensorBoard."""
    with SummaryWriter(str(prior / BOARD)) as board:
        for row in rows:
            grid = picture_grid([row.pictures[:most]], 4)
            board.add_image(_TAG + row.caption, grid, step, dataformats="HWC")
    LOG.info("step %d: samples are in %s", step, prior / BOARD)
