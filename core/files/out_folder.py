"""Which command wrote a folder, so that outputs of different commands never mix."""

import json
import os
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
    "suite-request.json": "evaluate --suite",
    "suite.json": "evaluate --suite",
    "study.json": "study make",
    "demo.json": "demo",
    "seconds.json": "demo",
}
"""Files that identify the command that wrote a folder."""
_DRAWN = {
    "evaluate": "samples",
    "evaluate --suite": "suites",
    "score": "scores",
    "overlap": "overlap",
}
"""Commands that write many files beside one another, and the usual name of their folder."""
_SOURCES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tar", ".parquet")
"""Endings of a data set's files, which no training run or import writes."""
_STAGES = ("model.json", "config.json")
"""Files of a training run that name its stage."""
_IMPORTED = "image_tokenizer"
"""Stage of what `tapir import` makes of another project's image tokenizer."""


def refuse_others_folder(place: Path | str, mine: str) -> None:
    """Check that a folder is new or of the same command; bucket prefixes are not checked.

    Raises: InputError if it is a file, holds a data set, the output of another command or, for a
    training run or an import, pictures or archives, or, for pictures and figures, run folders.
    """
    if str(place).startswith(S3):
        return
    _refuse_files(Path(place))
    owner = owner_of(Path(place))
    if owner not in ("", mine):
        what = owner if owner == "a data set" else f"what `tapir {owner}` wrote"
        raise InputError(f"{place} holds {what}; give another folder")
    inside = [] if owner or mine not in _DRAWN else _runs_in(Path(place))
    if inside:
        raise InputError(
            f"{place} holds the run folders {', '.join(inside)}, and files of `tapir {mine}` would "
            f"be mixed with them; give a folder of its own, e.g. {place}/{_DRAWN[mine]}"
        )

    is_run = mine == "import" or mine.startswith("train ")
    if is_run and not owner and (first := _source_in(Path(place))):
        example = "runs/vqgan" if mine == "import" else f"--out runs/{mine.removeprefix('train ')}"
        raise InputError(
            f"{place} holds {first}, so it is a folder of pictures or archives and no run folder; "
            f"give a folder of its own, e.g. {example}"
        )


def _refuse_files(place: Path) -> None:
    """Raise InputError if a file stands where a folder is needed."""
    for each in (place, *place.parents):
        if each.exists():
            if not each.is_dir():
                raise InputError(f"{each} is a file, and {place} must be a folder; give another")
            return


def _source_in(folder: Path) -> str:
    """Name of a picture or an archive in a folder; empty if there is none."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return next((name for name in names if name.lower().endswith(_SOURCES)), "")


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
            stage = json.loads((folder / name).read_bytes())["stage"]
            return "import" if stage == _IMPORTED else f"train {stage}"
    return next((owner for name, owner in _MARKS.items() if (folder / name).is_file()), "")
