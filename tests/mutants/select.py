"""Which tests run a line: measured once for a state of the tree, by coverage."""

import ast
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.mutants.child import measure
from tests.mutants.mutate import Mutant
from tests.mutants.pool import run_forks
from tests.mutants.targets import ROOT, file_digest

TESTS = ("tests/unit", "tests/golden")
_NEAR = (
    "adamw", "adapters", "ahead", "attention", "bpe", "cache", "carry_over", "custom_code",
    "dvae", "dvae_program", "equality", "error_buffers", "feed", "fid", "image_tokenizers",
    "keyed_noise", "modeling", "models", "modern_priors", "noise", "openai_dvae", "order",
    "orthogonal", "panels_suite", "paper_numbers", "parallel", "perceptual", "powersgd",
    "quantizers", "recompute", "registry", "running", "sampling", "scales", "schedules",
    "second_device", "second_device_pictures", "suite_criteria", "suites",
)  # fmt: skip
"""Tests of what is mutated, beside all `test_pins_*`; others run it too, but slowly."""
_COMPILES = "::test_flexible_attention_is_compiled"
"""Inductor does not compile in a fork of a warm process; which test pays for it is chance."""
MOST_SECONDS = 8.0
"""Of tests a mutant."""
_MEASURING = 900.0


@dataclass(kw_only=True)
class Selection:
    """Cost and covered lines of each test."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    """File -> line -> tests, or `file NAME` for all of a test file."""
    modules: list[str] = field(default_factory=list)
    forking: set[str] = field(default_factory=set)
    """Tests that run code of the modules that their file imports in forks, where it is not seen."""
    importers: dict[str, list[str]] = field(default_factory=dict)
    """File -> test files that import it by name."""

    def tests_of(self, path: str, first: int, last: int, most: float = MOST_SECONDS) -> list[str]:
        """The tests of some lines of a file, of all of it if `first` is 0; the cheapest first.

        They take at most `most` seconds together.
        """
        lines = self.lines.get(path, {})
        touched = lines if first == 0 else range(first, last + 1)
        names = {name for line in touched for name in lines.get(line, ())}
        importers = set(self.importers.get(path, ()))
        if first == 0:
            names |= {f"file {file}" for file in importers}
        names |= {test for test in self.forking if test.split("::")[0] in importers}
        files = {name.removeprefix("file ") for name in names if name.startswith("file ")}
        tests = {t for t in self.seconds if t in names or t.split("::")[0] in files}
        order = sorted(tests, key=lambda t: (t.split("::")[0] not in importers, self.seconds[t], t))
        spent, chosen = 0.0, []
        for test in order:
            spent += self.seconds[test]
            if spent > most:
                break
            chosen.append(test)
        return chosen

    def of(self, mutant: Mutant) -> list[str]:
        """The tests of a mutant."""
        return self.tests_of(mutant.path, *mutant.lines)


def selection(cache: Path, width: int) -> Selection:
    """Measure the tests whose files, or mutated files that they import, have changed."""
    folder = cache / "lines"
    folder.mkdir(exist_ok=True)
    stored = {file: folder / f"{file.replace('/', '-')}.json" for file in pinning_files()}
    _measure([file for file, path in stored.items() if not _is_fresh(path)], stored, width)
    seconds: dict[str, float] = {}
    lines: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    modules: set[str] = set()
    forking: set[str] = set()
    for path in stored.values():
        part = json.loads(path.read_text())
        seconds.update({t: s for t, s in part["tests"].items() if _COMPILES not in t})
        modules.update(part["modules"])
        forking.update(part["forking"])
        for name, rows in part["lines"].items():
            for line, tests in rows.items():
                lines[name][int(line)] += tests
    return Selection(
        seconds=seconds,
        lines=lines,
        modules=sorted(modules),
        forking=forking,
        importers=_importers(),
    )


def _measure(stale: list[str], stored: dict[str, Path], width: int) -> None:
    jobs = ((file, partial(measure, [file]), _MEASURING) for file in stale)
    for file, folder, _ in run_forks(jobs, width):
        if not (folder / "map.json").exists():
            raise SystemExit(f"{file} could not be measured:\n" + (folder / "log").read_text())
        shutil.copy(folder / "map.json", stored[file])


def pinning_files() -> list[str]:
    """Test files whose tests mutants are tried on."""
    paths = [path for top in TESTS for path in sorted((ROOT / top).rglob("test_*.py"))]
    names = [(path.stem.removeprefix("test_"), path) for path in paths]
    near = [path for name, path in names if name in _NEAR or name.startswith("pins_")]
    return [path.relative_to(ROOT).as_posix() for path in near]


def _is_fresh(path: Path) -> bool:
    if not path.exists():
        return False
    digests: dict[str, str] = json.loads(path.read_text())["files"]
    return all((ROOT / f).is_file() and file_digest(f) == known for f, known in digests.items())


def _importers() -> dict[str, list[str]]:
    importers: dict[str, list[str]] = defaultdict(list)
    for folder in TESTS:
        for path in sorted((ROOT / folder).rglob("test_*.py")):
            name = path.relative_to(ROOT).as_posix()
            for module in _imported(ast.parse(path.read_bytes())):
                importers[module.replace(".", "/") + ".py"].append(name)
    return importers


def _imported(tree: ast.Module) -> set[str]:
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules
