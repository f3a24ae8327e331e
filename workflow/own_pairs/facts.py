"""What the sizes of a demo depend on: read from a few of the packed pairs."""

import os
import time

import numpy as np
from tokenizers import Tokenizer

from core.gpus import usable_gpus
from core.storage.store import Store
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import square
from data_pipeline.streaming.readable import split_readable
from data_pipeline.text.bpe import encode
from workflow.own_pairs.sizes import LEAST_SIDE, Pairs, replicas

_SEEN, _SECONDS = 256, 10.0
"""Pairs that are looked at, at most, and the time for it."""
_LEAST_TEXT, _MOST_TEXT = 8, 64
"""Positions of text."""


def pairs_of(raw: Store, tokenizer: Tokenizer) -> Pairs:
    """Look at pairs from all over the train split."""
    train, held_out = RawSource(raw, "train"), RawSource(raw, "validation")
    sides, lengths = [float(LEAST_SIDE)], [float(_LEAST_TEXT)]
    began = time.process_time()
    for record in _spread(train):
        good, _ = split_readable([record])
        for _, picture in good:
            sides.append(float(min(picture.shape[:2])))
            square(picture, LEAST_SIDE)
        lengths += [float(len(encode(tokenizer, caption))) for caption in record.captions]
        if time.process_time() - began > _SECONDS:
            break
    spent = time.process_time() - began
    return Pairs(
        train=train.manifest.samples,
        held_out=held_out.manifest.samples,
        side=int(np.quantile(sides[1:] or sides, 0.01)),
        text_length=int(np.clip(np.quantile(lengths, 0.99), _LEAST_TEXT, _MOST_TEXT)),
        vocabulary=tokenizer.get_vocab_size(),
        decode_seconds=spent / max(1, len(sides) - 1),
        replicas=replicas(len(os.sched_getaffinity(0)), usable_gpus()),
    )


def _spread(source: RawSource) -> list[RawRecord]:
    """Records of blocks at equal distances."""
    blocks = len(source.sizes)
    count = max(1, min(blocks, _SEEN // max(1, int(np.max(source.sizes, initial=1)))))
    places = np.linspace(0, blocks - 1, count).round().astype(int).tolist() if blocks else []
    return [record for place in dict.fromkeys(places) for record in source.read(place)]
