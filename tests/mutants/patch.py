"""A diff, applied to copies of the files that it names."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.targets import ROOT

_FILE = re.compile(rb"^\+\+\+ (?:b/)?(\S+)", re.MULTILINE)
_HUNK = re.compile(rb"^@@ -(\d+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One file of a diff."""

    path: str
    source: bytes
    lines: tuple[int, ...]
    """Lines of the file as it is that are removed, or after which something is inserted."""


def patched(diff: bytes) -> list[Changed]:
    """The sources that a diff makes; the tree stays as it is.

    Raises: SystemExit if the diff does not fit the tree.
    """
    names = [name.decode() for name in _FILE.findall(diff)]
    strip = "-p1" if b"+++ b/" in diff else "-p0"
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if not (ROOT / name).is_file():
                raise SystemExit(f"the diff changes {name}, which is not a file of this tree")
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        command = ["git", "apply", strip, "--unidiff-zero", "--unsafe-paths"]
        command += [f"--directory={folder}", "-"]
        done = subprocess.run(command, input=diff, capture_output=True, cwd="/")
        if done.returncode:
            raise SystemExit(f"the diff does not apply: {done.stderr.decode().strip()}")
        touched = [_touched(part) for part in _FILE.split(diff)[2::2]]
        return [
            Changed(path=name, source=Path(folder, name).read_bytes(), lines=lines)
            for name, lines in zip(names, touched, strict=True)
        ]


def _touched(diff: bytes) -> tuple[int, ...]:
    """The lines of one file that its part of a diff removes or adds to."""
    numbers: list[int] = []
    at = 0
    for line in diff.splitlines():
        if hunk := _HUNK.match(line):
            at = int(hunk[1])
        elif at and line.startswith((b"+", b"-", b" ")) and not line.startswith(b"---"):
            added = line.startswith(b"+")
            if not line.startswith(b" "):
                numbers.append(max(at - added, 1))
            at += not added
    return tuple(dict.fromkeys(numbers))
