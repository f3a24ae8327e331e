"""Tries mutants, a fork each: with the project imported anew, or in one process that has it.

First those whose change is seen by an import; then all others in a warm process (warm.py), which
this process becomes.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.mutants.child import try_sources
from tests.mutants.mutate import Mutant, apply
from tests.mutants.pool import Work, run_forks
from tests.mutants.select import Selection
from tests.mutants.targets import ROOT
from tests.mutants.verdicts import Verdicts
from tests.mutants.warm import Patch, Warm, patch_of

_COLLECTING = 600.0
"""Seconds that collecting the tests, or running them all once, may take."""
_PATIENT = 3.0
"""How much longer a mutant may take that is tried again, alone."""


def try_all(mutants: Sequence[Mutant], chosen: Selection, verdicts: Verdicts, width: int) -> None:
    """Find a verdict on each mutant; this process is of no other use afterwards."""
    _Loop(mutants, chosen, verdicts, width).run()


def killer_of(folder: Path, status: int | None) -> str:
    """The test that failed in a fork, `time` if it did not end; empty if none failed."""
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "time"
    file = folder / "failed"
    return file.read_text() if file.exists() else f"ended with status {status}"


class _Loop:
    def __init__(
        self, mutants: Sequence[Mutant], chosen: Selection, verdicts: Verdicts, width: int
    ) -> None:
        self._all, self._chosen, self._verdicts = mutants, chosen, verdicts
        self._width = width
        self._began, self._done = time.monotonic(), 0

    def run(self) -> None:
        tested = {mutant: self._chosen.of(mutant) for mutant in self._all}
        files = sorted({test.split("::")[0] for tests in tested.values() for test in tests})
        cold = self._cold(files)
        self._try([m for m in self._all if m.key in cold], self._anew)
        rest = [m for m in self._all if m.key not in cold]
        if rest:
            Warm().run(files, partial(self._in_session, rest))

    def _cold(self, files: Sequence[str]) -> set[str]:
        """Keys of the mutants that need a new import: a fork collects the tests and finds out."""

        def find(warm: Warm, folder: Path) -> None:
            keys = [m.key for m in self._all if not warm.can(_patch(m), self._chosen.of(m))]
            (folder / "cold").write_text(" ".join(keys))

        def work(folder: Path) -> None:
            Warm().run(files, partial(find, folder=folder))

        for _, folder, _ in run_forks(iter([("scout", work, _COLLECTING)]), 1):
            if not (folder / "cold").exists():
                raise SystemExit("the tests could not be collected: see above")
            return set((folder / "cold").read_text().split())
        return set()

    def _in_session(self, mutants: Sequence[Mutant], warm: Warm) -> None:
        self._check(warm, sorted({test for m in mutants for test in self._chosen.of(m)}))
        self._try(mutants, partial(self._warm, warm))

    def _check(self, warm: Warm, tests: Sequence[str]) -> None:
        """Run tests without a mutant: one that fails so would catch everything."""
        jobs = (
            (i, partial(warm.try_patch, None, part, seconds=self._chosen.seconds), _COLLECTING)
            for i in range(self._width)
            if (part := tests[i :: self._width])
        )
        for _, folder, status in run_forks(jobs, self._width):
            if broken := killer_of(folder, status):
                print((folder / "log").read_text()[-4000:])
                raise SystemExit(f"without a mutant fails: {broken}")

    def _try(self, mutants: Sequence[Mutant], work_of: Callable[[Mutant, float], Work]) -> None:
        again = []
        for mutant, folder, status in run_forks(self._jobs(mutants, work_of, 1.0), self._width):
            killer = killer_of(folder, status)
            if killer and "::" not in killer:
                again.append(mutant)
            else:
                self._verdicts.add(mutant, self._chosen.of(mutant), killer)
            self._done += 1
            if self._done % 50 == 0:
                seconds = time.monotonic() - self._began
                print(f"{self._done} of {len(self._all)}, {seconds:.0f} s", flush=True)
        for mutant, folder, status in run_forks(self._jobs(again, work_of, _PATIENT), 1):
            self._verdicts.add(mutant, self._chosen.of(mutant), killer_of(folder, status))

    def _jobs(
        self, mutants: Sequence[Mutant], work_of: Callable[[Mutant, float], Work], patience: float
    ) -> Iterator[tuple[Mutant, Work, float]]:
        for mutant in mutants:
            usual = sum(self._chosen.seconds[test] for test in self._chosen.of(mutant))
            yield mutant, work_of(mutant, patience), patience * (60 + 3 * usual)

    def _anew(self, mutant: Mutant, patience: float) -> Work:
        tests = self._chosen.of(mutant)
        if not tests:
            return _nothing
        changed = {mutant.path: apply((ROOT / mutant.path).read_bytes(), mutant)}
        return partial(try_sources, changed, tests, seconds=self._chosen.seconds, patience=patience)

    def _warm(self, warm: Warm, mutant: Mutant, patience: float) -> Work:
        tests = self._chosen.of(mutant)
        if not tests:
            return _nothing
        how = {"seconds": self._chosen.seconds, "patience": patience}
        return partial(warm.try_patch, _patch(mutant), tests, **how)


def _patch(mutant: Mutant) -> Patch | None:
    before = (ROOT / mutant.path).read_bytes()
    return patch_of(mutant.path, before, apply(before, mutant))


def _nothing(folder: Path) -> None:
    (folder / "failed").write_text("")
