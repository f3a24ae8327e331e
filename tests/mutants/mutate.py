"""Every small change of a source file: operators, signs, comparisons, constants, keywords.

Messages, annotations, decorators and asserts stay as they are, and so does `strict` of zip: they do
not change what is computed.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from tests.mutants.targets import is_message

BINARY: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
COMPARE: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    path: str
    start: int
    """Byte at which the change begins."""
    end: int
    new: str
    line: int
    lines: tuple[int, int]
    """First and last line of what runs it; (0, 0) if that is the import."""
    kind: str
    label: str
    """The line (or lines, as one) before and after the change."""

    @property
    def key(self) -> str:
        """Identifies it among the mutants of the same source."""
        text = f"{self.path}:{self.start}:{self.end}:{self.new}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def apply(source: bytes, mutant: Mutant) -> bytes:
    """The changed source."""
    return source[: mutant.start] + mutant.new.encode() + source[mutant.end :]


def mutants_of(path: str, source: bytes, functions: frozenset[str]) -> list[Mutant]:
    """All changes of a file that compile, in the order of the source."""
    mutants = list(_Walk(path, source, functions).run())
    return sorted(mutants, key=lambda m: (m.start, m.end, m.new))


class _Walk:
    def __init__(self, path: str, source: bytes, functions: frozenset[str]) -> None:
        self._path, self._source, self._functions = path, source, functions
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def run(self) -> Iterator[Mutant]:
        yield from self._of(ast.parse(self._source), (0, 0), not self._functions)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _begin(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._at(node.lineno, node.col_offset)

    def _end(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._at(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def _of(self, node: ast.AST, lines: tuple[int, int], on: bool) -> Iterator[Mutant]:
        """The changes in and below a node that runs when `lines` do."""
        if is_message(node):
            return
        if isinstance(node, ast.FunctionDef):
            inside = on or node.name in self._functions
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None and inside:
                    yield from self._default(default)
            for child in node.body:
                yield from self._of(child, (child.lineno, child.lineno), inside)
            return
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                yield from self._of(child, lines, on)
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.stmt) and lines != (0, 0):
            last = node.end_lineno or node.lineno
            body = getattr(node, "body", None)
            if isinstance(body, list) and body:
                last = max(node.lineno, body[0].lineno - 1)
            lines = node.lineno, last
        if on:
            for start, end, new, kind in self._changes(node):
                yield self._mutant(start, end, new, kind, lines)
            if isinstance(node, ast.AnnAssign) and lines == (0, 0) and node.value is not None:
                yield from self._default(node.value, strings_alone=True)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            if isinstance(node, ast.Call) and field == "keywords" and _is_zip(node):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._of(child, lines, on)

    def _default(self, node: ast.expr, strings_alone: bool = False) -> Iterator[Mutant]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            changed = repr(node.value + "_")
            yield self._mutant(self._begin(node), self._end(node), changed, "default", (0, 0))
        elif not strings_alone:
            yield from self._of(node, (0, 0), True)

    def _mutant(self, start: int, end: int, new: str, kind: str, lines: tuple[int, int]) -> Mutant:
        line = self._source[:start].count(b"\n") + 1
        first = self._starts[line - 1]
        last = self._starts[line + self._source[start:end].count(b"\n")]
        before = self._source[first:last].decode()
        after = (self._source[first:start] + new.encode() + self._source[end:last]).decode()
        return Mutant(
            path=self._path, start=start, end=end, new=new, line=line, lines=lines, kind=kind,
            label="  ->  ".join(" ".join(text.split()) for text in (before, after)),
        )  # fmt: skip

    def _changes(self, node: ast.AST) -> Iterator[tuple[int, int, str, str]]:
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            yield self._between(node.left, node.right, old, new, "operator")
        elif isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            yield self._between(node.target, node.value, f"{old}=", f"{new}=", "operator")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield self._between(left, right, old, new, "operator")
        elif isinstance(node, ast.UnaryOp):
            begin, inner = self._begin(node), self._begin(node.operand)
            sign = {ast.USub: "-", ast.Not: "not", ast.Invert: "~", ast.UAdd: "+"}[type(node.op)]
            yield begin, min(begin + len(sign), inner), "", "sign"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
                old, changed = COMPARE[type(op)]
                for new in changed:
                    yield self._between(left, right, old, new, "comparison")
        elif isinstance(node, ast.Constant):
            new = _other(node.value)
            if new is not None:
                yield self._begin(node), self._end(node), new, "constant"
        elif isinstance(node, ast.Call):
            yield from self._without_keywords(node)
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            test = node.test
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                text = self._source[self._begin(test) : self._end(test)].decode()
                named = isinstance(test, ast.NamedExpr)
                turned = f"(not ({text}))" if named else f"(not {text})"
                yield self._begin(test), self._end(test), turned, "comparison"

    def _between(
        self, left: ast.expr, right: ast.expr, old: str, new: str, kind: str
    ) -> tuple[int, int, str, str]:
        start = self._end(left)
        at = self._source.index(old.split()[0].encode(), start, self._begin(right))
        end = at + len(old.split()[0])
        if " " in old:
            second = old.split()[1].encode()
            end = self._source.index(second, end, self._begin(right)) + len(second)
        return at, end, new, kind

    def _without_keywords(self, call: ast.Call) -> Iterator[tuple[int, int, str, str]]:
        if _is_zip(call):
            return
        given: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        given.sort(key=self._begin)
        for i, each in enumerate(given):
            if not isinstance(each, ast.keyword) or each.arg is None:
                continue
            if i + 1 < len(given):
                yield self._begin(each), self._begin(given[i + 1]), "", "keyword"
            else:
                before = self._end(given[i - 1]) if i else self._begin(each)
                yield before, self._end(each), "", "keyword"


def _is_zip(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "zip"


def _other(value: object) -> str | None:
    """Another constant of its type; None for strings and what has no other."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return repr(value * 2 or 1.0)
    return None
