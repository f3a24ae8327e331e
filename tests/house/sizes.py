"""Sizes of files, functions and folders, and the folders of tests/unit."""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from statistics import median

from tests.house import rules
from tests.house.sources import Source


def sizes(sources: Iterable[Source]) -> list[str]:
    """A problem for each limit of rules.py that a file, function or folder exceeds."""
    sources = list(sources)
    product = [source for source in sources if source.top in rules.PRODUCT]
    others = [source for source in sources if source.top in ("tests", "bench")]
    return [
        *_long_files(product, rules.FILE_LINES),
        *_long_files(others, rules.TEST_FILE_LINES),
        *_median_file(product),
        *_long_functions(product),
        *_full_folders(product, rules.FOLDER_FILES),
        *_full_folders(others, rules.TEST_FOLDER_FILES),
        *_unit_folders(others),
    ]


def summary(sources: Iterable[Source]) -> str:
    """The sizes of the product in a line."""
    lines = [source.lines for source in sources if source.top in rules.PRODUCT]
    return f"product: {len(lines)} files, median {median(lines):g} lines, longest {max(lines)}"


def _long_files(sources: list[Source], most: int) -> Iterator[str]:
    for source in sources:
        if source.lines > most:
            yield (
                f"{source.path}:{source.lines}: {source.lines} lines, more than {most}; "
                "move one concern into a file of its own"
            )


def _median_file(sources: list[Source]) -> Iterator[str]:
    lines = {source.path: source.lines for source in sources}
    if lines and (middle := median(lines.values())) > rules.MEDIAN_LINES:
        longest = max(lines, key=lambda path: lines[path])
        yield (
            f"{longest}:1: the median file of the product has {middle:g} lines, more than "
            f"{rules.MEDIAN_LINES}; split long files, beginning with this one"
        )


def _long_functions(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > rules.FUNCTION_LINES:
                    yield (
                        f"{source.path}:{node.lineno}: {node.name} has {lines} lines, more than "
                        f"{rules.FUNCTION_LINES}; split it into functions with one task each"
                    )


def _full_folders(sources: list[Source], most: int) -> Iterator[str]:
    for folder, files in sorted(Counter(source.folder for source in sources).items()):
        if files > most and folder != ".":
            yield (
                f"{folder}/:1: {files} Python files, more than {most}; "
                "move those of one concern into a subpackage"
            )


def _unit_folders(sources: list[Source]) -> Iterator[str]:
    """tests/unit mirrors the product: a folder for each package, plus UNIT_EXTRA."""
    allowed = {*rules.PRODUCT, *rules.UNIT_EXTRA}
    for source in sources:
        parts = PurePosixPath(source.path).parts
        if parts[:2] != ("tests", "unit"):
            continue
        if len(parts) == 3 and parts[2].startswith("test_"):
            yield f"{source.path}:1: a unit test outside a folder; move it to tests/unit/PACKAGE/"
        elif len(parts) > 3 and parts[2] not in allowed:
            yield (
                f"{source.path}:1: tests/unit/{parts[2]} is named after no product package; "
                f"move it to tests/unit/PACKAGE/ or to one of {', '.join(rules.UNIT_EXTRA)}"
            )
