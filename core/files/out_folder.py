"""Whose a folder is: what a command writes is never mixed with what another one wrote there."""

import json
from contextlib import suppress
from pathlib import Path

from core.config import S3
from core.errors import InputError

_MARKS = {
    "train/manifest.json": "a data set",
    "validation/manifest.json": "a data set",
    "tokenizer.json": "train bpe",
    "scores.json": "score",
    "candidates.json": "evaluate",
    "overlap.json": "overlap",
    "chain.json": "submit",
    "demo.json": "demo",
    "seconds.json": "demo",
}
"""Files by which the folder of a command is known."""
_STAGES = ("model.json", "config.json")
"""Files of a training, which name its stage."""


def refuse_others_folder(place: Path | str, mine: str) -> None:
    """Make sure that a folder is new, or of the same command; a prefix of a bucket is not asked.

    Raises: InputError if it is a data set's or another command's.
    """
    owner = "" if str(place).startswith(S3) else owner_of(Path(place))
    if owner not in ("", mine):
        what = owner if owner == "a data set" else f"what `tapir {owner}` wrote"
        raise InputError(f"{place} holds {what}; give another folder")


def owner_of(folder: Path) -> str:
    """The command that wrote a folder, `a data set`, or nothing if that is not known."""
    for name in _STAGES:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return f"train {json.loads((folder / name).read_bytes())['stage']}"
    return next((owner for name, owner in _MARKS.items() if (folder / name).is_file()), "")
