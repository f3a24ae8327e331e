"""Models that come with Tapir: small sets of weights in generation/weights/, each with a card.

generation/weights/NAME/card.json       facts, figures of all seeds, digests of all files
generation/weights/NAME/README.md       the card for people
generation/weights/NAME/prior, dvae, clip, bpe    run folders of finished models, in 16 bits
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from core.config import from_json
from core.errors import CorruptError, InputError
from core.files.atomic import Json, unseal
from generation.config import ModelPaths

WEIGHTS = Path(__file__).with_name("weights")
CARD, README = "card.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure that anybody can draw again from the shipped models."""

    name: str
    """exact captions: share of captions whose best picture shows all that they say (shapes); or
    CLIP cosine: mean over captions of the best picture's cosine."""
    captions: tuple[str, ...]
    """Held-out captions."""
    candidates: int
    """Pictures drawn for each, of which CLIP's best counts."""
    temperature: float
    guidance: float
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a set of shipped models is."""

    name: str
    title: str
    pixels: int
    license: str
    """Of the pictures that it was trained on."""
    source: str
    """Where those pictures are from."""
    command: str
    """Command that trains it."""
    parameters: int
    seed: int
    """Seed of the shipped models, among those of `seeds`."""
    seeds: tuple[Json, ...]
    """Figures of each trained seed on held-out pairs."""
    score: Score
    files: dict[str, str]
    """Path -> sha256, of all files but the card."""


def shipped_names() -> list[str]:
    """Names of the sets that this installation has."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CARD}"))


def read_card(name: str) -> Card:
    """The card of a set.

    Raises: InputError if there is none; CorruptError if it is damaged.
    """
    path = WEIGHTS / name / CARD
    if name not in shipped_names():
        there = ", ".join(shipped_names()) or "none; `make weights` trains them"
        raise InputError(f"there are no shipped models {name!r} (there are: {there})")
    body = unseal(path.read_bytes(), str(path))
    return from_json(Card, {key: body[key] for key in body if key in Card.__annotations__})


def shipped_models(name: str) -> ModelPaths:
    """Run folders of a set, after a check of all its digests.

    Raises: InputError if there is no such set; CorruptError if a file changed.
    """
    card, folder = read_card(name), WEIGHTS / name
    for file, expected in card.files.items():
        path = folder / file
        if not path.is_file() or _sha256(path) != expected:
            raise CorruptError(
                f"{path} is damaged or missing: its digest is not that of {CARD}; install Tapir "
                "again, or restore it with git"
            )
    return paths_of(folder)


def paths_of(folder: Path) -> ModelPaths:
    """The models of one folder by their usual names."""
    return ModelPaths(
        prior=folder / "prior", dvae=folder / "dvae", clip=folder / "clip", bpe=folder / "bpe"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
