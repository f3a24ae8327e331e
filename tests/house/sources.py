"""Parse every Python file of a repository once."""

import ast
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str
    """From the root of the repository."""
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(ast.parse(self.text, self.path)))

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.text.count("\n")

    @property
    def folder(self) -> str:
        """Folder of the file; "." for the root."""
        return str(PurePosixPath(self.path).parent)

    @property
    def top(self) -> str:
        """Top-level package, or the name of a top-level module."""
        return PurePosixPath(self.path).parts[0].removesuffix(".py")

    @property
    def module(self) -> str:
        """Dotted name under which the file is imported."""
        parts = PurePosixPath(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The package that relative imports of this file start from."""
        is_package = PurePosixPath(self.path).name == "__init__.py"
        return self.module if is_package else self.module.rpartition(".")[0]


def read_sources(root: Path) -> list[Source]:
    """All Python files that git tracks or would add; outside git, all but those of hidden folders.

    Raises: SyntaxError, on the first use of `nodes`, for a file that does not parse.
    """
    return [Source(path, (root / path).read_text("utf-8")) for path in sorted(set(_paths(root)))]


def _paths(root: Path) -> Iterator[str]:
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard", "*.py"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        yield from (path for path in listed.split("\0") if path and (root / path).exists())
        return
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()
