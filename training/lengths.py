"""The share of captions that are longer than a model's context, said once before it is trained."""

from typing import Any

import numpy as np

from core.log import LOG

_BLOCKS = 16
"""Blocks of the training split that are looked at, evenly spread over it."""


def tell_cut_captions(task: Any) -> float:
    """Warn of the share of captions that are cut at `model.text_length`; returns it.

    Of a task without captions it is 0. A sample of the blocks stands for a large data set.
    """
    context = getattr(task.model_config, "text_length", 0)
    if not context:
        return 0.0
    count = len(task.train.sizes)
    blocks = np.unique(np.linspace(0, count - 1, min(count, _BLOCKS)).astype(int)).tolist()
    lengths = [n for block in blocks for n in task.text_lengths(task.train.read(block))]
    cut = sum(length > context for length in lengths)
    if cut:
        LOG.warning(
            "%.3g%% of the captions are cut: of %d looked at, %d have more than model.text_length="
            "%d tokens, the longest %d; raise model.text_length, or pack shorter captions",
            *(100 * cut / len(lengths), len(lengths), cut, context, max(lengths)),
        )
    return cut / max(1, len(lengths))
