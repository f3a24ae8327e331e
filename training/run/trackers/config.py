"""Names of trackers; imports neither torch nor a tracker's library."""

from importlib.metadata import entry_points
from importlib.util import find_spec

from core.errors import did_you_mean

GROUP = "tapir.trackers"
"""Entry points by which packages add trackers; each loads an OpenTracker of protocol.py."""
LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Tapir's own trackers, and the module that each needs."""


def names_of(track: str) -> list[str]:
    """The names in `--track A,B`; none in an empty text."""
    return [name.strip() for name in track.split(",") if name.strip()]


def track_problems(track: str) -> list[str]:
    """Unknown trackers, and those that are named twice."""
    names, known, problems = names_of(track), list(LIBRARIES), list[str]()
    if not LIBRARIES.keys() >= set(names):  # reading all packages' entry points takes a while
        known += [each.name for each in entry_points(group=GROUP)]
    for name in dict.fromkeys(names):
        if name not in known:
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            problems.append(f"track: there is no tracker {name!r}{hint}")
        if names.count(name) > 1:
            problems.append(f"track: {name} is given {names.count(name)} times; give it once")
    return problems


def missing_libraries(track: str) -> list[str]:
    """Trackers whose library is not installed here."""
    return [
        f"track: {name} needs the package {LIBRARIES[name]}, which is not installed; `pip install "
        f"{LIBRARIES[name]}`, or leave it out of --track"
        for name in names_of(track)
        if name in LIBRARIES and find_spec(LIBRARIES[name]) is None
    ]
