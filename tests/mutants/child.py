"""Runs some tests in a fork, with one module of the project changed."""

import functools
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import coverage
import pytest

from tests.mutants.targets import PACKAGES, ROOT, file_digest, targets

MEMORY = 8 * 2**30
"""Bytes that a mutant may take."""
LONGEST = 3.0
"""Seconds of a core; tests that take longer are not run on mutants."""
_NOT_RUN = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
"""No test failed: a mutant that changes the names of tests is not caught by that."""
QUIET = ["-q", "--tb=line", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:logging"]


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._changed = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._changed, self.path, "exec", dont_inherit=True)
        return code


class Finder:
    """Import finder for changed sources; other modules are imported normally."""

    def __init__(self, sources: dict[str, bytes]) -> None:
        self._sources = {module_of(path): (path, text) for path, text in sources.items()}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._sources:
            return None
        file, text = self._sources[name]
        where = str(ROOT / file)
        return importlib.util.spec_from_file_location(
            name, where, loader=_Loader(name, where, text)
        )


def module_of(path: str) -> str:
    """The module of a file, named from the root."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Verdict:
    """Records the first failed test, and kills this process if a test does not end."""

    def __init__(self, seconds: Mapping[str, float], patience: float) -> None:
        self.failed = ""
        self._seconds, self._patience = seconds, patience

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        usual = self._seconds.get(nodeid, LONGEST)
        _may_compute(self._patience * (5 + 5 * usual))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


def _may_compute(seconds: float) -> None:
    """Have the kernel send SIGXCPU after this many more CPU seconds."""
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def try_sources(
    sources: dict[str, bytes],
    tests: Sequence[str],
    out: Path,
    *,
    seconds: Mapping[str, float],
    patience: float = 1.0,
) -> None:
    """Run tests with changed sources, to the first failure, and write what failed.

    `seconds` are the tests' usual times; a test that computes for 5 s and five times as long
    counts as endless, `patience` times as long if it is tried again.
    """
    limit(out, patience)
    sys.meta_path.insert(0, Finder(sources))  # type: ignore[arg-type]
    verdict = Verdict(seconds, patience)
    code = pytest.main([*tests, "-x", *QUIET, f"--basetemp={out}/tmp"], plugins=[verdict])
    unknown = code not in (pytest.ExitCode.OK, *_NOT_RUN)
    failed = verdict.failed or (f"pytest ended with {int(code)}" if unknown else "")
    (out / "failed").write_text(failed)


def measure(files: Sequence[str], out: Path) -> None:
    """Run the tests of some files and write which lines of the project each of them runs."""
    _begin(out)
    watcher = _Watcher()
    pytest.main([*files, *QUIET, f"--basetemp={out}/tmp"], plugins=[watcher])
    watcher.coverage.stop()
    record: dict[str, Any] = {"tests": watcher.passed, "lines": watcher.lines()}
    record["modules"] = sorted(set(sys.modules))
    record["files"] = {name: file_digest(name) for name in _own_files()}
    record["forking"] = sorted(watcher.forking & set(watcher.passed))
    (out / "map.json").write_text(json.dumps(record))


def _own_files() -> list[str]:
    """Imported files that are mutated or are tests."""
    files = [Path(getattr(module, "__file__", None) or "/") for module in sys.modules.values()]
    names = {f.relative_to(ROOT).as_posix() for f in files if f.is_relative_to(ROOT)}
    mutated = {target.path for target in targets()}
    return sorted(n for n in names if n in mutated or n.startswith(("tests/unit", "tests/golden")))


class _Watcher:
    """Attributes lines to tests; lines run by a file's fixtures, to all of its tests."""

    def __init__(self) -> None:
        self.coverage = coverage.Coverage(
            data_file=None, source=[str(ROOT / name) for name in PACKAGES if name != "tapir"],
            config_file=False, messages=False,
        )  # fmt: skip
        self.passed: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self.forking: set[str] = set()
        """Tests whose forks run lines that nobody sees here."""
        self._now = ""
        os.register_at_fork(before=lambda: self.forking.add(self._now))
        self._broken: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if not any(item.get_closest_marker(name) for name in ("world", "slow", "big"))
            and "s3" not in getattr(item, "fixturenames", ())
        ]
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        forget()
        self.coverage.switch_context("file " + item.nodeid.split("::")[0])
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        self._now = item.nodeid
        began = _cpu_seconds()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid] = _cpu_seconds() - began
            self.coverage.switch_context("")
            self._now = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._broken.add(report.nodeid)
        elif report.when == "call" and self._seconds[report.nodeid] < LONGEST:
            self.passed[report.nodeid] = self._seconds[report.nodeid]
        if report.nodeid in self._broken:
            self.passed.pop(report.nodeid, None)

    def lines(self) -> dict[str, dict[int, list[str]]]:
        """File -> line -> tests."""
        tests: dict[str, dict[int, list[str]]] = {}
        data = self.coverage.get_data()
        for file in data.measured_files():
            name = Path(file).relative_to(ROOT).as_posix()
            tests[name] = {
                line: sorted(
                    c for c in contexts if c in self.passed or c.startswith("file ")
                )
                for line, contexts in data.contexts_by_lineno(file).items()
            }  # fmt: skip
        return tests


def _cpu_seconds() -> float:
    """CPU seconds of this process and its reaped children, independent of other load."""
    return sum(os.times()[:4])


def forget() -> None:
    """Empty the project's result caches, so that every test computes its own."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in PACKAGES:
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def limit(out: Path, patience: float) -> None:
    """Make this process a fork that tries a mutant: limited, and silent but for a log."""
    _begin(out)
    _may_compute(60 * patience)


def _begin(out: Path) -> None:
    os.chdir(ROOT)
    sys.argv = ["pytest"]
    os.environ["TAPIR_COLD"] = "1"  # a warm process pays off only in a long session
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (out / "log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
