"""Which command wrote a folder, so that outputs of different commands never mix."""

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
"""Files that identify the command that wrote a folder."""
_DRAWN = {"evaluate": "samples", "score": "scores", "overlap": "overlap"}
"""Commands that write many files beside one another, and the usual name of their folder."""
_STAGES = ("model.json", "config.json")
"""Files of a training run that name its stage."""


def refuse_others_folder(place: Path | str, mine: str) -> None:
    """Check that a folder is new or of the same command; bucket prefixes are not checked.

    Raises: InputError if it holds a data set or the output of another command, or, for pictures and
    figures, run folders.
    """
    owner = "" if str(place).startswith(S3) else owner_of(Path(place))
    if owner not in ("", mine):
        what = owner if owner == "a data set" else f"what `tapir {owner}` wrote"
        raise InputError(f"{place} holds {what}; give another folder")
    inside = [] if owner or mine not in _DRAWN else _runs_in(Path(place))
    if inside:
        raise InputError(
            f"{place} holds the run folders {', '.join(inside)}, and files of `tapir {mine}` would "
            f"be mixed with them; give a folder of its own, e.g. {place}/{_DRAWN[mine]}"
        )


def _runs_in(folder: Path) -> list[str]:
    """Names of the folders in a folder that a command wrote; without data sets."""
    if not folder.is_dir():
        return []
    names = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return [name for name in names if owner_of(folder / name) not in ("", "a data set")]


def owner_of(folder: Path) -> str:
    """The command that wrote a folder, or `a data set`; empty if unknown."""
    for name in _STAGES:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return f"train {json.loads((folder / name).read_bytes())['stage']}"
    return next((owner for name, owner in _MARKS.items() if (folder / name).is_file()), "")
