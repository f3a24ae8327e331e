"""Which tests run a line: measured once for a state of the tree, by coverage."""

import ast
import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.mutants.child import measure
from tests.mutants.mutate import Mutant
from tests.mutants.pool import run_forks
from tests.mutants.targets import PACKAGES, ROOT, digest_of

TESTS = ("tests/unit", "tests/golden")
_FAR = (
    "core", "doctor", "store", "wheels", "gpu_run", "fork", "runfile", "watch", "profile",
    "profile_report", "report", "flight", "worker_device", "overlap", "lookup",
)  # fmt: skip
"""Tests of machines and folders, which run no line that is mutated but by the way."""
MOST_SECONDS = 8.0
"""Of tests a mutant."""
_MEASURING = 900.0


@dataclass(kw_only=True)
class Selection:
    """What each test costs and runs."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    """File -> line -> tests, or `file NAME` for all of a test file."""
    modules: list[str] = field(default_factory=list)
    importers: dict[str, list[str]] = field(default_factory=dict)
    """File -> test files that import it by name."""

    def tests_of(self, path: str, first: int, last: int) -> list[str]:
        """The tests of some lines of a file, of all of it if `first` is 0; the cheapest first."""
        lines = self.lines.get(path, {})
        touched = lines if first == 0 else range(first, last + 1)
        names = {name for line in touched for name in lines.get(line, ())}
        if first == 0:
            names |= {f"file {file}" for file in self.importers.get(path, ())}
        files = {name.removeprefix("file ") for name in names if name.startswith("file ")}
        tests = {t for t in self.seconds if t in names or t.split("::")[0] in files}
        near = set(self.importers.get(path, ()))
        order = sorted(tests, key=lambda t: (t.split("::")[0] not in near, self.seconds[t], t))
        spent, found = 0.0, []
        for test in order:
            spent += self.seconds[test]
            if spent > MOST_SECONDS:
                break
            found.append(test)
        return found

    def of(self, mutant: Mutant) -> list[str]:
        """The tests of a mutant."""
        return self.tests_of(mutant.path, *mutant.lines)


def selection(cache: Path, width: int) -> Selection:
    """Measure the tests, or take what was measured for the same tree."""
    file = cache / f"lines-{digest_of([*PACKAGES, 'tests'])}.json"
    if not file.exists():
        for old in cache.glob("lines-*.json"):
            old.unlink()
        file.write_text(json.dumps(_measured(width)))
    found = json.loads(file.read_text())
    lines = {f: {int(k): v for k, v in rows.items()} for f, rows in found["lines"].items()}
    return Selection(
        seconds=found["tests"], lines=lines, modules=found["modules"], importers=_importers()
    )


def _measured(width: int) -> dict[str, object]:
    far = [f"--ignore=tests/unit/test_{name}.py" for name in _FAR]
    tests = [*TESTS, *far]
    jobs = ((part, partial(measure, tests, part, width), _MEASURING) for part in range(width))
    seconds: dict[str, float] = {}
    lines: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    modules: set[str] = set()
    for _, folder, _ in run_forks(jobs, width):
        if not (folder / "map.json").exists():
            raise SystemExit("the tests could not be measured:\n" + (folder / "log").read_text())
        part = json.loads((folder / "map.json").read_text())
        seconds.update(part["tests"])
        modules.update(part["modules"])
        for name, rows in part["lines"].items():
            for line, names in rows.items():
                lines[name][line] += names
    return {"tests": seconds, "lines": lines, "modules": sorted(modules)}


def _importers() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for folder in TESTS:
        for path in sorted((ROOT / folder).glob("test_*.py")):
            name = path.relative_to(ROOT).as_posix()
            for module in _imported(ast.parse(path.read_bytes())):
                found[module.replace(".", "/") + ".py"].append(name)
    return found


def _imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found
