"""Brace and glob patterns of sources: s3://bucket/laion/{00000..00099}.tar, /data/*/part-?.tar."""

import re
from pathlib import PurePosixPath

from braceexpand import braceexpand

from core.config import S3
from core.errors import InputError

_GLOB = re.compile(r"[*?\[]")


def is_pattern(source: str) -> bool:
    """True if a source has braces, or characters of a glob."""
    return bool(_GLOB.search(source)) or "{" in source


class Pattern:
    """The names that a pattern stands for, relative to the folder that all of them share.

    `*` and `?` match within a folder, `**` any number of folders. A name is also selected if the
    pattern matches a folder above it.
    """

    def __init__(self, source: str) -> None:
        """Raises: InputError for malformed braces or ranges, or a pattern in the bucket's name."""
        scheme = S3 if source.startswith(S3) else ""
        try:
            whole = list(braceexpand(source.removeprefix(scheme)))
        except ValueError as error:
            raise InputError(f"{source!r} is not a pattern: {error}") from error
        paths = [path.rstrip("/").split("/") for path in whole]
        shared = 0
        while all(len(p) > shared + 1 for p in paths) and len({p[shared] for p in paths}) == 1:
            if _GLOB.search(paths[0][shared]):
                break
            shared += 1
        if scheme and shared == 0:
            raise InputError(f"{source!r}: the bucket's name must be without a pattern")
        self.root = scheme + "/".join(paths[0][:shared]) if shared else "."
        if not scheme and source.startswith("/"):
            self.root = "/" + self.root.strip("/")
        names = ["/".join(path[shared:]) for path in paths]
        self.literals = [name for name in names if not _GLOB.search(name)]
        self._literal = set(self.literals)
        self._above = {folder for name in self.literals for folder in _folders(name)}
        globs = [name for name in names if _GLOB.search(name)]
        try:
            self._globs = [re.compile(_expression(glob)) for glob in globs]
        except re.error as error:
            raise InputError(f"{source!r} is not a pattern: {error}") from error
        self._parts = [glob.split("/") for glob in globs]

    def selects(self, name: str) -> bool:
        above = [name, *_folders(name)]
        return not self._literal.isdisjoint(above) or any(
            glob.fullmatch(each) for glob in self._globs for each in above
        )

    def enters(self, folder: str) -> bool:
        return (
            folder in self._above
            or self.selects(folder)
            or any(_may_hold(parts, folder.split("/")) for parts in self._parts)
        )

    def missing(self, names: list[str]) -> str:
        """The first name or folder of an expanded brace that does not exist; "" if all do."""
        held = {name for full in names for name in (full, *_folders(full))}
        return next((name for name in self.literals if name not in held), "")


def _folders(name: str) -> list[str]:
    return [path.as_posix() for path in PurePosixPath(name).parents]


def _may_hold(glob: list[str], folder: list[str]) -> bool:
    """True if a folder may hold names that a glob matches."""
    for part, name in zip(glob, folder, strict=False):
        if "**" in part:
            return True
        if not re.fullmatch(_expression(part), name):
            return False
    return True


def _expression(glob: str) -> str:
    """A glob as a regular expression; `[!abc]` negates."""
    parts = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|.", glob, re.DOTALL):
        if token in parts:
            out += parts[token]
        elif len(token) > 2 and token.startswith("["):
            inside = token[1:-1].replace("\\", r"\\")
            out += f"[^/{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
        else:
            out += re.escape(token)
    return out
