"""The verdicts on all mutants: counts by file, and survivors that are known or new.

equivalent.toml lists the survivors that compute the same values, each with the reason. They are
tried like all others: one that a test catches, or that is not a mutant of the tree, is reported.
"""

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from tests.mutants.mutate import Mutant

LISTED = Path(__file__).with_name("equivalent.toml")
ALIVE = 0.03
"""Share of mutants that may survive."""

Name = tuple[str, str]
"""File, and the line before and after the change."""


@lru_cache(maxsize=1)
def equivalents() -> dict[Name, str]:
    """Why each listed mutant computes the same as the code."""
    kinds = tomllib.loads(LISTED.read_text())["kind"]
    return {
        (file, label): kind["why"]
        for kind in kinds
        for file, labels in kind["mutants"].items()
        for label in labels
    }


def name_of(mutant: Mutant) -> Name:
    """A mutant's name in the list, without line numbers, which would move."""
    return mutant.path, mutant.label


def unlisted(mutants: Iterable[Mutant]) -> list[Name]:
    """Entries of the list that are not mutants of the tree."""
    return sorted(set(equivalents()) - {name_of(mutant) for mutant in mutants})


def tell(killers: Mapping[Mutant, str]) -> int:
    """Print the survivors and the counts; returns 1 if too many are alive."""
    known = equivalents()
    for mutant, killer in killers.items():
        listed = name_of(mutant) in known
        if not killer:
            word = "alive, known" if listed else "alive, NEW"
            print(f"{word}: {mutant.path}:{mutant.line} [{mutant.kind}] {mutant.label}")
        elif listed:
            print(f"listed as equivalent, but {killer} catches it: {mutant.path}: {mutant.label}")
    count = Counter(mutant.path for mutant in killers)
    alive = Counter(mutant.path for mutant, killer in killers.items() if not killer)
    for path in sorted(count):
        print(f"{path}: {count[path]} mutants, {alive[path]} alive")
    new = sum(not killer and name_of(mutant) not in known for mutant, killer in killers.items())
    total, left = count.total(), alive.total()
    share = left / max(total, 1)
    print(f"{total} mutants, {left} alive ({share:.1%}, at most {ALIVE:.0%}), {new} of them new")
    return int(left > ALIVE * total)
