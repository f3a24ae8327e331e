"""`python -m tests.house`: print every violation of the house rules as FILE:LINE: what to do.

`--words` lists all names that hold a banned word instead.
"""

import argparse
import sys
from pathlib import Path

from tests.house.circles import circles
from tests.house.rules import BANNED_LIMIT
from tests.house.sizes import sizes, summary
from tests.house.sources import read_sources
from tests.house.weights import weights
from tests.house.words import banned_names, listing, words


def main() -> int:
    """Exit code 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.house", description=__doc__)
    parser.add_argument("--words", action="store_true", help="list all banned names by file")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2])
    asked = parser.parse_args()
    sources = read_sources(asked.root)
    if asked.words:
        print("\n".join(listing(sources)))
        return 0
    problems = [*circles(sources), *sizes(sources), *words(sources), *weights(asked.root)]
    print("\n".join(problems), end="\n" if problems else "")
    print(
        f"{len(problems)} problems; {summary(sources)}; "
        f"{len(banned_names(sources))} banned names, at most {BANNED_LIMIT}",
        file=sys.stderr,
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
