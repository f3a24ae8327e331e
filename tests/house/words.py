"""Banned words in the names that the sources define."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from tests.house import rules
from tests.house.sources import Source

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True, order=True)
class Banned:
    """A name that holds a banned word, where it is defined."""

    path: str
    line: int
    name: str


def banned_names(sources: Iterable[Source]) -> list[Banned]:
    """Each definition of a name that holds one of rules.BANNED; uses of a name do not count."""
    folders: set[str] = set()
    names: list[Banned] = []
    for source in sources:
        defined = [*_defined(source), *((1, part) for part in _module_names(source, folders))]
        names += [Banned(source.path, line, name) for line, name in defined if _is_banned(name)]
    return sorted(names)


def words(sources: Iterable[Source]) -> list[str]:
    """A problem if there are more banned names than rules.BANNED_LIMIT.

    At a limit of 0 each name is a problem of its own.
    """
    names = banned_names(sources)
    if len(names) <= rules.BANNED_LIMIT:
        return []
    if rules.BANNED_LIMIT == 0:
        return [
            f"{n.path}:{n.line}: the name {n.name} holds a banned word; name the thing itself"
            for n in names
        ]
    return [
        f"tests/house/rules.py:1: {len(names)} names hold a banned word, {rules.BANNED_LIMIT} may; "
        "rename what was added: python -m tests.house --words lists all"
    ]


def listing(sources: Iterable[Source]) -> Iterator[str]:
    """All banned names by file."""
    rows: dict[str, list[str]] = {}
    for row in banned_names(sources):
        rows.setdefault(row.path, []).append(f"{row.line} {row.name}")
    for path, names in rows.items():
        yield f"{path} ({len(names)}): {', '.join(names)}"


def _is_banned(name: str) -> bool:
    return any(word.lower() in rules.BANNED for word in _WORD.findall(name))


def _module_names(source: Source, folders: set[str]) -> list[str]:
    """The file's name, and for the first file of a folder also the folder's."""
    path = PurePosixPath(source.path)
    is_new = source.folder not in folders
    folders.add(source.folder)
    return [path.stem, *([path.parent.name] if is_new else [])]


def _defined(source: Source) -> Iterator[tuple[int, str]]:
    """(line, name) of each function, class, argument, variable, attribute and import alias."""
    for node in source.nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield node.lineno, name
            case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node.lineno, name
            case ast.Import() | ast.ImportFrom():
                yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)
