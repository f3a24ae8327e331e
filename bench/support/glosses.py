"""A real English corpus: the definitions and examples of WordNet, as Debian packages them."""

import glob
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
INSTALL = "the glosses come by apt: apt install wordnet-base"


def glosses_are_there() -> bool:
    """Say whether the package is installed."""
    return (FOLDER / "data.noun").exists()


def glosses() -> Iterator[str]:
    """The 117,659 glosses, lower-cased."""
    for path in sorted(glob.glob(str(FOLDER / "data.*"))):
        for line in Path(path).read_text(encoding="utf-8", errors="strict").splitlines():
            if not line.startswith("  ") and " | " in line:
                yield line.partition(" | ")[2].strip().lower()
