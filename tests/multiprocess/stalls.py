"""`tapir tokenize` that stops for good in the middle of ids.bin, and touches a file then.

python -m tests.multiprocess.stalls FILE ARGUMENTS
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from cli.tokenize import tokenize
from core.storage.store import FolderStore

_PUT = FolderStore.put_parts


def _stalled(self: FolderStore, name: str, parts: Iterable[bytes | memoryview]) -> None:
    if not name.endswith("ids.bin"):
        _PUT(self, name, parts)
        return

    def some() -> Iterable[bytes | memoryview]:
        yield next(iter(parts))
        Path(sys.argv[1]).touch()
        time.sleep(3600)

    _PUT(self, name, some())


if __name__ == "__main__":
    FolderStore.put_parts = _stalled  # type: ignore[method-assign]
    tokenize(sys.argv[2:])
