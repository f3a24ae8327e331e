"""Import circles between modules.

Every import counts: at the top, in a function, under TYPE_CHECKING, and as a string that
names a module ("a.b") or a function of one ("a.b:f"), as registries, preload lists, launchers and
importlib take them. A module that names itself, to start ranks that run one of its functions, is
no circle.
"""

import ast
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tests.house.sources import Source

_TARGET = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(?::(\w+))?")
_BY_NAME = ("import_module", "run_module")
"""Functions whose argument is a module, even if it has no dot."""


@dataclass(frozen=True, order=True)
class Edge:
    """One module needs another."""

    source: str
    target: str
    path: str
    line: int
    kind: str
    """"imports" or "names"."""


Graph = dict[str, dict[str, Edge]]
"""Module -> the modules that it needs, each with the first place that says so."""
Modules = Mapping[str, Source]
"""Sources by module name."""


def circles(sources: Iterable[Source]) -> list[str]:
    """A problem for each group of modules that need each other, with the shortest circle in it."""
    known = {source.module: source for source in sources}
    graph: Graph = {module: {} for module in known}
    for module, source in known.items():
        for edge in sorted(edges_of(source, known)):
            graph[module].setdefault(edge.target, edge)
    return [_problem(_shortest(graph, group)) for group in _groups(graph)]


def edges_of(source: Source, known: Modules) -> Iterator[Edge]:
    """Every module of ours, except itself, that a file imports or names in a string.

    An import runs the __init__ of the packages above its module, too, except those that are
    already being imported because they hold the file.
    """
    own = set(_with_packages(source.module))
    for line, kind, name in _names(source, known):
        target = _longest_prefix(name, known)
        for module in _with_packages(target):
            is_own = module == source.module if module == target else module in own
            if module in known and not is_own:
                yield Edge(source.module, module, source.path, line, kind)


def _names(source: Source, known: Modules) -> Iterator[tuple[int, str, str]]:
    """(line, kind, dotted name that may go on into the module) of each import and string."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, "imports", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(source, node)
            for alias in node.names:
                yield node.lineno, "imports", f"{base}.{alias.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if name := _named_module(node.value, known):
                yield node.lineno, "names", name
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, "names", name) for name in _by_name(node, known))


def _named_module(text: str, known: Modules) -> str:
    """The module of "a.b" or "a:f"; "" for a word without a dot and for an unknown function."""
    match = _TARGET.fullmatch(text)
    if not match or match[1] not in known:
        return ""
    module, function = match.groups()
    if "." in module:
        return module
    defined = function and re.search(rf"^def {function}\b", known[module].text, re.MULTILINE)
    return module if defined else ""


def _base(source: Source, node: ast.ImportFrom) -> str:
    """The absolute module of `from MODULE import ...`."""
    if not node.level:
        return node.module or ""
    parts = source.package.split(".")
    above = parts[: len(parts) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _by_name(call: ast.Call, known: Modules) -> Iterator[str]:
    """Modules that importlib is given; f"package.{name}" means each module of the package."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in _BY_NAME or not call.args:
        return
    first = call.args[0]
    if isinstance(first, ast.Constant) and first.value in known:
        yield first.value
    elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
        prefix = str(first.values[0].value)
        children = (m for m in known if m.startswith(prefix) and "." in prefix)
        yield from (child for child in children if "." not in child[len(prefix) :])


def _with_packages(module: str) -> list[str]:
    """The packages that hold a module, and the module: a, a.b, a.b.c."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _longest_prefix(name: str, known: Modules) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _groups(graph: Graph) -> list[list[str]]:
    """Strongly connected components of two or more modules (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []
    for root in graph:
        todo = [(root, iter(graph[root]))] if root not in order else []
        while todo:
            module, targets = todo[-1]
            if module not in order:
                order[module] = low[module] = len(order)
                stack.append(module)
            for target in targets:
                if target not in order:
                    todo.append((target, iter(graph[target])))
                    break
                if target in stack:
                    low[module] = min(low[module], order[target])
            else:
                todo.pop()
                if todo:
                    low[todo[-1][0]] = min(low[todo[-1][0]], low[module])
                if low[module] == order[module]:
                    at = stack.index(module)
                    group, stack[at:] = stack[at:], []
                    groups += [sorted(group)] if len(group) > 1 else []
    return sorted(groups)


def _shortest(graph: Graph, group: list[str]) -> list[Edge]:
    """The shortest circle among the modules of a strongly connected component."""
    return min((_circle_at(graph, start, set(group)) for start in group), key=len)


def _circle_at(graph: Graph, start: str, group: set[str]) -> list[Edge]:
    """The shortest circle through a module, breadth first."""
    paths = deque([[edge] for edge in graph[start].values() if edge.target in group])
    reached: set[str] = set()
    while paths[0][-1].target != start:
        path = paths.popleft()
        at = path[-1].target
        if at not in reached:
            reached.add(at)
            paths += [[*path, edge] for edge in graph[at].values() if edge.target in group]
    return paths[0]


def _problem(circle: list[Edge]) -> str:
    first = circle[0]
    steps = "; ".join(f"{edge.path}:{edge.line} {edge.kind} {edge.target}" for edge in circle)
    return (
        f"{first.path}:{first.line}: import circle of {len(circle)} modules: {steps}; "
        "move what both sides need into a module below them"
    )
