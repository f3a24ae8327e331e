"""Tries mutants in forks of one process that has imported the project and collected its tests.

A change inside of functions needs no new import: the fork gives them the changed code. Whatever
runs while modules are imported (constants, defaults, class bodies, functions that they call) is
left to child.py, whose forks import the project anew.
"""

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.mutants.child import QUIET, Finder, Verdict, forget, limit, module_of
from tests.mutants.targets import ROOT, targets

_Key = tuple[str, str, int]
"""File, qualified name and first line of a function."""
Loop = Callable[["Warm"], None]
"""Which tries mutants, once the tests are collected."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A changed file whose changes lie inside of functions."""

    path: str
    source: bytes
    codes: Mapping[_Key, CodeType]
    """The changed code of each function that differs, those around it included."""


def patch_of(path: str, before: bytes, after: bytes) -> Patch | None:
    """The functions that a change of a file changes; None if it changes what an import runs."""
    file = str(ROOT / path)
    old, new = (compile(text, file, "exec", dont_inherit=True) for text in (before, after))
    codes: dict[_Key, CodeType] = {}
    if not _differences(old, new, codes, inside=False):
        return None
    return Patch(path=path, source=after, codes=codes)


def _differences(old: CodeType, new: CodeType, changed: dict[_Key, CodeType], inside: bool) -> bool:
    """Collect what differs below two codes; False if a change is not inside of a function."""
    inner = [[each for each in code.co_consts if isinstance(each, CodeType)] for code in (old, new)]
    if len(inner[0]) != len(inner[1]) or (not inside and _own(old) != _own(new)):
        return False
    for one, other in zip(*inner, strict=True):
        function = inside or bool(one.co_flags & 1)  # CO_OPTIMIZED: not a class body
        if one == other:
            continue
        if function:
            if one.co_freevars != other.co_freevars or _key(one) in changed:
                return False
            changed[_key(one)] = other
        if not _differences(one, other, changed, function):
            return False
    return True


def _own(code: CodeType) -> tuple[Any, ...]:
    consts = tuple((type(c), c) for c in code.co_consts if not isinstance(c, CodeType))
    return code.co_code, repr(consts), code.co_names, code.co_varnames


def _key(code: CodeType) -> _Key:
    return os.path.realpath(code.co_filename), code.co_qualname, code.co_firstlineno


class Warm:
    """A pytest session whose collected tests run in forks."""

    def __init__(self) -> None:
        self._session: pytest.Session
        self._items: dict[str, pytest.Item] = {}
        self._functions: dict[_Key, list[FunctionType]] = defaultdict(list)
        self._called: set[_Key] = set()
        """Functions that ran while the project or the tests were imported."""

    def run(self, files: Sequence[str], loop: Loop) -> None:
        """Collect the tests of some files and call `loop` in that session."""
        plugin = _Session(self, loop)
        mine = {str(ROOT / target.path) for target in targets()}

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename in mine:
                self._called.add(_key(frame.f_code))

        sys.setprofile(note)
        try:
            pytest.main([*files, *QUIET, "-s", "--disable-warnings"], plugins=[plugin])
        finally:
            sys.setprofile(None)
        if plugin.broken:
            raise SystemExit(f"the tests could not be collected: {plugin.broken}")

    def collected(self, session: pytest.Session) -> None:
        """Note the tests and functions of a session that has collected."""
        sys.setprofile(None)
        self._session = session
        self._items = {item.nodeid: item for item in session.items}
        gc.collect()
        for each in gc.get_objects():
            if isinstance(each, FunctionType) and each.__code__.co_filename.startswith(str(ROOT)):
                self._functions[_key(each.__code__)].append(each)
        gc.freeze()

    def can(self, patch: Patch | None, tests: Sequence[str]) -> bool:
        """True if a change needs no new import."""
        return (
            patch is not None
            and all(test in self._items for test in tests)
            and not self._called & set(patch.codes)
            and (module_of(patch.path) not in sys.modules or self._has(patch))
        )

    def _has(self, patch: Patch) -> bool:
        tops = [key for key in patch.codes if "<locals>" not in key[1]]
        return bool(tops) and all(key in self._functions for key in tops)

    def try_patch(
        self,
        patch: Patch | None,
        tests: Sequence[str],
        out: Path,
        *,
        seconds: Mapping[str, float],
        patience: float = 1.0,
    ) -> None:
        """As try_sources, in a fork of this session; without a patch, all tests run."""
        limit(out, patience)
        if patch is not None:
            self._change(patch)
        forget()
        factory = self._session.config._tmp_path_factory  # type: ignore[attr-defined]
        factory._given_basetemp, factory._basetemp = out / "tmp", None
        verdict = Verdict(seconds, patience)
        self._session.config.pluginmanager.register(verdict)
        failed = []
        items = [self._items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if verdict.failed:
                failed.append(verdict.failed)
                verdict.failed = ""
                if patch is not None:
                    break
        (out / "failed").write_text("\n".join(failed))

    def _change(self, patch: Patch) -> None:
        if module_of(patch.path) not in sys.modules:
            sys.meta_path.insert(0, Finder({patch.path: patch.source}))  # type: ignore[arg-type]
            return
        for key, code in patch.codes.items():
            for function in self._functions.get(key, ()):
                function.__code__ = code


class _Session:
    """The pytest plugin that hands the collected tests to the loop."""

    def __init__(self, warm: Warm, loop: Loop) -> None:
        self._warm, self._loop = warm, loop
        self.broken = ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.broken:
            self.broken = f"{report.nodeid}: {report.longrepr}"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not self.broken:
            self._warm.collected(session)
            self._loop(self._warm)
        return True
