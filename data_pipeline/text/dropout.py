"""BPE dropout: random segmentations of a caption, with a new key at every reading.

Each iteration drops every candidate merge with probability `rate` and applies the best remaining
merge at all its undropped places. At rate 0 this is plain BPE.
Source: Provilkov et al., arXiv 1910.13267, as its reference implementation does it.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.errors import InputError
from core.keys import KeyPart, key_int

SPACE = "Ġ"
"""The byte symbol of a space; it begins a run of letters if spaces are joined."""
_IN_A_RUN = re.compile(f"{SPACE}?[a-z]*").fullmatch


class DropoutEncoder:
    """Re-segments text ids of a tokenizer of data_pipeline.text.bpe."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        """Raises: InputError if the rate is not in [0, 1)."""
        if not 0 <= rate < 1:
            raise InputError(f"the BPE dropout {rate} must be in [0, 1); the paper's is 0.1")
        model = json.loads(tokenizer.to_str())["model"]
        self._rate, self._ids = rate, dict(model["vocab"])
        self._symbols = {number: symbol for symbol, number in self._ids.items()}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        self._ranks = {(a, b): rank for rank, (a, b) in enumerate(pairs)}

    def encode(self, text: Iterable[int], *key: KeyPart) -> NDArray[np.uint16]:
        """Randomly re-segmented ids of the same text; equal keys give equal ids."""
        draw = random.Random(key_int(*key, "bpe dropout")).random
        ids: list[int] = []
        run: list[str] = []
        for number in map(int, text):
            symbol = self._symbols[number]
            inside = _IN_A_RUN(symbol)
            if not inside or symbol[0] == SPACE:
                ids += self._merged(run, draw)
                run = []
            if inside:
                run.extend(symbol)
            else:
                ids.append(number)
        ids += self._merged(run, draw)
        return np.asarray(ids, np.uint16)

    def _merged(self, run: list[str], draw: Callable[[], float]) -> list[int]:
        while len(run) > 1:
            open_ = [
                (self._ranks[pair], i)
                for i, pair in enumerate(pairwise(run))
                if pair in self._ranks and draw() >= self._rate
            ]
            if not open_:
                break
            best = min(open_)[0]
            run = _joined(run, [i for rank, i in open_ if rank == best])
        return [self._ids[symbol] for symbol in run]


def _joined(run: list[str], places: list[int]) -> list[str]:
    """Merge the symbols at these places with their successors, from the left, without overlap."""
    merged: list[str] = []
    at = 0
    starts = set(places)
    while at < len(run):
        if at in starts:
            merged.append(run[at] + run[at + 1])
            at += 2
        else:
            merged.append(run[at])
            at += 1
    return merged
