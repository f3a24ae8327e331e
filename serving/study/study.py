"""A study's folder: study.json (sealed), pictures/, votes.db; sides and order by key.

Trials 0 to n - 1 are the captions, with picture `a` of the first set and `b` of the second. Trials
from n on are catch trials: `a` is a picture, `b` the same one with its pixels shuffled.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from core.config import from_json, to_json
from core.errors import InputError
from core.files.atomic import Json, seal, sha256, unseal
from core.keys import key_fraction, key_int, keyed_rng

FILE, PICTURES, DATABASE = "study.json", "pictures", "votes.db"
Set = Literal["a", "b"]
QUESTIONS = {"realism": ("a", "b"), "match": ("a", "b", "neither")}
"""Question -> what can be picked; the paper has the third option on matching alone."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared; nothing of it changes once votes are cast."""

    a: str
    """Where the first set is from."""
    b: str
    """Where the second set is from."""
    captions: tuple[str, ...]
    """Caption of each trial."""
    catches: tuple[str, ...]
    """Caption of each catch trial."""
    votes: int
    """Raters a caption."""
    per_rater: int
    """Captions a rater, at most; 0 = all."""
    catch_every: int
    """Captions between two catch trials; 0 = none."""
    catch_least: float
    """Minimum share of right answers in catch trials."""
    seed: int
    """Of sides, order, catch trials and bootstrap."""
    drawn: dict[str, Any]
    """How pictures of runs were drawn; empty if none were."""

    @cached_property
    def digest(self) -> str:
        return sha256(self.sealed())

    def sealed(self) -> bytes:
        """The bytes of study.json."""
        return seal(to_json(self))

    def is_catch(self, trial: int) -> bool:
        return trial >= len(self.captions)

    def caption(self, trial: int) -> str:
        return (*self.captions, *self.catches)[trial]

    def is_valid(self, right: int, asked: int) -> bool:
        """True if votes count of a rater with so many right answers in catch trials."""
        return right >= self.catch_least * asked

    def left(self, trial: int, rater: int) -> Set:
        """The set whose picture a rater sees on the left."""
        return "a" if key_fraction(self.seed, "left", trial, rater) < 0.5 else "b"

    def order(self, rater: int) -> list[int]:
        """All captions' trials, in a rater's order."""
        draw = keyed_rng(self.seed, "order", rater)
        return [int(trial) for trial in draw.permutation(len(self.captions))]

    def limit(self) -> int:
        """Captions that a rater compares, at most."""
        return min(self.per_rater or len(self.captions), len(self.captions))

    def catches_of(self, captions: int) -> int:
        """Catch trials among so many captions."""
        return -(-captions // self.catch_every) if self.catch_every else 0

    def due_catch(self, rater: int, captions: int, catches: int, left: int) -> int | None:
        """The catch trial that comes next for a rater who has had so many of both; None if none.

        Each run of `catch_every` captions has one, before a caption that the key draws; if others
        leave only `left` captions for the rater, before the last of these.
        """
        if not self.catch_every or catches >= len(self.catches):
            return None
        block, within = divmod(captions, self.catch_every)
        size = min(self.catch_every, self.limit() - catches * self.catch_every, within + left)
        place = key_int(self.seed, "catch", rater, catches) % size
        if catches < block or (catches == block and within >= place):
            return len(self.captions) + catches
        return None


def picture_file(folder: Path, trial: int, side: Set) -> Path:
    """Where a trial's picture is stored."""
    return folder / PICTURES / f"{trial:05d}-{side}.png"


def read_study(folder: Path) -> Study:
    """Read study.json.

    Raises: InputError if there is none; CorruptError if it was changed.
    """
    path = folder / FILE
    try:
        body: Json = unseal(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} holds no study: there is no {path}; make one: tapir study make A B "
            f"--out {folder}"
        ) from error
    return from_json(Study, body)
